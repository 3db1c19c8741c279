"""Similarity of layers on data: linear centred kernel alignment, batch by batch.

Of every batch only one Gram matrix (samples x samples) per layer is held; features are dropped as soon as theirs is made. The unbiased
estimate of HSIC makes the mean over batches converge to the value on all data, whatever the batch size.

Source:
    Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, arXiv:2010.15327, eq. 2 and 3;
    the unbiased HSIC is eq. 5 of Song, Smola, Gretton, Bedo, Borgwardt, "Feature Selection via Dependence Maximization", JMLR 2012.
    Negative estimates, which only noise makes, count as 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from indistill_fx.errors import ConfigError
from indistill_fx.graph.interpret import run_looking
from indistill_fx.graph.module_state import mode
from indistill_fx.passes.pairing.match import Similarity
from indistill_fx.traced import TracedModel

_FEWEST = 4
"""Samples that the unbiased estimate needs."""


def cka(loader: Iterable[Any], *, batches: int | None = 16) -> Similarity:
    """Linear CKA on a loader, as `match(…, similarity=…)` takes it. Both models run in eval mode, without gradients.

    Args:
        loader: batches: the inputs alone, or a tuple or list that begins with them, or a dict of them by name.
        batches: how many to look at; None: all.

    Returns:
        A function (teacher, student, teacher taps, student taps) -> one row per teacher tap, values 0 to 1.
    """

    def measure(
        teacher: TracedModel, student: TracedModel, teacher_taps: Sequence[str], student_taps: Sequence[str]
    ) -> list[list[float]]:
        shared = torch.zeros(len(teacher_taps), len(student_taps), dtype=torch.float64)
        self_similarity = [torch.zeros(len(taps), dtype=torch.float64) for taps in (teacher_taps, student_taps)]
        used = 0
        for batch in islice(loader, batches):
            grams = [_grams(model, taps, batch) for model, taps in ((teacher, teacher_taps), (student, student_taps))]
            if len(grams[0][0]) < _FEWEST:
                continue  # the last batch of a loader may be too small
            shared += hsic(grams[0], grams[1])
            for total, gram in zip(self_similarity, grams, strict=True):
                total += torch.diagonal(hsic(gram, gram))
            used += 1
        if not used:
            raise ConfigError(
                f"The loader yielded no batch of at least {_FEWEST} samples.",
                where="loader",
                hint="Give larger batches.",
            )
        scale = (self_similarity[0].clamp_min(0)[:, None] * self_similarity[1].clamp_min(0)[None, :]).sqrt()
        rows: list[list[float]] = (shared / scale.clamp_min(1e-30)).clamp(0, 1).tolist()
        return rows

    return measure


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """The unbiased estimate of HSIC for each two Gram matrices of two stacks, diagonals left out.

    Args:
        first: (a, n, n), n > 3.
        second: (b, n, n).

    Returns:
        (a, b).
    """
    n = first.shape[-1]
    no_diagonal = [gram - torch.diag_embed(torch.diagonal(gram, dim1=-2, dim2=-1)) for gram in (first, second)]
    rows = [gram.sum(-1) for gram in no_diagonal]
    sums = [row.sum(-1) for row in rows]
    trace = torch.einsum("aij,bij->ab", *no_diagonal)
    sums_of_products = trace + torch.outer(*sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows[0] @ rows[1].T
    return sums_of_products / (n * (n - 3))


def _grams(model: TracedModel, taps: Sequence[str], batch: Any) -> Tensor:
    """One Gram matrix per tap."""
    found: dict[str, Tensor] = {}

    def note(node: fx.Node, value: Any) -> None:
        if node.name in wanted:
            rows = value.movedim(model.facts[node.name].batch_axis or 0, 0).flatten(1).double()
            found[node.name] = (rows @ rows.T).cpu()

    wanted = [model.taps[tap] for tap in taps]
    with mode(model.graph_module, training=False), torch.no_grad():
        run_looking(model.graph_module, note, *model.inputs_in(batch, where="CKA")[0])
    return torch.stack([found[name] for name in wanted])
