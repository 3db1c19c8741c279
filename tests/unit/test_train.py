from __future__ import annotations

import copy
import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import indistill_fx as ifx
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.graph.module_state import digest
from indistill_fx.losses.logits import KDLoss
from indistill_fx.passes.align import align
from indistill_fx.report.read_runs import read_runs
from indistill_fx.training.chain import distill_chain
from indistill_fx.training.compare import compare
from indistill_fx.training.distill import distill
from indistill_fx.training.supervised import train


def net(first: int, second: int, classes: int = 4, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(4 * second, classes),
        )


def samples(count: int = 96, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Bright quarters: the label says which one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.arange(count) % classes
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label % 4, 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    return images, labels


def loader(shuffle: bool = True, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(**options)), batch_size=16, shuffle=shuffle)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    module = net(12, 16)
    record = train(module, loader(), epochs=6, val_loader=loader(False), learning_rate=1e-2, progress=False)
    assert record.accuracy is not None and record.accuracy > 0.9
    return module


QUICK = ifx.Curriculum(lengths=[1, 2])


def test_distill_trains_the_users_student_and_leaves_its_story(tmp_path, teacher):
    student, before = net(6, 8, seed=1), digest(teacher)
    initial = digest(student)
    record = distill(
        teacher, student, loader(), curriculum=QUICK, epochs=4, val_loader=loader(False), learning_rate=1e-2,
        run_dir=tmp_path / "run", progress=False, about={"student": "models.py:make"},
    )  # fmt: skip
    assert digest(teacher) == before and digest(student) == record.digest != initial
    assert [(stage.epochs, stage.steps) for stage in record.stages] == [(1, 6), (2, 12), (4, 24)]
    assert record.stages[-1].name == "main" and record.steps == 42
    assert record.teacher_accuracy is not None and record.accuracy == record.epochs[-1].accuracy
    assert record.accuracy is not None and record.accuracy > 0.5
    assert record.best_accuracy == max(epoch.accuracy for epoch in record.epochs if epoch.accuracy is not None)
    story = json.loads((tmp_path / "run" / "run.json").read_text())
    assert story["status"] == "done"
    assert story["about"] == {"student": "models.py:make", "labels": {"name": "classification", "settings": {}}}
    assert story["teacher_accuracy"] == record.teacher_accuracy and story["result"]["digest"] == record.digest
    assert [line.split(":")[1].split(",")[0] for line in story["schedule"]] == [" 1 epoch", " 2 epochs", " 4 epochs"]
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, student)]
    assert [story["models"][role]["parameters"] for role in ("teacher", "student")] == sizes
    assert story["models"]["teacher"]["macs"] > story["models"]["student"]["macs"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "epoch"] == [epoch.loss for epoch in record.epochs]
    fresh = net(6, 8, seed=2)
    fresh.load_state_dict(load_file(record.files["student"]))
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), student.state_dict().values(), strict=True)
    )
    assert set(load_file(record.files["best"])) == set(student.state_dict())
    plan = ifx.AlignmentPlan.load(record.files["plan"])
    assert [pair.student for pair in plan.pairs] == [stage.name for stage in record.stages[:-1]]


def test_a_plan_of_the_user_is_not_overwritten(tmp_path, teacher):
    """It was, and nobody trained by it."""
    plan = ifx.align(teacher, net(6, 8, seed=1), example_inputs=torch.randn(2, 1, 8, 8))
    edited = plan.model_copy(update={"pairs": plan.pairs[1:]})
    edited.save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()
    curriculum = ifx.Curriculum(lengths=[1])
    options: dict[str, Any] = {"run_dir": tmp_path, "curriculum": curriculum, "epochs": 1, "progress": False}
    for given in (None, plan):
        with pytest.raises(ConfigError, match=r"plan.json is not the plan of this run, which would overwrite it"):
            distill(teacher, net(6, 8, seed=1), loader(), plan=given, **options)
        assert (tmp_path / "plan.json").read_bytes() == before and [*tmp_path.iterdir()] == [tmp_path / "plan.json"]
    record = distill(
        teacher, net(6, 8, seed=1), loader(), plan=ifx.AlignmentPlan.load(tmp_path / "plan.json"), **options
    )
    assert [stage.name for stage in record.stages] == [edited.pairs[0].student, "main"]


