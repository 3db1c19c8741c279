"""What a teacher sees of a batch made for the student: the stage's teacher gives what the bare one gives on inputs prepared for it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.graph.view import Figures, Rescaling, View
from indistill_fx.passes.pairing.cka import cka
from indistill_fx.system.call import Call


def net(width: int, seed: int, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = 3
    for after in (width, 2 * width, 4 * width):
        norm = nn.BatchNorm2d(after)
        nn.init.normal_(norm.running_mean, std=0.3)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        layers += [nn.Conv2d(before, after, 3, 2, 1), norm, nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


X, Y = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
GIVEN, WANTED = Figures(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)), Figures(mean=(0.1, 0.6, 0.2), std=(0.4, 0.15, 0.2))
WHOLE = View(size=(64, 64), rescaling=Rescaling(given=GIVEN, wanted=WANTED))


def prepared(x: Tensor) -> Tensor:
    """By hand: back to pixels, and from there as the teacher wants them."""
    mean, std, wanted_mean, wanted_std = (
        torch.tensor(numbers).view(3, 1, 1) for figures in (GIVEN, WANTED) for numbers in (figures.mean, figures.std)
    )
    pixels = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True) * std + mean
    return (pixels - wanted_mean) / wanted_std


def main_stage(teacher: nn.Module, student: nn.Module, view: View | None, **options: object) -> ifx.Stage:
    plan = ifx.align(teacher, student, example_inputs=X)
    return ifx.compile_stages(
        teacher, student, plan.model_copy(update={"view": view}), curriculum=ifx.Curriculum(lengths=[]), example_inputs=X,
        **options,
    )[-1]  # fmt: skip


def test_models_traced_with_other_sizes_each_see_their_own():
    """The teacher was fed the student's pictures without a word."""
    teacher, student = net(16, 0).eval(), net(8, 1)
    large = torch.randn(4, 3, 64, 64)
    traced = ifx.trace(teacher, large), ifx.trace(student, X, role="student")
    plan = ifx.align(*traced)
    assert plan.view == View(size=(64, 64))
    stages = ifx.compile_stages(*traced, plan)
    given = stages[-1].teacher(X)[0][stages[-1].logits[0]]
    expected = teacher(F.interpolate(X, size=(64, 64), mode="bilinear", antialias=True))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert (given - teacher(X)).abs().max() > 1e-2  # the two differ, so the comparison says something
    assert "input: resized to 64x64" in str(stages[0].report)
    assert all(torch.isfinite(stage((X, Y))) for stage in stages)


def test_every_stage_sees_what_the_view_says():
    teacher, student = net(16, 0).eval(), net(8, 1)
    traced = ifx.trace(teacher, prepared(X)), ifx.trace(student, X, role="student")
    plan = ifx.align(*traced).model_copy(update={"view": WHOLE})
    for stage in ifx.compile_stages(*traced, plan, curriculum=ifx.Curriculum(lengths=1, penultimate=1)):
        assert stage.teacher is not None
        own, _ = stage.teacher(X)
        bare = ifx.compile_stages(
            *traced, plan.model_copy(update={"view": None}), curriculum=ifx.Curriculum(lengths=1, penultimate=1)
        )
        same = next(other for other in bare if other.name == stage.name)
        same.teacher = _without_view(same.teacher)
        for tap, value in own.items():
            torch.testing.assert_close(value, same.teacher(prepared(X))[0][tap], rtol=1e-4, atol=1e-5)


