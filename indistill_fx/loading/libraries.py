"""Models of libraries: torchvision's and timm's constructors by name, and folders that transformers and timm have written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from indistill_fx.errors import ConfigError, FrontendError, IndistillError, first_lines, nearest
from indistill_fx.loading.file_kinds import CONFIGURATION, damaged, read_configuration
from indistill_fx.loading.state_dicts import FLOATS, load_weights, read_kinds, read_state_dict
from indistill_fx.system.bounded import Bounded

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FETCHING = ("pretrained", "checkpoint", "weights", "cache")
"""Arguments of constructors, by how their names begin, that read other files or the network."""
_ADAPTER = "adapter_config.json"
_CODE = re.compile(r"auto_map|use_kernels|kernel_config|\w*(attn|experts)_implementation\w*")
"""Names of entries of a configuration of transformers that choose code to run, perhaps code to download."""
_COMPUTED = ("layer_types", "out_features", "out_indices", "stage_names")
"""Entries that a configuration of transformers makes from its number of layers, unless they are given."""
_BY_HAND = "Build it in a file of your own, and name that: models.py:make_model."

# Arguments that stop constructors from downloading a backbone, or from warning about their own defaults.
_QUIET: dict[str, Any] = {"weights_backbone": None}
_QUIET_BY_NAME: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": True},
    "inception_v3": {"init_weights": True},
}


def build_torchvision(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a torchvision model.

    Args:
        name: as in `torchvision.models.list_models()`.
        arguments: the constructor's; `weights="DEFAULT"` or `pretrained=True` downloads weights.

    Returns:
        The model, in train mode as its constructor leaves it.

    Raises:
        ConfigError: no such name or argument; says which there are.
        FrontendError: the weights cannot be downloaded.
    """
    import torchvision

    legal = torchvision.models.list_models()
    if name not in legal:
        raise _unknown("torchvision", name, legal)
    builder = torchvision.models.get_model_builder(name)
    given = dict(arguments)
    if given.pop("pretrained", False):
        given["weights"] = "DEFAULT"
    known = inspect.signature(builder).parameters
    quiet = {key: value for key, value in _QUIET.items() if key in known} | _QUIET_BY_NAME.get(name, {})
    if given.get("weights") is not None:
        quiet = {}
        weights = torchvision.models.get_model_weights(name)
        wanted = str(given["weights"]).rpartition(".")[2]
        if wanted not in weights.__members__:
            raise ConfigError(
                f"torchvision:{name} has no weights {wanted!r}.",
                where=f"torchvision:{name}?weights={wanted}",
                got=wanted,
                hint=f"Choose from: {', '.join(weights.__members__)}.",
            )
    model = _build(f"torchvision:{name}", builder, given, quiet, downloads=given.get("weights") is not None)
    # Some constructors accept and ignore any keyword.
    unknown = [key for key in given if key not in {**known, **inspect.signature(type(model).__init__).parameters}]
    if unknown:
        raise _misbuilt(f"torchvision:{name}", builder, given, quiet, f"there is no argument {unknown[0]!r}")
    return model


