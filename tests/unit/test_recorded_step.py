"""Recorded steps, with a tape in the place of a CUDA graph: the bits of steps that run as they are; what cannot be recorded is named."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import random
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.errors import TrainError
from indistill_fx.system.random_state import reseed
from indistill_fx.training.options.averaging import make_average
from indistill_fx.training.options.optimizers import make_optimizer
from indistill_fx.training.options.settings import Settings
from indistill_fx.training.parallel.processes import make_accelerator
from indistill_fx.training.step.cuda_graph import CudaRecorder
from indistill_fx.training.step.host_state import changed_in, host_state
from indistill_fx.training.step.proof import Snapshot, state_of
from indistill_fx.training.step.recorded import WARM_UP, NotRecordedError, RecordedStep, why_not_recorded
from indistill_fx.training.step.static_batch import form_of, overwrite, static_copy
from indistill_fx.training.step.step import Step
from tests.nets import Cnn32, images, seeded
from tests.tape import Tape

CPU = torch.device("cpu")
RATE = 2.0**-8  # a number of float32, in which a recorded optimiser has its rate


COUNTED: list[int] = []


class Net(nn.Module):
    """A norm with statistics, dropout that draws on the device, and room for something that cannot be recorded."""

    def __init__(self, habit: str = "") -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.last, self.habit = nn.Linear(8, 3), habit
        self.register_buffer("center", torch.zeros(8))
        self.calls, self.seen = 0, []

    def forward(self, batch: Any) -> Tensor:
        x, labels = batch["x"], batch["labels"]
        x = self.drop(F.relu(self.norm(self.first(x))))
        if self.habit == "reads" and x.mean().item() > 1e9:
            return x.sum()
        if self.habit == "counts":
            self.calls += 1
        if self.habit == "lists":
            self.seen.append(1)
        if self.habit == "rebinds":
            self.center = 0.9 * self.center + 0.1 * x.mean(0).detach()
        if self.habit == "writes":
            self.center.lerp_(x.mean(0).detach(), 0.1)
        if self.habit == "ramps":  # by a count that lies in no module
            COUNTED.append(1)
            x = x * (1 / len(COUNTED))
        if self.habit == "sizes":
            x = x * (1 / len(x))
        if self.habit == "branches" and len(COUNTED.append(1) or COUNTED) % 2:
            x = x.relu()
        if self.habit == "draws":
            x = x * random.random()
        return F.cross_entropy(self.last(x + self.center), labels)


def batch(number: int, size: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    return {
        "x": torch.randn(size, 6, generator=generator),
        "labels": torch.randint(3, (size,), generator=generator),
    }


def scaled(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Give the accelerator what it has for fp16 on a GPU: a scaler that grows often."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "native_amp", True, raising=False)
    monkeypatch.setattr(type(accelerator), "mixed_precision", property(lambda self: "fp16"))
    return scaler


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_scaler_grows_shrinks_and_skips_steps_in_replays(clip, monkeypatch):
    """The gradients of batch 7 are infinite at the scale that there is by then: its step is skipped in the recording too."""
    found = []
    for recorder in (Tape(), None):
        net = seeded(lambda: nn.Linear(6, 3))
        accelerator = make_accelerator(device="cpu", precision=None)
        with monkeypatch.context() as patch:
            scaler = scaled(accelerator, patch)
            made = make_optimizer(
                "adam", list(net.parameters()), learning_rate=RATE, weight_decay=0, momentum=0, recordable=True
            )
            loss_of = _Loss(net)
            step = Step(accelerator, loss_of, accelerator.prepare_optimizer(made), clip_norm=clip, recorder=recorder)
            scales, weights = [], []
            for number in range(12):
                given = batch(number)
                given["x"] = given["x"] * (1e38 if number == 7 else 1)
                loss = step.whole(given) if recorder is None else step.recorded(given)
                scales.append((scaler.get_scale(), float(loss)))
                weights.append(net.weight.detach().clone())
        found.append((scales, weights))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    only = [scale for scale, _ in found[0][0]]
    assert only[7] < only[6] and only[5] > only[3] and torch.equal(found[0][1][6], found[0][1][7])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_an_optimiser_whose_first_step_is_skipped_begins_with_the_second(name, monkeypatch):
    """float16's scaler often begins too high; torch's fused SGD would go on with memory that nobody has written."""
    weights = []
    for numbers in (range(1, 6), range(6)):
        net = seeded(lambda: nn.Linear(6, 3))
        accelerator = make_accelerator(device="cpu", precision=None)
        with monkeypatch.context() as patch:
            scaled(accelerator, patch)
            made = make_optimizer(name, list(net.parameters()), learning_rate=RATE, weight_decay=0.125, momentum=0.5)
            step = Step(accelerator, _Loss(net), accelerator.prepare_optimizer(made))
            for number in numbers:
                given = batch(number)
                step.whole({**given, "x": given["x"] * (1e38 if number == 0 else 1)})
        weights.append(net.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


class _Loss(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch["x"]).square().mean()


def trained(
    recorder: Tape | None,
    *,
    optimizer: str = "adam",
    habit: str = "",
    sizes: tuple[int, ...] = (5,) * 12,
    clip: float | None = 0.5,
) -> tuple[list[float], dict[str, Tensor], Step]:
    """Losses, weights and average after so many steps at a rate that rises, each drawing what follows from its number."""
    COUNTED.clear()
    net = seeded(lambda: Net(habit)).train()
    average = make_average(net, 0.75, CPU)
    accelerator = make_accelerator(device="cpu", precision=None)
    made = make_optimizer(
        optimizer,
        list(net.parameters()),
        learning_rate=RATE,
        weight_decay=0.125,
        momentum=0.5,
        decay_norms=False,
        recordable=True,
    )
    step = Step(
        accelerator, net, accelerator.prepare_optimizer(made), clip_norm=clip,
        after_update=lambda: average.update_parameters(net), average=average, recorder=recorder,
    )  # fmt: skip
    losses = []
    for number, size in enumerate(sizes):
        step.set_rate(RATE * min(1 + number // 2, 4))
        reseed(0, 0, number, 0)
        torch.randn(number)  # a draw of the loop's own before the step, such as mixup's
        given = batch(number, size)
        losses.append(float(step.whole(given) if step.recorded is None else step.recorded(given)))
        assert all(parameter.grad is None for parameter in net.parameters())
    tensors = {**net.state_dict(), **{f"average.{name}": value for name, value in average.state_dict().items()}}
    return losses, {name: value.clone() for name, value in tensors.items()}, step


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("habit", ["", "writes"])
def test_replayed_steps_have_the_bits_of_steps_that_run(optimizer, clip, habit):
    """Rates, clipping, dropout, statistics, moments and the moving average; buffers that are written in place."""
    tape = Tape()
    losses, tensors, step = trained(tape, optimizer=optimizer, clip=clip, habit=habit)
    expected, plain, _ = trained(None, optimizer=optimizer, clip=clip, habit=habit)
    assert (tape.eager, tape.recordings, tape.replays) == (WARM_UP + 1, 1, 12 - WARM_UP)
    assert losses == expected and len(set(losses)) == 12
    for name, value in plain.items():
        assert torch.equal(tensors[name], value), name
    assert step.recorded is not None and step.recorded.note == "recorded as a CUDA graph after 3 steps"


def test_smaller_batches_run_as_they_are_between_replays():
    sizes, tape = (5, 5, 3, 5, 5, 3, 5, 3, 5, 5), Tape()
    losses, tensors, step = trained(tape, sizes=sizes)
    expected, plain, _ = trained(None, sizes=sizes)
    assert losses == expected
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())
    assert tape.recordings == 1 and step.recorded is not None and step.recorded.others == 2
    assert step.recorded.note.endswith("2 steps on batches of another shape ran without a recording")


@pytest.mark.parametrize(
    ("habit", "reason"),
    [
        ("reads", "the step waits for the device, at own.py:7"),
        ("counts", "the step changes Python state: `calls`"),
        ("lists", "the step changes Python state: `seen`"),
        ("rebinds", "the step changes Python state: `center`"),
        ("draws", "the step draws random numbers on the host"),
        ("ramps", "the step uses other constants each time, first in `aten.mul.Tensor`"),
        ("branches", "the step uses other constants each time, first in `aten.relu.default`"),
    ],
)
def test_what_cannot_be_recorded_is_named_and_runs_as_it_is(habit, reason):
    tape = Tape()
    losses, tensors, step = trained(tape, habit=habit)
    expected, plain, _ = trained(None, habit=habit)
    assert step.recorded is not None and step.recorded.reason == reason
    assert step.recorded.note == f"not recorded as a CUDA graph: {reason}"
    assert losses == expected and tape.recordings == 0 and tape.eager == WARM_UP
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())


def test_the_tape_goes_wrong_where_a_graph_would(monkeypatch):
    """Negative control: a rebound buffer that nobody watched for stands still in the recording."""
    monkeypatch.setattr("indistill_fx.training.step.recorded.changed_in", lambda before, after: [])
    tape = Tape()
    losses, _, _ = trained(tape, habit="rebinds")
    expected, _, _ = trained(None, habit="rebinds")
    assert tape.recordings == 1 and losses[:WARM_UP] == expected[:WARM_UP] and losses != expected


class Forgetting(Tape):
    """Its replays leave out an operation: the last of that name."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _replay(self, operations: list[tuple[Any, ...]]) -> None:
        last = max(place for place, operation in enumerate(operations) if self.name in str(operation[0]))
        super()._replay(operations[:last] + operations[last + 1 :])


