"""Nodes as Python expressions."""

from __future__ import annotations

import builtins
import inspect
import math
import operator
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from indistill_fx.compression.source_pieces import (
    SIZE,
    Imports,
    Line,
    Literal,
    commas,
    literal,
    numbers,
    record_class,
    unwritable,
)
from indistill_fx.passes.capture.both_modes import choose

Name = Callable[[fx.Node], Line]
"""A node's value in code."""

_INFIX: Mapping[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.and_: "&", operator.or_: "|",
    operator.xor: "^", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">",
    operator.ge: ">=", operator.lshift: "<<", operator.rshift: ">>",
}  # fmt: skip
_PREFIX: Mapping[Any, str] = {operator.neg: "-", operator.invert: "~", operator.not_: "not ", operator.pos: "+"}
_INPLACE: Mapping[Any, str] = {
    operator.iadd: "+=", operator.isub: "-=", operator.imul: "*=", operator.itruediv: "/=", operator.ipow: "**=",
    operator.iand: "&=", operator.ior: "|=",
}  # fmt: skip
_SIGNS: Mapping[Any, str] = {
    **_INFIX, "add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", torch.add: "+", torch.sub: "-", torch.mul: "*",
    torch.div: "/", torch.matmul: "@",
}  # fmt: skip
_RESHAPES = ("view", "reshape", "expand", "repeat", "unflatten")
_TAKES_NUMBERS = ("view", "reshape", "permute", "expand", "repeat")
"""Methods whose numbers may stand alone or in a tuple."""


def is_size(node: fx.Node) -> bool:
    """Whether a node is `x.size()` or `x.size(1)`, which is written `x.shape` and `x.shape[1]`."""
    return node.op == "call_method" and node.target == "size"


def is_arithmetic(node: fx.Node) -> bool:
    """Whether a node is two values with a sign between, as `a + b`."""
    return node.op == "call_function" and node.target in _INFIX and len(node.args) == 2 and not node.kwargs


def expression(node: fx.Node, name: Name, module: Line, imports: Imports) -> Line:
    """The code of one node.

    Args:
        node: a call.
        name: what other nodes' values are called.
        module: the layer it calls, if it calls one.
        imports: collects what the code needs.

    Raises:
        ExportError: it has no code.
    """
    argument = _Arguments(node, name)
    if node.op == "call_module":
        return (*module, *argument.call(node.args, node.kwargs))
    sign = _SIGNS.get(node.target) if len(node.args) == 2 and not node.kwargs else None
    if sign is not None and node.op != "call_module":
        left = argument.atom(node.args[0])
        negative = sign == "**" and isinstance(node.args[0], (int, float)) and node.args[0] < 0
        return (*(("(", *left, ")") if negative else left), f" {sign} ", *argument.atom(node.args[1]))
    if is_size(node):
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return (
            *argument.atom(node.args[0]),
            ".shape",
            *(() if axis is None else ("[", *argument.value(axis, "axis"), "]")),
        )
    if (
        node.op == "call_method"
        and node.target in _TAKES_NUMBERS
        and len(node.args) == 2
        and isinstance(node.args[1], (tuple, list))
        and node.args[1]
    ):
        return (*argument.atom(node.args[0]), f".{node.target}", *argument.call(tuple(node.args[1]), node.kwargs))
    if node.op == "call_method":
        return (*argument.atom(node.args[0]), f".{node.target}", *argument.call(node.args[1:], node.kwargs))
    target: Any = node.target
    if target is choose:
        flag, trained, evaluated = (argument.value(value, "value") for value in node.args)
        return ("(", *trained, " if ", *flag, " else ", *evaluated, ")")
    if target is getattr and len(node.args) == 2:
        return (*argument.atom(node.args[0]), f".{node.args[1]}")
    if target is operator.getitem:
        return (*argument.atom(node.args[0]), "[", *argument.key(node.args[1]), "]")
    if target in _PREFIX and len(node.args) == 1:
        return (_PREFIX[target], *argument.atom(node.args[0]))
    return (function_name(node, target, imports), *argument.call(node.args, node.kwargs))


def write_into(node: fx.Node, name: Name) -> tuple[Line, Line, Line]:
    """The code of what `with_item` writes into a copy of, of the index and of the value."""
    argument = _Arguments(node, name)
    source, index, value = node.args
    return argument.atom(source), argument.key(index), argument.value(value, "value")


