"""`distill`, `train` and `evaluate` as a user asks them for more than the defaults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import indistill_fx as ifx
from indistill_fx.cli import common, run
from indistill_fx.curriculum import Budget
from indistill_fx.data.open import open_data
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.graph.ops import op_name
from indistill_fx.training import recipes
from indistill_fx.training.options.settings import Options, Settings
from indistill_fx.training.recipes import NO_WARMUP, RECIPES, default_curriculum, least_steps

MODELS = """
from torch import nn

def make(width=4):
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 10))

class Several(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = make(width)

    def forward(self, x):
        return {"mean": x.mean((1, 2, 3)), "scores": self.net(x)}

def several(width=4):
    return Several(width)

def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
QUICK = ["--data", "digits", "--limit", "100", "--batch-size", "50"]
PAIR = ["models.py:make?width=8", "models.py:make"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path


def told(*arguments: str) -> None:
    assert run(list(arguments)) == 0


def story(path: str) -> Any:
    with open(f"{path}/run.json") as file:
        return json.load(file)


def epochs(path: str) -> list[tuple[str, float]]:
    return [(epoch["stage"], epoch["learning_rate"]) for epoch in story(path)["result"]["epochs"]]


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        (
            ["--warmup", "1,2", "--warmup-lr", "0.1,0.01", "--warmup-optimizer", "sgd,adamw"],
            [
                "3: 1 epoch, sgd, learning rate 0.1",
                "7: 2 epochs, adamw, learning rate 0.01",
                "8: 3 epochs, adamw, learning rate 0.01",
            ],
        ),
        (
            ["--warmup-steps", "3,1", "--layers", "7,3"],
            ["7: 1 step, adam, learning rate 0.001", "3: 3 steps, adam, learning rate 0.001"],
        ),
        (
            ["--layers", "7", "--patience", "2", "--warmup-lr", "0.5"],
            [
                "7: at most 1 epoch, adam, learning rate 0.5, ends after 2 without 0.01 relative progress",
                "8: at most 3 epochs, adam, learning rate 0.5, ends after 2 without 0.01 relative progress",
            ],
        ),
        (["--no-warmup"], []),
        (
            ["--warmup", "2", "--layers", "3,7", "--penultimate", "0"],
            [f"{k}: 2 epochs, adam, learning rate 0.001" for k in (3, 7)],
        ),
        (
            ["--warmup", "0,0", "--penultimate", "1", "--keep", "0.25"],
            ["8: 1 epoch, adam, learning rate 0.001", "+0.25 times the loss of the penultimate vectors"],
        ),
    ],
)
def test_the_warm_up_is_what_was_asked_for(here, capsys, options, schedule):
    told("distill", *PAIR, *QUICK, "-o", "run", "--epochs", "1", *options)
    plus = "".join(f", plus {line[1:]}" for line in schedule if line[0] == "+")
    schedule = [*(line for line in schedule if line[0] != "+"), f"main: 1 epoch, adam, learning rate 0.001{plus}"]
    assert story("run")["schedule"] == schedule
    shown = capsys.readouterr().err
    assert shown.index("Teacher's accuracy") < shown.index("\n".join(schedule)) < shown.index("loss")


def test_how_many_steps_a_warm_up_needs():
    """The figures are measured (docs/results.md): borders on CIFAR-10 and digits."""
    assert [least_steps(share, made=True) for share in (0.9, 0.03)] == [20, 20]
    assert [least_steps(share, made=False) for share in (0.9, 0.2, 0.19)] == [90, 90, None]