def build_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a timm model.

    Args:
        name: as in `timm.list_models()`, a tag allowed (`resnet10t.c3_in1k`).
        arguments: those of `timm.create_model`; `pretrained=True` downloads weights.

    Returns:
        The model, in train mode as its constructor leaves it.

    Raises:
        ConfigError: timm is not installed, no such name or argument; says which there are.
        FrontendError: the weights cannot be downloaded.
    """
    try:
        import timm
    except ImportError as error:
        hint = 'Install it: pip install "indistill-fx[timm]".'
        raise ConfigError(
            f"timm:{name} needs timm, which is not installed.", where=f"timm:{name}", hint=hint
        ) from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())

    if "checkpoint_path" in arguments:  # timm's own loader would trust the file
        path = arguments["checkpoint_path"]
        hint = f"Write timm:{name}@{path}, which loads weights without running what a file holds."
        raise ConfigError(f"timm:{name} takes no checkpoint_path here.", where=f"timm:{name}", got=path, hint=hint)

    def builder(**given: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, **given)
        return model

    return _build(f"timm:{name}", builder, dict(arguments), {}, downloads=bool(arguments.get("pretrained")))


def _unknown(library: str, name: str, legal: list[str]) -> ConfigError:
    hint = nearest(name.partition(".")[0], legal) or f"{library} has {len(legal)} models."
    return ConfigError(f"{library} has no model {name!r}.", where=f"{library}:{name}", got=name, hint=hint)


def _build(
    spec: str, builder: Callable[..., nn.Module], given: dict[str, Any], quiet: dict[str, Any], *, downloads: bool
) -> nn.Module:
    try:
        return builder(**quiet | given)
    except IndistillError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".")
        if downloads and not isinstance(error, TypeError):
            raise FrontendError(
                f"{spec} could not be built with pretrained weights: {reason}.",
                where=spec,
                got=reason,
                hint=f"Without a network connection, give the weights as a file: {spec}@weights.safetensors.",
            ) from error
        raise _misbuilt(spec, builder, given, quiet, reason) from error


def _misbuilt(
    spec: str, builder: Callable[..., nn.Module], given: dict[str, Any], quiet: dict[str, Any], reason: str
) -> ConfigError:
    shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
    legal = _list_arguments(builder, quiet)
    return ConfigError(
        f"{spec} cannot be built with {shown or 'its defaults'}: {reason}.",
        where=spec,
        got=given,
        hint=f"Its arguments: {', '.join(legal)}." if legal else "Give other values.",
    )


def _list_arguments(builder: Callable[..., nn.Module], quiet: dict[str, Any]) -> list[str]:
    """The arguments with defaults of a builder, and of the model's class that it passes them to."""
    sources: list[Callable[..., Any]] = [builder]
    try:
        with torch.device("meta"):
            sources.append(type(builder(**quiet)).__init__)
    except Exception:  # fall back to the builder's own arguments
        sources = [builder]
    found: dict[str, None] = {}
    for source in sources:
        for name, parameter in inspect.signature(source).parameters.items():
            if parameter.default is not parameter.empty:
                found[f"{name}={parameter.default!r}"] = None
    return list(found)


