"""Arguments of the public functions: one of another type than the signature says is refused before anything is done.

Only what certainly cannot work is refused: numbers are all that Python can turn into one (numpy's, tensors of one element), sequences
all that can be iterated. What a text or a number means is checked by the function that reads it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from indistill_fx.errors import ConfigError, unknown

_Function = TypeVar("_Function", bound=Callable[..., Any])

_WORDS = {
    "Module": "a module (torch.nn.Module)",
    "TracedModel": "a traced model (ifx.trace)",
    "Tensor": "a tensor",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "True or False",
    "PathLike": "a path",
    "Mapping": "a dictionary",
    "Iterable": "a loader, which yields batches",
    "Callable": "a function",
    "Literal": "a text",
}

_UNSAID = ("NoneType", "Call")
"""What a user does not have to know of."""


def checked(function: _Function, home: str) -> _Function:
    """A public function that refuses arguments of other types than its signature says.

    Args:
        function: any, with annotations.
        home: the module under which users know it; pytest ignores it, else examples would run twice.

    Raises:
        ConfigError: by the function that is returned.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # Python says it better, with the function's name
            return function(*args, **kwargs)
        for name, value in given.items():
            require(value, _types_of(function).get(name, Any), name, of=function.__name__)
        return function(*args, **kwargs)

    call.__module__, call.__qualname__ = home, function.__name__  # so that it can be pickled
    return call  # type: ignore[return-value]


def require(value: object, expected: Any, name: str, *, of: str, hint: str = "") -> None:
    """Refuse a value that is not of a type.

    Args:
        value: as given.
        expected: an annotation.
        name: the argument's or the field's.
        of: the function or the class.
        hint: what to do, where the value itself does not tell; by default, to read the help of `of`.

    Raises:
        ConfigError: says what was given, what was expected, and how to make it.
    """
    if fits(value, expected):
        return
    lists = [get_args(kind)[0] for kind in _choices(expected) if _name(kind) == "Sequence" and get_args(kind)]
    for place, entry in enumerate(value if lists and isinstance(value, list | tuple) else ()):
        require(entry, lists[0], f"{name}[{place}]", of=of, hint=hint)
    *others, last = dict.fromkeys(_words(kind) for kind in _choices(expected) if _name(kind) not in _UNSAID)
    words = f"{', '.join(others)} or {last}" if others else last
    raise ConfigError(
        f"{of}: `{name}` is {_shown(value)}, but must be {words}.",
        where=name,
        got=type(value).__name__,
        expected=words,
        hint=next(_remedies(value, {_name(kind) for kind in _choices(expected)}), hint or f"See help(ifx.{of})."),
    )


def require_options(options: Mapping[str, Any], function: Callable[..., Any], *, of: str) -> None:
    """Refuse options that a function does not have, or that are of other types.

    Args:
        options: to be passed on to it by name.
        function: that reads them.
        of: the function that the user calls.

    Raises:
        ConfigError: as of `require`; or names the options that there are.
    """
    known = [name for name, entry in inspect.signature(function).parameters.items() if entry.kind is entry.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in known:
            raise unknown(name, name, f"keyword of {of}", known, legal=", ".join(known))
        require(value, _types_of(function)[name], name, of=of)


def fits(value: object, expected: Any) -> bool:
    """Whether a value may be of a type.

    >>> from collections.abc import Sequence
    >>> fits([1, 2], Sequence[int]), fits("3", int | None), fits({"a": "b"}, Sequence[str])
    (True, False, False)
    """
    return any(_fits_one(value, kind) for kind in _choices(expected))


def _fits_one(value: object, kind: Any) -> bool:
    name, inner = _name(kind), get_args(kind)
    is_text = isinstance(value, str | bytes)
    if name in ("Sequence", "tuple", "list"):
        iterable = not is_text and not isinstance(value, Mapping) and hasattr(value, "__iter__")
        each = inner[0] if inner and name == "Sequence" and isinstance(value, list | tuple) else Any
        return iterable and (each is Any or all(fits(entry, each) for entry in value))  # type: ignore[attr-defined]
    if name == "Iterable":
        return not is_text and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))
    simple: dict[str, Callable[[Any], bool]] = {
        "int": lambda value: hasattr(value, "__index__"),
        "float": lambda value: hasattr(value, "__float__"),
        "bool": lambda value: not is_text,
        "Literal": lambda value: isinstance(value, str) or value in inner,
        "Callable": callable,
        "device": lambda value: isinstance(value, kind | int),
        "PathLike": lambda value: isinstance(value, os.PathLike),
    }
    if name in simple:
        return simple[name](value)
    origin = get_origin(kind) or kind
    return kind is Any or not isinstance(origin, type) or isinstance(value, origin)


