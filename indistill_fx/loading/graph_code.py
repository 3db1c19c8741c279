"""The graph of a pickled `torch.fx.GraphModule`, read from the source code that stands for it in the file; that code is never run.

torch pickles a graph module as the text that torch.fx wrote for it, and would run the text to trace it again. Here the text is parsed and
each statement becomes a node, if it has a form that torch.fx writes:

  1. One function, `forward(self, …)`, whose body is assignments and ends in `return`.
  2. An assignment does one thing: it calls a submodule, a listed function of torch or torchvision, or a method of tensors that computes; it
     applies an operator; or it reads a listed attribute of a value, or a parameter or buffer.
  3. Its operands are names, numbers, strings, dtypes and other constants of torch, devices, slices, and containers of these.
  4. A name stands for one result, never for a container or a text: a few lines of names within names would be gigabytes when written out.

Everything else is refused.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from indistill_fx.graph.names import is_plain, reserved
from indistill_fx.loading.allow_list import GRAPH_ATTRIBUTES, GRAPH_FUNCTIONS, GRAPH_METHODS, constant_of_torch, look_up
from indistill_fx.loading.operators import may_be_called

_LONGEST = 1 << 21
"""Characters; a large network of timm's has a fifth of it."""
_BINARY: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.MatMult: operator.matmul,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.Gt: operator.gt,
    ast.LtE: operator.le,
    ast.GtE: operator.ge,
}
_UNARY: dict[type[ast.AST], Callable[..., Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}
_IN_PLACE: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.iadd,
    ast.Sub: operator.isub,
    ast.Mult: operator.imul,
    ast.FloorDiv: operator.ifloordiv,
    ast.Div: operator.itruediv,
    ast.Mod: operator.imod,
    ast.Pow: operator.ipow,
    ast.BitAnd: operator.iand,
    ast.BitOr: operator.ior,
    ast.BitXor: operator.ixor,
    ast.MatMult: operator.imatmul,
}
_TAKEN = frozenset("self getattr torch device inf nan NoneType fx_pytree pytree".split())
"""What the source that torch.fx writes of a graph uses; an input of such a name would hide it."""
_CONSTANTS = {"inf": float("inf"), "nan": float("nan"), "Ellipsis": ...}


class UnreadableError(Exception):
    """Says what in the code is not of the forms that are read."""


def read_graph(code: str, imports: str, root: nn.Module) -> fx.Graph:
    """Read the graph of a graph module.

    Args:
        code: the source of its `forward`, as torch.fx writes it.
        imports: the import statements above it.
        root: holds the submodules, parameters and buffers that the code names.

    Returns:
        The graph; it names nothing that `root` does not have.

    Raises:
        UnreadableError: the code does, or calls, what is not listed.
        Exception: of any kind, when the text is no Python.
    """
    if len(code) + len(imports) > _LONGEST:
        raise UnreadableError(f"of {len(code):,} characters")
    match [part for part in ast.parse(code).body if not _is_mark(part)]:
        case [ast.FunctionDef(name="forward", decorator_list=[]) as function]:
            return _Reader(root, _imported(imports)).read(function)
    raise UnreadableError("that is not one function `forward`")


def _is_mark(part: ast.stmt) -> bool:
    """Whether it is `wrap("name")`, by which torch.fx keeps a function as one node instead of tracing into it."""
    match part:
        case ast.Expr(value=ast.Call(func=function, args=[ast.Constant()], keywords=[])):
            return _path(function) == ("torch", "fx", "_symbolic_trace", "wrap")
    return False


def _imported(text: str) -> dict[str, str]:
    """The dotted path of each imported name; nothing is imported. The last import of a name counts, so all are read."""
    found: dict[str, str] = {}
    for part in ast.parse(text).body:
        match part:
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found |= {name.asname or name.name: f"{module}.{name.name}" for name in names}
            case ast.Import(names=names):
                tops = {name.name.partition(".")[0] for name in names if name.asname is None}
                found |= {name.asname: name.name for name in names if name.asname} | {top: top for top in tops}
            case ast.Assign(targets=[ast.Name(id=name)]):  # an alias for annotations, such as `NoneType = type(None)`
                found[name] = ""  # no module path is empty, so calling the name is refused
            case _:
                raise UnreadableError(f"that imports by {ast.unparse(part)[:60]!r}")
    return found


