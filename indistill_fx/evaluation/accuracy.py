"""How good a trained model is: accuracy and loss on a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from indistill_fx.batch import Inputs, split
from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import evaluating
from indistill_fx.system.terminal import followed


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy (0 to 1), mean cross-entropy, number of samples and of classes of a test set."""

    accuracy: float
    loss: float
    count: int
    classes: int

    @property
    def no_better_than_chance(self) -> bool:
        """Whether it is within five points of what guessing one of the classes gets."""
        return self.accuracy < 1 / self.classes + 0.05


def evaluate(
    module: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    logits: str | int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Classify a whole test set in eval mode, without gradients; the module is left as it was found.

    Args:
        module: inputs -> logits (batch, classes).
        loader: batches (inputs, labels, …), or dicts of inputs by name with `labels`.
        device: where to compute; the default is where the module lies. The module is not moved.
        logits: which entry of a dict (key) or tuple (place) the logits are.
        progress: show a bar where standard error is a terminal.

    Returns:
        Accuracy, loss, count, classes.

    Raises:
        ConfigError: no batches, no logits, or a label beyond the classes.
    """
    correct, loss, count, classes = 0, 0.0, 0, 0
    for outputs, labels in _outputs(module, loader, device, progress):
        scores = select_logits(outputs, logits)
        _check_labels(labels, scores)
        loss += F.cross_entropy(scores.float(), labels, reduction="sum").item()
        correct += int((scores.argmax(1) == labels).sum())
        count, classes = count + len(labels), scores.shape[1]
    if not count:
        raise ConfigError("The loader has no batches to evaluate on.", where="loader", got=0, expected="at least 1")
    return Evaluation(correct / count, loss / count, count, classes)


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
    batches = [(f.flatten(1).cpu(), labels.cpu()) for f, labels in _outputs(module, loader, device, progress)]
    if not batches:
        raise ConfigError("The loader has no batches to embed.", where="loader", got=0, expected="at least 1")
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)


def select_logits(outputs: Any, logits: str | int | None = None) -> Tensor:
    """The logits in a model's output.

    Args:
        outputs: a tensor, or a dict, tuple or object with attributes.
        logits: the key or place; not read where the output is one tensor, so that it may serve for a teacher and a
            student of which only one returns several.

    Returns:
        (batch, classes).

    Raises:
        ConfigError: there is no such entry, or it is no (batch, classes) tensor.
    """
    value = outputs
    if logits is not None and not isinstance(outputs, Tensor):
        try:
            value = outputs[logits]
        except (KeyError, IndexError, TypeError):
            value = getattr(outputs, str(logits), None)
    if isinstance(value, Tensor) and value.ndim == 2:
        return value
    shown = (
        f"a dict of {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
    )
    shown = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else shown
    raise ConfigError(
        f"The model gives {shown}, " + ("not logits." if logits is None else f"in which {logits!r} is not the logits."),
        where="logits",
        got=type(value).__name__,
        expected="a tensor (batch, classes)",
        hint="Say which entry holds the logits: logits=KEY (--logits KEY).",
    )


def _outputs(
    module: nn.Module | Callable[..., Any], loader: Iterable[Any], device: torch.device | str | None, progress: bool
) -> Iterator[tuple[Any, Tensor]]:
    owner = module if isinstance(module, nn.Module) else getattr(module, "__self__", None)
    owner = owner if isinstance(owner, nn.Module) else nn.Module()
    if device is None:
        device = next((p.device for p in (*owner.parameters(), *owner.buffers())), torch.device("cpu"))
    with evaluating(owner):
        inputs = Inputs.of(module) if isinstance(module, nn.Module) else Inputs.of_function(module)
        for batch in followed(loader, "Evaluating", shown=progress):
            parts = split(send_to_device(batch, device), inputs, where=type(owner).__name__)
            if parts.labels is None:
                raise ConfigError(
                    "A batch of the test set has no labels.",
                    where="loader",
                    got=type(batch).__name__,
                    hint="Let the loader yield (inputs, labels), or a dict of inputs by name with `labels`.",
                )
            yield parts.calls[0](module), parts.labels


def _check_labels(labels: Tensor, scores: Tensor) -> None:
    wrong = labels[(labels < 0) | (labels >= scores.shape[1])]
    if len(wrong):
        raise ConfigError(
            f"Label {int(wrong[0])} is out of range: the model has {scores.shape[1]} classes.",
            where="labels",
            got=int(wrong[0]),
            expected=f"0 to {scores.shape[1] - 1}",
            hint="Check that model and data have the same classes.",
        )
