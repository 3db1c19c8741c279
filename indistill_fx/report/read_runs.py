"""Run directories as a report reads them: whatever is there, and a sentence on all that is not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from indistill_fx.errors import ConfigError
from indistill_fx.loading.state_dicts import count_numbers
from indistill_fx.plan import AlignmentPlan
from indistill_fx.report.compressed import Compressed, read_compressed
from indistill_fx.report.values import finite, listed, mapped
from indistill_fx.report.work import NO_WORK, Work
from indistill_fx.runs.directory import EXPORT, MOST_BYTES, STUDENT
from indistill_fx.runs.record import MetricFacts
from indistill_fx.system.files import read_json, read_lines
from indistill_fx.version import __version__

MOST_METRICS = 256 << 20
"""Bytes of metrics.jsonl that are read: two million lines."""
MOST_STAGES = 1000
"""That a page shows."""
_RUN_DIR = "Give the directory that `distill`, `train`, `compress` or `demo` wrote (their -o)."
_SCHEDULED = re.compile(r"^(?P<stage>.*): (?:at most )?(?P<length>\d+) (?P<unit>epoch|step)s?\b")
"""A line of the schedule of 0.1.0, which wrote nothing but lines."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of metrics.jsonl, with the deciding metric's value; None: not measured, or not a number."""

    stage: str
    epoch: int
    loss: float | None
    learning_rate: float | None
    seconds: float | None
    value: float | None
    val_loss: float | None
    work: Work = NO_WORK


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of the run.

    Attributes:
        name: the student's tap, or `main`.
        planned: epochs or steps; None if the schedule does not say.
        unit: of `planned`.
        text: how the schedule has it.
        epochs: those that were trained.
    """

    name: str
    planned: int | None
    unit: str
    text: str
    epochs: tuple[Epoch, ...]

    @property
    def seconds(self) -> float:
        """Spent training."""
        return sum(epoch.seconds or 0.0 for epoch in self.epochs)

    @property
    def work(self) -> Work:
        """The work of all epochs."""
        return Work.of_all(epoch.work for epoch in self.epochs)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What run.json says about a model; two that have the same name and parameters are taken for one.

    Attributes:
        name: its class.
        parameters: how many.
        macs: of one sample; None where it was not traced.
    """

    name: str
    parameters: int
    macs: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        name: of its directory.
        status: done, running, stopped, failed; `unknown` where nothing says.
        record: the content of run.json.
        metric: which of the task's metrics decides what is best.
        phases: in order.
        plan: if there is one.
        weights: bytes of the trained student; None if there is none.
        parameters: numbers stored in it, statistics of norms included.
        student: the model it trained, as far as it is known.
        teacher: likewise.
        export: numbers from export.json, where the run's export has left one: macs, latency_ms, int8_value, int8_size.
        teacher_export: likewise of its teacher, if that is a run that is still there.
        missing: what a reader should know is not there.
        compressed: how `compress` made the student, if it did.
    """

    name: str
    status: str
    record: Mapping[str, Any]
    metric: MetricFacts
    phases: tuple[Phase, ...]
    plan: AlignmentPlan | None
    weights: int | None
    parameters: int | None
    student: ModelFacts | None
    teacher: ModelFacts | None
    export: Mapping[str, float]
    teacher_export: Mapping[str, float]
    missing: tuple[str, ...]
    compressed: Compressed | None = None

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        """The epochs of all stages."""
        return tuple(epoch for phase in self.phases for epoch in phase.epochs)

    @property
    def value(self) -> float | None:
        """The metric as it was last measured."""
        return next((epoch.value for epoch in reversed(self.epochs) if epoch.value is not None), None)

    @property
    def best(self) -> float | None:
        """The best value measured."""
        choose = max if self.metric.higher_is_better else min
        return choose((epoch.value for epoch in self.epochs if epoch.value is not None), default=None)

    @property
    def teacher_value(self) -> float | None:
        """Measured before training."""
        found = finite(mapped(self.record.get("teacher_metrics")).get(self.metric.name))
        return finite(self.record.get("teacher_accuracy")) if found is None and self.metric == MetricFacts() else found

    @property
    def seconds(self) -> float:
        """Spent training."""
        return sum(phase.seconds for phase in self.phases)


def read_runs(path: str | os.PathLike[str]) -> tuple[Run, ...]:
    """The run in a directory, or the runs in its folders.

    Args:
        path: a run directory, or a folder of them, such as `compare` leaves.

    Raises:
        ConfigError: there is no run in it.
    """
    home = Path(path)
    if not os.path.isdir(home):
        raise ConfigError(f"{home} is not a directory.", where=str(home), hint=_RUN_DIR)
    if _is_run(home):
        return (read_run(home),)
    found = sorted(
        (folder for depth in ("*", "*/*") for folder in home.glob(depth) if folder.is_dir() and _is_run(folder)),
        key=_started,
    )
    if not found:
        raise ConfigError(
            f"There is no run in {home}: neither it nor its subfolders contain run.json or metrics.jsonl.",
            where=str(home),
            hint=_RUN_DIR,
        )
    return tuple(read_run(folder, name=str(folder.relative_to(home))) for folder in found)


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() or (folder / "metrics.jsonl").is_file()


def _started(folder: Path) -> tuple[str, str]:
    record, _ = _read_record(folder)
    return str(record.get("started", "~")), folder.name


def read_run(folder: Path, *, name: str | None = None) -> Run:
    """Read one run directory. Every file in it may be absent or damaged, and every value is checked.

    Args:
        folder: the run directory.
        name: what to call it; default: its own name.
    """
    record, missing = _read_record(folder)
    metric = _metric(record)
    epochs, more = _epochs(folder, record, metric)
    missing += more
    plan, more = _plan(folder)
    missing += more + _unfinished(record)
    compressed, more = read_compressed(folder)
    missing += more
    weights = folder / STUDENT
    if not weights.is_file():
        missing.append(f"{STUDENT} is missing: the run has not finished, or the file was moved.")
    planned = _planned(record)
    if (count := len({*planned, *(epoch.stage for epoch in epochs)})) > MOST_STAGES:
        missing.append(f"Only the first {MOST_STAGES:,} of {count:,} stages are shown.")
    if record and not planned:
        missing.append("run.json has no schedule; the stages are taken from the metrics.")
    return Run(
        name=name or folder.resolve().name,
        status=str(record.get("status", "unknown")),
        record=record,
        metric=metric,
        phases=_phases(planned, epochs),
        plan=plan,
        weights=weights.stat().st_size if weights.is_file() else None,
        parameters=_stored(weights),
        student=_facts(record, "student"),
        teacher=_facts(record, "teacher"),
        export=_export(folder),
        teacher_export=_teacher_export(mapped(record.get("about")).get("teacher")),
        missing=tuple(missing),
        compressed=compressed,
    )


def _read_record(folder: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        record = read_json(folder / "run.json", MOST_BYTES)
    except FileNotFoundError:
        return {}, ["run.json is missing: command, settings, schedule and environment are unknown."]
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"run.json cannot be read: {error}."]
    if not isinstance(record, dict):
        return {}, ["run.json is not the record of a run."]
    return record, []


def _unfinished(record: Mapping[str, Any]) -> list[str]:
    status = record.get("status")
    found = []
    if status == "running":
        found.append(
            f"The run had not ended when this page was written; its last update was at {record.get('updated', 'an unknown time')}."
        )
    elif status in ("stopped", "failed"):
        verb = "was stopped" if status == "stopped" else "failed"
        why = f": {record['error']}" if record.get("error") else "."
        found.append(f"The run {verb}{why}")
    made = mapped(mapped(record.get("environment")).get("versions")).get("indistill-fx")
    if made and made != __version__:
        found.append(
            f"The run was made by indistill-fx {made} and this page by {__version__}, so parts of it may be missing."
        )
    return found


def _metric(record: Mapping[str, Any]) -> MetricFacts:
    """The metric in run.json; if it has no readable one, accuracy, the only metric of version 0.1.0."""
    found = mapped(record.get("metric"))
    flags = [found.get(name) for name in ("higher_is_better", "share")]
    if not isinstance(found.get("name"), str) or not all(isinstance(flag, bool) for flag in flags):
        return MetricFacts()
    return MetricFacts(found["name"], bool(flags[0]), bool(flags[1]))


def _epochs(folder: Path, record: Mapping[str, Any], metric: MetricFacts) -> tuple[list[Epoch], list[str]]:
    missing: list[str] = []
    damaged = malformed = 0
    found: dict[tuple[str, int], Epoch] = {}
    try:
        for line in read_lines(folder / "metrics.jsonl", most=MOST_METRICS):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                damaged += 1
                continue
            if isinstance(entry, dict) and entry.get("kind") == "step":
                continue
            epoch = _epoch(entry, metric)
            malformed += epoch is None
            if epoch is not None:
                found[epoch.stage, epoch.epoch] = epoch
    except OSError as error:
        missing.append(f"metrics.jsonl cannot be read ({error.strerror}).")
        entries = [_epoch(entry, metric) for entry in listed(mapped(record.get("result")).get("epochs"))]
        found = {(epoch.stage, epoch.epoch): epoch for epoch in entries if epoch is not None}
        missing += ["The curves are taken from run.json instead."] if found else ["There are no curves."]
    for count, problem in ((damaged, "are damaged"), (malformed, "have an unknown form")):
        if count:
            missing.append(f"Lines of metrics.jsonl that {problem} and are left out: {count:,}.")
    not_finite = sum(epoch.loss is None for epoch in found.values())
    if not_finite:
        missing.append(f"Epochs whose loss is not finite (NaN or infinity): {not_finite:,}.")
    return list(found.values()), missing


def _epoch(entry: object, metric: MetricFacts) -> Epoch | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
        return None
    number = finite(entry.get("epoch"))
    if number is None:
        return None
    loss, rate, seconds, val_loss = (finite(entry.get(n)) for n in ("loss", "learning_rate", "seconds", "val_loss"))
    values = mapped(entry.get("metrics")) or {"accuracy": entry.get("accuracy")}
    work = Work(seconds, *(finite(entry.get(name)) for name in ("samples", "waiting", "peak_memory")))
    return Epoch(entry["stage"], int(number), loss, rate, seconds, finite(values.get(metric.name)), val_loss, work)


def _plan(folder: Path) -> tuple[AlignmentPlan | None, list[str]]:
    if not (folder / "plan.json").is_file():
        return None, ["plan.json is missing; a run on labels alone has none."]
    try:
        return AlignmentPlan.load(folder / "plan.json"), []
    except ConfigError as error:
        return None, [f"plan.json is damaged, or from an incompatible version: {error}"]


def _facts(record: Mapping[str, Any], role: str) -> ModelFacts | None:
    facts = mapped(mapped(record.get("models")).get(role))
    parameters = finite(facts.get("parameters"))
    if parameters is None:
        return None
    return ModelFacts(str(facts.get("name", "")), int(parameters), finite(facts.get("macs")))


def _export(folder: Path) -> dict[str, float]:
    try:
        export = mapped(read_json(folder / EXPORT, MOST_BYTES))
    except (OSError, ValueError, RecursionError):  # the teacher may not be a run directory
        return {}
    names = ("macs", "latency_ms", "int8_value", "int8_size")
    return {name: value for name in names if (value := finite(export.get(name))) is not None}


def _teacher_export(spec: object) -> dict[str, float]:
    """The export of a teacher that is a run or has a run's weights: `runs/teacher`, `models.py:make@runs/teacher/student.safetensors`."""
    if not isinstance(spec, str) or "\0" in spec:
        return {}
    place = Path(spec.rpartition("@")[2])
    return _export(place.parent if place.name == STUDENT else place)


