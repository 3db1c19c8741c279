"""Peak memory of benchmarks/warmup.py: of the first stage, each way in processes of its own."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import indistill_fx as ifx
from benchmarks.warmup_ways import PAIRS, HookBaseline, adam, step


def peak_memory(name: str, kind: str, *, returned: bool, runs: int = 3) -> float:
    """Peak resident memory of five steps of stage 1, in MiB above the process with both networks: median of processes of its own.

    By default glibc keeps blocks below 32 MiB that were freed, and how much of them it finds use for differs by 100 MiB from run to
    run. With `returned` they go back at once: then the figure is what is really held.
    """
    code = f"from benchmarks.warmup_memory import _peak; print(_peak({name!r}, {kind!r}))"
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)} if returned else {})
    command = [sys.executable, "-c", code]
    found = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()[-1]
        for _ in range(runs)
    ]
    return statistics.median(map(float, found))


def _status(key: str) -> float:
    """A figure of /proc/self/status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def _peak(name: str, kind: str) -> float:
    build, size, batch = PAIRS[name]
    torch.manual_seed(0)
    teacher, student = build()
    x = torch.randn(batch, *size)
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    if kind == "hooks":
        runner: nn.Module = HookBaseline(teacher, student.train(), plan.pairs[0])
    else:
        runner = ifx.compile_stages(teacher, student, plan, main=None, example_inputs=x[:2])[0].train()
        del teacher
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, so that it is counted when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    before = _status("VmRSS")
    optimizer = adam(runner)
    for _ in range(5):
        step(runner, optimizer, x)
    return _status("VmHWM") - before
