"""Two processes under torchrun give what one gives with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

# Group norm, not batch norm: the statistics of half a batch are other numbers.
SCRIPT = """
import sys
import torch
from torch import nn
from indistill_fx.curriculum import Curriculum
from indistill_fx.data import open_data
from indistill_fx.train import distill

def net(first, second):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, first, 3, padding=1), nn.GroupNorm(2, first), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(first, second, 3, padding=1), nn.GroupNorm(2, second), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(4 * second, 10),
    )

torch.set_num_threads(1)
torch.manual_seed(0)
teacher, student = net(16, 32), net(8, 16)
data = open_data("digits", batch_size=64, limit=320)
record = distill(
    teacher, student, data.train, val_loader=data.test, curriculum=Curriculum(lengths=[1, 1]), epochs=2,
    run_dir=sys.argv[1], progress=False, accumulate=2, clip_norm=1.0, device="cpu",
)
assert record.environment["processes"] == int(sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for launcher, place, count in (([sys.executable], "one", "1"), (torchrun, "two", "2")):
        command = [*launcher, str(script), str(tmp_path / place), count]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / place / "student.safetensors") for place in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    stories = [json.loads((tmp_path / place / "run.json").read_text()) for place in ("one", "two")]
    losses = [[epoch["loss"] for epoch in story["result"]["epochs"]] for story in stories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert stories[1]["result"]["accuracy"] == stories[0]["result"]["accuracy"]
