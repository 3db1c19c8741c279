"""Tasks: their losses, divergences and metrics against numpy and scikit-learn; what is inferred, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, jaccard_score

from indistill_fx.errors import ConfigError
from indistill_fx.losses import Outputs
from indistill_fx.losses.choose_task import TASKS, infer_task, task_of
from indistill_fx.losses.positions import IGNORED
from indistill_fx.losses.registry import main_loss
from indistill_fx.losses.task import Classification, Embedding, Language, MultiLabel, Regression, Segmentation


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(seed, high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def measured(task, logits, labels, outputs):
    """The task's metrics, over two batches of unlike sizes."""
    found = {}
    for name, metric in task.metrics(outputs).items():
        for part in (slice(0, 3), slice(3, None)):
            task.measure(metric, *task.prepare(logits[part], labels[part]))
        found[name] = metric.compute().item()
    return found


def test_classification():
    logits, labels = draw(0, 10, 4).float(), whole(1, 4, 10)
    assert measured(Classification(), logits, labels, 4) == {"accuracy": int((logits.argmax(1) == labels).sum()) / 10}
    soft = F.one_hot(labels, 4).float() * 0.9 + 0.025
    assert measured(Classification(), logits, soft, 4) == measured(Classification(), logits, labels, 4)
    assert Classification().loss(logits, labels).item() == F.cross_entropy(logits, labels).item()
    some = labels.clone()
    some[:4] = IGNORED
    torch.testing.assert_close(Classification().loss(logits, some), F.cross_entropy(logits[4:], labels[4:]))
    assert Classification().loss(logits, torch.full((10,), IGNORED)).item() == 0


def test_segmentation_ignores_the_void_label():
    logits, labels = draw(0, 6, 3, 4, 5).float(), whole(1, 3, 6, 4, 5)
    labels[:, 0] = 255
    kept = (labels != 255).flatten()
    said = logits.argmax(1).flatten()[kept], labels.flatten()[kept]
    found = measured(Segmentation(), logits, labels, 3)
    assert found["mean_iou"] == pytest.approx(jaccard_score(said[1], said[0], average="macro"), rel=1e-6)
    assert found["pixel_accuracy"] == pytest.approx((said[0] == said[1]).float().mean().item(), rel=1e-6)
    prepared = Segmentation().prepare(logits, labels.unsqueeze(1))
    expected = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(Segmentation().loss(*prepared), expected)
    Segmentation().check(*prepared)
    labels[0, 1, 1] = 7
    with pytest.raises(ConfigError, match="Label 7 is out of range: the model has 3 classes"):
        Segmentation().check(*Segmentation().prepare(logits, labels))
    void = Segmentation(void=7)
    void.check(*void.prepare(logits, labels.masked_fill(labels == 255, 0)))


@pytest.mark.parametrize("task", [Regression(), MultiLabel(), Embedding()])
def test_only_logits_of_classes_are_standardized(task):
    """One value a sample has no deviation: the loss was NaN in the first step."""
    with pytest.raises(ConfigError, match=f"standardize takes mean and deviation over classes.*{task.name!r}"):
        main_loss("kd", task=task, standardize=True)
    assert main_loss("kd", task=task, standardize=False).task == task


def test_a_class_is_not_taken_for_the_void_label():
    """Pixels of class 255 were left out without a word."""
    labels = whole(1, 300, 2, 4, 5)
    Segmentation().check(torch.zeros(2, 255, 4, 5), labels % 255)
    with pytest.raises(ConfigError, match="Label 255, which segmentation ignores, is one of the model's 300 classes"):
        Segmentation().check(torch.zeros(2, 300, 4, 5), labels)
    for void in (IGNORED, 0):  # 0: a background that does not count, on purpose
        Segmentation(void=void).check(torch.zeros(2, 300, 4, 5), labels)


