"""Steps of an earlier commit's stage, in a process of its own, for benchmarks/warmup.py --before.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.warmup --pairs paper --before /tmp/before

The other process imports the package that lies in that folder, builds the same pair from the same seed, and takes a step whenever it is
asked, so that both commits are timed in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_CHILD = """
import sys, copy, torch
import indistill_fx as ifx
from benchmarks.warmup import own_stage
from benchmarks.warmup_ways import PAIRS, adam, step
torch.set_num_threads(int(sys.argv[3]))
build, size, batch = PAIRS[sys.argv[1]]
torch.manual_seed(0)
teacher, student = build()
x = torch.randn(batch, *size)
plan = ifx.align(teacher, student, example_inputs=x[:2])
torch.manual_seed(1)
stages = {"before": own_stage(teacher, student, plan, int(sys.argv[2]), x)}
print(stages["before"](x).item(), flush=True)
if sys.argv[4:] == ["compile"]:
    stages["before compiled"] = torch.compile(own_stage(teacher, student, plan, int(sys.argv[2]), x), fullgraph=True)
optimizers = {key: adam(stage) for key, stage in stages.items()}
for line in sys.stdin:
    key = line.strip()
    print(step(stages[key], optimizers[key], x), flush=True)
"""

_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": "-1"}
"""What `freed_memory_kept` sets, for a commit that does not know it."""


class Before:
    """A stage of the commit that lies in a folder.

    Args:
        folder: a checkout of that commit.
        pair: key of `PAIRS`.
        number: of the stage, from 0.
        threads: of torch.
        compiled: also by torch.compile.
        kept: freed memory stays with that process, as it does with this one.

    Attributes:
        loss: of the first batch, before any step.
        ways: what `step` takes.
    """

    def __init__(self, folder: str, pair: str, number: int, threads: int, *, compiled: bool, kept: bool):
        self.ways = ("before", "before compiled") if compiled else ("before",)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, pair, str(number), str(threads), *(["compile"] if compiled else [])],
            cwd=folder,
            env=os.environ | (_KEPT if kept else {}) | {"PYTHONPATH": str(Path(folder).resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loss = self._read()

    def step(self, way: str) -> float:
        """Take one training step; its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{way}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The earlier commit's process ended; what it said last tells why.")
        return float(line)
