"""torch.compile of many stages in one process."""

from __future__ import annotations

import functools

import pytest
import torch

import indistill_fx as ifx
from indistill_fx.training.step import torch_compile as compiling
from tests.nets import Cnn32, seeded

COUNT = 10  # more than the compiler's limit for one function


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def notes() -> list[str]:
    x = torch.randn(2, 3, 32, 32)
    found = []
    for k in range(COUNT):
        teacher, student = seeded(Cnn32, seed=k), seeded(Cnn32, (8, 16, 32), 64, seed=k)
        stage = ifx.compile_stages(teacher, student, example_inputs=x, curriculum=ifx.Curriculum(lengths=[0, 0, 1]))[0]
        found.append(compiling.compiled(stage.train(), lambda module: module(x))[1].split(" in ")[0])
    return found


@pytest.mark.skipif(not compiling._OWN_COUNT, reason="this torch counts all stages together")
def test_every_stage_of_a_process_is_compiled():
    assert notes() == ["compiled"] * COUNT


def test_without_a_count_of_their_own_the_compiler_gives_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiling, "_OWN_COUNT", {})
    found = notes()
    assert found[:8] == ["compiled"] * 8
    assert found[-1].startswith("not compiled: ")
