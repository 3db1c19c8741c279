"""Weights over time: the factor of every step by numpy's interpolation, on any loss, and that a resumed run knows its step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.cli.distill import _over_time
from indistill_fx.curriculum import Curriculum
from indistill_fx.errors import ConfigError
from indistill_fx.losses import Outputs, main_loss
from indistill_fx.losses.registry import MAIN_LOSSES, cut_short
from indistill_fx.training.chain import distill_for_int8


def outputs(seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(torch.randn(6, 4, generator=generator), torch.randn(6, 5, generator=generator), {})


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "pkt", "mlkd"])
@pytest.mark.parametrize("points", [((0, 0.0), (4, 1.0)), ((2, 1.0), (5, 0.25), (6, 2.0)), ((0, 0.5),)])
def test_the_weight_of_every_step(name, points):
    labels = torch.arange(6) % 4
    plain, varied = main_loss(name), main_loss(name, over_time=points)
    both = plain(outputs(0), outputs(1), labels).item()
    only = main_loss(name, weight_labels=0.0)(outputs(0), outputs(1), labels).item()
    steps = [step for step, _ in points]
    for step in range(9):
        factor = np.interp(step, steps, [factor for _, factor in points])
        assert varied(outputs(0), outputs(1), labels).item() == pytest.approx(both - only + factor * only, rel=1e-5)
    varied.eval()
    before = varied.seen.item()
    varied(outputs(0), outputs(1), labels)
    assert varied.seen.item() == before  # only training steps count


def test_what_are_no_weights_is_refused():
    for points in [((3, 1.0), (2, 1.0)), ((-1, 1.0),), ((0, -1.0),)]:
        with pytest.raises(ConfigError, match="is not a schedule of weights"):
            main_loss("kd", over_time=points)
    with pytest.raises(ConfigError, match="Weights over time do not work with your own loss"):
        main_loss(lambda student, teacher, labels: labels, over_time=((0, 1.0),))
    with pytest.raises(ConfigError, match="is not a schedule of weights"):
        main_loss("labels", over_time=((0, 1.0),))
    with pytest.raises(ConfigError, match="is not a list of STEP:FACTOR"):
        _over_time("1,2")
    assert _over_time("0:0,500:1") == {"over_time": ((0, 0.0), (500, 1.0))}


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip


@pytest.mark.parametrize("kept", [0.0, 1.0], ids=["alone", "with what is kept of the warm-up"])
@pytest.mark.parametrize(
    ("main", "options", "expected"),
    [
        ("kd", {"over_time": ((0, 0.0), (4, 1.0))}, [0, 0, 1, 2, 2, 3]),
        ("dkd", {"ramp_steps": 4}, [1, 1, 2, 3, 3, 4]),
    ],
)
def test_the_batches_of_one_step_have_its_weight(main, options, expected, kept, monkeypatch):
    """Two batches a step and three an epoch: the last step of an epoch has one. Every batch was counted as a step."""
    factors = []
    kind = MAIN_LOSSES[main]
    forward = kind.forward

    def noting(self, student, teacher, labels=None):
        value = forward(self, student, teacher, labels)
        if self.training:
            with torch.no_grad():
                plain = main_loss(main, weight_labels=0.0).eval()(student, teacher, labels)
            factors.append(4 * (value / plain).item())
        return value

    monkeypatch.setattr(kind, "forward", noting)
    batch = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    curriculum = Curriculum(lengths=[], keep=kept)
    options = {"main_options": {"weight_labels": 0.0, **options}, "curriculum": curriculum, "progress": False}
    ifx.distill(net(0), net(1), [batch] * 3, main=main, epochs=2, accumulate=2, device="cpu", **options)
    assert factors == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_knows_its_step(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batch: tuple[Tensor, Tensor] = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3
    options = {
        "main_options": {"over_time": ((0, 0.0), (5, 1.0))},
        "curriculum": Curriculum(lengths=[]),
        "progress": False,
        "device": "cpu",
    }
    whole, torn, plain = net(1), net(1), net(1)
    ifx.distill(net(0), whole, [batch] * 2, epochs=3, run_dir=tmp_path / "whole", **options)
    ifx.distill(net(0), torn, [batch] * 2, epochs=1, run_dir=tmp_path / "torn", **options)
    torn = net(1)
    ifx.distill(net(0), torn, [batch] * 2, epochs=3, run_dir=tmp_path / "torn", resume=True, **options)
    ifx.distill(net(0), plain, [batch] * 2, epochs=3, **options | {"main_options": {}})
    for key, value in whole.state_dict().items():
        assert torch.equal(value, torn.state_dict()[key])
    assert not torch.equal(whole[0].weight, plain[0].weight)


@pytest.mark.parametrize(
    ("main", "ramp", "factor"),
    [("kd", {"over_time": ((0, 0.0), (4, 0.5))}, 0.5), ("dkd", {"ramp_steps": 4}, 1.0), ("kd", {}, 1.0)],
)
def test_what_follows_a_run_keeps_the_last_weight(main, ramp, factor, tmp_path, monkeypatch):
    """A ramp is of the run that trained the student: the quantisation-aware one after it is not to fade in anew."""
    seen, kind = [], MAIN_LOSSES[main]
    term = kind.forward

    def noting(self, *arguments):
        loss = term(self, *arguments)
        plain = main_loss(main, weight_labels=0.0)
        seen.append((loss / term(plain, *arguments)).item())
        return loss

    monkeypatch.setattr(kind, "forward", noting)
    batch = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    options = {"main": main, "main_options": {"weight_labels": 0.0, **ramp}, "progress": False, "device": "cpu"}
    distill_for_int8(net(0), net(1), [batch] * 2, epochs=1, run_dir=tmp_path, **options)
    assert seen == pytest.approx([factor] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"over_time": ((0, 0.0), (500, 1.0))}, 120, "changes until step 500, but the main stage ends after 120 steps"),
        (
            {"ramp_steps": 2000, "beta": 2.0},
            1999,
            "changes until step 2,000, but the main stage ends after 1,999 steps",
        ),
        ({"over_time": ((0, 0.0), (500, 1.0))}, 500, ""),
        ({"over_time": ((0, 0.0), (500, 1.0))}, None, ""),
        ({"over_time": ((0, 0.5),)}, 1, ""),
        ({"temperature": 2.0}, 1, ""),
    ],
)
def test_a_ramp_that_the_main_stage_cuts_short(options, steps, said):
    found = cut_short(options, steps)
    assert found.endswith(said) and bool(found) is bool(said)


def test_a_run_remarks_on_a_ramp_that_is_cut_short(capsys):
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    loader = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]

    def said(points, **options):
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
        asked = {"main_options": {"over_time": points}, "curriculum": Curriculum(lengths=[])}
        ifx.distill(*models, loader, device="cpu", **asked, **options)
        return "the weight of the main loss changes until" in capsys.readouterr().err

    # 2 epochs of 3 batches are 6 steps; of 2 batches a step, 4
    assert [said(((0, 0.0), (last, 1.0)), epochs=2) for last in (6, 7)] == [False, True]
    assert [said(((0, 0.0), (last, 1.0)), epochs=2, accumulate=2) for last in (4, 5)] == [False, True]
    assert [said(((0, 0.0), (last, 1.0)), epochs=2, main_steps=5) for last in (5, 6)] == [False, True]