@pytest.mark.parametrize("shift", [True, False])
def test_language_is_next_token(shift):
    logits, tokens = draw(0, 5, 7, 11).float(), whole(1, 11, 5, 7)
    tokens[:, -2:] = IGNORED
    task = Language(shift=shift)
    total, count = 0.0, 0
    for b in range(5):
        for place in range(7 - shift):
            if (label := int(tokens[b, place + shift])) != IGNORED:
                total -= math.log(F.softmax(logits[b, place].double(), 0)[label])
                count += 1
    assert task.loss(*task.prepare(logits, tokens)).item() == pytest.approx(total / count, rel=1e-6)
    assert measured(task, logits, tokens, 11)["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_kd_of_a_language_model_is_the_mean_over_predicted_tokens():
    student, teacher, tokens = draw(0, 3, 6, 8), draw(1, 3, 6, 8), whole(2, 8, 3, 6)
    tokens[:, 4:] = IGNORED
    found = main_loss("kd", task=Language())(Outputs(student, None, {}, None), Outputs(teacher, None, {}, None), tokens)
    rows = [z[:, :3].reshape(-1, 8) for z in (student, teacher)]
    flat = main_loss("kd")(Outputs(rows[0], None, {}, None), Outputs(rows[1], None, {}, None), tokens[:, 1:4].flatten())
    assert found.item() == pytest.approx(flat.item(), rel=1e-12)


def test_multilabel():
    logits, labels = draw(0, 12, 3), whole(1, 2, 12, 3)
    task = MultiLabel()
    found = measured(task, logits, labels, 3)
    p = logits.sigmoid().numpy()
    expected = np.mean([average_precision_score(labels[:, c], p[:, c]) for c in range(3)])
    assert found["mean_average_precision"] == pytest.approx(expected, rel=1e-6)
    assert found["f1"] == pytest.approx(f1_score(labels.numpy(), p > 0.5, average="macro"), rel=1e-6)
    prepared = task.prepare(logits, labels)
    y = labels.numpy()
    assert task.loss(*prepared).item() == pytest.approx(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)), rel=1e-10)
    other = draw(3, 12, 3)
    s, t = (1 / (1 + np.exp(-z.numpy() / 2.0)) for z in (logits, other))
    divergence = 4.0 * np.mean(t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s)))
    assert task.divergence(logits, other, None, 2.0).item() == pytest.approx(divergence, rel=1e-10)
    assert task.divergence(logits, logits, None, 2.0).item() == pytest.approx(0, abs=1e-15)


def test_regression():
    task = Regression()
    outputs, values = draw(0, 8, 1), draw(1, 8)
    error = outputs[:, 0].numpy() - values.numpy()
    found = measured(task, outputs, values, 1)
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean(error**2)), rel=1e-6)
    assert found["mean_absolute_error"] == pytest.approx(np.mean(np.abs(error)), rel=1e-6)
    assert task.loss(*task.prepare(outputs, values)).item() == pytest.approx(np.mean(error**2), rel=1e-12)


def test_which_way_is_up():
    """The first metric decides what is best; it says itself which way is up."""
    up = {
        name: next(iter(make().metrics(3).values())).higher_is_better
        for name, make in TASKS.items()
        if name != "embedding"
    }
    assert up == {
        "classification": True,
        "multilabel": True,
        "regression": False,
        "segmentation": True,
        "language": False,
    }
    assert Embedding().metrics(3) == {}


@pytest.mark.parametrize(
    ("logits", "labels", "task"),
    [
        ((8, 5), whole(0, 5, 8), Classification()),
        ((8, 5), whole(0, 5, 8, 1), Classification()),
        ((8, 5), F.one_hot(whole(0, 5, 8), 5) * 0.7 + 0.06, Classification()),
        ((8, 5), whole(0, 2, 8, 5), MultiLabel(binary=True)),
        ((8, 5), whole(0, 2, 8, 5).double(), MultiLabel(binary=True)),
        ((8, 5), draw(0, 8, 5), Regression()),
        ((8, 1), draw(0, 8), Regression()),
        ((8, 6, 6), draw(0, 8, 1, 6, 6), Regression()),
        ((8, 6, 6), whole(0, 2, 8, 1, 6, 6), MultiLabel(binary=True)),
        ((8, 5, 6, 6), whole(0, 5, 8, 6, 6), Segmentation()),
        ((8, 5, 6, 6), F.one_hot(whole(0, 5, 8, 6, 6), 5).movedim(-1, 1) * 0.7 + 0.06, Segmentation()),
        ((8, 5, 6, 6), whole(0, 2, 8, 5, 6, 6).double(), MultiLabel(binary=True)),
        ((8, 6, 50), whole(0, 50, 8, 6), Language()),
        ((8, 5), None, Embedding()),
    ],
)  # fmt: skip
def test_tasks_are_inferred_where_labels_leave_no_doubt(logits, labels, task):
    assert infer_task(draw(1, *logits), labels) == task


def test_labels_may_have_the_axis_of_one_output_that_the_model_leaves_out():
    logits, labels = draw(0, 2, 6, 6), draw(1, 2, 1, 6, 6)
    prepared = Regression().prepare(logits, labels)
    Regression().check(*prepared)
    assert torch.equal(Regression().loss(*prepared), F.mse_loss(logits, labels[:, 0]))


