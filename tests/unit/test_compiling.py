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


@pytest.mark.parametrize("own", [True, False], ids=["a count each", "one count"])
def test_every_stage_of_a_process_is_compiled(own, monkeypatch: pytest.MonkeyPatch):
    """Older torch (2.11, for example) counts all stages together."""
    if not own:
        monkeypatch.setattr(compiling, "_OWN_COUNT", {})
    assert notes() == ["compiled"] * COUNT


def test_the_compiler_gives_up_where_nobody_resets_its_count(monkeypatch: pytest.MonkeyPatch):
    """Negative control."""
    monkeypatch.setattr(compiling, "_OWN_COUNT", {})
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    found = notes()
    assert found[:8] == ["compiled"] * 8
    assert found[-1].startswith("not compiled: ")


@pytest.mark.parametrize(("mode", "given"), [("default", None), ("max-autotune", "max-autotune-no-cudagraphs")])
def test_the_compiler_never_records_graphs_of_its_own(mode, given, monkeypatch: pytest.MonkeyPatch):
    asked: list[str | None] = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options["mode"]) or module)
    compiling.compiled(torch.nn.Linear(2, 1), lambda module: module(torch.ones(1, 2)).sum(), mode)
    assert asked == [given]
