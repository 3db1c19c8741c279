"""What only a GPU can show; skipped without one. `python -m pytest tests/gpu` takes about two minutes there."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.cli import run as run_command
from indistill_fx.training.chain import distill_for_int8
from tests.nets import Cnn32, images, seeded

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("default"),
]
RATE = 2.0**-8  # a number of float32, in which a recorded optimiser has its rate


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 is computed as such, and sums are added in one order where cuDNN lets them be."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def batches(count: int = 8, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images of ten classes, each class a brightness of its own."""
    found = []
    for k in range(count):
        labels = (torch.arange(size) + k) % 10
        found.append((images(size, 32, seed=seed + k) + labels[:, None, None, None] / 5, labels))
    return found


def run(student: nn.Module, **options: Any) -> ifx.RunRecord:
    teacher = seeded(lambda: Cnn32((16, 32, 64), 128))
    data = batches()
    given: dict[str, Any] = {
        "epochs": 3, "curriculum": ifx.Curriculum(lengths=[2, 0, 0], learning_rate=RATE), "learning_rate": RATE, "rise_steps": 8,
        "optimizer": "sgd", "tf32": "off", "progress": False, "device": "cuda", "val_loader": data[:2], "graphs": "auto",
    }  # fmt: skip
    return ifx.distill(teacher, student, data, **{**given, **options})


def same(one: nn.Module, other: nn.Module, relative: float = 1e-3) -> None:
    """All weights and statistics, as L2 norms."""
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        gap = (a.double().cpu() - b.double().cpu()).norm()
        assert gap <= relative * b.double().norm().cpu() + 1e-6, (name, float(gap))


