"""State dicts: read from a file without running anything of it, and loaded into a module with every mismatch named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.loading.file_kinds import damaged, recognise
from indistill_fx.loading.pickle_scan import Made, entries, find_entry
from indistill_fx.loading.safe_pickle import SavedFile, open_saved
from indistill_fx.system.files import LONGEST_HEADER, read_json
from indistill_fx.system.tensor_files import load_tensors, require_header

WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "weights", "params", "student"),
    *("module", "network", "state_dict_ema", "model_ema", "ema"),
)
"""Keys that training scripts put a model or its weights under, the likeliest first."""
_COMPILED = "_orig_mod."  # what torch.compile puts before the keys of each module that it compiled
_COUNTER = "num_batches_tracked"
_INDEX = ".index.json"
_KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
FLOATS = tuple(_KINDS.values())
"""Kinds of numbers that mean what they say: integers and floats of 8 bits lack the scale that they were rounded by."""
_SHOWN = 5


def load_weights(module: nn.Module, path: Path, *, entry: str = "", trust: Sequence[str] = ()) -> tuple[str, ...]:
    """Load a state dict into a module, in place.

    Args:
        module: gets the weights; its training flags stay.
        path: a safetensors file, one of torch.save, or the index of several (model.safetensors.index.json).
        entry: where in a file of torch.save they are: a key, or several joined by `/`. By default they are looked for.
        trust: packages whose objects the file may hold beside the tensors.

    Returns:
        Notes: what was unwrapped, dropped or trusted on the way.

    Raises:
        ConfigError: the file cannot be read, or its keys, shapes or kinds of numbers are not the module's; names them.
    """
    state, notes = read_state_dict(path, entry=entry, trust=trust)
    expected = module.state_dict()
    state, renamed = _under_prefix(state, expected, path)
    notes = (*notes, *renamed)
    counters = {name: expected[name] for name in expected.keys() - state.keys() if name.endswith(_COUNTER)}
    if counters and state:  # files from before torch 0.4.1, or without what inference does not need
        state, notes = (
            state | counters,
            (*notes, f"weights: the file lacks the step counters of {len(counters)} batch norms, which begin at 0"),
        )
    state = _with_shared(state, module, expected, path)
    _require_match(state, expected, type(module).__name__, path)
    module.load_state_dict(state)
    return notes


def _under_prefix(
    state: dict[str, Tensor], expected: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state without the prefix that a wrapper put before the module's keys, and notes of what was done.

    Wrappers (DDP, torch.compile, Lightning, Fabric, an average of weights) hold the module in an attribute, and may keep tensors of
    their own beside it. So a prefix is one below which the file has exactly the module's keys.
    """
    notes: tuple[str, ...] = ()
    if any(_COMPILED in key for key in state) and not any(_COMPILED in key for key in expected):
        state = {key.replace(_COMPILED, ""): value for key, value in state.items()}
        notes = (f"weights: the prefix {_COMPILED!r} was removed from the keys",)
    known = {key for key in expected if not key.endswith(_COUNTER)}
    if not known or known & state.keys():
        return state, notes
    some = min(known)
    found = [key.removesuffix(some) for key in state if key.endswith(f".{some}")]
    if len(fitting := [prefix for prefix in found if _keys_below(prefix, state) == known]) > 1:
        raise ConfigError(
            f"`{path}` holds {len(fitting)} sets of weights that fit the model, below "
            f"{' and '.join(map(repr, fitting[:_SHOWN]))}.",
            where=str(path),
            got=fitting,
            hint="Save the one that you want alone: torch.save(model.state_dict(), path).",
        )
    shared = [prefix for prefix in found if all(key.startswith(prefix) for key in state)]
    if not (fitting or shared):
        return state, notes
    prefix = (fitting or shared)[0]  # with one that all keys share, the error for other keys names those alone
    left = [key for key in state if not key.startswith(prefix)]
    note = f"weights: the prefix {prefix!r} was removed from every key"
    if left:
        note = f"weights: those below {prefix!r} were taken, without {', '.join(left[:_SHOWN])}{', …' if left[_SHOWN:] else ''}"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, (*notes, note)


