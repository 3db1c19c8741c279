"""What is to be known of an option of a run, and the check of its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args

from indistill_fx.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class About:
    """What is to be known of an option beside its name, type and default.

    Attributes:
        help: what it means, in a line or two.
        flag: its name on the command line, if that is not its own with hyphens.
        alias: a second name there.
        metavar: what stands for its value there.
        above: what a number must be greater than.
        least: the smallest number it may be.
        below: what a number must be less than.
        changes_result: whether a run under another value is another run.
    """

    help: str
    flag: str = ""
    alias: str = ""
    metavar: str | None = None
    above: float | None = None
    least: float | None = None
    below: float | None = None
    changes_result: bool = True


def described(help: str, **more: Any) -> dict[str, About]:
    """An `About` as the metadata of a field."""
    return {"about": About(help, **more)}


def require_choice(name: str, value: object, legal: Sequence[object]) -> None:
    """Refuse a value that is none of the legal ones.

    Raises:
        ConfigError: lists them.
    """
    if value not in legal:
        names = [str(choice) for choice in legal]
        raise ConfigError(
            f"{name} is {value!r}.", where=name, got=value, expected=names, hint=nearest(str(value), names)
        )


def check_value(name: str, value: object, hint: Any, option: About) -> None:
    """Refuse a value that its type or its range does not allow."""
    parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in parts:
        return
    kind = parts[0]
    if choices := get_args(kind):
        if isinstance(choices[0], str):
            require_choice(name, value if type(value) in map(type, choices) else repr(value), choices)
            return
        fine = isinstance(value, Sequence) and all(isinstance(entry, Integral) and int(entry) >= 0 for entry in value)
        expected = "a list of integers, each 0 or more"
    elif kind is str:
        fine, expected = isinstance(value, str) and bool(value), "a name"
    elif kind is bool:
        fine, expected = isinstance(value, bool), "True or False"
    else:
        integral = kind is int
        number = isinstance(value, Integral if integral else Real) and not isinstance(value, bool)
        low = -math.inf if option.least is None else option.least
        size = float(value) if number else math.nan  # type: ignore[arg-type]
        fine = low <= size < (2**63 if option.below is None else option.below) and (
            option.above is None or size > option.above
        )
        bound = f" above {option.above:g}" if option.above is not None else f", {low:g} or more"
        bound += (
            f", less than {option.below:g}"
            if option.below is not None
            else ", less than 2**63"
            if size >= 2**63
            else ""
        )
        expected = f"{'an integer' if integral else 'a number'}{bound}"
    if not fine:
        expected += ", or None" if len(parts) > 1 else ""
        raise ConfigError(f"{name} is {value!r}.", where=name, got=value, expected=expected)
