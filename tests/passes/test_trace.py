"""Tracing: every capture method, what it records, what it refuses; inputs, outputs and modules as real models have them."""

from __future__ import annotations

import dataclasses
import importlib
import random
import warnings
from collections import namedtuple
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError, FrontendError
from indistill_fx.graph.interpret import run_looking
from indistill_fx.graph.module_state import digest, mode
from indistill_fx.passes.capture.captured import Request, tensors
from indistill_fx.passes.capture.equivalence import Reference
from indistill_fx.passes.capture.exported import capture_exported
from indistill_fx.passes.capture.functionalize import functionalize
from indistill_fx.passes.capture.recording import capture_leaves, capture_shapes
from indistill_fx.passes.capture.symbolic import capture_symbolic


def vectors(rows: int = 2, width: int = 4) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def same(module: nn.Module, traced: ifx.TracedModel, *given, **keywords) -> float:
    """Largest difference of graph and module, same seed, in the mode of the trace."""
    with mode(module, training=traced.role == "student"), torch.no_grad():
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        torch.manual_seed(5)
        expected = tensors(module(*given, **keywords))
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
        torch.manual_seed(5)
        got = tensors(traced.graph_module(*given, *keywords.values()))
    assert len(expected) == len(got) > 0
    return max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True))


class Outer(nn.Module):
    """Puts a module between two layers."""

    def __init__(self, inner: nn.Module, width: int = 4):
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(4, width), inner, nn.Linear(width, 3)

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


# ---- the methods ------------------------------------------------------------------------------------------------------
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