def test_the_teachers_accuracy_is_in_the_record_without_a_directory_too(teacher):
    record = distill(teacher, net(6, 8), loader(), curriculum=QUICK, epochs=0, val_loader=loader(False), progress=False)
    assert record.teacher_accuracy is not None and record.teacher_accuracy > 0.9
    assert record.accuracy is not None and record.files == {}


def test_a_layer_called_main_is_told_from_the_main_stage(teacher):
    named = nn.Sequential(OrderedDict(zip(("stem", "main", "flat", "head"), net(6, 8), strict=True)))
    record = distill(teacher, named, loader(), curriculum=QUICK, epochs=1, progress=False)
    assert [stage.name for stage in record.stages] == ["stem", "main", "main stage"]


def test_warm_up_only_main_only_and_order(teacher):
    only = distill(teacher, net(6, 8), loader(), curriculum=QUICK, main=None, progress=False)
    names = [stage.name for stage in only.stages]
    assert len(names) == 2 and "main" not in names
    none = distill(teacher, net(6, 8), loader(), curriculum=ifx.Curriculum(lengths=[]), epochs=1, progress=False)
    assert [stage.name for stage in none.stages] == ["main"]
    backwards = ifx.Curriculum(lengths=[1, 2], layers=names[::-1])
    turned = distill(teacher, net(6, 8), loader(), curriculum=backwards, epochs=1, progress=False)
    assert [(stage.name, stage.epochs) for stage in turned.stages] == [(names[1], 2), (names[0], 1), ("main", 1)]


def test_traced_models_and_a_plan_of_ones_own(teacher):
    student = net(6, 8)
    x = samples()[0][:4]
    traced = ifx.trace(teacher, x, role="teacher"), ifx.trace(student, x, role="student")
    plan = align(*traced)
    one = plan.model_copy(update={"pairs": plan.pairs[1:]})
    record = distill(*traced, loader(), plan=one, curriculum=ifx.Curriculum(a=0), epochs=1, progress=False)
    assert [stage.name for stage in record.stages] == [plan.pairs[1].student, "main"]
    assert record.digest == digest(student)


def test_a_loss_with_weights_of_its_own_trains_them_and_resumes(tmp_path, teacher):
    def run(student: nn.Module, **options: Any) -> Any:
        return distill(
            teacher,
            student,
            loader(),
            curriculum=ifx.Curriculum(lengths=[]),
            main="fitnet",
            epochs=3,
            progress=False,
            **options,
        )

    alone, stopped = net(6, 8), net(6, 8)
    record = run(alone)
    epochs = 0

    def stop(*_: Any) -> None:
        nonlocal epochs
        epochs += 1
        if epochs == 10:
            raise KeyboardInterrupt

    hook = stopped.register_forward_pre_hook(stop)  # never called: the stage calls the layers, not the module
    handle = stopped[0][0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, run_dir=tmp_path / "run", checkpoint_every_steps=1)
    hook.remove()
    handle.remove()
    assert run(stopped, run_dir=tmp_path / "run", resume=True).digest == record.digest


def test_a_loss_gets_indices_and_their_number_from_a_loader_that_knows_them(teacher):
    images, labels = samples()
    data = MemoryLoader(
        (images * 20 + 128).to(torch.uint8), labels, mean=(0.5,), std=(0.2,), batch_size=16, shuffle=True
    )
    record = distill(
        teacher, net(4, 8), data, main="crd", main_options={"negatives": 8}, curriculum=ifx.Curriculum(lengths=[]),
        epochs=1, progress=False,
    )  # fmt: skip
    assert record.steps == 6 and not data.with_indices


