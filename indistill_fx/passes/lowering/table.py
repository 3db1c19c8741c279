"""Which rewrites run for which target: one literal table.

For a CPU a rewrite stands where it was measured to pay (`benchmarks/warmup.py --lowerings`, `benchmarks/cpu_bf16.py`,
docs/performance.md), and nowhere else. For a GPU nothing of it has been measured (`benchmarks/gpu.py --lowerings` does): what stands
there takes work out of every step or is what everybody does, and `fuse_cudnn`, of which neither can be said, stands nowhere. Guards
inside the rewritten operations are only a fallback, for a stage that is moved after it was compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from indistill_fx.passes.contract import Pass
from indistill_fx.passes.lowering.attention import attention_sequence_first
from indistill_fx.passes.lowering.cast_weights import cast_weights
from indistill_fx.passes.lowering.channels_last import stem_channels_last
from indistill_fx.passes.lowering.fused_conv import CudnnConv, fuse_convolutions
from indistill_fx.passes.lowering.layout import keep_channels_last
from indistill_fx.target import Kind, Target
from indistill_fx.traced import NodeFacts, Role


@dataclass(frozen=True, slots=True)
class Lowerings:
    """Names of the rewrites of each half, in the order in which they run.

    Attributes:
        teacher: of the teacher's half.
        student: of the student's half.
        dtype: what the target computes in; None: not known.
    """

    teacher: tuple[str, ...] = ()
    student: tuple[str, ...] = ()
    dtype: torch.dtype | None = None

    def without(self, name: str) -> Lowerings:
        """The rewrites without one of them."""
        teacher, student = (tuple(n for n in names if n != name) for names in (self.teacher, self.student))
        return Lowerings(teacher, student, self.dtype)


LOWERINGS: Mapping[Kind, Lowerings] = {
    "cpu": Lowerings(
        teacher=("fuse_convolutions",),
        student=("stem_channels_last",),
    ),
    # oneDNN's bfloat16 kernels take channels last; the stem alone where the network as a whole cannot.
    # Weights cast once gain nothing there.
    "cpu reduced": Lowerings(
        teacher=("channels_last",),
        student=("channels_last", "stem_channels_last"),
    ),
    "cpu compiled": Lowerings(teacher=("attention_sequence_first",)),
    "cuda": Lowerings(),
    # With bfloat16 and float16, tensor cores need channels last.
    "cuda reduced": Lowerings(
        teacher=("channels_last", "cast_weights"),
        student=("channels_last",),
    ),
    # torch.compile chooses the memory layouts itself.
    "cuda compiled": Lowerings(teacher=("cast_weights",)),
    "other": Lowerings(),
}


def lowerings_for(target: Target) -> Lowerings:
    """The target's own, for its dtype."""
    return replace(LOWERINGS[target.kind], dtype=target.dtype)


def lowering_passes(lowerings: Lowerings, role: Role, facts: Mapping[str, NodeFacts]) -> list[Pass]:
    """The rewrites of one half as passes.

    Args:
        lowerings: those of the target.
        role: whose half it is.
        facts: of the model it was cut from.
    """
    known: dict[str, Pass] = {
        "attention_sequence_first": ("attention_sequence_first", attention_sequence_first),
        "cast_weights": ("cast_weights", partial(cast_weights, dtype=lowerings.dtype)),
        "channels_last": ("channels_last", partial(keep_channels_last, frozen=role == "teacher")),
        "fuse_cudnn": ("fuse_cudnn", partial(fuse_convolutions, facts=facts, kind=CudnnConv)),
        "fuse_convolutions": ("fuse_convolutions", partial(fuse_convolutions, facts=facts)),
        "stem_channels_last": ("stem_channels_last", stem_channels_last),
    }
    return [known[name] for name in (lowerings.teacher if role == "teacher" else lowerings.student)]
