"""All losses by name; how one is built from what the user wrote."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from torch import Tensor, nn

from indistill_fx.errors import ConfigError, instead_of, nearest
from indistill_fx.losses.base import EMBEDDING as EMBEDDING
from indistill_fx.losses.base import Criterion
from indistill_fx.losses.base import MainLoss as MainLoss
from indistill_fx.losses.base import Outputs as Outputs
from indistill_fx.losses.contrastive import CRDLoss
from indistill_fx.losses.features import ATLoss, FitNetLoss, VIDLoss
from indistill_fx.losses.logits import CWDLoss, DISTLoss, DKDLoss, KDLoss, LabelsLoss, MLKDLoss
from indistill_fx.losses.relations import PKTKLLoss, PKTLoss, RKDLoss, SPLoss
from indistill_fx.losses.reuse import SimKDLoss
from indistill_fx.losses.review import ReviewKDLoss
from indistill_fx.losses.task import Classification, Task
from indistill_fx.losses.warmup import ATWarmup, CosineWarmup, MSEWarmup, PKTWarmup, WarmupLoss
from indistill_fx.system.arguments import require
from indistill_fx.system.user_code import load_object

WARMUP_LOSSES: dict[str, type[WarmupLoss]] = {
    "mse": MSEWarmup,
    "cosine": CosineWarmup,
    "at": ATWarmup,
    "pkt": PKTWarmup,
}

MAIN_LOSSES: dict[str, type[MainLoss]] = {
    "labels": LabelsLoss,
    "kd": KDLoss,
    "dkd": DKDLoss,
    "dist": DISTLoss,
    "mlkd": MLKDLoss,
    "cwd": CWDLoss,
    "pkt": PKTLoss,
    "pkt_kl": PKTKLLoss,
    "at": ATLoss,
    "sp": SPLoss,
    "rkd": RKDLoss,
    "crd": CRDLoss,
    "fitnet": FitNetLoss,
    "vid": VIDLoss,
    "reviewkd": ReviewKDLoss,
    "simkd": SimKDLoss,
}

Built = TypeVar("Built")

_EVERYTHING = frozenset({"logits", "embedding", "features"})


class UserLoss(Criterion):
    """A main loss of the user's own: a function or module. What it reads is said by its attributes of a `Criterion`'s names.

    Args:
        function: (student `Outputs`, teacher `Outputs`, labels) → scalar. Without attributes it is taken to read everything but
            indices, and is given the features of a pair in one size, of each model's own width.
        options: its keyword arguments.
        task: what the labels mean; the function gets them as the task reads them.
    """

    def __init__(self, function: Callable[..., Tensor], options: Mapping[str, Any], task: Task):
        super().__init__()
        self.function, self.options, self.task = function, dict(options), task
        self.needs = frozenset(getattr(function, "needs", _EVERYTHING))
        self.needs_indices = bool(getattr(function, "needs_indices", False))
        self.weight_labels = float(getattr(function, "weight_labels", 1.0))
        self.one_size = bool(getattr(function, "one_size", True))
        self.unit = float(getattr(function, "unit", 1.0))

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> Tensor:
        """The user's scalar."""
        return self.function(student, teacher, None if labels is None else self.task.read(labels), **self.options)


class UserWarmup(WarmupLoss):
    """A warm-up loss of the user's own.

    Args:
        function: (student feature, teacher feature) → scalar. It wants equal widths unless its attribute `needs_equal_widths`
            is False.
        options: its keyword arguments.
    """

    def __init__(self, function: Callable[..., Tensor], options: Mapping[str, Any]):
        super().__init__()
        self.function, self.options = function, dict(options)
        self.needs_equal_widths = bool(getattr(function, "needs_equal_widths", True))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """The user's scalar."""
        return self.function(student_feature, teacher_feature, **self.options)


def warmup_loss(loss: str | Callable[..., Tensor], **options: Any) -> WarmupLoss:
    """The warm-up loss of that name, of `file.py:name`, or the one given.

    Args:
        loss: a key of `WARMUP_LOSSES`, `file.py:name`, a module, or a function (student feature, teacher feature) ->
            scalar.
        options: the loss's own keyword arguments.

    Returns:
        A module (student feature, teacher feature) -> scalar.

    Raises:
        ConfigError: an unknown name or option; the message lists the legal ones.
    """
    if isinstance(loss, str) and loss in WARMUP_LOSSES:
        return _built(WARMUP_LOSSES[loss], loss, options)
    return UserWarmup(*_users(loss, WARMUP_LOSSES, "warm-up loss", options))


