"""How a run is trained: each option's type, default, range and meaning stand here, once; the command line reads them from here.

Only `Options` says names and types a second time, because a type checker cannot derive keyword arguments from a dataclass; a test
holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, get_args, get_type_hints

from indistill_fx.curriculum import Budget, Unit
from indistill_fx.errors import ConfigError, nearest

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "step", "cosine"]
Precision = Literal["no", "bf16", "fp16"]
Tf32 = Literal["off", "convolutions", "all"]
CompileMode = Literal["default", "max-autotune"]


class Options(TypedDict, total=False):
    """The keyword arguments that become `Settings`; see there."""

    learning_rate: float
    main_steps: int | None
    optimizer: OptimizerName
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norms: bool
    schedule: ScheduleName
    milestones: Sequence[int]
    gamma: float
    rise_steps: int
    label_smoothing: float
    mixup: float
    cutmix: float
    average: float
    early_stopping: int | None
    clip_norm: float | None
    accumulate: int
    mixed_precision: Precision | None
    compile: bool
    compile_mode: CompileMode
    device: str
    tf32: Tf32
    sync_batch_norm: bool
    shard: bool
    seed: int
    checkpoint_every_steps: int | None
    log_every_steps: int
    tensorboard: bool
    tracker: TrackerName | None


@dataclass(frozen=True, slots=True)
class About:
    """What is to be known of an option beside its name, type and default.

    Attributes:
        help: what it means, in a line or two.
        flag: its name on the command line, if that is not its own with hyphens.
        metavar: what stands for its value there.
        above: what a number must be greater than.
        least: the smallest number it may be.
        below: what a number must be less than.
        changes_result: whether a run under another value is another run.
    """

    help: str
    flag: str = ""
    metavar: str | None = None
    above: float | None = None
    least: float | None = None
    below: float | None = None
    changes_result: bool = True


def _about(help: str, **more: Any) -> dict[str, About]:
    return {"about": About(help, **more)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a run is trained.

    Raises:
        ConfigError: a value that is not legal, or two that contradict each other.
    """

    learning_rate: float = field(default=1e-3, metadata=_about("Learning rate of the main stage.", flag="lr", above=0))
    main_steps: int | None = field(
        default=None,
        metadata=_about(
            "Optimiser steps of the main stage, instead of its epochs: for loaders that never end.",
            metavar="STEPS",
            least=1,
        ),
    )
    optimizer: OptimizerName = field(
        default="adam", metadata=_about("Of the main stage; the warm-up's is the curriculum's.")
    )
    momentum: float = field(default=0.9, metadata=_about("Of sgd.", least=0))
    nesterov: bool = field(default=False, metadata=_about("Nesterov's momentum, for sgd."))
    weight_decay: float = field(default=0.0, metadata=_about("Of the main stage.", least=0))
    decay_norms: bool = field(default=True, metadata=_about("Weight decay on norms and biases too."))
    schedule: ScheduleName = field(
        default="constant",
        metadata=_about(
            "Of the main stage's learning rate, epoch by epoch. step: times gamma at every one of the milestones; cosine: times"
            " (1 + cos(pi * epoch / epochs)) / 2."
        ),
    )
    milestones: Sequence[int] = field(
        default=(), metadata=_about("Main epochs after which `step` multiplies the rate by gamma.", metavar="15,18")
    )
    gamma: float = field(default=0.1, metadata=_about("Factor of `step`.", above=0))
    rise_steps: int = field(
        default=0,
        metadata=_about(
            "Learning-rate warm-up: over so many optimiser steps of the main stage the rate rises linearly to the schedule's.",
            flag="lr-warmup",
            metavar="STEPS",
            least=0,
        ),
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=_about("Share of a label spread evenly over all classes, in the main stage.", least=0, below=1),
    )
    mixup: float = field(
        default=0.0,
        metadata=_about("Mix pictures and labels pairwise, in the main stage, by shares from Beta(a, a).", least=0),
    )
    cutmix: float = field(
        default=0.0,
        metadata=_about(
            "Paste a box of one picture into another, likewise; with mixup, a batch gets one of both.", least=0
        ),
    )
    average: float = field(
        default=0.0,
        metadata=_about(
            "Keep a moving average of the student's weights in the main stage, with this decay (0.999); it is measured and saved beside"
            " the student.",
            flag="moving-average",
            metavar="DECAY",
            least=0,
            below=1,
        ),
    )
    early_stopping: int | None = field(
        default=None,
        metadata=_about(
            "End the main stage when so many epochs have not bettered the deciding metric.", metavar="EPOCHS", least=1
        ),
    )
    clip_norm: float | None = field(default=None, metadata=_about("Scale gradients down to this L2 norm.", above=0))
    accumulate: int = field(
        default=1, metadata=_about("Batches per optimiser step; the gradient is their mean.", least=1)
    )
    mixed_precision: Precision | None = field(
        default=None, metadata=_about("[default: what `accelerate launch` says, else no]")
    )
    compile: bool = field(
        default=False,
        metadata=_about("torch.compile every stage. Where that fails the stage runs as it is, and is noted."),
    )
    compile_mode: CompileMode = field(
        default="default",
        metadata=_about("Of --compile. max-autotune: tries several kernels for every operation, which takes minutes."),
    )
    device: str = field(
        default="auto",
        metadata=_about("cpu, cuda, cuda:1 or mps; auto: an accelerator if there is one.", metavar="DEVICE"),
    )
    tf32: Tf32 = field(
        default="convolutions",
        metadata=_about(
            "What NVIDIA GPUs compute float32 numbers of in TF32, with 10 bits of fraction: faster, and less exact. all: matrix products"
            " too."
        ),
    )
    sync_batch_norm: bool = field(
        default=True,
        metadata=_about(
            "With several processes: batch-norm statistics over the whole batch. Without: as fast as DDP alone, and the"
            " statistics kept are the first process's."
        ),
    )
    shard: bool = field(
        default=False,
        metadata=_about(
            "With several processes: spread teacher, student and optimiser over them (FSDP2), to save memory. So does"
            " `accelerate launch --use_fsdp`."
        ),
    )
    seed: int = field(
        default=0,
        metadata=_about(
            "Of fresh weights, batches and noise. In Python, a loader of `open_data` has a seed of its own.", least=0
        ),
    )
    checkpoint_every_steps: int | None = field(
        default=None,
        metadata=_about(
            "Checkpoints within epochs too, after so many optimiser steps. [default: after an epoch, unless that took more than a"
            " twentieth of the time]",
            flag="checkpoint-every",
            metavar="STEPS",
            least=1,
            changes_result=False,
        ),
    )
    log_every_steps: int = field(
        default=50,
        metadata=_about(
            "Optimiser steps between lines in metrics.jsonl; of several processes these tell the first one's loss.",
            flag="log-every",
            metavar="STEPS",
            least=1,
            changes_result=False,
        ),
    )
    tensorboard: bool = field(default=False, metadata=_about("As --tracker tensorboard.", changes_result=False))
    tracker: TrackerName | None = field(
        default=None, metadata=_about("Send metrics to this logger too, by Accelerate.", changes_result=False)
    )

    def __post_init__(self) -> None:
        for name, hint in hints().items():
            _check(name, getattr(self, name), hint, about(name))
        if self.main_steps is not None and self.schedule != "constant":
            raise ConfigError(
                f"schedule={self.schedule!r} goes by epochs, and the main stage is to have {self.main_steps} steps.",
                where="schedule",
                got=self.schedule,
                expected="constant",
                hint="Give the main stage epochs, or leave the schedule out.",
            )
        if (self.schedule == "step") != bool(self.milestones):
            raise ConfigError(
                f"schedule={self.schedule!r} with milestones={list(self.milestones)}.",
                where="schedule",
                hint="`step` lowers the learning rate at the epochs in milestones, and no other schedule reads them.",
            )

        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ConfigError(
                f"nesterov=True with optimizer={self.optimizer!r} and momentum={self.momentum}.",
                where="nesterov",
                hint="It is a kind of momentum, and sgd's alone (optimizer='sgd').",
            )
        if self.device != "auto":
            check_device(self.device, self.mixed_precision)

    def unused(self, budgets: Sequence[Budget], processes: int, device: str = "cpu") -> list[str]:
        """What was asked for and has no effect in a run of these stages, so many processes and that kind of device, in sentences."""
        defaults, optimizers = Settings(), {budget.optimizer or self.optimizer for budget in budgets}
        found = []
        if self.shard and processes == 1:
            found.append("shard has no effect: there is one process")
        if self.momentum != defaults.momentum and "sgd" not in optimizers:
            found.append(f"momentum has no effect: it is sgd's, and the stages have {', '.join(sorted(optimizers))}")
        if self.gamma != defaults.gamma and self.schedule != "step":
            found.append(f"gamma has no effect: the schedule is {self.schedule}, and only step reads it")
        if self.tf32 != defaults.tf32 and device != "cuda":
            found.append(f"tf32 has no effect: it is of NVIDIA GPUs, and the device is {device}")
        if self.compile_mode != defaults.compile_mode and not self.compile:
            found.append("compile_mode has no effect: nothing is compiled (compile, --compile)")
        return found

    def main_budget(self, epochs: int) -> Budget:
        """The main stage's length, as asked for in steps, else so many epochs; and how it is trained."""
        unit: Unit = "epochs" if self.main_steps is None else "steps"
        return Budget(self.main_steps or epochs, unit, self.learning_rate, self.optimizer)

    @classmethod
    def of(cls, options: Options) -> Settings:
        """The settings that keyword arguments name.

        Raises:
            ConfigError: an unknown or an illegal one.
        """
        legal = list(hints())
        for name in options:
            if name not in legal:
                raise ConfigError(
                    f"There is no option {name!r}.", where=name, expected=legal, hint=nearest(name, legal)
                )
        return cls(**options)

    def rate(self, epoch: int, epochs: int, step: int) -> float:
        """The main stage's learning rate in an epoch (from 0) of so many, for the step after so many."""
        rise = min(1.0, (step + 1) / self.rise_steps) if self.rise_steps else 1.0
        return self.learning_rate * SCHEDULES[self.schedule](self, epoch, max(epochs, 1)) * rise

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """The loggers asked for."""
        asked: list[TrackerName] = ["tensorboard"] if self.tensorboard else []
        return tuple(dict.fromkeys(asked + ([self.tracker] if self.tracker else [])))

    def describe(self) -> str:
        """The main stage's schedule, as an addition to its budget."""
        more = f", rising over {self.rise_steps} steps" if self.rise_steps else ""
        more += f", ends after {self.early_stopping} without a better metric" if self.early_stopping else ""
        if self.schedule == "step":
            return f", times {self.gamma:g} from epoch {', '.join(str(at + 1) for at in self.milestones)}{more}"
        return more if self.schedule == "constant" else f", {self.schedule}{more}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return asdict(self) | {"milestones": list(self.milestones)}