def test_a_schedule_is_kept_as_data_and_a_stage_with_patience_keeps_its_planned_length(tmp_path, teacher):
    curriculum = ifx.Curriculum(lengths=[2, 3], patience=1, progress=0.99)
    distill(teacher, net(4, 8), loader(), curriculum=curriculum, epochs=1, run_dir=tmp_path / "run", progress=False)
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert [(phase["name"], phase["length"], phase["patience"], phase["main"]) for phase in told["phases"]] == [
        ("0", 2, 1, False),
        ("1", 3, 1, False),
        ("main", 1, None, True),
    ]
    (run,) = read_runs(tmp_path / "run")
    assert [(phase.name, phase.planned, phase.unit) for phase in run.phases] == [
        ("0", 2, "epoch"),
        ("1", 3, "epoch"),
        ("main", 1, "epoch"),
    ]
    assert run.phases[1].text.startswith("1: at most 3 epochs")


def test_a_resumed_run_keeps_its_plan(tmp_path, teacher):
    student = net(6, 8)
    x = samples()[0][:4]
    plan = align(teacher, student, example_inputs=x)
    one = plan.model_copy(update={"pairs": plan.pairs[:1]})
    options: dict[str, Any] = {
        "curriculum": ifx.Curriculum(a=0),
        "epochs": 1,
        "progress": False,
        "run_dir": tmp_path / "run",
    }
    done = distill(teacher, student, loader(), plan=one, **options)
    again = distill(teacher, net(6, 8, seed=4), loader(), resume=True, **options)
    assert again.digest == done.digest and [stage.name for stage in again.stages] == [plan.pairs[0].student, "main"]


def test_another_teacher_is_refused_on_resume(tmp_path, teacher):
    options: dict[str, Any] = {"curriculum": QUICK, "epochs": 1, "progress": False, "run_dir": tmp_path / "run"}
    distill(teacher, net(6, 8), loader(), **options)
    with pytest.raises(ifx.ConfigError, match="a run with other settings: teacher"):
        distill(net(12, 16, seed=9), net(6, 8), loader(), resume=True, **options)


def test_classes_that_do_not_fit_are_found_before_anything_is_written(tmp_path, teacher):
    with pytest.raises(ifx.ConfigError, match="teacher has 4 classes and the student 5"):
        distill(teacher, net(6, 8, classes=5), loader(), run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ifx.ConfigError, match=r"Label 4 .* has 4 classes"):
        distill(teacher, net(6, 8), loader(classes=5), progress=False)
    with pytest.raises(ifx.ConfigError, match=r"Label 4 .* has 4 classes"):
        train(net(6, 8), loader(classes=5), progress=False)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"optimizer": "adm"}, "Nearest: adam"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rte": 0.1}, "Nearest: learning_rate"),
        ({"schedule": "step"}, "milestones"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"main": "kdd"}, "'kdd' is not a main loss"),
        ({"curriculum": ifx.Curriculum(optimizer="lamb")}, "lamb"),
        ({"curriculum": ifx.Curriculum(lengths=[1])}, "1 lengths for 2 pairs"),
    ],
)
def test_options_that_cannot_be(tmp_path, teacher, options, said):
    with pytest.raises(ifx.ConfigError, match=said):
        distill(teacher, net(6, 8), loader(), run_dir=tmp_path / "run", progress=False, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pixel", "main", "said"),
    [
        (3e38, "kd", r"stage `0`, epoch 1, step 2: the loss is (nan|inf), first in the teacher at `0_0`"),
        (
            3e38,
            "labels",
            r"stage `main`, epoch 1, step 2: the loss is (nan|inf), first in the student at `0.1`. Lower the learning rate",
        ),
        (
            -torch.inf,
            "kd",
            r"stage `0`, epoch 1, step 2: .*, the batch itself holds values that are not finite. Correct or leave out its samples.",
        ),
    ],
)
def test_a_loss_that_is_not_finite_is_traced_to_its_layer_or_to_the_batch(tmp_path, teacher, pixel, main, said):
    images, labels = samples()
    images[20] = pixel
    batches = DataLoader(TensorDataset(images, labels), batch_size=16)
    curriculum = QUICK if main == "kd" else ifx.Curriculum(lengths=[])
    with pytest.raises(TrainError, match=said):
        distill(teacher, net(6, 8), batches, curriculum=curriculum, main=main, run_dir=tmp_path, progress=False)