@pytest.mark.parametrize(
    ("optimizer", "name", "kind"),
    [
        ("adam", "aten._fused_adam_", "optimiser's state"),
        ("sgd", "aten._fused_sgd_", "weights"),
        ("adam", "aten._foreach_lerp", "moving average"),
        ("adam", "aten._foreach_add", "optimiser's count of steps"),
        ("adam", "aten.nll_loss_forward", "loss"),
    ],
)
def test_a_replay_that_does_something_else_is_found_at_once_and_counts_for_nothing(optimizer, name, kind):
    tape = Forgetting(name)
    losses, tensors, step = trained(tape, optimizer=optimizer, habit="writes")
    expected, plain, _ = trained(None, optimizer=optimizer, habit="writes")
    assert step.recorded is not None and step.recorded.reason == f"its replay gave another result, first in the {kind}"
    assert losses == expected and (tape.recordings, tape.replays) == (1, 1)
    assert all(torch.equal(tensors[key], value) for key, value in plain.items())


@pytest.mark.parametrize(
    ("replayed", "now", "differs"),
    [
        ([1.0, 2.5], [1.0, 2.5], False),
        ([1.0, 2.501], [1.0, 2.5], False),  # sums in another order
        ([1.0, 2.6], [1.0, 2.5], True),
        ([1.0, 2.0], [1.0, 2.5], True),  # nothing was done
        ([1.0, float("nan")], [1.0, 2.5], True),
        ([1.0, 2.5], [1.0, float("nan")], True),
        ([1.0, float("inf")], [1.0, float("nan")], True),
        ([float("nan"), 2.5], [float("nan"), 2.5], False),
    ],
)
def test_what_a_replay_led_to_is_compared_with_what_the_step_does(replayed, now, differs):
    weight = torch.tensor([1.0, 2.0])
    state = {"weights": [weight]}
    before = Snapshot(state)
    weight.copy_(torch.tensor(now))
    expected = Snapshot(state)
    before.restore()
    assert weight.tolist() == [1.0, 2.0]
    weight.copy_(torch.tensor(replayed))
    assert before.first_difference(expected) == ("weights" if differs else None)


