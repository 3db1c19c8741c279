"""Which rewrites run for which target: one literal table.

A rewrite stands where it was measured to pay (`benchmarks/warmup.py --lowerings`, docs/performance.md), and nowhere else. Guards inside the
rewritten operations are only a fallback, for a stage that is moved after it was compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from indistill_fx.passes.contract import Pass
from indistill_fx.passes.lowering.channels_last import stem_channels_last
from indistill_fx.passes.lowering.fused_conv import fuse_convolutions
from indistill_fx.target import Kind
from indistill_fx.traced import NodeFacts, Role


@dataclass(frozen=True, slots=True)
class Lowerings:
    """Names of the rewrites of each half, in the order in which they run."""

    teacher: tuple[str, ...] = ()
    student: tuple[str, ...] = ()

    def without(self, name: str) -> Lowerings:
        """All but one."""
        teacher, student = (tuple(n for n in names if n != name) for names in (self.teacher, self.student))
        return Lowerings(teacher, student)


LOWERINGS: Mapping[Kind, Lowerings] = {
    "cpu": Lowerings(
        teacher=("fuse_convolutions",),
        student=("stem_channels_last",),
    ),
    # Other dtypes than float32: not measured by themselves; what of float32's list can run in them.
    "cpu reduced": Lowerings(student=("stem_channels_last",)),
    "cpu compiled": Lowerings(),
    "cuda": Lowerings(),
    "cuda compiled": Lowerings(),
    "other": Lowerings(),
}


def lowering_passes(lowerings: Lowerings, role: Role, facts: Mapping[str, NodeFacts]) -> list[Pass]:
    """The rewrites of one half as passes.

    Args:
        lowerings: those of the target.
        role: whose half it is.
        facts: of the model it was cut from.
    """
    known: dict[str, Pass] = {
        "fuse_convolutions": ("fuse_convolutions", partial(fuse_convolutions, facts=facts)),
        "stem_channels_last": ("stem_channels_last", stem_channels_last),
    }
    return [known[name] for name in (lowerings.teacher if role == "teacher" else lowerings.student)]
