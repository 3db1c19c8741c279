"""What makes a run this run and not another: gathered when it starts, compared when it is resumed.

Everything that decides the result is in it, under names that a person can read: a resume under another loss, other data or other code is
refused by that name, or asked for by it (`allow_changed`, `--allow-changed`).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.data.foreign import ForeignLoader
from indistill_fx.data.image_folders import ImageFiles, stat_of
from indistill_fx.data.loaders import EpochLoader, MemoryLoader
from indistill_fx.errors import ConfigError, nearest
from indistill_fx.graph.module_state import settings_of
from indistill_fx.losses.task import Task
from indistill_fx.system.user_code import load_object
from indistill_fx.training.options.settings import Settings, about
from indistill_fx.training.state import Phase

_MOST_BYTES = 1 << 28
"""Of one tensor in memory that are read for a digest; of a larger one, rows at equal distances."""


def identity_of(
    phases: Sequence[Phase], loader: EpochLoader, settings: Settings, more: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity of a run, as plain values.

    Args:
        phases: in order.
        loader: training batches.
        settings: of the run.
        more: what only the caller knows: models, losses, plan.
    """
    main = next((phase for phase in phases if phase.main), None)
    found = {
        **more,
        "warm-up": [f"{phase.name}: {phase.budget}" for phase in phases if not phase.main],
        "epochs": main.budget.length if main is not None and main.budget.unit == "epochs" else None,
        "batches": loader.length,
        **_data(loader),
        "features": "cached" if any(phase.attach for phase in phases) else None,
        "what is added to the main loss": "".join(phase.also for phase in phases),
        **{name: value for name, value in settings.to_json().items() if about(name).changes_result},
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def changes(
    asked: Mapping[str, Any], saved: Mapping[str, Any], path: Path, *, allowed: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """What differs between a resumed run and the one that a checkpoint belongs to, all of it allowed: name → (saved, asked).

    More epochs need no permission, where they do not change the learning rate of those before. What the checkpoint does not know,
    because an earlier version wrote it, does not count.

    Args:
        asked: the identity of the resumed run.
        saved: that of the checkpoint.
        path: the checkpoint.
        allowed: names that may differ.

    Raises:
        ConfigError: something else differs; names it. Or `allowed` has a name that there is not.
    """
    known = {_plain(name): name for name in asked}
    for name in allowed:
        if _plain(name) not in known:
            raise ConfigError(
                f"No setting called {name!r} may change when a run is resumed.",
                where="allow_changed",
                got=name,
                expected=list(asked),
                hint=nearest(name, list(asked)),
            )
    found = {name: (saved[name], value) for name, value in asked.items() if saved.get(name, value) != value}
    free = {known[_plain(name)] for name in allowed}
    longer = (
        all(type(length) is int for length in found.get("epochs", [None])) and found["epochs"][1] > found["epochs"][0]
    )
    if longer and asked["schedule"] != "cosine":
        free.add("epochs")
    refused = [name for name in found if name not in free]
    if refused:
        name = refused[0]
        before, now = found[name]
        others = f" These differ as well: {', '.join(refused[1:])}." if refused[1:] else ""
        explanation = " (a cosine's learning rates follow from it)" if name == "epochs" and longer else ""
        raise ConfigError(
            f"{path} belongs to a run with other settings: {name} is {_shown(before)} there and {_shown(now)} here{explanation}.{others}",
            where=name,
            got=now,
            expected=before,
            hint="Resume with the settings that the run was started with, start a new run in another directory, or allow the change: "
            f"allow_changed=[{name!r}] (--allow-changed {_plain(name).replace(' ', '-')}).",
        )
    return found


def _plain(name: str) -> str:
    return name.lower().replace("-", " ").replace("_", " ")


def _shown(value: object) -> str:
    text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def named_loss(loss: str | Callable[..., Any] | None) -> str:
    """What a loss is called by."""
    return loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__qualname__)


def described_loss(loss: str | Callable[..., Any] | None, options: Mapping[str, Any]) -> str | None:
    """A loss with its options, and a digest of its code where it is the user's own."""
    if loss is None:
        return None
    name = named_loss(loss)
    if not isinstance(loss, str) or ":" in loss:
        found = load_object(loss) if isinstance(loss, str) else loss
        name = f"{name.rpartition(':')[2]} (code {code_digest(found)})"
    return ", ".join([name, *(f"{key}={value!r}" for key, value in sorted(options.items()))])


def described_task(task: Task) -> str:
    """A task with all its settings, and a digest of its code where it is the user's own."""
    user_task = not type(task).__module__.startswith("indistill_fx.")
    settings = "".join(f", {name}={value!r}" for name, value in sorted(vars(task).items()))
    return f"{task.name}{settings}" + (f" (code {code_digest(type(task))})" if user_task else "")


def code_digest(value: Any) -> str:
    """Digest of the source of a function or a class, or of an object's class and settings. Comments and layout do not count."""
    total = hashlib.sha256()
    if isinstance(value, fx.GraphModule):
        total.update(value.code.encode())
    if isinstance(value, nn.Module):
        total.update(repr(settings_of(value)).encode())
        classes = sorted(
            {type(part) for part in value.modules()}, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"
        )
        for kind in classes:
            total.update(
                f"{kind.__qualname__} {'' if kind.__module__.startswith('torch.') else _source(kind)}\n".encode()
            )
    else:
        total.update(_source(value).encode())
    return total.hexdigest()[:16]


def _source(value: Any) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):  # defined in an interactive session, or generated
        code = getattr(value, "__code__", None)
        return f"{code.co_code!r} {code.co_names}" if code is not None else type(value).__qualname__
    try:
        return ast.dump(ast.parse(text))
    except SyntaxError:  # a lambda inside an expression does not parse alone
        return text