def test_a_step_of_adam_that_is_nothing_but_rounding_is_no_difference():
    """A bias before a norm has no gradient; Adam makes a whole step of what rounding leaves of it, in whatever direction that points."""
    net = seeded(lambda: nn.Linear(30, 1))
    optimizer = make_optimizer(
        "adam", list(net.parameters()), learning_rate=RATE, weight_decay=0, momentum=0, recordable=True
    )

    def step(bias: float, share: float = 1.0) -> Snapshot:
        net.weight.grad, net.bias.grad = torch.linspace(-1, 1, 30)[None] * share, torch.full((1,), bias)
        optimizer.step()
        return Snapshot(state_of(net, optimizer))

    step(1e-9)
    before = Snapshot(state_of(net, optimizer))
    expected = step(1e-9)
    for bias, share, found in ((-1e-8, 1.0, None), (1e-9, 0.5, "optimiser's state"), (1e-9, -3.0, "weights")):
        before.restore()
        step(bias, share)
        assert before.first_difference(expected) == found
    before.restore()
    assert before.first_difference(expected) == "weights"  # nothing was done


def test_a_learnt_number_is_compared_like_any_other_weight():
    scale = torch.tensor(2.0)
    before = Snapshot({"weights": [scale]})
    scale.fill_(2.5)
    expected = Snapshot({"weights": [scale]})
    for value, found in ((2.5001, None), (2.7, "weights")):
        scale.fill_(value)
        assert before.first_difference(expected) == found


