"""How good an ONNX file is on labelled data: by the metric of its task that decides which model is best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from indistill_fx.deploy.nested_inputs import in_batch
from indistill_fx.deploy.onnx_session import Array, feed
from indistill_fx.deploy.parity import logits_of, main_of
from indistill_fx.errors import ConfigError
from indistill_fx.evaluation.accuracy import deciding_metric
from indistill_fx.losses.base import widened
from indistill_fx.losses.choose_task import choose_task, compared_input, is_telling
from indistill_fx.losses.positions import IGNORED, as_classes
from indistill_fx.losses.task import Classification, Task
from indistill_fx.runs.record import MetricFacts

if TYPE_CHECKING:
    import onnxruntime
    from torchmetrics import Metric

Batch: TypeAlias = Tensor | Sequence[Any]


@dataclass(frozen=True)
class Piece:
    """Some rows of a batch as the file takes them.

    Args:
        arrays: by input; a file's fixed batch is filled up by repeating rows.
        rows: the real ones.
        labels: of these, if the batch has any.
    """

    arrays: dict[str, Array]
    rows: int
    labels: Tensor | None

    @property
    def inputs(self) -> list[Tensor]:
        """The real rows of all inputs."""
        return [torch.from_numpy(value[: self.rows]) for value in self.arrays.values()]


def pieces(
    session: onnxruntime.InferenceSession, batches: Iterable[Batch], *, most: int | None = None
) -> Iterator[Piece]:
    """Batches split to the file's batch size if it is fixed, otherwise to at most `most` rows."""
    inputs = session.get_inputs()
    names = [entry.name for entry in inputs]
    fixed = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else None
    for batch in batches:
        values, given = in_batch(batch, names, where="The file")
        size = fixed or most or max(len(values[0]), 1)
        for start in range(0, len(values[0]), size):
            chosen = [value[start : start + size] for value in values]
            rows = len(chosen[0])
            if fixed and rows < fixed:
                chosen = [value[torch.arange(fixed) % rows] for value in chosen]
            labels = torch.as_tensor(given[start : start + size]) if given is not None else None
            yield Piece(feed(session, chosen), rows, labels)


@dataclass(frozen=True)
class Judgement:
    """How good a file is.

    Attributes:
        task: what its labels mean.
        metric: the task's that decides.
        value: of it; the mean loss if the task has no metric.
        count: samples; of a classifier those whose label counts.
        decisions: what the file decides at every position that counts, in one row; None if its outputs are values.
        labels: of a classifier: the class numbers that belong to them.
    """

    task: Task
    metric: MetricFacts
    value: float
    count: int
    decisions: Array | None
    labels: Array | None

    def loss(self, other: float) -> float:
        """What another value of the metric is worse by, below 0 if better: points of a share, else a share of this value."""
        worse = self.value - other if self.metric.higher_is_better else other - self.value
        if self.metric.share or not worse:
            return worse
        return worse / abs(self.value) if self.value else float("inf") * np.sign(worse)

    def agreement(self, other: Judgement) -> float | None:
        """The share of decisions that are the same; None if there are none to compare."""
        if self.decisions is None or other.decisions is None or self.decisions.shape != other.decisions.shape:
            return None
        return float((self.decisions == other.decisions).mean()) if len(self.decisions) else None

    def per_class(self, other: Judgement) -> dict[int, tuple[float, float]]:
        """Of classifiers: by class of the labels, the share of right decisions of this file and of another."""
        if self.labels is None or self.decisions is None or other.decisions is None:
            return {}
        rows = {int(label): self.labels == label for label in np.unique(self.labels)}
        return {
            label: (float((self.decisions[at] == label).mean()), float((other.decisions[at] == label).mean()))
            for label, at in rows.items()
        }


