"""The teacher's features on disk: computed once, read in every epoch from memory-mapped files.

A stage's features are kept under a key of everything they follow from: the stage's own teacher graph with its weights (so the model,
the tap, the kept channels and the folding), the data with its transform, and the precision. Nothing is ever stale: what differs has
another key. One forward pass of the teacher over the data serves all stages that are missing.

Refused where a sample may look different from epoch to epoch, but for fixed views, whose features are kept one view after the other.
The space it needs is reported, and compared with the free space, before it starts.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from filelock import FileLock
from pydantic import BaseModel, Field
from torch import Tensor, fx

from indistill_fx.batch import split, with_features
from indistill_fx.data.loaders import EpochLoader
from indistill_fx.data.same_samples import same_samples
from indistill_fx.errors import ConfigError, instead_of
from indistill_fx.graph.module_state import digest, settings_of
from indistill_fx.stages.stage import Stage
from indistill_fx.system.files import file_digest, make_folder, read_json, save_json
from indistill_fx.system.model_inputs import INDICES, Inputs
from indistill_fx.system.nested import to_device
from indistill_fx.system.tensor_files import text_digest
from indistill_fx.system.terminal import followed, one_line, tell

_FORMAT = "features 2"
_INDEX = "features.json"
_LARGEST_INDEX = 1 << 20
Joint = Callable[[Sequence[Stage]], list[tuple[list[Stage], fx.GraphModule]]]


class FeatureStore:
    """One stage's features of every sample of a data set, by tap name, memory-mapped.

    Args:
        folder: one that `cache_features` has filled.
        inputs: names of the model's inputs, for the batches it makes.
        samples: how many there are; of fixed views there are so many rows for each.
    """

    def __init__(self, folder: Path, takes: Inputs, samples: int):
        self.folder, self._takes, self._samples = folder, takes, samples
        self.features = {
            tap: _mapped(folder / entry.file, entry.shape, getattr(torch, entry.dtype), shared=False)
            for tap, entry in _read_index(folder).items()
        }

    def attach(self, batch: Any) -> dict[str, Any]:
        """The batch as a dict, with the teacher's features of its samples.

        Args:
            batch: inputs, labels and indices, in order or by name.
        """

        def look_up(indices: Tensor) -> dict[str, Tensor]:
            return {tap: values.index_select(0, indices.cpu()) for tap, values in self.features.items()}

        made = with_features(batch, self._takes, look_up)
        return made | {INDICES: made[INDICES] % self._samples}


def cache_features(
    stages: Sequence[Stage],
    loader: EpochLoader,
    directory: str | os.PathLike[str],
    *,
    joint: Joint | None = None,
    precision: str = "no",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> list[FeatureStore | None]:
    """The teacher's features of every stage, from disk where they are there already.

    Args:
        stages: from `compile_stages`.
        loader: the training loader; its samples must look the same in every epoch, or be seen in fixed views.
        directory: where features are kept; may be shared by runs, models and data sets.
        joint: graphs that compute several stages' features at once (see `joint_teachers`); by default one after the other.
        precision: name of the arithmetic, which is part of the key.
        autocast: makes its context.
        device: where the teacher runs.
        say: called with what is read, what will be computed, and how large it is.

    Returns:
        A store for each stage; None for a stage that asks nothing of the teacher.

    Raises:
        ConfigError: the data are random, or the disk has not the space.
    """
    data = same_samples(loader, "The feature cache", views=True).indexed(in_order=True)
    root = Path(directory)
    make_folder(root)
    content_key = f"{_FORMAT} {loader.fingerprint()} {precision}"
    folders = [root / _key(stage.teacher, content_key) if stage.teacher is not None else None for stage in stages]
    with FileLock(root / ".lock"):
        for part in root.glob("*.part"):  # of a process that was killed: whoever fills the cache holds the lock
            shutil.rmtree(part, ignore_errors=True)
        missing = [
            stage for stage, folder in zip(stages, folders, strict=True) if folder and not _is_whole(folder, stage, say)
        ]
        for stage, folder in zip(stages, folders, strict=True):
            if folder is not None and stage not in missing:
                say(f"{stage.name}: the teacher's features are in {folder}")
        if missing:
            by_stage = {id(stage): folder for stage, folder in zip(stages, folders, strict=True) if folder}
            plans = joint(missing) if joint else [([stage], _teacher(stage)) for stage in missing]
            _fill(
                [([(s, by_stage[id(s)]) for s in group], graph) for group, graph in plans], data, autocast, device, say
            )
    return [
        FeatureStore(folder, stage.takes, loader.samples) if folder is not None else None
        for stage, folder in zip(stages, folders, strict=True)
    ]


def _fill(
    plans: Sequence[tuple[Sequence[tuple[Stage, Path]], fx.GraphModule]],
    data: EpochLoader,
    autocast: Callable[[], AbstractContextManager[Any]],
    device: torch.device | str,
    say: Callable[[str], None],
) -> None:
    """Compute the missing features, one graph after another."""
    sizes: dict[Path, dict[str, tuple[Tensor, str]]] = {}
    first = next(iter(data))
    for group, graph in plans:
        graph.to(device)
        found = _run(graph, first, group[0][0], autocast, device)
        for stage, folder in group:
            sizes[folder] = {tap: (found[tap][0], stage.name) for tap in stage.teacher_taps}
    views = max(data.views, 1)
    rows = data.samples * views
    _estimate(sizes, rows, next(iter(sizes)).parent, say)
    for group, graph in plans:
        parts = {folder: folder.with_name(f"{folder.name}.part") for _, folder in group}
        try:
            files = {folder: _files(part, sizes[folder], rows) for folder, part in parts.items()}
            for view in range(views):
                data.set_epoch(view)
                for batch in followed(data, "teacher's features", shown=True):
                    found = _run(graph, batch, group[0][0], autocast, device)
                    for taps in files.values():
                        for tap, values in taps.items():
                            values.index_copy_(0, _indices(batch, group[0][0]), found[tap].to("cpu"))
            for folder, part in parts.items():
                _close(part, files.pop(folder))
                part.replace(folder)
        except BaseException:
            for part in parts.values():
                shutil.rmtree(part, ignore_errors=True)
            raise


def _files(part: Path, taps: Mapping[str, tuple[Tensor, str]], samples: int) -> dict[str, Tensor]:
    """New files for the features of all samples, by tap.

    Raises:
        ConfigError: the disk has not the space.
    """
    files = {}
    hint = "Choose another folder, or train without the cache."
    error = ConfigError(f"The feature cache cannot be written to {part.parent}", where="feature cache", hint=hint)
    with instead_of(OSError, error):
        part.mkdir()
        for k, (tap, (row, _)) in enumerate(taps.items()):
            shape = (samples, *row.shape)
            _reserve(part / f"{k}.bin", math.prod(shape) * row.element_size())
            files[tap] = _mapped(part / f"{k}.bin", shape, row.dtype, shared=True)
    return files


def _reserve(path: Path, size: int) -> None:
    """Make a file that has its blocks on the disk: where there are none left, a write into mapped memory ends the process (SIGBUS).

    Raises:
        OSError: the disk, or the user's share of it, is full.
    """
    with path.open("xb") as file:
        if size and hasattr(os, "posix_fallocate"):  # macOS and Windows have none
            os.posix_fallocate(file.fileno(), 0, size)


class _Entry(BaseModel):
    """The entry of one tap's features in a folder's index."""

    file: Annotated[str, Field(pattern=r"^[0-9]{1,6}\.bin$")]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 48)], ...], Field(max_length=16)]
    dtype: Annotated[str, Field(pattern="^(float(16|32|64)|bfloat16|u?int(8|16|32|64)|bool)$")]
    digest: str


def _close(part: Path, taps: Mapping[str, Tensor]) -> None:
    """Write the index, which comes last and marks the folder as complete."""
    index = {
        tap: {
            "file": f"{k}.bin",
            "shape": list(values.shape),
            "dtype": str(values.dtype).partition(".")[2],
            "digest": file_digest(part / f"{k}.bin"),
        }
        for k, (tap, values) in enumerate(taps.items())
    }
    save_json(part / _INDEX, {"taps": index, "digest": text_digest(index)})


def _read_index(folder: Path) -> dict[str, _Entry]:
    """Read the index of a folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it was changed since it was written, or is not an index.
    """
    index = read_json(folder / _INDEX, _LARGEST_INDEX)
    taps = index.get("taps") if isinstance(index, dict) else None
    if not isinstance(taps, dict) or index.get("digest") != text_digest(taps):
        raise ValueError("its index was changed")
    return {tap: _Entry.model_validate(entry) for tap, entry in taps.items()}


def _is_whole(folder: Path, stage: Stage, say: Callable[[str], None]) -> bool:
    """Whether a folder holds everything that was written into it; otherwise it is reported and removed."""
    if not folder.exists():
        return False
    fault = fault_of(folder)
    if fault:
        say(f"{stage.name}: the cached features in {folder} are damaged ({fault}) and are recomputed")
        shutil.rmtree(folder, ignore_errors=True)
    return not fault


def fault_of(folder: Path) -> str:
    """How a folder of features is damaged; empty where it is whole."""
    try:
        for tap, entry in _read_index(folder).items():
            needed = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
            if (folder / entry.file).stat().st_size != needed or file_digest(folder / entry.file) != entry.digest:
                return f"those of `{tap}` were changed"
    except (OSError, ValueError, RecursionError) as error:
        return str(error.strerror or error) if isinstance(error, OSError) else str(error).partition("\n")[0]
    return ""


def _run(
    graph: fx.GraphModule,
    batch: Any,
    stage: Stage,
    autocast: Callable[[], AbstractContextManager[Any]],
    device: torch.device | str,
) -> dict[str, Tensor]:
    with torch.no_grad(), autocast():
        call = split(to_device(batch, device), Inputs.of(graph), where=f"Stage `{stage.name}`").calls[0]
        features: dict[str, Tensor] = call(graph)[0]
    return features


def _indices(batch: Any, stage: Stage) -> Tensor:
    found = split(batch, stage.takes, where="The feature cache").indices
    assert found is not None, "`same_samples` gives indices"
    return found


def _estimate(
    sizes: Mapping[Path, Mapping[str, tuple[Tensor, str]]], samples: int, root: Path, say: Callable[[str], None]
) -> None:
    """Print how large the cache will be.

    Raises:
        ConfigError: it is larger than the free space of the disk.
    """
    needs: dict[str, int] = {}
    for taps in sizes.values():
        for row, name in taps.values():
            needs[name] = needs.get(name, 0) + samples * math.prod(row.shape) * row.element_size()
    total, free = sum(needs.values()), shutil.disk_usage(root).free
    parts = ", ".join(f"{name} {_mib(size)}" for name, size in needs.items())
    say(f"Feature cache: {parts}; in all {_mib(total)}; {root} has {_mib(free)} free.")
    if total > free:
        raise ConfigError(
            f"The feature cache needs {_mib(total)} for {samples} samples ({parts}), and {root} has {_mib(free)} free.",
            where="feature cache",
            got=free,
            expected=total,
            hint="Choose another folder, fewer or deeper layers, or train without the cache.",
        )


def _mib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"


def _mapped(path: Path, shape: Sequence[int], dtype: torch.dtype, *, shared: bool) -> Tensor:
    """A tensor mapped to a file; `shared`: the file is extended as needed, and writes go into it."""
    return torch.from_file(str(path), shared=shared, size=math.prod(shape), dtype=dtype).view(tuple(shape))


def _teacher(stage: Stage) -> fx.GraphModule:
    assert stage.teacher is not None
    return stage.teacher


def _key(graph: fx.GraphModule, content_key: str) -> str:
    """Digest of the graph's code, of its layers' settings and of its tensors."""
    return hashlib.sha256(f"{content_key}\n{graph.code}\n{settings_of(graph)}\n{digest(graph)}".encode()).hexdigest()[
        :24
    ]


def stores_of(
    stages: Sequence[Stage],
    loader: EpochLoader,
    directory: str | os.PathLike[str],
    joint: Joint,
    accelerator: Accelerator,
    progress: bool,
) -> list[FeatureStore | None]:
    """The features of all stages with a length, by the graphs of `joint`: filled by one process of each machine, then read by all."""
    wanted = [stage for stage in stages if stage.budget is None or stage.budget.length]
    fill = partial(
        cache_features,
        wanted,
        loader,
        directory,
        joint=joint,
        precision=accelerator.mixed_precision,
        autocast=accelerator.autocast,
        device=accelerator.device,
    )
    shown = progress and accelerator.is_main_process
    with accelerator.local_main_process_first():
        stores = fill(say=(lambda text: tell(one_line(text))) if shown else lambda text: None)
    found = {id(stage): store for stage, store in zip(wanted, stores, strict=True)}
    return [found.get(id(stage)) for stage in stages]
