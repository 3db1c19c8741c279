"""A target is checked before anything is traced, and decides which rewrites run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.passes.lowering.table import LOWERINGS, Lowerings
from indistill_fx.target import Target, available_devices
from tests.nets import Cnn32, images, seeded


def pair() -> tuple[nn.Module, nn.Module]:
    return seeded(lambda: Cnn32((16, 32, 64), 128)), seeded(Cnn32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, r"There is no device 'cuda:99' here\.(.|\n)*cpu"),
        ({"device": "abacus"}, r"There is no device 'abacus' here\."),
        ({"dtype": torch.int8}, r"Training is not possible in int8\."),
    ],
)
def test_targets_that_cannot_be(options, message):
    with pytest.raises(ifx.ConfigError, match=message):
        Target(**options)


def test_an_unusable_target_is_refused_before_anything_is_traced():
    def untraceable(*_: object) -> None:
        pytest.fail("traced")

    teacher, student = pair()
    teacher.forward = untraceable  # type: ignore[method-assign]
    with pytest.raises(ifx.ConfigError, match="no device 'cuda:99'"):
        ifx.compile_stages(teacher, student, example_inputs=images(2, 32), target=Target("cuda:99"))


def test_the_kind_of_a_target():
    assert available_devices()[0] == "cpu"
    assert Target().kind == Target("cpu:1").kind == "cpu"  # processes on a CPU are numbered
    assert Target(dtype=torch.bfloat16).kind == Target(dtype=torch.float16).kind == "cpu reduced"
    assert Target(dtype=torch.float64).kind == "cpu"
    assert Target(compiled=True).kind == "cpu compiled"
    assert Target.of(seeded(Cnn32).double()).dtype == torch.float64
    assert Target.of(nn.Flatten()) == Target()


def test_the_targets_list_of_rewrites_is_the_one_that_runs():
    for target in (Target(), Target(compiled=True), Target(dtype=torch.bfloat16)):
        stage = ifx.compile_stages(*pair(), example_inputs=images(2, 32), target=target)[0]
        rewrites = {name for row in LOWERINGS.values() for name in (*row.teacher, *row.student)}
        for role in ("teacher", "student"):
            ran = tuple(record.name for record in getattr(stage.report, role) if record.name in rewrites)
            assert ran == getattr(LOWERINGS[target.kind], role)


def test_every_list_gives_the_same_loss():
    x, losses = images(4, 32), []
    for lowerings in (Lowerings(), LOWERINGS["cpu"], *(LOWERINGS["cpu"].without(n) for n in LOWERINGS["cpu"].student)):
        stage = ifx.compile_stages(*pair(), example_inputs=x, lowerings=lowerings)[0].train()
        losses.append(stage(x).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_a_table_without_one_rewrite():
    assert Lowerings(("a", "b"), ("b", "c")).without("b") == Lowerings(("a",), ("c",))


def test_distill_lowers_for_what_its_settings_say(monkeypatch):
    seen = []
    import indistill_fx.training.distill as subject

    original = subject.compile_stages
    monkeypatch.setattr(subject, "compile_stages", lambda *a, **k: seen.append(k["target"]) or original(*a, **k))
    batches = [(images(4, 32), torch.tensor([0, 1, 2, 3]))]
    teacher, student = pair()
    ifx.distill(
        teacher, student, batches, epochs=0, curriculum=ifx.Curriculum(lengths=[]), progress=False, device="cpu"
    )
    ifx.distill(
        teacher, student, batches, epochs=0, curriculum=ifx.Curriculum(lengths=[]), progress=False, device="cpu",
        mixed_precision="bf16", compile=True,
    )  # fmt: skip
    assert seen == [Target("cpu"), Target("cpu", torch.bfloat16, compiled=True)]