def check_device(device: str, precision: Precision | None) -> None:
    """Refuse a device that is not there, or cannot compute in that precision.

    Raises:
        ConfigError: names what there is.
    """
    import torch  # not with the module: the command line reads the options from it before it does anything

    from indistill_fx.target import Target

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    Target(device, dtypes.get(precision or "no", torch.float32))


@cache
def hints() -> dict[str, Any]:
    """Every option's type, in order."""
    found = get_type_hints(Settings)
    return {entry.name: found[entry.name] for entry in fields(Settings)}


def about(name: str) -> About:
    """What is to be known of an option."""
    found: About = next(entry.metadata["about"] for entry in fields(Settings) if entry.name == name)
    return found


SCHEDULES: dict[str, Callable[[Settings, int, int], float]] = {
    "constant": lambda settings, epoch, epochs: 1.0,
    "step": lambda settings, epoch, epochs: settings.gamma ** sum(epoch >= at for at in settings.milestones),
    "cosine": lambda settings, epoch, epochs: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
}


def require_choice(name: str, value: object, legal: Sequence[object]) -> None:
    """Refuse a value that is none of the legal ones.

    Raises:
        ConfigError: lists them.
    """
    if value not in legal:
        names = [str(choice) for choice in legal]
        raise ConfigError(
            f"{name} is {value!r}.", where=name, got=value, expected=names, hint=nearest(str(value), names)
        )


