"""What is done to a batch before it is learnt from: images mixed with one another, labels smoothed.

Everything random is torch's, so that it follows from what the loop has seeded: a resumed run mixes as the first one did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from indistill_fx.batch import split, with_labels
from indistill_fx.errors import ConfigError
from indistill_fx.losses.positions import IGNORED
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import replaced
from indistill_fx.training.options.settings import Settings


def make_mixing(settings: Settings, task: str, outputs: int, *models: Inputs) -> Callable[[Any], Any] | None:
    """What `settings` asks for, as a function batch → batch with probabilities (batch, classes) for labels; None: nothing.

    Rules, in order:
      1. Mixup and CutMix (torchvision.transforms.v2), of which each batch gets one, drawn evenly, where both are asked for.
      2. Label smoothing: (1 - s) * label + s / classes.
      3. What has no label (-100), or is mixed with something that has none, gets probabilities that are all 0, and does not count.

    Args:
        settings: `mixup`, `cutmix` (each a Beta distribution's parameter; 0: off) and `label_smoothing`.
        task: what the labels mean; it must be classification.
        outputs: how many classes there are.
        models: what the run's models take.

    Raises:
        ConfigError: of another task; by the function, of a batch that has no class numbers (batch,), or more than one input to mix.
    """
    mixes = [name for name in ("mixup", "cutmix") if getattr(settings, name)]
    if not mixes and not settings.label_smoothing:
        return None
    if task != "classification":
        raise _unfit(f"labels of task {task!r}", "class numbers of task 'classification'")

    def mixed(batch: Any) -> Any:
        parts = split(batch, *models, where="Mixing")
        labels = parts.labels
        if labels is None:
            raise _unfit("no labels", "class numbers (batch,)")
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.is_floating_point() or labels.ndim != 1:
            raise _unfit(f"labels of shape {tuple(labels.shape)} ({labels.dtype})", "class numbers (batch,)")
        _require_classes(labels, outputs)
        labels = labels.where(labels != IGNORED, outputs)  # a class more, for what has none
        soft: Tensor = F.one_hot(labels, outputs + 1).to(torch.get_default_dtype())
        if mixes:
            inputs = {id(tensor): tensor for call in parts.calls for tensor in call.tensors}
            picture = parts.calls[0].first
            if len(inputs) != 1 or picture is None or picture.ndim != 4 or not picture.is_floating_point():
                raise _unfit("inputs that are not one image", "one image (batch, channels, height, width)")
            new, soft = _mix(mixes, settings, picture, labels, outputs + 1)
            batch = replaced(batch, {id(picture): new})
        soft, unknown = soft.split([outputs, 1], 1)
        smooth = settings.label_smoothing
        soft = soft * (1 - smooth) + smooth / outputs if smooth else soft
        soft = soft.masked_fill(unknown > 0, 0.0)
        return with_labels(batch, soft, *models)

    return mixed


def check_unmixed(settings: Settings) -> None:
    """Refuse what makes images that a teacher has not seen, where what it said of its images is kept.

    Raises:
        ConfigError: mixup or CutMix is asked for.
    """
    if settings.mixup or settings.cutmix:
        raise ConfigError(
            "The teacher's outputs were saved for the original images, but mixup and cutmix make new ones.",
            where="mixup" if settings.mixup else "cutmix",
            hint="Leave one of them out: mixup and cutmix, or the feature cache and saved outputs.",
        )


def _mix(names: Sequence[str], settings: Settings, x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    from torchvision.transforms import v2

    name = names[int(torch.randint(len(names), ()))] if len(names) > 1 else names[0]
    kind = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name]
    mixed: tuple[Tensor, Tensor] = kind(alpha=getattr(settings, name), num_classes=classes)(x, labels)
    return mixed


def _require_classes(labels: Tensor, outputs: int) -> None:
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= outputs))]
    if len(wrong):
        raise ConfigError(
            f"Label {int(wrong[0])} is no class: the model has {outputs} outputs.",
            where="labels",
            got=int(wrong[0]),
            expected=f"0 to {outputs - 1}, or {IGNORED} for what does not count",
            hint=f"Give the model as many classes as the data have, or replace a void label by {IGNORED}.",
        )


def _unfit(got: str, expected: str) -> ConfigError:
    return ConfigError(
        f"Mixup, CutMix and label smoothing read {expected}, but a batch has {got}.",
        where="mixup",
        got=got,
        expected=expected,
        hint="Leave mixup, cutmix and label_smoothing out.",
    )
