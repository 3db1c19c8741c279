"""The operations of a step and the numbers they are called with: a recording would go on with its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = tuple[str, str]
"""Name of an operation, and its arguments that are numbers."""
_END: Call = ("", "")


@contextmanager
def calls_noted() -> Iterator[list[Call]]:
    """Within the block all operations are noted, in order, also those of a backward pass."""
    found: list[Call] = []
    with _Noting(found):
        yield found


def first_difference(one: Sequence[Call], other: Sequence[Call]) -> str | None:
    """The first operation that is another one, or is called with other numbers; None: there is none."""
    pairs = zip_longest(one, other, fillvalue=_END)
    return next((a[0] if b == _END else b[0] for a, b in pairs if a != b), None)


class _Noting(TorchDispatchMode):
    def __init__(self, found: list[Call]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers = [
            value for value in tree_leaves((args, kwargs or {})) if isinstance(value, (bool, int, float, complex))
        ]
        self._found.append((str(func), repr(numbers)))
        return func(*args, **(kwargs or {}))