def test_the_warm_up_that_nobody_asked_for_follows_from_the_pair(here, monkeypatch):
    """One of the teacher's kind learns all pairs at once; there must be steps enough, and a resumed run keeps its own."""
    monkeypatch.setattr(recipes, "_LEAST_STEPS_NEW", 15)
    told("distill", *PAIR, *QUICK, "-o", "short", "--epochs", "14")
    assert story("short")["schedule"] == [
        "main: 14 epochs, adam, learning rate 0.001",
        "no warm-up: half of the main stage is 14 steps, but for a student with new weights it pays only from 15 steps on",
    ]
    told("distill", *PAIR, *QUICK, "-o", "long", "--epochs", "16")
    assert story("long")["schedule"] == [
        "all pairs: 8 epochs, adam, learning rate 0.001",
        "main: 16 epochs, adam, learning rate 0.001",
        "warm-up: the student is of the teacher's kind",
    ]
    told("distill", *PAIR, *QUICK, "-o", "long", "--epochs", "18", "--resume")
    assert story("long")["schedule"][:2] == [
        "all pairs: 8 epochs, adam, learning rate 0.001",
        "main: 18 epochs, adam, learning rate 0.001",
    ]
    told("distill", *PAIR, *QUICK, "-o", "steps", "--main-steps", "60")
    assert story("steps")["schedule"][0] == "all pairs: 30 steps, adam, learning rate 0.001"
    told(
        "distill",
        "indistill_fx.demo:DigitsTeacher",
        "indistill_fx.demo:DigitsStudent",
        *QUICK,
        "-o",
        "other",
        "--epochs",
        "1",
    )
    assert (
        story("other")["schedule"][1] == "no warm-up: the student is of another kind, with 0.4% of the teacher's MACs"
    )


def test_a_student_is_of_the_teachers_kind_though_their_modes_differ():
    """Dropout and stochastic depth, as functions, are other operations in a student's graph than in a teacher's."""
    import torchvision

    def net(growth: int) -> torch.nn.Module:
        return torchvision.models.DenseNet(growth, (2, 2), 2 * growth, drop_rate=0.1, num_classes=10)

    x = torch.randn(2, 3, 32, 32)
    models = ifx.trace(net(8), x, role="teacher"), ifx.trace(net(4), x, role="student")
    ops = [[op_name(node) for node in model.graph_module.graph.nodes] for model in models]
    assert ops[0] != ops[1]
    curriculum, why = default_curriculum(*models, ifx.align(*models), Budget(20), 15)
    assert (
        curriculum == ifx.Curriculum(together=True, lengths=10)
        and why == "warm-up: the student is of the teacher's kind"
    )
    curriculum, why = default_curriculum(*models, ifx.align(*models), Budget(20), 10, "segmentation")
    assert curriculum == NO_WARMUP and why.endswith("pay for classification, and the task is segmentation")
    curriculum, why = default_curriculum(*models, ifx.align(*models), Budget(1), None)
    assert (curriculum, why) == (
        NO_WARMUP,
        "no warm-up: the main stage is 1 epoch, too short for a warm-up of half its length",
    )


def test_what_is_kept_in_the_main_stage_leaves_the_choice_of_the_warm_up(here, monkeypatch):
    monkeypatch.setattr(recipes, "_LEAST_STEPS_NEW", 15)
    told("distill", *PAIR, *QUICK, "-o", "run", "--keep-features", "10")
    assert "warm-up: the student is of the teacher's kind" in story("run")["schedule"]
    assert [phase["name"] for phase in story("run")["phases"]] == ["all pairs", "main"]


def test_quantisation_aware_training_follows_a_run_and_exports(here, capsys):
    told("distill", *PAIR, *QUICK, "-o", "run", "--main-steps", "2", "--qat", "1")
    assert "int8: 3 layers and what they read are rounded" in story("run/int8")["schedule"]
    assert "indistill-fx export run/int8 -o student.onnx --int8 --data digits" in capsys.readouterr().out
    told("export", "run/int8", "-o", "student.onnx", "--int8", "--data", "digits", "--max-drop", "100")
    assert (here / "student.int8.onnx").exists()
    assert run(["distill", *PAIR, *QUICK, "-o", "both", "--compare", "--qat", "1"]) == 2
    assert "--qat continues with only one" in " ".join(capsys.readouterr().err.split())


