"""The reference that shrunk networks are compared with; the package compares with it after every shrink, too."""

from __future__ import annotations

from typing import Any

import torch

from indistill_fx.passes.pruning.masked import Masked
from indistill_fx.passes.pruning.shrink import ShrinkReport
from indistill_fx.traced import TracedModel

__all__ = ["Masked", "run_masked"]


def run_masked(model: TracedModel, report: ShrinkReport, *inputs: Any) -> Any:
    """The output of the original on these inputs, as if the channels that `shrink` removed were not there."""
    with torch.no_grad():
        return Masked(model, report.axes).run(*inputs)
