"""Which output holds the logits: the one called so, the only one, the one that was named; never a guess that trains on features."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.evaluation.outputs import select_logits

Named = namedtuple("Named", "features logits")


@dataclass
class Fields:
    features: Tensor
    logits: Tensor


KINDS: dict[str, Any] = {
    "dict": lambda f, y: {"features": f, "logits": y},
    "out": lambda f, y: {"features": f, "out": y},
    "namedtuple": Named,
    "dataclass": Fields,
}
NAMELESS: dict[str, Any] = {
    "tuple": lambda f, y: (f, y),
    "list": lambda f, y: [f, y],
    "other names": lambda f, y: {"features": f, "scores": y},
}
KEYS = {"tuple": 1, "list": 1, "other names": "scores"}
NO_WARMUP = ifx.Curriculum(lengths=[])


class Net(nn.Module):
    """Its features come first among its outputs."""

    def __init__(self, form: Any):
        super().__init__()
        self.form = form
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).mean((2, 3))
        return self.form(features, self.head(features))


def net(form: Any, seed: int) -> Net:
    torch.manual_seed(seed)
    return Net(form)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))


def trained(form: Any, **options: Any) -> dict[str, Tensor]:
    student = net(form, 1)
    ifx.distill(
        net(form, 0).eval(), student, [batch()], epochs=2, curriculum=NO_WARMUP, main="kd", progress=False, **options
    )
    return student.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_entry_called_logits_is_the_main_output(kind: str) -> None:
    x, _ = batch()
    model = net(KINDS[kind], 0).eval()
    traced = ifx.trace(model, x)
    assert traced.logits == "head" and traced.several_outputs == ()
    assert torch.equal(select_logits(model(x)), select_logits(model(x), "out" if kind == "out" else "logits"))


@pytest.mark.parametrize("kind", KINDS)
def test_distilling_is_the_same_as_with_the_key(kind: str) -> None:
    key = "out" if kind == "out" else "logits"
    for (name, one), other in zip(trained(KINDS[kind]).items(), trained(KINDS[kind], logits=key).values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", NAMELESS)
def test_kd_refuses_to_guess(kind: str) -> None:
    form = NAMELESS[kind]
    x, _ = batch()
    assert len(ifx.trace(net(form, 0).eval(), x).several_outputs) == 2
    teacher, student = net(form, 0).eval(), net(form, 1)
    with pytest.raises(
        ifx.ConfigError, match=r"The teacher returns several outputs of different shapes: .*\(16\), .*\(4\)"
    ):
        ifx.compile_stages(teacher, student, main="kd", example_inputs=x)
    with pytest.raises(ifx.ConfigError, match=r"not logits\. Say which entry holds the logits"):
        trained(form)
    weights = trained(form, logits=KEYS[kind])
    reference = trained(KINDS["dict"])
    assert all(torch.equal(weights[name], reference[name]) for name in reference)


@pytest.mark.parametrize("kind", ["tuple", "list", "namedtuple"])
def test_a_place_may_be_a_text_of_digits(kind: str) -> None:
    """As the command line passes it; it was an error of the type list."""
    form = (NAMELESS | KINDS)[kind]
    by_number, by_text = trained(form, logits=1), trained(form, logits="1")
    assert all(torch.equal(weights, by_text[name]) for name, weights in by_number.items())


class Maps(nn.Module):
    """As YOLO: a list of maps in train mode, one tensor in eval mode."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.SiLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.SiLU())
        self.heads = nn.ModuleList([nn.Conv2d(width, 6, 1), nn.Conv2d(2 * width, 6, 1)])

    def forward(self, x: Tensor) -> Any:
        stem = self.stem(x)
        maps = [head(y) for head, y in zip(self.heads, (stem, self.body(stem)), strict=True)]
        return maps if self.training else torch.cat([part.flatten(2) for part in maps], 2).transpose(1, 2)