def test_without_labels_the_student_learns_from_the_teacher_alone(tmp_path, teacher):
    images, labels = samples()
    options = {"epochs": 2, "curriculum": ifx.Curriculum(lengths=[]), "progress": False}
    with_labels = distill(
        teacher, net(6, 8), [(images[:16], labels[:16])], main_options={"weight_labels": 0}, **options
    )
    for number, batch in enumerate((images[:16], (images[:16],), {"input": images[:16]})):
        run = tmp_path / str(number)
        record = distill(teacher, net(6, 8), [batch], run_dir=run, **options)
        assert record.digest == with_labels.digest
        assert (
            "the data have no labels: the student learns from the teacher's answers alone"
            in (run / "run.json").read_text()
        )

    class Own(KDLoss):
        pass

    assert distill(teacher, net(6, 8), [images[:16]], main=Own, **options).digest == with_labels.digest
    for main in ("labels", "dkd"):
        with pytest.raises(ifx.ConfigError, match=f"The loss `{main}` learns from labels, but the data have none"):
            distill(teacher, net(6, 8), [images[:16]], main=main, **options)
    with pytest.raises(ifx.ConfigError, match="without labels"):
        train(net(6, 8), [images[:16]], progress=False)


def test_data_to_measure_on_may_have_labels_where_those_to_learn_from_have_none(capsys, teacher):
    images, labels = samples()
    student = net(6, 8)
    record = distill(
        teacher, student, [images], epochs=2, curriculum=ifx.Curriculum(lengths=[]), val_loader=loader(False)
    )
    assert "Task: classification, inferred from the labels of the first batch." in capsys.readouterr().err
    right = (student.eval()(images).argmax(1) == labels).float().mean().item()
    assert record.accuracy == pytest.approx(right) and record.teacher_accuracy > 0.9
    assert [epoch.accuracy is not None for epoch in record.epochs] == [True, True]


def test_train_takes_dicts_and_models_with_several_outputs():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(6, 8)

        def forward(self, pixels: Tensor) -> dict[str, Tensor]:
            return {"extra": pixels, "scores": self.body(pixels)}

    images, labels = samples()
    given = [{"pixels": images[k : k + 16], "labels": labels[k : k + 16]} for k in range(0, 96, 16)]
    record = train(Named(), given, epochs=4, val_loader=given, logits="scores", learning_rate=1e-2, progress=False)
    assert record.accuracy is not None and record.accuracy > 0.5
    with pytest.raises(ifx.ConfigError, match="logits=KEY"):
        train(Named(), given, epochs=1, progress=False)


def test_a_dict_batch_reaches_teacher_and_student(teacher):
    class Pixels(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, pixels: Tensor) -> Tensor:
            return self.body(pixels)

    images, labels = samples()
    given = [{"pixels": images[k : k + 16], "labels": labels[k : k + 16]} for k in range(0, 96, 16)]
    record = distill(
        Pixels(copy.deepcopy(teacher)), Pixels(net(6, 8)), given, curriculum=QUICK, epochs=1, progress=False
    )
    assert record.steps == 24


