"""Time torch and onnxruntime side by side, interleaved in one run, so that a busy machine disturbs all alike."""

from __future__ import annotations

import math
import os
import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from indistill_fx.deploy.onnx_session import (
    KINDS,
    LARGEST_INPUT,
    Given,
    as_inputs,
    feed,
    file_size,
    graph_of,
    open_session,
    random_inputs,
)
from indistill_fx.errors import ConfigError, IndistillError, first_lines
from indistill_fx.graph.module_state import evaluating

Call: TypeAlias = Callable[[], object]
Contestant: TypeAlias = nn.Module | str | PathLike[str]
_BLOCKS, _FEWEST = 10, 3
_LONGEST = 10.0
"""Seconds: where ten calls take longer, fewer are timed."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one call takes.

    Attributes:
        median_ms: over the calls, in milliseconds.
        p95_ms: the 95th percentile, likewise.
        calls: how many were timed.
    """

    median_ms: float
    p95_ms: float
    calls: int


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One contestant under one runtime, at one batch size and number of threads.

    `speed` is how many times faster the median is than that of the table's first row of the same batch and threads.
    """

    name: str
    runtime: str
    batch: int
    threads: int
    median_ms: float
    p95_ms: float
    calls: int
    size: int
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All rows, where they were measured, and what could not be; `load` is the machine's average over the last minute."""

    rows: tuple[BenchRow, ...]
    machine: str
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    date: str = ""
    load: float = 0.0

    @property
    def busy(self) -> str:
        """A warning if the machine had more running processes than cores; otherwise empty."""
        cores = len(os.sched_getaffinity(0))
        if self.load <= cores:
            return ""
        return (
            f"The machine was busy (load {self.load:.1f} on {cores} cores): compare only rows with the same batch size and number "
            "of threads; timings with one thread are the more reliable ones."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return asdict(self)


def measure(calls: Mapping[str, Call], *, seconds: float = 0.3, seed: int = 0) -> dict[str, Timing]:
    """Time the calls in short blocks that take turns in random order.

    The first call of each block is not counted: it finds the caches as another contestant left them. That does not matter to calls of a
    second and more, of which every one is.

    Args:
        calls: what to time, by name.
        seconds: to spend on each, about; at least ten calls are timed, but where these would take more than 10 seconds as few as three.
        seed: of the order.

    Returns:
        A timing for each.
    """
    order = random.Random(seed)
    lengths, blocks, samples = {}, {}, {name: list[float]() for name in calls}
    for name, call in calls.items():
        once = _time(call)
        if once * _BLOCKS < _LONGEST:
            once = min(_time(call), _time(call))
        lengths[name] = max(1, min(1000, int(seconds / _BLOCKS / max(once, 1e-7))))
        blocks[name] = max(_FEWEST, min(_BLOCKS, int(_LONGEST / max(once, 1e-7))))
    for block in range(_BLOCKS):
        able = [name for name in calls if block < blocks[name]]
        for name in order.sample(able, len(able)):
            call = calls[name]
            if blocks[name] == _BLOCKS:
                call()
            samples[name] += [_time(call) for _ in range(lengths[name])]
    return {
        name: Timing(median(times) * 1e3, quantiles(times, n=20, method="inclusive")[-1] * 1e3, len(times))
        for name, times in samples.items()
    }


def _time(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def bench(
    contestants: Mapping[str, Contestant],
    example_inputs: Given,
    *,
    batches: Sequence[int] = (1, 32),
    threads: Sequence[int] | None = None,
    compile: bool = False,
    seconds: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
) -> BenchReport:
    """Time modules (torch eager, and compiled if asked) and ONNX files (onnxruntime) on the CPU.

    Args:
        contestants: by name, a module or the path of an ONNX file; the order of the rows is theirs.
        example_inputs: a tensor, several in order, or by name; random ones like them are used. A file with built-in preprocessing gets
            the pixels they stand for.
        batches: batch sizes.
        threads: numbers of threads; None is one and all.
        compile: also `torch.compile` every module (adds minutes).
        seconds: to spend on each cell of the table, about; at least ten calls are timed, but where these would take more than 10 seconds
            as few as three.
        say: called with a line before each batch size.

    Returns:
        The table.

    Raises:
        ConfigError: nothing to time, a file that is not there, or no model ran at any batch size.
        ExportError: a file that onnxruntime cannot load.
    """
    names = tuple(example_inputs) if isinstance(example_inputs, Mapping) else ()
    inputs = as_inputs(tuple(example_inputs.values()) if isinstance(example_inputs, Mapping) else example_inputs)
    if not contestants:
        raise ConfigError(
            "Nothing to time: give at least one module or ONNX file.",
            where="contestants",
            hint="Name a model spec, a run directory or an .onnx file.",
        )
    for name, value in contestants.items():
        if not isinstance(value, nn.Module) and not os.path.exists(value):
            raise ConfigError(
                f"`{name}`: there is no file `{value}`.",
                where=name,
                hint="Check the path; it is taken from the working directory.",
            )
    rows: list[BenchRow] = []
    failures: dict[str, Exception] = {}
    with ExitStack() as stack:
        for value in contestants.values():
            if isinstance(value, nn.Module):
                stack.enter_context(evaluating(value))
        for count in threads or sorted({1, len(os.sched_getaffinity(0))}):
            with _threads(count):
                runners = _runners(contestants, names, count, compile)
                for batch in batches:
                    say(f"Timing batches of {batch} on {count} {'thread' if count == 1 else 'threads'} …")
                    rows += _cells(runners, random_inputs(inputs, batch), count, seconds, failures)
    if not rows:
        raise _nothing_ran(*next(iter(failures.items())))
    order = {name: i for i, name in enumerate(contestants)}
    rows.sort(key=lambda r: (order[r.name], r.runtime != "torch eager", r.batch, r.threads))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return BenchReport(_with_speed(rows), _machine(), _versions(), tuple(failures), date, os.getloadavg()[0])


def _nothing_ran(first: str, why: Exception) -> ConfigError:
    inputs = "Check the example input (--input: shape, dtype and range) and the batch sizes (--batch)."
    return ConfigError(
        f"None of these models ran. {first}",
        where="contestants",
        got=first,
        hint="" if isinstance(why, IndistillError) else inputs,  # our own errors end with their hint
    )


def _with_speed(rows: Sequence[BenchRow]) -> tuple[BenchRow, ...]:
    first: dict[tuple[int, int], float] = {}
    for row in rows:
        first.setdefault((row.batch, row.threads), row.median_ms)
    return tuple(replace(row, speed=first[row.batch, row.threads] / row.median_ms) for row in rows)


def example_of(path: str | PathLike[str]) -> tuple[Tensor, ...]:
    """One sample of random inputs for an ONNX file, by what it says of its inputs.

    Raises:
        ConfigError: a size besides the batch is open, or the file takes what a tensor cannot be.
        ExportError: onnxruntime refuses the file.
    """
    found = []
    generator = np.random.default_rng(0)
    for value in open_session(path).get_inputs():
        first, *rest = value.shape or [None]
        if not all(isinstance(size, int) for size in rest):
            raise ConfigError(
                f"`{path}` leaves the size of its input `{value.name}` open: {value.shape}.", where=str(path),
                hint="Give it: --input 3x224x224.",
            )  # fmt: skip
        shape = (first if isinstance(first, int) else 1, *rest)
        if value.type not in KINDS or not 0 < math.prod(shape) <= LARGEST_INPUT:
            raise ConfigError(
                f"The input `{value.name}` of `{path}` cannot be made up: {value.type} {value.shape}.", where=str(path),
                hint="Export the file again.",
            )  # fmt: skip
        integral = value.type not in ("tensor(float)", "tensor(double)", "tensor(float16)")
        array = (
            generator.integers(0, 2 if "bool" in value.type else 256, shape)
            if integral
            else generator.normal(size=shape)
        )
        found.append(torch.from_numpy(array).to(KINDS[value.type]))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Runner:
    name: str
    runtime: str
    size: int
    prepare: Callable[[Sequence[Tensor]], Call]


def _runners(
    contestants: Mapping[str, Contestant], names: Sequence[str], threads: int, compiled: bool
) -> list[_Runner]:
    from indistill_fx.loading.onnx.runtime import is_quantised

    runners = []
    for name, value in contestants.items():
        if isinstance(value, nn.Module):
            size = sum(t.numel() * t.element_size() for t in (*value.parameters(), *value.buffers()))
            runners.append(_Runner(name, "torch eager", size, _torch_call(value, names)))
            if compiled:
                runners.append(_Runner(name, "torch.compile", size, _torch_call(torch.compile(value), names)))
        else:
            quantised = is_quantised(graph_of(value))
            runtime = "onnxruntime int8" if quantised else "onnxruntime fp32"
            runners.append(_Runner(name, runtime, file_size(value), _onnx_call(value, threads)))
    return runners


def _torch_call(module: Callable[..., object], names: Sequence[str]) -> Callable[[Sequence[Tensor]], Call]:
    if names:
        return lambda inputs: partial(module, **dict(zip(names, inputs, strict=True)))
    return lambda inputs: partial(module, *inputs)


def _onnx_call(path: str | PathLike[str], threads: int) -> Callable[[Sequence[Tensor]], Call]:
    session = open_session(path, threads=threads)

    def prepare(inputs: Sequence[Tensor]) -> Call:
        arrays = feed(session, inputs)
        return lambda: session.run(None, arrays)

    return prepare


def _cells(
    runners: Sequence[_Runner], inputs: Sequence[Tensor], threads: int, seconds: float, failures: dict[str, Exception]
) -> list[BenchRow]:
    batch, able, calls = len(inputs[0]), {}, {}
    for runner in runners:
        key = f"{runner.name} ({runner.runtime})"
        try:
            call = runner.prepare(inputs)
            call()
        except Exception as error:  # a fixed batch size, or a model that cannot be compiled: measure the others
            failures[f"{key} cannot run at batch size {batch}: {first_lines(error)}"] = error
        else:
            able[key], calls[key] = runner, call
    timings = measure(calls, seconds=seconds)
    return [
        BenchRow(r.name, r.runtime, batch, threads, t.median_ms, t.p95_ms, t.calls, r.size)
        for r, t in ((able[key], timing) for key, timing in timings.items())
    ]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine() -> str:
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {platform.system()}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _versions() -> dict[str, str]:
    import onnxruntime

    return {"python": platform.python_version(), "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
