"""`compress` from the shell: a trained model in, a student of its own source code out, which every other command takes."""

from __future__ import annotations

import json
import re

import onnx
import pytest

from indistill_fx.cli import run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    home = tmp_path_factory.mktemp("teacher") / "run"
    command = ["train", "indistill_fx.demo:DigitsStudent", "--data", "digits", "--epochs", "3", "--lr", "0.01"]
    assert run([*command, "--device", "cpu", "-o", str(home)]) == 0
    return home


@pytest.fixture(scope="module")
def half(teacher, tmp_path_factory):
    home = tmp_path_factory.mktemp("a half") / "run"
    command = ["compress", str(teacher), "--data", "digits", "--macs", "0.5", "--epochs", "1", "--warmup", "1"]
    assert run([*command, "--samples", "64", "--device", "cpu", "-o", str(home)]) == 0
    return home


def test_a_trained_model_becomes_a_smaller_one(half, capsys):
    steps = {step["name"]: step for step in json.loads((half / "compress.json").read_text())["steps"]}
    assert steps["trained"]["macs"] <= 0.5 * steps["teacher"]["macs"]
    assert steps["readers fitted"]["divergence"] < steps["shrunk"]["divergence"]
    assert [name for name, step in steps.items() if step["start"]] == ["readers fitted"]
    assert run(["evaluate", str(half), "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(steps["trained"]["accuracy"])
    assert run(["inspect", f"{half}/student.py:Student@{half}/student.safetensors", "--input", "1x8x8"]) == 0


def test_its_onnx_file_is_the_one_that_export_writes(half, tmp_path, capsys):
    """It can be served by what it says of itself, `check` finds nothing, and reports show its latency."""
    assert run(["check", str(half / "student.onnx"), "--against", str(half), "--data", "digits"]) == 0
    assert json.loads((half / "export.json").read_text())["latency_ms"] > 0
    assert run(["export", str(half), "-o", str(tmp_path / "out.onnx")]) == 0
    files = [onnx.load(path) for path in (half / "student.onnx", tmp_path / "out.onnx")]
    ours, exported = ({entry.key: entry.value for entry in file.metadata_props} for file in files)
    assert ours == exported and {"classes", "mean", "std", "model", "run"} <= ours.keys()


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_run_goes_on_from_a_run(command, teacher, half, tmp_path, capsys):
    """The new run names the model of the old one, and `distill` finds the plan beside that one's student.py."""
    home = tmp_path / "run"
    models = [str(teacher), str(half)] if command == "distill" else [str(half)]
    more = ["--no-warmup"] if command == "distill" else []
    assert run([command, *models, "--data", "digits", "--epochs", "1", *more, "-o", str(home)]) == 0
    assert ("says which channels it kept" in capsys.readouterr().err) == (command == "distill")
    assert run(["evaluate", str(home), "--data", "digits"]) == 0, capsys.readouterr().err
    kept = [json.loads((folder / "run.json").read_text())["about"] for folder in (half, home)]
    assert kept[0]["model"] == kept[1]["model"] and kept[0]["seal"] == kept[1]["seal"]


def test_a_plan_that_an_edited_student_no_longer_fits_is_not_taken(teacher, half, tmp_path, capsys):
    source = (half / "student.py").read_text()
    widths = json.loads((half / "compress.json").read_text())["widths"]["blocks.1.0"]
    (tmp_path / "plan.json").write_text((half / "plan.json").read_text())
    (tmp_path / "student.py").write_text(re.sub(rf"\b{widths[1]}\b", str(widths[1] + 1), source))
    command = [
        "distill",
        str(teacher),
        f"{tmp_path}/student.py:Student",
        "--data",
        "digits",
        "--epochs",
        "1",
        "--limit",
        "50",
    ]
    assert run([*command, "-o", str(tmp_path / "run")]) == 0
    assert "no longer fits it: its layers are paired anew" in " ".join(capsys.readouterr().err.split())


UNLABELLED = """
def unlabelled():
    return [[{k: batch[k] for k in ("words", "table")} for batch in part] for part in make_loaders()]
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--main", "kd2"], "'kd2'"),
        (["--warmup", "3,4", "--one-by-one"], "2 lengths"),
        (["-o", "/proc/run"], "`/proc/run` cannot be made"),
    ],
)
def test_what_is_known_from_the_start_is_said_before_the_work(options, said, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("indistill_fx.compression.compress.make_student", lambda *_, **__: pytest.fail("work was done"))
    home = tmp_path / "run"
    assert run(["compress", str(teacher), "--data", "digits", "--macs", "0.5", "-o", str(home), *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not home.exists()
    if options[0] == "-o":
        assert run(["prune", str(teacher), "--ratio", "0.5", "-o", "/proc/small/"]) == 2


def test_data_without_labels_are_compared_with_the_teacher_alone(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(NETS + UNLABELLED)
    nets, home = f"{tmp_path}/nets.py", tmp_path / "run"
    command = [
        "compress",
        f"{nets}:make",
        "--data",
        f"{nets}:unlabelled",
        "--macs",
        "0.5",
        "--epochs",
        "1",
        "--no-export",
    ]
    assert run([*command, "--main", "labels", "-o", str(home)]) == 2
    assert "The loss `labels` learns from labels, but the data have none." in capsys.readouterr().err
    assert run([*command, "-o", str(home)]) == 0
    shown = capsys.readouterr()
    assert re.search(r"step +MACs +parameters +divergence", shown.out)  # nothing was measured
    said = "the data have no labels: the student learns from the teacher's answers alone (weight_labels=0)"
    assert said in shown.err.splitlines()
    command = ["distill", f"{nets}:make", f"{nets}:make", "--data", f"{nets}:unlabelled", "--epochs", "1"]
    assert run([*command, "-o", str(tmp_path / "distilled")]) == 0
    assert said in capsys.readouterr().err.splitlines()


def test_the_help_shows_the_recipes_defaults(capsys):
    assert run(["compress", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Epochs of the main stage. [default: 14;" in said and "[default: cosine]" in said


def test_prune_leaves_a_run_alone(half, capsys):
    """It overwrote the trained weights."""
    before = (half / "student.safetensors").read_bytes()
    assert run(["prune", "indistill_fx.demo:DigitsStudent", "--ratio", "0.5", "--input", "1x8x8", "-o", str(half)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds a run (compress.json), whose student would be overwritten. Give another directory." in said
    assert (half / "student.safetensors").read_bytes() == before


def test_stopped_before_anything_is_saved(teacher, tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("indistill_fx.compression.compress.make_student", stopped)
    assert run(["compress", str(teacher), "--data", "digits", "--macs", "0.5", "-o", str(tmp_path / "run")]) == 130
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert said[-2:] == ["Nothing is saved yet.", "Stopped."]


def test_a_budget_that_cannot_be_met_is_refused_before_training(teacher, tmp_path, capsys):
    command = ["compress", str(teacher), "--data", "digits", "--macs", "0.001", "--samples", "32", "-o"]
    assert run([*command, str(tmp_path / "none")]) == 2
    assert "The network cannot be made smaller than" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


NETS = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.table, self.mix, self.last = nn.Embedding(20, 16), nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, words, table):
        return self.last(self.mix(self.words(words).mean(1) + self.table(table).tanh()).relu())

def make():
    torch.manual_seed(0)
    return Two()

def make_loaders():
    torch.manual_seed(1)
    net, batches = make().eval(), []
    for _ in range(3):
        batch = {"words": torch.randint(20, (8, 5)), "table": torch.randn(8, 6), "name": ["x"] * 8}
        with torch.no_grad():
            batch["labels"] = net(batch["words"], batch["table"]).argmax(1)
        batches.append(batch)
    return batches, batches[:1]
"""


def test_a_run_knows_its_several_inputs(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(NETS)
    home, nets = str(tmp_path / "run"), f"{tmp_path}/nets.py"
    command = [
        "compress",
        f"{nets}:make",
        "--data",
        f"{nets}:make_loaders",
        "--macs",
        "0.5",
        "--epochs",
        "1",
        "-o",
        home,
    ]
    assert run(command) == 0, capsys.readouterr().err
    assert "all pairs: loss by pair: :relu" in capsys.readouterr().err
    assert run([*command, "--resume"]) == 0
    assert run(["export", home, "-o", f"{tmp_path}/out.onnx"]) == 0, capsys.readouterr().err
    assert run(["inspect", home]) == 0
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["about"]["inputs"]
    assert inputs[1] == "table:float32x6" and inputs[0].startswith("words:int64[")


@pytest.mark.parametrize("command", ["train", "distill"])
def test_of_batches_by_name_a_run_keeps_what_its_model_takes(command, tmp_path, capsys):
    """Labels and file names stay out, and `export`, which the run itself advises, needs no --input."""
    (tmp_path / "nets.py").write_text(NETS)
    home, nets = tmp_path / "run", f"{tmp_path}/nets.py"
    models = [f"{nets}:make"] * (2 if command == "distill" else 1)
    more = ["--no-warmup"] if command == "distill" else []
    assert run([command, *models, "--data", f"{nets}:make_loaders", "--epochs", "1", *more, "-o", str(home)]) == 0
    assert run(["export", str(home), "-o", f"{tmp_path}/out.onnx"]) == 0, capsys.readouterr().err
    inputs = json.loads((home / "run.json").read_text())["about"]["inputs"]
    assert [text.partition(":")[0] for text in inputs] == ["words", "table"]


@pytest.mark.parametrize("more", [["--warmup", "2"], ["--feed", "teacher"], ["--one-by-one"]])
def test_what_no_warmup_makes_void_is_refused(more, tmp_path, capsys):
    home = tmp_path / "run"
    command = ["compress", "indistill_fx.demo:DigitsTeacher", "--data", "digits", "--macs", "0.5", "-o", str(home)]
    assert run([*command, "--no-warmup", *more]) == 2
    assert "and --no-warmup contradict each other" in capsys.readouterr().err and not home.exists()


@pytest.mark.parametrize("resume", [(), ("--resume",)])
@pytest.mark.parametrize(
    "name",
    ["plan.json", "student.json", "start.safetensors", "student.safetensors", "student.onnx", "metrics.jsonl"],
)
def test_files_of_the_user_are_not_overwritten(name, resume, tmp_path, capsys, monkeypatch):
    """It overwrote a plan.json, and others, in a folder without a run."""
    monkeypatch.setattr("indistill_fx.cli.common.open_model", None)  # refused before any work
    file = tmp_path / "half" / name
    file.parent.mkdir()
    file.write_text("mine")
    command = ["compress", "indistill_fx.demo:DigitsTeacher", "--data", "digits", "--macs", "0.5", *resume]
    assert run([*command, "-o", str(file.parent)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name} was written or changed by somebody else, and would be overwritten. Move it away" in said
    assert file.read_text() == "mine" and list(file.parent.iterdir()) == [file]


def test_weights_of_the_user_are_not_overwritten_by_a_run(tmp_path, capsys):
    (tmp_path / "student.safetensors").write_text("mine")
    command = ["train", "indistill_fx.demo:DigitsStudent", "--data", "digits", "--limit", "32", "--epochs", "1"]
    for resume in ([], ["--resume"]):
        assert run([*command, *resume, "-o", str(tmp_path)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "student.safetensors is not of a run, and this run would overwrite it. Move it away" in said
    assert (tmp_path / "student.safetensors").read_text() == "mine"


PARALLEL = """
import torch
from torch import nn

class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)) for _ in range(2))

    def forward(self, x):
        return self.one(x) + self.two(x)

def make():
    torch.manual_seed(0)
    return Parallel()

def make_loaders():
    torch.manual_seed(1)
    x = torch.randn(24, 6)
    batches = [(x, make()(x).detach().argmax(1))]
    return batches, batches
"""


def test_a_network_without_pairs_has_no_warm_up(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(PARALLEL)
    nets = f"{tmp_path}/nets.py"
    command = ["compress", f"{nets}:make", "--data", f"{nets}:make_loaders", "--macs", "0.5", "--epochs", "1"]
    assert run([*command, "-o", f"{tmp_path}/run"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "No layers can be paired, so there is no warm-up." in said
    assert "all pairs" not in said
