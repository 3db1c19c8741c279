"""The plan file: what is written is read again, what does not fit is told, what changed is listed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from torch import nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pairing.match import match
from indistill_fx.plan import AlignmentPlan, Layers, ModelStamp, Pair, plan_schema
from indistill_fx.traced import TracedModel
from tests.nets import Residual, images, seeded

SCHEMA = Path(__file__).parents[2] / "docs" / "plan.schema.json"


@cache
def models(width: int = 8, blocks: int = 2) -> tuple[TracedModel, TracedModel]:
    teacher = trace(seeded(Residual, width, blocks), images())
    return teacher, trace(seeded(Residual, 4, 1), images(), role="student")


def plan(width: int = 8, blocks: int = 2) -> AlignmentPlan:
    teacher, student = models(width, blocks)
    found = match(teacher, student)
    return AlignmentPlan(
        teacher=ModelStamp.of(teacher),
        student=ModelStamp.of(student),
        pairs=found.value,
        embedding=found.report.embedding,
        layers=Layers(teacher=teacher.layers, student=student.layers),
    )


def edited(base: AlignmentPlan, number: int, **changes: object) -> AlignmentPlan:
    pairs = list(base.pairs)
    pairs[number] = pairs[number].model_copy(update=changes)
    return base.model_copy(update={"pairs": tuple(pairs)})


def test_a_saved_plan_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    assert AlignmentPlan.load(path) == plan()
    assert [entry["teacher"] for entry in json.loads(path.read_text())["pairs"]] == ["layer1", "layer2", "layer3"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_published_schema_is_current() -> None:
    assert SCHEMA.read_text() == plan_schema(), (
        "write it anew: plan_schema() of indistill_fx.plan says what it should be"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{", "is not JSON"),
        ("[]", "the whole file"),
        ('{"schema_version": 2}', "schema_version"),
        (
            '{"teacher": {"name": "A", "fingerprint": "1"}, "student": {"name": "A", "fingerprint": "1"}, "pairs": [{"teacher": 3}]}',
            "pairs.0.teacher",
        ),
    ],
)
def test_a_broken_file_is_refused_and_the_field_named(text: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        AlignmentPlan.load(path)
    assert place in str(error.value)


def test_a_missing_file_and_an_unwritable_place_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        AlignmentPlan.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        plan().save(tmp_path / "none" / "plan.json")


def test_kept_channels_must_ascend() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Pair(teacher="a", student="b", teacher_shape=(1, 4), student_shape=(1, 2), kept=(2, 1))


def test_a_fitting_plan_passes_and_nothing_has_drifted() -> None:
    plan().check(*models())
    assert plan().drift(*models()) == ()


def test_a_typo_offers_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"the teacher has no layer `layr2` \(Nearest: layer2") as error:
        edited(plan(), 1, teacher="layr2").check(*models())
    assert error.value.where == "layr2"


def test_every_layer_that_changed_is_named_with_how() -> None:
    with pytest.raises(ConfigError) as error:
        plan().check(*models(width=16))
    text = str(error.value)
    for k, size in enumerate(("16x16", "8x8", "4x4")):
        assert (
            f"`layer{k + 1}` of the teacher is {8 * 2**k}x{size} in the plan and {16 * 2**k}x{size} in the model"
            in text
        )
    assert "the teacher is not the Residual the plan was made for" in text
    assert "`stem.0` was conv 8x16x16, 216 parameters, is conv 16x16x16, 432 parameters" in text
    assert "; and " in text


def test_a_plan_fits_a_changed_model_that_still_has_its_layers_and_says_so() -> None:
    plan().check(*models(blocks=3))
    (line,) = plan().drift(*models(blocks=3))
    assert "`layer1.2.conv1` is new: conv 8x16x16, 576 parameters" in line
    (line,) = plan(blocks=3).drift(*models())
    assert "`layer1.2.conv1` is gone" in line
    silent = plan().model_copy(update={"layers": Layers()})
    assert silent.drift(*models(blocks=3)) == (
        "the teacher is not the Residual the plan was made for: its structure has changed",
    )


def test_a_change_that_keeps_all_shapes_is_told() -> None:
    def net(kernel: int) -> TracedModel:
        layers = [
            nn.Conv2d(3, 4, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
        ]
        return trace(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), images())

    before, after = net(3), net(5)
    made = ifx.align(before, before)
    made.check(after, before)
    assert made.drift(before, before) == ()
    (line,) = made.drift(after, before)
    assert "(`0` was conv 4x16x16, 112 parameters, is conv 4x16x16, 304 parameters)" in line


def test_channels_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="keeps channel 8 of `layer1`, which has 8 channels"):
        edited(plan(), 0, kept=(1, 8)).check(*models())


def test_crossing_pairs_are_refused_and_both_named() -> None:
    pairs = plan().pairs
    crossed = plan().model_copy(
        update={
            "pairs": (
                pairs[0],
                pairs[1].model_copy(update={"student": "layer3", "student_shape": pairs[2].student_shape}),
                pairs[2].model_copy(update={"student": "layer2", "student_shape": pairs[1].student_shape}),
            )
        }
    )
    with pytest.raises(ConfigError, match="`layer2` ↔ `layer3` and `layer3` ↔ `layer2` cross"):
        crossed.check(*models())


def test_a_diff_lists_what_changed() -> None:
    before = plan()
    after = edited(edited(before, 0, kept=(0, 2, 3, 5)), 2, student="layer3.0.relu@2")
    assert before.diff(before) == ()
    assert before.diff(after) == (
        "~ layer1 ↔ layer1: kept channels all → 4",
        "- layer3 ↔ layer3",
        f"+ layer3 ↔ layer3.0.relu@2 (score {before.pairs[2].score:.2f})",
    )
    assert edited(before, 0, kept=(1, 2)).diff(edited(before, 0, kept=(1, 3))) == (
        "~ layer1 ↔ layer1: other 2 channels kept",
    )
    assert before.diff(plan(blocks=3))[0].startswith("~ teacher: Residual")


def test_two_models_in_the_wrong_order_are_recognised() -> None:
    teacher, student = models()
    with pytest.raises(ConfigError, match="in the other order: swap teacher and student"):
        plan().check(student, teacher)