def main_loss(
    loss: str | Callable[..., Tensor],
    *,
    student_shapes: Mapping[str, tuple[int, ...]] | None = None,
    teacher_shapes: Mapping[str, tuple[int, ...]] | None = None,
    task: Task | None = None,
    over_time: Sequence[tuple[int, float]] | None = None,
    **options: Any,
) -> Criterion:
    """The main loss of that name, of `file.py:name`, or the one given.

    Args:
        loss: a key of `MAIN_LOSSES`, `file.py:name`, a module, or a function (student, teacher, labels) -> scalar.
        student_shapes: pair name -> shape with the batch axis, and `EMBEDDING` -> the penultimate vector's; read by
            losses with weights of their own (fitnet, vid, crd).
        teacher_shapes: likewise.
        task: what the labels mean; classification if None.
        over_time: (training step, factor of the loss's weight) in ascending order; between them it goes linearly. Not for losses of the
            user's own.
        options: the loss's own keyword arguments.

    Returns:
        A module (student `Outputs`, teacher `Outputs`, labels) -> scalar. Its own parameters, if any, train with the student.

    Raises:
        ConfigError: an unknown name or option (the message lists the legal ones), or a loss that does not fit the task.
    """
    if not isinstance(loss, str) or loss not in MAIN_LOSSES:
        if over_time:
            raise ConfigError(
                "Weights over time do not work with your own loss, which has no `weight`.",
                where="main_weights",
                expected=list(MAIN_LOSSES),
            )
        return UserLoss(*_users(loss, MAIN_LOSSES, "main loss", options), task or Classification())
    kind = MAIN_LOSSES[loss]
    if kind.needs_shapes:
        options = {"student_shapes": student_shapes or {}, "teacher_shapes": teacher_shapes or {}, **options}
    if task is not None:
        _require_fit(kind, loss, task, options)
        if not task.labelled:
            options = {"weight_labels": 0.0, **options}
        if loss == "kd" and task.temperature is not None:
            options = {"temperature": task.temperature, **options}
    built = _built(kind, loss, options)
    built.task = task or built.task
    if over_time:
        built.vary(over_time)
    return built


def asked_of_the_data(loss: str | Callable[..., Tensor]) -> frozenset[str]:
    """Which of `indices` (in every batch) and `samples` (their number) a main loss asks of the data, known before it is built.

    Raises:
        ConfigError: an unknown name.
    """
    kind = _kind(loss)
    return frozenset(need for need in ("indices", "samples") if getattr(kind, f"needs_{need}", False))


def _kind(loss: str | Callable[..., Tensor]) -> Any:
    """The class of a main loss of ours; the user's own as it is."""
    return (
        MAIN_LOSSES[loss] if isinstance(loss, str) and loss in MAIN_LOSSES else _object(loss, MAIN_LOSSES, "main loss")
    )


def at_the_end(options: Mapping[str, Any]) -> dict[str, Any]:
    """A main loss's options for training that goes on after it: weights that change over the steps stay at their last values."""
    kept = {name: value for name, value in options.items() if name != "ramp_steps"}
    return kept | {"over_time": ((0, kept["over_time"][-1][1]),)} if kept.get("over_time") else kept


def cut_short(options: Mapping[str, Any], steps: int | None) -> str:
    """What to say of a main loss whose weight still changes when its stage ends; empty where it does not.

    Args:
        options: of the main loss.
        steps: of the main stage; None: not known.
    """
    last = max([step for step, _ in options.get("over_time") or ()] + [options.get("ramp_steps") or 0])
    if not steps or last <= steps:
        return ""
    return f"the weight of the main loss changes until step {last:,}, but the main stage ends after {steps:,} steps"


