"""What every pass returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")
Report = TypeVar("Report")


@dataclass(frozen=True, slots=True)
class PassResult(Generic[Value, Report]):
    """The new value a pass made, and its report: what changed, why, and what was skipped and why."""

    value: Value
    report: Report
