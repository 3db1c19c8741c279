"""Public functions refuse arguments of the wrong type with one paragraph, before anything else is done."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import BaseModel

import indistill_fx as ifx
from indistill_fx.demo import DigitsStudent, DigitsTeacher
from indistill_fx.errors import ConfigError, PruneError
from indistill_fx.system.arguments import fits, require
from indistill_fx.system.values import Value

X = torch.randn(2, 1, 8, 8)
BATCHES = [(X, torch.tensor([1, 2]))]


@pytest.fixture(scope="module")
def pair() -> tuple[ifx.TracedModel, ifx.TracedModel]:
    return ifx.trace(DigitsTeacher(widths=(8, 8, 8)), X), ifx.trace(DigitsStudent(), X, role="student")


@pytest.mark.parametrize(
    "fixed",
    [{"layer1": "blocks.0"}, "layer1=blocks.0", ("layer1", "blocks.0"), [("layer1", "blocks.0", 1)], [(1, 2)], 5],
)
def test_pairs_have_one_form(pair, fixed):
    """Each was a bare ValueError or TypeError from deep inside."""
    with pytest.raises(
        ConfigError, match=r'`fixed` is not a list of pairs of layers: .*fixed=\[\("layer1", "blocks.0"\), …\]'
    ):
        ifx.align(*pair, fixed=fixed)


@pytest.mark.parametrize("fixed", [[("layer1", "blocks.0")], [["layer1", "blocks.0"]], iter([("layer1", "blocks.0")])])
def test_pairs_of_that_form_are_kept(pair, fixed):
    plan = ifx.align(*pair, fixed=fixed)
    assert [pair.reason.partition(",")[0] for pair in plan.pairs if pair.student == "blocks.0"] == ["fixed"]


TEACHER, STUDENT = DigitsTeacher(widths=(8, 8, 8)), DigitsStudent()
WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("align", (TEACHER, "x.pt"), {}, "`student` is the str 'x.pt', but must be a module (torch.nn.Module) or a traced model"),
    ("align", (TEACHER, "x.pt"), {}, "Load it first: ifx.load('x.pt')."),
    ("align", (DigitsTeacher, STUDENT), {}, "is the class DigitsTeacher, but must be"),
    ("align", (TEACHER, STUDENT), {"pear": 3}, "'pear' is not a keyword of align. Nearest: pairs."),
    ("align", (TEACHER, STUDENT), {"pairs": "3"}, "align: `pairs` is the str '3', but must be a whole number."),
    ("align", (TEACHER, STUDENT), {"criterion": 3}, "align: `criterion` is an int, but must be a text."),
    ("trace", (TEACHER.state_dict(), X), {}, "Weights alone are no model: make the module"),
    ("trace", (TEACHER, X), {"role": "pupil"}, "'pupil' is not a role of a model. Choose from: teacher or student."),
    ("trace", (TEACHER, X), {"leaves": "layer1"}, "Write ['layer1']."),
    ("trace", (TEACHER, 8), {}, "trace: `example_inputs` is an int, but must be a tensor, a list or a dictionary."),
    ("trace", (torch.export.export(TEACHER, (X,)), X), {}, "Give its module: program.module()."),
    ("trace", (lambda x: x, X), {}, "Call it in the forward of an nn.Module."),
    ("narrow", (TEACHER,), {}, "but must be a traced model (ifx.trace). Trace it first: ifx.trace(module, example_inputs)."),
    ("distill", (TEACHER, STUDENT, BATCHES), {"plan": Path("plan.json")}, "Read it first: ifx.AlignmentPlan.load('plan.json')."),
    ("distill", (TEACHER, STUDENT, "digits"), {}, "Open the data first: data = ifx.open_data('digits')"),
    ("distill", (TEACHER, STUDENT, BATCHES), {"curriculum": {"a": 1}}, "Make one first: ifx.Curriculum(…)."),
    ("compile_stages", (TEACHER, STUDENT), {"main_options": [1]}, "must be a dictionary. Write {name: value}."),
    ("ensemble", ([TEACHER, "b.pt"],), {"example_inputs": X}, "`teachers[1]` is the str 'b.pt', but must be a module"),
    ("evaluate", (TEACHER, BATCHES), {"task": ifx.Task}, "Give its name, or an object of a class derived from ifx.Task."),
    ("load", (3,), {}, "load: `spec` is an int, but must be a text or a path."),
    ("open_data", (Path("x"),), {}, "open_data: `spec` is a PosixPath, but must be a text."),
    ("Curriculum", (), {"learning_rate": "0.1"}, "`learning_rate` is the str '0.1', but must be a number or a list (of a number)."),
    ("Curriculum", (), {"lengths": [1, "2"]}, "`lengths[1]` is the str '2', but must be a whole number."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "said"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_be_is_said_in_one_paragraph(name, args, kwargs, said):
    with pytest.raises(ConfigError) as found:
        getattr(ifx, name)(*args, **kwargs)
    assert said in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kept", [4, [0.5], "01", None])
def test_channels_to_keep_are_whole_numbers(pair, kept):
    """A fraction was cut off: 0.5 kept channel 0."""
    with pytest.raises(PruneError, match=r"`layer1`: .* are not channels to keep"):
        ifx.narrow(pair[0], kept={"layer1": kept})


def test_what_python_can_read_passes(pair):
    kept = ifx.narrow(pair[0], kept={"layer1": torch.tensor([0, 2])}).report.taps[0].kept
    assert kept == ifx.narrow(pair[0], kept={"layer1": np.array([0, 2])}).report.taps[0].kept == (0, 2)
    assert ifx.align(*pair, pairs=np.int64(1)).pairs
    assert ifx.shrink(pair[0], ratio=np.float32(0.5)).value.macs < pair[0].macs


@pytest.mark.parametrize(
    ("value", "expected", "right"),
    [
        (None, int | None, True),
        (True, Literal["auto", True, False], True),
        ({"a"}, Sequence[str], True),
        ({"a": 1}, Sequence[str], False),
        ("a", Iterable[Any], False),
        (torch.tensor(2), int, True),
        (2.0, int, False),
        (2, float, True),
        ("2", float, False),
        ([("a", 1)], Mapping[str, int], False),
        (0, torch.device | str, True),
        (object(), Any, True),
    ],
)
def test_types(value, expected, right):
    assert fits(value, expected) == right
    if not right:
        with pytest.raises(ConfigError, match="f: `x` is"):
            require(value, expected, "x", of="f")


def test_public_functions_are_still_functions():
    for name in ifx.__all__:
        value = getattr(ifx, name)
        if inspect.isfunction(value):
            assert pickle.loads(pickle.dumps(value)) is value
            assert (value.__name__, value.__module__) == (name, "indistill_fx") and value.__doc__
    with pytest.raises(
        TypeError, match=r"distill\(\) missing 2 required positional arguments: 'student' and 'train_loader'"
    ):
        ifx.distill(TEACHER)


SHAPES = {"teacher_shape": (2, 3), "student_shape": (2, 3)}
VALUES: list[tuple[Any, dict[str, Any], str]] = [
    (ifx.View, {"size": 8}, "View: `size` is 8, but must be a valid tuple. See help(ifx.View)."),
    (
        ifx.View,
        {"size": (9000, 9000)},
        "View: size is 9000x9000 pixels, and at most 16,777,216 are made. See help(ifx.View).",
    ),
    (ifx.View, {"sise": (8, 8)}, "View has no field `sise`. Nearest: size, classes."),
    (ifx.Pair, {}, "Pair needs `teacher`, `student`, `teacher_shape`, `student_shape`. See help(ifx.Pair)."),
    (
        ifx.Pair,
        {"teacher": 3, "student": "b", **SHAPES},
        "Pair: `teacher` is 3, but must be a valid string. See help(ifx.Pair).",
    ),
    (
        ifx.Pair,
        {"teacher": "a", "student": "b", **SHAPES, "kept": (2, 1)},
        "Pair: kept channels of `a` must be ascending and without repeats. See help(ifx.Pair).",
    ),
    (ifx.AlignmentPlan, {}, "AlignmentPlan needs `teacher`, `student`, `pairs`. See help(ifx.AlignmentPlan)."),
    (
        ifx.AlignmentPlan,
        {
            "teacher": {"name": "T", "fingerprint": "0"},
            "student": {"name": "S", "fingerprint": "0"},
            "pairs": [{"teacher": "a", "student": "b", "student_shape": (2, 3), "score": 2}],
        },
        "AlignmentPlan needs `pairs.0.teacher_shape`. See help(ifx.AlignmentPlan).",
    ),
]


@pytest.mark.parametrize(("kind", "fields", "said"), VALUES)
def test_values_say_in_one_sentence_what_is_wrong_with_them(kind: Any, fields: dict[str, Any], said: str) -> None:
    """They raised pydantic's own error, of many lines."""
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    assert str(caught.value) == said


def test_every_public_value_of_pydantics_speaks_so() -> None:
    public = [getattr(ifx, name) for name in ifx.__all__]
    assert {kind for kind in public if isinstance(kind, type) and issubclass(kind, BaseModel)} == {
        ifx.AlignmentPlan, ifx.Pair, ifx.View,
    }  # fmt: skip
    assert all(issubclass(kind, Value) for kind in (ifx.AlignmentPlan, ifx.Pair, ifx.View))


@pytest.mark.parametrize("path", [3, None, TEACHER])
def test_a_plan_is_read_from_a_path(path: Any) -> None:
    for asked in (ifx.AlignmentPlan.load, ifx.AlignmentPlan.model_construct(pairs=()).save):
        with pytest.raises(ConfigError, match=r"`path` is .*, but must be a text or a path\."):
            asked(path)
