"""The rewrites for bfloat16 and for GPUs: the same bits where a cast is only made earlier, one layout from end to end."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.passes.capture import equivalence
from indistill_fx.passes.extract.fold import fold
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.cast_weights import InDtype, cast_weights
from indistill_fx.passes.lowering.fused_conv import CudnnConv, fuse_convolutions
from indistill_fx.passes.lowering.layout import keep_channels_last, laid_out
from indistill_fx.passes.lowering.table import LOWERINGS, Lowerings
from indistill_fx.training.loop import TrainingLoop
from tests.nets import Cnn32, Residual, images, seeded

WHOLE = Lowerings(("fuse_cudnn", *LOWERINGS["cuda reduced"].teacher), LOWERINGS["cuda reduced"].student)
FORMAT = torch.channels_last


def frozen(module: nn.Module, taps: list[str], x: Tensor):
    traced = ifx.trace(module.eval(), x, role="teacher")
    return fold(cut(traced, taps).value).value, traced.facts


class Attention(nn.Module):
    """A convolution, attention and a linear layer: all that is cast; and a norm, which is not."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.attention, self.last = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(("make", "tap"), [(Residual, "layer3"), (Attention, "last")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_cast_once_give_the_bits_of_weights_cast_in_every_step(make, tap, dtype, monkeypatch):
    # Torch leaves attention's fast path under a GPU's autocast; under a CPU's it takes it, in float32.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    x = images(3)
    graph, _ = frozen(seeded(make), [tap], x)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    result = cast_weights(graph, dtype)
    assert len(result.report.done) == len([part for part in result.value.modules() if isinstance(part, InDtype)]) > 0
    inside = [p for part in result.value.modules() if isinstance(part, InDtype) for p in part.parameters()]
    assert all(p.dtype == dtype and not p.requires_grad for p in inside)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected, found = graph(x)[0][tap], result.value(x)[0][tap]
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)
    for name, value in graph.state_dict().items():  # a pass changes nothing
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype
    with torch.no_grad():  # in a loop without autocast: in that dtype, delivered in the input's
        plain, found = graph(x)[0][tap], result.value(x)[0][tap]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0.1, atol=0.05)
    assert not torch.equal(found, plain)


def test_there_is_nothing_to_cast_for_float32_and_nothing_that_is_trained():
    x = images(2)
    graph, _ = frozen(seeded(Residual), ["layer3"], x)
    assert cast_weights(graph, torch.float32).value is graph is cast_weights(graph, None).value
    for parameter in graph.parameters():
        parameter.requires_grad_()
    assert cast_weights(graph, torch.bfloat16).value is graph


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))


def test_a_layer_that_is_called_twice_is_cast_once():
    graph, _ = frozen(seeded(Shared), ["twice@2"], images(2))
    found = cast_weights(graph, torch.bfloat16)
    assert len(found.report.done) == 2
    assert len([node for node in found.value.graph.nodes if node.op == "call_module" and "cast" in node.target]) == 3


def strides(graph, x: Tensor) -> list[bool]:
    """Whether each convolution sees and gives channels last."""
    found: list[bool] = []
    for part in graph.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(
                lambda module, inputs, value: found.append(
                    inputs[0].is_contiguous(memory_format=FORMAT) and value.is_contiguous(memory_format=FORMAT)
                )
            )
    graph(x)
    return found


def test_channels_last_from_end_to_end_and_as_usual_at_the_taps():
    x, taps = images(4), ["layer1", "layer2", "layer3"]
    graph, _ = frozen(seeded(Residual), taps, x)
    expected = graph(x)[0]
    result = keep_channels_last(graph, frozen=True)
    found = result.value(x)[0]
    for tap in taps:
        torch.testing.assert_close(found[tap], expected[tap], rtol=1e-4, atol=1e-5)
        assert found[tap].is_contiguous()
    assert all(p.is_contiguous(memory_format=FORMAT) for p in result.value.parameters() if p.ndim == 4)
    assert all(p.is_contiguous() for p in graph.parameters())
    assert all(strides(result.value, x))
    assert not any(strides(graph, x))


