"""The loop, on stages built by hand: what each step does is compared with the same thing written out."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.curriculum import Budget
from indistill_fx.data.foreign import repeatable
from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.losses.task import Classification
from indistill_fx.runs.record import MetricFacts, RunRecord
from indistill_fx.stages.checks import label_check
from indistill_fx.system.signals import Interrupted
from indistill_fx.training.memory import noticing_full_memory
from indistill_fx.training.options.settings import Settings
from indistill_fx.training.state import Phase
from indistill_fx.training.task import RunTask
from indistill_fx.training.trainer import Setup, Trainer

CLASSES = RunTask(Classification(), MetricFacts(), "", label_check(Classification(), lambda batch: torch.zeros(1, 3)))


class Student(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 3)
        torch.random.set_rng_state(generator_state)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


class Early(nn.Module):
    """A stage over the student's first layer only."""

    def __init__(self, student: Student):
        super().__init__()
        self.first = student.first

    def forward(self, batch: Any) -> Tensor:
        return F.mse_loss(self.first(batch[0]), batch[0].sum(1, keepdim=True).expand(-1, 8))


class Whole(nn.Module):
    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.student(batch[0]), batch[1])


def batches(count: int = 5, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def run(
    student: nn.Module, *phases: Phase, loader: Any = None, run_dir: Any = None, resume: bool = False, **options: Any
) -> RunRecord:
    settings = Settings.of({"learning_rate": 0.05, "optimizer": "sgd", "momentum": 0.0, **options})
    return Trainer(
        student=student,
        teacher=None,
        loader=repeatable(batches() if loader is None else loader, 0, "train loader"),
        val_loader=None,
        settings=settings,
        run_dir=run_dir,
        resume=resume,
        allow_changed=(),
        progress=False,
        logits=None,
        about=None,
    ).run(lambda directory, accelerator: Setup(phases=list(phases), task=CLASSES))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_an_epoch_is_what_a_plain_loop_does():
    student, twin = Student(), Student()
    record = run(student, Phase("main", Whole(student), Budget(2), main=True))
    optimizer, losses = torch.optim.SGD(twin.parameters(), lr=0.05), []
    for _ in range(2):
        for x, y in batches():
            loss = F.cross_entropy(twin(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    for mine, theirs in zip(weights(student).values(), weights(twin).values(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert record.stages[0].losses == pytest.approx((np.mean(losses[:5]), np.mean(losses[5:])))
    assert record.steps == 10 and record.stages[0].steps == 10 and record.stages[0].epochs == 2


def test_each_stage_trains_its_own_parameters_only_and_the_student_is_left_as_it_was_found():
    student = Student().eval()
    student.norm.train()
    before, flags = weights(student), [part.training for part in student.modules()]
    record = run(student, Phase("first", Early(student), Budget(2)))
    after = weights(student)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"first.weight", "first.bias"}
    assert [part.training for part in student.modules()] == flags
    assert all(parameter.grad is None for parameter in student.parameters())
    assert record.stages[0].losses[1] < record.stages[0].losses[0]


def test_a_norm_that_the_models_own_train_keeps_frozen_stays_frozen():
    class Frozen(Student):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

    student = Frozen()
    run(student, Phase("main", Whole(student), Budget(1), main=True))
    assert torch.equal(student.norm.running_mean, torch.zeros(8)) and not torch.equal(student.norm.bias, torch.zeros(8))
    control = Student()
    run(control, Phase("main", Whole(control), Budget(1), main=True))
    assert not torch.equal(control.norm.running_mean, torch.zeros(8))


def test_accumulation_takes_the_mean_over_the_batches_there_are():
    student, twin = Student(), Student()
    for module in (student, twin):
        module.norm = nn.Identity()
    record = run(student, Phase("main", Whole(student), Budget(1), main=True), accumulate=2)
    assert record.steps == 3  # 2 + 2 + 1 batches
    optimizer, given = torch.optim.SGD(twin.parameters(), lr=0.05), batches()
    for group in (given[:2], given[2:4], given[4:]):
        optimizer.zero_grad()
        torch.stack([F.cross_entropy(twin(x), y) for x, y in group]).mean().backward()
        optimizer.step()
    torch.testing.assert_close(student.first.weight, twin.first.weight)


def test_clipping_limits_the_step():
    student = Student()
    before = weights(student)
    run(student, Phase("main", Whole(student), Budget(1), main=True), loader=batches(1), clip_norm=1e-3)
    moved = sum(float((after.detach() - before[name]).square().sum()) for name, after in student.named_parameters())
    assert math.sqrt(moved) == pytest.approx(0.05 * 1e-3, rel=1e-3)


@pytest.mark.parametrize(
    "options, rates",
    [
        ({}, [0.05, 0.05, 0.05, 0.05]),
        ({"schedule": "step", "milestones": [1, 3], "gamma": 0.1}, [0.05, 0.005, 0.005, 0.0005]),
        ({"schedule": "cosine"}, [0.05, 0.05 * (0.5 + 0.5**1.5), 0.025, 0.05 * (0.5 - 0.5**1.5)]),
    ],
)
def test_the_main_stages_learning_rate_follows_the_schedule(options, rates):
    student = Student()
    phases = (
        Phase("first", Early(student), Budget(1, learning_rate=0.3)),
        Phase("main", Whole(student), Budget(4), main=True),
    )
    record = run(student, *phases, **options)
    assert [epoch.learning_rate for epoch in record.epochs] == pytest.approx([0.3, *rates])


def test_a_budget_in_steps_is_kept_to_the_step():
    student = Student()
    record = run(student, Phase("first", Early(student), Budget(7, "steps")), Phase("main", Whole(student), Budget(1)))
    assert [(stage.steps, stage.epochs) for stage in record.stages] == [(7, 2), (5, 1)]
    assert [epoch.steps for epoch in record.epochs] == [5, 2, 5]


def test_a_stage_of_length_0_is_left_out():
    student = Student()
    record = run(student, Phase("first", Early(student), Budget(0)), Phase("main", Whole(student), Budget(1)))
    assert [stage.name for stage in record.stages] == ["main"]


class Lowered(Early):
    """The same stage with a loss below 0."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch) - 100


@pytest.mark.parametrize("stage", [Early, Lowered])
def test_a_plateau_ends_a_stage_early_and_says_so(stage):
    student = Student()
    stuck = Budget(9, learning_rate=1e-12, patience=2)
    record = run(student, Phase("first", stage(student), stuck), Phase("main", Whole(student), Budget(1)))
    assert record.stages[0].epochs == 3
    assert record.stages[0].notes == ("ended after 3 of 9 epochs: loss has stalled",)
    moving = run(Student(), Phase("first", Early(student), Budget(4, learning_rate=0.01, patience=2)))
    assert moving.stages[0].epochs == 4 and moving.stages[0].notes == ()


class At(nn.Module):
    """A stage that does something in its call number `call`, counted from 0."""

    def __init__(self, stage: nn.Module, call: int, act: Any):
        super().__init__()
        self.stage, self.call, self.act, self.calls = stage, call, act, 0

    def forward(self, batch: Any) -> Tensor:
        loss = self.stage(batch)
        self.calls += 1
        return self.act(loss) if self.calls == self.call + 1 else loss


def no_memory(loss: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_full_device_is_named_with_what_would_fit_and_the_run_goes_on(tmp_path):
    student = Student()
    stage = At(Whole(student), 7, no_memory)
    phase = Phase("main", stage, Budget(3), main=True)
    options = {"run_dir": tmp_path / "run", "checkpoint_every_steps": 1}
    with pytest.raises(
        TrainError, match=r"no memory left for stage `main` with batches of 8\..*checkpoint is intact"
    ) as caught:
        run(student, phase, **options)
    assert caught.value.hint == "Take smaller batches and more of them a step: of 4, with --accumulate 2."
    stage.calls = 99
    assert run(student, phase, resume=True, **options).steps == 15
    twin = Student()
    run(twin, Phase("main", Whole(twin), Budget(3), main=True))
    assert same(weights(student), weights(twin))


def test_a_single_sample_that_does_not_fit_is_not_halved():
    with (
        pytest.raises(TrainError, match="batches of 1") as caught,
        noticing_full_memory("main", (torch.randn(1, 6), torch.zeros(1)), accumulate=1, kept=False),
    ):
        no_memory(torch.zeros(()))
    assert caught.value.hint == "Take a smaller student, smaller inputs, or --mixed-precision bf16."
    assert "checkpoint" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path, value):
    student = Student()
    stage = At(Whole(student), 7, lambda loss: loss * value)
    phases = Phase("layer1", Early(student), Budget(1)), Phase("main", stage, Budget(3), main=True)
    with pytest.raises(
        TrainError, match=r"stage `main`, epoch 2, step 3: the loss is (nan|inf).*checkpoint is intact"
    ) as caught:
        run(student, *phases, run_dir=tmp_path / "run", checkpoint_every_steps=1)
    assert caught.value.where == "stage `main`, epoch 2, step 3"
    assert all(torch.isfinite(tensor).all() for tensor in weights(student).values())
    stage.calls = 99
    record = run(student, *phases, run_dir=tmp_path / "run", resume=True, checkpoint_every_steps=1)
    assert record.steps == 20
    twin = Student()
    run(twin, Phase("layer1", Early(twin), Budget(1)), Phase("main", Whole(twin), Budget(3), main=True))
    assert same(weights(student), weights(twin))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Poison(torch.autograd.Function):  # a finite loss with a gradient that is not
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * float("nan")

    student = Student()
    stage = At(Whole(student), 4, Poison.apply)
    with pytest.raises(TrainError, match=r"stage `main`, epoch 1, step 5: `first.weight` is not finite"):
        run(student, Phase("main", stage, Budget(3), main=True), run_dir=tmp_path / "run", checkpoint_every_steps=1)
    from indistill_fx.runs.checkpoint import load_checkpoint, not_finite

    tensors, saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert not_finite(tensors) == [] and saved["state"]["all_steps"] == 4


def test_a_mask_of_minus_infinity_is_no_fault(tmp_path):
    student = Student()
    student.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert run(student, Phase("main", Whole(student), Budget(1), main=True), run_dir=tmp_path / "run").steps == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", [2, 4, 9])
def test_a_signal_saves_and_stops_and_the_run_goes_on_to_the_same_bits(tmp_path, number, call):
    student, twin = Student(), Student()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stage = At(Whole(student), call, lambda loss: (os.kill(os.getpid(), number), loss)[1])
    phase = Phase("main", stage, Budget(2), main=True)
    with pytest.raises(Interrupted, match=r"Stopped in stage `main`.*last.safetensors.*--resume") as caught:
        run(student, phase, run_dir=tmp_path / "run", optimizer="adam")
    assert isinstance(caught.value, KeyboardInterrupt) and caught.value.number == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert stage.calls == call + 1
    fresh = Student(seed=5)
    resumed = run(
        fresh,
        Phase("main", Whole(fresh), Budget(2), main=True),
        run_dir=tmp_path / "run",
        resume=True,
        optimizer="adam",
    )
    alone = run(twin, Phase("main", Whole(twin), Budget(2), main=True), optimizer="adam")
    assert same(weights(fresh), weights(twin))
    assert resumed.stages[0].losses == alone.stages[0].losses and resumed.steps == alone.steps == 10
    assert resumed.digest == alone.digest


def test_a_signal_after_the_last_step_of_a_budget_in_steps_trains_no_further(tmp_path):
    student, twin = Student(), Student()
    stage = At(Early(student), 2, lambda loss: (os.kill(os.getpid(), signal.SIGINT), loss)[1])
    with pytest.raises(Interrupted):
        run(student, Phase("first", stage, Budget(3, "steps")), run_dir=tmp_path / "run")
    assert run(student, Phase("first", stage, Budget(3, "steps")), run_dir=tmp_path / "run", resume=True).steps == 3
    run(twin, Phase("first", Early(twin), Budget(3, "steps")))
    assert same(weights(student), weights(twin))


@pytest.fixture
def python_handles_ctrl_c():
    """Also where the shell that started the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_a_second_ctrl_c_quits_at_once(tmp_path):
    def twice(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # Python runs a handler at its next chance, not inside kill()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("not reached")

    student = Student()
    with pytest.raises(KeyboardInterrupt) as caught:
        run(student, Phase("main", At(Whole(student), 1, twice), Budget(2), main=True), run_dir=tmp_path / "run")
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (
        run(student, Phase("main", Whole(student), Budget(2), main=True), run_dir=tmp_path / "run", resume=True).steps
        == 10
    )


def test_the_global_random_state_is_left_alone_and_has_no_say():
    def outcome(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        student = nn.Sequential(Student(), nn.Dropout(0.5))
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        run(student, Phase("main", Whole(student), Budget(1), main=True))
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
        return weights(student)

    assert same(outcome(1), outcome(2))
    other = nn.Sequential(Student(), nn.Dropout(0.5))
    run(other, Phase("main", Whole(other), Budget(1), main=True), seed=7)
    assert not same(weights(other), outcome(1))  # the run's own seed has


def test_bfloat16_trains_and_leaves_full_precision_weights():
    student, twin = Student(), Student()
    run(student, Phase("main", Whole(student), Budget(2), main=True), mixed_precision="bf16")
    run(twin, Phase("main", Whole(twin), Budget(2), main=True))
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert not torch.equal(student.first.weight, twin.first.weight)
    torch.testing.assert_close(student.first.weight, twin.first.weight, atol=0.01, rtol=0.1)


def test_a_stage_that_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch):
    def refuse(module: nn.Module, *, fullgraph: bool, **_: Any) -> nn.Module:
        assert not fullgraph  # only of a Stage

        def call(*_: Any) -> Any:
            module.student.norm.running_mean.add_(1.0)  # what a half-done trial may leave behind
            raise RuntimeError("no compiler here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    student, twin = Student(), Student()
    record = run(student, Phase("main", Whole(student), Budget(1), main=True), compile=True)
    assert record.stages[0].notes == ("not compiled: no compiler here",)
    run(twin, Phase("main", Whole(twin), Budget(1), main=True))
    assert same(weights(student), weights(twin))


def test_labels_out_of_range_are_named_before_the_step():
    student, wrong = Student(), batches()
    wrong[2][1][3] = 3
    with pytest.raises(ConfigError, match=r"Labels of batch 3: Label 3 is out of range: the model has 3 classes"):
        run(student, Phase("main", Whole(student), Budget(1), main=True), loader=wrong)


@pytest.mark.parametrize(
    "change, said",
    [({"seed": 4}, "seed is 0 there and 4 here"), ({"learning_rate": 0.2}, "learning_rate is 0.05 there and 0.2 here")],
)
def test_a_run_is_not_resumed_with_other_options(tmp_path, change, said):
    student = Student()
    run(student, Phase("main", Whole(student), Budget(1), main=True), run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=said):
        run(
            student,
            Phase("main", Whole(student), Budget(1), main=True),
            run_dir=tmp_path / "run",
            resume=True,
            **change,
        )


def test_a_finished_run_resumed_gives_its_weights_and_record_back(tmp_path):
    student = Student()
    done = run(student, Phase("main", Whole(student), Budget(2), main=True), run_dir=tmp_path / "run")
    other = Student(seed=3)
    again = run(other, Phase("main", Whole(other), Budget(2), main=True), run_dir=tmp_path / "run", resume=True)
    assert same(weights(other), weights(student))
    assert again.epochs == done.epochs and again.digest == done.digest


def test_a_finished_run_measured_in_steps_stays_finished(tmp_path):
    """It began another epoch, of no steps, at every resume."""
    student, options = Student(), {"run_dir": tmp_path / "run", "main_steps": 12}
    done = run(student, Phase("main", Whole(student), Budget(12, "steps"), main=True), **options)
    assert [epoch.steps for epoch in done.epochs] == [5, 5, 2]
    other = Student(seed=3)
    again = run(other, Phase("main", Whole(other), Budget(12, "steps"), main=True), resume=True, **options)
    assert same(weights(other), weights(student))
    assert again.epochs == done.epochs and again.digest == done.digest


def test_loaders_that_cannot_be_repeated_are_refused():
    for loader, said in ((iter(batches()), "once per epoch"), ([], "no batches"), (3, "once per epoch")):
        with pytest.raises(ConfigError, match=said):
            repeatable(loader, 0, "train loader")  # type: ignore[arg-type]


def test_without_a_directory_nothing_can_be_saved():
    student = Student()
    with pytest.raises(ConfigError, match="Without a run directory"):
        run(student, Phase("main", Whole(student), Budget(1)), resume=True)
