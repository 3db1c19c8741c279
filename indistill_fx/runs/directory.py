"""A run's directory: it holds the whole story of a run, and belongs to one process at a time.

run.json (command, versions, models, settings, schedule, environment, status, result), plan.json, metrics.jsonl,
checkpoints/last.safetensors and best.safetensors, student.safetensors, tensorboard/ where asked for, export.json once it
was exported, and compress.json where `compress` made the student.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from indistill_fx.errors import ConfigError, TrainError, instead_of
from indistill_fx.plan import AlignmentPlan
from indistill_fx.runs.checkpoint import SCHEMA, check_schema
from indistill_fx.system.files import (
    append_line,
    clear_drafts,
    json_text,
    read_json,
    read_lines,
    replace_file,
    save_json,
    shown,
    unwritable,
)
from indistill_fx.system.terminal import one_line

LAST = "checkpoints/last.safetensors"
BEST = "checkpoints/best.safetensors"
STUDENT = "student.safetensors"
AVERAGE = "student_average.safetensors"
EXPORT = "export.json"
PLAN = "plan.json"
COMPRESSION = "compress.json"

MOST_BYTES = 64 << 20
"""That run.json may have."""

_PATIENCE = 2.0
"""Seconds to wait for a run's lock. A process killed while it started a program leaves its lock to that program's first
moment: refused at once, every fifth such kill would make the next run fail."""


def kept_plan(*folders: Path) -> AlignmentPlan | None:
    """The plan in the first of these folders that has one."""
    found = next((folder / PLAN for folder in folders if (folder / PLAN).exists()), None)
    return AlignmentPlan.load(found) if found is not None else None


def plan_of_run(directory: RunDirectory | None, given: AlignmentPlan | None) -> AlignmentPlan | None:
    """The plan of a run: as given, else as the run that is resumed has it; None: it has none yet.

    Raises:
        ConfigError: the directory has a plan that is neither, and would be overwritten.
    """
    if directory is None:
        return given
    if directory.resumes:
        return given or kept_plan(directory.path)
    file = directory.path / PLAN
    if file.exists() and not directory.is_ours and (given is None or given != AlignmentPlan.load(file)):
        raise ConfigError(
            f"{file} is not the plan of this run, which would overwrite it.",
            where=str(directory.path),
            got=PLAN,
            hint=f"Train by it (--plan {file}), move it away, or name another directory.",
        )
    return given


class RunDirectory:
    """A run's directory, locked against a second run while the block lasts.

    Args:
        path: made if absent.
        resume: continue the run that is in it, if there is one.
        writes: whether this process writes; under DDP only one does.
        trackers: names of the loggers that get the numbers of metrics.jsonl too.

    Raises:
        ConfigError: it holds a run and `resume` is false, or weights that are of none; another process uses it; or it cannot be made.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool, writes: bool = True, trackers: Sequence[str] = ()
    ):
        self.path, self.writes = Path(path).absolute(), writes  # the data may change the working directory
        self._resume, self._asked = resume, tuple(trackers)
        self._lock = FileLock(self.path / ".lock")
        self._report: dict[str, Any] = {}
        self._trackers: list[Any] = []

    def __enter__(self) -> RunDirectory:
        if not self.writes:
            return self
        hint = "Name another directory, or make it writable."
        unusable = ConfigError(f"{self.path} cannot be used for a run", where=str(self.path), hint=hint)
        with instead_of(OSError, unusable):
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=_PATIENCE)
            except Timeout as error:  # Timeout is an OSError, so it is handled first
                raise ConfigError(
                    f"Another process is running in {self.path}.",
                    where=str(self.path),
                    hint="Wait for it to end, or give another directory.",
                ) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        if not self._resume and self._is_taken():
            raise ConfigError(
                f"{shown(self.path)} already holds a run.",
                where=str(self.path),
                hint="Continue it with resume=True (--resume), or give another directory.",
            )
        lost = next((name for name in (STUDENT, AVERAGE) if (self.path / name).exists()), None)
        if lost is not None and not self.is_ours:
            raise ConfigError(
                f"{self.path / lost} is not of a run, and this run would overwrite it.",
                where=str(self.path),
                got=lost,
                hint="Move it away, or name another directory.",
            )
        if self.resumes:
            check_schema(self.reported().get("schema_version", 1), self.path / "run.json")
        for folder in (self.path, self.path / "checkpoints"):
            clear_drafts(folder)
        self._trackers = [_tracker(name, self.path) for name in self._asked]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.writes:
            return
        try:
            if error is not None and self._report and self._report.get("status") == "running":
                stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
                self._report["error"] = str(error)
                self.report(status="stopped" if stopped else "failed")
        except TrainError:
            pass  # the disk is full, and the error being raised explains more
        finally:
            for tracker in self._trackers:
                tracker.finish()
            self._lock.release()

    def clear(self) -> None:
        """Delete the checkpoint of a run that failed before its first step, so that it can be restarted in this directory."""
        if self.writes:
            (self.path / LAST).unlink(missing_ok=True)

    def _is_taken(self) -> bool:
        """Whether a new run would overwrite an earlier one; a run that failed before its first result does not count."""
        if self.has_checkpoint or os.path.exists(self.path / "metrics.jsonl"):
            return True
        return os.path.exists(self.path / "run.json") and self.reported().get("status") != "failed"

    @property
    def is_ours(self) -> bool:
        """Whether there is a run in the directory, so that its files are a run's and not the user's."""
        return any((self.path / name).exists() for name in ("run.json", COMPRESSION, LAST))

    @property
    def has_checkpoint(self) -> bool:
        """Whether the directory has a checkpoint."""
        return os.path.exists(self.path / LAST)

    @property
    def resumes(self) -> bool:
        """Whether the run continues from a checkpoint in this directory."""
        return self._resume and self.has_checkpoint

    def report(self, **facts: Any) -> None:
        """Add entries to run.json.

        Raises:
            TrainError: it cannot be written.
        """
        if self.writes:
            self._report |= facts | {"updated": datetime.now(UTC).isoformat(timespec="seconds")}
            save_json(self.path / "run.json", self._report)

    def begin(self, *, resumed: bool, **facts: Any) -> None:
        """Start run.json, or continue the existing one.

        Raises:
            TrainError: it cannot be written.
        """
        before = self.reported() if resumed else {}
        started = before.get("started", datetime.now(UTC).isoformat(timespec="seconds"))
        self._report = {"schema_version": SCHEMA, "command": sys.argv, "started": started, **before, **facts}
        self._report.pop("error", None)
        self._report.pop("result", None)  # a finished run that is given more epochs has a result
        times = before.get("resumed", 0)
        self.report(status="running", resumed=(times if isinstance(times, int) else 0) + int(resumed))

    def reported(self) -> dict[str, Any]:
        """The content of run.json; empty if it is unreadable, because only the checkpoint decides how a run continues."""
        try:
            found = read_json(self.path / "run.json", MOST_BYTES)
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def log(self, entry: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl. `epochs` and `step` are the run's position; numbers also go to the trackers.

        Raises:
            TrainError: it cannot be written.
        """
        if not self.writes:
            return
        file = self.path / "metrics.jsonl"
        try:
            append_line(file, json_text(entry))
        except OSError as error:
            raise unwritable(file, error) from error
        parts = {f"{name}/": value for name, value in entry.items() if isinstance(value, Mapping)}
        flat = {prefix + name: value for prefix, part in {"": entry, **parts}.items() for name, value in part.items()}
        numbers = {
            one_line(f"{entry['kind']}/{name}"): value for name, value in flat.items() if isinstance(value, float)
        }
        for tracker in self._trackers:
            tracker.log(numbers, step=entry["step"])

    def rewind(self, epochs: int, step: int) -> None:
        """Remove the lines of metrics.jsonl after a checkpoint, because they will be written again."""
        path = self.path / "metrics.jsonl"
        if not self.writes or not path.exists():
            return
        kept = []
        with instead_of(
            OSError,
            ConfigError(f"{path} cannot be read", where=str(path), hint="Move that file away, and resume again."),
        ):
            lines = list(read_lines(path))
        for line in lines:
            try:
                entry = json.loads(line)
                if (entry["epochs"], entry["step"]) <= (epochs, step) and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a line cut off when the process was killed
        replace_file(path, lambda draft: draft.write_text("".join(kept), encoding="utf-8"))

    def files(self) -> dict[str, str]:
        """The names of the files in the directory."""
        names = {"run": "run.json", "plan": PLAN, "metrics": "metrics.jsonl"}
        names |= {"last": LAST, "best": BEST, "student": STUDENT, "average": AVERAGE}
        return {key: str(self.path / name) for key, name in names.items() if (self.path / name).exists()}


def _tracker(name: str, folder: Path) -> Any:
    """Accelerate's tracker of that name, for a run in a directory."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}:
        raise ConfigError(
            f"The tracker {name!r} is not installed.",
            where="tracker",
            got=name,
            hint="pip install 'indistill-fx[tensorboard]'" if name == "tensorboard" else f"pip install {name}",
        )
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(name, logging_dir=folder) if name == "tensorboard" else kind(one_line(folder.resolve().name))
    try:
        tracker.start()
    except Exception as error:  # trackers are other packages, which may need accounts, servers and databases
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConfigError(
            f"The tracker {name!r} failed to start: {first}",
            where="tracker",
            got=name,
            hint=f"Set {name} up as its own documentation says, or leave tracker (--tracker) out.",
        ) from error
    return tracker