def test_what_cannot_be_inferred_is_asked_for():
    with pytest.raises(
        ConfigError, match=r"Labels of shape \(8, 3\) \(int64\) and outputs of shape \(8, 5\)"
    ) as caught:
        infer_task(draw(1, 8, 5), whole(0, 5, 8, 3))
    assert "--task" in str(caught.value)


def test_labels_of_another_task_are_refused():
    with pytest.raises(ConfigError, match="from 0 to 1, but these range from 0 to 4"):
        MultiLabel().check(*MultiLabel().prepare(draw(0, 4, 5), torch.arange(20).reshape(4, 5) % 5))
    with pytest.raises(
        ConfigError, match=r"regression reads labels of the outputs' shape \(4, 5\), but these have \(4,\)"
    ):
        Regression().check(*Regression().prepare(draw(0, 4, 5), draw(1, 4)))
    with pytest.raises(ConfigError, match="not a finite number"):
        Regression().check(*Regression().prepare(draw(0, 4, 1), torch.tensor([1.0, math.nan, 0, 0])))


def test_losses_that_do_not_fit_the_task_are_refused():
    for name in ("dkd", "dist", "mlkd", "cwd"):
        with pytest.raises(ConfigError, match="compares classes that exclude each other"):
            main_loss(name, task=MultiLabel())
    with pytest.raises(ConfigError, match="'labels' needs labels"):
        main_loss("labels", task=Embedding())
    assert main_loss("pkt_kl", task=Embedding()).weight_labels == 0


def test_tasks_by_name_and_of_the_users_own(tmp_path: Path):
    assert task_of("segmentation") == Segmentation()
    with pytest.raises(ConfigError, match="'segmentaton' is not a task"):
        task_of("segmentaton")
    file = tmp_path / "own.py"
    file.write_text(
        "from indistill_fx.losses.task import Segmentation\ntask = Segmentation(void=0)\n"
        "class Own(Segmentation):\n    name = 'own'\nnumber = 3\n"
    )
    assert task_of(f"{file}:task") == Segmentation(void=0)
    assert task_of(f"{file}:Own").name == "own"
    with pytest.raises(ConfigError, match="must be a `Task`, not a int"):
        task_of(f"{file}:number")


def test_kd_of_a_segmentation_has_a_temperature_of_its_own_and_the_users_wins():
    assert main_loss("kd", task=Segmentation()).temperature == 1.0
    assert main_loss("kd", task=Classification()).temperature == 4.0
    assert main_loss("kd", task=Segmentation(), temperature=2.0).temperature == 2.0


def test_a_perfect_ranking_of_large_logits_is_perfect():
    task = MultiLabel()
    logits, labels = (
        torch.tensor([[18.0, -100], [20, -110], [25, -120], [40, -90]]),
        torch.tensor([[0, 0], [0, 0], [1, 0], [1, 1]]),
    )
    metric = task.metrics(2)["mean_average_precision"]
    task.measure(metric, logits, labels.float())
    assert metric.compute() == 1


def test_perplexity_of_a_token_whose_probability_rounds_to_0():
    """Its softmax in float32 is 0: the perplexity was infinite, whatever the other tokens were."""
    logits, tokens = draw(0, 5, 4, 9).float() * 60, whole(1, 9, 5, 4)
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1).double(), tokens.flatten()))
    assert measured(Language(shift=False), logits, tokens, 9)["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("positions", [(), (2, 3)])
def test_labels_that_never_occur_are_left_out_of_the_means(positions):
    """They counted as 0, so that no model could reach 1; torchmetrics warned of them in every epoch."""
    labels = whole(1, 2, 12, 3, *positions)
    labels[:, 1] = 0
    perfect = labels * 2.0 - 1
    assert measured(MultiLabel(), perfect, labels, 3) == {"mean_average_precision": 1, "f1": 1}
    logits = draw(0, 12, 3, *positions)
    found = measured(MultiLabel(), logits, labels, 3)
    y, z = (x.movedim(1, -1).reshape(-1, 3).numpy() for x in (labels, logits))
    expected = np.mean([average_precision_score(y[:, c], z[:, c]) for c in (0, 2)])
    assert found["mean_average_precision"] == pytest.approx(expected, rel=1e-6)
    assert found["f1"] == pytest.approx(f1_score(y, z > 0, average="macro"), rel=1e-6), "given where it is not: 0"


@pytest.mark.parametrize("labels", [torch.arange(3), torch.zeros(3, 4), torch.ones(3, dtype=torch.bool)])
def test_labels_of_other_samples_are_told_by_their_number(labels: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"^A batch has labels of 3 samples, but the model's outputs are of 5\."):
        infer_task(torch.zeros(5, 4), labels)