class Viewing(nn.Module):
    """Takes one piece of memory for another shape, which channels last allows no longer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.last(x.view(x.size(0), -1))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unsqueeze(1))


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(self.conv(x), 1)


def test_a_view_gets_the_usual_layout_before_it():
    x, net = images(2, 32), seeded(Viewing)
    traced = ifx.trace(net, x, role="student")
    graph = cut(traced, ["last"]).value
    found = keep_channels_last(graph, frozen=False).value
    assert all(strides(found, x))
    torch.testing.assert_close(found(x)[0]["last"], graph(x)[0]["last"])
    assert found.get_submodule("conv") is net.conv  # a student's layers are the user's own


@pytest.mark.parametrize(
    ("make", "tap", "reason"),
    [
        (Volume, "conv", "conv: not 2-d"),
        (Strided, ":cumsum", "cumsum: it is not known whether `cumsum` works in any layout"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), "1", "no convolutions"),
    ],
)
def test_where_it_cannot_be_nothing_is_done_and_the_reason_is_kept(make, tap, reason):
    traced = ifx.trace(seeded(make), images(2, 32), role="student")
    graph = cut(traced, [tap]).value
    result = keep_channels_last(graph, frozen=False)
    assert result.value is graph and result.report.skipped == (reason,) and not result.report.done


def test_a_students_weights_are_laid_out_for_a_while():
    net = seeded(Residual)
    before = copy.deepcopy(net.state_dict())
    identity, usual = [id(p) for p in net.parameters()], [p.stride() for p in net.parameters()]
    with laid_out(net):
        assert all(p.is_contiguous(memory_format=FORMAT) for p in net.parameters() if p.ndim == 4)
        assert any(not p.is_contiguous() for p in net.parameters())
    assert [id(p) for p in net.parameters()] == identity and [p.stride() for p in net.parameters()] == usual
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    theirs = net.to(memory_format=FORMAT)
    usual = [p.stride() for p in theirs.parameters()]
    with laid_out(theirs):
        pass
    assert [p.stride() for p in theirs.parameters()] == usual


def test_all_rewrites_together_give_the_stage_its_loss_and_gradients():
    x, found = images(4, 32), []
    for lowerings in (Lowerings(), WHOLE, WHOLE.without("fuse_cudnn"), WHOLE.without("channels_last")):
        teacher, student = seeded(lambda: Cnn32((16, 32, 64), 128)), seeded(Cnn32)
        stage = ifx.compile_stages(teacher, student, example_inputs=x, lowerings=lowerings)[0].train()
        loss = stage(x)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in student.parameters() if p.grad is not None]))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-7)
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    target = ifx.Target("cpu", torch.bfloat16)
    stage = ifx.compile_stages(teacher, student, example_inputs=x, target=target, lowerings=WHOLE)[0].train()
    assert any(p.dtype == torch.bfloat16 for p in stage.teacher.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert stage(x).isfinite()


class Summed(nn.Module):
    """Convolution, norm, ReLU and max-pooling; then, if asked, an operation of which nobody knows whether it takes any layout."""

    def __init__(self, sums: bool):
        super().__init__()
        self.conv, self.norm, self.pool, self.sums = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2), sums

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return (torch.cumsum(x, 1) if self.sums else x).mean((2, 3))


@pytest.mark.parametrize("sums", [False, True])
def test_in_bfloat16_the_stem_alone_is_channels_last_where_the_whole_cannot_be(sums):
    x, student = images(4, 32), seeded(lambda: Summed(sums))
    teacher, target = seeded(lambda: Summed(False)), ifx.Target(dtype=torch.bfloat16)
    plan = ifx.align(teacher, student, example_inputs=x, fixed=[("pool", "pool")])
    stages = [
        ifx.compile_stages(teacher, student, plan, main="kd", example_inputs=x, **chosen)[-1].train()
        for chosen in ({"target": target}, {"lowerings": Lowerings()})
    ]
    done = {record.name: bool(record.done) for record in stages[0].report.student}
    assert (done["channels_last"], done["stem_channels_last"]) == (not sums, sums)
    for stage in stages:
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = stage((x, torch.arange(4)))
        loss.backward()
        found = loss.detach(), [p.grad.clone() for p in student.parameters()]
        if stage is stages[0]:
            expected = found
    torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=1e-3)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.02)


def test_cudnn_gets_the_sum_and_the_relu_and_elsewhere_the_stock_operations_run(monkeypatch):
    """By a stand-in for cuDNN with the arguments of torch's documentation."""
    calls: list[str] = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("relu")
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append("add_relu")
        return F.relu(
            F.conv2d(x, weight, bias, stride, padding, dilation, groups) + (1 if alpha is None else alpha) * z
        )

    x, taps = images(4), ["layer1", "layer2", "layer3"]
    graph, facts = frozen(seeded(Residual), taps, x)
    fused = fuse_convolutions(graph, facts, CudnnConv).value
    parts = [part for part in fused.modules() if isinstance(part, CudnnConv)]
    assert parts and all(part.relu for part in parts)
    with torch.no_grad():
        expected, stock = graph(x)[0], fused(x)[0]
        assert calls == []
        monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
        monkeypatch.setattr(CudnnConv, "_applies", lambda self, x: True)
        found = fused(x)[0]
    assert set(calls) == {"relu", "add_relu"} and len(calls) == len(parts)
    for tap in taps:
        torch.testing.assert_close(stock[tap], expected[tap], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[tap], expected[tap], rtol=1e-4, atol=1e-5)


