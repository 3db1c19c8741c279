"""How long a network takes on its target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from indistill_fx.deploy.bench import bench
from indistill_fx.errors import ConfigError, PruneError
from indistill_fx.graph.edit import one_sample

Runtime = Literal["onnxruntime", "torch", "torch-compile"]
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "torch", "torch-compile")

_CLOSE = 0.03
"""A time that is this share below the budget ends the search."""
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Clock:
    """A target on which networks are timed; ONNX Runtime in a process of its own.

    Attributes:
        on: the runtime.
        threads: it may use.
        batch: samples a call.
        seconds: to spend on one measurement, about.
    """

    on: Runtime = "onnxruntime"
    threads: int = 1
    batch: int = 1
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.on not in RUNTIMES:
            raise ConfigError(f"There is no runtime {self.on!r}.", where="on", got=self.on, expected=list(RUNTIMES))

    def ms(self, module: nn.Module, example_inputs: tuple[Any, ...]) -> float:
        """Median milliseconds of one call, as `bench` measures it.

        Raises:
            ExportError: the runtime cannot take the network.
        """
        inputs = one_sample(tuple(example_inputs))
        wanted = {"onnxruntime": "onnxruntime fp32", "torch": "torch eager", "torch-compile": "torch.compile"}[self.on]
        settings: dict[str, Any] = {"batches": (self.batch,), "threads": (self.threads,), "seconds": self.seconds}
        if self.on == "onnxruntime":
            report = _exported_and_timed(module, inputs, settings)
        else:
            report = bench({"candidate": module}, inputs, compile=self.on == "torch-compile", **settings).to_json()
        found: list[float] = [row["median_ms"] for row in report["rows"] if row["runtime"] == wanted]
        if not found:
            raise ConfigError(
                f"The network cannot be timed by {self.on}: {'; '.join(report['notes']) or 'it gave no timing'}.",
                where="on",
                got=self.on,
                hint=f"Choose another runtime (--on): {', '.join(name for name in RUNTIMES if name != self.on)}.",
            )
        return found[0]

    def __str__(self) -> str:
        return f"{self.on}, {self.threads} thread{'s' * (self.threads > 1)}, batch {self.batch}"


def _exported_and_timed(module: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> dict[str, Any]:
    from indistill_fx.deploy.bench_apart import bench_apart
    from indistill_fx.deploy.export_onnx import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "candidate.onnx"
        export_onnx(module, file, inputs)
        return bench_apart(file, inputs, **settings)


def bisect(measure: Callable[[float], float], most: float, *, smallest: float) -> float:
    """The largest share of the work whose measured time is within a budget.

    Args:
        measure: share of the work → milliseconds.
        most: milliseconds.
        smallest: share that a network can be brought down to.

    Raises:
        PruneError: even the smallest takes longer; says how long.
    """
    low, high = smallest, 1.0
    least = measure(low)
    if least > most:
        raise PruneError(
            f"The smallest version of this network takes {least:.3g} ms, but {most:.3g} ms was requested.",
            where="latency",
            got=most,
            expected=f"{least:.3g} ms or more",
            hint="Give more time, more threads, or another runtime.",
        )
    full_time = measure(high)
    if full_time <= most:
        return high
    times = {low: least, high: full_time}
    for _ in range(_TRIES):
        inside = (most * (1 - _CLOSE / 2) - times[low]) / max(times[high] - times[low], 1e-9)
        share = low + (high - low) * min(0.9, max(0.1, inside))
        times[share] = measure(share)
        if times[share] <= most:
            low = share
            if times[share] >= most * (1 - _CLOSE):
                break
        else:
            high = share
    return low