def _without_view(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The half as it would be on pictures that are prepared already."""
    graph = copy.deepcopy(graph)
    for node in list(graph.graph.nodes):
        if getattr(node.target, "__name__", "") in ("resized", "rescaled"):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def test_a_view_on_tensors_and_in_the_graph_is_the_same():
    seen = Call((X, Y), {"mask": torch.ones(4, 7)}).changed(WHOLE.apply)
    torch.testing.assert_close(seen.args[0], prepared(X))
    assert seen.args[1] is Y and torch.equal(seen.kwargs["mask"], torch.ones(4, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_of_half_precision_beside_a_float32_student(dtype):
    teacher, student = net(16, 0).eval().to(dtype), net(8, 1)
    plan = ifx.align(teacher, student, example_inputs=X)
    assert plan.view == View(dtype=str(dtype).removeprefix("torch."))
    *warm, main = ifx.compile_stages(teacher, student, plan, example_inputs=X)
    for stage in (warm[0], main):
        assert stage.teacher is not None
        assert all(value.dtype == torch.float32 for value in stage.teacher(X)[0].values())
        stage((X, Y)).backward()
    logits = main.teacher(X)[0][main.logits[0]]
    torch.testing.assert_close(logits, teacher(X.to(dtype)).float(), rtol=0.1, atol=0.05)


def test_a_teacher_of_half_precision_is_measured_and_distilled():
    teacher, student = net(16, 0).eval().bfloat16(), net(8, 1)
    record = ifx.distill(teacher, student, [(X, Y)] * 2, val_loader=[(X, Y)], epochs=1, progress=False, device="cpu")
    assert record.teacher_accuracy == (teacher(X.bfloat16()).argmax(1) == Y).float().mean().item()


def test_the_teachers_other_classes_are_mapped():
    teacher, student = net(16, 0, classes=9).eval(), net(8, 1)
    chosen = (7, 0, 3, 8, 2)
    stage = main_stage(
        teacher, student, View(classes=chosen), main_options={"weight": 1.0, "weight_labels": 0.0, "temperature": 1.0}
    )
    own = next(iter(stage.teacher(X)[0].values()))
    torch.testing.assert_close(own, teacher(X)[:, list(chosen)], rtol=1e-4, atol=1e-5)
    wanted, got = (z.log_softmax(1) for z in (teacher(X)[:, list(chosen)], student.train()(X)))
    expected = F.kl_div(got, wanted, reduction="batchmean", log_target=True)
    torch.testing.assert_close(stage.train()((X, Y)), expected, rtol=1e-4, atol=1e-5)
    found = evaluate(teacher, [(X, Y)], view=View(classes=chosen))
    assert found.classes == 5
    assert found.accuracy == (teacher(X)[:, list(chosen)].argmax(1) == Y).float().mean().item()


def test_distill_with_a_view_measures_the_teacher_through_it():
    teacher, student = net(16, 0, classes=9).eval(), net(8, 1)
    view = WHOLE.model_copy(update={"classes": (7, 0, 3, 8, 2)})
    loader = [(X, Y)] * 2
    record = ifx.distill(
        teacher, student, loader, val_loader=loader, teacher_view=view, epochs=1, progress=False, device="cpu"
    )
    with torch.no_grad():
        expected = (teacher(prepared(X))[:, list(view.classes or ())].argmax(1) == Y).float().mean().item()
    assert record.teacher_accuracy == expected


def test_other_classes_without_a_map_are_refused_before_training():
    with pytest.raises(ifx.ConfigError, match=r"teacher has 9 classes and the student 5"):
        ifx.distill(net(16, 0, 9), net(8, 1), [(X, Y)], epochs=1, progress=False, device="cpu")
    with pytest.raises(ifx.ConfigError, match="the teacher has 9 outputs"):
        ifx.distill(
            net(16, 0, 9),
            net(8, 1),
            [(X, Y)],
            teacher_view=View(classes=(0, 1, 2, 3, 9)),
            epochs=1,
            progress=False,
            device="cpu",
        )


def test_the_warm_up_needs_no_classes_in_common():
    record = ifx.distill(net(16, 0, 9), net(8, 1), [(X, Y)], main=None, epochs=1, progress=False, device="cpu")
    assert record.stages


def gray_net(width: int, seed: int) -> nn.Sequential:
    made = net(width, seed)
    made[0] = nn.Conv2d(1, width, 3, 2, 1)
    return made


GRAY, LUMA = X[:, :1], torch.tensor((0.299, 0.587, 0.114)).view(3, 1, 1)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_teacher_of_rgb_sees_grey_pictures_in_three_channels(rescale):
    teacher, student = net(16, 0).eval(), gray_net(8, 1)
    given, wanted = Figures(mean=(0.3,) * 3, std=(0.4,) * 3), WANTED
    asked = View(channels=3, rescaling=Rescaling(given=given, wanted=wanted)) if rescale else None
    plan = ifx.align(teacher, student, example_inputs=GRAY)
    assert plan.view == View(channels=3)
    plan = plan.model_copy(update={"view": View.combined(asked, plan.view)})
    stages = ifx.compile_stages(teacher, student, plan, example_inputs=GRAY)
    three = GRAY.expand(-1, 3, -1, -1)
    if rescale:
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (wanted.mean, wanted.std))
        three = (three * 0.4 + 0.3 - mean) / std
    assert stages[-1].teacher is not None
    got = stages[-1].teacher(GRAY)[0][stages[-1].logits[0]]
    torch.testing.assert_close(got, teacher(three), rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(stage((GRAY, Y))) for stage in stages)


def test_a_teacher_of_grey_sees_the_luma_of_rgb_pictures():
    teacher, student = gray_net(16, 0).eval(), net(8, 1)
    wanted = Figures(mean=(0.7,) * 3, std=(0.2,) * 3)
    view = View(channels=1, rescaling=Rescaling(given=GIVEN, wanted=wanted))
    plan = ifx.align(teacher, student, example_inputs=X)
    assert plan.view == View(channels=1)
    stage = ifx.compile_stages(teacher, student, plan.model_copy(update={"view": view}), example_inputs=X)[-1]
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (GIVEN.mean, GIVEN.std))
    pixels = ((X * std + mean) * LUMA).sum(1, keepdim=True)  # of the picture itself, not of its normalised values
    assert stage.teacher is not None
    got = stage.teacher(X)[0][stage.logits[0]]
    torch.testing.assert_close(got, teacher((pixels - 0.7) / 0.2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(view.apply(X), (pixels - 0.7) / 0.2)
    record = ifx.distill(teacher, student, [(X, Y)], val_loader=[(X, Y)], epochs=1, progress=False, device="cpu")
    expected = (teacher((X * LUMA).sum(1, keepdim=True)).argmax(1) == Y).float().mean().item()
    assert record.teacher_accuracy == expected


def test_a_teacher_that_takes_both_sees_pictures_as_they_are():
    """Its first convolution is not a proof of what it takes."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = gray_net(16, 0)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.amax(1, keepdim=True))  # type: ignore[no-any-return]

    assert ifx.align(Either().eval(), net(8, 1), example_inputs=X).view is None


def test_channels_that_are_neither_grey_nor_rgb_are_refused():
    made = net(8, 1)
    made[0] = nn.Conv2d(5, 8, 3, 2, 1)
    traced = ifx.trace(net(16, 0), X), ifx.trace(made, torch.randn(4, 5, 32, 32), role="student")
    with pytest.raises(ifx.ConfigError, match="teacher takes images with 3 channels, and the student takes 5"):
        ifx.align(*traced)


def test_a_plan_of_another_size_than_the_teacher_was_traced_with_is_refused():
    traced = ifx.trace(net(16, 0), X), ifx.trace(net(8, 1), X, role="student")
    plan = ifx.align(*traced).model_copy(update={"view": WHOLE})
    with pytest.raises(ifx.ConfigError, match="is to be given images of 64x64, but it was traced with 32x32"):
        ifx.compile_stages(*traced, plan)


def test_the_plan_file_keeps_the_view(tmp_path):
    plan = ifx.align(net(16, 0), net(8, 1), example_inputs=X).model_copy(update={"view": WHOLE})
    plan.save(tmp_path / "plan.json")
    assert ifx.AlignmentPlan.load(tmp_path / "plan.json").view == WHOLE


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 8)},
        {"rescaling": {"given": {"mean": [0.5], "std": [0.0]}, "wanted": {"mean": [0.5], "std": [1.0]}}},
        {"rescaling": {"given": {"mean": [0.5], "std": [1.0, 1.0]}, "wanted": {"mean": [0.5], "std": [1.0]}}},
        {"rescaling": {"given": {"mean": [0.5, 0.5], "std": [1.0, 1.0]}, "wanted": {"mean": [0.5], "std": [1.0]}}},
        {"dtype": "int8"},
        {"classes": (-1,)},
    ],
)
def test_a_view_that_cannot_be_is_none(wrong):
    with pytest.raises(ValueError):
        View(**wrong)


def test_similarity_is_measured_on_what_the_teacher_sees():
    teacher, student = net(16, 0).eval(), net(8, 1)

    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = teacher

        def forward(self, x: Tensor) -> Tensor:
            return self.model(prepared(x))  # type: ignore[no-any-return]

    measure = cka([(torch.randn(8, 3, 32, 32), torch.zeros(8).long())])
    traced, pupil = ifx.trace(teacher, prepared(X)), ifx.trace(student, X, role="student")
    own = measure(replace(traced, view=WHOLE), pupil, ["2"], ["2"])
    by_hand = measure(ifx.trace(Prepared().eval(), X), pupil, ["model.2"], ["2"])
    torch.testing.assert_close(torch.as_tensor(own), torch.as_tensor(by_hand), rtol=1e-3, atol=1e-4)