def build_from_folder(
    folder: Path, arguments: Mapping[str, Any], *, weights: bool = True, trust: Sequence[str] = ()
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the model of a folder that `save_pretrained` of transformers or `save_for_hf` of timm has written.

    Args:
        folder: with config.json and the weights.
        arguments: entries of the configuration that are to be others; the weights are then new.
        weights: whether to load the folder's weights, if it is built as the folder says.
        trust: packages whose objects a file of weights may hold beside the tensors.

    Returns:
        The model in train mode, in float32, and notes about its weights.

    Raises:
        ConfigError: its library is not installed or does not know it, an argument is wrong, or weights are missing or damaged.
    """
    held = read_configuration(folder)
    if (folder / _ADAPTER).exists():
        hint = "Merge it first: model.merge_and_unload().save_pretrained(FOLDER)."
        message = f"`{folder}` holds an adapter of PEFT beside or instead of a model."
        raise ConfigError(message, where=str(folder), hint=hint)
    named = held.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        module, notes = _build_transformers(folder, named[0], held, arguments, weights, trust)
    elif isinstance(held.get("architecture"), str):
        module, notes = _build_from_timm_folder(folder, held, arguments, weights, trust)
    else:
        raise _unknown_folder(folder, held)
    if arguments and weights:
        changed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        notes = (*notes, f"its weights are new, because they are asked for with another configuration: {changed}")
    return module.train(), notes


def _unknown_folder(folder: Path, held: Mapping[str, Any]) -> ConfigError:
    kind, hint = held.get("_class_name"), _BY_HAND
    which = f"a {kind[:60]} of diffusers" if isinstance(kind, str) else "a model of another library"
    message = f"`{folder}` holds {which}. Only folders of transformers and timm are read, whose {CONFIGURATION} names the class."
    if "model_type" in held:
        message = f"`{folder / CONFIGURATION}` does not name the model's class."
        hint = 'Add it as transformers does: "architectures": ["BertForSequenceClassification"].'
    return ConfigError(message, where=str(folder), got=sorted(held)[:20], hint=hint)


def _build_transformers(
    folder: Path, name: str, held: Mapping[str, Any], arguments: Mapping[str, Any], weights: bool, trust: Sequence[str]
) -> tuple[nn.Module, tuple[str, ...]]:
    try:
        import transformers
    except ImportError as error:
        hint = "Install it: pip install transformers."
        message = f"`{folder}` holds a model of transformers, which is not installed."
        raise ConfigError(message, where=str(folder), hint=hint) from error
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        own = " The folder brings code of its own, which is not run." if "auto_map" in held else ""
        message = f"`{folder}` holds a model of the class {name}, which transformers {transformers.__version__} does not have.{own}"
        raise ConfigError(message, where=str(folder), got=name, hint=_BY_HAND)
    if "quantization_config" in held:
        raise _quantised(folder, [])
    with _quiet_transformers():
        read = _read_transformers(kind, folder, held)
        given = {type(read).attribute_map.get(key, key): value for key, value in arguments.items()}
        _require_known(read.to_dict(), given, folder)

        def builder(**given: Any) -> nn.Module:
            model: nn.Module = kind(_changed(read, given))
            return model.float()

        if arguments or not weights:
            return _build(str(folder), builder, given, {}, downloads=False), ()
        return _with_weights(kind, folder, read, trust)


def _quantised(folder: Path, names: list[str]) -> ConfigError:
    which = f" ({_list(names)})" if names else ""
    message = f"`{folder}` holds quantised weights{which}, which cannot be trained or narrowed."
    hint = "Name the folder of the model from before it was quantised."
    return ConfigError(message, where=str(folder), got=names, hint=hint)


def _read_transformers(kind: Any, folder: Path, held: Mapping[str, Any]) -> Any:
    """The configuration, without what would choose code."""
    try:
        return kind.config_class.from_dict(_without_code(held))
    except Exception as error:  # of any class of transformers
        raise damaged(str(folder / CONFIGURATION), f"{type(error).__name__}: {error}") from error


def _without_code(held: Any) -> Any:
    """What a configuration holds, and those in it, without the entries that choose code."""
    if not isinstance(held, Mapping):
        return held
    return {key: _without_code(value) for key, value in held.items() if not _CODE.fullmatch(str(key))}


def _require_known(known: Mapping[str, Any], given: Mapping[str, Any], folder: Path, within: str = "") -> None:
    legal = {*known, "num_labels"} if "id2label" in known else {*known}
    if unknown := next((key for key in given if key not in legal), None):
        hint = nearest(unknown, legal) or f"It has: {', '.join(sorted(legal))}."
        message = f"The configuration of `{folder}` has no {unknown!r}{within}."
        raise ConfigError(message, where=str(folder), got=unknown, hint=hint)
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(held := known.get(key), Mapping) and "model_type" in held:
            _require_known(held, value, folder, f" in {key!r}")


def _changed(read: Any, given: Mapping[str, Any]) -> Any:
    """A configuration of transformers with other entries; of a configuration in it, the entries that are not given stay."""
    entries, configuration = read.to_dict(), type(read)
    if given.get("num_labels", read.num_labels) != read.num_labels:
        entries = {key: value for key, value in entries.items() if key not in ("id2label", "label2id")}
    computed = configuration.from_dict({key: value for key, value in entries.items() if key not in _COMPUTED}).to_dict()
    for key in _COMPUTED:
        if key in entries and entries[key] == computed.get(key):
            del entries[key]
    for key, value in given.items():
        within = isinstance(value, Mapping) and hasattr(getattr(read, key, None), "to_dict")
        entries[key] = {**entries[key], **value} if within else value
    return configuration.from_dict(entries)


def _with_weights(
    kind: Any, folder: Path, configuration: Any, trust: Sequence[str]
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model of transformers, which renames what older files name otherwise; pickles are read by our own reader."""
    file, place = _file_of_weights(folder), None
    notes: tuple[str, ...] = ()
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if ".bin" in file.name:
        options["state_dict"], notes = read_state_dict(file, trust=trust)
        kinds = {key: value.dtype for key, value in options["state_dict"].items()}
    else:
        place, kinds = str(folder), read_kinds(file)
        options |= {"local_files_only": True, "use_safetensors": True}
    if rounded := [key for key, kind in kinds.items() if key.endswith("weight") and kind not in FLOATS]:
        raise _quantised(folder, rounded)
    try:
        with _bounded(folder):
            module, found = kind.from_pretrained(place, config=configuration, **options)
    except ConfigError:
        raise
    except Exception as error:  # of transformers, safetensors or torch
        message = f"The weights of `{folder}` cannot be loaded: {first_lines(error)}"
        raise ConfigError(message, where=str(file), hint="Copy or download the folder again.") from error
    for value in (
        *module.parameters(),
        *module.buffers(),
    ):  # they lie in the file, or two of a pickle in the same memory
        value.data = value.data.clone()
    if other := sorted(found["mismatched_keys"]):
        shown = _list([f"{key} (file {tuple(file)}, model {tuple(model)})" for key, file, model in other])
        message = f"{len(other)} of the tensors in `{file}` have other shapes than {CONFIGURATION} says: {shown}."
        hint = f"Restore the {CONFIGURATION} that was saved with them: model.save_pretrained(…)."
        raise ConfigError(message, where=str(file), got=[key for key, *_ in other], hint=hint)
    if lacking := sorted(found["missing_keys"]):
        hint = "Save the model again, whole: model.save_pretrained(…). To begin with new weights, build it in a file of your own."
        message = f"`{file}` lacks {len(lacking)} of the tensors of {kind.__name__}: {_list(lacking)}."
        raise ConfigError(message, where=str(file), got=lacking, hint=hint)
    if unused := sorted(found["unexpected_keys"]):
        notes += (f"weights: {len(unused)} of the folder's tensors are of no use here: {_list(unused)}",)
    kept = str(getattr(configuration, "dtype", None) or "float32").removeprefix("torch.")
    return module, notes if kept == "float32" else (*notes, f"weights: {kept} in the folder, float32 here")


def _list(names: Sequence[str], most: int = 5) -> str:
    return f"{', '.join(names[:most])}{', …' if names[most:] else ''}"


def _build_from_timm_folder(
    folder: Path, held: Mapping[str, Any], arguments: Mapping[str, Any], weights: bool, trust: Sequence[str]
) -> tuple[nn.Module, tuple[str, ...]]:
    own = held.get("model_args")
    kept = {key: value for key, value in own.items() if not key.startswith(FETCHING)} if isinstance(own, dict) else {}
    given = {**kept, "num_classes": held.get("num_classes", 1000), **arguments}
    with nullcontext() if arguments or not weights else _bounded(folder):
        module: Any = build_timm(str(held["architecture"]), given)
    preset = held.get("pretrained_cfg")
    names = {"label_names": held["label_names"]} if "label_names" in held else {}
    module.pretrained_cfg = {**module.pretrained_cfg, **(preset if isinstance(preset, dict) else {}), **names}
    if arguments or not weights:
        return module, ()
    return module, load_weights(module, _file_of_weights(folder), trust=trust)


def _file_of_weights(folder: Path) -> Path:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        message = f"`{folder}` has no weights: none of {', '.join(_WEIGHTS)}."
        raise ConfigError(message, where=str(folder), hint="Copy or download all files of the model again.")
    return found


def _bounded(folder: Path) -> Bounded:
    """A number takes a byte or more, so the files of weights bound the model's size."""
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    return Bounded(str(folder / CONFIGURATION), sum(file.stat().st_size for file in files))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars and warnings: what they say, our notes and errors say."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
