"""What a teacher said, kept and learned from: the same losses as with the teacher; other data and too few samples are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.cli import run
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.open import open_data
from indistill_fx.errors import ConfigError
from indistill_fx.runs.checkpoint import load_checkpoint, save_checkpoint
from indistill_fx.runs.saved_outputs import FILE, SavedTensor, load_outputs
from tests.nets import unsettle


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.head(self.deep(self.stem(x)).mean((2, 3)))


def net(width: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        return unsettle(Net(width)).eval()


def digits(**more):
    return open_data("digits", **{"limit": 200, "batch_size": 50, **more})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "outputs"
    ifx.save_outputs(net(), digits().train, folder, taps=["deep"], about="net.pt")
    return folder


def test_logits_and_features_are_the_teachers(saved):
    source = load_outputs(f"saved:{saved}")
    assert source.notes == ("outputs of net.pt for 200 samples, features of deep",)
    images, _, indices = next(iter(digits().train.indexed()))
    teacher, kept = net(), source.module
    with torch.no_grad():
        assert torch.allclose(kept(indices), teacher(images), atol=1e-6)
        assert torch.allclose(kept.deep(indices), teacher.deep(teacher.stem(images)), atol=1e-6)


def test_kd_from_saved_logits_has_the_losses_of_kd_from_the_teacher(saved):
    none = Curriculum(lengths=[])
    records = [
        ifx.distill(teacher, net(4).train(), digits().train, curriculum=none, epochs=2, val_loader=digits().test)
        for teacher in (net(), ifx.load(f"saved:{saved}"))
    ]
    losses = [[epoch.loss for epoch in record.epochs] for record in records]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert records[0].teacher_accuracy is not None and records[1].teacher_accuracy is None
    assert records[1].accuracy is not None


def test_a_warm_up_learns_from_saved_features(saved):
    once, losses = Curriculum(lengths=1), []
    for teacher in (net(), ifx.load(f"saved:{saved}")):
        student, x = net(4).train(), next(iter(digits().test))[0][:2]
        traced = ifx.trace(student, x, role="student")
        source = ifx.trace(teacher, torch.arange(2) if losses else x)
        plan = ifx.align(source, traced, fixed=[("deep", "deep")])
        pair = next(pair for pair in plan.pairs if pair.student == "deep").model_copy(update={"kept": tuple(range(8))})
        plan = plan.model_copy(update={"pairs": (pair,), "embedding": None})
        record = ifx.distill(source, traced, digits().train, plan=plan, curriculum=once, epochs=1)
        losses.append([epoch.loss for epoch in record.epochs])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_does_not_fit_is_refused_before_training(saved, tmp_path):
    none = Curriculum(lengths=[])

    def refusal(data, **more) -> str:
        teacher = ifx.load(f"saved:{saved}")
        with pytest.raises(ConfigError) as caught:
            ifx.distill(teacher, net(4).train(), data, curriculum=none, epochs=1, **more)
        return str(caught.value)

    assert "outputs of 200 samples, and the training data have 300" in refusal(digits(limit=300).train)
    assert "was saved from other data" in refusal(digits(mean=(0.1,), std=(1.0,)).train)
    assert "need no feature cache" in refusal(digits().train, feature_cache=tmp_path)
    assert "mixup and cutmix make new ones" in refusal(digits().train, mixup=0.2)
    foreign = [(torch.zeros(8, 1, 8, 8), torch.arange(8))]
    assert "A teacher that has saved outputs needs samples that have numbers and are the same" in refusal(foreign)
    with pytest.raises(ConfigError, match="has no saved outputs"):
        load_outputs(f"saved:{tmp_path}")
    file = saved / FILE
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    (tmp_path / FILE).write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"changed|damaged"):
        load_outputs(f"saved:{tmp_path}")
    with pytest.raises(ConfigError, match=r"no layer named `deeep`.*deep"):
        ifx.save_outputs(net(), digits().train, tmp_path / "other", taps=["deeep"])


def test_a_layer_and_a_part_of_it_are_kept_in_any_order(tmp_path):
    """The layer was put over its part: an AttributeError."""
    ifx.save_outputs(net(), digits().train, tmp_path / "outputs", taps=["stem.0", "stem", "deep", "deep.1"])
    module = ifx.load(f"saved:{tmp_path / 'outputs'}")
    features = {name: part.rows for name, part in module.named_modules() if isinstance(part, SavedTensor)}
    assert features.keys() == {"stem.0", "stem", "deep", "deep.1", "logits"}
    assert features["stem"].min() >= 0 > features["stem.0"].min()
    assert torch.equal(module(torch.arange(3)), features["logits"][:3])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (".".join("a" * 3000), lambda logits: logits),  # nested beyond Python's recursion
        ("logits", lambda logits: logits.to(torch.complex64)),
        ("logits", lambda logits: logits.long()),
        ("deep", lambda logits: logits > 0),
    ],
    ids=["a deep name", "complex", "whole numbers", "truth values"],
)
def test_outputs_that_no_teacher_gives_are_refused(saved, tmp_path, name, change):
    tensors, told = load_checkpoint(saved / FILE)
    save_checkpoint(tmp_path / FILE, {**tensors, name: change(tensors["logits"])}, told)
    with pytest.raises(ConfigError, match="has outputs that no teacher gives"):
        load_outputs(f"saved:{tmp_path}")


def test_names_that_are_no_names_are_renamed(saved, tmp_path):
    tensors, told = load_checkpoint(saved / FILE)
    odd = dict.fromkeys(("logits.x", "forward", "x y", "x_y", "_x_y_", "__init__", "a..b"), tensors["deep"])
    save_checkpoint(tmp_path / FILE, {**tensors, **odd}, told)
    module = load_outputs(f"saved:{tmp_path}").module
    assert torch.equal(module(torch.arange(3)), tensors["logits"][:3])
    assert sum(isinstance(part, SavedTensor) for part in module.modules()) == len(tensors) + len(odd)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / ("z" * 300), tmp_path / "file"):
        with pytest.raises(ConfigError, match="cannot be made"):
            ifx.save_outputs(net(), digits().train, place)


def test_from_the_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "teacher.pt")
    (tmp_path / "student.py").write_text(
        "from tests.unit.test_saved_outputs import net\n\ndef make():\n    return net(4)\n"
    )
    save = ["save-outputs", "teacher.pt", "--data", "digits", "--limit", "200", "-o", "kept", "--tap", "deep"]
    assert run([*save, "--trust", "tests"]) == 0
    assert "2 tensors of 200 samples" in capsys.readouterr().err
    distil = ["distill", "saved:kept", "student.py:make", "--data", "digits", "--no-warmup", "--epochs", "1"]
    assert run([*distil, "--limit", "200", "-o", "run"]) == 0
    told = capsys.readouterr()
    assert "outputs of teacher.pt for 200 samples" in told.err and "the teacher is not measured" in told.err
    assert run([*distil, "--limit", "100", "-o", "other"]) == 2
    assert "the training data have 100" in capsys.readouterr().err
    assert not (tmp_path / "other" / "student.safetensors").exists()