class _Reader:
    """Turns statements into nodes, one after another.

    Args:
        root: see `read_graph`.
        imported: the dotted paths of imported names.
    """

    def __init__(self, root: nn.Module, imported: dict[str, str]):
        self.root, self.imported = root, imported
        self.graph = fx.Graph()
        self.values: dict[str, Any] = {}
        self.names: Counter[Any] = Counter()  # how many names each value has

    def read(self, function: ast.FunctionDef) -> fx.Graph:
        self._inputs(function.args)
        match function.body:
            case [*statements, ast.Return(value=ast.expr() as result)]:
                for statement in statements:
                    self._statement(statement)
                self.graph.output(self._operand(result))
                return self.graph
        raise _unreadable(function.body[-1])

    def _inputs(self, arguments: ast.arguments) -> None:
        named = arguments.args
        if arguments.posonlyargs or arguments.kwonlyargs or not named or named[0].arg != "self":
            raise UnreadableError("whose inputs are not those of a module")
        defaults = [None] * (len(named) - len(arguments.defaults)) + arguments.defaults
        for argument, default in list(zip(named, defaults, strict=True))[1:]:
            given = () if default is None else (self._operand(default),)
            self._bind(argument.arg, self.graph.create_node("placeholder", _plain(argument.arg), given))
        for stars, rest in (("*", arguments.vararg), ("**", arguments.kwarg)):
            if rest is not None:
                self._bind(rest.arg, self.graph.placeholder(f"{stars}{_plain(rest.arg)}"))

    def _bind(self, name: str, value: Any) -> None:
        if name in _TAKEN or name in self.imported:
            raise UnreadableError(f"that gives {name!r} another meaning")
        if not isinstance(value, (fx.Node, torch.device, NoneType)):
            raise UnreadableError(f"that gives {name!r} a value which is not a result")
        self.names[self.values.get(name)] -= 1
        self.names[value] += 1
        self.values[_plain(name)] = value

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[*targets], value=ast.Constant(value=None)) if all(
                isinstance(target, ast.Name) for target in targets
            ):  # fx writes `name = None` after the last use
                for target in targets:
                    self._bind(target.id, None)  # type: ignore[attr-defined]
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                self._bind(name, self._operation(value, name))
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value) if (
                type(op) in _IN_PLACE and name in self.values
            ):
                parts = self.values[name], self._operand(value)
                # `+=` rebinds one name of a number, but changes a tensor under all its names
                if self.names[parts[0]] > 1:
                    raise UnreadableError(f"that changes {name!r} in place, which has two names")
                self._bind(name, self._call(_IN_PLACE[type(op)], parts, name=name))
            case _:
                raise _unreadable(statement)

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], *, name: str) -> fx.Node:
        return self.graph.create_node("call_function", function, args, {}, name=name)

    # ---- one operation --------------------------------------------------------------------------------------------------
    def _operation(self, value: ast.expr, name: str) -> Any:
        match value:
            case ast.Call(func=function, args=args, keywords=keywords) if not self._is_constant(value):
                operands = tuple(map(self._operand, args))
                named = {_plain(word.arg or ""): self._operand(word.value) for word in keywords}
                if len(named) < len(keywords):
                    raise _unreadable(value)
                return self._called(function, operands, named, name)
            case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
                if type(op) in _BINARY:
                    return self._call(_BINARY[type(op)], (self._operand(left), self._operand(right)), name=name)
            case ast.UnaryOp(op=op, operand=ast.Name() as operand) if type(op) in _UNARY:
                return self._call(_UNARY[type(op)], (self._operand(operand),), name=name)
            case ast.Subscript(value=whole, slice=key):
                return self._call(operator.getitem, (self._operand(whole), self._operand(key)), name=name)
            case ast.Attribute() if (path := _path(value)) is not None and path[0] == "self":
                return self.graph.create_node("get_attr", self._tensor(path[1:]), (), {}, name=name)
            case ast.Attribute(value=ast.Name() as owner, attr=attribute) if not self._is_constant(value):
                if attribute in GRAPH_ATTRIBUTES:
                    return self._call(getattr, (self._operand(owner), attribute), name=name)
            case _:
                return self._operand(value)
        raise _unreadable(value)

    def _called(self, function: ast.expr, args: tuple[Any, ...], named: dict[str, Any], name: str) -> fx.Node:
        path = _path(function)
        if path is not None and path[0] == "self":
            return self.graph.create_node("call_module", self._module(path[1:]), args, named, name=name)
        if path is not None and (target := _function(self._meant(path))) is not None:
            return self.graph.create_node("call_function", target, args, named, name=name)
        match function:
            case ast.Attribute(value=ast.Name() as owner, attr=method) if _is_method(method):
                if isinstance(receiver := self._operand(owner), fx.Node):
                    return self.graph.create_node("call_method", method, (receiver, *args), named, name=name)
        raise UnreadableError(f"that calls {ast.unparse(function)[:60]!r}")

    def _module(self, path: tuple[str, ...]) -> str:
        """The path, if there is a submodule."""
        self._held(path, "_modules", nn.Module)
        return ".".join(path)

    def _tensor(self, path: tuple[str, ...]) -> str:
        """The path, if there is a parameter or buffer."""
        self._held(path, "_parameters" if self._has(path, "_parameters") else "_buffers", Tensor)
        return ".".join(path)

    def _has(self, path: tuple[str, ...], registry: str) -> bool:
        try:
            self._held(path, registry, Tensor)
        except UnreadableError:
            return False
        return True

    def _held(self, path: tuple[str, ...], registry: str, kind: type) -> None:
        held: Any = self.root
        for place, part in enumerate(path):
            last = place == len(path) - 1
            hides = part in reserved() or hasattr(type(held), part)
            held = vars(held)[registry if last else "_modules"].get(part) if is_plain(part) and not hides else None
            if not isinstance(held, kind if last else nn.Module):
                raise UnreadableError(f"that uses {'.'.join(path)[:60]!r}, which is not part of it")

    def _meant(self, path: tuple[str, ...]) -> str:
        """The dotted path with its first name replaced by what was imported under it; empty if the name is a value."""
        if path[0] in self.values:
            return ""
        return ".".join((self.imported.get(path[0], f"builtins.{path[0]}"), *path[1:]))

    # ---- operands -------------------------------------------------------------------------------------------------------
    def _is_constant(self, value: ast.expr) -> bool:
        path = _path(value.func if isinstance(value, ast.Call) else value)
        if path is None:
            return False
        full = self._meant(path)
        return (
            full in ("torch.device", "builtins.slice")
            if isinstance(value, ast.Call)
            else constant_of_torch(full) is not None
        )

    def _operand(self, value: ast.expr) -> Any:
        match value:
            case ast.Constant(value=None | bool() | int() | float() | complex() | str() as plain):
                return plain
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                number = self._operand(operand)
                if type(number) in (int, float, complex):
                    return -number
            case ast.Name(id=name):
                if name in self.values:
                    return self.values[name]
                if name in _CONSTANTS:
                    return _CONSTANTS[name]
            case ast.Tuple(elts=parts):
                return tuple(map(self._operand, parts))
            case ast.List(elts=parts):
                return list(map(self._operand, parts))
            case ast.Dict(keys=keys, values=parts) if all(isinstance(key, ast.Constant) for key in keys):
                return {key.value: self._operand(part) for key, part in zip(keys, parts, strict=True)}  # type: ignore[union-attr]
            case ast.Call(func=function, args=args, keywords=keywords) if self._is_constant(value):
                if self._meant(_path(function) or ("",)) == "torch.device":
                    return torch.device("cpu")  # all tensors of the file are loaded to the CPU
                if not keywords:
                    return slice(*map(self._operand, args))
            case ast.Attribute() if self._is_constant(value):
                return constant_of_torch(self._meant(_path(value) or ("",)))
        raise _unreadable(value)


