"""How a run is trained: each option's type, default, range and meaning stand here, once; the command line reads them from here.

Only `Options` says names and types a second time, because a type checker cannot derive keyword arguments from a dataclass; a test
holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypedDict, get_type_hints

from indistill_fx.curriculum import Budget, Unit
from indistill_fx.errors import ConfigError, nearest
from indistill_fx.training.options.option import About, check_value, described

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "step", "cosine"]
Precision = Literal["no", "bf16", "fp16"]
Tf32 = Literal["off", "convolutions", "all"]
CompileMode = Literal["default", "max-autotune"]
Graphs = Literal["auto", True, False]


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
    graphs: Graphs
    sync_batch_norm: bool
    shard: bool
    seed: int
    checkpoint_every_steps: int | None
    log_every_steps: int
    tensorboard: bool
    tracker: TrackerName | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a run is trained.

    Raises:
        ConfigError: a value that is not legal, or two that contradict each other.
    """

    learning_rate: float = field(
        default=1e-3, metadata=described("Learning rate of the main stage.", flag="lr", above=0)
    )
    main_steps: int | None = field(
        default=None,
        metadata=described(
            "Optimiser steps of the main stage, instead of epochs: for endless loaders.",
            metavar="STEPS",
            least=1,
        ),
    )
    optimizer: OptimizerName = field(
        default="adam", metadata=described("Optimiser of the main stage; the warm-up has its own.")
    )
    momentum: float = field(default=0.9, metadata=described("Momentum of sgd.", least=0))
    nesterov: bool = field(default=False, metadata=described("Use Nesterov momentum with sgd."))
    weight_decay: float = field(default=0.0, metadata=described("Weight decay of the main stage.", least=0))
    decay_norms: bool = field(default=True, metadata=described("Apply weight decay to norms and biases too."))
    schedule: ScheduleName = field(
        default="constant",
        metadata=described(
            "Learning-rate schedule of the main stage, by epoch. step: multiplied by gamma at each milestone; cosine: multiplied by"
            " (1 + cos(pi * epoch / epochs)) / 2."
        ),
    )
    milestones: Sequence[int] = field(
        default=(),
        metadata=described(
            "Epochs of the main stage after which `step` multiplies the learning rate by gamma.", metavar="15,18"
        ),
    )
    gamma: float = field(default=0.1, metadata=described("Factor of the schedule `step`.", above=0))
    rise_steps: int = field(
        default=0,
        metadata=described(
            "Learning-rate warm-up: the rate rises linearly to the schedule's over this many optimiser steps of the main stage.",
            flag="lr-warmup",
            metavar="STEPS",
            least=0,
        ),
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=described(
            "In the main stage, the share of each label that is spread evenly over all classes.", least=0, below=1
        ),
    )
    mixup: float = field(
        default=0.0,
        metadata=described(
            "In the main stage, mix pairs of images and their labels with shares from Beta(a, a); this sets a.", least=0
        ),
    )
    cutmix: float = field(
        default=0.0,
        metadata=described(
            "In the main stage, paste a box of one image into another, with its area from Beta(a, a); this sets a. With"
            " mixup too, each batch gets one of the two.",
            least=0,
        ),
    )
    average: float = field(
        default=0.0,
        metadata=described(
            "Keep a moving average of the student's weights in the main stage, with this decay (such as 0.999). It is evaluated and saved"
            " with the student.",
            flag="moving-average",
            metavar="DECAY",
            least=0,
            below=1,
        ),
    )
    early_stopping: int | None = field(
        default=None,
        metadata=described(
            "End the main stage when the task's first metric, such as accuracy, has not improved for this many epochs.",
            metavar="EPOCHS",
            least=1,
        ),
    )
    clip_norm: float | None = field(default=None, metadata=described("Scale gradients down to this L2 norm.", above=0))
    accumulate: int = field(
        default=1, metadata=described("Batches per optimiser step; the gradient is their mean.", least=1)
    )
    mixed_precision: Precision | None = field(
        default=None,
        metadata=described(
            "Compute in this precision where it is safe. bf16 is fast on GPUs and on processors that have instructions for it "
            "(avx512_bf16 or amx_bf16 in /proc/cpuinfo). [default: what `accelerate launch` says, else no]",
            alias="precision",
        ),
    )
    compile: bool = field(
        default=False,
        metadata=described(
            "Compile every stage with torch.compile. A stage for which that fails runs uncompiled, and a note says why."
        ),
    )
    compile_mode: CompileMode = field(
        default="default",
        metadata=described(
            "Mode of --compile. max-autotune tries several kernels for every operation, which takes minutes."
        ),
    )
    device: str = field(
        default="auto",
        metadata=described("cpu, cuda, cuda:1 or mps; auto: an accelerator if there is one.", metavar="DEVICE"),
    )
    tf32: Tf32 = field(
        default="convolutions",
        metadata=described(
            "Which float32 operations NVIDIA GPUs compute in TF32, with a 10-bit mantissa: faster, but less exact. `all` adds matrix"
            " products."
        ),
    )
    graphs: Graphs = field(
        default="auto",
        metadata=described(
            "Record training steps as CUDA graphs and replay them, where possible; run.json says where not, and why. The first replay is"
            " checked against an ordinary step.",
            changes_result=False,
        ),
    )
    sync_batch_norm: bool = field(
        default=True,
        metadata=described(
            "With several processes: compute batch-norm statistics over the whole batch. Without it, training is as fast as with DDP"
            " alone, but the saved statistics are those of the first process."
        ),
    )
    shard: bool = field(
        default=False,
        metadata=described(
            "With several processes: shard teacher, student and optimiser across them (FSDP2), to save memory."
            " `accelerate launch --use_fsdp` does the same."
        ),
    )
    seed: int = field(
        default=0,
        metadata=described(
            "Seed of new weights and of everything that training draws at random. In Python, a loader from `open_data` has its own seed.",
            least=0,
        ),
    )
    checkpoint_every_steps: int | None = field(
        default=None,
        metadata=described(
            "Also write a checkpoint every this many optimiser steps. [default: after epochs only, and so rarely that saving takes at"
            " most a twentieth of the time]",
            flag="checkpoint-every",
            metavar="STEPS",
            least=1,
            changes_result=False,
        ),
    )
    log_every_steps: int = field(
        default=50,
        metadata=described(
            "Optimiser steps between lines in metrics.jsonl. With several processes the loss is that of the first one.",
            flag="log-every",
            metavar="STEPS",
            least=1,
            changes_result=False,
        ),
    )
    tensorboard: bool = field(
        default=False, metadata=described("The same as --tracker tensorboard.", changes_result=False)
    )
    tracker: TrackerName | None = field(
        default=None, metadata=described("Also send metrics to this logger, through Accelerate.", changes_result=False)
    )

    def __post_init__(self) -> None:
        for name, hint in hints().items():
            check_value(name, getattr(self, name), hint, about(name))
        if self.main_steps is not None and self.schedule != "constant":
            raise ConfigError(
                f"schedule={self.schedule!r} counts epochs, but the main stage is given {self.main_steps} steps.",
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

    def unused(
        self, budgets: Sequence[Budget], processes: int, device: str = "cpu", main_steps: int | None = None
    ) -> list[str]:
        """Sentences on requested settings that have no effect, or not all of it, with these stages, number of processes, and device.

        Args:
            budgets: of the stages.
            processes: how many train.
            device: its type.
            main_steps: optimiser steps of the main stage, where that is known.
        """
        defaults, optimizers = Settings(), {budget.optimizer or self.optimizer for budget in budgets}
        found = []
        if self.shard and processes == 1:
            found.append("shard has no effect: there is one process")
        if self.momentum != defaults.momentum and "sgd" not in optimizers:
            found.append(
                f"momentum has no effect: it is an option of sgd, but the stages use {', '.join(sorted(optimizers))}"
            )
        if self.gamma != defaults.gamma and self.schedule != "step":
            found.append(f"gamma has no effect: the schedule is {self.schedule}, and only step reads it")
        if self.tf32 != defaults.tf32 and device != "cuda":
            found.append(f"tf32 has no effect: it applies to NVIDIA GPUs, but the device is {device}")
        if self.graphs is True and device != "cuda":
            found.append(f"graphs has no effect: it applies to NVIDIA GPUs, but the device is {device}")
        if self.compile_mode != defaults.compile_mode and not self.compile:
            found.append("compile_mode has no effect: nothing is compiled (compile, --compile)")
        if main_steps and self.rise_steps > main_steps:
            share = f"{100 * main_steps / self.rise_steps:.2g}% of its value"
            found.append(
                f"the learning rate rises over {self.rise_steps:,} steps, but the main stage has {main_steps:,}, where it ends at {share}"
            )
        return found

    def main_budget(self, epochs: int) -> Budget:
        """The main stage's budget: the requested steps, or `epochs` epochs, and how it is trained."""
        unit: Unit = "epochs" if self.main_steps is None else "steps"
        return Budget(self.main_steps or epochs, unit, self.learning_rate, self.optimizer)

    @classmethod
    def of(cls, options: Options) -> Settings:
        """Make settings from keyword arguments.

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
        """The main stage's learning rate in an epoch (from 0 to `epochs`), for its step number `step` (from 0)."""
        rise = min(1.0, (step + 1) / self.rise_steps) if self.rise_steps else 1.0
        return self.learning_rate * SCHEDULES[self.schedule](self, epoch, max(epochs, 1)) * rise

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """The requested loggers."""
        asked: list[TrackerName] = ["tensorboard"] if self.tensorboard else []
        return tuple(dict.fromkeys(asked + ([self.tracker] if self.tracker else [])))

    def describe(self) -> str:
        """The main stage's schedule in words, to be appended to its budget."""
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
    # Imported here: the command line reads the options from this module before it needs torch.
    import torch

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
