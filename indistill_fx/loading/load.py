"""From a model spec, the same in every command, to a module.

Nothing of a model file is run, unless it names a package that the user trusts; the user's own code is run, of course.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indistill_fx.errors import ConfigError
from indistill_fx.loading.file_kinds import recognise
from indistill_fx.loading.spec import MODEL_FORMS, Spec, parse_spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from indistill_fx.loading.input_facts import InputFacts, Normalisation


@dataclass(frozen=True)
class Source:
    """A loaded model and what its source knows of it.

    Args:
        module: the model, with the training flags its source gave it.
        spec: the string it was loaded from.
        kind: `module file`, `exported program`, `ONNX file`, `factory`, `torchvision`, `timm` or `model folder`; `student`: a
            factory in a student.py whose data are known.
        example_inputs: inputs the source has, batch included.
        input_size: the shape of one input sample, such as (3, 224, 224).
        normalisation: mean and standard deviation per channel that its inputs are normalised by, as its library does.
        wanted_size: height and width that it wants, because its weights were made for them or because it takes no others.
        wanted_normalisation: mean and standard deviation that its weights want; None where that is not known.
        classes: their names by label, if the source knows them.
        logits: key or index of the logits among several outputs, if the source knows it.
        task: what its labels mean, as its run or its file keeps it (`evaluation.kept_task`); None where that is not known.
        notes: what was trusted, unwrapped or dropped on the way.
    """

    module: nn.Module
    spec: str
    kind: str
    example_inputs: tuple[Tensor, ...] | None = None
    input_size: tuple[int, ...] | None = None
    normalisation: Normalisation | None = None
    wanted_size: tuple[int, int] | None = None
    wanted_normalisation: Normalisation | None = None
    classes: tuple[str, ...] = ()
    logits: str | int | None = None
    task: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def load_source(spec: str, *, trust: Sequence[str] = ()) -> Source:
    """Load a model together with what its source knows of it.

    Args:
        spec: where it comes from; see this module's head.
        trust: packages whose classes a model file may name. Only for files you trust: such code is run.

    Returns:
        The module, its input's shape and normalisation where they are known, and notes.

    Raises:
        ConfigError: the spec or the file is at fault.
        FrontendError: the user's factory fails, or pretrained weights cannot be downloaded.
    """
    return load_parsed(parse_spec(spec), trust=trust)


def load_parsed(parsed: Spec, *, trust: Sequence[str] = ()) -> Source:
    """Load the model of a spec that was taken apart; the rest as of `load_source`."""
    _require_packages(trust)
    with _importable(trust):
        source = _load_place(parsed, trust)
        if parsed.weights:
            from indistill_fx.loading.state_dicts import load_weights

            notes = load_weights(source.module, Path(parsed.weights), entry=parsed.entry, trust=trust)
            source = replace(source, notes=(*source.notes, *notes))
    return source


def _importable(trust: Sequence[str]) -> AbstractContextManager[None]:
    """Within the block, look for trusted packages that are not installed in the working directory."""
    from indistill_fx.loading.user_models import is_installed
    from indistill_fx.system.user_code import importable_last

    return nullcontext() if all(map(is_installed, trust)) else importable_last(Path.cwd())


def _load_place(parsed: Spec, trust: Sequence[str]) -> Source:
    if not parsed.name:
        return _load_file(parsed, trust)
    if parsed.place == "onnxruntime":
        return _load_onnx(Path(parsed.name), parsed, black_box=True)
    if parsed.place in ("torchvision", "timm"):
        return _build_by_name(parsed)
    from indistill_fx.loading.input_facts import describe_module
    from indistill_fx.loading.user_models import build_by_factory

    module = build_by_factory(parsed.place, parsed.name, parsed.arguments)
    return _with_facts(Source(module, parsed.text, "factory"), describe_module(module))


def _require_packages(trust: Sequence[str]) -> None:
    for package in [trust] if isinstance(trust, str) else trust:
        if isinstance(trust, str) or not all(part.isidentifier() for part in package.split(".")):
            hint = "Give packages by name: --trust mypackage, or trust=['mypackage']."
            raise ConfigError(
                f"{package!r} cannot be trusted: it is not a list of packages.", where="--trust", hint=hint
            )


def _load_file(parsed: Spec, trust: Sequence[str]) -> Source:
    from indistill_fx.loading.file_kinds import count_safetensors, is_model_folder

    path = Path(parsed.place)
    if is_model_folder(path):
        return _build_by_folder(path, parsed, trust)
    if not os.path.exists(path) and path.name == parsed.place and not path.suffix:
        hint = f"Check the path. A model of a library is named with the library: torchvision:{path} or timm:{path}."
        raise ConfigError(
            f"There is no file or run directory `{path}`.", where=parsed.text, expected=MODEL_FORMS, hint=hint
        )
    kind = recognise(path)
    if kind == "safetensors":
        raise _only_weights(path, count_safetensors(path))
    if kind == "onnx":
        return _load_onnx(path, parsed)
    if kind == "export":
        return _load_exported(path, parsed.text, trust)
    return _load_module_file(path, parsed, trust)


def _load_exported(path: Path, text: str, trust: Sequence[str]) -> Source:
    from indistill_fx.loading.pt2 import load_exported, runs_in_training_mode

    module, inputs = load_exported(path, trust=trust)
    mode = "training" if runs_in_training_mode(module) else "inference"
    size = tuple(inputs[0].shape[1:]) if inputs is not None and len(inputs) == 1 and inputs[0].dim() > 1 else None
    note = f"an exported program: it stays in the {mode} mode it was exported in"
    return Source(module, text, "exported program", example_inputs=inputs, input_size=size, notes=(note,))


def _load_onnx(path: Path, parsed: Spec, *, black_box: bool = False) -> Source:
    from indistill_fx.loading.input_facts import InputFacts
    from indistill_fx.loading.inputs import parse_input
    from indistill_fx.loading.onnx.models import convert_file, run_file

    if parsed.weights:
        hint = "Its weights are in the file."
        raise ConfigError(f"No weights can be loaded into the ONNX file `{path}`.", where=parsed.text, hint=hint)
    legal = ("input", "taps") if black_box else ("input",)
    if unknown := next((name for name in parsed.arguments if name not in legal), None):
        hint = f"Choose from: {', '.join(legal)}."
        raise ConfigError(f"An ONNX file takes no argument {unknown!r}.", where=parsed.text, got=unknown, hint=hint)
    if (kind := recognise(path)) != "onnx":
        raise ConfigError(
            f"`{path}` is not an ONNX file.",
            where=parsed.text,
            got=kind,
            hint="Name a file that an ONNX exporter wrote.",
        )
    size = parsed.arguments.get("input")
    shape = parse_input(str(size)).shape if size is not None else None
    taps = [name for name in str(parsed.arguments.get("taps", "")).split(",") if name]
    made = run_file(path, taps, shape) if black_box else convert_file(path, shape)
    stated = made.stated
    facts = InputFacts(made.input_size, stated.normalisation, made.fixed_size, stated.normalisation, stated.classes)
    source = Source(made.module, parsed.text, "ONNX file", example_inputs=made.example_inputs, notes=made.notes)
    return replace(_with_facts(source, facts), logits=stated.logits, task=stated.task)


def _load_module_file(path: Path, parsed: Spec, trust: Sequence[str]) -> Source:
    from torch import nn

    from indistill_fx.loading.input_facts import describe_module
    from indistill_fx.loading.pickle_scan import find_entry
    from indistill_fx.loading.safe_pickle import open_saved

    label = str(path)
    with path.open("rb") as file, open_saved(file, label, trust=trust) as saved:
        held = find_entry(saved.root, "" if parsed.weights else parsed.entry, label)
        described, notes = _find_module(held)
        if described is None:
            tensors = _count_tensors(held)
            if not tensors:
                saved.make(held)  # raises an error that names what is not on the allow list
            raise _only_weights(path, tensors, parsed.entry)
        module = saved.make(described)
        notes = (*notes, *saved.describe_trusted(described))
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"`{label}` holds a {type(module).__name__}, not a module.",
            where=label,
            hint="Name a function or class that gives a torch.nn.Module.",
        )
    module, unwrapped = _unwrap(module, label)
    source = Source(module, parsed.text, "module file", notes=(*notes, *unwrapped))
    return _with_facts(source, describe_module(module))


def _find_module(root: Any) -> tuple[Any, tuple[str, ...]]:
    """The description of the module in a file: the whole content, or an entry of a checkpoint; None if there is none."""
    from indistill_fx.loading.pickle_scan import Made, entries
    from indistill_fx.loading.state_dicts import WRAPPERS, say_others

    if isinstance(root, Made) and root.is_module:
        return root, ()
    found = entries(root) or {}
    for key in WRAPPERS:
        held = found.get(key)
        if isinstance(held, Made) and not held.is_tensor and entries(held) is None:
            others = [
                str(other)[:60]
                for other, value in found.items()
                if other != key and isinstance(value, Made) and value.is_module
            ]
            beside = say_others(others)
            return held, (f"the model was taken from {key!r} of the checkpoint{beside}",)
    return None, ()


def _count_tensors(root: Any) -> int:
    """How many tensors a checkpoint holds, directly and in its mappings one level down."""
    from indistill_fx.loading.pickle_scan import Made, entries

    held = [*(entries(root) or {}).values()]
    held += [item for value in held for item in (entries(value) or {}).values()]
    return sum(isinstance(item, Made) and item.is_tensor for item in held)


def _unwrap(module: nn.Module, label: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The model inside a wrapper that matters only in training."""
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

    if not isinstance(module, (nn.DataParallel, AveragedModel)):
        return module, ()
    wrapper, inner = type(module).__name__, vars(module)["_modules"].get("module")
    if inner is None:
        raise ConfigError(
            f"`{label}` holds a {wrapper} wrapper with nothing in it.",
            where=label,
            hint="Save the module that was wrapped.",
        )
    return inner, (f"taken out of its {wrapper} wrapper",)


