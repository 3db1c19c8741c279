"""What a stage is given: a batch taken apart, and refused by name where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.errors import ConfigError, TrainError


def label_check(classes: int | None, inputs: int = 1) -> Callable[[int, Any], None]:
    """A check that a batch's labels are classes.

    Args:
        classes: number of them; None: unknown, so anything goes.
        inputs: tensors before the labels in a batch that is a tuple.
    """

    def check(number: int, batch: Any) -> None:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(batch, (tuple, list)) and len(batch) > inputs:
            labels = batch[inputs]
        if classes is None or not isinstance(labels, Tensor) or not labels.numel() or labels.is_floating_point():
            return
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ConfigError(
                f"Label {wrong} in batch {number + 1} is out of range: the model has {classes} classes.",
                where="labels",
                got=wrong,
                expected=f"0 to {classes - 1}",
                hint="Check that model and data have the same classes.",
            )

    return check


FEATURES = "teacher_features"
"""Key of the teacher's features in a batch of a stage that has no teacher of its own."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A batch taken apart."""

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    indices: Tensor | None
    features: Mapping[str, Tensor] | None


def split(batch: Any, names: Sequence[str], *, stage: str) -> Parts:
    """Take a batch apart.

    Args:
        batch: a tensor, a sequence of tensors, or a dict; see `Stage.forward`.
        names: of the model's inputs.
        stage: its name, for the message.

    Raises:
        TrainError: it is none of these, or an entry is no tensor; names the stage and the argument.
    """
    count, features = len(names), None
    if isinstance(batch, Tensor) and count == 1:
        return Parts((batch,), None, None, None)
    if isinstance(batch, Mapping) and all(name in batch for name in names):
        inputs = [batch[name] for name in names]
        rest = (batch.get("labels"), batch.get("indices"))
        features = batch.get(FEATURES)
    elif isinstance(batch, (tuple, list)) and len(batch) >= count:
        inputs, rest = list(batch[:count]), (*batch[count:], None, None)[:2]
    else:
        raise TrainError(
            f"Stage `{stage}` got a batch it cannot read: {_describe(batch)}.",
            where=stage,
            got=type(batch).__name__,
            expected=f"inputs {', '.join(names)}, then labels",
            hint=f"Let the loader yield a tuple of tensors ({', '.join(names)}, labels) or a dict with these names.",
        )
    for name, value in zip((*names, "labels", "indices"), (*inputs, *rest), strict=True):
        if not isinstance(value, Tensor) and (name in names or value is not None):
            raise _unfit(stage, name, f"of type {type(value).__name__}", "a tensor", "Let the loader yield tensors.")
    return Parts(tuple(inputs), rest[0], rest[1], features)


def check_inputs(
    parts: Parts, names: Sequence[str], dtypes: Sequence[torch.dtype | None], student: nn.Module, *, stage: str
) -> None:
    """Refuse inputs of another device than the student's, or of a dtype it was not made for.

    Args:
        parts: of the batch.
        names: of the model's inputs.
        dtypes: what the model was traced with, input by input; None where that is unknown. A floating one stands for the dtype
            that the student's parameters have now.
        student: its first floating parameter tells device and dtype.
        stage: its name, for the message.

    Raises:
        TrainError: names the stage and the argument.
    """
    anchor = next((p for p in student.parameters() if p.is_floating_point()), None)
    if anchor is None or type(anchor) not in (Tensor, nn.Parameter):  # sharded: lies elsewhere until it is used
        return
    for name, value in zip((*names, "labels"), (*parts.inputs, parts.labels), strict=True):
        if value is not None and value.device != anchor.device:
            hint = f"Move the batch: batch.to({str(anchor.device)!r}), or the stage: stage.to({str(value.device)!r})."
            raise _unfit(stage, name, f"on {value.device}", f"on {anchor.device}, where the student is", hint)
    if torch.is_autocast_enabled(anchor.device.type):
        return
    for name, value, dtype in zip(names, parts.inputs, dtypes, strict=True):
        if dtype is None:
            continue
        wanted = anchor.dtype if dtype.is_floating_point else dtype
        fits = value.dtype == wanted if wanted.is_floating_point else not value.is_floating_point()
        if not fits:
            hint = f"Convert it: {name}.to({wanted}), or train under torch.autocast (mixed_precision)."
            raise _unfit(stage, name, str(value.dtype), str(wanted), hint)


def _unfit(stage: str, name: str, got: str, expected: str, hint: str) -> TrainError:
    return TrainError(
        f"Stage `{stage}`: `{name}` of the batch is {got}, not {expected}.",
        where=f"{stage}: {name}",
        got=got,
        expected=expected,
        hint=hint,
    )


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict of {', '.join(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(entry).__name__ for entry in batch)}"
    return f"a {type(batch).__name__}"