@pytest.mark.parametrize("capture", [capture_symbolic, capture_shapes, capture_leaves, capture_exported])
@pytest.mark.parametrize("training", [False, True])
def test_every_method_gives_the_same_layers_and_names(capture, training):
    module, x = Plain().train(training), torch.randn(2, 3, 8, 8)
    captured = capture(Request(module, (x,)))
    called = [str(node.target) for node in captured.graph_module.graph.nodes if node.op == "call_module"]
    assert called == ["conv", "norm", "drop", "head"]
    assert [name for name, _, _ in captured.outputs if name] == ["conv", "norm", "drop", "head"]
    own = dict(module.named_parameters())
    assert {name: own[name] is tensor for name, tensor in captured.graph_module.named_parameters()} == dict.fromkeys(
        own, True
    )


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x):
        b, _, h, w = x.shape
        if h == 8:
            x = self.conv(x)
        for k in range(w // 4):
            x = x + k
        return self.head(x.reshape(b, 4, h * w).mean(-1))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_sizes_decide_control_flow_and_the_report_says_so(rows):
    module = Decides()
    report = ifx.trace(module, torch.randn(rows, 3, 8, 8)).report
    first = Decides.forward.__code__.co_firstlineno
    assert report.method == "shapes"
    assert report.specialisations == (f"test_trace.py:{first + 2}: h == 8", f"test_trace.py:{first + 4}: range(w // 4)")
    assert [size for size, _ in report.checked] == [2, 3]


def test_a_decided_graph_works_for_other_batches():
    module = Decides()
    traced = ifx.trace(module, torch.randn(2, 3, 8, 8))
    assert same(module, traced, torch.randn(7, 3, 8, 8)) == 0


class PerSample(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.stack([self.layer(x[k]) for k in range(x.shape[0])])


def test_a_frozen_batch_size_is_refused_by_its_expression():
    with pytest.raises(FrontendError) as caught:
        ifx.trace(PerSample(), vectors())
    assert "`range(x.shape[0])` at test_trace.py" in str(caught.value)
    assert "decided by the batch size" in str(caught.value)
    assert caught.value.got == "range(x.shape[0])"


def test_a_submodule_that_freezes_the_batch_size_becomes_a_leaf():
    module = Outer(PerSample())
    traced = ifx.trace(module, vectors())
    assert (traced.report.method, traced.report.leaves) == ("leaves", ("inner",))
    assert same(module, traced, vectors(5)) == 0


class ByData(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.layer(x)
        return x


def test_data_dependent_flow_names_place_and_expression():
    line = ByData.forward.__code__.co_firstlineno + 1
    with pytest.raises(FrontendError) as caught:
        ifx.trace(ByData(), vectors())
    assert caught.value.where == f"test_trace.py:{line}"
    assert caught.value.got == "x.sum() > 0"
    assert f"decides by the data at test_trace.py:{line}: `x.sum() > 0`" in str(caught.value)
    assert "submodule of its own" in caught.value.hint


def test_the_smallest_untraceable_submodule_becomes_a_leaf():
    module = Outer(Outer(ByData()), 4)
    module.after = nn.Linear(3, 3)
    traced = ifx.trace(module, vectors(), role="student")
    assert (traced.report.method, traced.report.leaves) == ("leaves", ("inner.inner",))
    assert traced.report.refused[1].startswith("shapes: `inner.inner` decides by the data")
    assert traced.graph_module.get_submodule("inner.inner") is module.inner.inner
    assert same(module, traced, vectors(6)) == same(module, traced, -vectors(6)) == 0


def test_a_leaf_given_by_the_caller_is_one_node():
    traced = ifx.trace(Outer(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), vectors(), leaves=["inner"])
    assert [n.target for n in traced.graph_module.graph.nodes if n.op == "call_module"] == ["before", "inner", "after"]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def compiled(x: Tensor, parts: int):
        return x.view(x.shape[0], parts, -1).sum(1)


class CallsCompiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))

    def forward(self, x):
        if torch.compiler.is_exporting() and type(x) is Tensor:
            raise TypeError("torch.export has tensors without data")
        h = self.net(x)
        return h * compiled(h.repeat(1, 2), 2)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_torch_export_is_the_last_method(role):
    module = CallsCompiled()
    traced = ifx.trace(module, vectors(), role=role)
    assert [line.split(":")[0] for line in traced.report.refused] == ["symbolic", "shapes", "leaves"]
    assert traced.report.method == "export"
    assert {"net", "net.0", "net.1"} <= set(traced.taps)
    assert same(module, traced, vectors(5)) < 1e-6


def test_training_an_exported_student_trains_the_module():
    module = CallsCompiled()
    traced = ifx.trace(module, vectors(), role="student")
    assert traced.report.method == "export"
    before = module.net[0].weight.clone(), int(module.net[1].num_batches_tracked)
    optimizer = torch.optim.SGD(traced.graph_module.parameters(), 0.1)
    traced.graph_module(vectors(6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(module.net[0].weight, before[0])
    assert int(module.net[1].num_batches_tracked) == before[1] + 1


# ---- nothing is touched -----------------------------------------------------------------------------------------------
class FailsLate(nn.Module):
    """Draws random numbers, counts, changes an attribute, and then fails on any tracer."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.last = None
        self.norm.eval()

    def forward(self, x):
        self.calls += 1
        self.last = self.norm(self.layer(x)) + torch.rand(()) + random.random()
        return x * float(self.last.sum())


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_failed_trace_leaves_everything_as_it_was(role):
    module = FailsLate()
    before, state, python = digest(module), torch.get_rng_state(), random.getstate()
    with pytest.raises(FrontendError):
        ifx.trace(module, vectors(), role=role)
    assert digest(module) == before
    assert module.last is None
    assert (module.training, module.norm.training, module.layer.training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


class Normalises(nn.Module):
    """Writes its own weight in the forward, as some cosine classifiers do; `.data` moves no version counter."""

    def __init__(self, how: str, fails: bool = False):
        super().__init__()
        self.layer, self.how, self.fails = nn.Linear(4, 4, bias=False), how, fails

    def forward(self, x):
        weight = self.layer.weight
        if self.how == "replaced":
            self.layer.weight.data = F.normalize(weight.data, dim=1)
        else:
            weight.data.mul_(0.5)
        y = self.layer(x)
        return y if not self.fails or y.sum() > 0 else -y


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("how", "fails", "error"),
    [
        ("in place", False, None),
        ("in place", True, "decides by the data at test_trace.py"),
        ("replaced", False, "writes its parameter `layer.weight` at test_trace.py"),
        ("replaced", True, "writes its parameter `layer.weight` at test_trace.py"),
    ],
)
def test_weights_that_a_forward_writes_are_put_back(how, fails, error, role):
    module = Normalises(how, fails)
    before, place = digest(module), module.layer.weight.data_ptr()
    with pytest.raises(FrontendError, match=error) if error else nullcontext():
        ifx.trace(module, vectors(), role=role)
    assert (digest(module), module.layer.weight.data_ptr()) == (before, place)
    module(vectors())
    assert digest(module) != before  # the control: the forward does write


def test_a_submodule_that_writes_its_weights_stays_whole():
    module = Outer(Normalises("replaced"))
    traced = ifx.trace(module, vectors(), role="student")
    assert (traced.report.method, traced.report.leaves) == ("leaves", ("inner",))
    with torch.no_grad():
        module.inner.layer.weight.mul_(3)  # as an optimiser would
    assert same(module, traced, vectors(5)) < 1e-6


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("make", [Plain, Decides])
def test_a_trace_leaves_everything_as_it_was(make, role):
    module = make()
    before, state = digest(module), torch.get_rng_state()
    ifx.trace(module, torch.randn(2, 3, 8, 8, generator=torch.Generator()), role=role)
    assert digest(module) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_teacher_keeps_its_own_flags():
    module = Plain().train()
    traced = ifx.trace(module, torch.randn(2, 3, 8, 8))
    assert not any(part.training for part in traced.graph_module.modules())
    assert module.norm.training
    assert traced.graph_module.get_submodule("conv").weight is module.conv.weight


# ---- the comparison refuses what is wrong --------------------------------------------------------------------------------
class Bakes(nn.Module):
    """Takes data where no tracer sees it."""

    def forward(self, x):
        return x * compiled(x, 2).mean()


def test_hidden_data_is_found_by_comparison():
    captured = functionalize(capture_shapes(Request(Bakes(), (vectors(),))))
    x = vectors(2) + 1
    assert float((captured.graph_module(x) - Bakes()(x)).abs().max()) > 1e-2  # the recorder alone is fooled …
    assert "differs from the module" in ifx.trace(Bakes(), vectors()).report.refused[1]  # … the comparison is not


class Unrecorded(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.layer(x)


def test_a_buffer_that_the_graph_would_not_write_is_found():
    module = Unrecorded()
    captured = functionalize(capture_shapes(Request(module, (vectors(),))))
    module.mean = torch.zeros(4)
    graph = captured.graph_module.graph
    (write,) = (node for node in graph.nodes if node.target == "copy_")
    Reference(module, (vectors(),), {}).compare(captured.graph_module)
    graph.erase_node(write)
    captured.graph_module.recompile()
    with pytest.raises(FrontendError, match="leaves another value in the buffer `mean`"):
        Reference(module, (vectors(),), {}).compare(captured.graph_module)


class StopsGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            target = self.layer(x).relu()
        return self.layer(x) - target


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Reverses(nn.Module):
    def forward(self, x):
        return Reverse.apply(x)


@pytest.mark.parametrize(
    ("inner", "method", "leaves"), [(StopsGradient, "shapes", ()), (Reverses, "leaves", ("inner:Reverse",))]
)
def test_gradients_of_a_student_are_the_modules(inner, method, leaves):
    module = Outer(inner())
    traced = ifx.trace(module, vectors(), role="student")
    assert (traced.report.method, traced.report.leaves) == (method, leaves)
    parameters = list(module.parameters())
    expected = torch.autograd.grad(module(vectors(5)).square().sum(), parameters)
    got = torch.autograd.grad(traced.graph_module(vectors(5)).square().sum(), parameters)
    torch.testing.assert_close(got, expected)


# ---- inputs and outputs ---------------------------------------------------------------------------------------------------
class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(6, 8)

    def forward(self, x, *, y, scale=1.0, unused=None):
        return {"logits": self.a(x) + self.b(y) * scale, "aux": (self.a(x), [self.b(y)])}


def test_keyword_inputs_and_nested_outputs():
    module, y = TwoInputs(), vectors(2, 6)
    traced = ifx.trace(module, vectors(), example_kwargs={"y": y, "scale": 2.0}, logits="logits")
    assert same(module, traced, vectors(5), y=vectors(5, 6), scale=2.0) == 0
    assert traced.graph_module(vectors(), y, 2.0)["aux"][1][0].shape == (2, 8)
    assert traced.logits == "add"
    with pytest.raises(FrontendError, match="no entry 'x'; it has logits, aux"):
        ifx.trace(module, vectors(), example_kwargs={"y": y}, logits="x")


class NestedInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch):
        return sum(self.layer(batch["image"]) * mask for mask in batch["masks"])


class NestedDecides(NestedInput):
    def forward(self, batch):
        return super().forward(batch) if "image" in batch and batch["image"].shape[1] == 4 else None


@pytest.mark.parametrize(("make", "method"), [(NestedInput, "symbolic"), (NestedDecides, "shapes")])
def test_nested_inputs(make, method):
    module = make()
    traced = ifx.trace(module, [{"image": vectors(), "masks": [vectors(), vectors() + 1]}])
    assert traced.report.method == method
    assert same(module, traced, {"image": vectors(5), "masks": [vectors(5), vectors(5) * 2]}) == 0


Pair = namedtuple("Pair", "logits hidden")


@dataclasses.dataclass
class Record:
    logits: Tensor
    hidden: Tensor | None = None


class Returns(nn.Module):
    def __init__(self, kind, decide):
        super().__init__()
        self.layer, self.kind, self.decide = nn.Linear(4, 4), kind, decide

    def forward(self, x):
        if self.decide and x.shape[1] != 4:
            return x
        h = self.layer(x)
        return self.kind(h, h.relu())


@pytest.mark.parametrize("kind", [Pair, Record])
@pytest.mark.parametrize("decide", [False, True])
def test_outputs_keep_their_type(kind, decide):
    module = Returns(kind, decide)
    traced = ifx.trace(module, vectors(), logits="hidden")
    assert isinstance(traced.graph_module(vectors()), kind)
    assert same(module, traced, vectors(5)) == 0
    assert traced.logits == "relu"


def test_a_forward_that_fails_is_told_as_such():
    with pytest.raises(FrontendError) as caught:
        ifx.trace(nn.Linear(5, 5), vectors())
    assert caught.value.where == "forward"
    assert "fails on the example input 2x4" in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "also"),
    [(torch.float64, r", or the model be in torch\.float64 \(model\.to\(torch\.float64\)\)"), (torch.uint8, "")],
)
def test_inputs_of_another_dtype_than_the_weights_are_told_as_such(dtype, also):
    """The advice was to check the shape, and of a teacher its size."""
    told = rf"weights are torch\.float32, an input is {dtype}: let the loader give it as .* \(x\.to\(torch\.float32\)\){also}\.$"
    with pytest.raises(FrontendError, match=told):
        ifx.trace(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8, dtype=dtype))


# ---- modules ---------------------------------------------------------------------------------------------------------------
class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Linear(4, 4, bias=False), nn.ReLU(inplace=True)
        self.b = self.a
        self.c = nn.Linear(4, 4, bias=False)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(self.act(self.b(self.act(self.a(x)))))


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("capture", [capture_symbolic, capture_shapes, capture_exported])
def test_shared_modules_and_tied_weights(capture, role, monkeypatch):
    monkeypatch.setattr(importlib.import_module("indistill_fx.passes.capture.trace"), "_METHODS", {"only": capture})
    module = Reused()
    traced = ifx.trace(module, vectors(), role=role)
    assert list(traced.graph_module.parameters()) == [module.a.weight]
    assert {"a", "a@2", "act", "act@2", "c"} <= set(traced.taps)
    assert same(module, traced, vectors(5)) == 0


class TwiceBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) + x


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = TwiceBlock()

    def forward(self, x):
        return self.block(self.block(x))


@pytest.mark.parametrize("capture", [capture_symbolic, capture_shapes, capture_exported])
def test_facts_name_the_call_of_a_reused_module(capture, monkeypatch):
    monkeypatch.setattr(importlib.import_module("indistill_fx.passes.capture.trace"), "_METHODS", {"only": capture})
    traced = ifx.trace(Twice(), vectors())
    calls = {name: traced.facts_of(name) for name in ("block.layer", "block", "block.layer@2", "block@2")}
    assert {name: facts.module for name, facts in calls.items()} == {
        "block.layer": "block",
        "block": "block",
        "block.layer@2": "block@2",
        "block@2": "block@2",
    }
    assert {facts.path for facts in calls.values()} == {"block"}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_parametrized_weights(role):
    norm = torch.nn.utils.parametrizations
    module = nn.Sequential(norm.weight_norm(nn.Linear(4, 4)), nn.ReLU(), norm.spectral_norm(nn.Linear(4, 3)))
    before = digest(module)
    traced = ifx.trace(module, vectors(), role=role)
    assert digest(module) == before
    assert same(module, traced, vectors(5)) == 0
    assert not role.startswith("t") or not any(part.training for part in traced.graph_module.modules())


def test_torchscript_is_answered():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(FrontendError, match="TorchScript program, which holds no Python code") as caught:
        ifx.trace(module, vectors())
    assert "compiled from" in caught.value.hint


class Writes(nn.Module):
    """In-place operations of all kinds on tensors, parts of tensors and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1)
        y = self.conv(x)
        z = y.clone()
        z[:, 0] = 0
        z[:, 1:3] += y[:, 1:3]
        z[:, 3].mul_(2)
        y += 1
        y.relu_()
        a, b = y.clone().split(2, 1)
        a = a + self.seen
        noise = torch.zeros(x.shape[0], 4, 1, 1, device=x.device)
        noise.uniform_()
        return torch.cat([a, b, z], 1) + torch.cat([noise, noise], 1)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_writes_are_made_functional_but_state_is_written(role):
    module, x = Writes(), torch.randn(2, 3, 4, 4)
    traced = ifx.trace(module, x, role=role)
    assert same(module, traced, torch.randn(5, 3, 4, 4)) == 0
    seen = float(module.seen)
    traced.graph_module(x)
    assert float(module.seen) == seen + (role == "student")  # a teacher's graph has a buffer of its own
    assert float(traced.graph_module.seen) > seen
    assert traced.facts["conv"].shape == (2, 4, 4, 4)


class UNet3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.mid = nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 4, 1)
        self.up, self.head = nn.ConvTranspose3d(4, 4, 2, 2), nn.Conv3d(5, 2, 1)

    def forward(self, x):
        return self.head(torch.cat([x, self.up(self.mid(self.down(x)).relu())], 1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lstm, self.head = (
            nn.Conv1d(3, 6, 3, padding=1),
            nn.LSTM(6, 5, batch_first=True),
            nn.Linear(5, 2),
        )

    def forward(self, x):
        out, (hidden, _) = self.lstm(self.conv(x).transpose(1, 2))
        return self.head(out[:, -1]) + self.head(hidden[-1])


class Packed(nn.Module):
    """Sequences of several lengths, packed and padded again."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(6, 2)
        self.lstm = nn.LSTM(4, 3, batch_first=True, bidirectional=True)

    def forward(self, ids, lengths):
        rnn = nn.utils.rnn
        packed = rnn.pack_padded_sequence(self.embed(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, (hidden, _) = self.lstm(packed)
        padded, _ = rnn.pad_packed_sequence(out, batch_first=True)
        return self.head(padded.sum(1)) + self.head(torch.cat([hidden[0], hidden[1]], 1))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_packed_sequences(role):
    module = Packed()
    ids = torch.arange(10).remainder(9).view(2, 5)
    traced = ifx.trace(module, (ids, torch.tensor([3, 5])), role=role)
    assert (traced.report.method, traced.report.leaves) == ("shapes", ())
    assert [n.target for n in traced.graph_module.graph.nodes if n.op == "call_module"][:2] == ["embed", "lstm"]
    more = torch.arange(20).remainder(9).view(4, 5)
    assert same(module, traced, more, torch.tensor([1, 5, 4, 2])) == 0


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.tokens, self.channels, self.head = nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm(x))
        return self.head(x.mean(1))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("make", "shape", "method"),
    [
        (UNet3d, (1, 4, 4, 4), "symbolic"),
        (Recurrent, (3, 6), "symbolic"),
        (Mixer, (3, 8, 8), "symbolic"),
        (encoder, (5, 8), "shapes"),
    ],
)
def test_kinds_of_networks(make, shape, method, role):
    module = make()
    traced = ifx.trace(module, torch.randn(2, *shape), role=role)
    assert (traced.report.method, traced.report.leaves) == (method, ())
    assert same(module, traced, torch.randn(5, *shape)) < 1e-6


def test_facts_of_layers_of_many_kinds():
    unet = ifx.trace(UNet3d(), torch.randn(2, 1, 4, 4, 4))
    assert (unet.facts["up"].kind, unet.facts["up"].channel_axis, unet.facts["down"].stride) == (
        "map",
        1,
        (2.0, 2.0, 2.0),
    )
    assert unet.facts["down"].macs == 4 * 27 * 8
    lstm = ifx.trace(Recurrent(), torch.randn(2, 3, 6))
    part = lstm.facts_of("lstm[0]")
    assert (part.shape, part.kind, part.channel_axis, part.batch_axis) == ((2, 6, 5), "tokens", 2, 0)
    assert part.macs > 0
    mixer = ifx.trace(Mixer(), torch.randn(2, 3, 8, 8))
    assert (mixer.facts["add"].kind, mixer.facts["add"].channel_axis) == ("tokens", 2)
    assert mixer.facts["norm"].parameters == 16


class AlmostAlike(nn.Module):
    """Layers that print alike, or are of one class, and compute other shapes."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        own = self.other.forward
        self.other.forward = lambda x: F.pad(own(x), (1, 1, 1, 1))
        self.floor, self.ceil = nn.AvgPool2d(3, 2), nn.AvgPool2d(3, 2, ceil_mode=True)
        self.alone, self.places = nn.MaxPool2d(2), nn.MaxPool2d(2, return_indices=True)
        self.relu = nn.ReLU()
        self.relu.forward = lambda x: torch.cat([x, x], 2)

    def forward(self, x):
        a, b = self.conv(x), self.relu(self.other(x))
        a, b = self.floor(a) + self.floor(a), self.ceil(a).mean((2, 3)) + b.mean((2, 3))
        values = self.places(a)[0]
        return b + self.alone(a).mean((-1, -2)) + values.mean((-1, -2))


def test_layers_that_print_alike_are_not_taken_for_each_other():
    x = torch.randn(2, 3, 18, 18)
    traced = ifx.trace(AlmostAlike(), x)
    shapes = {}

    def look(node, value):
        if isinstance(value, Tensor):
            shapes[node.name] = tuple(value.shape)

    run_looking(traced.graph_module, look, x)
    assert shapes == {name: facts.shape for name, facts in traced.facts.items()}


def test_auxiliary_heads_in_train_mode():
    from torchvision.models import googlenet

    module = googlenet(weights=None, init_weights=False, num_classes=3)
    traced = ifx.trace(module, torch.randn(2, 3, 32, 32), role="student")
    assert traced.tap_name(traced.logits) == "fc"
    assert len(tensors(traced.graph_module(torch.randn(2, 3, 32, 32)))) == 3


@pytest.mark.parametrize(("role", "mask"), [("teacher", True), ("student", False)])
def test_bert(role, mask):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    module = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    keywords = {"input_ids": ids, "attention_mask": (ids > 5).long()} if mask else {"input_ids": ids}
    traced = ifx.trace(module, (), example_kwargs=keywords, role=role, logits="logits")
    assert traced.report.method == "shapes"
    assert type(traced.graph_module(*keywords.values())) is transformers.modeling_outputs.SequenceClassifierOutput
    wider = {key: value.repeat(3, 1)[:5] for key, value in keywords.items()}
    assert same(module, traced, **wider) < 1e-6
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1.output", "classifier"} <= set(traced.taps)
    assert traced.facts_of("bert.encoder.layer.0").kind == "tokens"


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("batch", [2, 3, 5])
def test_a_model_that_takes_only_one_batch_size_is_traced(batch: int, role: str) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.memory = nn.Linear(6, 8), nn.Parameter(torch.randn(batch, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.embed(x) * self.memory
            return y

    traced = ifx.trace(Fixed(), torch.randn(batch, 6), role=role)
    assert any(f"only {batch} was checked" in note for note in traced.report.notes)


@pytest.mark.parametrize("capture", [capture_symbolic, capture_shapes, capture_exported])
def test_inputs_are_named_as_the_forward_names_its_arguments(capture) -> None:
    """Whatever it calls the module itself; further positional arguments are numbered, and never take a keyword's name."""

    class Net(nn.Module):
        def forward(this, image, *rest, scale=None):  # type: ignore[no-untyped-def]  # noqa: N805
            return sum((part.mean() for part in rest), image * (1 if scale is None else scale))

    inputs = torch.randn(3, 4), torch.randn(3, 2), torch.randn(3, 2)
    for given, names in ((inputs[:1], ["image"]), (inputs, ["image", "rest", "input_2"])):
        graph = capture(Request(Net(), given)).graph_module.graph
        assert [node.name for node in graph.nodes if node.op == "placeholder"] == names


class Picture(NamedTuple):
    image: Tensor
    scale: Tensor


@dataclasses.dataclass
class Scene:
    image: Tensor
    scale: Tensor


class OfAnObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, seen):
        return self.layer(seen.image * seen.scale)


@pytest.mark.parametrize("make", [Picture, Scene, lambda **tensors: SimpleNamespace(**tensors)])
def test_tensors_in_objects_are_not_made_constants(make):
    """The graph held the example's own tensors, and did not depend on its input; it was said to equal the module."""
    seen = make(image=torch.randn(2, 3, 8, 8), scale=torch.rand(2, 1, 1, 1))
    for given in ((seen,), ([seen],), ({"seen": seen},)):
        with pytest.raises(
            ConfigError, match=rf"^The input `0` is a {type(seen).__name__} that holds tensors \(image, scale\)"
        ):
            ifx.trace(OfAnObject(), given)
    with pytest.raises(ConfigError, match="that holds tensors"):
        ifx.trace(OfAnObject(), example_inputs=(), example_kwargs={"seen": seen})


class Routes(nn.Module):
    """The router of a mixture of experts: it scales the shares of the best in place."""

    def __init__(self, best):
        super().__init__()
        self.gate, self.best = nn.Linear(4, 6), best

    def forward(self, x):
        if x.shape[-1] != 4:  # what symbolic tracing cannot decide; there, `/=` would write nothing
            raise ValueError(x.shape)
        shares, places = self.best(self.gate(x).softmax(-1))
        shares /= shares.sum(-1, keepdim=True) + 1
        return shares * places


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    "best",
    [
        lambda x: x.topk(2, -1),
        lambda x: x.sort(-1),
        lambda x: x.max(-1, keepdim=True),
        lambda x: torch.cummax(x, 1),
        lambda x: x.kthvalue(2, -1, keepdim=True),
    ],
    ids=["topk", "sort", "max", "cummax", "kthvalue"],
)
def test_values_that_an_operation_returns_beside_others_may_be_written(best, role):
    module = Routes(best)
    traced = ifx.trace(module, vectors(), role=role)
    assert (traced.report.method, traced.report.leaves) == ("shapes", ())
    assert same(module, traced, vectors(5)) == 0