def _data(loader: EpochLoader) -> dict[str, Any]:
    inner = loader.loader if isinstance(loader, ForeignLoader) else loader
    total = hashlib.sha256()
    if isinstance(inner, MemoryLoader):
        _update(total, (inner.images, inner.labels))
    elif isinstance(inner, list | tuple):
        _update(total, inner[:])
    else:
        _update_by_dataset(total, getattr(inner, "dataset", None))
    return {
        "normalisation": loader.normalisation,
        "batch size": getattr(inner, "batch_size", None),
        "data": total.hexdigest()[:16],
        "data seed": loader.seed,
        "augmentation": loader.randomness,
    }


def _update_by_dataset(total: Any, dataset: Any) -> None:
    """Update the digest by what is known without reading samples: lists of files, tensors in memory, classes, numbers."""
    if isinstance(dataset, ImageFiles):
        listing = dataset.listing
        # Neither folders nor dates count, because data sets are copied.
        for file in listing.files:
            total.update(f"{os.path.relpath(file, listing.folder)} {stat_of(file).st_size}\n".encode())
        _update(total, (listing.labels, listing.classes, repr(dataset.transform)))
        return
    while dataset is not None:
        count = len(dataset) if hasattr(dataset, "__len__") else None
        total.update(f"{type(dataset).__qualname__} {count}".encode())
        for name in ("tensors", "data", "targets", "labels", "samples", "classes", "indices"):
            _update(total, getattr(dataset, name, None))
        dataset = getattr(dataset, "dataset", None)  # the data set inside a Subset


def _update(total: Any, value: object) -> None:
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        tensor = torch.as_tensor(value).detach().cpu()
        rows = tensor[:: max(1, -(-tensor.nbytes // _MOST_BYTES))] if tensor.ndim else tensor
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        _update(total, list(value.items()))
    elif isinstance(value, list | tuple):
        flat = all(isinstance(entry, str | int | float) for entry in value)
        for entry in [repr(value)] if flat else value:
            _update(total, entry)
    elif isinstance(value, str | int | float | bool):
        total.update(repr(value).encode())
