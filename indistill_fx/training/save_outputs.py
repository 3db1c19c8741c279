"""Let a teacher say once what it has to say of every sample of a data set, and keep it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.batch import split
from indistill_fx.data.foreign import repeatable
from indistill_fx.data.same_samples import same_samples
from indistill_fx.errors import ConfigError
from indistill_fx.graph.view import View
from indistill_fx.passes.capture.trace import as_traced
from indistill_fx.passes.extract.instrument import instrument
from indistill_fx.runs.saved_outputs import LOGITS, write_outputs
from indistill_fx.stages.traced_pair import examples_of
from indistill_fx.system.files import make_folder, try_folder
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.terminal import followed
from indistill_fx.traced import TracedModel


def save_outputs(
    teacher: nn.Module | TracedModel,
    loader: Iterable[Any],
    directory: str | os.PathLike[str],
    *,
    taps: Sequence[str] = (),
    logits: str | int | None = None,
    view: View | None = None,
    about: str = "",
    progress: bool = False,
) -> Path:
    """Run a teacher once over a data set, and write its logits and features to a folder; `saved:DIR` then names it as a teacher.

    Args:
        teacher: traced, or a plain module.
        loader: a training loader of `open_data`, without augmentation.
        directory: the folder; a file of outputs in it is replaced.
        taps: names of the features to keep, as `inspect` shows them.
        logits: key or index of the logits, for a teacher that returns several outputs.
        view: how the teacher sees a batch that was made for the student.
        about: the teacher's name, for the file.
        progress: show a bar, on a terminal.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder cannot be made, samples may differ from epoch to epoch, a name is not a tap, or the logits are not one
            tensor with a row per sample.
        TrainError: nothing can be written there.

    Examples:
        >>> import tempfile
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> data = ifx.open_data("digits", limit=64, batch_size=32, augment=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = ifx.save_outputs(DigitsTeacher(), data.train, folder, taps=["layer3"])
        ...     teacher = ifx.load(f"saved:{folder}")
    """
    folder = Path(directory).absolute()  # the data may change the working directory
    try_folder(folder)
    batches = repeatable(loader, 0, "loader")
    data = same_samples(batches, "Saving outputs").indexed(in_order=True)
    example = None if isinstance(teacher, TracedModel) else examples_of(data, teacher)[0]
    traced = as_traced(teacher, example, role="teacher", logits=logits, view=view)
    named = {LOGITS: traced.logits, **{tap: traced.node(tap).name for tap in taps}}
    wanted = {name: traced.tap_name(node) for name, node in named.items()}
    graph = instrument(traced, tuple(dict.fromkeys(wanted.values()))).eval()
    found: dict[str, Tensor] = {}
    for batch in followed(data, "teacher's outputs", shown=progress):
        given, _ = traced.inputs_in(batch, where="Saving outputs")
        indices = split(batch, Inputs.of(traced.graph_module), where="Saving outputs").indices
        assert indices is not None, "`same_samples` gives indices"
        with torch.no_grad():
            features, _ = graph(*given)
        for name, tap in wanted.items():
            _keep(found, name, features[tap].detach().cpu(), indices.cpu(), batches.samples)
    axes = {name: traced.facts_of(tap).channel_axis for name, tap in wanted.items()}
    make_folder(folder)
    write_outputs(folder, found, axes=axes, data=batches.fingerprint(), teacher=about or type(traced.module).__name__)
    return Path(directory)


def _keep(found: dict[str, Tensor], name: str, rows: Tensor, indices: Tensor, samples: int) -> None:
    if not rows.dim() or len(rows) != len(indices):
        shape = tuple(rows.shape)
        raise ConfigError(
            f"`{name}` of the teacher has the shape {shape} for {len(indices)} samples, so it does not have one row for each.",
            where=name,
            got=shape,
            hint="Name a tap whose first axis is the batch.",
        )
    if name not in found:
        found[name] = rows.new_empty((samples, *rows.shape[1:]))
    found[name][indices] = rows
