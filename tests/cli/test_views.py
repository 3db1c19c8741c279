"""Teacher and student of different wants on the command line: what is bridged, said, kept in the plan, asked for and refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import indistill_fx as ifx
from indistill_fx.cli import run
from indistill_fx.graph.view import View
from indistill_fx.plan import AlignmentPlan

MODELS = """
import torch
from torch import nn

def net(width, classes=2, half=False):
    layers, before = [], 3
    for after in (width, 2 * width):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
    if half:
        model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model

def teacher(classes=2):
    return net(16, classes, half=True)

def unknown(classes=2):
    return net(16, classes)

def student():
    return net(8)

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.flat = net(16)[:6], nn.Linear(32 * 16 * 16, 2)

    def forward(self, x):
        return self.flat(self.net(x).flatten(1))

class Pictures(torch.utils.data.Dataset):
    classes = ["cat", "dog"]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        torch.manual_seed(index)
        return torch.randn(3, 32, 32), index % 2

def loaders(batch_size=4):
    loader = torch.utils.data.DataLoader(Pictures(), batch_size)
    return loader, loader

def loaders_that_say():
    train, test = loaders()
    return {"train": train, "test": test, "normalisation": ((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))}

def turned():
    Pictures.classes = ["dog", "cat"]
    return loaders()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                picture.save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def told(here, capsys):
    def call(*arguments: str) -> tuple[int, str]:
        code = run(list(arguments))
        captured = capsys.readouterr()
        return code, " ".join((captured.out + captured.err).split())

    return call


