"""The task that a model was trained on, as its run or its file keeps it: what its labels mean is then known, and not inferred again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from indistill_fx.errors import ConfigError
from indistill_fx.loading.load import Source
from indistill_fx.loading.spec import parse_spec
from indistill_fx.losses.choose_task import TASKS
from indistill_fx.losses.task import Task
from indistill_fx.runs.load import absolute
from indistill_fx.runs.signature import is_signed, sign


def kept_facts(task: Task, spec: str = "") -> dict[str, Any]:
    """A task as plain values: its name, with its settings, or with the code that it comes from and this user's seal on it.

    Args:
        task: what labels mean.
        spec: `file.py:task`, where it was named so.
    """
    if type(task) is TASKS.get(task.name):
        return {"name": task.name, "settings": dict(vars(task))}
    if not spec:
        return {"name": task.name}
    code = absolute(spec)
    return {"name": task.name, "code": code, "seal": sign(parse_spec(code))}


def kept_task(source: Source) -> str | Task | None:
    """The task that a model's source keeps, or its spec; None: it keeps none, or one that reads no labels.

    Raises:
        ConfigError: it is the user's own and its code is not known, or has changed; or what is kept is damaged.
    """
    facts = source.task
    if facts is None:
        return None
    name, code = facts.get("name"), facts.get("code")
    if isinstance(code, str) and _is_ours(code, facts.get("seal")):
        return code
    if code is not None or not isinstance(name, str) or name not in TASKS or "settings" not in facts:
        where = f", {str(code)[:200]}, which has changed since, or another user or machine named it" if code else ""
        raise ConfigError(
            f"{source.spec} was trained on a task of the user's own, `{str(name)[:60]}`{where}.",
            where=source.spec,
            got=str(name)[:60],
            hint="Name the task: --task file.py:task. If it names code, that is run, so name only code that you trust.",
        )
    task = _with_settings(name, facts["settings"], source)
    return task if task.labelled else None


def asked_or_kept(asked: str | None, *sources: Source) -> tuple[str | Task | None, str]:
    """What labels mean: as asked, else as the first of the models keeps it, else None; and in words whence that is known.

    Raises:
        ConfigError: see `kept_task`.
    """
    if asked is not None:
        return asked, "as requested"
    for source in sources:
        if (kept := kept_task(source)) is not None:
            return kept, f"as {source.spec} was trained"
    return None, "inferred from the labels of the first batch"


def _is_ours(code: str, seal: object) -> bool:
    """Whether it names code, and this user signed that as it is now."""
    try:
        return is_signed(parse_spec(code), seal)
    except ConfigError:
        return False


_LARGEST = 1 << 31
"""Above the settings that a task can have."""


def _with_settings(name: str, settings: Any, source: Source) -> Task:
    """A task of ours, with settings from a file."""
    task = TASKS[name]()
    known = vars(task)
    if isinstance(settings, Mapping) and all(
        key in known and type(value) is type(known[key]) and abs(value) < _LARGEST for key, value in settings.items()
    ):
        return type(task)(**settings)
    raise ConfigError(
        f"What {source.spec} keeps of its task `{name}` is damaged: {str(settings)[:60]}.",
        where=source.spec,
        got=str(settings)[:60],
        hint=f"Name the task: --task {name}.",
    )