def function_name(node: fx.Node, target: Any, imports: Imports) -> str:
    """How a function is called in the generated file.

    Raises:
        ExportError: it is the user's own, or has no name.
    """
    if isinstance(target, torch._ops.OpOverload):
        return f"{_packet_name(target._schema.name, imports)}.{target._overloadname}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _packet_name(target._qualified_op_name, imports)
    name = str(getattr(target, "__name__", ""))
    for module, prefix in (
        (F, "F"),
        (torch, "torch"),
        (torch.Tensor, "torch.Tensor"),
        (math, "math"),
        (operator, "operator"),
    ):
        if name and getattr(module, name, None) is target:
            if module in (math, operator):
                imports.lines.add(f"import {prefix}")
            return f"{prefix}.{name}"
    if target is getattr(builtins, name, None):
        return name
    if target in _INPLACE:
        return f"operator.{name}"
    home_name = str(getattr(target, "__module__", ""))
    if home_name.startswith("indistill_fx."):
        imports.own[name] = target
        return name
    found = getattr(sys.modules.get(home_name), name, None)
    if found and inspect.unwrap(found) is inspect.unwrap(target) and _is_installed(home_name):
        imports.lines.add(f"from {home_name} import {name}")
        return name
    if (text := record_class(target)) is not None and imports.records.setdefault(name, text) == text:
        return name
    raise unwritable(
        node.name, f"it calls `{name or target}` of `{home_name or 'nowhere'}`, which is not a function of PyTorch"
    )


@cache
def _is_installed(home: str) -> bool:
    """Whether a module belongs to an installed package, from which the generated file can import as the original does."""
    return home.split(".")[0] in packages_distributions()


def _packet_name(name: str, imports: Imports) -> str:
    """The name of an operator of torch, or of a library that registers operators with torch."""
    namespace, _, packet = name.partition("::")
    if namespace == "torchvision":
        imports.lines.add("import torchvision")
    return f"torch.ops.{namespace}.{packet}"


class _Arguments:
    """Arguments of one node as code."""

    def __init__(self, node: fx.Node, name: Name):
        self.node, self.name = node, name
        try:
            known = dict(inspect.signature(node.target).parameters) if callable(node.target) else {}
        except ValueError:  # builtins have no signature
            known = {}
        self.names = tuple(known)
        self.defaults = {key: parameter.default for key, parameter in known.items()}

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Line:
        parts = [self.value(arg, self.names[k] if k < len(self.names) else "") for k, arg in enumerate(args)]
        parts += [(f"{key}=", *self.value(arg, key)) for key, arg in kwargs.items() if not self._is_default(key, arg)]
        return ("(", *commas(parts), ")")

    def _is_default(self, key: str, arg: Any) -> bool:
        """Whether an argument need not be written: a flag, or one that is not meant for users."""
        default = self.defaults.get(key, inspect.Parameter.empty)
        return (
            type(arg) is type(default) and arg == default and (type(arg) in (bool, type(None)) or key.startswith("_"))
        )

    def value(self, value: Any, keyword: str) -> Line:
        if isinstance(value, fx.Node):
            return self.name(value)
        several = isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
        if several and any(_has_node(v) or isinstance(v, slice) or v is ... for v in value):
            inner = commas([self.value(v, keyword) for v in value])
            opening, closing = "()" if isinstance(value, tuple) else "[]"
            return (opening, *inner, "," if isinstance(value, tuple) and len(value) == 1 else "", closing)
        if isinstance(value, dict):
            pairs = [(f"{literal(key)}: ", *self.value(v, keyword)) for key, v in value.items()]
            return ("{", *commas(pairs), "}")
        if isinstance(value, slice):
            return ("slice(", *commas([self.value(v, keyword) for v in (value.start, value.stop, value.step)]), ")")
        preferred = (keyword or str(getattr(self.node.target, "__name__", self.node.target))).strip("_")
        preferred = SIZE if preferred in _RESHAPES else preferred
        if (
            isinstance(value, (tuple, list))
            and not isinstance(value, torch.Size)
            and value
            and all(type(v) is int for v in value)
        ):
            opening, closing = "()" if isinstance(value, tuple) else "[]"
            return (
                opening,
                *numbers(value, preferred),
                "," if isinstance(value, tuple) and len(value) == 1 else "",
                closing,
            )
        try:
            text = literal(value)
        except ValueError as error:
            raise unwritable(self.node.name, f"an argument of it is {error}") from error
        return (Literal(text, preferred),)

    def atom(self, value: Any) -> Line:
        """A value as an expression that needs no parentheses around it."""
        line = self.value(value, "value")
        plain = "".join(piece if isinstance(piece, str) else "0" for piece in line)
        return ("(", *line, ")") if " " in _outside(plain) else line

    def key(self, value: Any) -> Line:
        if isinstance(value, tuple):
            parts = [self.key(v) if isinstance(v, slice) else self.value(v, "index") for v in value]
            return (*commas(parts), "," if len(parts) == 1 else "") if parts else ("()",)
        if isinstance(value, slice):
            ends = [() if v is None else self.value(v, "index") for v in (value.start, value.stop)]
            step: Line = () if value.step is None else (":", *self.value(value.step, "index"))
            return (*ends[0], ":", *ends[1], *step)
        return self.value(value, "index")


def _outside(text: str) -> str:
    """A text without the parts in brackets."""
    depth, kept = 0, []
    for letter in text:
        depth -= letter in ")]}"
        if not depth:
            kept.append(letter)
        depth += letter in "([{"
    return "".join(kept)


def _has_node(value: Any) -> bool:
    return bool(fx.node.map_arg(value, lambda n: n) is not None) and any(
        isinstance(leaf, fx.Node)
        for leaf in torch.utils._pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, fx.Node))
    )
