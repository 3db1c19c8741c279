"""The errors indistill-fx raises on purpose.

Each names the place, what was found, what was expected and what to try next; the command line prints exactly that and
exits with code 2. Any other exception is a bug in indistill-fx (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches


class IndistillError(Exception):
    """Base of all errors raised on purpose. The text says what is wrong, where, and what to do.

    Args:
        message: one paragraph: what is wrong, where.
        where: the place: a layer, a file, an option.
        got: the value found there.
        expected: what would have been right; it is appended to the text if there is no hint.
        hint: the next thing to try.

    Examples:
        >>> import indistill_fx as ifx
        >>> try:
        ...     ifx.open_data("digit")
        ... except ifx.IndistillError as error:
        ...     print(error.where, type(error).__name__)
        data ConfigError
    """

    def __init__(self, message: str, *, where: str = "", got: object = None, expected: object = None, hint: str = ""):
        self.message, self.where, self.got, self.expected, self.hint = message, where, got, expected, hint
        remedy = hint or (f"Expected: {_listed(expected)}." if expected is not None else "")
        sentence = message if not remedy or message.rstrip().endswith((".", "!", "?", ":")) else f"{message}."
        super().__init__(f"{sentence} {remedy}".strip())


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple, set, frozenset)) else str(value)


class ConfigError(IndistillError, ValueError):
    """An option, a spec, a plan or a file that the user gave is wrong.

    Examples:
        >>> import indistill_fx as ifx
        >>> ifx.Curriculum(unit="hours")
        Traceback (most recent call last):
        indistill_fx.errors.ConfigError: A curriculum's unit is 'hours'. Choose from: epochs, steps.
    """


class FrontendError(IndistillError):
    """A model cannot be loaded, or cannot be traced into a graph.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> try:
        ...     ifx.trace(DigitsTeacher(), torch.randn(2, 3, 8, 8))  # it takes one channel
        ... except ifx.FrontendError as error:
        ...     print(error.where)
        forward
    """


class MatchError(IndistillError):
    """Teacher and student have no layers that can be paired.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> try:
        ...     ifx.align(DigitsTeacher(), student, example_inputs=torch.randn(2, 1, 8, 8))
        ... except ifx.MatchError as error:
        ...     print(error.hint.split(",")[0])
        Name a pair with fixed= (--pair TEACHER_LAYER=STUDENT_LAYER)
    """


class PruneError(IndistillError):
    """Channels cannot be removed as asked; the message names the group of channels and the layer that blocks it.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> traced = ifx.trace(DigitsTeacher(), torch.randn(2, 1, 8, 8))
        >>> try:
        ...     ifx.narrow(traced, widths={"layer1": 64})
        ... except ifx.PruneError as error:
        ...     print(error)
        `layer1`: asked for 64 of its 32 channels. Give a width from 1 to 32.
    """


class TrainError(IndistillError):
    """Training cannot continue; the message names epoch, step and tap.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> batches = [(torch.full((4, 1, 8, 8), float("nan")), torch.arange(4))]
        >>> try:
        ...     ifx.train(DigitsTeacher(), batches, epochs=1, progress=False)
        ... except ifx.TrainError as error:
        ...     print(error.where)
        stage `main`, epoch 1, step 1
    """


class ExportError(IndistillError):
    """An export failed or disagrees with the module; the message names the output and the largest difference.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import indistill_fx as ifx
        >>> class Noisy(nn.Module):
        ...     def forward(self, x):
        ...         return x + torch.rand_like(x)
        >>> try:
        ...     ifx.export_onnx(Noisy(), "noisy.onnx", torch.randn(2, 3))
        ... except ifx.ExportError as error:
        ...     print(str(error).split(":")[0])
        `Noisy` is random in eval mode
    """


class PassError(IndistillError):
    """A pass broke its own contract: a bug of indistill-fx, never of the input. Please report it.

    Examples:
        >>> import indistill_fx as ifx
        >>> issubclass(ifx.PassError, ifx.IndistillError)
        True
    """


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant of a graph: where, what was found, what was expected."""

    where: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"`{self.where}`: {self.got}; expected {self.expected}"


class VerifyError(IndistillError):
    """A graph breaks rules that every graph must keep; lists all of them, not only the first. A bug of indistill-fx.

    Args:
        message: the pass, and the graph.
        violations: each broken rule; kept in the attribute `violations`.

    Examples:
        >>> import indistill_fx as ifx
        >>> from indistill_fx.errors import Violation
        >>> print(ifx.VerifyError("After pass `cut`:", [Violation("relu", "has no users", "one user")]))
        After pass `cut`:
          `relu`: has no users; expected one user
    """

    def __init__(self, message: str, violations: Iterable[Violation]):
        self.violations = tuple(violations)
        super().__init__("\n  ".join([message, *map(str, self.violations)]))


def nearest(name: str, legal: Iterable[str], *, count: int = 3, all_if_none: bool = True) -> str:
    """A sentence that offers the legal names closest to `name`, or lists all if there are few and none is close.

    >>> nearest("resnet8", ["resnet18", "vgg11"])
    'Nearest: resnet18.'
    """
    legal = sorted(legal)
    close = get_close_matches(name, legal, n=count, cutoff=0.5)
    if close:
        return f"Nearest: {', '.join(close)}."
    return f"Choose from: {', '.join(legal)}." if all_if_none and 0 < len(legal) <= 12 else ""


def unknown(where: str, name: str, kind: str, known: Iterable[str], *, legal: str) -> ConfigError:
    """The error for a name that is none of the known ones.

    Args:
        where: what was being named: `task`.
        name: as given.
        kind: the kind of thing that the name should be: `task`, `data set`.
        known: the names that there are.
        legal: how one may be written, for the hint.
    """
    names = sorted(known)
    return ConfigError(
        f"{name!r} is not a {kind}.",
        where=where,
        got=name,
        expected=names,
        hint=f"{nearest(name, names, all_if_none=False)} Choose from: {legal}.".strip(),
    )


def first_lines(error: BaseException, *, limit: int = 300) -> str:
    """An error's text on one line, cut off after `limit` characters, ending like a sentence."""
    known = error.strerror if isinstance(error, OSError) else None
    text = " ".join((known or str(error)).split()) or type(error).__name__
    return f"{text[: limit - 1]}…" if len(text) > limit else f"{text.rstrip('.')}."


@contextmanager
def instead_of(raised: type[Exception] | tuple[type[Exception], ...], replacement: IndistillError) -> Iterator[None]:
    """Replace a library's exception, raised inside the block, by an error of ours that gives the library's text as the reason.

    Our own errors pass unchanged.

    Args:
        raised: what the library raises.
        replacement: our error, which says what was attempted; the reason is appended after a colon.

    Examples:
        >>> with instead_of(ValueError, ConfigError("The width cannot be read", where="width", hint="Give a number.")):
        ...     int("wide")
        Traceback (most recent call last):
        indistill_fx.errors.ConfigError: The width cannot be read: invalid literal for int() with base 10: 'wide'. Give a number.
    """
    try:
        yield
    except IndistillError:
        raise
    except raised as error:
        where, hint = replacement.where, replacement.hint
        raise type(replacement)(f"{replacement.message}: {first_lines(error)}", where=where, hint=hint) from error