def _build_by_name(parsed: Spec) -> Source:
    from indistill_fx.loading.input_facts import describe_module, describe_torchvision
    from indistill_fx.loading.libraries import build_timm, build_torchvision

    if parsed.place == "timm":
        module = build_timm(parsed.name, parsed.arguments)
        pretrained = bool(parsed.arguments.get("pretrained")) and not parsed.weights
        facts = describe_module(module, pretrained=pretrained)
        if not pretrained and not parsed.weights:  # random weights have no normalisation that they were trained with
            facts = replace(facts, wanted_normalisation=None)
    else:
        module = build_torchvision(parsed.name, parsed.arguments)
        facts = describe_torchvision(parsed.name, {} if parsed.weights else parsed.arguments, module)
    return _with_facts(Source(module, parsed.text, parsed.place), facts)


def _build_by_folder(path: Path, parsed: Spec, trust: Sequence[str]) -> Source:
    from indistill_fx.loading.file_kinds import PREPROCESSING, read_configuration
    from indistill_fx.loading.input_facts import describe_configuration, describe_module
    from indistill_fx.loading.libraries import build_from_folder

    module, notes = build_from_folder(path, parsed.arguments, weights=not parsed.weights, trust=trust)
    pretrained = not (parsed.arguments or parsed.weights)
    if "architectures" in read_configuration(path):
        held: Any = module.config
        facts = describe_configuration(held.to_dict(), read_configuration(path, PREPROCESSING), pretrained=pretrained)
    else:
        facts = describe_module(module, pretrained=pretrained)
        facts = facts if pretrained else replace(facts, wanted_normalisation=None)
    return _with_facts(Source(module, parsed.text, "model folder", notes=notes), facts)


def _with_facts(source: Source, facts: InputFacts) -> Source:
    from indistill_fx.loading.input_facts import remember

    remember(source.module, facts)
    return replace(
        source,
        input_size=facts.size,
        normalisation=facts.normalisation,
        wanted_size=facts.wanted_size,
        wanted_normalisation=facts.wanted_normalisation,
        classes=facts.classes,
    )


def _only_weights(path: Path, tensors: int, entry: str = "") -> ConfigError:
    if not tensors:
        message = f"`{path}` holds neither a module nor a state dict{f' under {entry!r}' if entry else ''}."
        return ConfigError(message, where=str(path), hint="Save the model whole: torch.save(model, path).")
    file = f"{path}?entry={entry}" if entry else path
    return ConfigError(
        f"`{file}` is a state dict of {tensors} tensors: weights without the model they belong to.",
        where=str(path),
        got="a state dict",
        hint=f"Name the model before it: torchvision:NAME@{file} or models.py:make_model@{file}.",
    )
