"""Run directories as models: what `distill` and `train` wrote, loaded again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.loading.file_kinds import CONFIGURATION, is_model_folder, read_configuration
from indistill_fx.loading.input_facts import InputFacts, remember
from indistill_fx.loading.inputs import describe_inputs
from indistill_fx.loading.libraries import FETCHING
from indistill_fx.loading.load import Source, load_parsed, load_source
from indistill_fx.loading.spec import LARGEST_IN_A_FILE, Spec, is_input_size, parse_spec
from indistill_fx.loading.state_dicts import count_numbers, load_weights
from indistill_fx.runs.directory import BEST, EXPORT, LAST, MOST_BYTES, STUDENT
from indistill_fx.runs.model_facts import TRAINED, as_object, facts_in, inputs_in, with_facts
from indistill_fx.runs.saved_outputs import is_saved_outputs, load_outputs
from indistill_fx.runs.signature import is_signed, sign
from indistill_fx.system.bounded import Bounded
from indistill_fx.system.files import read_json, save_json
from indistill_fx.system.tensor_files import text_digest

if TYPE_CHECKING:
    from torch import nn

    from indistill_fx.data.dataset import Data


_OURS = ("indistill_fx.demo:DigitsTeacher", "indistill_fx.demo:DigitsStudent")
_SAYS_NOTHING = ("transformers_version", "dtype", "torch_dtype", "_name_or_path")
"""Entries of a configuration that do not change what the model computes in float32."""


def is_run(spec: str) -> bool:
    """Whether a spec is a run directory."""
    return os.path.exists(Path(spec) / "run.json")


def absolute(spec: str) -> str:
    """A model spec that means the same from any working directory: files in it by their full path."""
    parsed = parse_spec(spec)
    place, at, weights = parsed.place, "@" if parsed.weights else "", parsed.weights
    if not os.path.exists(place) and not weights:
        return spec
    entry = f"?entry={parsed.entry}" if parsed.entry else ""
    head = spec.removesuffix(f"{at}{weights}{entry}")
    if os.path.exists(place):
        head = str(Path(place).resolve()) + head.removeprefix(place)
    return f"{head}{at}{Path(weights).resolve() if os.path.exists(weights) else weights}{entry}"


def about(model: str, data: str, input_size: tuple[int, ...], example: Any = None, **more: Any) -> dict[str, Any]:
    """What a run must keep so that its model can be built again and run: the `about` of `distill` and `train`.

    Args:
        model: spec; of a run directory the model that it names is kept, with its seal, so that the new run does not depend on the old one.
        data: spec.
        input_size: of one sample.
        example: inputs, where a size does not say it all.
        more: further facts.
    """
    kept = _about(Path(model))[0] if is_run(model) else {}
    spec = kept["model"] if is_run(model) else absolute(model)
    folder = kept.get("folder") if is_run(model) else _folder_of(spec)
    texts = describe_inputs(example) if example is not None else []
    says_it_all = "x".join(("float32", *map(str, input_size)))
    inputs = {"inputs": texts} if texts not in ([], [says_it_all]) else {}
    return {
        "model": spec,
        "seal": kept.get("seal") if is_run(model) else sign(parse_spec(spec)),
        **({"folder": folder} if folder else {}),
        "data": data,
        "input_size": list(input_size),
        **inputs,
        **more,
    }


def _folder_of(spec: str) -> dict[str, str] | None:
    """Which folder a model is built from, and by which configuration: weights do not tell that. None for other models."""
    place = Path(parse_spec(spec).place)
    if not is_model_folder(place):
        return None
    entries = {key: value for key, value in read_configuration(place).items() if key not in _SAYS_NOTHING}
    return {"place": str(place), "configuration": text_digest(entries)}


def _require_folder(run: Path, spec: str, kept: object) -> None:
    """Refuse to build a run's model from a folder that is gone, or says now that it is another one."""
    place, known = as_object(kept).get("place"), as_object(kept).get("configuration")
    if not (isinstance(place, str) and isinstance(known, str) and spec.startswith(place)):
        return
    if not is_model_folder(Path(place)):
        what, named = "is not there any more", f"FOLDER{spec.removeprefix(place).partition('@')[0]}"
        hint = f"Put it back, or name it where it is now. {_by_hand(run, named)}"
    elif as_object(_folder_of(place)).get("configuration") != known:
        what, hint = f"has another {CONFIGURATION} than when that run began", "Restore that file."
    else:
        return
    raise ConfigError(
        f"`{place}`, which the model of {run} is built from, {what}.", where=str(run), got=spec, hint=hint
    )