def _choices(expected: Any) -> tuple[Any, ...]:
    if get_origin(expected) in (Union, UnionType):
        return tuple(choice for part in get_args(expected) for choice in _choices(part))
    return (expected,)


def _name(kind: Any) -> str:
    origin = get_origin(kind) or kind
    special: dict[Any, str] = {Literal: "Literal", None: "NoneType"}
    return special[origin] if origin in special else getattr(origin, "__name__", "")


def _words(kind: Any) -> str:
    name, inner = _name(kind), get_args(kind)
    if name == "Sequence":
        return (
            f"a list (of {' or '.join(map(_words, _choices(inner[0])))})" if inner and inner[0] is not Any else "a list"
        )
    return _WORDS.get(name, f"a{'n' * (name[:1] in 'AEIOU')} {name}")


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if isinstance(value, list | tuple | dict | str | float) and len(repr(value)) <= 60:
        return f"the {kind} {value!r}"
    return f"a{'n' * (kind[:1] in 'AEIOUaeiou')} {kind}" if value is not None else "None"


def _remedies(value: object, wanted: set[str]) -> Iterator[str]:
    """What to give instead, the best advice first."""
    named = isinstance(value, str | os.PathLike)
    is_model = hasattr(value, "named_modules") and not isinstance(value, type)
    if wanted & {"Module", "TracedModel"}:
        if named:
            yield f"Load it first: ifx.load({os.fspath(value)!r})."  # type: ignore[call-overload]
        if isinstance(value, type):
            yield f"Make one of it first: {value.__name__}(…)."
        if isinstance(value, Mapping):
            yield "Weights alone are no model: make the module, and give it these with load_state_dict."
        if type(value).__name__ == "ExportedProgram":
            yield "Give its module: program.module()."
        if hasattr(value, "graph_module"):
            yield "Give the module that was traced: traced.module."
        if inspect.isfunction(value):
            yield "Call it in the forward of an nn.Module."
        if is_model:
            yield "Trace it first: ifx.trace(module, example_inputs)."
    if "AlignmentPlan" in wanted and named:
        yield f"Read it first: ifx.AlignmentPlan.load({os.fspath(value)!r})."  # type: ignore[call-overload]
    if "Iterable" in wanted and named:
        yield f"Open the data first: data = ifx.open_data({os.fspath(value)!r}); then data.train or data.test."  # type: ignore[call-overload]
    if "Iterable" in wanted and hasattr(value, "train_plain"):
        yield "Give one of its loaders: data.train or data.test."
    for name in ("Curriculum", "View", "Target", "AlignmentPlan"):
        if name in wanted:
            yield f"Make one first: ifx.{name}(…)."
    if "Task" in wanted:
        yield "Give its name, or an object of a class derived from ifx.Task."
    if "Sequence" in wanted and not wanted & {"int", "float"} and isinstance(value, str):
        yield f"Write [{value!r}]."
    if "Mapping" in wanted and "Tensor" not in wanted:
        yield "Write {name: value}."


@cache
def _types_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The annotations of the parameters."""
    options = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD}
    parameters = {name: text for name, text in function.__annotations__.items() if name not in ("return", *options)}
    return get_type_hints(
        type("Parameters", (), {"__annotations__": parameters}), globalns=vars(inspect.getmodule(function))
    )
