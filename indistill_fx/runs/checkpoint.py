"""Checkpoints: one safetensors file each, its header holding the state as JSON. No pickle, and never half a file.

Everything that decides how a run continues is in the one file, so that one rename makes the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.errors import ConfigError, first_lines, instead_of
from indistill_fx.system.files import json_text, parse_json
from indistill_fx.system.shortage import advice
from indistill_fx.system.tensor_files import DamagedFileError, load_tensors, save_tensors

SCHEMA = 1
"""Version of run directories: of run.json and of the state in a checkpoint. Later versions read earlier ones."""


def check_schema(version: object, path: Path) -> None:
    """Refuse what a later version wrote.

    Raises:
        ConfigError: it did.
    """
    if not isinstance(version, int) or version > SCHEMA:
        raise ConfigError(
            f"{path} was written by a later version of indistill-fx (format {version}; this one reads up to {SCHEMA}).",
            where=str(path),
            got=version,
            expected=SCHEMA,
            hint="Update indistill-fx, or start a new run in another directory.",
        )


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and state as one file.

    Raises:
        TrainError: the place cannot be written.
    """
    save_tensors(path, tensors, {"state": json_text({"schema_version": SCHEMA, **state})})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint.

    Raises:
        ConfigError: no such file, not a checkpoint of ours, one that was changed since it was written (names what), or one of a
            later version.
    """
    try:
        tensors, header = load_tensors(path)
        if header.keys() != {"state"}:
            raise DamagedFileError(
                f"its header has {', '.join(sorted(header)) or 'nothing'} where it should have a state"
            )
        state = dict(parse_json(header["state"]))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a checkpoint of a run: {first_lines(error)}",
            where=str(path),
            hint=f"{remedy}, and resume again."
            if (remedy := advice(error))
            else "Start a new run in another directory.",
        ) from error
    check_schema(state.pop("schema_version", 1), path)
    return tensors, state


def model_tensors(
    student: nn.Module, stage: nn.Module | None, *, without: nn.Module | None = None
) -> dict[str, Tensor]:
    """Everything that training writes: the student's tensors and those of the stage's loss.

    Args:
        student: the module being trained.
        stage: the stage under way; None between stages.
        without: a part of the stage that training does not write: the teacher.

    Returns:
        The live tensors by name, each once.
    """
    found = {f"student/{name}": tensor for name, tensor in _named(student)}
    if stage is not None:
        known = {id(tensor) for tensor in found.values()}
        known |= {id(tensor) for _, tensor in _named(without)} if without is not None else set()
        for name, tensor in _named(stage):
            if id(tensor) not in known:
                found[f"stage/{name}"] = tensor
    return found


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of `module.state_dict()`; tied ones under each of their names, so that any loader can read them."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state: tensors, and the values that are none, by `index/key`."""
    tensors, values = {}, {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                values[f"{index}/{key}"] = value
    return tensors, values


def optimizer_form(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimiser's state goes with, as plain values: its kind, whether it has momentum, and how its parameters are numbered."""
    return {
        "kind": type(optimizer).__name__,
        "momentum": bool(optimizer.defaults.get("momentum")),
        "groups": [len(group["params"]) for group in optimizer.param_groups],
    }


@torch.no_grad()
def restore_model(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's tensors into the live ones, in place.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    stored = {name: tensor for name, tensor in saved.items() if not name.startswith("optimizer/")}
    for name in (*live, *stored):
        got, expected = (tuple(side[name].shape) if name in side else None for side in (stored, live))
        if got != expected:
            there, here = ("absent" if shape is None else shape for shape in (got, expected))
            raise ConfigError(
                f"The checkpoint belongs to another model: `{name}` is {there} there, not {here}.",
                where=name,
                got=got,
                expected=expected,
                hint="Resume with the models and losses that the run was started with.",
            )
    for name, tensor in live.items():
        tensor.copy_(stored[name])


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Give an optimiser the state of `optimizer_tensors`.

    Raises:
        ConfigError: it is of other parameters.
    """
    hint = "Resume with the options that the run was started with."
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = [p.shape for p in parameters]
    state: dict[int, dict[str, Any]] = {}
    entries = {name.removeprefix("optimizer/"): t for name, t in saved.items() if name.startswith("optimizer/")}
    for name, value in (*entries.items(), *values.items()):
        index, _, key = name.partition("/")
        fits = index.isdecimal() and int(index) < len(shapes)
        if not fits or (isinstance(value, Tensor) and value.dim() and value.shape != shapes[int(index)]):
            raise ConfigError(
                f"The checkpoint belongs to another optimiser: `{name}` does not fit.",
                where=name,
                hint=hint,
            )
        state.setdefault(int(index), {})[key] = _laid_out_as(parameters[int(index)], value)
    error = ConfigError("The checkpoint belongs to another optimiser", where="optimizer", hint=hint)
    with instead_of((KeyError, ValueError, TypeError, RuntimeError), error):
        if len({frozenset(entries) for entries in state.values()}) > 1:
            raise ValueError("its parameters have states of different kinds")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    """The same value in the memory layout of its parameter, which fused optimisers require; files hold the contiguous layout."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
