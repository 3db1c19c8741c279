"""What a teacher said of every sample of a data set, in a folder: a teacher that looks up instead of computing.

The folder has one file, `outputs.safetensors`: the logits and any features, a row for every sample, and in its header the digest of the
data that they belong to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from indistill_fx.data.loaders import EpochLoader
from indistill_fx.data.same_samples import same_samples
from indistill_fx.errors import ConfigError
from indistill_fx.graph.names import writable_paths
from indistill_fx.graph.opaque import Opaque
from indistill_fx.loading.load import Source
from indistill_fx.runs.checkpoint import load_checkpoint, save_checkpoint
from indistill_fx.system.model_inputs import INDICES

FILE = "outputs.safetensors"
LOGITS = "logits"
_SPEC, _LONGEST = "saved:", 255
_MAKE = "`indistill-fx save-outputs TEACHER --data DATA -o DIR` makes them."


class SavedTensor(Opaque):
    """Rows of a table by the samples' numbers.

    Args:
        rows: (samples, …).
        channel_axis: of them.
    """

    rows: Tensor

    def __init__(self, rows: Tensor, channel_axis: int | None = None):
        super().__init__()
        self.channel_axis = channel_axis
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        """The rows (batch, …) of samples (batch,)."""
        return self.rows.index_select(0, indices.to(self.rows.device))


def write_outputs(
    folder: Path, tensors: Mapping[str, Tensor], *, axes: Mapping[str, int | None], data: str, teacher: str
) -> None:
    """Write a folder of outputs.

    Args:
        folder: is there.
        tensors: `logits` and features by name, each (samples, …).
        axes: which axis of each its channels are on.
        data: digest of the samples.
        teacher: whose they are, for people.

    Raises:
        TrainError: the place cannot be written.
    """
    samples = len(next(iter(tensors.values())))
    save_checkpoint(folder / FILE, tensors, {"data": data, "samples": samples, "teacher": teacher, "axes": dict(axes)})


def is_saved_outputs(spec: str) -> bool:
    """Whether a spec names saved outputs: `saved:DIR`."""
    return spec.startswith(_SPEC)


def load_outputs(spec: str) -> Source:
    """Saved outputs as a teacher: a graph from the samples' numbers to the logits, every feature a module of its name.

    Args:
        spec: `saved:DIR`.

    Raises:
        ConfigError: the folder has none, or they are damaged.
    """
    folder = Path(spec.removeprefix(_SPEC))
    if not os.path.isfile(folder / FILE):  # os.path accepts names that are too long
        raise ConfigError(f"`{folder}` has no saved outputs.", where=spec, expected=FILE, hint=_MAKE)
    tensors, header = load_checkpoint(folder / FILE)
    samples = header.get("samples")
    if LOGITS not in tensors or any(not value.dim() or len(value) != samples for value in tensors.values()):
        raise ConfigError(f"`{folder}` does not have logits for all of its samples.", where=spec, hint=_MAKE)
    wrong = [name for name, value in tensors.items() if len(name) > _LONGEST or not value.is_floating_point()]
    if wrong:
        message = (
            f"`{folder}` has outputs that no teacher gives: {wrong[0][:60]!r}, of the type {tensors[wrong[0]].dtype}."
        )
        raise ConfigError(
            message, where=spec, got=wrong[0][:60], expected="real numbers, by the names of layers", hint=_MAKE
        )
    about = {"data": str(header.get("data")), "samples": samples, "folder": str(folder)}
    module = _as_module(tensors, _axes(tensors, header.get("axes")), about)
    features = [name for name in tensors if name != LOGITS]
    note = f"outputs of {header.get('teacher')} for {samples} samples"
    return Source(
        module, spec, "saved outputs", notes=(f"{note}, features of {', '.join(features)}" if features else note,)
    )


def _axes(tensors: Mapping[str, Tensor], axes_in_file: object) -> dict[str, int]:
    """The valid channel axes in a file's header."""
    named = axes_in_file if isinstance(axes_in_file, dict) else {}
    found = {name: named.get(name) for name in tensors}
    return {name: axis for name, axis in found.items() if type(axis) is int and 0 < axis < tensors[name].dim()}


def _as_module(tensors: Mapping[str, Tensor], axes: Mapping[str, int], about: Mapping[str, Any]) -> fx.GraphModule:
    graph, root = fx.Graph(), nn.Module()
    indices = graph.placeholder(INDICES)
    paths, calls = writable_paths(tensors), {}
    for name in sorted(tensors, key=lambda name: name.count(".")):  # layers before the parts that belong into them
        *parents, last = paths[name].split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(last, SavedTensor(tensors[name], axes.get(name)))
        calls[name] = graph.call_module(paths[name], (indices,))
    graph.output(calls[LOGITS])
    made = fx.GraphModule(root, graph, class_name="SavedOutputs")
    made.meta["saved outputs"] = dict(about)
    return made.eval()


def check_outputs(module: nn.Module, loader: EpochLoader, *, cached: bool = False) -> EpochLoader:
    """The loader with sample indices, where a teacher that has saved outputs needs them; any other loader as it is.

    Args:
        module: the teacher.
        loader: of the training data.
        cached: whether a feature cache is asked for too, which such a teacher has no use for.

    Raises:
        ConfigError: the outputs are of other data, or of fewer samples; or samples differ from epoch to epoch.
    """
    saved = module.meta.get("saved outputs") if isinstance(module, fx.GraphModule) else None
    if saved is None:
        return loader
    if cached:
        raise ConfigError(
            "Saved outputs need no feature cache.", where="feature cache", hint="Leave --feature-cache out."
        )
    indexed = same_samples(loader, "A teacher that has saved outputs")
    wanted, folder = loader.samples, saved["folder"]
    if saved["samples"] != wanted:
        raise ConfigError(
            f"`{folder}` has outputs of {saved['samples']} samples, and the training data have {wanted}.",
            where="teacher",
            got=saved["samples"],
            expected=wanted,
            hint=f"Save them again for these data, or give the same --limit. {_MAKE}",
        )
    if saved["data"] != loader.fingerprint():
        raise ConfigError(
            f"`{folder}` was saved from other data: other samples, or another size, order or normalisation.",
            where="teacher",
            got=saved["data"][:16],
            expected="the digest of the training data",
            hint=f"Give the same data and options, or save the outputs again. {_MAKE}",
        )
    return indexed
