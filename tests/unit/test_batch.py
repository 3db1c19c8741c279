"""Every form of a batch is taken apart alike, each model gets what it takes, and what does not fit is named."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.batch import FEATURES, inputs_and_labels, split, with_features, with_labels
from indistill_fx.demo import DigitsStudent, DigitsTeacher
from indistill_fx.errors import ConfigError
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.losses.task import Classification
from indistill_fx.stages.checks import label_check
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import samples_of
from indistill_fx.training.supervised import Supervised

A, B, Y, NUMBERS = torch.randn(6, 3), torch.randn(6, 4), torch.arange(6) % 2, torch.arange(6)


class Two(nn.Module):
    """Two inputs, one optional one, and labels that it could take itself."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(4, 8)
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, a: Tensor, b: Tensor, scale: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        assert labels is None
        out = self.body(self.one(a) + self.two(b))
        return out if scale is None else out * scale


Named = namedtuple("Named", "b a label")
Ordered = namedtuple("Ordered", "first second third")


@dataclass
class Sample:
    labels: Tensor
    a: Tensor
    b: Tensor
    file: tuple[str, ...] = ("x",) * 6


@dataclass
class Pair:
    b: Tensor
    a: Tensor


Flipped, Ordered2 = namedtuple("Flipped", "b a"), namedtuple("Ordered2", "first second")

FORMS: dict[str, Any] = {
    "tuple": (A, B, Y),
    "list": [A, B, Y],
    "tuple with indices": (A, B, Y, NUMBERS),
    "dict": {"b": B, "labels": Y, "a": A},
    "dict with more": {"a": A, "b": B, "target": Y, "file": ["x"] * 6, "other": A},
    "ordered dict": OrderedDict(a=A, b=B, label=Y),
    "user dict": UserDict({"a": A, "b": B, "labels": Y}),
    "read-only mapping": MappingProxyType({"a": A, "b": B, "targets": Y}),
    "named tuple": Named(B, A, Y),
    "named tuple without telling names": Ordered(A, B, Y),
    "dataclass": Sample(Y, A, B),
    "dict beside the labels": ({"b": B, "a": A}, Y),
    "dict, labels and indices": [{"a": A, "b": B}, Y, NUMBERS],
    "dict with labels beside nothing": ({"a": A, "b": B, "label": Y}, None),
    "dict beside a dict of labels": ({"a": A, "b": B}, {"target": Y, "weight": A}),
    "dict beside a dict of one entry": ({"a": A, "b": B, "file": ["x"] * 6}, {"class": Y, "file_of_label": ["x"] * 6}),
    "tuple and a dict of labels": (A, B, {"labels": Y, "other": A}),
    "input beside the labels": (A, {"labels": Y, "b": B}),
    "tuple beside the labels": ((A, B), Y),
    "list beside the labels": [[A, B], Y, NUMBERS],
    "dataclass beside the labels": (Pair(B, A), Y),
    "named tuple beside the labels": (Flipped(B, A), Y),
    "named tuple without telling names, beside the labels": (Ordered2(A, B), Y),
    "dict in a dict": {"inputs": {"a": A, "b": B}, "labels": Y, "path": ["x"] * 6},
    "tuple in a dict": {"inputs": [A, B], "labels": Y},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_alike(form):
    torch.manual_seed(0)
    module = Two()
    parts = split(FORMS[form], Inputs.of(module), where="Test")
    assert parts.labels is Y
    torch.testing.assert_close(parts.calls[0](module), module(A, B), rtol=0, atol=0)
    expected = nn.functional.cross_entropy(module(A, B), Y)
    torch.testing.assert_close(Supervised(module)(FORMS[form]), expected, rtol=0, atol=0)
    assert evaluate(module, [FORMS[form]]).loss == pytest.approx(expected.item(), rel=1e-6)
    stage = ifx.compile_stages(
        Two(), module, main="labels", curriculum=ifx.Curriculum(lengths=[]), example_inputs=(A, B)
    )
    torch.testing.assert_close(stage[-1](FORMS[form]), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_some_samples_in_the_batches_own_form(form):
    batch = FORMS[form]
    half = samples_of(batch, slice(1, None, 2))
    assert type(half) is type(batch) or isinstance(half, dict)
    parts = split(half, Inputs.of(Two()), where="Test")
    assert torch.equal(parts.labels, Y[1::2])
    assert torch.equal(next(iter(parts.calls[0].by_name(("a",)).values())), A[1::2])


def test_names_of_files_are_halved_with_their_samples():
    batch = {"a": A, "file": list("abcdef"), "scale": torch.tensor(2.0), "note": "of all"}
    half = samples_of(batch, slice(0, None, 2))
    assert half["file"] == ["a", "c", "e"]
    assert half["scale"] is batch["scale"] and half["note"] == "of all"


def test_each_model_gets_what_it_takes():
    class Other(nn.Module):
        def forward(self, b: Tensor) -> Tensor:
            return b

    parts = split({"a": A, "b": B, "labels": Y}, Inputs.of(Two()), Inputs.of(Other()), where="Test")
    assert parts.calls[1](Other()) is B
    assert set(parts.calls[0].kwargs) == {"a", "b"}


def test_labels_are_an_input_of_a_model_that_requires_them():
    class Wants(nn.Module):
        def forward(self, a: Tensor, labels: Tensor) -> Tensor:
            return a + labels[:, None]

    parts = split({"a": A, "labels": Y}, Inputs.of(Wants()), where="Test")
    torch.testing.assert_close(parts.calls[0](Wants()), A + Y[:, None])


def test_what_follows_the_labels_is_never_ignored() -> None:
    """Weights of samples, and the labels of a second task, were: training went on without them."""
    model, weights = Inputs(("a",), ("a",)), torch.rand(6)
    assert split((A, Y, NUMBERS, ["file"] * 6), model, where="Test").indices is NUMBERS
    assert split((A, Y, ["file"] * 6, None), model, where="Test").indices is None
    for batch in ((A, Y, weights), (A, Y, B), (A, Y, NUMBERS, weights), (A, None, weights), ({"a": A}, Y, weights)):
        with pytest.raises(ConfigError) as caught:
            split(batch, model, where="Test")
        shape = tuple(batch[-1].shape)
        assert str(caught.value).startswith(
            f"Test: the entry after the labels of the batch is a tensor {shape} that nothing would use, not sample indices (batch,)."
        )
    assert (
        inputs_and_labels((A, B, weights), where="Test")[1] is B
    )  # without a model it is not known how many are inputs


def test_a_required_input_may_be_none_by_name() -> None:
    """It was left out, and the forward failed for want of it."""
    parts = split({"a": A, "b": None, "labels": Y}, Inputs(("a", "b"), ("a", "b")), where="Test")
    assert set(parts.calls[0].kwargs) == {"a", "b"} and parts.calls[0].kwargs["b"] is None


def test_entries_are_not_a_dict_unless_that_is_said() -> None:
    with pytest.raises(
        ConfigError, match=r"It has no `obs`\. .* If `obs` is a dict, let it yield \(the dict, labels\)"
    ):
        split({"state": A, "image": B, "labels": Y}, Inputs(("obs",), ("obs",)), where="Test")
    with pytest.raises(ConfigError) as caught:
        split({"state": A, "labels": Y}, Inputs(("obs", "b"), ("obs", "b")), where="Test")
    assert "is a dict" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": A, "labels": Y}, "Test got a batch it cannot read: a dict of a, labels. It has no `b`."),
        ({"a": A, "b": ["x"], "labels": Y}, "Test: `b` of the batch is of type list, not a tensor."),
        ((A,), "Test got a batch it cannot read: a tuple of Tensor."),
        ({"a": A, "b": B, "labels": [0, 1]}, "Test: `labels` of the batch is of type list, not a tensor."),
        (7, "Test got a batch it cannot read: a int."),
    ],
)
def test_what_does_not_fit_is_named(batch, message):
    with pytest.raises(ifx.ConfigError) as caught:
        split(batch, Inputs.of(Two()), where="Test")
    assert str(caught.value).startswith(message)


