"""How good a trained model is: its task's metrics and loss on a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from indistill_fx.batch import call_of, split
from indistill_fx.errors import ConfigError, IndistillError
from indistill_fx.evaluation.outputs import outputs_of, select_logits
from indistill_fx.graph.module_state import device_of, evaluating
from indistill_fx.graph.view import View
from indistill_fx.losses.base import widened
from indistill_fx.losses.choose_task import choose_task, compared_input, is_telling, require_as_before
from indistill_fx.losses.positions import IGNORED, as_classes
from indistill_fx.losses.task import Classification, Language, Task
from indistill_fx.runs.record import MetricFacts
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import to_device
from indistill_fx.system.shortage import is_out_of_memory
from indistill_fx.system.terminal import followed
from indistill_fx.target import Target

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a model is on a test set.

    Attributes:
        accuracy: 0 to 1; None where the task has none.
        loss: the task's supervised loss, a mean over samples and positions.
        count: number of samples.
        classes: outputs of the model: classes, labels, values, the vocabulary.
        task: what the labels mean.
        metrics: all of the task's, by name; the first one decides what is best.
        metric: that one.
        recall: of a classifier: the share of a class's samples that are right, the mean over the classes that occur.
        occurring: how many classes occur.
        chance: the recall of a model that gives every class as often as this one does, but without looking at the sample.
    """

    accuracy: float | None
    loss: float
    count: int
    classes: int
    task: str = "classification"
    metrics: Mapping[str, float] = field(default_factory=dict)
    metric: MetricFacts = field(default_factory=MetricFacts)
    recall: float | None = None
    occurring: int = 0
    chance: float | None = None

    @property
    def value(self) -> float:
        """The deciding metric; the loss if there is none."""
        return self.metrics.get(self.metric.name, self.loss)

    @property
    def values(self) -> Mapping[str, float]:
        """All metrics; only the loss if there are none."""
        return self.metrics or {self.metric.name: self.loss}

    @property
    def no_better_than_chance(self) -> bool:
        """Whether a classifier is within five points of guessing, where every class counts the same."""
        right, chance = (self.recall, self.chance) if self.occurring > 1 else (self.accuracy, 1 / self.guesses)
        return right is not None and chance is not None and right < chance + 0.05

    @property
    def guesses(self) -> int:
        """Among how many classes a classifier guesses: those that occur, where that is known, else all of its outputs."""
        return self.occurring if self.occurring > 1 else self.classes