def test_models_without_layers_in_common_are_distilled_by_their_logits(here, capsys):
    models = ["models.py:make", "models.py:linear"]
    assert run(["distill", *models, *QUICK, "-o", "refused", "--warmup", "1"]) == 2
    assert "without a warm-up (--no-warmup)" in " ".join(capsys.readouterr().err.split())
    told("distill", *models, *QUICK, "-o", "run", "--epochs", "1", "--no-warmup")
    assert story("run")["schedule"] == ["main: 1 epoch, adam, learning rate 0.001"]
    assert json.loads((here / "run/plan.json").read_text())["pairs"] == []
    told("distill", *models, *QUICK, "-o", "chosen", "--epochs", "1")
    assert story("chosen")["schedule"][1:] == ["no warm-up: the two have no layers that can be paired"]
    told("distill", *models, "--teacher", "models.py:make?width=8", *QUICK, "-o", "two", "--epochs", "1", "--no-warmup")
    assert run(["distill", *models, *QUICK, "-o", "at", "--no-warmup", "--main", "at"]) == 2
    assert "no layers of the two models can be paired" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    """What `distill` would be asked to do, instead of doing it."""
    found: list[dict[str, Any]] = []
    for place in (
        "indistill_fx.training.chain.distill",
        "indistill_fx.training.distill.distill",
    ):  # chain first: it imports the other
        monkeypatch.setattr(place, lambda teacher, student, loader, **options: found.append(options))
    monkeypatch.setattr("indistill_fx.cli.training.print_run", lambda record, place: None)
    return found