def _check(name: str, value: object, hint: Any, option: About) -> None:
    """Refuse a value that its type or its range does not allow."""
    parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in parts:
        return
    kind = parts[0]
    if choices := get_args(kind):
        if isinstance(choices[0], str):
            require_choice(name, value, choices)
            return
        fine = isinstance(value, Sequence) and all(isinstance(entry, Integral) and int(entry) >= 0 for entry in value)
        expected = "a list of integers, each 0 or more"
    elif kind is str:
        fine, expected = isinstance(value, str) and bool(value), "a name"
    elif kind is bool:
        fine, expected = isinstance(value, bool), "True or False"
    else:
        whole = kind is int
        number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        low = -math.inf if option.least is None else option.least
        size = float(value) if number else math.nan  # type: ignore[arg-type]
        fine = low <= size < (2**63 if option.below is None else option.below) and (
            option.above is None or size > option.above
        )
        bound = f" above {option.above:g}" if option.above is not None else f", {low:g} or more"
        bound += f", less than {option.below:g}" if option.below is not None else ""
        expected = f"{'an integer' if whole else 'a number'}{bound}"
    if not fine:
        expected += ", or None" if len(parts) > 1 else ""
        raise ConfigError(f"{name} is {value!r}; it must be {expected}.", where=name, got=value, expected=expected)
