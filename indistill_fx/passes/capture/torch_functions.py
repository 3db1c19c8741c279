"""How a function that torch reports to a `TorchFunctionMode` is written as a node of an fx graph."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from indistill_fx.errors import FrontendError
from indistill_fx.graph.ops import writes_first
from indistill_fx.passes.capture.symbolic_sizes import Size, current_place, value_of

SHAPES = frozenset({"shape", "size", "numel", "nelement", "__len__"})
"""Tensor attributes and methods that give sizes."""

DATA = frozenset(
    "item tolist numpy __array__ __bool__ __int__ __float__ __index__ __complex__ __contains__ is_nonzero equal allclose data_ptr".split()
)
"""Functions that take numbers out of a tensor, to where no graph can follow."""

FACTORIES = frozenset({"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor"})
"""Functions that make a tensor of data."""

SILENT = frozenset(
    {"requires_grad_", "retain_grad", "register_hook", "__repr__", "__format__", "__set__", "_assert", "_is_view"}
)
"""Functions that compute nothing."""


@cache
def _operators() -> dict[Any, str]:
    """Tensor's operators that are known to Python under another name (`__pow__` calls itself `pow`)."""
    named = ((getattr(Tensor, name), name) for name in dir(Tensor) if name.startswith("__") and hasattr(operator, name))
    return {func: name for func, name in named if callable(func)}


def name_of(func: Any) -> str:
    """The function's name; of a property's getter, the property's."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        return str(func.__self__.__name__)
    return _operators().get(func, name)


def as_call(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Kind, target and positional arguments of the node that calls `func`: operators and methods as a person writes them.

    >>> as_call(torch.Tensor.__rsub__, ("x", 1))
    ('call_function', <built-in function sub>, (1, 'x'))
    """
    name = name_of(func)
    if getattr(func, "__name__", "") == "__get__":
        return "call_function", getattr, (args[0], name)
    if getattr(Tensor, name, None) is not func:
        return "call_function", func, args
    if not name.startswith("__"):
        return "call_method", name, args
    bare = name.strip("_")
    if bare == "rdiv":  # torch's reflected operator for 1 / x
        return "call_function", operator.truediv, args[::-1]
    if hasattr(operator, name):
        return "call_function", getattr(operator, name), args
    if bare.startswith("r") and hasattr(operator, f"__{bare[1:]}__"):
        return "call_function", getattr(operator, f"__{bare[1:]}__"), args[::-1]
    return "call_method", name, args


def writes_itself(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the function writes into its first argument: in place, or by setting its `.data`."""
    if getattr(func, "__name__", "") == "__set__":
        return str(func.__self__.__name__) == "data"
    op, target, _ = as_call(func, args)
    return name_of(func) not in SILENT and writes_first(op, target, kwargs)


def refused_write(here: str, parameter: str) -> FrontendError:
    """The error for code that writes a parameter: a graph would not, or would break autograd."""
    return refused_line(
        f"{here} writes its parameter `{parameter}`",
        expected="a forward that leaves parameters to the optimiser",
        instead="Compute another tensor from it",
    )


def refused_line(
    description: str,
    *,
    expected: str,
    instead: str,
    place: tuple[str, str] | None = None,
    kind: type[FrontendError] = FrontendError,
) -> FrontendError:
    """The error for a line of the user's code, by default the one that is being run: what it does, and what to do instead."""
    where, expression = place or current_place()
    return kind(
        f"{description} at {where}: `{expression}`",
        where=where,
        got=expression,
        expected=expected,
        hint=f"{instead}, or move that line into a submodule of its own, which then stays one node in the graph.",
    )


class DrawError(FrontendError):
    """Code uses a random number outside tensors."""


def refused_draw(here: str, *, place: tuple[str, str] | None = None) -> FrontendError:
    """The error for code that uses a random number outside tensors, by default on the line that is being run."""
    return refused_line(
        f"{here} uses a random number outside tensors",
        expected="draws that stay in tensors",
        instead="Compute with the drawn tensor (torch.where, or a factor of 0 or 1 for each sample)",
        place=place,
        kind=DrawError,
    )


@contextmanager
def watching_autocast(allowed: Callable[[], bool] = lambda: False) -> Iterator[list[str]]:
    """Refuse code that switches autocast on inside the block: a graph would compute that part in full precision.

    Args:
        allowed: whether it may, because the code that runs stays one node.

    Yields:
        Lines of the report on code that switches it off.
    """
    enter, notes = torch.autocast.__enter__, list[str]()

    def check(region: torch.autocast) -> Any:
        if not allowed():
            frame = sys._getframe(1)
            decorated = frame.f_locals.get("func") if frame.f_code.co_name == "decorate_autocast" else None
            place = current_place() if decorated is None else _definition(decorated)
            if region._enabled:
                raise refused_line(
                    "the forward switches autocast on",
                    expected="a forward without autocast",
                    instead="Leave autocast to the run (--precision bf16)",
                    place=place,
                )
            notes.append(
                f"{': '.join(filter(None, place))} switches autocast off, which the graph does not: in mixed precision it computes"
                " that part in the lower precision too"
            )
        return enter(region)  # type: ignore[no-untyped-call]

    with patch.object(torch.autocast, "__enter__", check):
        yield notes


def _definition(function: Callable[..., Any]) -> tuple[str, str]:
    """Where a function is defined, and its name."""
    code = function.__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}", function.__qualname__


def is_wrapped(tensor: Tensor) -> bool:
    """Whether the tensor lives inside `vmap` or `grad`, where its operations cannot be recorded one by one."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def decided(value: Any) -> Any:
    """Sizes replaced by their ints, in nested arguments; each is a decision."""
    return plain(value, number=Size.plain)


def plain(value: Any, *, number: Callable[[Size], Any] = value_of) -> Any:
    """Sizes replaced by their ints, in nested arguments."""
    if isinstance(value, Size):
        return number(value)
    if isinstance(value, slice):
        return slice(*(plain(part, number=number) for part in (value.start, value.stop, value.step)))
    if isinstance(value, tuple):
        entries = [plain(entry, number=number) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    if isinstance(value, list):
        return [plain(entry, number=number) for entry in value]
    if type(value) is dict:
        return {key: plain(entry, number=number) for key, entry in value.items()}
    return value


class AppliedFunction(nn.Module):
    """A custom `autograd.Function` as a module, so that a graph can call it."""

    def __init__(self, function: type[torch.autograd.Function]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply it."""
        return self.function.apply(*args, **kwargs)


@contextmanager
def before_own_gradients(act: Callable[[type[torch.autograd.Function]], None]) -> Iterator[None]:
    """Call `act` with each custom `autograd.Function` that begins, also where code has taken its `apply` from the class long before."""

    def begin(context: Any) -> None:
        act(context._forward_cls)

    with patch.object(BackwardCFunction, "__init__", begin):
        yield
