"""From a teacher to a student: criteria, widths, repair, plan, and the whole road."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import indistill_fx as ifx
from indistill_fx.compression.allocate import Budget, allocate
from indistill_fx.compression.basis import in_both_modes
from indistill_fx.compression.correspond import plan_of
from indistill_fx.compression.latency import Clock, bisect
from indistill_fx.compression.make_student import Measure, calibration, make_student
from indistill_fx.compression.repair import _PULLS, _best_pull, repair
from indistill_fx.compression.sensitivity import divergence, masked_logits, sensitivities, without
from indistill_fx.compression.write_source import source_of
from indistill_fx.losses.task import Classification, MultiLabel, Regression
from indistill_fx.passes.pruning.shrink import analyse, keep_classes
from indistill_fx.training.recipes import NO_WARMUP
from tests.nets import Cnn32, Residual, TinyTransformer, images, seeded, unsettle


def teacher_of(make=Residual, size=16, *args) -> ifx.TracedModel:
    return ifx.trace(unsettle(seeded(make, *args)), (images(4, size),), role="teacher")


def outputs(model: ifx.TracedModel, x: torch.Tensor) -> torch.Tensor:
    for part in model.graph_module.modules():
        part.training = False
    with torch.no_grad():
        return model.graph_module(x)


@pytest.mark.parametrize("criterion", ["fisher", "isomorphic"])
@pytest.mark.parametrize(("make", "size"), [(Residual, 16), (Cnn32, 32), (TinyTransformer, 16)])
def test_criteria_of_units_meet_budgets_without_labels(criterion, make, size):
    model = teacher_of(make, size)
    before = [p.detach().clone() for p in model.graph_module.parameters()]
    small = ifx.shrink(model, macs=0.5, criterion=criterion, loader=[images(8, size, seed=3)])
    assert small.report.macs[1] <= 0.5 * small.report.macs[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.graph_module.parameters(), strict=True))


@pytest.mark.parametrize("ending", [[nn.LazyLinear(4)], [nn.LazyLinear(1)], [nn.LazyLinear(1), nn.Flatten(0)]])
def test_fisher_finds_the_channels_that_nobody_reads(ending):
    """Of classes and of values: half of a layer's channels are read with zeros, and must go, though their filters are the largest."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), *ending)
    x = images(16, 8)
    model(x)
    with torch.no_grad():
        model[2].weight[:, ::2] = 0
        model[0].weight[::2] *= 10
    traced = ifx.trace(model, (x[:2],), role="teacher")
    kept = {
        c: ifx.shrink(traced, widths={"0": 4}, criterion=c, loader=[x]).report.layers[0].kept for c in ("l1", "fisher")
    }
    assert kept == {"l1": (0, 2, 4, 6), "fisher": (1, 3, 5, 7)}