def distill(teacher: str, *more: str, data: str = "imagefolder:data", out: str = "run") -> list[str]:
    quick = ["--warmup", "1,1", "--penultimate", "0", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    return ["distill", teacher, "models.py:student", "--data", data, "-o", out, *quick, *more]


def view_of(path: str) -> View | None:
    return AlignmentPlan.load(path).view


def test_what_the_teacher_wants_is_bridged_said_and_kept(told):
    code, text = told(*distill("models.py:teacher"))
    assert code == 0, text
    assert (
        "models.py:teacher: sees inputs normalised by mean 0.5, 0.5, 0.5 and std 0.5, 0.5, 0.5 instead of mean 0.485"
        in text
    )
    view = view_of("run/plan.json")
    assert view is not None and view.rescaling is not None and view.rescaling.wanted.mean == (0.5, 0.5, 0.5)
    code, text = told(*distill("models.py:teacher", "--resume", "--teacher-mean", "data"))
    assert code == 2 and "what the teacher sees is" in text, text


def test_a_plan_carries_the_view_from_align_to_distill(told):
    asked = ["--teacher-size", "64", "--teacher-mean", "0.1,0.2,0.3", "--teacher-std", "0.5,0.5,0.5"]
    code, text = told(
        "align", "models.py:unknown", "models.py:student", "--data", "imagefolder:data", *asked, "-o", "plan.json"
    )
    assert code == 0 and "resized to 64x64, normalised by mean 0.1, 0.2, 0.3" in text, text
    planned = view_of("plan.json")
    assert planned is not None and planned.size == (64, 64)
    code, text = told(*distill("models.py:unknown", "--plan", "plan.json"))
    assert code == 0 and "resized to 64x64, normalised by mean 0.1, 0.2, 0.3" in text, text
    assert view_of("run/plan.json") == planned
    assert json.loads(AlignmentPlan.load("plan.json").model_dump_json())["view"]["size"] == [64, 64]


def test_a_plan_with_a_view_is_made_for_other_data_anew(told):
    """Its figures of the data would be wrong, and those of the teacher are still right."""
    told("align", "models.py:teacher", "models.py:student", "--data", "imagefolder:data", "-o", "plan.json")
    code, text = told(*distill("models.py:teacher", "--plan", "plan.json", "--mean", "cifar10"))
    assert code == 0, text
    view = view_of("run/plan.json")
    assert view is not None and view.rescaling is not None
    assert view.rescaling.given.mean[0] == pytest.approx(125.3 / 255) and view.rescaling.wanted.mean == (0.5, 0.5, 0.5)


def test_what_is_not_known_is_said(told):
    code, text = told(*distill("models.py:unknown"))
    assert code == 0 and "models.py:unknown: the normalisation that it was trained with is unknown" in text, text
    code, text = told(*distill("models.py:unknown", "--teacher-mean", "data", out="other"))
    assert code == 0 and "not known" not in text, text


def test_a_teacher_of_one_size_says_which_option_helps(told):
    code, text = told(*distill("models.py:Fixed"))
    assert code in (1, 2) and "--teacher-size" in text, text
    code, text = told(*distill("models.py:Fixed", "--teacher-size", "64", out="other"))
    assert code == 0, text


def test_loaders_of_the_users_own_say_what_they_are_normalised_by_or_the_teacher_cannot_be_told(told):
    code, text = told(*distill("models.py:teacher", data="models.py:loaders"))
    assert code == 0 and "these data do not say how they are normalised" in text, text
    code, text = told(*distill("models.py:teacher", "--teacher-mean", "half", data="models.py:loaders", out="b"))
    assert code == 2 and "The normalisation of the images is not known" in text, text
    code, text = told(*distill("models.py:teacher", data="models.py:loaders_that_say", out="c"))
    assert code == 0 and "instead of mean 0.4, 0.4, 0.4 and std 0.2, 0.2, 0.2" in text, text


def test_a_teacher_with_more_classes(told, here):
    code, text = told(*distill("models.py:teacher?classes=4"))
    assert code == 2 and "The teacher has 4 classes and the student 2" in text and "--teacher-classes" in text, text
    (here / "names.txt").write_text("bird\ndog\ncat\nfish\n")
    code, text = told(*distill("models.py:teacher?classes=4", "--teacher-classes", "names.txt"))
    assert code == 0 and "outputs 2, 1 are the student's classes" in text and "eacher" in text, text
    assert view_of("run/plan.json").classes == (2, 1)  # type: ignore[union-attr]
    code, text = told(*distill("models.py:teacher?classes=4", "--teacher-classes", "bird,dog,fish,fox", out="b"))
    assert code == 2 and "The data's class 'cat' is none of the teacher's" in text, text
    code, text = told(*distill("models.py:teacher?classes=4", "--teacher-classes", "3,9", out="b"))
    assert code == 2 and "Output 9 of the teacher is named as a class of the student" in text, text
    code, text = told(*distill("models.py:teacher?classes=4", "--main", "pkt", out="c"))
    assert code == 0, text  # the warm-up and a loss of features need no classes in common


def test_a_run_as_teacher_knows_its_own_classes_and_figures(told):
    code, text = told(
        "train", "models.py:unknown", "--data", "imagefolder:data", "--mean", "half", "--epochs", "1", "-o", "taught"
    )
    assert code == 0, text
    code, text = told(*distill("taught", "--mean", "imagenet"))
    assert code == 0 and "taught: sees inputs normalised by mean 0.5" in text, text
    code, text = told(*distill("taught", data="models.py:turned", out="b"))
    assert code == 0 and "its outputs 1, 0 are the student's classes" in text, text
    code, text = told("evaluate", "taught", "--data", "models.py:turned")
    assert (
        code == 2 and "the same classes in another order: class 0 is 'cat' to the model and 'dog' in the data" in text
    ), text


def test_each_of_several_teachers_sees_what_it_wants(told):
    code, text = told(*distill("models.py:teacher", "--teacher", "models.py:unknown"))
    assert code == 0, text
    assert (
        "teachers.0: sees inputs normalised by mean 0.5" in text
        and "models.py:unknown: the normalisation that it" in text
    )
    first, second = AlignmentPlan.load("run/plan.json").views
    assert first is not None and first.rescaling is not None and second is None
    code, text = told(
        *distill("models.py:teacher", "--teacher", "models.py:unknown", "--resume", "--teacher-mean", "data")
    )
    assert code == 2 and "what the teacher sees" in text, text
    each = ["--teacher-mean", "data", "--teacher-mean", "half", "--teacher-size", "48"]
    code, text = told(*distill("models.py:teacher", "--teacher", "models.py:unknown", *each, out="b"))
    assert code == 0, text
    first, second = AlignmentPlan.load("b/plan.json").views
    assert first == View(size=(48, 48))
    assert second is not None and second.size == (48, 48) and second.rescaling is not None
    code, text = told(*distill("models.py:teacher", "--teacher", "models.py:unknown", *each, *each[:2], out="c"))
    assert code == 2 and "--teacher-mean is given 3 times, and there are 2 teachers" in text, text


def test_grey_pictures_beside_a_teacher_of_rgb(told, here):
    for path in here.glob("data/*/*/*.png"):
        Image.open(path).convert("L").save(path)
    (here / "models.py").write_text(
        MODELS + "\ndef grey():\n    made = net(8)\n    made[0] = nn.Conv2d(1, 8, 3, 2, 1)\n    return made\n"
    )
    asked = ["align", "models.py:teacher", "models.py:grey", "--data", "imagefolder:data", "-o", "plan.json"]
    code, text = told(*asked)
    assert code == 0 and "with their grey in three channels, normalised by mean 0.5" in text, text
    view = view_of("plan.json")
    assert view is not None and view.channels == 3 and view.rescaling is not None
    quick = distill("models.py:teacher", "--plan", "plan.json")
    quick[2] = "models.py:grey"
    code, text = told(*quick)
    assert code == 0 and view_of("run/plan.json") == view, text
    code, text = told(*quick, "--resume")
    assert code == 0, text
    code, text = told(*asked[:-1], "other.json", "--teacher-channels", "3", "--teacher-mean", "data")
    assert code == 0 and view_of("other.json") == View(channels=3), text


def test_a_run_on_coloured_pictures_teaches_a_student_of_grey_ones_and_back(told, here):
    """The run's figures of three channels are brought to one, and the other way round."""
    (here / "models.py").write_text(
        MODELS + "\ndef grey():\n    made = net(8)\n    made[0] = nn.Conv2d(1, 8, 3, 2, 1)\n    return made\n"
    )
    code, text = told("train", "models.py:unknown", "--data", "imagefolder:data", "--epochs", "1", "-o", "coloured")
    assert code == 0, text
    for path in here.glob("data/*/*/*.png"):
        Image.open(path).convert("L").save(path)
    quick = distill("coloured", out="grey")
    quick[2] = "models.py:grey"
    code, text = told(*quick)
    assert code == 0, text
    assert "with their grey in three channels, normalised by mean 0.485, 0.456, 0.406" in text
    code, text = told(*distill("grey", out="back"))
    assert code == 0 and "sees inputs in grey" in text, text
    code, text = told(
        "train", "models.py:grey", "--data", "imagefolder:data", "--mean", "0.1,0.2,0.3", "--std", "1", "-o", "x"
    )
    assert code == 2 and "the images have 1 channel. Expected: 1 number." in text, text


def test_from_python_a_teacher_sees_what_its_weights_are_known_to_want(told, here):
    told("train", "models.py:unknown", "--data", "imagefolder:data", "--mean", "half", "--epochs", "1", "-o", "taught")
    data = ifx.open_data("imagefolder:data", batch_size=4, augment=False)
    teacher, student = ifx.load("taught"), ifx.load("models.py:student")
    for model, out in ((teacher, "a"), (ifx.load("models.py:teacher"), "b")):
        ifx.distill(model, student, data.train, epochs=1, run_dir=out, progress=False, device="cpu")
        view = view_of(f"{out}/plan.json")
        assert view is not None and view.rescaling is not None and view.rescaling.wanted.mean == (0.5,) * 3
        assert view.rescaling.given.mean == data.normalisation[0]
    ifx.distill(teacher, student, data.train, epochs=1, run_dir="c", teacher_view=View(), progress=False, device="cpu")
    assert view_of("c/plan.json") is None  # what is asked for goes first
    loader = [(torch.randn(4, 3, 32, 32), torch.arange(4) % 2)]
    ifx.distill(teacher, student, loader, epochs=1, run_dir="d", device="cpu")
    assert view_of("d/plan.json") is None
    assert "was trained on images normalised by mean 0.5" in told()[1]
