"""How a run is shown while it trains: a dashboard on a terminal, lines elsewhere, and no more than asked for."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from indistill_fx.training import progress as subject
from indistill_fx.training.progress import Reporter, board, spark


@pytest.fixture(autouse=True)
def every_step_is_shown(monkeypatch):
    monkeypatch.setattr(subject, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(subject, "_BOARD_SECONDS", 0.0)


def run(reporter: Reporter) -> None:
    with reporter:
        reporter.teacher(0.9)
        reporter.open("layer1", 0)
        reporter.step(2, 1, 4.0)
        reporter.epoch("layer1", 5, 3.0, None)
        reporter.step(7, 2, 1.5)
        reporter.epoch("layer1", 10, 1.0, None)
        reporter.close("layer1", "layer1: over")
        reporter.open("main", 0)
        reporter.step(10, 1, 0.5)
        reporter.epoch("main", 20, 0.5, 0.75)
        reporter.say("[a] line")


def terminal(width: int, **kind) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, **kind)


def drawn(board, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(board.draw(width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_dashboard_has_a_line_per_stage_and_the_accuracy():
    console = terminal(90)
    reporter = Reporter(shown=True, steps={"layer1": 10, "main": 20}, console=console)
    run(reporter)
    told = console.file.getvalue()
    assert "Teacher's accuracy: 90.00%" in told and "[a] line" in told and "layer1: over" not in told
    first, second, foot = drawn(reporter._board, 90)
    assert first.startswith("✓ layer1") and first.endswith("10/10 loss 3 → 1 █▁")
    assert second.startswith("▸ main") and "20/20 loss 0.5" in second
    assert foot == "  accuracy 75.00%, best 75.00% · teacher 90.00%"
    assert "epoch 1 · " in told and "left" in told


@pytest.mark.parametrize(
    "console", [Console(file=io.StringIO(), width=90), terminal(90, _environ={"TERM": "dumb"})], ids=["file", "dumb"]
)
def test_without_a_terminal_there_are_plain_lines(console, capsys):
    run(Reporter(shown=True, steps={"layer1": 10, "main": 20}, console=console))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Teacher's accuracy: 90.00%"
    assert [line.split(",")[0] for line in lines[1:3]] == ["layer1: step 2 of 10", "layer1: step 7 of 10"]
    assert "epoch 2, loss 1.5, " in lines[2]
    assert lines[3] == "layer1: over" and lines[-1] == "[a] line"
    assert console.file.getvalue() == ""


def test_a_quiet_run_says_nothing(capsys):
    console = terminal(90)
    run(Reporter(shown=False, steps={"layer1": 10, "main": 20}, console=console))
    assert console.file.getvalue() == "" == capsys.readouterr().err


def test_many_stages_are_shown_around_the_running_one():
    found = board({f"layer{k}": 5 for k in range(30)})
    found.running = "layer12"
    lines = drawn(found, 80)
    assert lines[0].strip() == "8 before" and lines[-1].strip() == "14 to come" and len(lines) == 10
    assert lines[1].split()[:2] == ["·", "layer8"] and lines[5].split()[:2] == ["▸", "layer12"]


@pytest.mark.parametrize("width", [20, 40, 75, 76, 200])
def test_it_fits_the_terminal_whatever_the_names(width):
    found = board({"[red]" + "n" * 500: 5, "é✨🦜\x1b[31m": 100_000, "main": 3})
    for stage in found.stages.values():
        stage.losses = [1e-9, math.nan, math.inf, 1e30]
    found.running, found.teacher, found.values, found.pace = "main", 0.5, [0.1], "epoch 1 · about 3 h left"
    lines = drawn(found, width)
    assert len(lines) == 4 and (width < 40 or "[red]n" in lines[0])
    assert all(len(line) <= width for line in lines) and "\x1b" not in "".join(lines)


@given(st.lists(st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf]), max_size=100), st.integers(2, 40))
def test_a_small_curve_has_its_ends_and_its_width(values, width):
    known = [value for value in values if math.isfinite(value)]
    curve = spark(values, width)
    assert len(curve) == min(len(known), width)
    if known and len(known) <= width and max(known) > min(known):
        assert curve[known.index(max(known))] == "█" and curve[known.index(min(known))] == "▁"


def test_a_curve_of_the_largest_numbers_is_drawn():
    assert spark([1.7e308, -1.7e308], 4) == "█▁"


def test_a_resumed_run_knows_what_was_done_before():
    console = terminal(90)
    reporter = Reporter(shown=True, steps={"layer1": 10, "main": 20}, console=console)
    with reporter:
        reporter.epoch("layer1", 5, 3.0, None)
        reporter.epoch("layer1", 10, 2.0, None)
        reporter.close("layer1", "layer1: done before")
        reporter.epoch("main", 10, 1.0, 0.5)
        reporter.open("main", 12)
    first, second, foot = drawn(reporter._board, 90)
    assert first.endswith("10/10 loss 3 → 2 █▁") and "12/20 loss 1" in second and "best 50.00%" in foot
