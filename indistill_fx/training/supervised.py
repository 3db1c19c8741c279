"""`train`: a module on labels alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Unpack

from accelerate import Accelerator
from torch import Tensor, nn

from indistill_fx.batch import split
from indistill_fx.data.foreign import repeatable
from indistill_fx.errors import ConfigError
from indistill_fx.evaluation.outputs import select_logits
from indistill_fx.graph.module_state import uncompiled
from indistill_fx.losses.base import widened
from indistill_fx.losses.task import Classification, Task
from indistill_fx.passes.structure.costs import layer_costs
from indistill_fx.runs.directory import RunDirectory
from indistill_fx.runs.record import RunRecord
from indistill_fx.system.files import whole
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.traced import TracedModel
from indistill_fx.training.identity import code_digest
from indistill_fx.training.options.mixing import make_mixing
from indistill_fx.training.options.settings import Options, Settings
from indistill_fx.training.state import Phase
from indistill_fx.training.task import task_of_run
from indistill_fx.training.trainer import Setup, Trainer
from indistill_fx.training.trial import require_loss, users_own


def train(
    module: nn.Module,
    train_loader: Iterable[Any],
    *,
    task: str | Task | None = None,
    epochs: int = 20,
    val_loader: Iterable[Any] | None = None,
    logits: str | int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    allow_changed: Sequence[str] = (),
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> RunRecord:
    """Train a module on labels, with the task's supervised loss: a teacher, or a baseline.

    Args:
        module: inputs → logits. Trained in place; it need not be traceable.
        train_loader: batches (inputs, labels, …), or dicts of inputs by name with `labels`; the first dimension is the batch.
        task: what the labels mean, as for `distill`.
        epochs: how many.
        val_loader: batches to validate on after every epoch.
        logits: key or index of the logits, for models that return several outputs; None: the one called `logits` or `out`.
        run_dir: folder for checkpoints, metrics and result; None: nothing is written.
        resume: continue the run in `run_dir`; begin if there is none.
        allow_changed: what may differ from when the run began, as for `distill`.
        progress: show progress on standard error.
        about: further facts to keep in run.json.
        options: the options of training, listed under `Settings`.

    Returns:
        The record; its one stage is called `main`.

    Raises:
        ConfigError: options, data or directory are at fault.
        TrainError: a loss is not finite, or the disk is full; the last checkpoint is intact.
        Interrupted: SIGINT or SIGTERM while `run_dir` is given; a checkpoint was saved. It is a KeyboardInterrupt.

    Examples:
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> data = ifx.open_data("digits", limit=64, batch_size=32)
        >>> record = ifx.train(DigitsTeacher(), data.train, epochs=2, val_loader=data.test, progress=False)
        >>> record.steps, sorted(record.metrics)
        (4, ['accuracy'])
    """
    settings, run_dir = Settings.of(options), whole(run_dir)
    check_epochs(epochs)
    loader = repeatable(train_loader, settings.seed, "train loader")
    found = task_of_run(task, loader, module, Inputs.of(module), logits=logits)
    if not found.task.labelled:
        raise ConfigError(
            f"`train` needs labels, but the task `{found.task.name}` has none.",
            where="task",
            got=found.task.name,
            hint="Distil the model instead, by a loss on features.",
        )
    supervised, budget = Supervised(module, logits, found.task), settings.main_budget(epochs)
    phase = Phase("main", supervised, budget, main=True, early_stopping=settings.early_stopping)
    mix = make_mixing(settings, found.task.name, found.outputs, Inputs.of(module))

    def set_up(directory: RunDirectory | None, accelerator: Accelerator) -> Setup:
        name, told = f"The loss of task `{found.task.name}`", ""
        if users_own("labels", found.task):
            told = require_loss(supervised, next(iter(loader)), name)
        models = {"student": model_facts(module)}
        identity = {"code of the student": code_digest(uncompiled(module))}
        remarks = [told] if told else []
        return Setup(phases=[phase], task=found, mix=mix, models=models, identity=identity, remarks=remarks)

    return Trainer(
        student=uncompiled(module),
        teacher=None,
        loader=loader,
        val_loader=val_loader,
        settings=settings,
        run_dir=run_dir,
        resume=resume,
        allow_changed=allow_changed,
        progress=progress,
        logits=logits,
        about=about,
    ).run(set_up)


def model_facts(model: nn.Module | TracedModel) -> dict[str, Any]:
    """What run.json says about a model; of a traced one also what it costs, layer by layer."""
    module = model.module if isinstance(model, TracedModel) else uncompiled(model)
    facts = {"name": type(module).__name__, "parameters": sum(parameter.numel() for parameter in module.parameters())}
    if not isinstance(model, TracedModel):
        return facts
    return facts | {"macs": model.macs, "layers": [asdict(cost) for cost in layer_costs(model)]}


class Supervised(nn.Module):
    """The task's supervised loss as one module: batch → loss.

    Args:
        module: inputs → logits.
        logits: which entry of a dict (key) or tuple (place) the logits are.
        task: what the labels mean.
    """

    def __init__(self, module: nn.Module, logits: str | int | None = None, task: Task | None = None):
        super().__init__()
        self.module, self.logits, self.task = module, logits, task or Classification()
        self._inputs = Inputs.of(module)

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch (inputs, labels, …), or of a dict of inputs by name with `labels`."""
        parts = split(batch, self._inputs, where=type(self.module).__name__)
        if parts.labels is None:
            raise ConfigError(
                f"A batch is a {type(batch).__name__} without labels.",
                where="train loader",
                got=type(batch).__name__,
                hint="Let the loader yield (inputs, labels), or a dict of inputs by name with `labels`.",
            )
        logits, labels = self.task.prepare(
            widened(select_logits(parts.calls[0](self.module), self.logits)), parts.labels
        )
        assert labels is not None
        return self.task.loss(logits, labels)


def check_epochs(epochs: int) -> None:
    """Refuse what is not a number of epochs.

    Raises:
        ConfigError: it is negative, or no whole number.
    """
    if not isinstance(epochs, int) or epochs < 0:
        raise ConfigError(f"epochs is {epochs}.", where="epochs", got=epochs, expected="a whole number, 0 or more")
