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

# SGD, not Adam, which makes steps of full size out of gradients that are nothing but rounding.
SCRIPT = """
import sys
import torch
from indistill_fx.curriculum import Curriculum
from indistill_fx.data import open_data
from indistill_fx.demo import DigitsStudent, DigitsTeacher
from indistill_fx.training.distill import distill

place, processes, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
teacher = DigitsTeacher((8, 16, 32))
data = open_data("digits", batch_size=64, limit=320)

class PowerCut(Exception):
    pass

def run(loader):
    torch.manual_seed(1)
    student = DigitsStudent()
    own = list(student.parameters())
    try:
        record = distill(
            teacher, student, loader, val_loader=data.test, run_dir=place, progress=False, resume=True, device="cpu",
            curriculum=Curriculum(lengths=[1, 0, 1], learning_rate=0.05, optimizer="sgd"),
            epochs=2, accumulate=2, clip_norm=1.0, optimizer="sgd", learning_rate=0.05, schedule="cosine",
            weight_decay=0.01, decay_norms=False, checkpoint_every_steps=2, shard=kind == "fsdp",
        )
    except PowerCut:
        return
    assert record.environment["processes"] == processes
    # the user's parameters are still the student's, and plain
    assert all(a is b and type(a) is torch.nn.Parameter for a, b in zip(own, student.parameters(), strict=True))

if kind == "fsdp":  # stopped in the second stage and in the main stage, and resumed
    whole = type(data.train)._batches
    for epoch in (1, 3):
        def cut(loader, skipped):
            for number, batch in enumerate(whole(loader, skipped), start=skipped):
                if loader.epoch == epoch and number == 4:
                    raise PowerCut
                yield batch
        type(data.train)._batches = cut
        run(data.train)
    type(data.train)._batches = whole
run(data.train)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """By DDP and by FSDP, with the demo's models: their batch norms take the statistics of the whole batch."""
    script = tmp_path / "work.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for launcher, kind, count in (([sys.executable], "one", "1"), (torchrun, "ddp", "2"), (torchrun, "fsdp", "2")):
        command = [*launcher, str(script), str(tmp_path / kind), count, kind]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Warning" not in done.stderr
    one = load_file(tmp_path / "one" / "student.safetensors")
    story = json.loads((tmp_path / "one" / "run.json").read_text())
    for kind in ("ddp", "fsdp"):
        two = load_file(tmp_path / kind / "student.safetensors")
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
        told = json.loads((tmp_path / kind / "run.json").read_text())
        losses = [[epoch["loss"] for epoch in found["result"]["epochs"]] for found in (story, told)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert told["result"]["accuracy"] == story["result"]["accuracy"]
        assert told["resumed"] == (2 if kind == "fsdp" else 0)


ODD = """
import sys
import torch
from torch import nn
from indistill_fx.training.supervised import train

place, cut = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

class Breaking(list):
    epochs = 0

    def __iter__(self):
        self.epochs += 1
        if self.epochs > cut:
            raise OSError("the disk went away")
        return super().__iter__()

for name, sizes, norm in (("norms", (5, 4, 2), nn.BatchNorm1d(8)), ("plain", (5, 5, 1), nn.Identity())):
    torch.manual_seed(0)
    batches = Breaking((torch.randn(n, 6), torch.randint(4, (n,))) for n in sizes)
    net = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 4))
    try:
        train(
            net, batches, epochs=4, optimizer="sgd", learning_rate=0.5, momentum=0.0, run_dir=f"{place}/{name}", resume=True,
            progress=False, checkpoint_every_steps=1, device="cpu",
        )
    except OSError:
        pass
"""


def test_batches_that_do_not_divide_and_a_resume_by_another_number_of_processes(tmp_path, commands):
    """With three processes, a batch of two or one leaves some of them with nothing; in float64 the weights are those of one process."""
    script = tmp_path / "work.py"
    script.write_text(ODD)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    python = str(commands / "python")
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--no-python", python]
    for launcher, place, cut in (
        ([python], "one", "99"),
        (torchrun, "three", "99"),
        (torchrun, "both", "3"),
        ([python], "both", "99"),
    ):
        command = [*launcher, str(script), str(tmp_path / place), cut]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "both/plain/run.json").read_text())["resumed"] == 1
    for name in ("norms", "plain"):
        one = load_file(tmp_path / "one" / name / "student.safetensors")
        for place in ("three", "both"):
            found = load_file(tmp_path / place / name / "student.safetensors")
            for key, tensor in one.items():
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-10)
