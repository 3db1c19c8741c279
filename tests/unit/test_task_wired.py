"""Tasks through training, validation, evaluation and the command line, on small real models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.cli import run
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.foreign import repeatable
from indistill_fx.deploy.parity import decided
from indistill_fx.errors import ConfigError
from indistill_fx.losses.choose_task import choose_task, infer_task
from indistill_fx.losses.task import Classification, Language, MultiLabel, Regression, Segmentation
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.training.task import described, task_of_run

QUIET = {"progress": False, "device": "cpu", "curriculum": Curriculum(lengths=[])}


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(outputs: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
        )  # fmt: skip


def dense(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 1),
        )


def pictures(count: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=drawn(seed))


def of_task(name: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    x = pictures()
    if name == "multilabel":
        return net(3), net(3, 5), (x, (torch.rand(12, 3, generator=drawn(2)) < 0.5).float())
    if name == "one label":
        return net(1), net(1, 5), (x, torch.arange(12).remainder(2)[:, None])
    if name == "regression":
        return net(1), net(1, 5), (x, torch.randn(12, 1, generator=drawn(2)))
    return dense(0), dense(5), (x, torch.randint(3, (12, 4, 4), generator=drawn(2)))


@pytest.mark.parametrize(
    ("name", "task", "metric"),
    [
        ("multilabel", "multilabel", "mean_average_precision"),
        ("one label", "multilabel", "average_precision"),
        ("regression", "regression", "rmse"),
        ("segmentation", "segmentation", "mean_iou"),
    ],
)
def test_every_way_of_training_knows_the_task(name, task, metric, tmp_path):
    teacher, student, batch = of_task(name)
    record = ifx.distill(teacher, student, [batch], epochs=3, val_loader=[batch], run_dir=tmp_path / "run", **QUIET)
    assert (record.task, record.metric.name, record.accuracy) == (task, metric, None)
    assert record.metrics == ifx.evaluate(student, [batch]).metrics
    assert record.teacher_metrics == ifx.evaluate(teacher, [batch], task=task).metrics
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert (told["task"], told["metric"]["name"]) == (task, metric)
    values = [epoch.metrics[metric] for epoch in record.epochs]
    assert record.best == (max if record.metric.higher_is_better else min)(values)
    assert record.best_epoch == values.index(record.best) + 1
    again = ifx.distill(
        teacher, student, [batch], epochs=3, val_loader=[batch], run_dir=tmp_path / "run", resume=True, **QUIET
    )
    assert again.digest == record.digest
    model = net(batch[1].shape[1]) if name != "segmentation" else dense()
    trained = ifx.train(model, [batch], epochs=2, val_loader=[batch], progress=False, device="cpu")
    assert (trained.task, trained.metric.name) == (task, metric)
    path = tmp_path / "page.html"
    assert run(["report", str(tmp_path / "run"), "-o", str(path)]) == 0
    assert metric.replace("_", " ") in path.read_text()


def test_the_arms_of_a_comparison_have_one_task():
    teacher, student, batch = of_task("regression")
    arms = ifx.compare(
        teacher,
        student,
        [batch],
        epochs=3,
        val_loader=[batch],
        **QUIET | {"curriculum": Curriculum(lengths=1, penultimate=0)},
    )
    assert {arm.record.metric.name for arm in arms.values()} == {"rmse"}


def test_the_loss_is_the_tasks_own():
    teacher, student, (x, y) = of_task("regression")
    stage = ifx.compile_stages(
        teacher.eval(), student, example_inputs=x, task="regression", curriculum=Curriculum(lengths=[])
    )[-1].eval()
    own, other = student.eval()(x), teacher(x)
    assert stage((x, y)).item() == pytest.approx(
        (0.9 * F.mse_loss(own, other) + 0.1 * F.mse_loss(own, y)).item(), rel=1e-6
    )


def test_columns_of_whole_numbers_reach_a_loss_of_ones_own_as_the_task_reads_them():
    seen = []

    def loss(student, teacher, labels):
        seen.append(labels.shape)
        return student.logits.square().mean()

    teacher, student, batch = of_task("one label")
    ifx.distill(teacher, student, [batch], main=loss, epochs=1, **QUIET)
    ifx.distill(net(3), net(3, 1), [(batch[0], torch.arange(12)[:, None] % 3)], main=loss, epochs=1, **QUIET)
    assert seen == [torch.Size([12, 1])] * 2 + [torch.Size([12])] * 2  # each also before it trains, on the first batch


def test_a_task_of_ones_own_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\nfrom torchmetrics.regression import MeanAbsoluteError\n"
        "from indistill_fx.losses.task import Regression\n"
        "class Doses(Regression):\n"
        "    name = 'doses'\n"
        "    def loss(self, logits, labels):\n        return (logits - labels).abs().mean()\n"
        "    def metrics(self, outputs):\n        return {'error': MeanAbsoluteError()}\n"
        "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))\n"
        "def data():\n    torch.manual_seed(0)\n    x = torch.randn(16, 1, 8, 8)\n    some = [(x, x.mean((1, 2, 3)))]\n"
        "    return some, some\n"
    )
    common = ("--data", "own.py:data", "--task", "own.py:Doses")
    assert run(["train", "own.py:make", *common, "--epochs", "2", "-o", "t", "--device", "cpu"]) == 0
    told = json.loads((tmp_path / "t/run.json").read_text())
    assert told["task"] == "doses" and not told["metric"]["higher_is_better"]
    epochs = [json.loads(line) for line in (tmp_path / "t/metrics.jsonl").read_text().splitlines()]
    values = [line["metrics"]["error"] for line in epochs if line["kind"] == "epoch"]
    assert told["result"]["best"] == min(values)
    assert "Test error" in capsys.readouterr().out
    assert run(["evaluate", "t", *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["error"] == values[-1]


BAD = [
    ("multilabel", {"task": "classification"}, "must be probabilities, but those of some sample do not sum to 1"),
    ("regression", {"task": "multilabel"}, "multilabel reads labels from 0 to 1"),
    ("regression", {"main": "dkd"}, "Loss 'dkd' compares classes that exclude each other"),
    ("multilabel", {"task": "multilable"}, "Nearest: multilabel"),
    ("segmentation", {"task": "regression"}, "regression reads labels of the outputs' shape (12, 3, 4, 4)"),
    ("segmentation", {"main": "labels", "task": "embedding"}, "needs labels"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_labels_that_do_not_fit_are_refused_before_the_first_step(name, options, message):
    teacher, student, batch = of_task(name)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        ifx.distill(teacher, student, [batch], epochs=1, **QUIET, **options)
    assert message in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_a_void_label_out_of_range_names_its_batch():
    teacher, student, (x, y) = of_task("segmentation")
    wrong = y.clone()
    wrong[0, 0, 0] = 3
    void = y.clone()
    void[0, 0] = 255
    with pytest.raises(ConfigError, match="Labels of batch 3: Label 3 is out of range: the model has 3 classes"):
        ifx.distill(teacher, student, [(x, y), (x, void), (x, wrong)], epochs=1, **QUIET)


def test_labels_of_other_sizes_are_checked_against_outputs_of_their_own_size():
    teacher, student, (x, y) = of_task("segmentation")
    wide = torch.randn(4, 1, 8, 12), torch.full((4, 4, 6), 7)
    with pytest.raises(ConfigError, match="Labels of batch 2: Label 7"):
        ifx.distill(teacher, student, [(x, y), wide], epochs=1, **QUIET)


def test_a_loss_of_ones_own_may_read_labels_of_no_task():
    teacher, student, (x, _) = of_task("regression")

    def boxes(student, teacher, labels):
        return student.logits.mean() * labels.mean()

    record = ifx.distill(teacher, student, [(x, torch.rand(12, 5, 4))], main=boxes, epochs=1, **QUIET)
    assert record.metrics is None
    with pytest.raises(ConfigError, match="fit no task, or several"):
        ifx.distill(
            teacher,
            student,
            [(x, torch.rand(12, 5, 4))],
            main=boxes,
            val_loader=[(x, torch.rand(12, 5, 4))],
            epochs=1,
            **QUIET,
        )


def test_what_is_inferred():
    logits = torch.zeros(4, 3)
    assert infer_task(logits, torch.tensor([[0], [1], [2], [0]])) == Classification()
    assert infer_task(torch.zeros(4, 1), torch.tensor([[0], [1], [1], [0]])) == MultiLabel(binary=True)
    assert infer_task(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0])) == MultiLabel(binary=True)
    assert infer_task(torch.zeros(4, 1), torch.tensor([0.5, 1, 1, 0])) == Regression()
    assert infer_task(torch.zeros(4, 3, 5), torch.zeros(4, 5, dtype=torch.long)) == Segmentation()
    assert infer_task(torch.zeros(4, 3, 5, 6), torch.zeros(4, 1, 5, 6, dtype=torch.long)) == Segmentation()
    for logits, labels in (
        (torch.zeros(4, 5, 5), torch.zeros(4, 5, dtype=torch.long)),  # tokens, or places of a line?
        (torch.zeros(4, 1), torch.tensor([0, 7, 2, 1])),  # whole numbers of one output
        (torch.zeros(4, 3), torch.tensor([0.0, 1, 2, 1])),
        (torch.zeros(4, 2), torch.tensor([True, False, True, False])),
    ):
        with pytest.raises(ConfigError, match="fit no task, or several"):
            infer_task(logits, labels)


@pytest.mark.parametrize("named", [None, "language"])
def test_tokens_tell_whether_their_labels_are_still_to_be_shifted(named):
    tokens = torch.randint(9, (4, 6), generator=drawn(0))
    logits = torch.zeros(4, 6, 9)
    labels = tokens.clone()
    labels[:, :2] = -100
    assert choose_task(named, logits, labels, tokens) == Language(shift=True)
    assert choose_task(named, logits, tokens.roll(-1, 1), tokens) == Language(shift=False)
    assert described(Language(shift=False)) == "language, shift False"


def test_classification_is_measured_as_it_was():
    """To the bit: the share of right ones, and the mean cross-entropy, summed batch by batch."""
    model = net(3).eval()
    batches = [(pictures(n, n), torch.arange(n) % 3) for n in (7, 5)]
    found = ifx.evaluate(model, batches)
    with torch.no_grad():
        scores = [model(x) for x, _ in batches]
    right = sum(int((z.argmax(1) == y).sum()) for z, (_, y) in zip(scores, batches, strict=True))
    loss = sum(F.cross_entropy(z, y, reduction="sum").item() for z, (_, y) in zip(scores, batches, strict=True))
    assert (found.accuracy, found.loss, found.count, found.classes) == (right / 12, loss / 12, 12, 3)
    for z, (_, y) in zip(scores, batches, strict=True):
        assert Classification().loss(z, y).item() == F.cross_entropy(z, y).item()


def test_export_compares_what_the_task_reads(tmp_path, monkeypatch, capsys):
    ours = torch.randn(6, 3, 4, 4, generator=drawn(0)).numpy()
    theirs = ours.copy()
    theirs[0, :, 0, 0] = -ours[0, :, 0, 0]  # another class at one of 96 pixels
    dense = decided(ours, theirs, lambda y: Segmentation().decisions(y))
    assert dense is not None and (dense[0] != dense[1]).sum() == 1
    labels = decided(ours[:, :, 0, 0], theirs[:, :, 0, 0], lambda y: MultiLabel().decisions(y))
    assert labels is not None and (labels[0] != labels[1]).sum() == 3
    assert decided(ours, theirs, lambda y: Regression().decisions(y)) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
        "def data():\n    x = torch.randn(16, 1, 8, 8)\n    some = [(x, (torch.rand(16, 3) < 0.5).float())]\n    return some, some\n"
    )
    export = ["export", "own.py:make", "-o", "out.onnx", "--data", "own.py:data"]
    assert run([*export, "--int8", "--max-drop", "100"]) == 0
    assert "mean average precision" in capsys.readouterr().out
    assert run([*export, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["real"]["agreement"] == 1
    assert run(["export", "own.py:make", "-o", "out.onnx", "--input", "1x8x8", "--task", "multilabel"]) == 2
    assert "--task says what labels mean, but there are no labels" in capsys.readouterr().err


@pytest.mark.parametrize("void", [255, -100])
def test_labels_of_which_none_counts_are_refused(void):
    """A loss of 0 from the first step on would look like success."""
    net = nn.Conv2d(3, 4, 1)
    batches = [(torch.randn(2, 3, 6, 6), torch.full((2, 6, 6), void)) for _ in range(3)]
    with pytest.raises(ifx.ConfigError, match="No label is usable"):
        ifx.train(net, batches, epochs=1, task="segmentation", progress=False)
    batches[2][1][0, 0, 0] = 1  # a void picture at the beginning is nothing to refuse
    ifx.train(net, batches, epochs=1, task="segmentation", progress=False)


class Words(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids):
        return self.out(torch.relu(self.embedding(ids)))


def words(*, counting: tuple[bool, ...]) -> list[tuple[Tensor, Tensor]]:
    """Batches with labels at the position that they are of, or with none that counts."""
    ids = torch.randint(20, (len(counting), 4, 6), generator=drawn(1))
    labels = ((ids + 1) % 20).masked_fill(torch.rand(ids.shape, generator=drawn(2)) < 0.5, -100)
    return [(x, y if counts else torch.full_like(y, -100)) for x, y, counts in zip(ids, labels, counting, strict=True)]


@pytest.mark.parametrize("task", [None, "language"])
def test_a_first_batch_in_which_nothing_counts_shows_nothing(task):
    model, batches = Words(), words(counting=(False, True, False, True))
    logits, labels = (torch.cat(part) for part in zip(*((model(x), y) for x, y in batches), strict=True))
    measured = ifx.evaluate(model, batches, task=task)
    assert measured.count == 16
    assert measured.loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-6)
    found = task_of_run(task, repeatable(batches, 0, "train loader"), model, Inputs.of(model))
    assert found.task == Language(shift=False)
    teacher = Words(5)
    record = ifx.distill(teacher, model, batches, epochs=1, val_loader=batches, task=task, **QUIET)
    assert record.metrics == ifx.evaluate(model, batches, task=Language(shift=False)).metrics
    with pytest.raises(ConfigError, match="Of 8 samples, none has a label that counts, so nothing can be measured"):
        ifx.evaluate(model, words(counting=(False, False)), task=task)


def test_labels_of_which_none_counts_are_refused_before_training():
    for model, batch in ((Words(), words(counting=(False,))[0]), (net(3), (pictures(), torch.full((12,), -100)))):
        with pytest.raises(ConfigError, match="No label is usable"):
            ifx.train(model, [batch], epochs=1, progress=False, device="cpu")


def test_validation_data_in_which_nothing_counts_are_refused():
    x = pictures()
    empty = [(x, torch.full((12,), -100))]
    with pytest.raises(ConfigError, match="Of 12 samples, none has a label that counts"):
        ifx.distill(net(3), net(3, 1), [(x, torch.arange(12) % 3)], epochs=1, val_loader=empty, **QUIET)
    dark = [(x, torch.full((12, 4, 4), 255))]
    with pytest.raises(ConfigError, match="Of 12 samples, none has a label that counts"):
        ifx.evaluate(dense(), dark, task="segmentation")


class Tokens(nn.Module):
    """Logits (batch, length, classes)."""

    def __init__(self, width: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, width), nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


class Grid(nn.Module):
    """Logits (batch, height, width, classes)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).permute(0, 2, 3, 1))