def test_ever_new_shapes_are_not_recorded():
    tape = Tape()
    _, _, step = trained(tape, sizes=tuple(range(2, 22)))
    assert step.recorded is not None and step.recorded.reason.startswith("the shapes of the batches keep changing")
    assert tape.recordings == 0


def test_few_steps_are_not_recorded():
    _, _, step = trained(Tape(), sizes=(5, 5))
    assert step.recorded is not None and step.recorded.note.endswith("it had too few steps")


def test_an_error_in_a_step_leaves_the_recorded_step_as_it_was():
    def work(batch: Tensor) -> Tensor:
        if batch.sum() > 100:
            raise RuntimeError("no memory")
        return batch.mean()

    step = RecordedStep(work, Tape(), nn.Identity())
    with pytest.raises(RuntimeError, match="no memory"):
        step(torch.full((3,), 1000.0))
    assert step(torch.ones(3)) == 1


def test_of_two_forms_in_turns_each_is_compared_with_itself():
    sizes, tape = (5, 3) * 6, Tape()
    losses, _, step = trained(tape, sizes=sizes, habit="sizes")
    assert step.recorded is not None and step.recorded.reason == "" and tape.recordings == 1
    assert losses == trained(None, sizes=sizes, habit="sizes")[0]


def test_a_loss_is_in_memory_of_its_own():
    step = RecordedStep(lambda batch: batch.mean(), Tape(), nn.Identity())
    losses = [step(torch.full((3,), float(number))) for number in range(WARM_UP + 4)]
    assert [loss.item() for loss in losses] == [*range(WARM_UP + 4)]


@dataclasses.dataclass
class Given:
    x: Tensor
    name: str


def test_forms_and_copies_of_batches():
    x = torch.randn(2, 3, 4, 4)
    alike = [
        (x, (x, x)),
        ([x, torch.arange(2)], 1),
        ({"x": x, "teacher_features": {"layer": x}}, {"a": 1}),
        Given(x, "one"),
        x,
    ]
    for value in alike:
        static = static_copy(value)
        assert form_of(static) == form_of(value) and hash(form_of(value)) == hash(form_of(static))
    static = static_copy({"x": x, "inner": [x]})
    overwrite(static, {"x": x + 1, "inner": [x + 2]})
    assert torch.equal(static["x"], x + 1) and torch.equal(static["inner"][0], x + 2)
    different = [
        x, x[:1], x.double(), x.to(memory_format=torch.channels_last), (x,), [x], {"x": x}, {"y": x}, (x, 1), (x, 2), (x, True),
        Given(x, "one"), Given(x, "two"),
    ]  # fmt: skip
    assert len({form_of(value) for value in different}) == len(different)
    thing = object()
    assert form_of((x, thing)) != form_of((x, thing))  # nobody knows what is in it


