"""Several teachers on the command line of `distill`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from indistill_fx.cli import common
from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from indistill_fx.loading.load import Source


def shares_of(first: str, options: dict[str, Any]) -> dict[str, float]:
    """Every teacher's spec with its weight, in order; weights are read only where there are several."""
    if not options["more_teachers"]:
        return {first: 1.0}
    found: dict[str, float] = {}
    for text in (first, *options["more_teachers"]):
        spec, equals, number = text.rpartition("=")
        named = "?" in spec and "=" not in re.split("[?&]", spec)[-1]  # then it is an argument of a constructor
        try:
            weight = float(number) if equals and not named else None
        except ValueError:
            weight = None
        spec, weight = (text, 1.0) if weight is None else (spec, weight)
        if spec in found:
            raise ConfigError(
                f"The teacher {spec!r} is given twice.", where="--teacher", hint="Give it a weight: SPEC=2."
            )
        found[spec] = weight
    return found


def together(teachers: Sequence[Source], shares: dict[str, float], example: Any, options: dict[str, Any]) -> nn.Module:
    """The teachers as one module."""
    from indistill_fx.passes.ensemble import ensemble

    if len(teachers) == 1:
        return teachers[0].module
    if options["assistant"] == "auto":
        raise ConfigError(
            "--assistant auto shrinks the teacher, and there are several.",
            where="--assistant",
            hint="Name the assistant: --assistant SPEC.",
        )
    modules = [one.module for one in teachers]
    made = ensemble(modules, list(shares.values()), example_inputs=example, logits=options["logits"])
    for number, (spec, share) in enumerate(zip(shares, made.meta["teachers"]["weights"], strict=True)):
        common.say(f"teachers.{number}: {spec}, {share:.4g} of the logits")
    return made
