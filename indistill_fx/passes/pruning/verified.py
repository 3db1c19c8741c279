"""Run a smaller network beside the original whose readers ignore what was removed, before it is handed out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from indistill_fx.errors import PassError
from indistill_fx.graph.edit import batch_of, batch_size
from indistill_fx.graph.module_state import evaluating
from indistill_fx.passes.capture.equivalence import relative_difference
from indistill_fx.passes.pruning.masked import Masked
from indistill_fx.system.random_state import seed_torch
from indistill_fx.traced import TracedModel

_TOLERANCE = 1e-3
"""Of the largest value, in single precision: rounding stays far below it, a wrong slice far above."""
_CROPS = (40, 64, 128)


def verify_smaller(model: TracedModel, smaller: fx.GraphModule, axes: Any) -> None:
    """Compare on the example, in eval mode. Both networks are left as they were.

    Args:
        model: the original.
        smaller: what is left of it.
        axes: the entries that stay, per node and axis (see `ShrinkReport`).

    Raises:
        PassError: the smaller network fails or computes something else, which is a bug in indistill-fx.
    """
    with evaluating(model.graph_module), evaluating(smaller):
        for inputs in _examples(model):
            with suppress(Exception):  # an image too small for the original model cannot be compared
                seed_torch(0)
                expected = Masked(model, axes).run(*inputs)
                break
        else:
            seed_torch(0)
            model.graph_module(*inputs)  # raises if the example itself is wrong
            expected = Masked(model, axes).run(*inputs)
        try:
            seed_torch(0)
            got = smaller(*inputs)
        except Exception as error:
            raise PassError(
                f"The smaller network does not run: {type(error).__name__}: {error}.", where="shrink", hint=_HINT
            ) from error
    worst = max((_gap(a, b) for a, b in zip(_tensors(expected), _tensors(got), strict=True)), default=0.0)
    if not worst <= _TOLERANCE:
        raise PassError(
            f"The smaller network is off by {worst:.1e} of the largest value from the original without the channels removed.",
            where="shrink",
            got=worst,
            expected=_TOLERANCE,
            hint=_HINT,
        )


_HINT = "This is a mistake of indistill-fx: please report the model. Widths for single layers may avoid it."


def _examples(model: TracedModel) -> Iterator[tuple[Any, ...]]:
    """Inputs to compare on, the cheapest first: the example's first row (cropped, if sizes are free), then uncropped, then all rows."""
    given = batch_of(model.example_values, 1, example_size=batch_size(model.example_values))
    pictures = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    if model.report.method == "symbolic" and all(leaf.dim() == 4 for leaf in pictures):
        side = min((n for leaf in pictures for n in leaf.shape[2:]), default=0)
        for crop in (n for n in _CROPS if n < side):
            yield tree_map(lambda leaf, n=crop: leaf[:, :, :n, :n] if isinstance(leaf, Tensor) else leaf, given)
    yield given
    yield model.example_values


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _gap(expected: Tensor, got: Tensor) -> float:
    return relative_difference(expected, got) if expected.shape == got.shape else float("inf")
