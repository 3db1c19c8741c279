"""The commands of README and of the pages run, in small; so does their Python. (The guides run as they stand: `test_site`.)"""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import indistill_fx as ifx
from indistill_fx.cli import run
from indistill_fx.deploy.bench import bench

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NOT_RUN_HERE = {
    "make demo": "`make wheel` runs the demo in CI",
    "make test": "it is CI",
    "make docs": "test_site builds the site by the same command",
    "git clone": "CI begins with it",
    ". .venv/bin/activate": "a matter of the reader's shell",
    ".venv/bin/python -m pytest": "CI runs all tests",
    ".venv/bin/pre-commit": "its hooks are the commands of `make check`",
    "python examples/paper_cifar10.py": "test_examples runs it",
    "python examples/serve_onnx.py": "the guide of own models runs it",
    "indistill-fx compress teacher.pt --data imagefolder:cifar10 --latency-ms": "whether 5 ms can be met depends on the machine",
}
"""Commands that are not run in this file, and why."""
ELSEWHERE = {ROOT / "docs/how_it_works.md", ROOT / "docs/glossary.md"}
"""Pages whose Python `test_site` runs and compares with what they print."""

MODELS = """
from torch import nn

def make(width=8):
    layers, channels = [], 3
    for name, new in (("layer1", width), ("layer2", 2 * width), ("layer3", 2 * width)):
        layers.append(nn.Sequential(nn.Conv2d(channels, new, 3, 2, 1), nn.BatchNorm2d(new), nn.ReLU()))
        channels = new
    net = nn.Sequential()
    for number, layer in enumerate(layers, 1):
        net.add_module(f"layer{number}", layer)
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("fc", nn.Linear(channels, 10))
    return net

def make_student():
    return make(4)
"""
SMALL = {"train", "distill", "compress", "save-outputs"}
MORE = {
    "train": ["--epochs", "1"],
    "distill": ["--epochs", "1"],
    "compress": ["--epochs", "1", "--samples", "16", "--warmup", "1"],
    "export": ["--max-drop", "100"],
    "bench": ["--threads", "1", "--batch", "2"],
}
"""What makes a command small: few samples, few epochs."""


def commands(text: str) -> list[str]:
    """The commands in a page's blocks, in order, without what is said beside them."""
    found = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M):
        if kind in ("", "sh", "bash"):
            found += [line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines()]
    known = r"(indistill-fx|python|torchrun|make|pip|git|\.venv/bin/\S+|\.) "
    return [re.split(r"\s{2,}(?=#|[a-z]+[ ,])", line)[0].strip() for line in found if re.match(known, line)]


