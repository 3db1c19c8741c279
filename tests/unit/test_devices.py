"""Which device a run is on, what is said where it is not there, and what it costs: samples a second, waiting, memory."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn

import indistill_fx as ifx
import indistill_fx.target as targets
from indistill_fx.cli import run
from indistill_fx.data import open_data
from indistill_fx.demo import DigitsStudent, DigitsTeacher
from indistill_fx.graph.module_state import moved
from indistill_fx.report.work import Work
from indistill_fx.system.nested import tensors_of, to_device
from indistill_fx.training.memory import noticing_full_memory_elsewhere
from indistill_fx.training.options.settings import Settings
from indistill_fx.training.parallel import devices, processes
from indistill_fx.training.step.losses import Losses

CPU = torch.device("cpu")


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(count)]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "abacus"])
def test_a_device_that_is_not_there_is_one_paragraph_before_anything_is_read(device, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    common = ["--data", "nowhere.py:data", "--device", device]
    for command in (
        ["train", "demo", "-o", "run"],
        ["distill", "demo", "demo", "-o", "run"],
        ["evaluate", "demo"],
    ):
        assert run([*command, *common]) == 2
        told = capfd.readouterr().err
        assert f"There is no device '{device}' here." in told and "This machine has: cpu." in told
        assert "Traceback" not in told
    with pytest.raises(ifx.ConfigError, match=f"There is no device '{device}' here"):
        ifx.train(nn.Linear(4, 3), batches(), device=device)


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "This torch is built without CUDA."), ("13.0", "torch says: The driver on your system is too old.")],
)
def test_why_there_is_no_cuda_is_said(version, message, monkeypatch):
    def too_old() -> None:
        raise RuntimeError("The driver on\n your system is too old.")

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(ifx.ConfigError, match="no device 'cuda:0'") as caught:
        ifx.Target("cuda:0")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("says", "noted"),
    [("The NVIDIA driver on your system is too old (found version 11040).", True), ("Found no NVIDIA driver.", False)],
)
def test_a_driver_that_is_too_old_is_said_where_a_gpu_would_be_taken(says, noted, monkeypatch, tmp_path):
    def refuses() -> None:
        raise RuntimeError(says)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuses)
    ifx.train(nn.Linear(4, 3), batches(), epochs=1, run_dir=tmp_path, progress=False)
    schedule = json.loads((tmp_path / "run.json").read_text())["schedule"]
    assert (f"the GPU is not used: torch says: {says}" in schedule) is noted


def test_no_memory_outside_of_a_step_is_said():
    with (
        pytest.raises(ifx.TrainError, match=r"no memory left outside of a training step(.|\n)*--no-graphs"),
        noticing_full_memory_elsewhere(),
    ):
        raise torch.OutOfMemoryError("full")


def test_a_dtype_that_the_device_cannot_compute_is_refused_with_the_settings(monkeypatch):
    monkeypatch.setattr(targets, "available_devices", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ifx.ConfigError, match="'cuda' cannot compute in bfloat16"):
        Settings(device="cuda", mixed_precision="bf16")
    assert Settings(device="cuda").device == "cuda"


def test_accelerate_is_told_the_device_and_nothing_stays_in_the_environment(monkeypatch):
    seen: list[tuple[str | None, bool]] = []

    class StoppedError(Exception):
        pass

    def accelerator(**options: object) -> None:
        seen.append((os.environ.get("ACCELERATE_TORCH_DEVICE"), bool(options["cpu"])))
        raise StoppedError

    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    monkeypatch.setattr(targets, "available_devices", lambda: ["cpu", "cuda:0", "cuda:1"])
    monkeypatch.setattr(processes, "Accelerator", accelerator)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    for device in ("cuda:1", "cpu", "auto"):
        with pytest.raises(StoppedError):
            processes.make_accelerator(device=device, precision=None)
    assert seen == [("cuda:1", False), (None, True), (None, True)]
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ifx.ConfigError, match="every process of a launch needs its own"):
        processes.make_accelerator(device="cuda:1", precision=None)


def test_a_run_on_another_device_lets_accelerate_choose_anew(monkeypatch):
    processes.make_accelerator(device="cpu", precision=None)
    monkeypatch.setattr(PartialState(), "device", torch.device("cuda:1"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    accelerator = processes.make_accelerator(device="cpu", precision=None)
    assert accelerator.device == CPU == AcceleratorState().device


def test_what_has_no_effect_on_a_cpu_is_said():
    asked = Settings(tf32="all", compile_mode="max-autotune")
    assert asked.unused([], 1) == [
        "tf32 has no effect: it applies to NVIDIA GPUs, but the device is cpu",
        "compile_mode has no effect: nothing is compiled (compile, --compile)",
    ]
    assert Settings(tf32="all", compile=True, compile_mode="max-autotune").unused([], 1, "cuda") == []


@pytest.mark.parametrize("tf32", ["off", "convolutions", "all"])
def test_tf32_is_as_asked_within_a_run_and_as_before_after_it(tf32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with devices.computing_on(torch.device("cuda:0"), tf32):
        assert torch.backends.cudnn.allow_tf32 is (tf32 != "off")
        assert torch.backends.cuda.matmul.allow_tf32 is (tf32 == "all")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_a_run_tells_samples_waiting_and_memory(tmp_path, capsys):
    record = ifx.train(nn.Linear(4, 3), batches(), epochs=2, run_dir=tmp_path, device="cpu", log_every_steps=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "epoch"]
    assert [line["samples"] for line in found] == [24, 24] == [epoch.samples for epoch in record.epochs]
    assert all(0 <= line["waiting"] <= line["seconds"] for line in found)
    assert all(line["peak_memory"] > 50e6 for line in found)
    assert "tf32" not in record.environment
    assert run(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert "samples/s" in (tmp_path / "page.html").read_text()


def test_a_gpus_memory_is_all_that_torch_holds(monkeypatch):
    """A recorded step writes into memory that belongs to no tensor any more."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert devices.peak_memory(torch.device("cuda:0")) == 7


