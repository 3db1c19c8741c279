"""What generated code is made of: text, literals that may become arguments, and calls of constructors.

Two blocks share a class if their code differs in literals only. So code is kept as pieces until all blocks are known.
"""

from __future__ import annotations

import inspect
import keyword
from cmath import isfinite
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, is_dataclass
from dataclasses import fields as dataclass_fields
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from indistill_fx.errors import ExportError
from indistill_fx.graph.attention import HeadAttention


def unwritable(where: str, reason: str) -> ExportError:
    """The error for a construct that has no source code."""
    return ExportError(
        f"`{where}` cannot be written as source code: {reason}.",
        where=where,
        hint="Write an exported program instead: -o student.pt2.",
    )


@dataclass(frozen=True, slots=True)
class Literal:
    """A literal in code.

    Attributes:
        text: as Python writes it.
        name: what an argument that replaces it would be called.
        keyword: of the call it belongs to, if it is given by keyword.
        default: the text that need not be written.
    """

    text: str
    name: str
    keyword: str = ""
    default: str | None = None


SIZE = "size"
"""The name of a number that is a size of a reshaped tensor."""


@dataclass(frozen=True, slots=True)
class Construct:
    """A call of a constructor: its name in code, its arguments, and the brackets around them."""

    name: str
    arguments: tuple[Line, ...]
    brackets: tuple[str, str] = ("(", ")")


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block's code: a class to be, with the lines of its `__init__` and of its `forward`.

    Attributes:
        preferred_name: the class's name, if no other class has it.
        setup: lines of `__init__`; of a Sequential, the one that calls its parent's.
        forward: lines of `forward`, its head included; none where the parent's will do.
        base: the parent class.
    """

    preferred_name: str
    setup: tuple[Line, ...]
    forward: tuple[Line, ...]
    base: str = "nn.Module"


Piece: TypeAlias = "str | Literal | Construct | Block"
Line: TypeAlias = "tuple[Piece, ...]"


@dataclass
class Imports:
    """What the generated file needs from elsewhere: lines of import, functions and classes of ours whose source goes into it, and records.

    Attributes:
        lines: of import.
        own: functions and classes of ours, by name.
        records: the code of named tuples and dataclasses, by name.
    """

    lines: set[str] = field(default_factory=set)
    own: dict[str, Any] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)


def is_name(text: str) -> bool:
    """Whether an attribute can be written with a dot before this."""
    return text.isidentifier() and not keyword.iskeyword(text)


def literal(value: Any) -> str:
    """A plain value as code.

    Raises:
        ValueError: it has no literal form.
    """
    if isinstance(value, torch.Size):
        value = tuple(value)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    if (
        value is None
        or value is Ellipsis
        or isinstance(value, (bool, int, float))
        or (isinstance(value, complex) and isfinite(value))
    ):
        return "..." if value is Ellipsis else repr(value)
    if isinstance(value, str):
        quoted = repr(value)
        return f'"{quoted[1:-1]}"' if '"' not in value else quoted
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    raise ValueError(f"a {type(value).__name__}")


def commas(values: Iterable[Line]) -> Line:
    """Values with commas between."""
    line: list[Piece] = []
    for k, value in enumerate(values):
        line += [", ", *value] if k else value
    return tuple(line)


def record_class(kind: Any) -> str | None:
    """The code of a named tuple or dataclass with the fields of the user's own; None for any other class, or one with methods."""
    if not isinstance(kind, type) or _has_methods(kind):
        return None
    fields: dict[str, Any] = {}
    if (
        issubclass(kind, tuple)
        and hasattr(kind, "_fields")
        and (kind.__bases__ == (tuple,) or "__new__" not in vars(kind))
    ):
        head = f"class {kind.__name__}(NamedTuple):"
        defaults = kind._field_defaults  # type: ignore[attr-defined]  # typing has no name for such classes
        fields = {name: defaults.get(name, MISSING) for name in kind._fields}
    elif is_dataclass(kind) and kind.__bases__ == (object,) and not hasattr(kind, "__post_init__"):
        known = dataclass_fields(kind)
        if len({entry.kw_only for entry in known}) == 1 and all(entry.init for entry in known):
            head = f"@dataclass{'(kw_only=True)' if known[0].kw_only is True else ''}\nclass {kind.__name__}:"
            fields = {e.name: e.default if e.default_factory is MISSING else e.default_factory for e in known}
    try:
        values = {name: "" if value is MISSING else f" = {literal(value)}" for name, value in fields.items()}
    except ValueError:  # a default that has no literal form
        return None
    return "\n".join([head, *(f"    {name}: Any{value}" for name, value in values.items())]) + "\n" if fields else None


def _has_methods(kind: type) -> bool:
    """Whether a named tuple or dataclass has methods or properties that the user wrote."""
    special = ("__getitem__", "__iter__", "__len__", "__bool__", "__call__", "__getattr__")
    return any(
        isinstance(value, (property, classmethod, staticmethod, FunctionType))
        for name, value in vars(kind).items()
        if not name.startswith("_") or name in special
    )


def numbers(values: Sequence[int], name: str) -> Line:
    """Numbers with commas between, each of which may become an argument."""
    names = [name] if len(values) == 1 else [f"{name}_{k}" for k in range(len(values))]
    return commas((Literal(literal(value), each),) for value, each in zip(values, names, strict=True))


