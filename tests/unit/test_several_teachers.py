"""Several teachers: their weighted mean, whose layers are learnt, and that a run with them goes on to the same bits."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.cli import run
from indistill_fx.cli.common import shares_of
from indistill_fx.curriculum import Curriculum
from indistill_fx.errors import ConfigError
from indistill_fx.graph.view import Figures, Rescaling, View
from indistill_fx.losses import Outputs, main_loss
from indistill_fx.plan import AlignmentPlan, member_of


def net(width: int, classes: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
        )  # fmt: skip
        for part in model:
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean)
                nn.init.uniform_(part.running_var, 0.5, 2.0)
    return model.eval()


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)


def test_two_teachers_of_weight_one_half_equal_the_average():
    x, y = batch()
    first, second = net(6).double(), net(8, seed=1).double()
    student, x = net(4, seed=2).double(), x.double()
    stages = {
        name: ifx.compile_stages(ifx.ensemble([first, second], weights, example_inputs=x), student, example_inputs=x,
                                 curriculum=Curriculum(lengths=[]))[-1].eval()
        for name, weights in {"half": [0.5, 0.5], "none": None, "three to one": [3, 1]}.items()
    }  # fmt: skip
    with torch.no_grad():
        logits = first(x), second(x)
        for name, shares in {"half": (0.5, 0.5), "none": (0.5, 0.5), "three to one": (0.75, 0.25)}.items():
            mean = shares[0] * logits[0] + shares[1] * logits[1]
            expected = main_loss("kd")(Outputs(student(x), None, {}), Outputs(mean, None, {}), y).item()
            assert stages[name]((x, y)).item() == pytest.approx(expected, rel=1e-12), name
    assert stages["half"]((x, y)).item() != pytest.approx(stages["three to one"]((x, y)).item(), rel=1e-6)


def test_each_pair_says_whose_layer_it_is_and_the_best_is_chosen():
    x, _ = batch()
    shallow = nn.Sequential(
        nn.Conv2d(1, 5, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
    ).eval()
    both = ifx.ensemble([shallow, net(6)], example_inputs=x)
    plan = ifx.align(both, net(4, seed=2), example_inputs=x)
    singles = [ifx.align(teacher, net(4, seed=2), example_inputs=x) for teacher in (shallow, net(6))]
    for pair in plan.pairs:
        scores = [next((own.score for own in single.pairs if own.student == pair.student), -1.0) for single in singles]
        number = scores.index(max(scores))
        assert member_of(pair.teacher) == f"teachers.{number}"
        own = next(own for own in singles[number].pairs if own.student == pair.student)
        assert pair == own.model_copy(update={"teacher": f"teachers.{number}.{own.teacher}"})
    assert len(plan.pairs) == 2
    mixed = plan.model_copy(update={"pairs": plan.pairs[::-1]})
    with pytest.raises(ConfigError, match="cross or repeat a layer"):
        ifx.compile_stages(both, net(4, seed=2), mixed, example_inputs=x)


class Plain(nn.Module):
    """Its activations are functions of its own forward, so no layer names their place: `:relu`."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two, self.last = (
            nn.Conv2d(1, width, 3, 2, 1),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.Linear(2 * width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu()).relu()
        return self.last(x.mean((2, 3)))