def test_isomorphic_takes_as_much_of_every_structure():
    """Two blocks of one structure, of which the one has filters a thousand times as large."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.a, self.b = (
                nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)) for _ in "ab"
            )
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.a(x)
            x = x + self.b(x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Two()
    with torch.no_grad():
        model.b[0].weight.mul_(100)
    widths = {
        c: ifx.shrink(ifx.trace(model, (images(),), role="teacher"), macs=0.6, criterion=c).report.widths
        for c in ("l2", "isomorphic")
    }
    assert widths["l2"]["b.0"][1] < 16  # each layer's scores are brought to mean 1
    assert widths["isomorphic"]["a.0"][1] < widths["isomorphic"]["b.0"][1] == 16


def test_a_sensitivity_is_the_divergence_of_the_shrunk_network():
    """Masked and really removed: the same outputs."""
    model = teacher_of()
    known = analyse(model)
    x = images(6, seed=2)
    for group in known.classes.groups:
        stay = without(known, group, len(group.classes) // 2)
        small = keep_classes(model, known, stay).value
        assert torch.allclose(masked_logits(model, known.axes(stay), (x,)), outputs(small, x), atol=1e-5)
    curves = sensitivities(model, known, [x])
    assert [curve.path for curve in curves] == [group.path for group in known.classes.groups]
    assert all(np.all(np.diff(curve.rises) >= 0) and curve.rises[0] == 0 for curve in curves)
    assert all(curve.at(curve.counts[-1]) == curve.rises[-1] for curve in curves)


@pytest.mark.parametrize("task", [MultiLabel(), Regression(), Classification()])
def test_the_task_says_how_far_outputs_moved(task):
    """By hand in float64. Of labels and values a softmax would see nothing of what moves all of them alike."""
    model = teacher_of()
    one = 3 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    other = one + 1
    p, q = (torch.sigmoid(z.double()) for z in (one, other))
    by_hand = {
        "multilabel": (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean().item(),
        "regression": 1.0,
        "classification": 0.0,
    }
    assert divergence(model, one, other, task) == pytest.approx(by_hand[task.name], rel=1e-4, abs=1e-6)
    assert divergence(model, one, other) == pytest.approx(0, abs=1e-6)


def test_compress_compares_outputs_by_the_task_of_its_labels(tmp_path, monkeypatch):
    seen = []

    def noticed(model, one, other, task=None):
        seen.append(type(task))
        return divergence(model, one, other, task)

    monkeypatch.setattr("indistill_fx.compression.make_student.divergence", noticed)
    monkeypatch.setattr("indistill_fx.compression.sensitivity.divergence", noticed)
    torch.manual_seed(0)
    data = [(images(16, seed=k), torch.rand(16, 5) * (k + 1)) for k in range(2)]
    quick = {"epochs": 1, "curriculum": ifx.Curriculum(lengths=[]), "main": "kd", "progress": False, "export": False}
    made = ifx.compress(Residual(), data, run_dir=tmp_path / "run", macs=0.5, samples=32, **quick)
    assert set(seen) == {Regression} and made.record.task == "regression"


def test_widths_go_where_they_are_worth_most():
    """A group whose channels nobody needs loses them first."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )
    x = images(16, 8)
    model(x)
    with torch.no_grad():
        model[2].weight.mul_(0.001)  # what the first layer makes hardly matters; the second layer's bias does the work
        model[2].bias.normal_()
    traced = ifx.trace(model, (x[:2],), role="teacher")
    known = analyse(traced)
    whole = np.ones(len(known.classes.scores), dtype=bool)
    stay = allocate(known, sensitivities(traced, known, [x]), known.cost.macs, 0.5 * known.cost.macs(whole))
    counts = {group.path: int(stay[group.classes].sum()) for group in known.classes.groups}
    assert counts["0"] < counts["2"]
    assert known.cost.macs(stay) <= 0.5 * known.cost.macs(whole)
    rounded = allocate(
        known, sensitivities(traced, known, [x]), known.cost.macs, 0.6 * known.cost.macs(whole), round_to=8
    )
    assert {int(rounded[group.classes].sum()) % 8 for group in known.classes.groups} == {0}


def test_a_budget_that_cannot_be_met_says_what_can():
    model = teacher_of()
    known = analyse(model)
    curves = sensitivities(model, known, [images(4)])
    with pytest.raises(
        ifx.PruneError,
        match=r"The network cannot be made smaller than [\d,]+, but the budget is 1:.*cannot lose channels",
    ) as said:
        allocate(known, curves, known.cost.macs, 1)
    assert "stem" not in str(said.value).partition("cannot lose channels")[2]  # only its images' channels are fixed


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"macs": 50}, r"[\d,]+ multiply-accumulates, but .* 50 multiply-accumulates:.*for 50% write 0.5\.$"),
        ({"macs": 0.001}, r"[\d,]+ multiply-accumulates, but .*Give a larger budget\.$"),
        ({"params": 66}, r"[\d,]+ parameters, but the budget is 66 parameters"),
        ({"size_mb": 0.00005}, r"0\.00\d+ MB of weights, but the budget is 5e-05 MB of weights"),
    ],
)
def test_what_cannot_be_met_is_said_in_its_own_unit(budget, said):
    with pytest.raises(ifx.PruneError, match=f"The network cannot be made smaller than {said}"):
        make_student(teacher_of(), Budget(**budget), Measure([images(4)]))


