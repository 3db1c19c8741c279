"""A stage under DDP and under FSDP2 gives the gradients of one process; compiled as one graph, those of eager mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import indistill_fx as ifx
from tests.nets import Cnn32, images, seeded

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_gradients_of_one(kind):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(ROOT / "tests/numerics/distributed_stage.py"), kind]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{kind} agrees" in done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_as_one_graph(monkeypatch):
    teacher, students = seeded(Cnn32), [seeded(Cnn32, (8, 16, 32), 64, seed=1) for _ in range(2)]
    x, labels = images(4, 32), torch.arange(4)
    losses = []
    for student, wrap in zip(
        students, (lambda s: s, lambda s: torch.compile(s, fullgraph=True, backend="aot_eager")), strict=True
    ):
        own = []
        for stage in ifx.compile_stages(teacher, student, main="kd", example_inputs=x):
            loss = wrap(stage.train())((x, labels))
            loss.backward()
            own.append(loss.detach())
        losses.append(own)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for plain, compiled in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(plain.grad, compiled.grad, rtol=1e-4, atol=1e-5)