OPTIONS: dict[str, dict[str, Any]] = {
    "kd": {},
    "dkd": {"main": "dkd"},
    "pkt": {"main": "pkt"},
    "reviewkd": {"main": "reviewkd"},
    "labels": {"main": "labels"},
    "standardised": {"main": "kd", "main_options": {"standardize": True}},
    "adam": {"optimizer": "adam", "schedule": "cosine"},
    "clip, average, smoothing": {"clip_norm": 0.5, "average": 0.75, "label_smoothing": 0.1},
    "mixup": {"mixup": 0.4},
    "all pairs": {"curriculum": ifx.Curriculum(together=True, lengths=2, learning_rate=RATE)},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_recorded_run_ends_as_one_that_is_not(name):
    recorded, plain = seeded(Cnn32), seeded(Cnn32)
    record, expected = run(recorded, **OPTIONS[name]), run(plain, graphs=False, **OPTIONS[name])
    notes = [note for stage in record.stages for note in stage.notes if "CUDA graph" in note]
    assert len(notes) == len(record.stages) and all(note.startswith("recorded") for note in notes), notes
    half = name in ("bf16", "fp16")
    for one, other in zip(record.epochs, expected.epochs, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=3e-2 if half else 1e-3)
    same(recorded, plain, 0.1 if half or name == "adam" else 1e-3)
    assert expected.epochs[-1].loss < expected.epochs[-3].loss


def test_a_gpu_ends_where_a_cpu_does():
    here, there = seeded(Cnn32), seeded(Cnn32)
    one, other = run(here, device="cpu"), run(there)
    for a, b in zip(one.epochs, other.epochs, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-3)
    assert next(there.parameters()).device.type in ("cpu", "cuda")
    same(there, here, 5e-3)


@pytest.mark.parametrize("graphs", ["auto", False])
def test_a_run_goes_on_where_it_was_interrupted(graphs, tmp_path, monkeypatch):
    from indistill_fx.training.loop import TrainingLoop

    whole, again, count, original = seeded(Cnn32), seeded(Cnn32), [0], TrainingLoop._after_step
    run(whole, graphs=graphs)

    def stopping(loop, phase, step) -> None:
        original(loop, phase, step)
        count[0] += 1
        if count[0] == 21:
            raise RuntimeError("pulled the plug")

    monkeypatch.setattr(TrainingLoop, "_after_step", stopping)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(seeded(Cnn32), run_dir=tmp_path, checkpoint_every_steps=1, graphs=graphs)
    run(again, run_dir=tmp_path, checkpoint_every_steps=1, resume=True, graphs=graphs)
    same(again, whole)


def test_compiled_runs_end_as_others():
    compiled, plain = seeded(Cnn32), seeded(Cnn32)
    record, expected = run(compiled, compile=True), run(plain, graphs=False)
    notes = [note for stage in record.stages for note in stage.notes]
    assert "compiled" in notes and any(note.startswith("recorded") for note in notes), notes
    for one, other in zip(record.epochs, expected.epochs, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_crd_reads_indices_on_a_gpu():
    data = ifx.open_data("digits", batch_size=64, with_indices=True)
    teacher, student = seeded(lambda: small(16)), seeded(lambda: small(8))
    curriculum = ifx.Curriculum(lengths=[])
    record = ifx.distill(
        teacher, student, data.train, main="crd", epochs=12, curriculum=curriculum, val_loader=data.test, progress=False, device="cuda",
    )  # fmt: skip
    assert record.accuracy is not None and record.accuracy > 0.5


def small(width: int) -> nn.Module:
    """For digits."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def trained(data: ifx.Data) -> nn.Module:
    """A teacher of digits, trained on the GPU."""
    teacher = seeded(lambda: small(24))
    record = ifx.train(
        teacher, data.train, epochs=12, val_loader=data.test, progress=False, device="cuda", learning_rate=5e-3
    )
    assert record.accuracy > 0.85
    return teacher.eval()


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_compress_from_a_teacher_to_onnx(where, tmp_path):
    """Wherever the teacher is, and it stays there."""
    data = ifx.open_data("digits", batch_size=64)
    teacher = trained(data).to(where)
    before = copy.deepcopy(teacher.state_dict())
    found = ifx.compress(
        teacher, data.train, macs=0.5, epochs=4, val_loader=data.test, run_dir=tmp_path / "half", progress=False, device="cuda",
    )  # fmt: skip
    assert found.record.accuracy > ifx.evaluate(teacher, data.test).accuracy - 0.15
    for name, value in teacher.state_dict().items():
        assert value.device.type == where and torch.equal(value, before[name]), name
    assert (tmp_path / "half" / "student.onnx").exists()


def test_quantisation_aware_epochs(tmp_path):
    data = ifx.open_data("digits", batch_size=64)
    teacher = trained(data)
    student = trained(data)
    own = ifx.evaluate(student, data.test).accuracy
    record = distill_for_int8(
        teacher, student, data.train, epochs=1, val_loader=data.test, run_dir=tmp_path, progress=False, device="cuda"
    )
    assert record.accuracy is not None and record.accuracy > own - 0.05


def test_images_on_disk(tmp_path):
    """Read by processes, sent from page-locked memory, normalised on the GPU."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, name in enumerate("ab"):
            folder = Path(tmp_path, split, name)
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(128, (96, 80, 3), generator=generator) + 100 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{k}.png")
    data = ifx.open_data(f"imagefolder:{tmp_path}", batch_size=8, workers=2, size=48)
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    )
    record = ifx.train(
        net, data.train, epochs=4, val_loader=data.test, progress=False, device="cuda", learning_rate=0.01
    )
    assert record.accuracy == 1.0


def test_losses_fall_with_every_precision_and_layout():
    """Half precisions reach what float32 reaches, about."""
    ends = []
    for precision in ("no", "bf16", "fp16"):
        record = run(seeded(Cnn32), epochs=8, optimizer="adam", mixed_precision=precision)
        ends.append(record.epochs[-1].loss)
    assert all(b == pytest.approx(a, rel=0.2) for a, b in pairwise(ends)), ends


def test_tracing_and_alignment_on_a_gpu():
    teacher, student = seeded(lambda: Cnn32((16, 32, 64), 128)).cuda(), seeded(Cnn32).cuda()
    x = images(2, 32).cuda()
    plan, here = (
        ifx.align(teacher, student, example_inputs=x),
        ifx.align(teacher.cpu(), student.cpu(), example_inputs=x.cpu()),
    )
    assert [(pair.teacher, pair.student) for pair in plan.pairs] == [
        (pair.teacher, pair.student) for pair in here.pairs
    ]


def test_the_shell(tmp_path):
    assert run_command(["demo", "-o", str(tmp_path / "demo")]) == 0


def test_networks_whose_channels_are_chosen_by_index_on_a_gpu():
    """Selections hold indices; so do losses that are kept in the main stage."""
    from torchvision.models import densenet121, shufflenet_v2_x0_5

    x = images(2, 64).cuda()
    for make in (shufflenet_v2_x0_5, densenet121):
        model = seeded(lambda make=make: make(num_classes=10)).eval().cuda()
        small = ifx.shrink(ifx.trace(model, (x,), role="teacher"), ratio=0.5).value
        assert small.graph_module(x).shape == (2, 10)
    teacher, student = seeded(lambda: Cnn32((16, 32, 64), 128)).cuda(), seeded(Cnn32).cuda()
    curriculum = ifx.Curriculum(together=True, lengths=1, keep_features=1.0)
    record = ifx.distill(teacher, student, batches(), curriculum=curriculum, epochs=2, progress=False, device="cuda")
    assert record.epochs[-1].loss > 0


def test_every_stage_runs_where_its_networks_are():
    """Used in a loop of one's own, without the trainer."""
    from torchvision.models import resnet18, resnet50

    x, labels = images(4, 64).cuda(), torch.arange(4).cuda()
    teacher = seeded(lambda: resnet50(num_classes=10)).eval().cuda()
    student = seeded(lambda: resnet18(num_classes=10)).cuda()
    for stage in ifx.compile_stages(teacher, student, example_inputs=x[:2]):
        stage.train()([x, labels]).backward()


def test_export_from_a_gpu(tmp_path):
    """With the normalisation built in; the file computes what the module does, TF32 or not."""
    model = seeded(lambda: Cnn32((16, 32, 64), 128)).eval().cuda()
    preprocess = ((0.5,) * 3, (0.25,) * 3)
    report = ifx.export_onnx(model, tmp_path / "a.onnx", images(2, 32).cuda(), preprocess=preprocess)
    assert report.max_abs < 1e-3 and next(model.parameters()).is_cuda and torch.backends.cudnn.allow_tf32
