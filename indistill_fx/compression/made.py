"""The student that `compress` has made, in its directory: written before it is trained, and read again where a run is resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from torch import nn

from indistill_fx.compression.correspond import plan_if_any
from indistill_fx.compression.make_student import Step, Untrained
from indistill_fx.compression.write_source import SOURCE, overwritten, source_of
from indistill_fx.errors import ConfigError, ExportError
from indistill_fx.graph.module_state import device_of
from indistill_fx.loading.spec import Spec, parse_spec
from indistill_fx.passes.capture.trace import trace
from indistill_fx.plan import AlignmentPlan
from indistill_fx.runs.directory import (
    AVERAGE,
    BEST,
    COMPRESSION,
    EXPORT,
    LAST,
    MOST_BYTES,
    PLAN,
    STUDENT,
    kept_plan,
)
from indistill_fx.runs.load import load
from indistill_fx.runs.model_facts import FACTS, facts_of, keep_facts
from indistill_fx.runs.signature import is_signed, sign
from indistill_fx.system.files import make_folder, read_json, save_json, shown
from indistill_fx.traced import TracedModel

START = "start.safetensors"
_WRITTEN = (
    *(START, STUDENT, AVERAGE, PLAN, FACTS, EXPORT, LAST, BEST),
    *("metrics.jsonl", "student.onnx", "student.onnx.data", "student.pt2"),
)
"""What a compression and its training write, beside the student's source code, compress.json and run.json."""
_KEPT = ("widths", "sensitivity", "repaired")
"""What compress.json keeps of the student from its making on."""
_STEPS = TypeAdapter(tuple[Step, ...], config=ConfigDict(allow_inf_nan=False, extra="forbid"))


@dataclass(frozen=True)
class Made:
    """A student, its plan, what each step cost, the spec of its source code (empty where it has none), and what is kept of its making."""

    student: nn.Module
    traced: TracedModel
    plan: AlignmentPlan | None
    steps: tuple[Step, ...]
    spec: str
    kept: Mapping[str, Any]


def input_size(model: TracedModel) -> tuple[int, ...]:
    """Of one sample, of the first input that is a tensor."""
    return tuple(model.example.tensors[0].shape[1:])


def check_free(folder: Path, resume: bool) -> None:
    """Refuse a folder whose content would be overwritten.

    Raises:
        ConfigError: it holds a run, and `resume` is false; or files that are not of a compression, or a student.py that was changed.
    """
    if not resume and any((folder / name).exists() for name in (COMPRESSION, "run.json")):
        raise ConfigError(
            f"{shown(folder)} already holds a run.",
            where=str(folder),
            hint="Continue it with resume=True (--resume), or give another directory.",
        )
    if not (folder / COMPRESSION).exists():
        for name in (SOURCE, *_WRITTEN):
            if os.path.lexists(folder / name):
                raise overwritten(folder / name)
    if (folder / SOURCE).exists() and _saved(folder).get("source") != _digest_of_source(folder):
        raise overwritten(folder / SOURCE)


def _saved(folder: Path) -> dict[str, Any]:
    """What compress.json says; nothing where it is absent or damaged."""
    try:
        found = read_json(folder / COMPRESSION, MOST_BYTES)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_made(
    folder: Path, identity: Mapping[str, Any], model: TracedModel, logits: str | int | None = None
) -> Made | None:
    """The student that an interrupted run had made; None if it must be made again. `logits`: as for `trace`."""
    saved = _saved(folder)
    try:
        steps, made = _STEPS.validate_python(saved["steps"], strict=False), saved["made"]
        complete = type(made) is int and 0 < made <= len(steps) and {"identity", *_KEPT} <= saved.keys()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not complete:
        return None
    if saved["identity"] != identity:
        raise ConfigError(
            f"{folder} holds a compression with another teacher, budget or settings.",
            where=str(folder),
            hint="Continue with the same teacher, budget and settings, or give another directory.",
        )
    spec = f"{folder / SOURCE}:Student"
    if not (folder / SOURCE).exists():
        return None
    if saved.get("source") != _digest_of_source(folder):
        raise overwritten(folder / SOURCE)
    if not is_signed(_signed_spec(folder), saved.get("seal")):
        return None
    student = load(f"{spec}@{folder / START}").to(device_of(model.graph_module))
    traced = trace(student, model.example, role="student", logits=logits)
    return Made(
        student,
        traced,
        kept_plan(folder),
        steps[:made],
        spec,
        {key: saved[key] for key in (*_KEPT, "source") if key in saved},
    )


