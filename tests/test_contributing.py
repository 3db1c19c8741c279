"""The code in CONTRIBUTING.md does what the text says: a pass, a loss and a channel rule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.channels.rules import RULES
from indistill_fx.passes.contract import graph_text
from tests.passes.test_channels import Form, narrowed

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def home(name: str) -> Any:
    """What the block that defines a name defines."""
    block = next(
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S) if name in code
    )
    found: dict[str, Any] = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), found)
    return found[name]


def test_the_pass_removes_dropout_and_nothing_else():
    x = torch.randn(2, 4)
    traced = ifx.trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU()), x)
    graph = traced.graph_module
    before = graph_text(graph), digest(graph)
    result = home("drop_dropout")(graph)
    assert (graph_text(graph), digest(graph)) == before
    assert result.report.done and "Dropout" not in "".join(graph_text(result.value))
    assert torch.equal(result.value(x), graph(x))
    assert home("drop_dropout")(result.value).value is result.value


def test_the_loss_trains():
    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
    from indistill_fx.demo import DigitsStudent, DigitsTeacher

    student = DigitsStudent()
    loss = home("CosineLoss")(weight_labels=0.0)
    stage = ifx.compile_stages(DigitsTeacher(), student, main=loss, example_inputs=x)[-1]
    value = stage([x, labels])
    value.backward()
    assert 0 <= value.item() <= 2 and student.fc.weight.grad is not None


def test_the_channel_rule_is_exact_and_lets_the_selection_pass(monkeypatch):
    _, stopped = narrowed(Form(lambda m, x: x.matrix_exp()))
    assert stopped and all("no channel rule for matrix_exp" in stop for stop in stopped)
    monkeypatch.setitem(RULES, "matrix_exp", home("matrix_exp"))
    _, stopped = narrowed(Form(lambda m, x: x.matrix_exp()))
    assert stopped == []