def in_small(command: str) -> list[str]:
    """The arguments of a command for the models and pictures of this test, with what makes it small."""
    command = (
        " ".join(command.split()).replace("…", "imagefolder:DIR").replace(" --compile", "")
    )  # which takes a minute
    command = re.sub(r"(?<=--data )\S+", "imagefolder:images", command).replace("--tap layer3", "--tap layer3.0")
    for name, there in (("TEACHER", "teacher.pt"), ("STUDENT", "models.py:make_student"), ("RUN_DIR", "runs/first")):
        command = command.replace(name, there)
    words = shlex.split(command)[1:]
    words = [re.sub(r"torchvision:resnet18\?num_classes=10", "models.py:make", word) for word in words]
    words = [re.sub(r"taps=.*", "taps=relu,relu_1", word) for word in words]
    if words[0] in SMALL:
        words += ["--limit", "40", "--batch-size", "10", "--device", "cpu"][: 4 if words[0] == "save-outputs" else None]
    if words[0] not in ("bench", "report", "inspect", "prune") and "--data" in words:
        words += ["--size", "32"]
    if words[0] == "align" and not {"--data", "--input"} & {*words}:
        words += ["--input", "3x32x32"]
    return words + MORE.get(words[0], [])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the pages speak of: models in files, their weights, an ONNX file, a folder of pictures, a run."""
    home = tmp_path_factory.mktemp("pages")
    for name in ("models.py", "student.py"):
        (home / name).write_text(MODELS)
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(10):
            (home / f"images/{split}/{label}").mkdir(parents=True)
            for number in range(11):  # evaluate --retrieval looks at the nearest 100
                pixels = random.integers(0, 128, (32, 32, 3)) + 12 * label
                Image.fromarray(pixels.astype(np.uint8)).save(home / f"images/{split}/{label}/{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for number, name in enumerate(("teacher", "a", "b")):
            torch.manual_seed(number)
            model = ifx.load("models.py:make")
            data = ifx.open_data("imagefolder:images", size=32, batch_size=10, augment=False)
            ifx.train(
                model, data.train, epochs=15, learning_rate=0.01, progress=False
            )  # compress wants a teacher that knows something
            torch.save(model, f"{name}.pt")
        ifx.export_onnx(ifx.load("teacher.pt").eval(), "teacher.onnx", torch.randn(2, 3, 32, 32))
        assert (
            run(in_small("indistill-fx distill teacher.pt models.py:make_student --data imagefolder:DIR -o runs/first"))
            == 0
        )
        assert run(in_small("indistill-fx export runs/first -o student.onnx --int8 --data imagefolder:DIR")) == 0
    return home


def reason_not_to(command: str) -> str:
    plain = " ".join(command.split())
    return next((why for start, why in NOT_RUN_HERE.items() if plain.startswith(start)), "")


RUN = [
    pytest.param(page, id=str(page.relative_to(ROOT)))
    for page in PAGES
    if any(not reason_not_to(command) for command in commands(page.read_text(encoding="utf-8")))
]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run(page, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("indistill_fx.deploy.bench.bench", partial(bench, seconds=0.05))
    for made in place.iterdir():
        (tmp_path / made.name).symlink_to(made) if made.name != "runs" else None
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/first").symlink_to(place / "runs/first")
    for command in commands(page.read_text(encoding="utf-8")):
        if not reason_not_to(command):
            assert command.startswith("indistill-fx "), f"`{command}` is neither run nor is there a reason why not"
            out = re.search(r"-o (runs/first)\b", command)
            if out:
                (tmp_path / out[1]).unlink()  # the page makes it itself
            assert run(in_small(command)) == 0, command


def test_pages_have_commands_and_every_reason_is_used():
    found = [" ".join(command.split()) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 30
    unused = [start for start in NOT_RUN_HERE if not any(command.startswith(start) for command in found)]
    assert unused == []


def named() -> dict[str, Any]:
    """What the fragments of Python in the pages speak of: models, loaders, and what they import elsewhere."""
    from torchmetrics import MeanAbsoluteError

    from indistill_fx.losses.task import Regression

    data = ifx.open_data("imagefolder:images", augment=False, batch_size=10)
    teacher, student = ifx.load("models.py:make"), ifx.load("models.py:make_student")
    more = {
        "Regression": Regression,
        "MeanAbsoluteError": MeanAbsoluteError,
        "SmallNet": lambda: ifx.load("models.py:make_student"),
    }
    return {"ifx": ifx, "torch": torch, "teacher": teacher, "student": student, "data": data, **more}


PYTHON = [
    pytest.param(page, block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    if page not in ELSEWHERE
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_the_python_of_a_page_runs(page, block, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for made in place.iterdir():
        (tmp_path / made.name).symlink_to(made)
    block = block.replace("teacher.py:make@teacher.safetensors", "models.py:make")
    home = named()
    exec(compile(block, str(page), "exec"), home)
    if "make" in home:  # a file with a function that makes a model
        assert home["make"]()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_start_page_shows_what_align_prints(capsys):
    shown = re.search(
        r"```\n\$ indistill-fx (align [^\n]*)\n(.*?)```", (ROOT / "docs/index.md").read_text(encoding="utf-8"), re.S
    )
    assert shown is not None and run(shown[1].split()) == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines() if line.split()] == [
        line.split() for line in shown[2].splitlines() if line.split()
    ]
