"""Options of training that people know: each does what it says, and an interrupted run ends with the bits of one that was not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.errors import ConfigError
from indistill_fx.runs.directory import RunDirectory
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.training.options.mixing import make_mixing
from indistill_fx.training.options.optimizers import make_optimizer
from indistill_fx.training.options.settings import Settings


class Net(nn.Module):
    """Fails at a call that is set, once."""

    fails_at: int | None = None

    def __init__(self, width: int = 4):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            self.first, self.norm = nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width)
            self.drop, self.last = nn.Dropout(0.2), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x))).mean((2, 3))))


class Failing(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and Net.fails_at is not None:
            Net.fails_at -= 1
            if Net.fails_at < 0:
                Net.fails_at = None
                raise RuntimeError("pulled the plug")
        return super().forward(x)


def batches(count: int = 5, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1},
    "rise": {"rise_steps": 7},
    "nesterov": {"optimizer": "sgd", "nesterov": True},
    "decay": {"optimizer": "adamw", "weight_decay": 0.1, "decay_norms": False},
    "average": {"average": 0.8},
    "early stopping": {"early_stopping": 1, "learning_rate": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_interrupted_run_ends_with_the_same_bits(name, tmp_path):
    options = {"epochs": 3, "val_loader": batches(2), "progress": False, "device": "cpu", **OPTIONS[name]}
    whole, plain, torn = Net(), Net(), Failing()
    record = ifx.train(whole, batches(), run_dir=tmp_path / "whole", **options)
    Net.fails_at = 7
    with pytest.raises(RuntimeError, match="pulled the plug"):
        ifx.train(torn, batches(), run_dir=tmp_path / "torn", checkpoint_every_steps=1, **options)
    again = Net()
    allowed = ["code of the student"]
    resumed = ifx.train(again, batches(), run_dir=tmp_path / "torn", resume=True, allow_changed=allowed, **options)
    assert resumed.steps == record.steps
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert resumed.metrics == record.metrics and resumed.average == record.average
    base = {key: value for key, value in options.items() if key not in OPTIONS[name]}
    base |= {
        key: value for key, value in OPTIONS[name].items() if key in ("optimizer", "weight_decay", "learning_rate")
    }
    ifx.train(plain, batches(), **base)
    same = all(torch.equal(value, plain.state_dict()[key]) for key, value in whole.state_dict().items())
    assert same is (name == "average")  # which looks on; everything else changes what is learnt
    done = ifx.train(Net(), batches(), run_dir=tmp_path / "whole", resume=True, **options)
    assert done.steps == record.steps and done.digest == record.digest


def test_the_moving_average_is_what_it_says(tmp_path):
    """Followed by hand, over the checkpoints of single epochs of one batch."""
    net, decay, average = Net(), 0.7, None
    for epochs in (1, 2, 3):
        net = Net()
        record = ifx.train(
            net,
            batches(1),
            epochs=epochs,
            average=decay,
            run_dir=tmp_path / str(epochs),
            val_loader=batches(1),
            progress=False,
            device="cpu",
        )
        now = {key: value.clone() for key, value in net.state_dict().items() if value.is_floating_point()}
        average = (
            now if average is None else {key: average[key] * decay + value * (1 - decay) for key, value in now.items()}
        )
    found = load_file(record.files["average"])
    for key, value in average.items():
        torch.testing.assert_close(found[key], value)
    assert not torch.allclose(found["last.weight"], net.last.weight)
    net.load_state_dict(found)
    assert record.average == ifx.evaluate(net, batches(1)).metrics


def test_mixed_labels_say_how_pictures_were_mixed():
    x, y = batches(1)[0]
    inputs = Inputs(("x",), ("x",))
    mix = make_mixing(Settings(mixup=0.4, label_smoothing=0.1), "classification", 3, inputs)
    torch.manual_seed(3)
    mixed, soft = mix((x, y))
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    one = F.one_hot(y, 3).float()
    lam = ((mixed - x.roll(1, 0)) / (x - x.roll(1, 0))).mean().item()  # torchvision rolls the batch by one
    torch.testing.assert_close(soft, 0.9 * (lam * one + (1 - lam) * one.roll(1, 0)) + 0.1 / 3, atol=1e-3, rtol=0)
    named = mix({"x": x, "labels": y[:, None], "indices": torch.arange(8)})
    assert named["labels"].shape == (8, 3) and torch.equal(named["indices"], torch.arange(8))
    assert make_mixing(Settings(), "classification", 3, inputs) is None
    smooth = make_mixing(Settings(label_smoothing=0.1), "classification", 3, inputs)((x, y))
    expected = F.cross_entropy(x[:, 0, 0, :3], y, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(x[:, 0, 0, :3], smooth[1]), expected)
    assert smooth[0] is x


@pytest.mark.parametrize("name", ["mixup", "cutmix", "label smoothing", "both"])
def test_samples_without_a_label_stay_without_one(name):
    """-100 was an error of one_hot."""
    (x, y), inputs = batches(1)[0], Inputs(("x",), ("x",))
    mix = make_mixing(Settings(**OPTIONS[name]), "classification", 3, inputs)
    torch.manual_seed(3)
    mixed, soft = mix((x, y))
    torch.manual_seed(3)
    again, found = mix((x, y.index_fill(0, torch.tensor([2]), -100)))
    gone = torch.tensor(
        [2] if name == "label smoothing" else [2, 3]
    )  # torchvision mixes each image with the one before
    assert torch.equal(again, mixed) and torch.equal(found, soft.index_fill(0, gone, 0.0))


def test_norms_and_biases_are_not_decayed():
    net = Net()
    found = make_optimizer(
        "sgd", list(net.parameters()), learning_rate=1.0, weight_decay=0.1, momentum=0.0, decay_norms=False
    )
    before = {key: value.clone() for key, value in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found.step()
    for key, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), before[key] * (0.9 if value.ndim > 1 else 1.0))


def test_the_rate_rises_step_by_step():
    settings = Settings(learning_rate=0.8, rise_steps=4, schedule="cosine")
    assert [settings.rate(0, 10, step) for step in range(6)] == [0.2, 0.4, 0.6000000000000001, 0.8, 0.8, 0.8]
    assert Settings(learning_rate=0.8).rate(0, 10, 0) == 0.8


def test_the_teacher_sees_the_mixed_pictures_too(tmp_path):
    seen = []

    def loss(student, teacher, labels):
        seen.append((teacher.logits.clone(), labels.clone()))
        return F.cross_entropy(student.logits, labels)

    teacher = Net(6).eval()
    options = {"main": loss, "curriculum": Curriculum(lengths=[]), "epochs": 1, "progress": False, "device": "cpu"}
    ifx.distill(teacher, Net(), batches(1), **options)
    ifx.distill(teacher, Net(), batches(1), mixup=0.4, **options)
    assert [len(labels.shape) for _, labels in seen] == [
        1,
        1,
        2,
        2,
    ]  # the first batch is also tried before the first step
    assert not torch.allclose(seen[1][0], seen[3][0])


def test_what_cannot_be_is_refused_before_training(tmp_path):
    common = {"epochs": 1, "progress": False, "device": "cpu"}
    x, y = batches(1)[0]
    for options, message in (
        ({"early_stopping": 2}, "early_stopping needs validation data"),
        ({"mixup": 0.2, "task": "multilabel"}, "a batch has labels of task 'multilabel'"),
        ({"nesterov": True}, "sgd's alone"),
        ({"label_smoothing": 1.0}, "less than 1"),
        ({"tracker": "wandb", "run_dir": tmp_path / "w"}, "The tracker 'wandb' is not installed"),
        ({"tracker": "tensorboard"}, "Without a run directory nothing can be saved"),
    ):
        labels = F.one_hot(y, 3) if options.get("task") else y
        with pytest.raises(ConfigError, match=message):
            ifx.train(Net(), [(x, labels)], **common, **options)


def test_a_tracker_that_cannot_begin_is_reported(tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def refuses(self: object) -> None:
        raise RuntimeError("api_key not configured\nand more")

    monkeypatch.setattr(TensorBoardTracker, "start", refuses)
    directory = RunDirectory(tmp_path / "run", resume=False, trackers=("tensorboard",))
    with pytest.raises(ifx.ConfigError, match="The tracker 'tensorboard' failed to start: api_key not configured"):
        directory.__enter__()


def test_a_tracker_gets_the_metrics(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunDirectory(tmp_path / "run", resume=False, trackers=("tensorboard",)) as directory:
        directory.log({"kind": "epoch", "epochs": 1, "step": 5, "loss": 0.5, "metrics": {"rmse": 0.25}})
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]} == {
        "epoch/loss": 0.5,
        "epoch/metrics/rmse": 0.25,
    }
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["metrics"] == {"rmse": 0.25}


@pytest.mark.parametrize("label", [5, 6, -1])
def test_mixing_refuses_labels_that_are_no_classes(label):
    mix = make_mixing(Settings(label_smoothing=0.1), "classification", 5, Inputs(("x",), ("x",)))
    with pytest.raises(ConfigError, match=f"Label {label} is no class"):
        mix((torch.randn(2, 3, 4, 4), torch.tensor([0, label])))