def runs_code(spec: Spec) -> bool:
    """Whether to build a model from a spec is to run code that it names, or to fetch what it names."""
    if any(name.startswith(FETCHING) for name in spec.arguments):
        return True
    ours = f"{spec.place}:{spec.name}" in _OURS and not spec.arguments
    return bool(spec.name) and not ours and spec.place not in ("torchvision", "timm")


def keep_export(run: str | os.PathLike[str], **measured: Any) -> str | None:
    """Leave in a run directory what its export measured: export.json, which reports show. Later numbers go beside earlier ones.

    Args:
        run: the directory.
        measured: such as size, parameters, macs, latency_ms, int8_size, int8_value. What is None is not known.

    Returns:
        Why it could not be written, or None.
    """
    path = Path(run) / EXPORT
    try:
        before = read_json(path, MOST_BYTES)
    except (OSError, ValueError, RecursionError):
        before = {}
    kept = before if isinstance(before, dict) else {}
    try:
        save_json(path, kept | {key: value for key, value in measured.items() if value is not None})
    except TrainError as error:
        return f"{error} Reports of this run will lack the export's numbers."
    return None


def about_data(data: Data) -> dict[str, Any]:
    """What whoever deploys the model must know of the data it was trained on: class names and normalisation."""
    return {"classes": list(data.classes), "normalisation": data.normalisation}