def test_without_labels_classes_in_the_last_axis_are_compared_there(capsys):
    torch.manual_seed(0)
    teacher, student, tokens = Tokens(8).eval(), Tokens(4), torch.randint(7, (6, 3))
    soft = [(model(tokens) / 4).flatten(0, 1).log_softmax(1) for model in (student, teacher)]
    expected = (
        0.9 * 16 * F.kl_div(*soft, log_target=True, reduction="batchmean").item()
    )  # weight and squared temperature of kd
    found = ifx.distill(teacher, student, [tokens], epochs=1, curriculum=Curriculum(lengths=[]))
    assert found.stages[0].losses[0] == pytest.approx(expected, rel=1e-5)
    assert "language, because the outputs have their classes in the last axis" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(("kind", "x"), [(Tokens, torch.randint(7, (4, 3))), (Grid, torch.randn(4, 3, 8, 8))])
def test_stages_without_labels_need_a_task_where_classes_are_last(kind, x):
    models = kind(8), kind(4)
    with pytest.raises(ConfigError, match="classes in the last axis"):
        ifx.compile_stages(
            *models, example_inputs=x, main_options={"weight_labels": 0}, curriculum=Curriculum(lengths=[])
        )
    if kind is Tokens:
        stages = ifx.compile_stages(
            *models,
            example_inputs=x,
            main_options={"weight_labels": 0},
            curriculum=Curriculum(lengths=[]),
            task="language",
        )
        assert stages[-1](x).ndim == 0


