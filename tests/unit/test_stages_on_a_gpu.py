"""Stages on a GPU that is not there: torch's fake tensors say where a step would read a value, or mix devices or dtypes.

They run forward with the rules for types, devices and autocast of CUDA, and compute nothing. The backward pass needs a real device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import indistill_fx as ifx
from indistill_fx.deploy.onnx_capture import Deployed
from indistill_fx.graph.edit import add_tensor
from indistill_fx.graph.preprocess import Preprocess
from indistill_fx.losses.registry import MAIN_LOSSES, WARMUP_LOSSES
from indistill_fx.passes.lowering.table import LOWERINGS
from indistill_fx.system.exact_arithmetic import exact_arithmetic
from indistill_fx.target import Target
from indistill_fx.training.supervised import Supervised
from tests.nets import Cnn32, Residual, TinyTransformer, images, seeded


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    monkeypatch.setattr("indistill_fx.target.available_devices", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr("indistill_fx.stages.moving_teacher.must_not_wait", lambda: True)  # as while a step is watched


def there(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with its parameters and buffers on the GPU; what it holds elsewhere stays where it is."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is not None:
                    moved = mode.from_tensor(value).detach().to("cuda")
                    trained = isinstance(value, nn.Parameter)
                    own[name] = nn.Parameter(moved, requires_grad=value.requires_grad) if trained else moved
    return module


def loss_there(stage: nn.Module, batch: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """A stage's loss, in train mode, as the trainer would ask for it."""
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(entry).to("cuda") for entry in batch]
        there(stage.train(), mode)
        with autocast(dtype):
            return stage(given)


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """CUDA's, which `torch.autocast` leaves out where there is no GPU."""
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype if dtype != torch.float32 else torch.float16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


def pair() -> tuple[nn.Module, nn.Module]:
    return seeded(lambda: Cnn32((16, 32, 64), 128)), seeded(Cnn32)


LABELS = torch.arange(6)


@pytest.mark.parametrize("main", sorted(set(MAIN_LOSSES) - {"cwd", "simkd"}))
def test_no_main_loss_waits_for_the_gpu(main):
    options = {"crd": {"samples": 100, "negatives": 8}}.get(main, {})
    stage = ifx.compile_stages(*pair(), example_inputs=images(6, 32), main=main, main_options=options)[-1]
    loss = loss_there(stage, [images(6, 32), LABELS, torch.arange(6)])
    assert loss.device.type == "cuda" and loss.shape == ()


def test_nor_do_those_for_maps_and_for_the_teachers_classifier():
    def dense() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 1))

    x, labels = images(6, 16), torch.randint(5, (6, 8, 8))
    for main in ("cwd", "kd", "labels"):
        models = seeded(dense), seeded(dense)
        stage = ifx.compile_stages(*models, example_inputs=x, main=main, task="segmentation")[-1]
        assert loss_there(stage, [x, labels]).device.type == "cuda"
    teacher, student = seeded(lambda: Cnn32((16, 32, 64), 128)), seeded(Cnn32)
    student = ifx.reuse_classifier(teacher, student, example_inputs=images(2, 32))
    stage = ifx.compile_stages(teacher, student, example_inputs=images(2, 32), main="simkd")[-1]
    assert loss_there(stage, [images(6, 32), LABELS]).device.type == "cuda"


@pytest.mark.parametrize(
    ("task", "labels"),
    [("multilabel", torch.ones(6, 10)), ("regression", torch.ones(6, 10)), ("embedding", LABELS)],
)
def test_nor_does_any_task(task, labels):
    stage = ifx.compile_stages(*pair(), example_inputs=images(6, 32), task=task)[-1]
    assert loss_there(stage, [images(6, 32), labels]).device.type == "cuda"


@pytest.mark.parametrize("labels", [LABELS, torch.full((6, 10), 0.1)], ids=["classes", "probabilities"])
def test_nor_does_training_on_labels_alone(labels):
    assert loss_there(Supervised(seeded(Cnn32)), [images(6, 32), labels]).device.type == "cuda"


@pytest.mark.parametrize(
    "options",
    [
        *({"loss": loss} for loss in sorted(WARMUP_LOSSES)),
        {"together": True},
        {"feed": "teacher"},
        {"keep": 0.5},
        {"penultimate": 2},
    ],
)
def test_nor_does_any_way_of_warming_up(options):
    stages = ifx.compile_stages(*pair(), example_inputs=images(6, 32), curriculum=ifx.Curriculum(lengths=1, **options))
    assert len(stages) > 1
    for stage in stages:
        assert loss_there(stage, [images(6, 32), LABELS]).device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        pair,
        lambda: (seeded(Residual), seeded(Residual, seed=1)),
        lambda: (seeded(TinyTransformer), seeded(TinyTransformer, seed=1)),
    ],
    ids=["plain", "residual", "transformer"],
)
def test_what_is_lowered_for_a_gpu_fits_its_autocast(make, dtype):
    models = make()
    x = images(6, 16 if isinstance(models[0], TinyTransformer) else 32)
    stages = ifx.compile_stages(*models, example_inputs=x, target=Target("cuda", dtype))
    cast = [p for stage in stages for p in stage.teacher.parameters() if p.dtype == dtype != torch.float32]
    assert bool(cast) is (dtype != torch.float32)
    for stage in stages:
        loss = loss_there(stage, [x, LABELS % 10], dtype)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
    assert LOWERINGS[Target("cuda", torch.float16).kind].teacher


class Reading(nn.Module):
    """Reads a value in its forward, or holds a tensor that does not move with it."""

    def __init__(self, habit: str):
        super().__init__()
        self.last, self.habit, self.scale = nn.Linear(3, 2), habit, torch.ones(2)

    def forward(self, batch: Any) -> Tensor:
        y = self.last(batch[0])
        if self.habit == "reads" and bool((y > 1e9).any()):
            return y.sum()
        return (y * self.scale).mean() if self.habit == "holds" else y.mean()


@pytest.mark.parametrize(("habit", "fails"), [("reads", True), ("holds", True), ("", False)])
def test_what_would_wait_or_be_elsewhere_is_found(habit, fails):
    """Negative control."""
    try:
        assert not loss_there(Reading(habit), [torch.randn(4, 3)]).shape and not fails
    except (RuntimeError, AssertionError) as error:
        assert fails and ("_local_scalar_dense" in str(error) or "convert all Tensors to FakeTensors" in str(error))


def test_what_passes_add_lies_where_the_graph_is():
    """Seen on the device `meta`, which no machine lacks."""
    module = fx.symbolic_trace(nn.Linear(2, 2, device="meta"))
    name = add_tensor(module, "kept", torch.tensor([1, 0]))
    assert module.get_buffer(name).device.type == "meta"
    deployed = Deployed(nn.Conv2d(3, 4, 3, device="meta"), Preprocess((0.5,) * 3, (0.5,) * 3))
    assert {tensor.device.type for tensor in deployed.buffers()} == {"meta"}


def test_comparisons_leave_torchs_settings_as_they_were():
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic
    with exact_arithmetic():
        assert (cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic) == (False, False, True)
    assert (cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic) == before
