"""By what images are normalised, and where that is from: it is said, and follows a model wherever it goes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from indistill_fx.cli import run

MODEL = """
from torch import nn

def make(width=8):
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))
"""
DATA = ["--data", "imagefolder:data"]
OWN = "mean 0.1000, 0.1000, 0.1000 and std 0.0500, 0.0500, 0.0500"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two folders of images, and a run on them with figures of its own."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "models.py").write_text(MODEL)
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, level in (("dark", 60), ("light", 160)):
            (folder / "data" / split / label).mkdir(parents=True)
            for number in range(8):
                pixels = random.normal(level, 20, (12, 12, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / label / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        figures = [
            "--mean",
            "0.1",
            "--std",
            "0.05",
            "--epochs",
            "20",
            "--lr",
            "0.01",
            "--no-augment",
            "--device",
            "cpu",
        ]
        assert run(["train", "models.py:make", *DATA, *figures, "-o", "taught"]) == 0
    return folder


@pytest.fixture
def told(home, monkeypatch, capsys):
    """Runs a command beside the folders: its exit code, its output, and what it says in one line."""
    monkeypatch.chdir(home)

    def tell(*arguments: str):
        code = run(list(arguments))
        out, said = capsys.readouterr()
        return code, out, " ".join(said.split())

    return tell


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (
            "models.py:make",
            [],
            "mean 0.4850, 0.4560, 0.4060 and std 0.2290, 0.2240, 0.2250, the default for these data.",
        ),
        ("models.py:make", ["--mean", "0.1", "--std", "0.05"], f"{OWN}, as given."),
        ("taught", [], f"{OWN}, as taught was trained."),
    ],
)
def test_it_is_always_said(told, model, options, said):
    code, _, text = told("evaluate", model, *DATA, *options)
    assert code == 0 and f"Images are normalised by {said}" in text


def test_a_students_source_keeps_it(told, home):
    """Its spec measures what its run does, in every command; class names are kept, too."""
    quick = ["--macs", "0.5", "--epochs", "1", "--warmup", "1", "--samples", "8", "--no-export", "--device", "cpu"]
    assert (answer := told("compress", "taught", *DATA, *quick, "-o", "half"))[0] == 0, answer
    spec = "half/student.py:Student@half/student.safetensors"
    found = [json.loads(told("evaluate", model, *DATA, "--json")[1]) for model in ("half", spec)]
    assert found[0] == found[1]
    code, _, text = told("train", spec, *DATA, "--epochs", "1", "-o", "on")
    assert code == 0 and f"{OWN}, as {spec} needs them." in text
    assert told("prune", "taught", "--ratio", "0.5", "-o", "small/")[0] == 0
    spec = "small/student.py:Student@small/student.safetensors"
    assert f"{OWN}, as {spec} needs them." in told("evaluate", spec, *DATA)[2]
    assert json.loads((home / "small" / "student.json").read_text())["classes"] == ["dark", "light"]
    assert told("prune", "models.py:make", "--ratio", "0.5", "--input", "3x12x12", "-o", "small/")[0] == 0
    assert "the default for these data" in told("evaluate", spec, *DATA)[2]  # nothing is left of the other one
    (home / "small" / "student.json").write_text('{"normalisation": [[0.1], [0]]}')
    code, _, text = told("evaluate", spec, *DATA)
    assert (
        code == 2
        and "is damaged" in text
        and "Remove it, and give what it would say: --input, --mean, --std, --logits, --task." in text
    )


def test_an_exported_file_keeps_it(told):
    assert told("export", "taught", "-o", "taught.onnx")[0] == 0
    found = [json.loads(told("evaluate", model, *DATA, "--json")[1]) for model in ("taught", "taught.onnx")]
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert f"{OWN}, as taught.onnx needs them." in told("evaluate", "taught.onnx", *DATA)[2]
