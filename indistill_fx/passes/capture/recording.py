"""The second and third capture method: run the module's own code on an example and record what it computes.

Rules, in order:
  1. The values are real tensors of a small batch; every torch function called on them becomes a node. Code that asks for types,
     ranks, devices or tuples finds them, so nearly all Python code works.
  2. Sizes are `symbolic_sizes.Size`: symbolic as long as they can be, decided by the example (and recorded) where code needs a plain int.
     Where it calls `int` or `float` on them, or `len` on tensors, it is recorded once more, with functions that give sizes.
  3. Code that asks for the data itself (`if x.sum() > 0`, `x.tolist()`, `x.numpy()`) cannot be traced, nor can code that fails
     because of rule 1 or 2. A number that it takes by `x.item()` or `int(x)` is a node, and may go into functions of torch alone.
     In the third method the innermost module that contains such code becomes one node, and recording continues; so does a module
     whose code decides by the batch size.
  4. Code may have a way of its own for `torch.export`, on which it does not ask for the data (Hugging Face's attention masks). Where the
     second method fails, it records that way.
  5. A random number that code uses outside tensors is as data: see `graph.draws`.
  6. What code computes without autograd while it is on is detached in the graph. A custom `autograd.Function` is recorded as the
     operations of its forward; where its gradient is another than theirs, the third method keeps it as one node. Where code took its
     `apply` from the class before, the third method keeps the module that calls it.
  7. Data that no recorded function made, parameters and buffers apart, is taken for a constant. The comparison with the module,
     on other data, refuses the graph if that was wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import zip_longest
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from indistill_fx.errors import FrontendError
from indistill_fx.graph.edit import longest_row
from indistill_fx.passes.capture.captured import Captured, Request
from indistill_fx.passes.capture.recorder import Recorder
from indistill_fx.passes.capture.symbolic_sizes import Book, Decision, math_of_sizes, sizes_asked_for, types_of_numbers

_AS_EXPORTED = "recorded as its code runs under `torch.export`, because otherwise it cannot be recorded"


def capture_shapes(asked: Request) -> Captured:
    """Record one run; all of the module's code must be traceable.

    Raises:
        FrontendError: it is not; names the module, file, line and expression.
    """
    try:
        return _record(asked, size=2).captured()
    except FrontendError:
        with suppress(FrontendError), _exporting():
            captured = _record(asked, size=2).captured()
            return replace(captured, notes=(*captured.notes, _AS_EXPORTED))
        raise


def capture_leaves(asked: Request) -> Captured:
    """Record one run; the smallest submodules whose code cannot be traced, or depends on the batch size, stay one node each.

    Raises:
        FrontendError: the outermost module's own code cannot be traced.
    """
    given_up: dict[str, str] = {}
    while True:
        runs = [_record(asked, size=size, given_up=given_up) for size in (2, 3)]
        frozen = _changed_decisions(runs[0].book.decisions, runs[1].book.decisions)
        if not frozen:
            return runs[0].captured(tuple(runs[0].given_up))
        for decision in frozen:
            if not decision.module:
                raise FrontendError(
                    f"`{decision.expression}` at {decision.place} is decided by the batch size",
                    where=decision.place,
                    got=decision.expression,
                    hint="Write it without a plain int of the batch size, or move it to a submodule, which can stay one node.",
                )
        given_up = {decision.module: str(decision) for decision in reversed(frozen)} | given_up


@contextmanager
def _exporting() -> Iterator[None]:
    """Within the block, code that asks torch whether it is being exported hears that it is: rule 4."""
    with (
        patch.object(torch.compiler, "_is_compiling_flag", True),
        patch.object(torch.compiler, "_is_exporting_flag", True),
    ):
        yield


def _record(asked: Request, *, size: int, given_up: Mapping[str, str] | None = None) -> Recorder:
    """One run, or two (rule 2); `given_up` as in `Recorder`."""
    batch = asked.batch_of(size)

    def run() -> Recorder:
        recorder = Recorder(asked.module, asked.leaves, asked.loose, asked.lines, given_up=given_up)
        books.append(recorder.book)
        torch.manual_seed(0)
        with math_of_sizes(), types_of_numbers(asked.module):
            recorder.run(*_other_data(batch, size))
        return recorder

    books: list[Book] = []
    first: Recorder | None = None
    try:
        first = run()
    except FrontendError:
        if not books[0].asking:
            raise
    if books[0].asking:
        with suppress(FrontendError) if first else nullcontext(), sizes_asked_for(books[0].asking.values()):
            again = run()
            if first is None or again.given_up.keys() <= first.given_up.keys():
                return again  # and not where code needs Python's own `int` or `float`, as in `dtype=float`
    assert first is not None
    return first


def _other_data(batch: Any, size: int) -> Any:
    """Other data than the caller's: one row, repeated. The graph must not be compared on the data that it was recorded on.

    Another order of the rows would not do for code that wants them sorted, by their lengths for example. It is the longest row if there
    are lengths, because the other inputs are padded to its length, and else the last one.
    """
    longest = longest_row(batch, size)
    row = size - 1 if longest is None else longest

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        of_rows = leaf.dim() > 0 and leaf.shape[0] == size
        return leaf[row : row + 1].repeat(size, *[1] * (leaf.dim() - 1)) if of_rows else leaf.clone()

    return tree_map(of, batch)


def _changed_decisions(first: Sequence[Decision], second: Sequence[Decision]) -> list[Decision]:
    """The decisions that differ between two batch sizes; if the runs diverge, only the first one that differs."""
    changed: list[Decision] = []
    for a, b in zip_longest(first, second):
        if a is None or b is None or a[:3] != b[:3]:
            found = a or b
            return changed if changed or found is None else [found]
        if a.value != b.value:
            changed.append(a)
    return changed
