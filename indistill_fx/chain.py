"""Teacher → assistant → student: distil along a chain, each step a run of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.record import RunRecord
from indistill_fx.train import distill


def distill_chain(
    models: Sequence[nn.Module],
    train_loader: Iterable[Any],
    *,
    steps: Sequence[Mapping[str, Any]] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[RunRecord]:
    """Distil every model into the next.

    Args:
        models: the teacher, then one or more assistants, then the student. All but the first are trained in place.
        train_loader: see `distill`.
        steps: per step, arguments of `distill` that differ from `options`. The paper's own way, with one assistant, is
            `[{"main": "pkt", "curriculum": Curriculum(lengths=[])}, {}]`: the assistant learns without a warm-up.
        run_dir: step k has its directory `step-k` in it, from 1; None: nowhere.
        options: see `distill`. With `resume=True`, steps that are done are read back and the first other one goes on.

    Returns:
        One record per step.

    Raises:
        ConfigError: fewer than two models, or another number of steps; else as `distill`.

    Source: Sarridis et al., "InDistill", arXiv:2205.10003: the auxiliary teacher.
    """
    pairs = list(pairwise(models))
    steps = [{}] * len(pairs) if steps is None else steps
    if not pairs or len(steps) != len(pairs):
        raise ConfigError(
            f"A chain of {len(models)} models has {len(pairs)} steps, and options are given for {len(steps)}.",
            where="chain",
            hint="Give the teacher, any assistants, and the student; and options for each step, or none.",
        )
    return [
        distill(
            teacher,
            student,
            train_loader,
            run_dir=Path(run_dir) / f"step-{number}" if run_dir is not None else None,
            **{**options, **own},
        )
        for number, ((teacher, student), own) in enumerate(zip(pairs, steps, strict=True), start=1)
    ]