def evaluate(
    module: nn.Module,
    loader: Iterable[Any],
    *,
    task: str | Task | None = None,
    device: torch.device | str | None = None,
    logits: str | int | None = None,
    view: View | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a module on a whole test set in eval mode, without gradients. The module is not changed.

    Args:
        module: inputs → logits (batch, classes), or what else the task reads.
        loader: batches (inputs, labels, …), or dicts of inputs by name with `labels`.
        task: what the labels mean: a name, `file.py:task` or a `Task`; None: inferred from the first batch, if that is unambiguous.
        device: where to compute; None: where the module is. The module is not moved.
        logits: key (of a dict) or index (of a tuple) of the logits.
        view: how the module sees the batches, and which of its outputs are the classes; None: everything as it is.
        progress: show a bar if standard error is a terminal.

    Returns:
        Metrics, loss, and the numbers of samples and classes. Accuracy is a share, 0 to 1.

    Raises:
        ConfigError: there are no batches or no logits, logits are NaN, or the labels do not fit the task.

    Examples:
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent
        >>> data = ifx.open_data("digits", limit=100)
        >>> measured = ifx.evaluate(DigitsStudent(), data.test)
        >>> measured.count, measured.classes, 0 <= measured.accuracy <= 1
        (100, 10, True)
    """
    loss, count, counted, classes = 0.0, 0, 0, 0
    metrics: dict[str, Metric] = {}
    chosen: Task | None = None
    by_class: list[Tensor] = []
    inferred = task is None or task == Language.name
    for outputs, labels, inputs in _outputs(module, loader, device, progress, view):
        scores = widened(select_logits(outputs, logits))
        if bool(scores.isnan().any()):
            raise _not_a_number(module, count)
        if chosen is None and inferred and not is_telling(labels):
            count += len(labels)  # none counts, and none shows what the labels of later batches mean
            continue
        if chosen is None:
            alike = view.chosen(scores) if view is not None and scores.ndim != 3 else scores  # with the labels' classes
            chosen = choose_task(task, alike, labels, inputs)
            if not chosen.labelled:
                raise _unmeasured(chosen)
        require_as_before(chosen, labels, inputs if inferred else None)
        scores = view.chosen(scores, chosen.axis) if view is not None else scores
        scores, known = chosen.prepare(scores, labels)
        assert known is not None
        chosen.check(scores, known)
        if not metrics:
            metrics = {name: metric.to(scores.device) for name, metric in chosen.metrics(scores.shape[1]).items()}
            # The loader has all samples, so nothing is gathered from other processes.
            for metric in metrics.values():
                metric.distributed_available_fn = lambda: False
        with _explained(chosen, scores, known):
            total, over = chosen.total(scores, known)
            loss, counted = loss + total.item(), counted + over
            for metric in metrics.values():
                chosen.measure(metric, scores, known)
            by_class += [_by_class(scores, known)] if type(chosen) is Classification else []
        count, classes = count + len(labels), scores.shape[1]
    if chosen is None and not count:
        raise ConfigError("The loader has no batches to evaluate on.", where="loader", got=0, expected="at least 1")
    if chosen is None or not counted:
        raise _nothing_counts(count)
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    accuracy, facts = values.get("accuracy"), deciding_metric(chosen, classes)
    recall = _mean_recall(torch.stack(by_class).sum(0)) if by_class else ()
    return Evaluation(accuracy, loss / counted, count, classes, chosen.name, values, facts, *recall)


def _by_class(scores: Tensor, labels: Tensor) -> Tensor:
    """Of every class, how many samples are right, how many there are, and how often it is the model's answer."""
    labels = as_classes(labels)
    labels, guesses = labels[known := labels != IGNORED], scores.argmax(1)[known]
    return torch.stack(
        [torch.bincount(part, minlength=scores.shape[1]) for part in (labels[guesses == labels], labels, guesses)]
    )


def _mean_recall(by_class: Tensor) -> tuple[float | None, int, float | None]:
    """Recall, how many classes occur, and the recall by chance."""
    right, there, given = by_class[:, by_class[1] > 0].double()
    if not len(there):
        return None, 0, None
    return float((right / there).mean()), len(there), float(given.mean() / by_class[2].sum())


@contextmanager
def _explained(task: Task, logits: Tensor, labels: Tensor) -> Iterator[None]:
    """Turn failures in a user's own task, such as a metric that does not fit, into errors for the user."""
    try:
        yield
    except Exception as error:
        ours = isinstance(error, IndistillError) or type(task).__module__.startswith("indistill_fx.")
        if ours or is_out_of_memory(error):
            raise
        raise ConfigError(
            f"A metric or the loss of task `{task.name}` fails on outputs {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}.",
            where=task.name,
            got=type(error).__name__,
            hint="Give the task metrics and a loss for such outputs and labels.",
        ) from error


def deciding_metric(task: Task, outputs: int) -> MetricFacts:
    """The first of a task's metrics for models of so many outputs; of a task without any, its loss.

    Raises:
        ConfigError: a task of the user's own does not say whether higher or lower is better.
    """
    name, metric = next(iter(task.metrics(outputs).items()), ("loss", None))
    if metric is None:
        return MetricFacts(name, higher_is_better=False, share=False)
    if metric.higher_is_better is None:
        raise ConfigError(
            f"Metric `{name}` of task `{task.name}` does not say whether higher or lower is better.",
            where=name,
            expected="True or False",
            hint="Set `higher_is_better` in its class, or put another metric first.",
        )
    return MetricFacts(name, metric.higher_is_better, metric.plot_upper_bound == 1.0)


def _not_a_number(module: nn.Module, count: int) -> ConfigError:
    return ConfigError(
        f"{type(module).__name__} gives NaN for a sample after the first {count}, so no metric would mean anything.",
        where="logits",
        got="NaN",
        expected="numbers",
        hint="Check its weights and the normalisation of the data.",
    )


def _nothing_counts(count: int) -> ConfigError:
    samples = (
        "There are no samples" if not count else f"Of {count} sample{'s' * (count != 1)}, none has a label that counts"
    )
    return ConfigError(
        f"{samples}, so nothing can be measured.",
        where="labels",
        got=0,
        expected="at least 1",
        hint=f"Labels of {IGNORED}, and void labels, do not count: give data with others.",
    )


def _unmeasured(task: Task) -> ConfigError:
    return ConfigError(
        f"Task `{task.name}` reads no labels, so it cannot be measured with labels.",
        where="task",
        got=task.name,
        hint="Name the task of these labels (--task), or measure features alone: --task embedding --retrieval.",
    )


def more_outputs_than_classes(
    module: nn.Module, example: Any, classes: Sequence[str], logits: str | int | None = None
) -> str | None:
    """What to say of a model with more outputs than the data have classes; None if it has not, or fails on the example."""
    if not classes:
        return None
    try:
        with evaluating(module), torch.no_grad():
            call = call_of(example, Inputs.of(module), where="The example")
            outputs = select_logits(outputs_of(module, call), logits).shape
    except IndistillError:  # training says it in more words
        return None
    if len(outputs) < 2 or outputs[1] <= len(classes):
        return None
    few = len(classes)
    return f"The model has {outputs[1]} outputs, but the data have only {few} classes: outputs from {few} on are never right."


def embed(
    module: nn.Module | Callable[..., Any],
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Features of a whole data set, in eval mode, without gradients; a module is left as it was found.

    Args:
        module: inputs -> features (batch, ...): a module, a module's method, or a function, whose modules are yours to
            put in eval mode.
        loader: as for `evaluate`.
        device: as for `evaluate`.
        progress: as for `evaluate`.

    Returns:
        Features (count, width), flattened per sample, and labels (count,), both on the CPU.
    """
    found = _outputs(module, loader, device, progress)
    batches = [(f.flatten(1).cpu(), Classification().read(labels).cpu()) for f, labels, _ in found]
    if not batches:
        raise ConfigError("The loader has no batches to embed.", where="loader", got=0, expected="at least 1")
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)


def _outputs(
    module: nn.Module | Callable[..., Any],
    loader: Iterable[Any],
    device: torch.device | str | None,
    progress: bool,
    view: View | None = None,
) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
    """For every batch: the module's outputs, the labels, and the first input."""
    owner = module if isinstance(module, nn.Module) else getattr(module, "__self__", None)
    owner = owner if isinstance(owner, nn.Module) else nn.Module()
    device = device_of(owner) if device is None else Target(str(device)).device
    with evaluating(owner):
        inputs = Inputs.of(module) if isinstance(module, nn.Module) else Inputs.of_function(module)
        for batch in followed(loader, "Evaluating", shown=progress):
            parts = split(to_device(batch, device), inputs, where=type(owner).__name__)
            if parts.labels is None:
                raise ConfigError(
                    "A batch of the test set has no labels.",
                    where="loader",
                    got=type(batch).__name__,
                    hint="Let the loader yield (inputs, labels), or a dict of inputs by name with `labels`.",
                )
            call = parts.calls[0].changed(view.apply) if view is not None else parts.calls[0]
            yield outputs_of(module, call), parts.labels, compared_input(call.tensors, parts.labels)