@pytest.mark.parametrize("budget", [{"macs": 1}, {"macs": 5e9}, {"params": 1}, {"params": 1e9}, {"size_mb": 100}])
def test_a_budget_that_the_teacher_fits_is_refused_before_all_work(budget, tmp_path):
    def unread():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(
        ifx.ConfigError, match=r"The network fits the budget of [\d,.]+ .* as it is: it has [\d,.]+ "
    ) as said:
        ifx.compress(teacher_of(), unread(), run_dir=tmp_path / "run", example_inputs=images(2), **budget)
    assert ("for half of them write 0.5" in str(said.value)) == ("size_mb" not in budget)
    assert not (tmp_path / "run").exists()


def test_the_whole_network_is_within_a_budget_that_it_fits():
    known = analyse(model := teacher_of())
    assert allocate(known, sensitivities(model, known, [images(4)]), known.cost.macs, 1e12).all()


def test_least_squares_restores_what_a_linear_network_can():
    """Channels that are sums of others: without them, the readers' weights can make up for it exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 64, 5)
    )
    with torch.no_grad():
        model[0].weight[4:] = model[0].weight[:4] * 0.5
        model[0].bias[4:] = model[0].bias[:4] * 0.5
    x = images(32, 8)
    traced = ifx.trace(model, (x[:2],), role="teacher")
    small = ifx.shrink(traced, widths={"0": 4})
    assert small.report.layers[0].kept == (0, 1, 2, 3)
    fixed = repair(traced, small.value, small.report.axes, [x[:16], x[16:]])
    before, after = (float((outputs(m, x) - outputs(traced, x)).square().mean()) for m in (small.value, fixed.value))
    assert after < 1e-3 * before
    assert fixed.report.readers.keys() >= {"1"}
    assert fixed.report.readers["1"][1] < 1e-3 * fixed.report.readers["1"][0]


@pytest.mark.parametrize(("make", "size"), [(Residual, 16), (Cnn32, 32), (TinyTransformer, 16)])
def test_repair_brings_outputs_nearer_and_leaves_both_networks_alone(make, size):
    model = teacher_of(make, size)
    small = ifx.shrink(model, ratio=0.6)
    states = [{k: v.clone() for k, v in m.graph_module.state_dict().items()} for m in (model, small.value)]
    x = images(32, size, seed=5)
    fixed = repair(model, small.value, small.report.axes, [x[:16], x[16:]], norms=False)
    target = outputs(model, x)
    before, after = (float((outputs(m, x) - target).square().mean()) for m in (small.value, fixed.value))
    assert after < 0.7 * before
    for state, m in zip(states, (model, small.value), strict=True):
        assert all(torch.equal(state[k], v) for k, v in m.graph_module.state_dict().items())


def test_norms_take_the_statistics_of_what_arrives():
    model = teacher_of()
    small = ifx.shrink(model, ratio=0.5)
    x = images(16, seed=7)
    fixed = repair(model, small.value, small.report.axes, [x], readers=False)
    norm = next(m for m in fixed.value.graph_module.modules() if isinstance(m, nn.BatchNorm2d))
    conv = next(m for m in fixed.value.graph_module.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        made = conv(x)
    assert torch.allclose(norm.running_mean, made.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, made.var((0, 2, 3)), rtol=1e-4)
    assert fixed.report.norms and not fixed.report.readers


@pytest.mark.parametrize(("make", "size"), [(Residual, 16), (TinyTransformer, 16)])
def test_the_plan_keeps_what_shrink_kept(make, size):
    model = teacher_of(make, size)
    small = ifx.shrink(model, ratio=0.5)
    student = ifx.trace(source_of(small.value).build(), model.example_inputs, role="student")
    plan = plan_of(model, student, small.report.axes)
    plan.check(model, student)
    for pair in plan.pairs:
        known = model.facts_of(pair.teacher)
        assert pair.teacher == pair.student
        kept = small.report.axes.get((model.node(pair.teacher).name, known.channel_axis))
        assert pair.kept == (None if kept is None else tuple(kept))
        assert student.facts_of(pair.student).channels == len(pair.kept or range(known.channels))
    assert any(pair.kept for pair in plan.pairs)


def test_bisection_ends_below_the_budget():
    asked = []

    def time_of(share: float) -> float:
        asked.append(share)
        return 1 + 9 * share**1.5

    share = bisect(time_of, 5.0, smallest=0.05)
    assert 5 * 0.97 <= time_of(share) <= 5
    assert len(asked) < 10
    assert bisect(time_of, 50, smallest=0.05) == 1.0
    with pytest.raises(ifx.PruneError, match=r"takes 1.1 ms, but 0.5 ms was requested"):
        bisect(time_of, 0.5, smallest=0.05)


def test_a_time_that_only_narrow_layers_reach_is_reached():
    """Of the allocations that are tried, those that leave every layer a larger part cannot be as quick as is asked for."""

    class ByWork(Clock):
        def ms(self, module: nn.Module, example_inputs: tuple[Any, ...]) -> float:
            return ifx.trace(module, example_inputs).macs / whole

    model = teacher_of()
    whole, said = model.macs, []
    made = make_student(model, Budget(latency_ms=0.15), Measure([images(16)], clock=ByWork(), say=said.append))
    assert 0.15 * 0.97 <= made.steps[-1].latency_ms <= 0.15
    (tried,) = [line for line in said if line.startswith("widths: ")]
    assert "with 10%" in tried and "with 50%" not in tried
    with pytest.raises(ifx.ConfigError, match=r"fits the budget of 1\.5 ms as it is: it takes 1 ms\. Give less\.$"):
        make_student(model, Budget(latency_ms=1.5), Measure([images(16)], clock=ByWork()))


def test_calibration_keeps_what_a_loader_fills_again():
    buffer = torch.empty(4, 1)
    kept = calibration((buffer.fill_(value) for value in range(5)), 10)
    assert [batch.flatten().tolist() for batch in kept] == [[0.0] * 4, [1.0] * 4, [2.0] * 2]


def test_budgets_and_calibration():
    with pytest.raises(ifx.ConfigError, match="one budget is needed, but 2 are given: macs, params"):
        Budget(macs=0.5, params=0.5)
    with pytest.raises(ifx.ConfigError, match="one budget is needed, but 0 are given"):
        Budget()
    batches = [(images(4, seed=k), torch.zeros(4)) for k in range(5)]
    assert [len(x) for x, _ in calibration(batches, 10)] == [4, 4, 2]
    model = teacher_of()
    size = sum(t.numel() * 4 for t in (*model.graph_module.parameters(), *model.graph_module.buffers())) / 1e6
    made = make_student(model, Budget(size_mb=0.4 * size), Measure([images(16)]))
    own = sum(t.numel() * 4 for t in (*made.model.graph_module.parameters(), *made.model.graph_module.buffers())) / 1e6
    assert own <= 0.4 * size
    assert [step.name for step in made.steps] == ["teacher", "shrunk", "norms estimated anew", "readers fitted"]
    assert made.steps[3].divergence < made.steps[1].divergence


def test_widths_that_sensitivities_get_wrong_are_found_out_after_repair(monkeypatch):
    """Curves that call a layer worthless: the allocation alone would all but empty it."""
    model = teacher_of()

    def misleading(teacher, known, batches, task):
        first, *rest = sensitivities(teacher, known, batches)
        return [replace(first, rises=tuple(0.0 for _ in first.rises)), *rest]

    batches = [images(32, seed=k) for k in range(4)]
    said: list[str] = []
    monkeypatch.setattr("indistill_fx.compression.make_student.sensitivities", misleading)
    made = make_student(model, Budget(macs=0.5), Measure(batches, say=said.append))
    monkeypatch.setattr("indistill_fx.compression.make_student._FLOORS", (0.1,))
    alone = make_student(model, Budget(macs=0.5), Measure(batches))
    assert made.shrunk.widths != alone.shrunk.widths
    assert made.steps[-1].divergence < alone.steps[-1].divergence
    assert any("widths: at least" in line for line in said)


def test_a_vision_transformer_is_paired_block_by_block():
    """Its code checks sizes and drops a second output: neither may be handed out of a block, or the block's name is not a tensor's."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    vit = VisionTransformer(
        image_size=8, patch_size=4, num_layers=3, num_heads=4, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    x = torch.randn(2, 3, 8, 8)
    teacher = ifx.trace(vit, (x,), role="teacher")
    shrunk = ifx.shrink(teacher, ratio=0.4)
    source = source_of(shrunk.value)
    assert "_assert" not in source.text and "return y, z" not in source.text
    plan = plan_of(teacher, ifx.trace(source.build(), (x,), role="student"), shrunk.report.axes)
    assert [pair.student for pair in plan.pairs][-3:] == [f"encoder.layers.encoder_layer_{k}" for k in range(3)]


