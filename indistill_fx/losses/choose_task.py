"""Which task it is: by name, from the user's own file, or by what labels and outputs look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from indistill_fx.errors import ConfigError, unknown
from indistill_fx.losses.positions import IGNORED, other_size
from indistill_fx.losses.task import (
    Classification,
    Embedding,
    Language,
    MultiLabel,
    Regression,
    Segmentation,
    Task,
)
from indistill_fx.system.user_code import load_object

TASKS: Mapping[str, Callable[[], Task]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
    "segmentation": Segmentation,
    "language": Language,
    "embedding": Embedding,
}


def task_of(task: str | Task) -> Task:
    """The task of that name, of `file.py:task`, or the one given.

    Raises:
        ConfigError: an unknown name, or something that is no `Task`; lists the known ones.
    """
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]()
    if isinstance(task, str) and ":" not in task:
        raise unknown("task", task, "task", TASKS, legal=f"{', '.join(TASKS)}, or file.py:task for your own")
    found: Any = load_object(task) if isinstance(task, str) else task
    found = found() if isinstance(found, type) else found
    if isinstance(found, Task):
        return found
    kind, hint = type(found).__name__, "Derive a class from indistill_fx.Task."
    raise ConfigError(f"A task must be a `Task`, not a {kind}.", where="task", got=kind, hint=hint)


def choose_task(task: str | Task | None, logits: Tensor, labels: Tensor | None, inputs: Tensor | None = None) -> Task:
    """The task as named, else inferred. For `language` the tokens show whether labels are shifted already.

    Args:
        task: see `task_of`; None: see `infer_task`.
        logits: a model's output for a batch.
        labels: of the batch.
        inputs: the batch's input that they are compared with (`compared_input`).

    Raises:
        ConfigError: an unknown name, or nothing can be inferred.
    """
    if task == Language.name and labels is not None and inputs is not None:
        return Language(shift=_are_the_inputs(labels, inputs))
    return task_of(task) if task is not None else infer_task(logits, labels, inputs)


def infer_task(logits: Tensor, labels: Tensor | None, inputs: Tensor | None = None) -> Task:
    """The task that a model's output and the labels of one batch, of which some count, leave no doubt about.

    Rules, in order:
      1. No labels: embedding.
      2. Class numbers (batch,) and logits (batch, classes): classification. A column (batch, 1) of them too.
      3. Class numbers (batch, length) and logits (batch, length, vocabulary): language; the labels are still to be shifted if they
         are the inputs themselves.
      4. Class numbers (batch, *positions), also (batch, 1, *positions), and logits (batch, classes, *positions): segmentation.
      5. Floating-point labels of the logits' shape: classification if every row sums to 1, multilabel if all are 0 or 1, else regression;
         whole numbers of 0 and 1 of that shape are multilabel too. Of one output, its axis may be missing in the labels or in the logits.

    Raises:
        ConfigError: none of them, or two.
    """
    if labels is None:
        return Embedding()
    numbers = not labels.is_floating_point() and labels.dtype != torch.bool
    if numbers and logits.ndim == 2 and logits.shape[1] > 1 and labels.numel() == len(labels) == len(logits):
        return Classification()
    tokens = logits.ndim == 3 and labels.shape == logits.shape[:2]
    places = logits.shape[:1] + logits.shape[2:]
    flat = labels[:, 0] if labels.ndim == logits.ndim == 4 and labels.shape[1] == 1 else labels
    dense = logits.ndim > 2 and flat.shape == places
    if numbers and tokens and not dense:
        return Language(shift=inputs is None or _are_the_inputs(labels, inputs))
    if numbers and dense and not tokens and logits.shape[1] > 1:
        return Segmentation()
    one_per_sample = labels.numel() == logits.numel() and (
        logits.ndim == 1
        or (logits.shape[1] == 1 and labels.shape == places)
        or labels.shape == (len(logits), 1, *logits.shape[1:])
    )
    if labels.shape == logits.shape or one_per_sample:
        found = _by_values(logits, labels)
        if found is not None:
            return found
    if numbers and logits.ndim > 2 and labels.numel() == len(labels) == len(logits):
        raise ConfigError(
            f"The labels are one class a sample, but the outputs, of shape {tuple(logits.shape)}, are features with positions.",
            where="labels",
            got=tuple(logits.shape),
            expected="(batch, classes)",
            hint="A backbone needs a classifier: pooling and a linear layer. Or measure features: --task embedding --retrieval.",
        )
    if labels.ndim and logits.ndim and len(labels) != len(logits):
        raise ConfigError(
            f"A batch has labels of {len(labels)} samples, but the model's outputs are of {len(logits)}.",
            where="labels",
            got=len(labels),
            expected=len(logits),
            hint="Let the loader give a label for every sample, and the model keep the batch in the first axis of its outputs.",
        )
    raise other_size(flat, logits) or ConfigError(
        f"Labels of shape {tuple(labels.shape)} ({str(labels.dtype).removeprefix('torch.')}) and outputs of shape "
        f"{tuple(logits.shape)} fit no task, or several.",
        where="labels",
        got=tuple(labels.shape),
        hint=f"Name it with task=… (--task): {', '.join(TASKS)}, or file.py:task. Class numbers must be integers (labels.long()), "
        "and measured values real numbers (labels.float()).",
    )


def _by_values(logits: Tensor, labels: Tensor) -> Task | None:
    """The task of labels that have one value for every output."""
    if labels.is_floating_point() and logits.ndim > 1 and logits.shape[1] > 1:
        sums = labels.sum(1)
        if torch.allclose(sums, torch.ones_like(sums), atol=1e-4) and bool((labels >= 0).all()):
            return Classification() if logits.ndim == 2 else Segmentation()
    if bool(((labels == 0) | (labels == 1)).all()):
        return MultiLabel(binary=True)
    return Regression() if labels.is_floating_point() else None


def compared_input(inputs: Sequence[Tensor], labels: Tensor | None) -> Tensor | None:
    """The input that token labels are compared with: a decoder's, which holds the labels one place later, else the first.

    Under teacher forcing (translation), the labels may also be the encoder's tokens, as in copies, and are still not to be shifted.
    """
    first = next(iter(inputs), None)
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        return first
    counted = labels[:, :-1] != IGNORED
    known = labels[:, :-1][counted]
    if known.numel() and bool((known != known[0]).any()):  # one value says nothing: a mask may be equal to it
        for other in inputs[1:]:
            if other.shape == labels.shape and bool((other[:, 1:][counted] == known).all()):
                return other
    return first


def is_telling(labels: Tensor | None) -> bool:
    """Whether labels show what they mean: class numbers that are all left out (`IGNORED`) do not. No labels show that there are none."""
    return labels is None or labels.is_floating_point() or bool((labels != IGNORED).any())


def is_one_hot(labels: Tensor | None) -> bool:
    """Whether labels (batch, classes) that are no real numbers have exactly one 1 in each row, and else 0."""
    if labels is None or labels.is_floating_point() or labels.ndim != 2 or labels.shape[1] < 2:
        return False
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())


def require_as_before(task: Task, labels: Tensor, inputs: Tensor | None) -> None:
    """Refuse labels that show that an inferred task is another one: they are no longer the inputs' own tokens.

    Args:
        task: as inferred from an earlier batch.
        labels: of this batch.
        inputs: its input that they are compared with (`compared_input`).

    Raises:
        ConfigError: the task shifts labels, and these are not to be shifted.
    """
    if isinstance(task, Language) and task.shift and inputs is not None and not _are_the_inputs(labels, inputs):
        raise ConfigError(
            "The labels seen first were all tokens of the input, so they were taken to be shifted by one, but here is another one.",
            where="task",
            got="labels that are not the input's tokens",
            expected="labels that are the input's tokens",
            hint="Write `task = Language(shift=False)` into a file, or True if they are to be shifted, and name it: --task file.py:task.",
        )


def _are_the_inputs(labels: Tensor, inputs: Tensor) -> bool:
    """Whether the labels equal the input tokens at the same positions: the task is then to predict the next token."""
    if labels.shape != inputs.shape or inputs.is_floating_point():
        return False
    counted = labels != IGNORED
    return bool((labels == inputs)[counted].all())