def judge(
    session: onnxruntime.InferenceSession,
    batches: Iterable[Batch],
    *,
    task: str | Task | None = None,
    logits: str | int | None = None,
) -> Judgement:
    """Run a file over batches with labels.

    Args:
        session: the file, opened.
        batches: (inputs…, labels), or dicts of inputs by name with `labels`.
        task: what labels mean; None: inferred from the first batch that tells.
        logits: name or index of the output that the task reads.

    Raises:
        ConfigError: there are no labels or none that count, they do not fit the task, or it is not known which output holds the logits.
    """
    tally: _Tally | None = None
    seen = False
    for scores, labels, tokens in _answers(session, batches, logits):
        seen = True
        if tally is None and (task is not None or is_telling(labels)):
            tally = _Tally(choose_task(task, scores, labels, tokens))
        if tally is not None:
            tally.add(scores, labels)
    if tally is None or not tally.counted:
        reason = "None of the evaluation data's labels counts" if seen else "The evaluation data is empty"
        message = f"{reason}, so the loss of quality cannot be measured."
        raise ConfigError(message, where="evaluation", hint="Give samples with labels.")
    return tally.judgement()


class _Tally:
    """What is added up over the batches for a judgement by a task.

    Raises:
        ConfigError: the task has no labels.
    """

    def __init__(self, task: Task):
        if not task.labelled:
            message = f"The task {task.name} has no labels, so the file cannot be judged by them."
            raise ConfigError(message, where="task", hint="Use the float file: leave int8 out (--int8).")
        self.task, self.facts = task, MetricFacts()
        self.metric: Metric | None = None
        self.samples, self.loss, self.counted = 0, 0.0, 0
        self.decisions: list[Array | None] = []
        self.labels: list[Array] = []

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Add a batch; the task checks it."""
        task = self.task
        scores, known = task.prepare(scores, labels)
        assert known is not None
        task.check(scores, known)
        if not self.decisions:
            self.facts = deciding_metric(task, scores.shape[1])
            self.metric = next(iter(task.metrics(scores.shape[1]).values()), None)
        loss, counted = task.total(scores, known)
        self.loss, self.counted = self.loss + float(loss), self.counted + counted
        self.samples += counted if type(task) is Classification else len(labels)
        if self.metric is not None:
            task.measure(self.metric, scores, known)
        decided, known = task.decisions(scores), as_classes(known) if type(task) is Classification else known
        self.decisions.append(None if decided is None else _counted(decided, decided, known, scores.shape[1]))
        if decided is not None and type(task) is Classification:
            self.labels.append(_counted(known, decided, known))

    def judgement(self) -> Judgement:
        """The whole of it."""
        decided = [part for part in self.decisions if part is not None]
        return Judgement(
            self.task,
            self.facts,
            self.loss / self.counted if self.metric is None else float(self.metric.compute()),
            self.samples,
            np.concatenate(decided) if len(decided) == len(self.decisions) else None,
            np.concatenate(self.labels) if self.labels else None,
        )


def _answers(
    session: onnxruntime.InferenceSession, batches: Iterable[Batch], logits: str | int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Of every piece: the logits, the labels, and the input that labels of tokens are compared with."""
    names = [entry.name for entry in session.get_outputs()]
    for piece in pieces(session, batches):
        if piece.labels is None:
            message = "Evaluation batches need labels: (inputs, labels)."
            raise ConfigError(message, where="evaluation", hint="Give batches with labels.")
        outputs = dict(zip(names, session.run(None, piece.arrays), strict=True))
        scores = torch.from_numpy(np.ascontiguousarray(outputs[_main(outputs, logits)]))[: piece.rows]
        yield widened(scores), piece.labels, compared_input(piece.inputs, piece.labels)


def _main(outputs: Mapping[str, Array], logits: str | int | None) -> str:
    """The name of the output that the task reads."""
    name = (
        main_of(outputs, logits) or logits_of(outputs, logits) or (next(iter(outputs)) if len(outputs) == 1 else None)
    )
    if name is None:
        raise ConfigError(
            "It is not known which output the task reads: no output is called `logits`, nor is one alone of shape (N, classes).",
            where="logits",
            hint=f"Say which output holds the logits: logits=… (--logits). The file has {', '.join(outputs)}.",
        )
    return name


def _counted(values: Tensor, decisions: Tensor, labels: Tensor, outputs: int = 1 << 30) -> Array:
    """Values in one row, where the labels of decisions count, in the smallest type that holds numbers below `outputs`."""
    if labels.shape == decisions.shape and not labels.is_floating_point():
        values = values[labels != IGNORED]
    array: Array = values.flatten().to(torch.uint8 if outputs < 256 else torch.int32).numpy()
    return array
