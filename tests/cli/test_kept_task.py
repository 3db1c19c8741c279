"""A run keeps its task: what reads a run directory measures, compares and speaks by it, and infers nothing."""

from __future__ import annotations

import json

import pytest

MODELS = """
import torch
from torch import nn
from indistill_fx.losses.task import Language, Regression, Segmentation

def net(outputs=1):
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))

def dense():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids):
        return self.out(torch.relu(self.embedding(ids)))

def drawn(seed=0):
    return torch.Generator().manual_seed(seed)

def both(inputs, labels):
    return [(inputs[:8], labels[:8])], [(inputs[8:], labels[8:])]

X = torch.randn(16, 1, 8, 8, generator=drawn())
IDS = torch.randint(20, (16, 6), generator=drawn())

def counts():  # all 0 or 1 in the test set, like labels that are on or off
    labels = torch.randn(16, 1, generator=drawn(1)) * 3
    labels[8:] = (labels[8:] > 0).float()
    return both(X, labels)

def maps():
    labels = torch.randint(3, (16, 8, 8), generator=drawn(1))
    labels[:, :4] = 254
    return both(X, labels)

def masked():  # the words that count happen to be left as they are, so the labels look like the inputs
    labels = torch.full_like(IDS, -100)
    labels[:, 2] = IDS[:, 2]
    return both(IDS, labels)

def tags():
    return both(X, (torch.randn(16, 3, generator=drawn(1)) > 0).float())

void, aligned = Segmentation(void=254), Language(shift=False)

class Doses(Regression):
    name = "doses"
"""
QUICK = ("--epochs", "1", "--device", "cpu")


@pytest.fixture
def told(tmp_path, printed):
    (tmp_path / "models.py").write_text(MODELS)
    return printed


CASES = {
    "counts": ("net", "regression", "regression", {}),
    "maps": ("dense", "models.py:void", "segmentation", {"void": 254}),
    "masked": ("Words", "models.py:aligned", "language", {"shift": False}),
    "tags": ("net?outputs=3", "multilabel", "multilabel", {"binary": False}),
}


@pytest.mark.parametrize("data", CASES)
def test_what_reads_a_run_has_the_task_that_it_was_trained_on(told, tmp_path, data):
    model, asked, name, settings = CASES[data]
    told("train", f"models.py:{model}", "--data", f"models.py:{data}", "--task", asked, *QUICK, "-o", "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["about"]["labels"] == {"name": name, "settings": settings}
    evaluation = ("evaluate", "run", "--data", f"models.py:{data}")
    measured = json.loads(told(*evaluation, "--json").partition("\n}")[0] + "}")
    assert (measured["task"], measured["metrics"]) == (name, record["result"]["metrics"])
    assert f"Task: {name}, as run was trained." in told(*evaluation)
    del record["about"]["labels"]  # as in a run of an earlier version: inferred
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    if data == "maps":
        assert "Label 254 is out of range" in told(*evaluation, code=2)
    else:
        assert ", inferred from the labels of the first batch." in told(*evaluation)


def test_export_and_check_speak_of_the_task(told, tmp_path):
    def deployed(data):
        model, asked, name, _ = CASES[data]
        told("train", f"models.py:{model}", "--data", f"models.py:{data}", "--task", asked, *QUICK, "-o", data)
        with_data = told("export", data, "-o", f"{data}.onnx", "--data", f"models.py:{data}")
        assert f"Task: {name}, as {data} was trained." in with_data
        compared = told("check", f"{data}.onnx", "--against", data, "--data", f"models.py:{data}")
        assert f"Task: {name}, as {data} was trained." in compared
        return with_data, told("export", data, "-o", f"{data}.onnx"), compared

    for said in deployed("counts"):
        assert "class" not in said and "real data:" not in said
    said, without_data, compared = deployed("masked")
    assert "real data: 100.00% of the positions of 8 samples get the same word" in said
    assert "100.00% of the positions of 8 samples get the same word." in compared
    assert "names" not in said + without_data
    said, without_data, compared = deployed("maps")
    assert "real data: 100.00% of the pixels of 8 samples get the same class" in said
    assert "The file holds no class names, because they are not known" in said and "no class names" in without_data


def test_a_task_of_ones_own_is_run_only_as_it_was(told, tmp_path):
    (tmp_path / "own.py").write_text(MODELS)
    told("train", "models.py:net", "--data", "models.py:counts", "--task", "own.py:Doses", *QUICK, "-o", "run")
    evaluation = ("evaluate", "run", "--data", "models.py:counts")
    assert "Task: doses, as run was trained." in told(*evaluation)
    (tmp_path / "own.py").write_text(MODELS + "raise SystemExit('was run')\n")
    said = told(*evaluation, code=2)
    assert (
        "run was trained on a task of the user's own, `doses`" in said
        and "own.py:Doses, which has changed since" in said
    )
    assert "--task file.py:task" in said and "was run" not in said
    assert "Task: regression, as requested." in told(*evaluation, "--task", "regression")
    told("export", "run", "-o", "run.onnx")  # without labels no task is needed


@pytest.mark.parametrize("settings", [{"void": "254"}, {"width": 3}, [], {"void": True}])
def test_a_damaged_task_is_an_error(told, tmp_path, settings):
    told("train", "models.py:dense", "--data", "models.py:maps", "--task", "models.py:void", *QUICK, "-o", "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["about"]["labels"]["settings"] = settings
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    said = told("evaluate", "run", "--data", "models.py:maps", code=2)
    assert "What run keeps of its task `segmentation` is damaged" in said


def test_students_have_the_task_of_the_run_that_teaches_them(told, tmp_path):
    told("train", "models.py:net", "--data", "models.py:counts", "--task", "regression", *QUICK, "-o", "teacher")
    (tmp_path / "flat.py").write_text(
        MODELS.replace("labels[8:] = (labels[8:] > 0).float()", "labels = (labels > 0).float()")
    )
    common = ("teacher", "models.py:net", "--data", "flat.py:counts", "--no-warmup", *QUICK)
    said = told("distill", *common, "-o", "run")
    assert "The task is regression, as teacher was trained; --task names another." in said
    assert json.loads((tmp_path / "run/run.json").read_text())["about"]["labels"]["name"] == "regression"
    assert "Task: multilabel." in told("distill", *common, "--task", "multilabel", "-o", "other")
