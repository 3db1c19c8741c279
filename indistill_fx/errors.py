"""The errors indistill-fx raises on purpose.

Each names the place, what was found, what was expected and what to try next; the command line prints exactly that and
exits with code 2. Anything else that escapes is a defect of ours (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


class IndistillError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: one paragraph: what is wrong, where.
        where: the place: a layer, a file, an option.
        got: the value found there.
        expected: what would have been right; stands at the end of the text where there is no hint.
        hint: the next thing to try.
    """

    def __init__(self, message: str, *, where: str = "", got: object = None, expected: object = None, hint: str = ""):
        self.message, self.where, self.got, self.expected, self.hint = message, where, got, expected, hint
        remedy = hint or (f"Expected: {_listed(expected)}." if expected is not None else "")
        sentence = message if not remedy or message.rstrip().endswith((".", "!", "?", ":")) else f"{message}."
        super().__init__(f"{sentence} {remedy}".strip())


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple, set, frozenset)) else str(value)


class ConfigError(IndistillError, ValueError):
    """An option, a spec string, a plan or a file given by the user is at fault."""


class FrontendError(IndistillError):
    """A model cannot be loaded as, or traced to, a graph."""


class MatchError(IndistillError):
    """Teacher and student have no layers that can be paired."""


class PruneError(IndistillError):
    """Channels cannot be removed as asked; names the coupled group and the layer that blocks it."""


class TrainError(IndistillError):
    """Training cannot go on; names epoch, step and tap."""


class ExportError(IndistillError):
    """An export failed or does not agree with the module; names the output and the largest difference."""


class PassError(IndistillError):
    """A pass broke its own contract: a defect of ours, never of the input."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant of a graph: where, what was found, what was expected."""

    where: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"`{self.where}`: {self.got}; expected {self.expected}"


class VerifyError(IndistillError):
    """A graph breaks invariants; holds all of them, not only the first."""

    def __init__(self, message: str, violations: Iterable[Violation]):
        self.violations = tuple(violations)
        super().__init__("\n  ".join([message, *map(str, self.violations)]))


def nearest(name: str, legal: Iterable[str], *, count: int = 3) -> str:
    """A sentence that offers the legal names closest to `name`, or lists all when there are few and none is close.

    >>> nearest("resnet8", ["resnet18", "vgg11"])
    'Nearest: resnet18.'
    """
    legal = sorted(legal)
    close = get_close_matches(name, legal, n=count, cutoff=0.5)
    if close:
        return f"Nearest: {', '.join(close)}."
    return f"Legal: {', '.join(legal)}." if len(legal) <= 12 else ""


def unknown(where: str, name: str, what: str, known: Iterable[str], *, legal: str) -> ConfigError:
    """The error for a name that is none of the known ones.

    Args:
        where: what was being named: `task`.
        name: as given.
        what: what it would have to be: `task`, `data set`.
        known: the names that there are.
        legal: how one may be written, for the hint.
    """
    names = sorted(known)
    return ConfigError(
        f"{name!r} is no {what}.", where=where, got=name, expected=names, hint=f"{nearest(name, names)} Legal: {legal}."
    )