def test_labels_out_of_range_are_found_in_every_form():
    for batch in ((A, B, Y + 1), {"a": A, "b": B, "label": Y + 1}):
        with pytest.raises(
            ifx.ConfigError, match="Labels of batch 1: Label 2 is out of range: the model has 2 classes"
        ):
            label_check(Classification(), lambda batch: torch.zeros(1, 2), Inputs.of(Two()))(0, batch)


def test_cached_features_travel_in_the_batch():
    model = Inputs(("a",), ("a",))
    for batch in ((A, Y, NUMBERS), {"a": A, "labels": Y, "indices": NUMBERS}):
        found = with_features(batch, model, lambda rows: {"tap": B[rows]})
        assert set(found) == {"a", "labels", "indices", FEATURES}
        assert torch.equal(found[FEATURES]["tap"], B)
    with pytest.raises(ifx.ConfigError, match="no sample indices"):
        with_features((A, Y), model, lambda rows: {})


def test_without_a_model():
    assert inputs_and_labels((A, Y), where="Test") == ({"0": A}, Y)
    inputs, labels = inputs_and_labels({"a": A, "file": ["x"], "target": Y, "b": B}, where="Test")
    assert list(inputs) == ["a", "b"] and labels is Y


def test_a_model_of_one_input_gets_the_only_one_whatever_its_name():
    """As `pixel_values` of Hugging Face's data sets for a model of torchvision; not where another input is meant, or there are two."""
    one = Inputs(("x", "mask"), ("x",))
    named_tuple = namedtuple("Sample", "image target path")(A, Y, ["a", "b"])
    numbered = {"image": A, "labels": Y, "id": NUMBERS, "weight": torch.rand(6)}
    for batch in ({"pixel_values": A, "labels": Y}, named_tuple, numbered):
        parts = split(batch, one, where="Test")
        assert parts.calls[0].kwargs == {"x": A} and parts.labels is not None
    for batch in ({"mask": A, "labels": Y}, {"pixel_values": A, "depth": A, "labels": Y}, {"path": ["a"], "labels": Y}):
        with pytest.raises(ConfigError, match="It has no `x`"):
            split(batch, one, where="Test")