def run_fingerprint(path: str | os.PathLike[str]) -> str:
    """Which run it was: when it started, and the digest of what it ended with."""
    try:
        record = as_object(read_json(Path(path) / "run.json", MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return "?"
    started, digest = record.get("started"), as_object(record.get("result")).get("digest")
    started_text = started if isinstance(started, str) else "?"
    return f"{started_text[:40]} {digest[:16] if isinstance(digest, str) else ''}".strip()


def task_in(run: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """What labels mean, as a run keeps it; None where it is not known."""
    try:
        record = as_object(read_json(Path(run) / "run.json", MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return as_object(as_object(record.get("about")).get("labels")) or None


def _by_hand(folder: Path, model: str = "MODEL") -> str:
    """A hint how to give the model by hand if run.json lacks it; names only weights that exist."""
    weights = next((folder / name for name in (STUDENT, BEST) if os.path.isfile(folder / name)), None)
    if weights is None:
        return f"It has no weights of a trained model either ({STUDENT}): name another directory."
    return f"Give the model and the weights: {shlex.quote(f'{model}@{weights}')}."


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"it is a {type(value).__name__}")
    return value


def _about(folder: Path) -> tuple[dict[str, Any], str, tuple[Any, ...]]:
    """What run.json says of the model: all of it, the spec, and the size of an input.

    Raises:
        ConfigError: it does not say these.
    """
    try:
        kept = read_json(folder / "run.json", MOST_BYTES)["about"]
        kept = kept | _moved(folder, _text(kept["model"]), kept.get("seal"))
        return kept, kept["model"], tuple(kept["input_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{folder / 'run.json'} does not say which model was trained.",
            where=str(folder),
            hint=_by_hand(folder),
        ) from error


def _moved(folder: Path, model: str, seal: object) -> dict[str, Any]:
    """Model and seal of a run whose own student.py, unchanged, was moved together with it; of any other run, nothing."""
    if "student.py:" not in model or is_signed(parsed := parse_spec(model), seal):
        return {}
    own = _own_student(folder)
    if own is None or not is_signed(parsed, seal, own):
        return {}
    here = f"{own.resolve()}{model.removeprefix(parsed.place)}"
    return {"model": here, "seal": sign(parse_spec(here))}


def _own_student(folder: Path) -> Path | None:
    """The student.py in a run's folder, or beside its folder, as `compress --qat` leaves it."""
    places = (folder / "student.py", folder.parent / "student.py")
    return next((place for place in places if place.is_file() and place.stat().st_size <= MOST_BYTES), None)


def made_by(spec: str) -> str:
    """The spec of the model that a run directory's training began with; any other spec as it is."""
    return _about(Path(spec))[1] if is_run(spec) else spec


def load(spec: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> nn.Module:
    """Load a model.

    Args:
        spec: `model.pt`, `program.pt2`, `model.onnx`, `models.py:make`, `torchvision:NAME` or `timm:NAME`, each with `@weights` if needed;
            the directory of a finished run, for the model that was trained there; or `saved:DIR`, what `save_outputs` wrote, as a
            teacher. A path may also be a `Path`.
        trust: packages whose classes a model file may name. Their code is run, so name only packages of files that you trust.

    Returns:
        The module, with the training flags that its source gave it.

    Raises:
        ConfigError: the spec, the file or the run is at fault.
        FrontendError: your own function fails, or pretrained weights cannot be downloaded.

    Examples:
        >>> import indistill_fx as ifx
        >>> model = ifx.load("torchvision:resnet18?num_classes=10")
        >>> model.fc.out_features
        10
    """
    return open_source(os.fspath(spec), trust=trust).module


def open_source(spec: str, *, trust: Sequence[str] = ()) -> Source:
    """The model of a spec, of a run directory or of saved outputs, with what is known of it; arguments and errors as of `load`."""
    if is_saved_outputs(spec):
        return load_outputs(spec)
    return load_run(spec, trust=trust) if is_run(spec) else with_facts(load_source(spec, trust=trust))


def trained_here(source: Source) -> bool:
    """Whether a model is a run's, or a `student.py` or an ONNX file that knows what it was trained on.

    It needs images as they were then.
    """
    states = source.kind == "ONNX file" and source.wanted_normalisation is not None
    return is_run(source.spec) or source.kind == TRAINED or states


def load_run(path: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> Source:
    """The trained model of a run directory.

    Args:
        path: the directory.
        trust: see `load`.

    Raises:
        ConfigError: the run has not finished, was not started from the command line (then it does not know its model), or
            names code that this user did not start it with.
    """
    folder = Path(path)
    kept, spec, size = _about(folder)
    if not is_input_size(size, most=LARGEST_IN_A_FILE):
        raise ConfigError(
            f"{folder / 'run.json'} says that an input has the size {str(size)[:60]}, which is impossible.",
            where=str(folder),
            got=str(size)[:60],
            hint=_by_hand(folder),
        )
    try:
        facts = facts_in(kept, size)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{folder / 'run.json'} describes impossible classes, normalisation or logits: {error}.",
            where=str(folder),
            got=str(error),
            hint=_by_hand(folder),
        ) from error
    weights = folder / STUDENT
    _require_folder(folder, spec, kept.get("folder"))
    _require_own_code(folder, spec, kept.get("seal"))
    if not weights.exists():
        reached = f"it has reached {LAST}" if (folder / LAST).exists() else "it has no checkpoint"
        raise ConfigError(
            f"The run in {folder} has no {weights.name}; {reached}.", where=str(folder), hint="Finish it with --resume."
        )
    # The constructor of a library's model gets arguments from run.json.
    parsed = parse_spec(spec)
    of_folder = is_model_folder(Path(parsed.place))
    library = (bool(parsed.name) or of_folder) and not runs_code(parsed)
    with Bounded(str(folder / "run.json"), count_numbers(weights)) if library else nullcontext():
        # Of a model's folder only the configuration is needed.
        start = replace(parsed, weights=str(weights), entry="") if of_folder else parsed
        source = load_parsed(start, trust=trust)
    notes = () if of_folder else load_weights(source.module, weights)
    wanted = (size[1], size[2]) if len(size) == 3 else None
    remember(source.module, InputFacts(size, facts.normalisation, wanted, facts.normalisation, facts.classes))
    return replace(
        source,
        spec=str(folder),
        input_size=size,
        example_inputs=inputs_in(kept, folder / "run.json", hint=_by_hand(folder)),
        normalisation=facts.normalisation or source.normalisation,
        wanted_size=wanted,
        wanted_normalisation=facts.normalisation,
        classes=facts.classes,
        logits=facts.logits,
        task=facts.task,
        notes=(*source.notes, *notes),
    )


def _require_own_code(folder: Path, spec: str, seal: object) -> None:
    """Refuse code that this user did not start the run with."""
    if runs_code(parse_spec(spec)) and not is_signed(parse_spec(spec), seal):
        parsed = parse_spec(spec)
        file = os.path.isfile(parsed.place)  # else it may name any function there is, and is not to be pasted
        named = spec.removesuffix(f"@{parsed.weights}") if file else "models.py:make"
        if not file and parsed.place.endswith("student.py") and (own := _own_student(folder)) is not None:
            named = f"{own}:Student"
        gone = "was moved" if parsed.place.endswith(".py") and not file else "has changed"
        reason = f"{gone} since that run began, or another user or machine began it"
        if not seal:
            reason = "nothing proves that you began that run (no proof can be kept without a home folder that can be written)"
        raise ConfigError(
            f"{parsed.place if file else repr(spec)} makes the model of {folder}, and {reason}, so it was not run.",
            where=str(folder),
            got=spec,
            hint=f"If you trust that code, name it yourself. {_by_hand(folder, named)}",
        )