class Travelling(nn.Linear):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.sent: list[object] = []

    def to(self, *args, **kwargs):
        self.sent.append(args[0])
        return self


def test_what_is_measured_is_where_the_run_is_and_then_where_it_was():
    there, one = torch.device("cuda:0"), Travelling()
    with pytest.raises(ZeroDivisionError), moved(one, there):
        assert one.sent == [there]
        raise ZeroDivisionError
    assert one.sent == [there, CPU]
    with moved(one, CPU):
        pass
    assert len(one.sent) == 2
    one.spread = nn.Parameter(torch.empty(1, device="meta"))
    with moved(one, there):  # over several devices: its owner laid it out
        pass
    assert len(one.sent) == 2


def test_the_teacher_and_validation_data_go_to_the_runs_device(monkeypatch):
    """The teacher of a run on a GPU was measured on the CPU, where the user had left it."""
    import indistill_fx.training.trainer as subject

    seen: list[tuple[object, object]] = []
    original = subject.moved

    def noted(module, device):
        seen.append((module, device))
        return original(module, device)

    monkeypatch.setattr(subject, "moved", noted)
    data = open_data("digits", limit=64)
    teacher, student = DigitsTeacher(), DigitsStudent()
    sent: list[object] = []
    monkeypatch.setattr(type(data.test), "to", lambda self, device: sent.append((self, device)) or self)
    none = ifx.Curriculum(lengths=[])
    ifx.distill(
        teacher, student, data.train, curriculum=none, epochs=1, val_loader=data.test, progress=False, device="cpu"
    )
    assert seen == [(teacher, CPU), (student, CPU)] and (data.test, CPU) in sent


@dataclasses.dataclass
class Given:
    x: torch.Tensor
    labels: torch.Tensor
    name: str


def test_batches_of_every_form_go_to_the_device():
    """Those of a dataclass stayed where they were."""
    x, meta = torch.randn(2, 3), torch.device("meta")
    pair = collections.namedtuple("pair", "x labels")
    forms = (x, (x, x), [x, x], {"x": x, "y": x}, collections.UserDict(x=x), pair(x, x), Given(x, x, "a"))
    for given in forms:
        found = tensors_of(to_device(given, meta))
        assert [tensor.device for tensor in found] == [meta] * len(tensors_of(given))
    assert to_device({"deep": {"x": [x]}}, meta)["deep"]["x"][0].device == meta
    assert to_device(Given(x, x, "a"), meta).name == "a"


def test_a_phase_sums_up_its_epochs():
    assert str(Work.of_all([Work(), Work(2.0, 100, 0.5, 2**20), Work(2.0, 300, 0.5, 2**21)])) == (
        "100 samples/s, 25% of the time waiting for data, memory up to 2.0 MiB"
    )
    assert str(Work.of_all([Work(2.0, 100, 0.5)])).endswith("memory not available")
    assert str(Work.of_all([Work(1.0), Work()])) == ""


def test_losses_on_a_cpu_are_known_at_once():
    losses = Losses(CPU)
    assert [losses.add(torch.tensor(float(k))) for k in range(3)] == [[0.0], [1.0], [2.0]]
    assert losses.unread == 0 and losses.rest() == []


def test_losses_elsewhere_are_taken_in_order_when_they_have_arrived():
    """By a stand-in for the copy to the host, which arrives when the test says so."""
    arrived: list[bool] = []
    waits = 0

    def send(values: torch.Tensor):
        known, number = values.tolist(), len(arrived)
        arrived.append(False)

        def arriving(wait: bool) -> list[float] | None:
            nonlocal waits
            waits += wait and not arrived[number]
            return known if wait or arrived[number] else None

        return arriving

    losses = Losses(torch.device("cuda"), every=2, send=send)
    assert losses.add(torch.tensor(0.0)) == [] and arrived == []
    assert losses.add(torch.tensor(1.0)) == [] and arrived == [False] and losses.unread == 2
    assert losses.add(torch.tensor(2.0)) == [] and losses.unread == 3
    assert losses.add(torch.tensor(3.0)) == []
    arrived[1] = True  # the second pair cannot overtake the first
    assert losses.add(torch.tensor(4.0)) == [] and losses.unread == 5
    arrived[0] = True
    assert losses.add(torch.tensor(5.0)) == [0.0, 1.0, 2.0, 3.0] and losses.unread == 2
    assert losses.add(torch.tensor(6.0)) == []
    assert waits == 0
    assert losses.rest() == [4.0, 5.0, 6.0] and waits == 2
    assert losses.unread == 0 and losses.rest() == []