def test_what_changes_beside_tensors():
    net = Net()
    net.inner = nn.ModuleList([nn.Linear(2, 2)])
    net.weights, net.table, net.nan = [torch.zeros(2)], {"a": {"b": 1}}, float("nan")
    assert changed_in(host_state(net), host_state(net)) == []

    def after(change) -> list[str]:
        before = host_state(net)
        change()
        return changed_in(before, host_state(net))

    assert after(lambda: net.norm.running_mean.add_(1)) == []
    assert after(lambda: net.weights[0].add_(1)) == []
    assert after(lambda: net.weights.__setitem__(0, torch.ones(2))) == ["weights"]
    assert after(lambda: net.table["a"].update(b=2)) == ["table"]
    assert after(lambda: setattr(net, "new", 1)) == ["new"]
    assert after(lambda: delattr(net, "new")) == ["new"]
    assert after(lambda: setattr(net.inner[0], "training", False)) == ["inner.0.training"]
    assert after(lambda: setattr(net.last.weight, "data", torch.ones(3, 8))) == ["last.weight"]


def test_what_is_known_beforehand():
    assert why_not_recorded(Settings(graphs="auto"), "cuda", 1) is None
    assert why_not_recorded(Settings(), "cuda", 1) is None
    assert why_not_recorded(Settings(graphs=True), "cpu", 1) == "the device is a cpu"
    assert why_not_recorded(Settings(graphs=False), "cuda", 1) == "not requested"
    assert why_not_recorded(Settings(graphs="auto"), "cuda", 2) == "the processes exchange gradients in every step"
    assert (
        why_not_recorded(Settings(graphs="auto", accumulate=2), "cuda", 1) == "a step has several batches (accumulate)"
    )


class Stream:
    """In the place of CUDA's."""

    def __init__(self, *_: object):
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


@pytest.fixture
def cuda(monkeypatch):
    """What `CudaRecorder` calls of torch.cuda, noted: a CPU can show the order of the calls, not what a GPU does with them."""
    calls: list[str] = []
    current = Stream()

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    class Recording:
        def __init__(self, graph: object, *, stream: Stream, capture_error_mode: str):
            calls.append(f"begin {capture_error_mode}")

        def __enter__(self) -> None:
            assert not gc.isenabled()

        def __exit__(self, kind: object, *_: object) -> None:
            calls.append("end")
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    class Generator:
        def __init__(self, device: object):
            pass

        def graphsafe_get_state(self) -> str:
            return "fresh"

        def graphsafe_set_state(self, state: str) -> None:
            calls.append(f"generator {state}")

    generator = Generator(None)
    patches = {
        "current_device": lambda: 0, "Stream": Stream, "current_stream": lambda device: current, "CUDAGraph": Graph,
        "graph": Recording, "stream": lambda stream: nullcontext(), "set_stream": lambda stream: calls.append("stream back"),
        "default_generators": [generator], "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: calls.append(f"debug {mode}"),
    }  # fmt: skip
    for name, value in patches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda self, stream: calls.append("kept for the reader"), raising=False
    )
    return calls, current


def test_the_calls_of_a_recording(cuda):
    calls, current = cuda
    recorder = CudaRecorder(torch.device("cuda"))
    assert recorder.beside(lambda: torch.ones(())) == 1
    assert recorder._stream.waited == [current] and current.waited == [recorder._stream]
    assert calls.pop() == "kept for the reader"
    replay = recorder.record(lambda: calls.append("run"))
    replay()
    assert calls == ["begin thread_local", "run", "end", "replay"] and gc.isenabled()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("cannot copy\nnow"), NotRecordedError, "^cannot copy now$"),
        (torch.OutOfMemoryError("full"), NotRecordedError, "^the GPU has too little memory for it$"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
)
def test_a_recording_that_breaks_off_says_why_and_leaves_torch_usable(error, kind, message, cuda, monkeypatch):
    calls, _ = cuda

    def fails() -> None:
        raise error

    monkeypatch.setattr(CudaRecorder, "_usable", lambda self: True)
    with pytest.raises(kind, match=message):
        CudaRecorder(torch.device("cuda:0")).record(fails)
    assert calls == ["begin thread_local", "end", "stream back", "generator fresh"] and gc.isenabled()


