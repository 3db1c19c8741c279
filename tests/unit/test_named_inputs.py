"""Each model gets the inputs that its signature asks for, by name, wherever a model is run: tracing, stages, similarity, export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.tokenization_utils_base import BatchEncoding

import indistill_fx as ifx
from indistill_fx.batch import call_of
from indistill_fx.cli import run
from indistill_fx.loading.inputs import describe_inputs, example_inputs, parse_input, within_tables
from indistill_fx.passes.capture.captured import Request
from indistill_fx.passes.capture.exported import capture_exported
from indistill_fx.passes.pairing.cka import cka
from indistill_fx.system.model_inputs import Inputs


class Encoder(nn.Module):
    def __init__(self, width: int, types: bool):
        super().__init__()
        self.words, self.head = nn.Embedding(50, width), nn.Linear(width, 3)
        self.types = nn.Embedding(2, width) if types else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True) for _ in range(2)
        )

    def encode(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])  # type: ignore[no-any-return]


class Teacher(Encoder):
    """Reads token types, after an argument that no batch has."""

    def __init__(self) -> None:
        super().__init__(16, True)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        assert labels is None and self.types is not None
        x = self.words(input_ids)
        if token_type_ids is not None:
            x = x + 3 * self.types(token_type_ids)
        return self.encode(x if attention_mask is None else x * attention_mask[..., None])


class Student(Encoder):
    """Has no token types."""

    def __init__(self) -> None:
        super().__init__(8, False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encode(self.words(input_ids) * attention_mask[..., None])


def batch(count: int = 6, length: int = 7, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "labels": torch.randint(3, (count,), generator=draw),
        "file": [f"{number}.txt" for number in range(count)],
        "token_type_ids": torch.randint(2, (count, length), generator=draw),
        "attention_mask": torch.ones(count, length),
        "input_ids": torch.randint(50, (count, length), generator=draw),
    }


def kd_by_hand(teacher: nn.Module, student: nn.Module, given: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        wanted = teacher(**{n: given[n] for n in ("input_ids", "attention_mask", "token_type_ids")}).log_softmax(1)
        got = student(given["input_ids"], given["attention_mask"]).log_softmax(1)
        return F.kl_div(got, wanted, reduction="batchmean", log_target=True)


ONLY_SOFT = {"temperature": 1.0, "weight": 1.0, "weight_labels": 0.0}


def test_a_teacher_that_reads_more_than_the_student_gets_it():
    torch.manual_seed(0)
    teacher, student = Teacher().eval(), Student().eval()
    stage = ifx.compile_stages(
        teacher,
        student,
        curriculum=ifx.Curriculum(lengths=[]),
        main_options=ONLY_SOFT,
        example_inputs=batch(),
    )[-1].eval()
    for seed in (1, 2):
        given = batch(seed=seed)
        torch.testing.assert_close(stage(given), kd_by_hand(teacher, student, given))
        other = given | {"token_type_ids": 1 - given["token_type_ids"]}
        assert abs(stage(other).item() - stage(given).item()) > 1e-4


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_distill_and_validate_by_name(kind):
    torch.manual_seed(0)
    loader = [kind(batch(seed=seed)) for seed in (0, 1)]
    record = ifx.distill(Teacher(), Student(), loader, val_loader=loader, epochs=1, progress=False, device="cpu")
    assert record.accuracy is not None and record.teacher_accuracy is not None
    assert record.stages[-1].steps == 2


def test_an_argument_that_the_batch_has_not_is_no_place_for_the_next_one():
    teacher = Teacher().eval()
    traced = ifx.trace(teacher, batch())
    assert traced.inputs.names == ("input_ids", "attention_mask", "token_type_ids")
    given = batch(seed=3)
    expected = teacher(**{name: given[name] for name in traced.inputs.names})
    torch.testing.assert_close(traced.graph_module(*traced.inputs_in(given, where="Test")[0]), expected)


def test_a_model_traced_by_name_is_measured_on_the_batches_not_on_its_example():
    """The example's values stood in for the batch's before."""
    torch.manual_seed(0)
    models = ifx.trace(Teacher().eval(), batch()), ifx.trace(Student(), batch(), role="student")
    taps = ["layers.0"], ["layers.1"]
    one, other = (cka([batch(12, seed=seed)])(*models, *taps) for seed in (1, 2))
    assert one != other


def test_an_input_that_is_missing_is_named_with_who_takes_it():
    given = {name: value for name, value in batch().items() if name != "attention_mask"}
    with pytest.raises(ifx.ConfigError) as caught:
        ifx.distill(Teacher(), Student(), [given], epochs=1, progress=False, device="cpu")
    assert "It has no `attention_mask`." in str(caught.value)
    assert "Student takes `input_ids`, `attention_mask`" in str(caught.value)


def bert(layers: int) -> BertForSequenceClassification:
    torch.manual_seed(layers)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def whole(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.long() if isinstance(value, Tensor) else value for name, value in given.items()}


def test_lengths_may_differ_from_batch_to_batch():
    """Some methods fix them to the example's."""
    teacher, student = bert(3), bert(2)
    traced = (
        ifx.trace(teacher, whole(batch()), logits="logits"),
        ifx.trace(student, whole(batch()), role="student", logits="logits"),
    )
    assert traced[0].report.fixed == {}
    stage = ifx.compile_stages(*traced, curriculum=ifx.Curriculum(lengths=[]), main_options=ONLY_SOFT)[-1].eval()
    for length in (7, 3, 12):
        given = whole(batch(length=length, seed=length))
        inputs = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            wanted, got = (model(**inputs).logits.log_softmax(1) for model in (teacher, student))
        expected = F.kl_div(got, wanted, reduction="batchmean", log_target=True)
        torch.testing.assert_close(stage(given), expected, rtol=1e-4, atol=1e-7)