def test_other_labels_in_a_named_tuple_whose_names_say_nothing():
    """It was a TypeError of the tuple's constructor."""
    pair = namedtuple("pair", ["first", "second", "third"])
    batch = pair(torch.zeros(2, 3), torch.tensor([1, 0]), torch.tensor([4, 7]))
    found = with_labels(batch, torch.ones(2, 5), Inputs(("x",), ("x",)))
    assert isinstance(found, pair) and found.first is batch.first and found.third is batch.third
    assert torch.equal(found.second, torch.ones(2, 5))


def test_an_optional_input_in_a_tuple_is_not_taken_for_the_labels():
    """Of (tokens, mask, labels), the mask was: a language model's perplexity was that of ones and zeros."""
    tokens, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    model = Inputs(("input_ids", "attention_mask"), ("input_ids",))
    with pytest.raises(ConfigError, match="input `attention_mask`, let the loader yield a dict"):
        split((tokens, mask, tokens), model, where="Test")
    parts = split((tokens, mask, torch.tensor([0, 1])), model, where="Test")
    assert parts.labels is not None and torch.equal(parts.labels, mask) and parts.indices is not None
    for batch in ((tokens, mask), (tokens, mask, ["a", "b"])):
        assert split(batch, model, where="Test").labels is not None


def test_indices_are_read_in_every_form_that_has_them():
    for form in ("tuple with indices", "dict, labels and indices", "list beside the labels"):
        assert split(FORMS[form], Inputs.of(Two()), where="Test").indices is NUMBERS
    saved = Inputs(("indices",), ("indices",))
    one = Inputs(("image",), ("image",))
    for batch in (
        ({"image": A}, Y, NUMBERS),
        ({"image": A}, {"labels": Y, "indices": NUMBERS}),
        (A, {"labels": Y, "indices": NUMBERS}),
    ):
        parts = split(batch, saved, one, where="Test")
        assert parts.calls[0].args == (NUMBERS,) or parts.calls[0].kwargs == {"indices": NUMBERS}
        assert parts.indices is NUMBERS and parts.labels is Y


@pytest.mark.parametrize("form", FORMS)
def test_other_labels_in_every_form(form):
    new = torch.rand(6, 2)
    found = split(with_labels(FORMS[form], new, Inputs.of(Two())), Inputs.of(Two()), where="Test")
    assert found.labels is new and found.calls[0].by_name(("a", "b")) == {"a": A, "b": B}


def test_an_optional_input_of_inputs_set_apart_is_an_input():
    model = Inputs(("tokens", "mask"), ("tokens",))
    parts = split(((A, B), Y), model, Inputs(("x",), ("x",)), where="Test")
    assert parts.calls[0].args == (A, B) and parts.calls[1].args == (A,) and parts.labels is Y
    parts = split((A, {"labels": Y, "mask": B}), model, where="Test")
    assert parts.calls[0].kwargs == {"tokens": A, "mask": B}


def test_a_model_of_one_input_gets_the_only_one_of_inputs_set_apart():
    one = Inputs(("x",), ("x",))
    for batch in (({"image": A}, Y), ({"image": A}, {"label": Y, "weight": B}), {"data": {"image": A}, "labels": Y}):
        assert split(batch, one, where="Test").calls[0].kwargs == {"x": A}