def data_of(count=4):
    torch.manual_seed(0)
    return [(images(8, seed=k), torch.arange(8) % 5) for k in range(count)]


def test_the_whole_road_and_back(tmp_path):
    model = unsettle(seeded(Residual))
    said: list[str] = []
    arguments = dict(
        macs=0.4, run_dir=tmp_path / "run", epochs=1, progress=False, device="cpu", samples=16, say=said.append
    )
    made = ifx.compress(model, data_of(), **arguments)
    assert [step.name for step in made.steps][-1] == "trained"
    assert made.steps[1].macs <= 0.4 * made.steps[0].macs
    assert (tmp_path / "run" / "student.onnx").exists()
    loaded = ifx.load(made.spec)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in made.student.state_dict().items())
    assert any(line.startswith("readers fitted: ") for line in said)
    story = json.loads((tmp_path / "run" / "compress.json").read_text())
    assert story["widths"] and story["sensitivity"]
    again = ifx.compress(model, data_of(), **arguments, resume=True)
    assert all(torch.equal(v, again.student.state_dict()[k]) for k, v in made.student.state_dict().items())
    edited = (tmp_path / "run" / "student.py").read_text() + "# mine\n"
    (tmp_path / "run" / "student.py").write_text(edited)
    with pytest.raises(
        ifx.ConfigError,
        match=r"student\.py was written or changed by somebody else.* Move it away, or name another directory",
    ):
        ifx.compress(model, data_of(), **arguments, resume=True)
    assert (tmp_path / "run" / "student.py").read_text() == edited
    with pytest.raises(ifx.ConfigError, match="already holds a run"):
        ifx.compress(model, data_of(), **arguments)
    with pytest.raises(ifx.ConfigError, match="holds a compression with another"):
        ifx.compress(model, data_of(), **{**arguments, "macs": 0.3}, resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("story", [None, "{", '{"source": "another", "steps": []}'])
def test_a_student_that_somebody_else_wrote_is_kept(story, resume, tmp_path):
    """`prune -o DIR/` leaves a student.py to be edited, and no compress.json."""
    (tmp_path / "student.py").write_text("# mine\n")
    if story is not None and resume:
        (tmp_path / "compress.json").write_text(story)
    with pytest.raises(
        ifx.ConfigError, match=r"student\.py was written or changed by somebody else, and would be overwritten"
    ):
        ifx.compress(
            seeded(Residual), data_of(), macs=0.4, run_dir=tmp_path, resume=resume, progress=False, device="cpu"
        )
    assert (tmp_path / "student.py").read_text() == "# mine\n"


def test_killed_while_it_writes_the_student_it_knows_its_own_file(tmp_path, monkeypatch):
    model, arguments = (
        unsettle(seeded(Residual)),
        {"macs": 0.4, "epochs": 1, "progress": False, "device": "cpu", "samples": 16},
    )

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("indistill_fx.compression.made.keep_facts", killed)
        ifx.compress(model, data_of(), run_dir=tmp_path / "torn", export=False, **arguments)
    assert (tmp_path / "torn" / "student.py").exists()
    torn = ifx.compress(model, data_of(), run_dir=tmp_path / "torn", export=False, resume=True, **arguments)
    whole = ifx.compress(model, data_of(), run_dir=tmp_path / "whole", export=False, **arguments)
    assert torn.record.digest == whole.record.digest


@pytest.mark.parametrize(("lr", "worse"), [(100.0, True), (1e-12, False)])
def test_that_training_made_it_worse_is_said_by_every_metric(lr, worse, tmp_path):
    """Also where less is better; it is compared with what training started from, and those weights are named."""
    said: list[str] = []
    data = [(images(8, seed=k), torch.rand(8, 5)) for k in range(3)]
    made = ifx.compress(
        unsettle(seeded(Residual)), data, macs=0.4, run_dir=tmp_path / "run", epochs=1, progress=False, device="cpu", samples=16,
        val_loader=data, task="regression", learning_rate=lr, curriculum=ifx.Curriculum(lengths=0), export=False, say=said.append,
    )  # fmt: skip
    (start,) = [step for step in made.steps if step.start]
    assert start.divergence == min(step.divergence for step in made.steps[1:-1])
    assert (made.steps[-1].value > start.value) == worse and not start.higher_is_better
    (*found,) = [line for line in said if line.startswith("Training made the student worse")]
    assert len(found) == worse
    assert (
        not worse
        or f"({start.name}: {start.shown}); the better weights are in {tmp_path}/run/start.safetensors" in found[0]
    )


def test_an_interrupted_road_ends_with_the_same_bits(tmp_path):
    """Stopped in the middle of training by a failing loader; then gone on with."""
    model = unsettle(seeded(Residual))

    class Breaks(list):
        left = 9

        def __iter__(self):
            for batch in super().__iter__():
                Breaks.left -= 1
                if Breaks.left == 0:
                    raise KeyboardInterrupt
                yield batch

    arguments = dict(
        macs=0.4, epochs=2, progress=False, device="cpu", samples=16, calibration_loader=data_of(2), export=False
    )
    arguments |= {"example_inputs": images(4)}
    whole = ifx.compress(model, data_of(), run_dir=tmp_path / "whole", **arguments)
    with pytest.raises(KeyboardInterrupt):
        ifx.compress(model, Breaks(data_of()), run_dir=tmp_path / "parts", **arguments)
    said: list[str] = []
    made = ifx.compress(model, data_of(), run_dir=tmp_path / "parts", resume=True, say=said.append, **arguments)
    assert not any(line.startswith("shrunk") for line in said)  # not made again
    assert all(torch.equal(v, made.student.state_dict()[k]) for k, v in whole.student.state_dict().items())


def test_a_run_goes_on_by_whatever_name_its_folder_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    arguments = dict(macs=0.5, epochs=1, progress=False, device="cpu", samples=16, export=False)
    model = unsettle(seeded(Residual))
    ifx.compress(model, data_of(1), run_dir=tmp_path / "run", **arguments)
    for name in ("run", "./run", "link", tmp_path / "run"):
        said: list[str] = []
        made = ifx.compress(model, data_of(1), run_dir=name, resume=True, say=said.append, **arguments)
        assert not any(line.startswith("shrunk") for line in said), name  # not made again
        assert made.spec.startswith(str(tmp_path / name / "student.py:Student"))


def test_a_step_that_repaired_nothing_is_no_step():
    """Networks without running statistics had a row of norms estimated anew, with the numbers of the row before."""
    made = make_student(teacher_of(TinyTransformer), Budget(macs=0.6), Measure([images(16)]))
    assert [step.name for step in made.steps] == ["teacher", "shrunk", "readers fitted"]
    assert sum(step.start for step in made.steps) == 1


def test_what_has_no_source_code_is_trained_all_the_same(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return bent(self.head(self.layers(x).mean((2, 3))))

    said: list[str] = []
    made = ifx.compress(
        seeded(Odd), data_of(), macs=0.5, run_dir=tmp_path / "run", epochs=1, progress=False, device="cpu", samples=16,
        say=said.append, export=False,
    )  # fmt: skip
    assert made.spec == ""
    assert any("`bent` cannot be written as source code" in line for line in said)
    again = ifx.load(str(tmp_path / "run" / "student.pt2"))
    x = images(3)
    with torch.no_grad():
        assert torch.allclose(again(x), outputs_of(made.student, x), atol=1e-6)


def test_what_depends_on_the_mode_still_does(tmp_path):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            x = nn.functional.dropout(self.two(self.one(x).relu()).relu().mean((2, 3)), 0.5, self.training)
            return self.head(x)

    made = ifx.compress(
        seeded(Dropping), data_of(), macs=0.5, run_dir=tmp_path / "run", epochs=1, progress=False, device="cpu", samples=16,
        export=False,
    )  # fmt: skip
    assert "training=self.training" in (tmp_path / "run" / "student.py").read_text()
    x = images(4)
    with torch.no_grad():
        student = made.student.eval()
        assert torch.equal(student(x), student(x))
        student.train()
        assert not torch.equal(student(x), student(x))


@torch.fx.wrap
def bent(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def outputs_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for part in module.modules():
        part.training = False
    return module(x)


def test_a_teacher_no_better_than_chance_is_refused(tmp_path):
    data = [(images(50, seed=k), torch.arange(50) % 5) for k in range(4)]
    with pytest.raises(ifx.ConfigError, match="classifies no better than chance"):
        ifx.compress(seeded(Residual), data, macs=0.5, run_dir=tmp_path / "run", val_loader=data)
    assert not (tmp_path / "run").exists()


def test_nothing_to_remove(tmp_path):
    with pytest.raises(ifx.PruneError, match="No channel of this network can be removed"):
        ifx.compress(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), data_of(), macs=0.5, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.table, self.mix, self.last = (
            nn.Conv2d(3, 12, 3, 2),
            nn.Linear(6, 12),
            nn.Linear(12, 24),
            nn.Linear(24, 3),
        )

    def forward(self, image, table):
        return self.last(self.mix(self.conv(image).relu().mean((2, 3)) + self.table(table).tanh()).relu())


class _Depth(nn.Module):
    """Stochastic depth written by hand; `other` reads the batch size of another tensor, which no rule sees through."""

    def __init__(self, other: bool):
        super().__init__()
        self.first, self.last, self.other = nn.Conv2d(3, 24, 3, 2, 1), nn.Linear(24, 5), other
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24)) for _ in range(2)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            y = block(x).relu()
            if self.training:
                count = (x if self.other else y).shape[0]
                y = y * torch.bernoulli(torch.full((count, 1, 1, 1), 0.5)) / 0.5
            x = x + y
        return self.last(x.mean((2, 3)))


def _normed() -> nn.Module:
    parametrizations = nn.utils.parametrizations
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 24, 3, 2)), nn.ReLU(), parametrizations.spectral_norm(nn.Conv2d(24, 24, 3)),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