def test_the_papers_recipe(here, asked):
    told("distill", *PAIR, *QUICK, "-o", "run", "--recipe", "paper", "--assistant", "models.py:make?width=6")
    assistant, student = asked
    same = {"main": "pkt", "optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.0}
    assert same.items() <= student.items() and same.items() <= assistant.items()
    assert student["epochs"] == 58 and student["schedule"] == "step" and student["milestones"] == [48]
    assert assistant["epochs"] == 50 and assistant["schedule"] == "constant" and not assistant["milestones"]
    lengths = [(phase.length, phase.learning_rate, phase.optimizer) for phase in student["curriculum"].schedule(3)]
    assert lengths == [(3, 1e-3, "adam"), (4, 1e-3, "adam"), (5, 1e-3, "adam")]
    assert student["curriculum"].loss == "mse"
    assert not assistant["curriculum"].chosen(["3", "7"])
    settings = Settings.of({name: value for name, value in student.items() if name in Options.__annotations__})
    assert [settings.rate(epoch, 58, 0) for epoch in (0, 47, 48, 57)] == [
        1e-3,
        1e-3,
        pytest.approx(1e-4),
        pytest.approx(1e-4),
    ]
    assert student["about"]["teacher"] == "run/step-1" and student["run_dir"] == "run/step-2"


def test_the_recipe_for_retrieval(here, asked):
    told("distill", *PAIR, *QUICK, "-o", "run", "--recipe", "retrieval", "--assistant", "models.py:make?width=6")
    assistant, student = asked
    assert student["main"] == assistant["main"] == "pkt"
    stages = student["curriculum"].chosen(["3", "7"], "8")
    assert {name: (stage.length, stage.learning_rate, stage.optimizer) for name, stage in stages.items()} == {
        "8": (12, 1e-3, "adam")
    }
    assert not assistant["curriculum"].chosen(["3", "7"], "8")
    for options, epochs in ((student, 21), (assistant, 33)):
        settings = Settings.of({name: value for name, value in options.items() if name in Options.__annotations__})
        assert options["epochs"] == epochs
        rates = [settings.rate(epoch, epochs, 0) for epoch in range(epochs)]
        assert rates == pytest.approx([1e-3] * (epochs - 3) + [1e-4] * 3)


def test_every_recipe_can_be_asked_for(here, asked):
    for name in RECIPES:
        told("distill", *PAIR, *QUICK, "-o", name, "--recipe", name)
    assert len(asked) == len(RECIPES)


def test_what_is_given_beside_a_recipe_wins(here, asked):
    given = ["--main", "kd", "--epochs", "1", "--schedule", "cosine", "--milestones", "", "--warmup-lr", "0.01"]
    assert run(["distill", *PAIR, *QUICK, "-o", "run", "--recipe", "paper", *given]) == 0
    (student,) = asked
    assert (student["main"], student["epochs"], student["schedule"]) == ("kd", 1, "cosine")
    assert [phase.learning_rate for phase in student["curriculum"].schedule(2)] == [1e-2, 1e-2]
    assert [phase.length for phase in student["curriculum"].schedule(2)] == [3, 4]
    assert student["learning_rate"] == 1e-3


def test_an_assistant_made_of_the_teacher_and_every_step_resumes(here, capsys):
    command = ["distill", *PAIR, *QUICK, "-o", "run", "--epochs", "1", "--warmup", "1,1", "--assistant", "auto"]
    told(*command)
    assert "Assistant: the teacher with" in capsys.readouterr().err
    digests = [story(f"run/step-{step}")["result"]["digest"] for step in (1, 2)]
    shutil.rmtree(here / "run/step-2")  # as if it had been stopped after the first step
    told(*command, "--resume")
    assert [story(f"run/step-{step}")["result"]["digest"] for step in (1, 2)] == digests
    assert [story(f"run/step-{step}")["resumed"] for step in (1, 2)] == [1, 0]
    capsys.readouterr()
    told("evaluate", "run/step-1", "--data", "digits", "--limit", "100", "--json")
    assert json.loads(capsys.readouterr().out)["accuracy"] == story("run/step-1")["result"]["accuracy"]
    assert story("run/step-2")["teacher_accuracy"] == story("run/step-1")["result"]["accuracy"]


def test_compare_leaves_the_run_as_it_is_and_gives_the_others_its_epochs(here):
    options = ["--epochs", "2", "--warmup", "1,1", "--schedule", "step", "--milestones", "1"]
    told("distill", *PAIR, *QUICK, "-o", "run", *options)
    told("distill", *PAIR, *QUICK, "-o", "arms", "--compare", *options)
    assert story("arms/indistill")["result"]["digest"] == story("run")["result"]["digest"]
    rates = [1e-3] * 6 + [pytest.approx(1e-4)]  # the milestone stays in the main stage
    assert [[rate for _, rate in epochs(f"arms/{arm}")] for arm in ("labels", "kd", "indistill")] == [rates] * 3


def test_compare_needs_no_options(here):
    told("distill", *PAIR, *QUICK, "-o", "arms", "--compare", "--epochs", "1")
    assert [name for name, _ in epochs("arms/indistill")] == ["3", "7", "8", "8", "8", "main"]
    assert len(epochs("arms/kd")) == 6


def test_fresh_weights_follow_from_the_seed(here):
    for place, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(len(place))
        told("train", "models.py:make", *QUICK, "-o", place, "--epochs", "1", "--seed", seed)
        torch.rand(3)
    a, b, c = (story(place)["result"]["digest"] for place in "abc")
    assert a == b != c


def test_models_with_several_outputs(here, capsys):
    logits = ["--logits", "scores"]
    told("train", "models.py:several?width=8", *QUICK, "-o", "teacher", "--epochs", "1", *logits)
    told("distill", "teacher", "models.py:several", *QUICK, "-o", "run", "--epochs", "1", "--warmup", "1,1", *logits)
    capsys.readouterr()
    told("evaluate", "run", "--data", "digits", "--retrieval", "--json", *logits)
    found = json.loads(capsys.readouterr().out)
    student = ifx.load("models.py:several@run/student.safetensors")
    assert found["accuracy"] == evaluate(student, open_data("digits").test, logits="scores").accuracy
    assert 0 < found["retrieval"]["map_cosine"] < 1
    told("distill", "teacher", "models.py:make", *QUICK, "-o", "plain", "--epochs", "1", "--no-warmup", *logits)
    assert story("plain")["teacher_accuracy"] == story("run")["teacher_accuracy"]
    capsys.readouterr()
    told("align", "teacher", "models.py:several", "--json", *logits)
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 2
    told("evaluate", "run", "--data", "digits", "--json")  # the run remembers
    assert json.loads(capsys.readouterr().out)["accuracy"] == found["accuracy"]
    assert run(["evaluate", "models.py:several@run/student.safetensors", "--data", "digits"]) == 2
    assert "--logits KEY" in capsys.readouterr().err


def test_options_of_the_main_loss(here):
    told("distill", *PAIR, *QUICK, "-o", "a", "--epochs", "1", "--no-warmup", "--main-option", "weight=0.0")
    told("distill", *PAIR, *QUICK, "-o", "b", "--epochs", "1", "--no-warmup", "--main", "labels")
    losses = [story(place)["result"]["epochs"][0]["loss"] for place in "ab"]
    assert losses[0] == pytest.approx(0.1 * losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warmup", "1,1", "--no-warmup"], "--warmup and --no-warmup do not go together"),
        (["--no-warmup", "--penultimate", "2"], "--no-warmup and --penultimate do not go together"),
        (["--no-warmup", "--warmup-lr", "0.1"], "--no-warmup and --warmup-lr do not go together"),
        (["--assistant-epochs", "2"], "--assistant-epochs has no effect without --assistant"),
        (["--mixed-precision", "fp16", "--device", "cpu"], "Training in fp16 is not possible on a CPU"),
        (["--main-steps", "3", "--schedule", "cosine"], "schedule='cosine' counts epochs"),
        (["--warmup-steps", "1,1", "--patience", "2"], "plateau rule compares epochs"),
        (["--warmup-lr", "fast"], "--warmup-lr 'fast' is not a list of numbers"),
        (["--warmup-lr", "1e-3,1e-3,1e-3,1e-3"], "4 learning rates for 3 pairs"),
        (["--warmup-optimizer", "adm"], "Nearest: adam"),
        (["--layers", "8"], "`8`, which is in no pair"),
        (["--main-option", "temperature"], "NAME=VALUE"),
        (["--main-option", "temprature=2"], "Nearest: temperature"),
        (["--milestones", "3"], "no other schedule reads them"),
        (["--assistant", "nothing.pt"], "no file `nothing.pt`"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(here, capsys, options, message):
    code = run(["distill", *PAIR, *QUICK, "-o", "run", *options])
    err = capsys.readouterr().err
    assert code == 2, err
    assert message in err
    assert not (here / "run").exists()


def test_an_assistant_for_a_student_no_smaller_is_refused(here, capsys):
    assert run(["distill", *reversed(PAIR), *QUICK, "-o", "run", "--assistant", "auto"]) == 2
    assert "is not less than the teacher's" in capsys.readouterr().err


def test_of_code_that_changed_since_the_run_the_spec_is_given(here, capsys):
    told("train", "models.py:make?width=3", *QUICK, "-o", "run", "--epochs", "1")
    (here / "models.py").write_text(MODELS + "# another line\n")
    assert run(["evaluate", "run", "--data", "digits"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{here}/models.py makes the model of run, and has changed since that run began" in said
    spec = f"{here}/models.py:make?width=3@run/student.safetensors"
    assert f"name it yourself. Give the model and the weights: '{spec}'." in said
    told("evaluate", spec, "--data", "digits")


def test_outputs_that_no_label_means_are_said(here, capsys):
    (here / "wide.py").write_text(
        "from torch import nn\ndef make(n=12):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, n))\n"
    )
    told("train", "wide.py:make", *QUICK, "-o", "wide", "--epochs", "1")
    assert "The model has 12 outputs, but the data have only 10 classes" in " ".join(capsys.readouterr().err.split())
    told("train", "wide.py:make?n=10", *QUICK, "-o", "fits", "--epochs", "1")
    assert "outputs" not in capsys.readouterr().err


def test_train_refuses_a_model_for_other_images(here, capsys):
    (here / "rgb.py").write_text(MODELS.replace("nn.Conv2d(1,", "nn.Conv2d(3,"))
    assert run(["train", "rgb.py:make", *QUICK, "-o", "run"]) == 2
    assert "fails on inputs of shape (50, 1, 8, 8)" in capsys.readouterr().err
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("", "Nothing is saved yet."),
        ("checkpoints/last.safetensors", "continue with --resume"),
        ("kd/checkpoints/last.safetensors", "continue with --resume"),
        ("compress.json", "continue with --resume"),
    ],
)
def test_a_run_that_is_stopped_outside_of_a_step_says_how_to_go_on(
    file: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "open_model", interrupted)
    if file:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert run(["train", "model.pt", "--data", "digits", "-o", str(tmp_path)]) == 130
    assert said in capfd.readouterr().err
