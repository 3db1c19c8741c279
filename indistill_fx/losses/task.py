"""A task: what labels mean. Their form, the supervised loss, how logits are compared, and the metrics.

`prepare` brings logits and labels to the one form that every loss knows: (batch, outputs, *positions), and labels that go with it.
Whatever reads logits (the losses, validation, export) asks the task, and nothing else in the project knows what a label is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from indistill_fx.errors import ConfigError
from indistill_fx.losses.label_checks import (
    require_binary,
    require_no_class,
    require_positions,
    require_probabilities,
    require_shape,
)
from indistill_fx.losses.positions import IGNORED, are_classes, as_classes, counted, mean_over

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True)
class Task:
    """What labels mean. Derive from it for a task of your own, and name it `file.py:task`.

    Methods take `labels` (None if there are none) and `logits`, of the `student` and the `teacher` where they compare two. All but `read`
    and `prepare` take them *prepared*: logits as (batch, outputs, *positions), and labels as `prepare` returns them.

    Attributes:
        name: of the task.
        by_class: whether the outputs at one position are classes that exclude each other; losses that take a softmax over them
            need that.
        labelled: whether there are labels at all.
        temperature: of the loss `kd` for this task if none is given; None: the loss's own.
        axis: of the outputs in what a model gives, before `prepare` makes it 1.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import l1_loss
        >>> from torchmetrics import MeanAbsoluteError
        >>> import indistill_fx as ifx
        >>> class Ages(ifx.Task):
        ...     name = "ages"
        ...     check = lambda self, logits, labels: None  # raise a ConfigError for labels that are wrong
        ...     loss = lambda self, logits, labels: l1_loss(logits, labels)
        ...     divergence = lambda self, student, teacher, labels, temperature: l1_loss(student, teacher)
        ...     metrics = lambda self, outputs: {"years off": MeanAbsoluteError()}
        >>> batches = [(torch.randn(4, 3), torch.rand(4, 1))]
        >>> ifx.evaluate(torch.nn.Linear(3, 1), batches, task=Ages()).metric.name
        'years off'
    """

    name: ClassVar[str]
    by_class: ClassVar[bool] = False
    labelled: ClassVar[bool] = True
    temperature: ClassVar[float | None] = None
    axis: ClassVar[int] = 1

    def read(self, labels: Tensor) -> Tensor:
        """Labels of a batch, as the loader gives them, in the task's own form: for `prepare`, or for a loss of your own."""
        return labels

    def prepare(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits as (batch, outputs, *positions), and the labels that go with them."""
        return logits, labels

    def check(self, logits: Tensor, labels: Tensor) -> None:
        """Refuse labels that do not fit. It reads values, so it runs only on the first batch and in validation.

        Raises:
            ConfigError: form or values are not those of this task.
        """
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The supervised loss, a scalar: the mean over samples and positions."""
        raise NotImplementedError

    def total(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The supervised loss as a sum, and the number of values in it, for a mean over several batches."""
        return self.loss(logits, labels) * len(labels), len(labels)

    def decisions(self, logits: Tensor) -> Tensor | None:
        """What the model decides, as integers, such as class numbers (batch, *positions); None if the outputs are values."""
        return None

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
        """How far the student's logits, divided by `temperature`, are from the teacher's, a scalar; what `kd` minimises."""
        raise NotImplementedError

    def metrics(self, outputs: int) -> dict[str, Metric]:
        """New metrics (of torchmetrics) by name, for models of this many `outputs`; the first decides which epoch was best."""
        raise NotImplementedError

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Update a `metric` with a batch."""
        metric.update(logits, labels)


@dataclass(frozen=True)
class Classification(Task):
    """One class a sample: logits (batch, classes), labels (batch,), or probabilities (batch, classes).

    Source of the divergence: Hinton, Vinyals, Dean, arXiv:1503.02531: T^2 times the mean KL of softmax(z_t / T) from softmax(z_s / T).
    """

    name: ClassVar[str] = "classification"
    by_class: ClassVar[bool] = True

    def read(self, labels: Tensor) -> Tensor:
        """Class numbers as int64, a column (batch, 1) of them as (batch,)."""
        if labels.is_floating_point():
            return labels
        return (labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels).long()

    def prepare(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `read`; whole numbers for every class of a sample (one-hot) are probabilities."""
        if labels is not None and labels.ndim == 2 and labels.shape == logits.shape and labels.shape[1] > 1:
            return logits, labels if labels.is_floating_point() else labels.to(logits.dtype)
        return logits, self.read(labels) if labels is not None else None

    def check(self, logits: Tensor, labels: Tensor) -> None:
        """See `Task`."""
        if not are_classes(labels, logits):
            require_probabilities(labels)
            return
        known = labels[labels != IGNORED]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < logits.shape[1]:
            wrong = int(known.min()) if int(known.min()) < 0 else int(known.max())
            raise ConfigError(
                f"Label {wrong} is out of range: the model has {logits.shape[1]} classes.",
                where="labels",
                got=wrong,
                expected=f"0 to {logits.shape[1] - 1}, or {IGNORED} for what does not count",
                hint=f"Give the model as many classes as the data have, or replace a void label by {IGNORED}.",
            )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; positions without a label (`positions.counted`) do not count, and where nothing counts it is 0."""
        mask = counted(labels, logits)
        return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED) / mask.sum().clamp(min=1)

    def total(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """See `Task`."""
        total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        return total, int(counted(labels, logits).sum())

    def decisions(self, logits: Tensor) -> Tensor | None:
        """The largest class."""
        return logits.argmax(1)

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
        """See the class."""
        log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
        values = F.kl_div(log_s, log_t, reduction="none", log_target=True)
        return mean_over(values, counted(labels, student)) * temperature**2

    def metrics(self, outputs: int) -> dict[str, Metric]:
        """Accuracy."""
        from indistill_fx.losses.metrics import Accuracy

        return {"accuracy": Accuracy()}

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Probabilities count as their largest class."""
        metric.update(logits, as_classes(labels))


@dataclass(frozen=True)
class Segmentation(Classification):
    """One class a pixel: logits (batch, classes, height, width), labels (batch, height, width); 255, the usual void label, is ignored."""

    name: ClassVar[str] = "segmentation"
    temperature: ClassVar[float | None] = 1.0
    void: int = 255

    def check(self, logits: Tensor, labels: Tensor) -> None:
        """See `Task`."""
        require_positions(self.name, logits, "(batch, classes, height, width)")
        if self.void == Segmentation.void:
            require_no_class(self.void, logits)
        super().check(logits, labels)

    def read(self, labels: Tensor) -> Tensor:
        """The void label becomes `IGNORED`; labels (batch, 1, height, width) lose their axis of one."""
        if labels.is_floating_point():
            return labels
        labels = labels[:, 0] if labels.ndim == 4 and labels.shape[1] == 1 else labels
        return labels.long().masked_fill(labels == self.void, IGNORED)

    def metrics(self, outputs: int) -> dict[str, Metric]:
        """Mean intersection over union, and accuracy over pixels."""
        from torchmetrics.classification import MulticlassJaccardIndex

        from indistill_fx.losses.metrics import Accuracy

        return {"mean_iou": MulticlassJaccardIndex(outputs, ignore_index=IGNORED), "pixel_accuracy": Accuracy()}


@dataclass(frozen=True)
class Language(Classification):
    """The next token: logits (batch, length, vocabulary), labels (batch, length); -100 is ignored.

    Attributes:
        shift: position i is compared with label i + 1, where labels are the input's own tokens (as Hugging Face's causal models take
            them); False where labels already stand at the position that predicts them (masked tokens, tags).
    """

    name: ClassVar[str] = "language"
    axis: ClassVar[int] = -1
    shift: bool = True

    def check(self, logits: Tensor, labels: Tensor) -> None:
        """See `Task`."""
        require_positions(self.name, logits, "(batch, length, vocabulary)")
        super().check(logits, labels)

    def read(self, labels: Tensor) -> Tensor:
        """As int64."""
        return labels.long()

    def prepare(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(batch, vocabulary, length)."""
        if self.shift:
            logits = logits[:, :-1]
            labels = labels[:, 1:] if labels is not None else None
        return logits.movedim(-1, 1), labels

    def metrics(self, outputs: int) -> dict[str, Metric]:
        """Perplexity."""
        from indistill_fx.losses.metrics import Perplexity

        return {"perplexity": Perplexity()}


@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of labels a sample: logits (batch, labels, *positions), labels 0 or 1 (or probabilities) of the same shape.

    Where there is one label, (batch,) is as good as (batch, 1).

    The divergence is T^2 times the mean over all labels of the KL of Bernoulli(sigmoid(z_t / T)) from Bernoulli(sigmoid(z_s / T)).

    Attributes:
        binary: whether probabilities are refused: where the task was inferred from labels that were all 0 or 1, others are a sign that
            they are measured values.
    """

    name: ClassVar[str] = "multilabel"
    binary: bool = False

    def prepare(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Labels in the logits' dtype; (batch,) is one label a sample."""
        return _with_column(logits, labels)

    def check(self, logits: Tensor, labels: Tensor) -> None:
        """See `Task`."""
        require_shape(self.name, logits, labels)
        if self.binary:
            require_binary(labels)
        if not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ConfigError(
                f"multilabel reads labels from 0 to 1, but these range from {labels.min():g} to {labels.max():g}.",
                where="labels",
                got=(float(labels.min()), float(labels.max())),
                expected="0 or 1 for each label",
                hint="For class numbers use --task classification, for measured values --task regression.",
            )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, the mean over samples and labels."""
        return F.binary_cross_entropy_with_logits(logits, labels)

    def decisions(self, logits: Tensor) -> Tensor | None:
        """Which labels are more likely than not."""
        return (logits > 0).long()

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
        """See the class."""
        z_s, z_t = student / temperature, teacher / temperature
        positive = z_t.sigmoid() * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
        absent = (-z_t).sigmoid() * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
        return (positive + absent).mean() * temperature**2

    def metrics(self, outputs: int) -> dict[str, Metric]:
        """Mean average precision over the labels that occur, and their mean F1 at probability 1/2."""
        from indistill_fx.losses.metrics import MeanAveragePrecision, MeanF1

        name = "average_precision" if outputs == 1 else "mean_average_precision"
        return {name: MeanAveragePrecision(), "f1": MeanF1(outputs)}

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Scores from 0 to 1, with logits in their order, and labels as 0 and 1.

        In place of probabilities, which are all 1 above logits of 17, a curve that keeps the order of any logits and is 1/2 at 0.
        """
        metric.update(0.5 + 0.5 * F.softsign(logits.double()), (labels > 0.5).long())


@dataclass(frozen=True)
class Regression(Task):
    """Measured values: outputs (batch, values, *positions), labels of the same shape; (batch,) is one value a sample.

    Loss and divergence are mean squared errors; a temperature has no meaning there.
    """

    name: ClassVar[str] = "regression"

    def prepare(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Labels in the outputs' dtype; one value a sample as (batch, 1)."""
        return _with_column(logits, labels)

    def check(self, logits: Tensor, labels: Tensor) -> None:
        """See `Task`."""
        require_shape(self.name, logits, labels)
        if not bool(labels.isfinite().all()):
            raise ConfigError("A label is not a finite number.", where="labels", expected="finite numbers")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(logits, labels)

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
        """See the class."""
        return F.mse_loss(student, teacher)

    def metrics(self, outputs: int) -> dict[str, Metric]:
        """Root of the mean squared error, and mean absolute error."""
        from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

        return {"rmse": MeanSquaredError(squared=False), "mean_absolute_error": MeanAbsoluteError()}

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Over all values alike."""
        metric.update(logits.flatten(), labels.flatten())


@dataclass(frozen=True)
class Embedding(Task):
    """Features only: no labels are read, and nothing is classified. The main loss must be one on features or penultimate vectors."""

    name: ClassVar[str] = "embedding"
    labelled: ClassVar[bool] = False

    def check(self, logits: Tensor, labels: Tensor) -> None:
        """Nothing to check: labels are not read."""

    def divergence(self, student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
        """Mean squared error of the models' outputs."""
        return F.mse_loss(student, teacher)

    def metrics(self, outputs: int) -> dict[str, Metric]:
        """None: the loss on validation data is all there is."""
        return {}


def _with_column(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits (batch,) as (batch, 1), and labels in their dtype, with such an axis of one where the logits have it, and only there."""
    if logits.ndim == 1:
        logits = logits[:, None]
    if labels is None:
        return logits, None
    if labels.ndim == logits.ndim - 1 and logits.shape[1] == 1:
        labels = labels.unsqueeze(1)
    elif labels.shape == (len(logits), 1, *logits.shape[1:]):
        labels = labels.squeeze(1)
    return logits, labels.to(logits.dtype)