def _path(value: ast.expr) -> tuple[str, ...] | None:
    """The parts of a path such as `self.features` or `getattr(self, "features")`; None if it is no path."""
    parts: list[str] = []
    while True:
        match value:
            case ast.Name(id=name):
                return (name, *reversed(parts))
            case ast.Attribute(value=value, attr=part):
                parts.append(part)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(part))], keywords=[]):
                parts.append(part)
            case _:
                return None


def _function(path: str) -> Callable[..., Any] | None:
    """The function of a dotted path, if it may be called: a function on the list, or torch's function for a permitted operator."""
    module, _, name = path.rpartition(".")
    if name in GRAPH_FUNCTIONS.get(module, ()) or (module in _OF_TORCH and _is_operator(name)):
        found = look_up(module, name)
        return found if callable(found) else None
    match path.split("."):
        case ["torch", "ops", "aten", packet, overload]:
            found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
            return found if isinstance(found, OpOverload) and may_be_called("aten", packet, found) else None
    return None


_OF_TORCH = (
    *("torch", "torch.functional", "torch.nn.functional"),
    *("torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"),
)


def _is_operator(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if is_plain(name) and not name.startswith("_") else None
    return packet is not None and may_be_called("aten", name, packet)


def _is_method(name: str) -> bool:
    return name in GRAPH_METHODS or (callable(getattr(Tensor, name, None)) and _is_operator(name))


def _plain(name: str) -> str:
    if not name.isidentifier() or not is_plain(name) or name.startswith("__"):
        raise UnreadableError(f"with the name {name[:60]!r}")
    return name


def _unreadable(part: ast.AST) -> UnreadableError:
    return UnreadableError(f"with {ast.unparse(part).strip()[:60]!r}")
