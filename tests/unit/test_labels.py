"""Labels that are easily taken for those of another task, of another form, or for another input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.errors import ConfigError
from indistill_fx.losses.task import Language
from tests.unit.test_task_wired import QUIET, drawn, net, of_task, pictures


@pytest.mark.parametrize("other", [0.25, 3.0])
def test_measured_values_whose_first_are_all_0_or_1_are_told_apart_later(other):
    """A later 0.25 counted as a probability."""
    first, later = torch.tensor([[0.0], [1], [1]]), torch.tensor([[0.0], [other], [1]])
    batches = [(pictures(3, n), labels) for n, labels in enumerate((first, later))]
    words = f"were all 0 or 1, so they were taken for multilabel, but here is {other:g}.*--task regression"
    with pytest.raises(ConfigError, match=words):
        ifx.evaluate(net(1), batches)
    with pytest.raises(ConfigError, match="Labels of batch 2: .*" + words):
        ifx.distill(net(1), net(1, 5), batches, epochs=1, **QUIET)
    assert ifx.evaluate(net(1), batches, task="regression").task == "regression"
    if other < 1:
        assert ifx.evaluate(net(1), batches, task="multilabel").task == "multilabel"


class Tagger(nn.Module):
    """Token by token; a mask may leave some out."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, width), nn.Linear(width, 9)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        x = x if mask is None else x * mask.unsqueeze(-1)
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("named", [None, "language"])
def test_masked_tokens_of_which_the_first_are_kept_are_not_taken_for_shifted_ones(named):
    """One in ten of the tokens to predict stays as it is; where the first batch had no other, all were compared one place further."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 9, (2, 6))
    kept, masked = torch.full((2, 6), -100), torch.full((2, 6), -100)
    kept[0, 2], masked[1, 3] = tokens[0, 2], tokens[1, 3]
    hidden = tokens.clone()
    hidden[1, 3] = 0
    batches = [(tokens, kept), (hidden, masked)]
    words = r"tokens of the input, so they were taken to be shifted by one, but here is another one.*Language\(shift=False\)"
    with pytest.raises(ConfigError, match=words):
        ifx.evaluate(Tagger(8), batches, task=named)
    with pytest.raises(ConfigError, match="Labels of batch 2: .*" + words):
        ifx.distill(Tagger(8), Tagger(4), batches, epochs=1, task=named, **QUIET)
    model = Tagger(8)
    as_said = [ifx.evaluate(model, batches, task=Language(shift=shift)).loss for shift in (False, True)]
    assert ifx.evaluate(model, batches[::-1], task=named).loss == pytest.approx(as_said[0], rel=1e-6)
    assert as_said[1] != pytest.approx(as_said[0], rel=1e-3)


def stage_of(teacher: nn.Module, student: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    plan = ifx.align(teacher, student, example_inputs=x, required=False)
    return ifx.compile_stages(teacher, student, plan, example_inputs=x, curriculum=Curriculum(lengths=[]), **options)[
        -1
    ]


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        (
            "regression",
            torch.linspace(-1, 2, 12)[:, None],
            ".*must be probabilities.*for measured values --task regression",
        ),
        ("regression", torch.linspace(-1, 2, 12), r"Labels of shape \(12,\).*name another task: task="),
        ("multilabel", torch.ones(12, 3), ".*must be probabilities.*--task multilabel"),
        ("segmentation", torch.full((12, 4, 4), 255), "Label 255 is out of range: the model has 3 classes"),
    ],
)
def test_a_stage_of_no_task_reads_classes_and_refuses_other_labels(name, labels, message):
    """Measured values were taken for probabilities of one class, and a void label was an IndexError."""
    teacher, student, (x, _) = of_task(name)
    stage = stage_of(teacher, student, x)
    with pytest.raises(ConfigError, match="Stage `main`, task classification: " + message):
        stage((x, labels))
    assert stage_of(teacher, student, x, task=name)((x, labels)).isfinite()


def test_a_stage_looks_at_the_labels_of_every_batch():
    teacher, student, (x, y) = of_task("segmentation")
    stage = stage_of(teacher, student, x, task="segmentation")
    stage((x, y))
    with pytest.raises(ConfigError, match="Stage `main`, task segmentation: Label 3 is out of range"):
        stage((x, torch.full_like(y, 3)))


def test_a_stage_traced_without_a_mask_does_not_take_it_for_the_labels():
    """Of (tokens, mask, labels), it learnt the mask."""
    tokens, mask = torch.randint(9, (4, 6), generator=drawn(0)), torch.ones(4, 6, dtype=torch.long)
    stage = stage_of(Tagger(8), Tagger(4), tokens, task="language")
    with pytest.raises(ConfigError, match="`mask`, let the loader yield a dict"):
        stage((tokens, mask, tokens))
    by_name = {"tokens": tokens, "mask": mask, "labels": tokens}
    assert stage(by_name) == stage((tokens, tokens)) == stage((tokens, tokens, torch.arange(4)))
    traced = ifx.trace(Tagger(8), tokens), ifx.trace(Tagger(4), tokens, role="student")
    with pytest.raises(ConfigError, match="`mask`, let the loader yield a dict"):
        ifx.evaluate(traced[0].graph_module, [(tokens, mask, tokens)])
    with pytest.raises(ConfigError, match="`mask`, let the loader yield a dict"):
        ifx.distill(*traced, [(tokens, mask, tokens)], epochs=1, **QUIET)


@pytest.mark.parametrize("task", [None, "segmentation"])
@pytest.mark.parametrize(
    "labels",
    [torch.zeros(12, 8, 8, dtype=torch.long), torch.zeros(12, 1, 8, 8, dtype=torch.long), torch.ones(12, 3, 8, 8) / 3],
)
def test_labels_of_another_size_than_the_outputs_are_refused_by_both_sizes(task, labels):
    teacher, student, (x, _) = of_task("segmentation")
    words = r"The labels are 8x8 in size, but the model's outputs are 4x4\. .*interpolate.*let the loader give labels of 4x4"
    with pytest.raises(ConfigError, match=words):
        ifx.evaluate(teacher, [(x, labels)], task=task)
    with pytest.raises(ConfigError, match=words):
        ifx.distill(teacher, student, [(x, labels)], epochs=1, task=task, **QUIET)


def test_where_all_probabilities_are_0_nothing_counts():
    """Pixels without a class in one-hot maps were refused, though the losses leave them out."""
    teacher, student, (x, y) = of_task("segmentation")
    y[0, 0] = y[3, 2] = 255
    maps = F.one_hot(y.where(y != 255, 3), 4)[..., :3].movedim(-1, 1).float()
    by_class, by_map = (ifx.evaluate(teacher, [(x, labels)], task="segmentation") for labels in (y, maps))
    assert by_map.metrics == by_class.metrics
    assert by_map.loss == pytest.approx(by_class.loss, rel=1e-6)
    losses = [stage_of(teacher, student, x, task="segmentation")((x, labels)) for labels in (y, maps)]
    torch.testing.assert_close(*losses)
    with pytest.raises(ConfigError, match="none has a label that counts"):
        ifx.evaluate(teacher, [(x, torch.zeros_like(maps))], task="segmentation")
    with pytest.raises(ConfigError, match="No label is usable"):
        ifx.distill(teacher, student, [(x, torch.zeros_like(maps))], epochs=1, task="segmentation", **QUIET)
    maps[0, :, 1, 1] = 0.4
    with pytest.raises(ConfigError, match="do not sum to 1"):
        ifx.evaluate(teacher, [(x, maps)], task="segmentation")


def test_a_sample_whose_probabilities_are_all_0_is_not_measured():
    """It was refused; its largest class would be class 0."""
    x, labels = pictures(6), torch.tensor([0, 1, 2, -100, 1, -100])
    soft = F.one_hot(labels.where(labels >= 0, 3), 4)[:, :3].float()
    found, expected = (ifx.evaluate(net(3), [(x, y)], task="classification") for y in (soft, labels))
    assert (found.accuracy, found.recall, found.chance) == (expected.accuracy, expected.recall, expected.chance)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