def _signed_spec(folder: Path) -> Spec:
    """The student's source code, by a name that is the same however the folder is written."""
    return parse_spec(f"{(folder / SOURCE).resolve()}:Student")


def _digest_of_source(folder: Path) -> str:
    return sha256((folder / SOURCE).read_bytes()).hexdigest()


def write_made(
    folder: Path,
    model: TracedModel,
    untrained: Untrained,
    identity: Mapping[str, Any],
    every_block: bool,
    described: Mapping[str, Any],
    say: Callable[[str], None],
    logits: str | int | None = None,
    task: Mapping[str, Any] | None = None,
) -> Made:
    """Write the student as source code, its weights, the plan, and the report. `logits`: as for `trace`; `task`: as plain values."""
    spec = ""
    student: nn.Module = untrained.model.graph_module
    try:
        source = source_of(untrained.model)
    except ExportError as error:
        say(f"No source code: {error} The result will be an exported program.")
        make_folder(folder)
        save_json(folder / COMPRESSION, {})
        traced = replace(untrained.model, role="student")
    else:
        make_folder(folder)
        # First of all: a run that is killed after it knows the file for its own.
        save_json(folder / COMPRESSION, {"source": sha256(source.text.encode()).hexdigest()})
        source.save(folder)
        of_data = described.get("classes") or (), described.get("normalisation")
        sides = size[1:] if len(size := input_size(model)) == 3 else None
        keep_facts(folder, facts_of(*of_data, example=model.example, wanted_size=sides, logits=logits, task=task))
        os.replace(folder / STUDENT, folder / START)  # `student.safetensors` is reserved for the trained student
        spec, student = f"{folder / SOURCE}:Student", source.build().to(device_of(model.graph_module))
        traced = trace(student, model.example, role="student", logits=logits)
    plan = plan_if_any(model, traced, untrained.shrunk.axes, every_block=every_block)
    if plan is not None:
        plan.save(folder / PLAN)
    else:
        say("No layers can be paired, so there is no warm-up.")
    curves = [asdict(curve) for curve in untrained.curves]
    repaired = asdict(untrained.repaired) if untrained.repaired is not None else None
    widths = {path: list(pair) for path, pair in untrained.shrunk.widths.items()}
    kept: dict[str, Any] = {"widths": widths, "sensitivity": curves, "repaired": repaired}
    kept |= {"source": _digest_of_source(folder)} if spec else {}
    save_made(folder, identity, untrained.steps, len(untrained.steps), spec, **kept)
    count = len(plan.pairs) if plan is not None else 0
    say(f"{count} pair{'s' * (count != 1)}; widths, sensitivities and repairs are in {shown(folder / COMPRESSION)}")
    return Made(student, traced, plan, untrained.steps, spec, kept)


def save_made(
    folder: Path, identity: Mapping[str, Any], steps: Iterable[Step], made: int, spec: str, **more: Any
) -> None:
    """Write compress.json.

    Args:
        folder: the run's.
        identity: of the compression: a resumed run must have the same.
        steps: the student after each.
        made: how many of these come before the training.
        spec: of the source code; empty where there is none.
        more: what is kept of the student's making.
    """
    signature = sign(_signed_spec(folder)) if spec else None
    record = {"identity": dict(identity), "seal": signature, "made": made, "steps": [asdict(step) for step in steps]}
    save_json(folder / COMPRESSION, record | more)