def test_layers_that_are_functions_of_a_teachers_own_forward_are_paired_too():
    """And each teacher's order is its own: the first of the one may be computed after the last of the other."""
    x, y = batch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second, student = Plain(6).eval(), Plain(8).eval(), Plain(4)
    both = ifx.ensemble([first, second], [2, 1], example_inputs=x)
    plan = ifx.align(both, student, example_inputs=x)
    assert [(pair.teacher, pair.student) for pair in plan.pairs] == [
        ("teachers.0:relu", ":relu"),
        ("teachers.0:relu_1", ":relu_1"),
    ]
    mixed = plan.pairs[0].model_copy(
        update={"teacher": "teachers.1:relu", "teacher_shape": (8, 8, 4, 4), "kept": (0, 1, 2, 3)}
    )
    stages = ifx.compile_stages(
        both, student, plan.model_copy(update={"pairs": (mixed, plan.pairs[1])}), example_inputs=x
    )
    with torch.no_grad():
        expected = (second.one(x).relu()[:, :4] - student.one(x).relu()).square().mean()
        assert stages[0]((x, y)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert [member_of(tap) for tap in ("teachers.1:relu", "teachers.12.layer1", "teachers.x", ":relu")] == [
        "teachers.1",
        "teachers.12",
        "",
        "",
    ]


def test_a_warm_up_stage_compares_the_layer_of_the_teacher_that_it_names():
    x, y = batch()
    teachers, student = [net(6), net(8, seed=1)], net(4, seed=2)
    both = ifx.ensemble(teachers, example_inputs=x)
    plan = ifx.align(both, student, example_inputs=x)
    other = plan.pairs[1].model_copy(
        update={"teacher": plan.pairs[1].teacher.replace("teachers.0", "teachers.1"), "teacher_shape": (8, 16, 2, 2)}
    )
    plan = plan.model_copy(update={"pairs": (plan.pairs[0], other)})
    stages = ifx.compile_stages(both, student, plan, example_inputs=x, curriculum=Curriculum(lengths=1, penultimate=0))
    with torch.no_grad():
        for stage, teacher in zip(stages[:2], teachers, strict=True):
            pair = stage.pairs[0]
            depth = int(pair.teacher.rpartition(".")[2]) + 1
            own = teacher[:depth](x)[:, list(pair.kept)]
            expected = nn.functional.mse_loss(student[: int(pair.student) + 1](x), own).item()
            assert stage.eval()((x, y)).item() == pytest.approx(expected, rel=1e-5)


def test_a_run_with_several_teachers_goes_on(tmp_path):
    x, y = batch()
    options = {"epochs": 2, "val_loader": [(x, y)], "progress": False, "device": "cpu"}
    digests = []
    for name in ("whole", "torn"):
        both, student = ifx.ensemble([net(6), net(8, seed=1)], [1, 3], example_inputs=x), net(4, seed=2)
        record = ifx.distill(
            both, student, [(x, y)], run_dir=tmp_path / name, **options | ({"epochs": 1} if name == "torn" else {})
        )
        if name == "torn":
            other = ifx.ensemble([net(6), net(8, seed=1)], [1, 1], example_inputs=x)
            with pytest.raises(ConfigError, match="belongs to a run with other settings"):
                ifx.distill(other, net(4, seed=2), [(x, y)], run_dir=tmp_path / name, resume=True, **options)
            student = net(4, seed=2)
            record = ifx.distill(both, student, [(x, y)], run_dir=tmp_path / name, resume=True, **options)
        digests.append(record.digest)
    assert digests[0] == digests[1]
    kept = AlignmentPlan.load(tmp_path / "whole/plan.json")
    assert {member_of(pair.teacher) for pair in kept.pairs} <= {"teachers.0", "teachers.1"}
    assert record.teacher_metrics == ifx.evaluate(both, [(x, y)]).metrics


def test_unfit_teachers_are_refused():
    x, _ = batch()
    for teachers, options, message in (
        ([net(4)], {}, "1 teachers with the weights"),
        ([net(4), net(4)], {"weights": [1, -1]}, "a weight above 0"),
        ([net(4), net(4, classes=4)], {}, "different shapes"),
    ):
        with pytest.raises(ConfigError) as error:
            ifx.ensemble(teachers, example_inputs=x, **options)
        assert message in f"{error.value} {error.value.expected}"


def test_from_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\nfrom tests.unit.test_several_teachers import net, batch\n"
        "def one(): return net(6)\ndef two(width=8): return net(width, seed=1)\ndef small(): return net(4, seed=2)\n"
        "def wrong(): return net(6, classes=5)\ndef data(): return [batch()], [batch()]\n"
    )
    common = ("own.py:small", "--data", "own.py:data", "--device", "cpu", "--epochs", "1", "-o")
    assert run(["distill", "own.py:one=3", *common, "run", "--teacher", "own.py:two?width=10"]) == 0
    told = capsys.readouterr().err
    assert (
        "teachers.0: own.py:one, its logits have the weight 0.75" in told
        and "teachers.1: own.py:two?width=10, its logits have the weight 0.25" in told
    )
    story = json.loads((tmp_path / "run/run.json").read_text())
    assert story["about"]["teacher"] == "own.py:one, own.py:two?width=10"
    assert run(["distill", "own.py:one", *common, "bad", "--teacher", "own.py:wrong"]) == 2
    assert "different shapes" in capsys.readouterr().err
    assert run(["evaluate", "run", "--data", "own.py:data"]) == 0


@pytest.mark.parametrize(
    ("first", "more", "found"),
    [
        ("a.pt", (), {"a.pt": 1.0}),
        ("a.pt=2", ("b.pt",), {"a.pt": 2.0, "b.pt": 1.0}),
        ("a.pt", ("m.py:f?n=10",), {"a.pt": 1.0, "m.py:f?n=10": 1.0}),
        ("a.pt", ("m.py:f?n=10=0.5",), {"a.pt": 1.0, "m.py:f?n=10": 0.5}),
        ("m.py:f?n=10", (), {"m.py:f?n=10": 1.0}),
    ],
)
def test_weights_are_told_from_arguments(first, more, found):
    assert shares_of(first, {"more_teachers": more}) == found