ONE_A, ONE_B = torch.randn(2, 3, 3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([{"x": ONE_A, "y": Y[:1]}, {"x": ONE_B, "y": Y[:1]}], "Test got a batch it cannot read: a list of dict (x, y), dict (x, y). "),
        ([{"x": ONE_A}, {"x": ONE_B}], "Test got a batch it cannot read: a list of dict (x), dict (x). There is `x` among the inputs and"),
        (({"x": A, "labels": Y}, Y), "Test got a batch it cannot read: a tuple of dict (x, labels), Tensor. There is `labels` among"),
        ([(ONE_A, Y[:1]), (ONE_B, Y[:1])], "Test: `labels` of the batch is of type tuple, not a tensor."),
        ([{"x": ONE_A, "labels": Y[0]}], "Test: `x` of the batch is of type dict, not a tensor."),
        (((A, B, A), Y), "Test got a batch it cannot read: a tuple of tuple, Tensor. It has 3 inputs in order, and the model takes `x`"),
        (([A[0], A[1]], Y[:2]), "Test: `labels` of the batch is of 2 samples, not of as many as the inputs (3)."),
        ((A, {"box": A, "kind": Y}), "Test got a batch it cannot read: a tuple of Tensor, dict (box, kind). Which of `box`, `kind` are"),
        ([{"x": ONE_A, "label": 3}, {"x": ONE_B, "label": 4}], "Test got a batch it cannot read: a list of dict (x, label), dict (x, l"),
        ((ONE_A, Y[0]), "Test: `labels` of the batch is a single number, not a tensor (batch, …)."),
        ((A, {"labels": [0, 1]}), "Test: `labels` of the batch is of type list, not a tensor."),
    ],
)  # fmt: skip
def test_samples_that_are_no_batch_are_refused(batch, message):
    """A list of samples must not be read as inputs, then labels."""
    with pytest.raises(ConfigError) as caught:
        split(batch, Inputs(("x", "mask"), ("x",)), where="Test")
    assert str(caught.value).startswith(message)


def test_a_graph_without_an_optional_input_does_not_take_it_for_another():
    graph = Inputs(("x",), ("x",), left_out=("mask",))
    with pytest.raises(ConfigError, match="by name"):
        split(((A, B), Y), graph, Inputs(("x", "mask"), ("x",)), where="Test")


def test_samples_of_inputs_that_are_as_many_as_the_samples():
    """Two inputs of two samples each were cut like a list of two samples."""
    batch = ((A[:2], B[:2]), {"labels": Y[:2], "file": ["a", "b"], "boxes": [A[:3], A[:4]]})
    inputs, beside = samples_of(batch, slice(1))
    assert torch.equal(inputs[0], A[:1]) and torch.equal(inputs[1], B[:1])
    assert torch.equal(beside["labels"], Y[:1]) and beside["file"] == ["a"] and len(beside["boxes"]) == 1


def test_a_run_and_its_figures_do_not_depend_on_the_batches_form():
    """Batches whose inputs are a part of their own were refused by the stages, `distill`, `train` and `evaluate`."""
    torch.manual_seed(0)
    batches = list(zip(torch.randn(2, 8, 1, 8, 8), torch.arange(16).view(2, 8) % 10, strict=True))
    (x, y), (more, others) = batches
    found = []
    for loader in (batches, [({"image": x}, y), ([more], {"target": others, "weight": others.float()})]):
        torch.manual_seed(1)
        teacher, student = DigitsTeacher(), DigitsStudent()
        shared = {"epochs": 1, "device": "cpu", "progress": False, "val_loader": loader}
        first = ifx.train(teacher, loader, mixup=0.2, label_smoothing=0.1, **shared)
        record = ifx.distill(teacher, student, loader, curriculum=ifx.Curriculum(lengths=1), **shared)
        found.append((first.digest, first.metrics, record.digest, record.metrics, evaluate(student, loader)))
    assert found[1] == found[0]


def test_a_named_tuple_as_example_is_one_input():
    """It was spread into the arguments in its own order, so that the first was given the second's values."""

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.layer(x) if scale is None else self.layer(x) * scale

    with pytest.raises(ConfigError, match=r"input `0` is a Ordered2 that holds tensors \(first, second\)"):
        ifx.trace(Adds(), Ordered2(A, A))
    with pytest.raises(ConfigError, match="must be Tensor, not Ordered2"):
        ifx.export_onnx(Adds(), "unwritten.onnx", Ordered2(A, A))
    assert ifx.trace(Adds(), namedtuple("Telling", "scale x")(A[:1], A)).inputs.names == ("x", "scale")


@pytest.mark.parametrize("numbers, wrong", [([3, 1, 3, 0, 2, 4], "equal"), ([0, -1, 2, 3, 4, 5], "negative")])
@pytest.mark.parametrize("inputs", [A, {"a": A}])
def test_numbers_after_the_labels_that_are_no_indices_are_refused(inputs, numbers, wrong):
    model, found = Inputs(("a",), ("a",)), torch.tensor(numbers)
    with pytest.raises(ConfigError) as raised:
        split((inputs, Y, found), model, where="Batch 1")
    assert str(raised.value).startswith(
        f"Batch 1: the entry after the labels of the batch is whole numbers, some of them {wrong}, not sample indices, all different."
    )
    named = split({"a": A, "labels": Y, "indices": found}, model, where="Batch 1")  # drawn with replacement
    assert named.indices is found
