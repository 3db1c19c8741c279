"""Run directories and plans of earlier versions, kept as they were written: later versions read them and go on with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import indistill_fx as ifx
from indistill_fx.plan import AlignmentPlan
from indistill_fx.report import run_page
from indistill_fx.report.read_runs import read_run
from tests.faults.harness import STEPS, run, steps_saved

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if (path / "run").is_dir())


def test_there_is_one_of_the_first_version() -> None:
    assert VERSIONS[0] == "0.1.0"
    assert ifx.__version__ >= VERSIONS[-1]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_is_read_and_written_as_it_was(version: str, tmp_path: Path) -> None:
    path = GOLDEN / version / "plan.json"
    plan = AlignmentPlan.load(path)
    assert [pair.teacher for pair in plan.pairs] == ["layer1", "layer2", "layer3"]
    assert plan.pairs[0].kept == (0, 2, 3, 5)
    plan.save(tmp_path / "plan.json")
    was, now = (json.loads(file.read_text()) for file in (path, tmp_path / "plan.json"))
    assert {key: now[key] for key in was} == was


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_is_shown_and_gone_on_with(version: str, tmp_path: Path) -> None:
    place = Path(shutil.copytree(GOLDEN / version / "run", tmp_path / "run"))
    assert steps_saved(place) == 8
    told = json.loads((place / "run.json").read_text())
    assert told["schema_version"] == 1
    shown = read_run(place)
    assert shown.status == "running"
    assert [epoch.epoch for epoch in shown.epochs] == [1]
    assert "</html>" in run_page(place)
    first = json.loads((place / "metrics.jsonl").read_text().splitlines()[0])
    record = run(place, seed=9)
    assert record.steps == STEPS
    assert record.epochs[0].loss == first["loss"]  # the epoch that was over is not trained again
    assert record.epochs[2].loss < record.epochs[0].loss