def test_compare_starts_all_arms_alike_and_gives_them_equal_epochs(tmp_path, teacher):
    student, told = net(6, 8), []
    before = digest(student)
    options: dict[str, Any] = {
        "epochs": 5, "curriculum": QUICK, "val_loader": loader(False), "progress": False, "schedule": "step",
        "milestones": [4], "run_dir": tmp_path / "arms",
    }  # fmt: skip
    arms = compare(teacher, student, loader(), announce=told.append, **options)
    assert list(arms) == told == ["labels", "kd", "indistill"] and digest(student) == before
    assert {sum(stage.epochs for stage in arm.record.stages) for arm in arms.values()} == {5}
    rates = {name: [epoch.learning_rate for epoch in arm.record.epochs][-2:] for name, arm in arms.items()}
    assert all(rate == pytest.approx([1e-3, 1e-4]) for rate in rates.values())
    assert len({arm.record.digest for arm in arms.values()}) == 3
    again = compare(teacher, student, loader(), resume=True, **options)
    assert [arm.record.digest for arm in again.values()] == [arm.record.digest for arm in arms.values()]
    with pytest.raises(ifx.ConfigError, match="The warm-up takes 3 epochs"):
        compare(teacher, student, loader(), epochs=3, curriculum=QUICK, progress=False)


def test_compare_without_labels_has_two_arms(tmp_path, teacher, capsys):
    images, _ = samples()
    unlabelled = [(images[k : k + 16],) for k in range(0, 96, 16)]
    options: dict[str, Any] = {"epochs": 5, "curriculum": QUICK, "run_dir": tmp_path / "arms"}
    arms = compare(teacher, net(6, 8), unlabelled, **options)
    assert list(arms) == ["kd", "indistill"]
    assert "There are no labels to train on alone, so that arm is left out." in capsys.readouterr().err
    again = compare(teacher, net(6, 8), unlabelled, resume=True, progress=False, **options)
    assert [arm.record.digest for arm in again.values()] == [arm.record.digest for arm in arms.values()]
    vectors: dict[str, Any] = {"epochs": 5, "curriculum": QUICK, "progress": False, "main": "pkt", "task": "embedding"}
    assert list(compare(teacher, net(6, 8), loader(), **vectors)) == ["pkt", "indistill"]


def test_a_chain_distils_step_by_step_and_resumes(tmp_path, teacher):
    def models() -> list[nn.Module]:
        return [teacher, net(8, 12, seed=1), net(4, 6, seed=2)]

    options: dict[str, Any] = {"epochs": 1, "curriculum": QUICK, "progress": False, "run_dir": tmp_path / "chain"}
    steps = [{"main": "pkt", "curriculum": ifx.Curriculum(lengths=[])}, {}]
    first = distill_chain(models(), loader(), steps=steps, **options)
    assert [[stage.epochs for stage in record.stages] for record in first] == [[1], [1, 2, 1]]
    again = distill_chain(models(), loader(), steps=steps, resume=True, **options)
    assert [record.digest for record in again] == [record.digest for record in first]
    with pytest.raises(ifx.ConfigError, match="has 1 steps, but options are given for 2"):
        distill_chain([teacher, net(4, 6)], loader(), steps=steps)


def test_an_untrained_teacher_is_remarked(capsys, teacher):
    """The data have four classes, however many outputs there are."""
    told = "The teacher classifies no better than chance (4 classes): are its trained weights loaded?"
    told += " Where only its features are compared, as by pkt, it needs no classifier."
    blank, many = copy.deepcopy(teacher), net(12, 16, classes=100)
    torch.nn.init.zeros_(blank[-1].weight)
    torch.nn.init.zeros_(many[-1].weight)
    for model, classes, remarked in ((teacher, 4, False), (blank, 4, True), (many, 100, True)):
        distill(model, net(6, 8, classes), loader(), curriculum=QUICK, epochs=1, val_loader=loader(False))
        assert (told in capsys.readouterr().err.splitlines()) is remarked


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, teacher):
    distill(teacher, net(6, 8), loader(), curriculum=QUICK, epochs=1, val_loader=loader(False))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Teacher's accuracy: ")
    assert lines[1].startswith("Task: classification")
    assert lines[4] == "main: 1 epoch, adam, learning rate 0.001"
    assert lines[-1].startswith("main: 1 epoch, 6 steps, ") and "accuracy" in lines[-1]
    distill(teacher, net(6, 8), loader(), curriculum=QUICK, epochs=1, progress=False)
    assert capsys.readouterr().err == ""