def picture_net(width: int) -> nn.Module:
    layers = nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def test_a_size_that_the_capture_fixed_is_refused_by_name():
    x = torch.randn(4, 3, 16, 16)
    captured = capture_exported(Request(picture_net(8).eval(), (x,)))
    assert captured.fixed == {"input": (None, 3, 16, 16)}
    assert any("`input` to anyx3x16x16" in note for note in captured.notes)
    student = ifx.trace(picture_net(4), x, role="student")
    student = replace(student, report=replace(student.report, fixed=captured.fixed))
    stage = ifx.compile_stages(picture_net(8), student, curriculum=ifx.Curriculum(lengths=[]), example_inputs=x)[-1]
    stage((x, torch.arange(4)))
    expected = (
        "`input` of the batch is 2x3x20x20 in size, not anyx3x16x16, for which alone the student could be captured"
    )
    with pytest.raises(ifx.ConfigError, match=expected):
        stage((torch.randn(2, 3, 20, 20), torch.arange(2)))


def test_onnx_by_name_with_a_gap(tmp_path):
    torch.manual_seed(0)
    teacher = Teacher().eval()
    report = ifx.export_onnx(teacher, tmp_path / "t.onnx", batch(), batch_sizes=(1, 3), real_inputs=batch(seed=5))
    assert report.input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert ifx.check_onnx(tmp_path / "t.onnx", teacher, batch(), batch_sizes=(2,)).agrees


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3x32x32", ("", "float32", 0, 1, (3, 32, 32))),
        ("x:3X8", ("x", "float32", 0, 1, (3, 8))),
        ("input_ids:int64[0..30521]x128", ("input_ids", "int64", 0, 30521, (128,))),
        ("mask:boolx16", ("mask", "bool", 0, 1, (16,))),
        ("age:float16", ("age", "float16", 0, 1, ())),
        ("t:int32[-3..3]", ("t", "int32", -3, 3, ())),
        ("MyIds:int64x4", ("MyIds", "int64", 0, 1, (4,))),
    ],
)
def test_inputs_are_described_by_name_dtype_range_and_shape(text, expected):
    form = parse_input(text)
    assert (form.name, form.dtype, form.low, form.high, form.shape) == expected
    value = example_inputs([text])
    value = value[form.name] if isinstance(value, dict) else value
    assert isinstance(value, Tensor)
    assert value.shape == (1, *form.shape) and str(value.dtype) == f"torch.{form.dtype}"
    if not value.is_floating_point():
        assert form.low <= int(value.min()) and int(value.max()) <= form.high


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "a:",
        "int7x3",
        "a:int64[5..2]x3",
        "a:float32[0..2]x3",
        "a:boolx",
        "m:bool[0..2]x3",
        "3x0",
        "a b:3",
        "3x",
    ],
)
def test_another_description_is_refused(text):
    with pytest.raises(ifx.ConfigError, match="is not an input shape"):
        parse_input(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]),
            st.lists(st.integers(1, 4), max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_described_inputs_are_made_again(kinds, by_name):
    values = [torch.ones(2, *shape).to(dtype) for dtype, shape in kinds]
    example = {f"x_{k}": value for k, value in enumerate(values)} if by_name else tuple(values)
    texts = describe_inputs(example)
    made = example_inputs(texts)
    again = list(made.values()) if isinstance(made, dict) else [made] if isinstance(made, Tensor) else list(made)
    assert isinstance(made, dict) == by_name and (not by_name or list(made) == list(example))
    assert [(value.dtype, value.shape[1:]) for value in again] == [(value.dtype, value.shape[1:]) for value in values]
    assert all(torch.equal(a, b[:1]) for a, b in zip(again, values, strict=True) if not b.is_floating_point())


@pytest.mark.parametrize(
    "example",
    [{"a b": torch.ones(1, 2, dtype=torch.long)}, torch.full((1, 2), 10**12), (torch.ones(1), 3), torch.ones(())],
)
def test_what_no_option_can_say_is_not_described(example):
    assert describe_inputs(example) == []


@pytest.mark.parametrize("texts", [["a:3", "3"], ["a:3", "a:4"]])
def test_inputs_are_named_once_or_not_at_all(texts):
    with pytest.raises(ifx.ConfigError, match="--input gives"):
        example_inputs(texts)


def test_call_takes_what_the_model_takes():
    call = call_of(batch(), Inputs.of(Student()), where="Test")
    assert list(call.kwargs) == ["input_ids", "attention_mask"] and call.args == ()


JOB = """
import torch
from tests.unit.test_named_inputs import Student, Teacher, batch

def teacher():
    return Teacher()

def student():
    return Student()

def make_loaders():
    batches = [batch(seed=seed) for seed in range(3)]
    return batches, batches
"""
DATA = ("--data", "job.py:make_loaders")
NAMED = ("--input", "input_ids:int64[0..49]x7", "--input", "attention_mask:float32x7")


@pytest.mark.parametrize(
    "words",
    [
        ("align", "job.py:teacher", "job.py:student", *DATA, "-o", "plan.json"),
        ("align", "job.py:teacher", "job.py:student", *NAMED),
        ("align", "job.py:teacher", "job.py:student", *DATA, "--similarity", "cka", "--batches", "2"),
        ("inspect", "job.py:student", *NAMED),
        ("prune", "job.py:teacher", "--ratio", "0.5", *DATA, "--criterion", "taylor", "-o", "small.pt2"),
        ("export", "job.py:teacher", "-o", "teacher.onnx", *DATA),
        ("export", "job.py:student", "-o", "student.onnx", *NAMED),
        ("evaluate", "job.py:teacher", *DATA, "--device", "cpu"),
        ("train", "job.py:student", *DATA, "--epochs", "1", "-o", "t", "--device", "cpu"),
        ("distill", "job.py:teacher", "job.py:student", *DATA, "--epochs", "1", "-o", "d", "--device", "cpu"),
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_every_command_takes_batches_by_name(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    assert run(list(words)) == 0, capsys.readouterr().err


class Tables(nn.Module):
    """Two categories, each with a table of its own, and numbers."""

    def __init__(self):
        super().__init__()
        self.large, self.small, self.head = nn.Embedding(50, 4), nn.Embedding(3, 4), nn.Linear(6, 1)

    def forward(self, places, numbers):
        return self.head(torch.cat([self.large(places[:, 0]) * self.small(places[:, 1]), numbers], 1))


def test_stated_numbers_that_a_table_does_not_have_become_zeros():
    """student.json says one range for all categories: `export RUN` without data ended with an IndexError."""
    fine, beyond = torch.tensor([[40, 2]]), torch.tensor([[2, 40]])
    numbers, model = torch.randn(1, 2), Tables()
    assert within_tables((fine, numbers), model)[0] is fine
    places, kept = within_tables((beyond, numbers), model)
    assert places.tolist() == [[0, 0]] and kept is numbers
    by_name = {"places": beyond, "numbers": numbers}
    assert within_tables(by_name, model)["places"].tolist() == [[0, 0]]
    wrong = (beyond, torch.randn(1, 7))  # fails in another way, which is told where it is used
    assert within_tables((fine, wrong[1]), model)[0] is fine
    assert within_tables(numbers, model) is numbers
