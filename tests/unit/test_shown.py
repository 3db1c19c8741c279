"""What an interactive session shows of the objects that it is given: one line, not pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import indistill_fx as ifx
from indistill_fx.compression.made import check_free
from indistill_fx.demo import DigitsStudent, DigitsTeacher
from indistill_fx.system.files import shown


def test_a_traced_model_and_a_smaller_one_are_shown_in_a_line_each() -> None:
    traced = ifx.trace(DigitsTeacher(), torch.randn(2, 1, 8, 8))
    assert repr(traced) == (
        "TracedModel(DigitsTeacher as teacher: 2x1x8x8 → 2x10, 19 layers, 6,182,144 multiply-accumulates a sample)"
    )
    assert repr(ifx.shrink(traced, ratio=0.5).report) == (
        "ShrinkReport(multiply-accumulates 6,182,144 → 1,550,976; parameters 708,810 → 178,282; 18 of 19 layers narrower)"
    )


def test_a_plan_is_shown_without_the_layers_of_both_models() -> None:
    plan = ifx.align(DigitsTeacher(), DigitsStudent(), example_inputs=torch.randn(2, 1, 8, 8))
    assert "layer1" in repr(plan)
    assert "parameters" not in repr(plan)
    assert "parameters" in plan.model_dump_json()


def test_models_traced_in_the_same_role_are_named_by_what_they_are() -> None:
    bare = ifx.trace(torch.nn.Linear(4, 4), torch.randn(2, 4))
    try:
        ifx.align(bare, bare)
    except ifx.MatchError as error:
        assert "in the teacher and in the student" in str(error)
    else:
        raise AssertionError("networks of one layer have no pairs")


def test_paths_are_shown_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs" / "half") == str(Path("runs", "half"))
    assert shown(tmp_path) == str(tmp_path) and shown(tmp_path.parent) == str(tmp_path.parent)
    with pytest.raises(ifx.ConfigError, match=r"^half already holds a run\."):
        check_free(_with_a_run(tmp_path / "half"), resume=False)


def _with_a_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").touch()
    return folder