def tensor_value(name: str, tensor: Tensor) -> Line:
    """The code of a parameter or buffer of zeros; its values come from the weights."""
    kind = "" if tensor.dtype == torch.get_default_dtype() else f", dtype={tensor.dtype}"
    shape = numbers(list(tensor.shape), f"{name}_size") or ("()",)
    zeros: Line = ("torch.zeros(", *shape, f"{kind})")
    constant = "" if tensor.is_floating_point() or tensor.is_complex() else ", requires_grad=False"
    return ("nn.Parameter(", *zeros, f"{constant})") if isinstance(tensor, nn.Parameter) else zeros


def constructor(path: str, name: str, module: nn.Module, imports: Imports) -> Construct:
    """The call that makes a layer like this one.

    Args:
        path: where it stands, for errors.
        name: under which it stands in its block, from which arguments get their names.
        module: the layer.
        imports: collects what the call needs.

    Raises:
        ExportError: the layer is none of PyTorch's, or its constructor cannot make one like it.
    """
    if isinstance(module, HeadAttention):
        return _head_attention(path, name, module, imports)
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind:
        raise unwritable(path, f"it is a {kind.__module__}.{kind.__qualname__}, which is not a layer of torch.nn")
    arguments = _arguments(module)
    shown = _compact(kind, arguments, module)
    if shown is None:
        raise unwritable(path, f"nn.{kind.__name__} has no arguments that make one like it")
    defaults = {key: parameter.default for key, parameter in _parameters(kind).items()}
    pieces: list[Line] = []
    positional = True
    for key, value in shown.items():
        default = None if defaults[key] is inspect.Parameter.empty else _text(path, defaults[key])
        positional = positional and default is None
        preferred = f"{name}_{key.removesuffix('_channels').removesuffix('_features')}"
        pieces.append((Literal(_text(path, value), preferred, "" if positional else key, default),))
    return Construct(f"nn.{kind.__name__}", tuple(pieces))


def _text(path: str, value: Any) -> str:
    try:
        return literal(value)
    except ValueError as error:
        raise unwritable(path, f"an argument of it is {error}") from error


def _head_attention(path: str, name: str, module: HeadAttention, imports: Imports) -> Construct:
    imports.own["HeadAttention"] = HeadAttention
    parts: list[Line] = [
        (constructor(f"{path}.{part}", f"{name}_{part}", getattr(module, part), imports),)
        for part in ("query", "key", "value", "out")
    ]
    for key, default in (("heads", None), ("dropout", "0.0"), ("batch_first", "True")):
        parts.append((Literal(literal(getattr(module, key)), f"{name}_{key}", key, default),))
    return Construct("HeadAttention", tuple(parts))


_GIVEN: Mapping[str, Any] = {
    "bias": lambda m: m.in_proj_bias is not None if isinstance(m, nn.MultiheadAttention) else _flag(m.bias),
    "add_bias_kv": lambda m: m.bias_k is not None,
}
"""Arguments that a module keeps in another form."""
_LEFT_OUT = ("self", "device", "dtype", "args", "kwargs", "_weight", "_freeze", "min_value", "max_value", "init")


def _flag(bias: Any) -> bool:
    return bias if isinstance(bias, bool) else bias is not None


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, read from the module's attributes."""
    found = {}
    for key, parameter in _parameters(type(module)).items():
        if key in _LEFT_OUT or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if key in _GIVEN:
            found[key] = _GIVEN[key](module)
        elif hasattr(module, key):
            found[key] = getattr(module, key)
    return found


def _parameters(kind: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a layer's constructor; recurrent layers pass theirs on to their base class."""
    if not issubclass(kind, nn.RNNBase):
        return inspect.signature(kind.__init__).parameters
    known = dict(inspect.signature(nn.RNNBase.__init__).parameters)
    for key in ("mode", *(() if kind is nn.LSTM else ("proj_size",))):
        del known[key]
    if kind is nn.RNN:
        known["nonlinearity"] = inspect.Parameter("nonlinearity", inspect.Parameter.KEYWORD_ONLY, default="tanh")
    return known


def _compact(kind: type[nn.Module], arguments: Mapping[str, Any], module: nn.Module) -> dict[str, Any] | None:
    """The arguments, with (3, 3) and (3,) shortened to 3 if that builds the same module; None if neither form does."""
    plain = {key: value[0] if _repeats(value) else value for key, value in arguments.items()}
    for candidate in (plain, dict(arguments)):
        if _makes(kind, candidate, module):
            return candidate
    return None


def _repeats(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(type(v) is int and v == value[0] for v in value)


def _makes(kind: type[nn.Module], arguments: Mapping[str, Any], module: nn.Module) -> bool:
    try:
        with torch.device("meta"):
            made = kind(**arguments)
    except Exception:  # constructors may raise anything for arguments they refuse
        return False
    sizes = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (made, module)]
    wanted, found = (
        _plain(made),
        _plain(module),
    )  # what somebody else has written on the layer does nothing (YOLO's `i`, `f`, `type`)
    return sizes[0] == sizes[1] and wanted == {key: value for key, value in found.items() if key in wanted}


def _plain(module: nn.Module) -> dict[str, Any]:
    """A module's attributes without tensors, flags and hooks."""
    kinds = (bool, int, float, str, tuple, list, type(None))
    found = {k: v for k, v in module.__dict__.items() if isinstance(v, kinds) and not k.startswith("_")}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k != "training"}