def options_without_labels(loss: str | Callable[..., Tensor], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """A main loss's options where the data have no labels: a `MainLoss` then compares the student with the teacher alone.

    Raises:
        ConfigError: an unknown name, or a loss that is nothing without labels.
    """
    kind = _kind(loss)
    if not isinstance(kind, type) or not issubclass(kind, MainLoss) or options.get("weight_labels"):
        return options
    if kind.needs_labels:
        raise ConfigError(
            f"The loss `{loss if isinstance(loss, str) else kind.__name__}` learns from labels, but the data have none.",
            where="main",
            got=loss,
            hint="Take a loss that compares the student with the teacher, such as kd.",
        )
    takes_it = "weight_labels" in inspect.signature(kind).parameters
    return {**options, "weight_labels": 0.0} if takes_it else options


def _require_fit(kind: type[MainLoss], name: str, task: Task, options: Mapping[str, Any]) -> None:
    if kind.by_class and not task.by_class:
        raise ConfigError(
            f"Loss {name!r} compares classes that exclude each other; the outputs of task {task.name!r} do not.",
            where="main",
            got=name,
            expected=[key for key, other in MAIN_LOSSES.items() if not other.by_class],
            hint="Take kd, which compares outputs as the task does, or a loss on features (at, pkt, fitnet).",
        )
    if options.get("standardize") and not task.by_class:
        raise ConfigError(
            f"standardize takes mean and deviation over classes, but the outputs of task {task.name!r} are none.",
            where="standardize",
            got=True,
            expected=False,
            hint="Leave standardize out.",
        )
    if kind.needs_labels and not task.labelled:
        raise ConfigError(
            f"Loss {name!r} needs labels, but task {task.name!r} has none.",
            where="main",
            got=name,
            hint="Take a loss on features or penultimate vectors, such as pkt.",
        )


def _built(kind: Callable[..., Built], name: str, options: Mapping[str, Any]) -> Built:
    # the constructor of nn.Module, which a loss without options has, takes anything by its signature
    own = {} if inspect.getattr_static(kind, "__init__") is nn.Module.__init__ else inspect.signature(kind).parameters
    legal = {key: value for key, value in own.items() if value.kind not in (value.VAR_POSITIONAL, value.VAR_KEYWORD)}
    takes_any = any(value.kind is value.VAR_KEYWORD for value in own.values())
    unknown = [option for option in options if option not in legal and not takes_any]
    absent = [key for key, value in legal.items() if value.default is value.empty and key not in options]
    if unknown:
        raise ConfigError(
            f"Loss {name!r} has no option {unknown[0]!r}.", where=name, got=unknown[0], hint=nearest(unknown[0], legal)
        )
    if absent:
        raise ConfigError(f"Loss {name!r} needs the option {absent[0]!r}.", where=name, expected=absent[0])
    hint = "Give its options values of the types that its documentation says."
    if kind in (*MAIN_LOSSES.values(), *WARMUP_LOSSES.values()):
        types = get_type_hints(kind.__init__)
        for option, value in options.items():
            require(value, types[option], option, of=f"Loss {name!r}", hint=hint)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"Loss {name!r}: `{option}` is {value}.", where=option, expected="a finite number")
    shown = {option: value for option, value in options.items() if not option.endswith("_shapes")}
    cannot = ConfigError(f"Loss {name!r} cannot be made with {shown}", where=name, hint=hint)
    with instead_of((TypeError, ValueError, RuntimeError), cannot):
        return kind(**options)


def _users(
    loss: str | Callable[..., Tensor], known: Mapping[str, Any], role: str, options: Mapping[str, Any]
) -> tuple[Callable[..., Tensor], Mapping[str, Any]]:
    """A user's own loss, and the options that are left to pass to it."""
    found = _object(loss, known, role)
    if isinstance(found, type):
        found, options = _built(found, found.__name__, options), {}
    if not callable(found):
        raise ConfigError(
            f"A {role} must be a name or callable, not {type(found).__name__}.",
            where=role,
            got=found,
            hint="Give a name, `file.py:loss`, or a function.",
        )
    return found, options


def _object(loss: Any, known: Mapping[str, Any], role: str) -> Any:
    if not isinstance(loss, str):
        return loss
    if ":" not in loss:
        raise ConfigError(
            f"{loss!r} is not a {role}.",
            where=role,
            got=loss,
            expected=sorted(known),
            hint=f"{nearest(loss, known, all_if_none=False)} Choose from: {', '.join(known)}, or file.py:name for your own.".strip(),
        )
    return load_object(loss)