def test_the_table_knows_what_a_gpu_computes_in(monkeypatch):
    import indistill_fx.target as targets

    monkeypatch.setattr(targets, "available_devices", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    kinds = [ifx.Target("cuda", dtype).kind for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert kinds == ["cuda", "cuda reduced", "cuda reduced"]
    assert ifx.Target("cuda", torch.bfloat16, compiled=True).kind == "cuda compiled"
    assert replace(WHOLE, dtype=torch.float16).without("channels_last").dtype == torch.float16


def test_a_run_channels_last_is_resumed_to_the_same_bits_and_leaves_the_student_as_usual(tmp_path, monkeypatch):
    """Fused optimisers take their state in the parameters' layout alone, and a checkpoint holds the usual one."""
    monkeypatch.setitem(LOWERINGS, "cpu", replace(WHOLE, teacher=("channels_last",)))  # type: ignore[arg-type]
    batches = [(images(4, 32, seed=k), torch.arange(4)) for k in range(4)]
    options = {"epochs": 1, "curriculum": ifx.Curriculum(lengths=[1, 1, 1]), "progress": False, "device": "cpu"}
    teacher, whole, original = seeded(lambda: Cnn32((16, 32, 64), 128)), seeded(Cnn32), TrainingLoop._after_step
    layouts: list[bool] = []

    def stopping(loop, phase, optimizer) -> None:
        original(loop, phase, optimizer)
        layouts.append(
            all(p.is_contiguous(memory_format=FORMAT) for p in phase.module.student.parameters() if p.ndim == 4)
        )
        if len(layouts) == stop_after:
            raise RuntimeError("pulled the plug")

    monkeypatch.setattr(TrainingLoop, "_after_step", stopping)
    stop_after = 0
    record = ifx.distill(teacher, whole, batches, run_dir=tmp_path / "whole", **options)
    assert all(layouts) and len(layouts) == 16 and all(p.is_contiguous() for p in whole.parameters())
    torn, stop_after = {**options, "run_dir": tmp_path / "torn", "checkpoint_every_steps": 1}, 16 + 6
    with pytest.raises(RuntimeError, match="pulled the plug"):
        ifx.distill(teacher, seeded(Cnn32), batches, **torn)
    again = seeded(Cnn32)
    resumed = ifx.distill(teacher, again, batches, resume=True, **torn)
    assert resumed.steps == record.steps
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_is_compared_in_tracing_has_the_same_bits_twice(monkeypatch):
    """On a GPU, convolutions may add in another order each time."""
    seen: list[tuple[bool, bool]] = []
    original, cudnn = equivalence._forward, torch.backends.cudnn
    monkeypatch.setattr(
        equivalence, "_forward", lambda module: seen.append((cudnn.deterministic, cudnn.allow_tf32)) or original(module)
    )
    ifx.trace(seeded(Shared), images(2))
    assert len(seen) > 1 and set(seen) == {(True, False)} and not cudnn.deterministic and cudnn.allow_tf32