def _planned(record: Mapping[str, Any]) -> dict[str, tuple[int | None, str, str]]:
    """Length, unit and description of every planned phase in run.json, by name."""
    lines = [str(line) for line in listed(record.get("schedule"))]
    texts = {start: line for line in reversed(lines) for start in _beginnings(line)}
    found: dict[str, tuple[int | None, str, str]] = {}
    for entry in listed(record.get("phases")):
        name, length = mapped(entry).get("name"), finite(mapped(entry).get("length"))
        if isinstance(name, str) and length is not None:
            unit = "step" if entry.get("unit") == "steps" else "epoch"
            found[name] = (int(length), unit, texts.get(name, name))
    if found:
        return found
    matches = [(_SCHEDULED.match(line), line) for line in lines]
    return {match["stage"]: (int(match["length"]), match["unit"], line) for match, line in matches if match}


def _beginnings(line: str) -> list[str]:
    """The possible stage names at the beginning of a line of the schedule: a name may itself contain `: `."""
    parts = line[:4096].split(": ")
    return [": ".join(parts[:k]) for k in range(1, min(len(parts), 8))]


def _phases(planned: Mapping[str, tuple[int | None, str, str]], epochs: Sequence[Epoch]) -> tuple[Phase, ...]:
    trained: dict[str, list[Epoch]] = {}
    for epoch in epochs:
        trained.setdefault(epoch.stage, []).append(epoch)
    found = {name: (None, "epoch", name) for name in trained} | dict(planned)
    found = {name: found[name] for name in (*planned, *trained)}
    return tuple(
        Phase(name, length, unit, text, tuple(trained.get(name, ())))
        for name, (length, unit, text) in islice(found.items(), MOST_STAGES)
    )


def _stored(path: Path) -> int | None:
    try:
        return count_numbers(path)
    except ConfigError:
        return None