def test_without_labels_a_grid_with_classes_last_is_refused_by_losses_that_compare_classes():
    data, models = [torch.randn(4, 3, 8, 8)], (Grid(8), Grid(4))
    with pytest.raises(ConfigError, match="classes in the last axis"):
        ifx.distill(*models, data, epochs=1, curriculum=Curriculum(lengths=[]), progress=False)
    ifx.distill(*models, data, epochs=1, main="at", curriculum=Curriculum(lengths=[]), progress=False)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        (lambda y: y, "are one value each"),
        (lambda y: y.squeeze(1), "are one value each"),
        (lambda y: y.view(-1, 1, 1, 1).expand(-1, 1, 2, 2), "are one value each"),
        (lambda y: y.view(-1, 1, 1, 1).expand(-1, 1, 2, 3)[:, 0], "have no axis of classes"),
        (lambda y: y.expand(-1, 6).reshape(-1, 3, 2), "have no axis of classes"),
    ],
)
def test_without_labels_values_need_a_task(form, problem, tmp_path):
    """The softmax of one is always 1: the loss was 0, and nothing was learnt. Of a map of values, rows were taken for classes."""

    class Values(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.first, self.second = nn.Linear(6, width), nn.Linear(width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return form(self.second(torch.relu(self.first(x))))

    torch.manual_seed(0)
    data, teacher, student = [torch.randn(8, 6)], Values(8), Values(4)
    options = {"epochs": 1, "curriculum": Curriculum(lengths=[]), "progress": False}
    with pytest.raises(ConfigError, match=problem):
        ifx.distill(teacher, student, data, **options)
    with pytest.raises(ConfigError, match=problem):
        ifx.compress(teacher, data, run_dir=tmp_path / "small", macs=0.5, samples=8, progress=False)
    assert not (tmp_path / "small" / "student.py").exists()
    assert ifx.distill(teacher, student, data, task="regression", **options).stages[0].losses[0] > 0


def test_one_hot_labels_of_whole_numbers_are_remarked():
    """They are taken for any number of labels a sample; if they are classes, that is another task, without an error."""
    model, x, numbers = net(3), pictures(6, 0), torch.arange(6) % 3
    one_hot, several = F.one_hot(numbers, 3), F.one_hot(numbers, 3) | F.one_hot(numbers * 2 % 3, 3)

    def said(*labels):
        loader = repeatable([(x, y) for y in labels], 0, "train loader")
        return task_of_run(None, loader, model, Inputs.of(model)).said

    remark = (
        "Task: multilabel, binary True, inferred from the labels of the first batch. Every sample of the first batches has exactly "
        "one label: if that is its class, name the task: task='classification' (--task classification)."
    )
    assert said(one_hot, one_hot.bool()) == remark
    for others in ((one_hot, several), (several, one_hot), (one_hot, one_hot * 0)):
        assert said(*others) == remark.partition(" Every sample")[0]
    named = task_of_run("multilabel", repeatable([(x, one_hot)], 0, "train loader"), model, Inputs.of(model))
    assert named.said == "Task: multilabel."
    logits = model(x).detach()
    prepared = Classification().prepare(logits, one_hot)
    Classification().check(*prepared)
    torch.testing.assert_close(Classification().loss(*prepared), F.cross_entropy(logits, numbers), rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match="those of some sample do not sum to 1"):
        Classification().check(*Classification().prepare(logits, several))


class TwoHeads(Grid):
    def __init__(self, width):
        super().__init__(width)
        self.edge, self.frozen = nn.Conv2d(width, 1, 1), nn.Linear(2, 2)

    def forward(self, x):
        hidden = torch.relu(self.conv(x))
        return {"classes": self.head(hidden.mean((2, 3))), "edge": self.edge(hidden)}


@pytest.mark.parametrize("logits", ["classes", "edge"])
def test_heads_that_no_loss_reads_are_named(logits, capsys):
    labels = torch.arange(4) if logits == "classes" else torch.rand(4, 1, 6, 6)
    teacher, student = TwoHeads(8).eval(), TwoHeads(4)
    before = copy.deepcopy(student.state_dict())
    ifx.distill(
        teacher,
        student,
        [(torch.randn(4, 3, 8, 8), labels)],
        epochs=1,
        curriculum=Curriculum(lengths=[]),
        logits=logits,
    )
    said = " ".join(capsys.readouterr().err.split())
    other = {"classes": "edge", "edge": "head"}[logits]
    assert f"not trained: {other}.weight, {other}.bias. They make an output that no loss reads" in said
    kept = {name for name, value in student.state_dict().items() if torch.equal(value, before[name])}
    assert kept == {f"{other}.weight", f"{other}.bias", "frozen.weight", "frozen.bias"}