def test_where_the_device_does_nothing_any_more_the_run_ends_with_a_sentence(cuda, monkeypatch):
    def refuses(seed: int) -> None:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr(torch.cuda, "manual_seed", refuses)
    with pytest.raises(TrainError, match=r"the GPU does not respond any more: 1 / 0(.|\n)*--no-graphs"):
        CudaRecorder(torch.device("cuda:0")).record(lambda: _raise(RuntimeError("1 / 0")))


def _raise(error: Exception) -> None:
    raise error


class BreakingOff(Tape):
    """Where a recording ends with an error after its backward pass."""

    def record(self, run):
        def broken() -> None:
            run()
            raise NotRecordedError("a capture failed")

        return super().record(broken)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_recording_that_breaks_off_costs_no_step(clip, monkeypatch):
    original = Step.update
    monkeypatch.setattr(Step, "update", lambda self, batches=1: original(self, batches) if not _recording() else None)
    tape = BreakingOff()
    losses, tensors, step = trained(tape, clip=clip)
    expected, plain, _ = trained(None, clip=clip)
    assert losses == expected and tape.recordings == 1 and tape.replays == 0
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())
    assert step.recorded is not None
    assert step.recorded.note == "not recorded as a CUDA graph: recording failed: a capture failed"


def test_a_recording_that_breaks_off_leaves_the_random_numbers_of_its_step(monkeypatch):
    """Whether the device is still usable is tried by drawing on it."""

    class Drawing(Tape):
        def record(self, run):
            torch.manual_seed(0)
            torch.rand(3)
            raise NotRecordedError("a capture failed")

    def work(batch: Tensor) -> Tensor:
        return (batch + torch.rand(())).mean()

    def drawn(recorder: Tape | None) -> list[float]:
        step = RecordedStep(work, recorder, nn.Identity()) if recorder else work
        torch.manual_seed(7)
        return [float(step(torch.ones(3))) for _ in range(8)]

    assert drawn(Drawing()) == drawn(None)


def _recording() -> bool:
    """Whether a tape runs: its update is left out, so that gradients stay behind."""
    return any(frame.function == "broken" for frame in inspect.stack())


def test_what_runs_beside_is_waited_for_even_if_it_fails(cuda):
    _, current = cuda
    recorder = CudaRecorder(torch.device("cuda:0"))
    with pytest.raises(ZeroDivisionError):
        recorder.beside(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert current.waited == [recorder._stream]


def test_where_the_program_waits_is_known_by_torchs_warnings(cuda):
    calls, _ = cuda
    with CudaRecorder(torch.device("cuda:0")).waiting() as found:
        warnings.warn_explicit("called a synchronizing CUDA operation (here)", UserWarning, "model.py", 12)
        warnings.warn_explicit("Synchronization debug mode is a prototype feature", UserWarning, "torch.py", 1)
    assert found == ["model.py:12"] and calls == ["debug warn", "debug 0"]

    def warns() -> Tensor:
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "model.py", 13)
        warnings.warn_explicit("This instance was constructed with capturable=True or", UserWarning, "adam.py", 1)
        return torch.ones(())

    recorder = CudaRecorder(torch.device("cuda:0"))
    with recorder.waiting() as found:  # a step that is watched runs beside
        recorder.beside(warns)
    assert found == ["model.py:13"]


def test_a_line_of_a_graph_which_stands_in_no_file_is_shown(monkeypatch):
    graph = ifx.trace(seeded(Cnn32), images(2, 32)).graph_module
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    name = graph.forward.__code__.co_filename
    with CudaRecorder(torch.device("cuda")).waiting() as found:
        warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, name, 5)
    assert found == [f"{name}:5 (`conv1 = self.conv1(x)`)"]