class Tokens(nn.Module):
    """(batch, length, vocabulary), or with positions last."""

    def __init__(self, words: int, last: bool = True):
        super().__init__()
        self.first, self.last = nn.Embedding(9, 6), nn.Linear(6, words) if last else nn.Conv1d(6, words, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        scores: Tensor = self.last(hidden if isinstance(self.last, nn.Linear) else hidden.movedim(-1, 1))
        return scores


@pytest.mark.parametrize("last", [True, False], ids=["tokens", "positions"])
def test_classes_are_chosen_on_the_axis_that_they_are_on(last):
    """Of tokens they were chosen on axis 1: positions were taken for words."""
    x, view = torch.randint(9, (4, 7), generator=torch.Generator().manual_seed(0)), View(classes=(4, 0, 2))
    one, other = Tokens(5, last), Tokens(3, last)
    chosen = one(x)[..., [4, 0, 2]] if last else one(x)[:, [4, 0, 2]]
    both = ifx.ensemble([one, other], example_inputs=x, views=[view, None])
    torch.testing.assert_close(both(x), (chosen + other(x)) / 2)
    with torch.no_grad():
        one.last.weight.copy_(one.last.weight[[4, 0, 2, 1, 3]])
        one.last.bias.copy_(one.last.bias[[4, 0, 2, 1, 3]])
    labels, task = x % 3, "language" if last else "segmentation"
    found = ifx.evaluate(one, [(x, labels)], task=task, view=View(classes=(0, 1, 2)))
    one.last.weight, one.last.bias = nn.Parameter(one.last.weight[:3]), nn.Parameter(one.last.bias[:3])
    assert found.metrics == pytest.approx(ifx.evaluate(one, [(x, labels)], task=task).metrics, rel=1e-5)  # in float32


def test_each_teacher_sees_what_it_wants():
    """One other figures and a larger picture, one RGB, one its classes in another order; their mean is that of each by itself."""
    x, y = batch()
    rgb = net(7, seed=3)
    rgb[0] = nn.Conv2d(3, 7, 3, 2, 1)  # type: ignore[index]
    teachers = [net(6), net(8, classes=4, seed=1), rgb]
    one = tuple(Figures(mean=(mean,), std=(std,)) for mean, std in ((0.3, 0.2), (0.5, 0.5)))
    bridge = View(size=(16, 16), rescaling=Rescaling(given=one[0], wanted=one[1]))
    both = ifx.ensemble(teachers, [1, 1, 2], example_inputs=x, views=[bridge, View(classes=(3, 0, 1)), None])
    large = nn.functional.interpolate(x, size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        own = (
            teachers[0]((large * 0.2 + 0.3 - 0.5) / 0.5),
            teachers[1](x)[:, [3, 0, 1]],
            rgb(x.expand(-1, 3, -1, -1)),
        )
        expected = (own[0] + own[1] + 2 * own[2]) / 4
        torch.testing.assert_close(both(x), expected)
        student = net(4, seed=2)
        plan = ifx.align(both, student, example_inputs=x)
        assert plan.views == (bridge, View(classes=(3, 0, 1)), View(channels=3))
        stages = ifx.compile_stages(both, student, plan, example_inputs=x)
        assert stages[-1].teacher is not None
        torch.testing.assert_close(stages[-1].teacher(x)[0][stages[-1].logits[0]], expected, rtol=1e-4, atol=1e-5)
    record = ifx.distill(both, student, [(x, y)], val_loader=[(x, y)], epochs=1, progress=False, device="cpu")
    assert record.teacher_accuracy == (expected.argmax(1) == y).float().mean().item()


@pytest.mark.parametrize(
    ("views", "why"), [([None], "2 teachers with 1 views"), ([View(classes=(0, 1, 3)), None], "Teacher 0 has 3 outputs, not 4"),
                       ([View(classes=()), None], "Teacher 0 has no class of the student's")],
)  # fmt: skip
def test_views_that_cannot_be_are_refused(views, why):
    with pytest.raises(ConfigError, match=why):
        ifx.ensemble([net(6), net(8, seed=1)], example_inputs=batch()[0], views=views)


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.first(x), "aux": self.second(x)}


def test_traced_models_are_measured_on_the_output_that_they_were_traced_with():
    torch.manual_seed(0)
    teacher, student, x = _Two(), _Two(), torch.randn(64, 4)
    data = [(x, teacher(x)["aux"].argmax(1))]
    traced = [ifx.trace(one, x, role=role, logits="aux") for one, role in ((teacher, "teacher"), (student, "student"))]
    record = ifx.distill(*traced, data, val_loader=data, epochs=1, main="kd", progress=False, device="cpu")
    assert record.teacher_accuracy == 1.0
    assert record.metrics == ifx.evaluate(student, data, logits="aux").metrics
    assert record.metrics != ifx.evaluate(student, data).metrics
    plain = ifx.distill(traced[0], nn.Linear(4, 3), data, val_loader=data, epochs=1, progress=False, device="cpu")
    assert plain.teacher_accuracy == 1.0


@pytest.mark.parametrize("logits", [[0], [None], (0, 0, 0)])
def test_logits_are_named_for_each_teacher_or_for_all(logits):
    with pytest.raises(ConfigError, match=rf"^2 teachers with {len(logits)} entries of `logits`\. Expected: 2\.$"):
        ifx.ensemble([net(4), net(4)], example_inputs=batch()[0], logits=logits)