def _keys_below(prefix: str, state: Mapping[str, Tensor]) -> set[str]:
    return {key.removeprefix(prefix) for key in state if key.startswith(prefix) and not key.endswith(_COUNTER)}


def _with_shared(
    state: dict[str, Tensor], module: nn.Module, expected: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """The state with every name of a tensor that the module has under several: files often keep only one of the names.

    Raises:
        ConfigError: the file has different values for one tensor of the module, of which only the last would be kept.
    """
    names: dict[int, list[str]] = {}
    for key, value in module.named_parameters(remove_duplicate=False):
        if key in expected:
            names.setdefault(id(value), []).append(key)
    state = dict(state)
    for group in names.values():
        held = [key for key in group if key in state]
        for other in held[1:]:
            first, second = state[held[0]], state[other]
            if first.shape == second.shape and not first.equal(second.to(first.dtype)):
                raise ConfigError(
                    f"`{path}` has different weights for `{held[0]}` and `{other}`, which are one tensor in the model.",
                    where=str(path),
                    got=[held[0], other],
                    hint="Build the model without sharing the two (for Hugging Face: tie_word_embeddings=False).",
                )
        if held:
            state |= {key: state[held[0]] for key in group}
    return state


def read_state_dict(
    path: Path, *, entry: str = "", trust: Sequence[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read the state dict of a file.

    Args:
        path: a safetensors file, one of torch.save, or the index of several (model.safetensors.index.json).
        entry: as in `load_weights`.
        trust: packages whose objects the file may hold beside the tensors.

    Returns:
        Tensors by key, on the CPU, and notes: under what key they were found, what was trusted.

    Raises:
        ConfigError: the file is of another kind, damaged, or holds no state dict.
    """
    if path.name.endswith(_INDEX) and path.is_file() and not entry:
        return _read_shards(path, trust)
    kind, label = recognise(path), str(path)
    if entry and kind not in ("torch", "torch-legacy"):
        message = f"`{label}` has no entry {entry!r}: only files of torch.save have entries."
        raise ConfigError(message, where=label, got=entry, hint=f"Name the file alone: {label}.")
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
        return _read_saved(saved, entry)


def _places(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index says.

    Raises:
        ConfigError: it is damaged, or no index.
    """
    try:
        index = read_json(path, LONGEST_HEADER)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(str(path), str(error)) from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    places = places if isinstance(places, dict) else {}
    if not places or not all(
        isinstance(name, str) and name == Path(name).name and not name.endswith(_INDEX) for name in places.values()
    ):
        raise ConfigError(
            f"`{path}` is not an index of weights: it has no `weight_map` of file names.",
            where=str(path),
            expected='{"weight_map": {"layer.weight": "model-00001-of-00002.safetensors", …}}',
            hint="Name the file of the weights itself.",
        )
    if lost := next((name for name in sorted(places.values()) if not path.with_name(name).is_file()), None):
        message = f"`{path.with_name(lost)}`, which `{path.name}` names, is missing."
        raise ConfigError(message, where=str(path), got=lost, hint="Copy or download all files of the model again.")
    return places


def _read_shards(path: Path, trust: Sequence[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of the files that an index names, as Hugging Face and Accelerate write it; the files lie beside it."""
    places = _places(path)
    names = set(places.values())
    state: dict[str, Tensor] = {}
    notes: tuple[str, ...] = ()
    for name in sorted(names):
        part, of_part = read_state_dict(path.with_name(name), trust=trust)
        if lacking := [key for key, place in places.items() if place == name and key not in part]:
            raise ConfigError(
                f"`{path.with_name(name)}` lacks `{lacking[0]}`, which `{path.name}` says is in it.",
                where=str(path),
                got=lacking,
                hint="Copy or download all files of the model again.",
            )
        state |= {key: value for key, value in part.items() if places.get(key) == name}
        notes += of_part
    return state, (*notes, f"weights: read from the {len(names)} files of the index")


def _read_saved(saved: SavedFile, entry: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a checkpoint. Nothing else in the file, such as a script's arguments, is made."""
    label, held = f"{saved.label}?entry={entry}" if entry else saved.label, find_entry(saved.root, entry, saved.label)
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
    if keys := [key for key in WRAPPERS if entries(found.get(key)) is not None]:
        inner = entries(found[keys[0]]) or {}
        others = [str(key)[:60] for key, value in found.items() if key != keys[0] and _has_keys_of(value, inner)]
        beside = say_others(others[:_SHOWN], f"{entry}/" if entry else "")
        found, notes = inner, (f"weights: taken from {keys[0]!r} of the checkpoint{beside}",)
    others = [str(key)[:60] for key, value in found.items() if not (isinstance(key, str) and _may_be_tensor(value))]
    if others or not found:
        saved.require_names(found)
        raise _no_state_dict(label, others)
    state = saved.make(found)
    if not_tensors := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise _no_state_dict(label, not_tensors)
    return state, (*notes, *saved.describe_trusted(found))


def say_others(keys: Sequence[str], before: str = "") -> str:
    """That a checkpoint holds the same under other keys, and how to name them."""
    return f", which has others under {', '.join(map(repr, keys))} (?entry={before}{keys[0]})" if keys else ""


def _may_be_tensor(value: Any) -> bool:
    return isinstance(value, Made) and (value.is_tensor or value.is_module)


def _has_keys_of(value: Any, state: Mapping[Any, Any]) -> bool:
    """Whether an entry of a checkpoint is weights of the same model, such as their moving average, at most one level down."""
    wanted = _ends(state)
    held = entries(value) or {}
    return bool(wanted) and any(
        wanted <= _ends(item) for item in (held, *(entries(item) or {} for item in held.values()))
    )


def _ends(state: Mapping[Any, Any]) -> set[str]:
    """The last two parts of every key: what wrappers, which put names before them, leave as they are."""
    return {".".join(str(key).split(".")[-2:]) for key, value in state.items() if _may_be_tensor(value)}


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
    try:
        require_header(path)
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.offset_keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(str(path), str(error)) from error


def read_kinds(path: Path) -> dict[str, torch.dtype | str]:
    """What kind of numbers each tensor of a safetensors file, or of those of an index, has; only headers are read.

    Raises:
        ConfigError: a file is none, or damaged.
    """
    names = set(_places(path).values()) if path.name.endswith(_INDEX) else {path.name}
    found: dict[str, torch.dtype | str] = {}
    for file in map(path.with_name, sorted(names)):
        try:
            require_header(file)
            with safe_open(file, framework="np") as held:
                kinds = {key: held.get_slice(key).get_dtype() for key in held.offset_keys()}
        except (OSError, ValueError, SafetensorError) as error:
            raise damaged(str(file), str(error)) from error
        found |= {key: _KINDS.get(kind, kind) for key, kind in kinds.items()}
    return found


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
    kinds = [
        f"{key} (file {value.dtype}, model {expected[key].dtype})"
        for key, value in state.items()
        if isinstance(expected.get(key), Tensor) and not _same_kind(value, expected[key])
    ]
    parts = [
        f"{len(keys)} {problem}: {', '.join(keys[:_SHOWN])}{', …' if len(keys) > _SHOWN else ''}"
        for problem, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another kind of numbers", kinds),
        )
        if keys
    ]
    if parts:
        raise ConfigError(
            f"The weights in `{path}` are not those of this {name}: {'; '.join(parts)}.",
            where=str(path),
            got={"missing": missing, "unexpected": unexpected, "shapes": shapes, "kinds": kinds},
            hint="Save the weights as float numbers, before quantisation."
            if kinds and len(parts) == 1
            else "Give the constructor's arguments that the weights were made with, such as ?num_classes=10.",
        )


def _same_kind(value: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor copied into the other keeps its meaning: integers in place of floats lack the scale they were rounded by."""
    return value.is_complex() == wanted.is_complex() and value.is_floating_point() == wanted.is_floating_point()
