"""State dicts: read from a file without running anything of it, and loaded into a module with every mismatch named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.loading.file_kinds import damaged, recognise
from indistill_fx.loading.pickle_scan import Made, entries
from indistill_fx.loading.safe_pickle import SavedFile, open_saved
from indistill_fx.system.tensor_files import load_tensors, require_header

# The keys under which training scripts save a state dict, and the prefixes that wrappers put before its keys.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "weights", "params", "student"),
    *("module", "network", "state_dict_ema", "model_ema", "ema"),
)
"""Keys that training scripts put a model or its weights under, the likeliest first."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 5


def load_weights(module: nn.Module, path: Path, *, trust: Sequence[str] = ()) -> tuple[str, ...]:
    """Load a state dict into a module, in place.

    Args:
        module: gets the weights; its training flags stay.
        path: a safetensors file, or one of torch.save.
        trust: packages whose objects the file may hold beside the tensors.

    Returns:
        Notes: what was unwrapped, dropped or trusted on the way.

    Raises:
        ConfigError: the file cannot be read, or its keys or shapes are not the module's; names them.
    """
    state, notes = read_state_dict(path, trust=trust)
    expected = module.state_dict()
    for prefix in _PREFIXES:
        if (
            state
            and all(key.startswith(prefix) for key in state)
            and not any(key.startswith(prefix) for key in expected)
        ):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            notes = (*notes, f"weights: the prefix {prefix!r} was removed from every key")
    counters = {name: expected[name] for name in expected.keys() - state.keys() if name.endswith("num_batches_tracked")}
    if counters and state:  # files from before torch 0.4.1, or without what inference does not need
        state, notes = (
            state | counters,
            (*notes, f"weights: the file lacks the step counters of {len(counters)} batch norms, which begin at 0"),
        )
    _require_match(state, expected, type(module).__name__, path)
    module.load_state_dict(state)
    return notes


def read_state_dict(path: Path, *, trust: Sequence[str] = ()) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read the state dict of a file.

    Args:
        path: a safetensors file, or one of torch.save.
        trust: packages whose objects the file may hold beside the tensors.

    Returns:
        Tensors by key, on the CPU, and notes: under what key they were found, what was trusted.

    Raises:
        ConfigError: the file is of another kind, damaged, or holds no state dict.
    """
    kind, label = recognise(path), str(path)
    if kind == "safetensors":
        return _read_safetensors(path), ()
    if kind == "export":
        raise ConfigError(
            f"`{label}` is a whole exported model, not weights.", where=label, hint=f"Name it alone: {label}."
        )
    if kind == "onnx":
        raise ConfigError(
            f"`{label}` is a whole ONNX model, not weights.", where=label, hint=f"Name it alone: {label}."
        )
    with path.open("rb") as file, open_saved(file, label, trust=trust) as saved:
        return _read_saved(saved)


def _read_saved(saved: SavedFile) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a checkpoint. Nothing else in the file, such as a script's arguments, is made."""
    label, held = saved.label, saved.root
    notes: tuple[str, ...] = ()
    if isinstance(held, Made) and held.is_module and entries(held) is None:
        saved.require_names(held)
        message = f"`{label}` is a whole module, not a state dict."
        raise ConfigError(message, where=label, hint=f"Name it alone, without a model before it: {label}.")
    found = entries(held)
    if found is None:
        saved.require_names(held)
        raise ConfigError(
            f"`{label}` holds {_say(held)}, not a state dict.",
            where=label,
            hint="Give a file of weights: torch.save(model.state_dict(), …) or safetensors.",
        )
    for key in WRAPPERS:
        inner = entries(found.get(key))
        if inner is not None:
            found, notes = inner, (f"weights: taken from {key!r} of the checkpoint",)
            break
    others = [str(key)[:60] for key, value in found.items() if not (isinstance(key, str) and _may_be_tensor(value))]
    if others or not found:
        saved.require_names(found)
        raise _no_state_dict(label, others)
    state = saved.make(found)
    if not_tensors := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise _no_state_dict(label, not_tensors)
    return state, (*notes, *saved.describe_trusted(found))


def _may_be_tensor(value: Any) -> bool:
    return isinstance(value, Made) and (value.is_tensor or value.is_module)


def _say(value: Any) -> str:
    return f"a {value.path or 'call'}" if isinstance(value, Made) else f"a {type(value).__name__}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path)[0]
    except (OSError, ValueError) as error:
        raise damaged(str(path), str(error)) from error


def count_numbers(path: Path) -> int:
    """How many numbers a safetensors file holds; only its header is read.

    Raises:
        ConfigError: it is none, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        require_header(path)
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.offset_keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(str(path), str(error)) from error


def _no_state_dict(label: str, others: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"`{label}` is not a state dict: {', '.join(others[:_SHOWN]) or 'it is empty'} "
        f"{'is not a tensor' if len(others) == 1 else 'are not tensors' if others else 'and has no tensors'}.",
        where=label,
        got=others,
        expected=f"tensors by name, or such a mapping under one of {', '.join(WRAPPERS)}",
        hint="Save the weights alone: torch.save(model.state_dict(), path).",
    )


def _require_match(state: Mapping[str, Tensor], expected: Mapping[str, Any], name: str, path: Path) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} (file {tuple(value.shape)}, model {tuple(expected[key].shape)})"
        for key, value in state.items()
        if isinstance(expected.get(key), Tensor) and expected[key].shape != value.shape
    ]
    parts = [
        f"{len(keys)} {problem}: {', '.join(keys[:_SHOWN])}{', …' if len(keys) > _SHOWN else ''}"
        for problem, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if parts:
        raise ConfigError(
            f"The weights in `{path}` are not those of this {name}: {'; '.join(parts)}.",
            where=str(path),
            got={"missing": missing, "unexpected": unexpected, "shapes": shapes},
            hint="Give the constructor's arguments that the weights were made with, such as ?num_classes=10.",
        )
