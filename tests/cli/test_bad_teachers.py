"""Teachers, labels and losses that do not fit: one paragraph and exit code 2, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper

from indistill_fx.cli import run

MODELS = """
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from indistill_fx.losses.task import Regression

class Unfit(Regression):
    name = "unfit"
    def metrics(self, outputs): return {"accuracy": MulticlassAccuracy(outputs)}

class Failing(Regression):
    name = "failing"
    def loss(self, logits, labels): raise KeyError("no such column")

def shaped(student, teacher, labels): return student.logits
def named(student, teacher, labels): return "much"
def constant(student, teacher, labels): return torch.zeros(())
def failing(student, teacher, labels): raise ZeroDivisionError("by zero")

def net(classes=10, maps=False):
    head = [nn.Conv2d(8, classes, 1)] if maps else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), *head)

def ten(): return net()
def three(): return net(3)
def dense(): return net(3, maps=True)
def deep():
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 3, 1))

class Masks(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.full((1, 8, 8), float(i)), torch.full((8, 8), 2 if i else 200)

def masks():
    loader = torch.utils.data.DataLoader(Masks(), batch_size=4)
    return loader, loader

def masks_of_three():
    pairs = [(torch.full((1, 8, 8), float(i)), torch.full((8, 8), i % 3)) for i in range(8)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    return loader, loader

def values():
    pairs = [(torch.full((1, 8, 8), float(i)), torch.full((3,), float(i))) for i in range(8)]
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    return loader, loader
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    nodes = [helper.make_node("NonZero", ["x"], ["i"], name="odd"), helper.make_node("Cast", ["i"], ["y"], to=1)]
    ends = [helper.make_tensor_value_info("x", 1, ["n", 1, 8, 8])], [helper.make_tensor_value_info("y", 1, None)]
    model = helper.make_model(helper.make_graph(nodes, "odd", *ends), opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "odd.onnx")
    return tmp_path


DIGITS = ["--data", "digits", "--limit", "50"]
MASKS = ["--data", "models.py:masks", "--task", "segmentation"]
CASES = {
    "an operator without a rule": (
        ["odd.onnx", "models.py:ten", *DIGITS], ["no rule for the operator `NonZero` (node `odd`)", "onnxruntime:odd.onnx"]
    ),
    "teachers of unlike classes": (
        ["models.py:ten", "models.py:ten", *DIGITS, "--teacher", "models.py:three"], ["different shapes", "same classes"]
    ),
    "a void label out of range": (["models.py:dense", "models.py:dense", *MASKS], ["200"]),
    "a loss that does not fit the task": (
        ["models.py:three", "models.py:three", "--data", "models.py:values", "--task", "regression", "--main", "dkd"], ["dkd"]
    ),
    "a metric that does not fit": (
        ["models.py:three", "models.py:three", "--data", "models.py:values", "--task", "models.py:Unfit"],
        ["A metric or the loss of task `unfit` fails on outputs (4, 3)"],
    ),
    "a task whose loss fails": (
        ["models.py:three", "models.py:three", "--data", "models.py:values", "--task", "models.py:Failing"],
        ["KeyError", "no such column"],
    ),
    "a task of maps without maps": (
        ["models.py:ten", "models.py:ten", *DIGITS, "--task", "segmentation"], ["(batch, classes, height, width)"]
    ),
    "a task of tokens without tokens": (["models.py:ten", "models.py:ten", *DIGITS, "--task", "language"], ["(batch, length, vocabulary)"]),
    "a loss of many numbers": (["models.py:ten", "models.py:ten", *DIGITS, "--main", "models.py:shaped"], ["not one number"]),
    "a loss that is not a tensor": (["models.py:ten", "models.py:ten", *DIGITS, "--main", "models.py:named"], ["returns a str"]),
    "a loss without a gradient": (["models.py:ten", "models.py:ten", *DIGITS, "--main", "models.py:constant"], ["would train nothing"]),
    "a loss that fails": (["models.py:ten", "models.py:ten", *DIGITS, "--main", "models.py:failing"], ["ZeroDivisionError", "models.py:"]),
    "outputs that were never saved": (["saved:nowhere", "models.py:ten", *DIGITS], ["has no saved outputs"]),
    "views of what does not vary": (["models.py:ten", "models.py:ten", *DIGITS, "--views", "2"], ["nothing is drawn"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_before_training(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, told = CASES[case]
    before = torch.get_rng_state()
    code = run(["distill", *arguments, "--no-warmup", "--epochs", "1", "-o", "out"])
    text = capsys.readouterr().err
    error = text[text.index("Error: ") :].strip()
    assert code == 2 and all(part in error for part in told), text
    assert "\n" not in error and not (here / "out" / "student.safetensors").exists()
    assert torch.equal(before, torch.get_rng_state())


def test_a_main_loss_that_cannot_be_is_said_before_the_warm_up(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is computed once on the first batch, so that no warm-up is lost."""
    models = ["models.py:deep", "models.py:deep", "--data", "models.py:masks_of_three", "--warmup", "1,1"]
    assert run(["distill", *models, "--main", "mlkd", "--epochs", "1", "-o", "out"]) == 2
    text = capsys.readouterr().err
    assert "mlkd relates the samples of a batch" in text and "1 epoch" not in text
    assert run(["distill", *models, "--main", "kd", "--epochs", "1", "-o", "out"]) == 0  # the same with a loss that can