def test_a_model_of_two_forms_learns_from_layers_and_is_told_so() -> None:
    teacher, student, data = Maps(16).eval(), Maps(8), [torch.randn(4, 3, 16, 16)]
    options: dict[str, Any] = {"epochs": 1, "progress": False, "curriculum": NO_WARMUP}
    with pytest.raises(
        ifx.ConfigError,
        match=r"The student returns several.*take a loss that reads layers alone, all pairs of them: at",
    ):
        ifx.distill(teacher, student, data, main="kd", **options)
    with pytest.raises(ifx.ConfigError, match=r"\(4, 6, 8, 8\), the teacher \(4, 80, 6\): they are of different forms"):
        ifx.distill(teacher, student, data, main="kd", logits="0", **options)
    before = {
        name: student.get_parameter(name).clone()
        for name in ("stem.0.weight", "body.0.weight", "heads.0.weight", "heads.1.weight")
    }
    plan = ifx.align(teacher, student, example_inputs=data[0])
    assert [pair.student for pair in plan.pairs] == ["stem", "body", "heads.0", "heads.1"]
    ifx.distill(teacher, student, data, main="at", plan=plan, **options)
    assert all(not torch.equal(student.get_parameter(name), value) for name, value in before.items())


def test_labels_refuse_to_guess_too() -> None:
    plain = net(lambda f, y: y, 0).eval()
    student = net(NAMELESS["tuple"], 1)
    with pytest.raises(ifx.ConfigError, match="The student returns several outputs"):
        ifx.compile_stages(plain, student, main="labels", example_inputs=batch()[0])
    with pytest.raises(ifx.ConfigError, match=r"not logits\. Say which entry holds the logits"):
        ifx.distill(plain, student, [batch()], epochs=1, curriculum=NO_WARMUP, main="labels", progress=False)


def test_a_loss_that_reads_no_logits_needs_none() -> None:
    """The negative control."""
    x, _ = batch()
    form = NAMELESS["tuple"]
    teacher, student = net(form, 0).eval(), net(form, 1)
    plan = ifx.align(teacher, student, example_inputs=x)
    assert len(ifx.compile_stages(teacher, student, plan, main=None, example_inputs=x)) == len(plan.pairs) > 0


def test_outputs_of_one_shape_are_no_question() -> None:
    """As of a transformer with a second head for distillation."""
    x, _ = batch()
    assert ifx.trace(net(lambda f, y: (y, y + 1), 0).eval(), x).several_outputs == ()


def test_a_named_tuple_takes_a_place_too() -> None:
    x, _ = batch()
    assert ifx.trace(net(Named, 0).eval(), x, logits=1).logits == "head"
    assert ifx.trace(net(Named, 0).eval(), x, logits="logits").logits == "head"


def test_a_named_entry_of_several_tensors_is_no_logits():
    """A detector's list of maps: its first was taken."""
    model = net(lambda f, y: (y, [f, y]), 0)
    with pytest.raises(
        ifx.IndistillError, match=r"entry 1 of the output holds 2 tensors of different shapes\. Name an entry"
    ):
        ifx.trace(model, batch()[0], logits=1)
    assert ifx.trace(model, batch()[0], logits=0).logits == ifx.trace(net(lambda f, y: y, 0), batch()[0]).logits


class Detector(nn.Module):
    """What it finds in each picture, as torchvision's detectors say it."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        found = [self.head(self.backbone(image[None]).flatten(2).mT[0]) for image in images]
        return [{"boxes": one[:, :4], "scores": one[one[:, 4] > 0, 4]} for one in found]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_detector_is_told_to_give_its_backbone(role):
    """The reason given was a loop in its code, which nobody can change."""
    with pytest.raises(
        ifx.FrontendError, match=r"Detector cannot be traced: it returns tensors for each sample.*its backbone"
    ):
        ifx.trace(Detector(), batch()[0], role=role)
    assert ifx.trace(Detector().backbone, batch()[0], role=role).report.method == "symbolic"


ALONE: dict[str, Any] = {
    "dict": lambda f, y: {"sample": y},
    "namedtuple": namedtuple("Sample", "sample hidden", defaults=(None,)),
    "dict with nothing": lambda f, y: {"hidden": None, "sample": y},
    "tuple": lambda f, y: (y,),
}


@pytest.mark.parametrize("kind", ALONE)
def test_the_only_entry_needs_no_name(kind: str) -> None:
    """As in diffusers' models; training refused them and asked for a name."""
    form = ALONE[kind] if kind != "namedtuple" else lambda f, y: ALONE[kind](y)
    model, (x, y) = net(form, 0).eval(), batch()
    plain = net(lambda f, y: y, 0).eval()
    assert torch.equal(select_logits(model(x)), plain(x))
    digests = []
    for teacher, student in ((model, net(form, 1)), (plain, net(lambda f, y: y, 1))):
        found = ifx.distill(teacher, student, [(x, y)], curriculum=NO_WARMUP, epochs=1, progress=False, device="cpu")
        digests.append(found.digest)
    assert digests[0] == digests[1]