def test_what_the_host_draws_is_seen(cuda):
    recorder = CudaRecorder(torch.device("cuda:0"))
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        before = recorder.host_draws()
        assert recorder.host_draws() == before
        draw()
        assert recorder.host_draws() != before


@pytest.fixture
def on_a_tape(monkeypatch):
    """As on a GPU, with tapes for graphs."""
    tapes: list[Tape] = []

    def recorder(device: torch.device) -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    monkeypatch.setattr("indistill_fx.training.loop.CudaRecorder", recorder)
    monkeypatch.setattr(
        "indistill_fx.stages.moving_teacher.must_not_wait", lambda: True
    )  # as while a graph is recorded
    original = why_not_recorded
    monkeypatch.setattr(
        "indistill_fx.training.loop.why_not_recorded",
        lambda settings, device, processes: original(settings, "cuda", processes),
    )
    return tapes


def run(student: nn.Module, **options: Any) -> ifx.RunRecord:
    teacher = seeded(lambda: Cnn32((16, 32, 64), 128))
    data = [(images(6, 32, seed=k), torch.arange(6) + k % 3) for k in range(6)]
    data.append((images(4, 32, seed=9), torch.arange(4)))
    given: dict[str, Any] = {
        "epochs": 2, "curriculum": ifx.Curriculum(lengths=[0, 1, 0], learning_rate=RATE), "learning_rate": RATE, "rise_steps": 8,
        "clip_norm": 0.5, "average": 0.75, "label_smoothing": 0.125, "progress": False, "device": "cpu", "val_loader": data[:2],
        "graphs": "auto",
    }  # fmt: skip
    return ifx.distill(teacher, student, data, **{**given, **options})


def test_a_run_is_recorded_once_a_stage_and_ends_with_the_bits_of_one_that_is_not(on_a_tape, tmp_path):
    recorded, plain = seeded(Cnn32), seeded(Cnn32)
    record = run(recorded, run_dir=tmp_path / "recorded", mixed_precision="bf16")
    expected = run(plain, graphs=False, mixed_precision="bf16")
    assert [stage.notes for stage in record.stages] == [
        (f"recorded as a CUDA graph after 3 steps; {count} on batches of another shape ran without a recording",)
        for count in ("1 step", "2 steps")
    ]
    assert [(tape.eager, tape.recordings) for tape in on_a_tape] == [(4, 1)] * 2
    assert [tape.replays for tape in on_a_tape] == [3, 9]
    assert [epoch.loss for epoch in record.epochs] == [epoch.loss for epoch in expected.epochs]
    for name, value in plain.state_dict().items():
        assert torch.equal(recorded.state_dict()[name], value), name
    assert record.metrics == expected.metrics and record.average == expected.average


@pytest.mark.parametrize(("first", "then"), [("auto", True), ("auto", False), (False, True)])
def test_a_run_is_resumed_with_recording_or_without(first, then, on_a_tape, tmp_path, monkeypatch):
    from indistill_fx.training.loop import TrainingLoop

    whole, again, count, original = seeded(Cnn32), seeded(Cnn32), [0], TrainingLoop._after_step
    run(whole)

    def stopping(loop, phase, step) -> None:
        original(loop, phase, step)
        count[0] += 1
        if count[0] == 12:
            raise RuntimeError("pulled the plug")

    monkeypatch.setattr(TrainingLoop, "_after_step", stopping)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(seeded(Cnn32), run_dir=tmp_path, checkpoint_every_steps=1, graphs=first)
    run(again, run_dir=tmp_path, checkpoint_every_steps=1, resume=True, graphs=then)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_on_a_cpu_the_record_says_why_nothing_is_recorded():
    record = run(seeded(Cnn32), epochs=0)
    assert record.environment["graphs"] == "off: the device is a cpu"
    assert Settings(graphs=True).unused([], 1) == [
        "graphs has no effect: it applies to NVIDIA GPUs, but the device is cpu"
    ]