def _compressed(model: nn.Module, batches: list, folder, said: list[str]) -> ifx.Compressed:
    return ifx.compress(
        model, batches, run_dir=folder, macs=0.5, epochs=1, progress=False, device="cpu", samples=16, say=said.append
    )


def test_inputs_by_name(tmp_path):
    x = images(4, 16)
    batches = [{"image": x, "table": torch.randn(4, 6), "labels": torch.arange(4) % 3, "file": ["a"] * 4}] * 2
    made = _compressed(seeded(_TwoInputs), batches, tmp_path, [])
    given = {name: batches[0][name] for name in ("image", "table")}
    made.student.eval()
    loaded = ifx.load(made.spec).eval()
    assert torch.equal(loaded(**given), made.student(**given)) and made.steps[-1].macs <= 0.5 * made.steps[0].macs
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    assert [entry.name for entry in session.get_inputs()] == ["image", "table"]


def test_weights_that_are_computed_anew_become_plain_ones(tmp_path):
    said: list[str] = []
    model = seeded(_normed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = _compressed(model, [(images(4, 16), torch.arange(4))] * 2, tmp_path, said)
    assert set(made.student.state_dict()) == {f"{k}.{name}" for k in (0, 2, 6) for name in ("weight", "bias")}
    assert made.steps[-1].macs <= 0.5 * made.steps[0].macs and "become plain parameters of the student" in said[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("other", [False, True])
def test_stochastic_depth_by_hand_stays_where_it_lets_channels_go(other, tmp_path):
    said: list[str] = []
    made = _compressed(unsettle(seeded(_Depth, other)), [(images(4, 16), torch.arange(4))] * 2, tmp_path, said)
    assert made.steps[-1].macs <= 0.5 * made.steps[0].macs
    student, x = made.student.train(), images(8, 16)
    for part in student.modules():
        part.training = part.training and not isinstance(part, nn.BatchNorm2d)
    torch.manual_seed(0)
    random = not torch.equal(student(x), student(x))
    assert random is not other and ("what the teacher computes in eval mode" in said[0]) is other


def test_a_transformer_encoder_of_torchs_is_written_as_source():
    """What is taken out of an attention's result was noted within the attention."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5)
    )
    x = torch.randn(2, 7, 6)
    small = ifx.shrink(ifx.trace(model, (x,), role="student"), macs=0.5).value
    student = source_of(small).build().eval()
    assert torch.equal(student(x), outputs(small, x)) and student.get_submodule("1.layers.1.self_attn").query


@pytest.mark.parametrize("best", range(6))
@pytest.mark.parametrize("steep", [1.0, 3.0])
def test_the_pull_with_the_least_error_is_found_wherever_it_lies(best: int, steep: float) -> None:
    tried = []

    def error_of(pull: float) -> float:
        tried.append(pull)
        k = _PULLS.index(pull)
        return steep * (k - best) if k > best else best - k

    assert _best_pull(error_of) == (_PULLS[best], 0.0)
    assert len(set(tried)) == len(tried) < len(_PULLS)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.heads = nn.ModuleList([nn.Linear(16, 5), nn.Linear(16, 5)])

    def forward(self, x):
        x = torch.relu(self.mix(torch.relu(self.stem(x)))).mean((2, 3))
        return {"logits": self.heads[0](x), "fine": self.heads[1](x)}


@pytest.mark.parametrize("traced", [False, True])
def test_the_student_is_trained_on_the_output_that_is_named(traced, tmp_path):
    """By an option, or when the teacher was traced. It was trained on the output called `logits`; where there is none, it was refused."""
    model = unsettle(seeded(TwoHeads))
    arguments = dict(macs=0.5, run_dir=tmp_path, samples=16, progress=False, device="cpu", export=False)
    if traced:
        model = ifx.trace(model, data_of()[0][0][:2], role="teacher", logits="fine")
    else:
        arguments["logits"] = "fine"
    made = ifx.compress(model, data_of(), **arguments, epochs=1, curriculum=NO_WARMUP)
    before = load_file(tmp_path / "start.safetensors")
    changed = {key: not torch.equal(value, before[key]) for key, value in made.student.state_dict().items()}
    assert [changed[key] for key in sorted(changed) if "head" in key and key.endswith("weight")] == [False, True]
    again = ifx.compress(model, data_of(), **arguments, epochs=1, curriculum=NO_WARMUP, resume=True)
    assert all(torch.equal(v, again.student.state_dict()[k]) for k, v in made.student.state_dict().items())


class Standardized(nn.Conv2d):
    """Weights of mean 0 and deviation 1, times a gain (as BiT and NFNets have them)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(flat, None, None, weight=self.gain, training=True, eps=1e-6)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class OfStandardized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = Standardized(3, 8, 3), Standardized(8, 12, 3)
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(12, 4)
        self.stem.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.inner(self.stem(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def test_standardized_weights_become_parameters_so_that_channels_can_go():
    teacher, said = teacher_of(OfStandardized), list[str]()
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    assert ifx.shrink(teacher, ratio=0.5).report.widths["stem"] == (
        8,
        8,
    )  # a statistic of those that read it is over all channels
    basis = in_both_modes(teacher, say=said.append)
    assert len(said) == 1 and "standardised weights" in said[0]
    x = images(5, 16)
    assert torch.equal(outputs(basis, x), outputs(teacher, x))
    trained = {name: value.requires_grad for name, value in basis.graph_module.named_parameters()}
    assert not trained["stem.weight"] and trained["inner.weight"] and "inner.gain" not in trained
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    small = ifx.shrink(basis, ratio=0.5)  # compared with the network without these channels
    assert small.report.widths == {"stem": (8, 4), "inner": (12, 6), "head": (4, 4)}
    assert "batch_norm" not in source_of(small.value).text


def test_weights_without_a_norm_of_their_own_stay_as_they_are():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 8, 3), nn.Parameter(torch.rand(8, 1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.conv.weight * self.scale).mean((2, 3))

    said = list[str]()
    basis = in_both_modes(teacher_of(Scaled), say=said.append)
    assert said == [] and "scale" in dict(basis.graph_module.named_parameters())
