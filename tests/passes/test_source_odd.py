"""Networks as source code, as people write them: state that changes, odd names, layers of one mode, sizes, constants."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.compression.basis import train_as
from indistill_fx.compression.write_source import source_of


class Two(nn.Module):
    """Two layers, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("center", torch.zeros(8))


class Updated(Two):
    """The buffer is written after its last read, in train mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = self.b(h - self.center)
        if self.training:
            self.center.copy_(0.9 * self.center + 0.1 * h.detach().mean(0))
        return y  # type: ignore[no-any-return]


class Chained(Two):
    """Two writes in a row."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = self.b(h - self.center)
        self.center.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return y  # type: ignore[no-any-return]


class OwnNorm(Two):
    """Statistics by hand, a value that nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            mean, variance = h.mean(0), h.var(0, unbiased=False)
            self.center.lerp_(mean.detach(), 0.1)
        else:
            mean, variance = self.center, torch.ones_like(self.center)
        return self.b((h - mean) / (variance + 1e-5).sqrt())  # type: ignore[no-any-return]


class Frozen(nn.Module):
    """A projection by buffers is not a layer that trains."""

    class Rand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(8, 8))
            self.register_buffer("bias", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rand, self.b = nn.Linear(8, 8), self.Rand(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.rand(self.a(x))))  # type: ignore[no-any-return]


class Places(nn.Module):
    """A parameter of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.places = nn.Linear(8, 8), nn.Parameter(torch.tensor([0, 3, 2]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)[:, self.places]  # type: ignore[no-any-return]


class Keys(Two):
    """Outputs by number and by an odd key."""

    def forward(self, x: Tensor) -> dict[object, Tensor]:
        h = self.a(x) - self.center
        return {0: h, 'a"b': self.b(h)}


class Handed(nn.Module):
    """A parameter of the network is handed to a block that has one of the same name, or a layer."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8) * 2)

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return F.relu(self.fc(x) + scale) * self.scale + shift

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.block, self.head = self.Block(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x, self.scale, self.fc))  # type: ignore[no-any-return]


class Warm(nn.Module):
    """A Sequential with a parameter of its own."""

    class Body(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.temperature = nn.Parameter(torch.tensor(2.0))

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = self.Body(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) / self.body.temperature  # type: ignore[no-any-return]


class DropsInTraining(nn.Module):
    """A layer that is only called in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = self.drop(x)
        return self.b(x)  # type: ignore[no-any-return]


class Sizes(nn.Module):
    """Long arithmetic of sizes; in train mode alone, too."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        b, _, h, w = x.shape
        many = b * h * w + h * w * w + b * b * h + w * w * b * h + h * h * h * w + b * h * w * w * w
        if self.training:
            x = x + torch.randn_like(x) * (1.0 / (b * h * w + h * w * w + b * b * h + w * w * b * h + h * h * h * w))
        return x * (1.0 / many)


class Taken(nn.Module):
    """Arguments that differ are called like a buffer of the block."""

    class Block(nn.Module):
        def __init__(self, axis: int, eps: float) -> None:
            super().__init__()
            self.fc, self.axis, self.tiny = nn.Linear(8, 8), axis, eps
            self.register_buffer("dim", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(self.fc(x) + self.dim, dim=self.axis, eps=self.tiny)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = self.Block(-1, 1e-3), self.Block(0, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


class Keywords(nn.Module):
    """Names that are words of the language."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.ModuleDict({"in": nn.Linear(8, 8), "class": nn.Linear(8, 3)})
        setattr(self, "lambda", nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.m["class"](getattr(self, "lambda")(self.m["in"](x).relu()))  # type: ignore[no-any-return]


class NoNumbers(Two):
    """A view as a number."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) - self.center
        return self.b(h) * h.mean().reshape(())  # type: ignore[no-any-return]


class NormOfTheList(nn.Module):
    """A ModuleList with a layer that has a name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.blocks.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:4]:
            x = block(x)
        return self.blocks.norm(x)  # type: ignore[no-any-return, operator]


class Imaginary(nn.Module):
    """A complex constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(self.a(x) * 1j)


class WithoutInputs(nn.Module):
    """A block without inputs; a name that ends like the one of torch.nn.functional."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8))

        def forward(self) -> Tensor:
            return self.w.tanh() * 2

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.netF = self.Scale(), nn.Module()
        self.netF.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.netF.out(x * self.scale())  # type: ignore[no-any-return, operator]


class LongOutputs(nn.Module):
    """A dict that does not fit into one line."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(4)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"a_long_key_for_the_output_number_{k}": head(x) for k, head in enumerate(self.heads)}


class Noise(nn.Module):
    """Stochastic depth by hand, three times with other shares."""

    class Block(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share, self.fc = share, nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            if self.training:
                mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.share)
                x = x * mask / (1 - self.share)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = self.Block(0.1), self.Block(0.2), self.Block(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))  # type: ignore[no-any-return]


class ByKeyword(nn.Module):
    """A function that gets its input by keyword."""

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(input=x)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), self.Act(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))  # type: ignore[no-any-return]


class Looked(nn.Module):
    """The rows of an embedding, looked up by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = x.abs().mul(3).long().clamp(0, 9)
        return self.a(F.embedding(places, self.table.weight).mean(1) + x)  # type: ignore[no-any-return]


class Shared(nn.Module):
    """Two blocks hold one buffer; the one that writes it comes last."""

    class Block(nn.Module):
        def __init__(self, mean: Tensor, *, writes: bool) -> None:
            super().__init__()
            self.fc, self.writes = nn.Linear(8, 8), writes
            self.register_buffer("mean", mean)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x) - self.mean
            if self.writes:
                self.mean.add_(x.detach().mean(0))
            return x

    def __init__(self) -> None:
        super().__init__()
        mean = torch.zeros(8)
        self.one, self.two = self.Block(mean, writes=False), self.Block(mean, writes=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))  # type: ignore[no-any-return]


class NumpyNumbers(nn.Module):
    """Constants computed by numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.parts = nn.Linear(8, 8), np.int64(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * np.sqrt(0.1)
        if self.training:
            h = h + torch.randn_like(h) * np.float32(0.3)
        return h.view(h.shape[0], self.parts, -1).mean(1)


NETWORKS = [
    Updated, Chained, OwnNorm, Frozen, Places, Keys, Handed, Warm, DropsInTraining, Sizes, Taken, Keywords, NoNumbers, NormOfTheList,
    Imaginary, WithoutInputs, LongOutputs, Noise, ByKeyword, Looked, Shared, NumpyNumbers,
]  # fmt: skip


def outcome(module: nn.Module, x: Tensor, *, training: bool) -> tuple[list[object], list[Tensor]]:
    """Two calls and a backward: the keys of the output; outputs, gradients and buffers."""
    module = copy.deepcopy(module)
    for part in module.modules():
        part.training = training
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    results = [module(x), module(x)]
    keys = list(results[0]) if isinstance(results[0], dict) else []
    outputs = [value for result in results for value in (result.values() if keys else [result])]
    torch.stack([value.square().sum() for value in outputs]).sum().backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    rest = sorted([*grads, *(b.double() for b in module.buffers())], key=lambda t: (tuple(t.shape), float(t.sum())))
    assert x.grad is not None
    return keys, [*(value.detach() for value in outputs), x.grad, *rest]


@pytest.mark.parametrize("make", NETWORKS)
def test_what_people_write(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, shape = make(), (3, 8, 8) if make is Sizes else (8,)
    source = source_of(ifx.trace(net, (torch.randn(2, *shape),), role="student"))
    student, x = source.build(), torch.randn(5, *shape)
    for training in (False, True):
        (keys, expected), (own_keys, got) = (outcome(one, x, training=training) for one in (net, student))
        assert keys == own_keys and len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one)
    assert source.state.keys() == net.state_dict().keys() - ({"two.mean"} if make is Shared else set())
    assert max(map(len, source.text.splitlines())) <= 120
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "-"]
    checked = subprocess.run(ruff, input=source.text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_a_pass_keeps_writes_in_a_row() -> None:
    """`x.mul_(2).add_(1)` into a buffer: the second write is the only reader of the first."""
    from indistill_fx.graph.edit import copy_graph, sweep

    model = ifx.trace(Chained(), (torch.randn(2, 8),), role="student")
    swept = sweep(copy_graph(model.graph_module)[0])
    before = swept.center.clone()
    swept(torch.ones(2, 8))
    changed = swept.center.clone()
    swept.center.copy_(before)
    model.graph_module(torch.ones(2, 8))
    assert torch.equal(changed, model.graph_module.center) and bool(changed.abs().sum() > 0)


@pytest.mark.parametrize("training", [False, True])
def test_numbers_of_numpy_are_written_into_the_graph(training: bool) -> None:
    """They are neither a reason for another way of tracing nor for a NameError in generated code."""
    model = ifx.trace(NumpyNumbers(), (torch.randn(2, 8),), role="student" if training else "teacher")
    assert model.report.method == "symbolic" and "np." not in model.graph_module.code


class Fixed(nn.Module):
    """Filters, a bias and a factor that are not trained, as in YOLO's DFL."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 6), nn.Linear(6, 3)
        self.fixed = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        self.scale = nn.Parameter(torch.full((1,), 3.0))
        for part in (self.a.bias, self.c.bias, *self.fixed.parameters(), self.scale):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(self.c(self.b(self.a(x).relu()))) * self.scale  # type: ignore[no-any-return]


def test_what_is_not_trained_stays_so():
    net, x = Fixed(), torch.randn(2, 8)
    source = source_of(ifx.trace(net, x, role="student"))
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in source.build().named_parameters()} == flags
    lines = [line.strip() for line in source.text.splitlines() if "requires_grad" in line]
    assert lines == [f"self.{part}.requires_grad_(False)" for part in ("a.bias", "c.bias", "fixed", "scale")]
    teacher = ifx.trace(net, x, role="teacher")
    small = ifx.shrink(teacher, widths={"a": 8}).value
    train_as(teacher, small)
    trained = {name: parameter.requires_grad for name, parameter in source_of(small).build().named_parameters()}
    assert trained == flags | {"a.bias": True}  # it lost entries, so the rest makes up for them
    net.requires_grad_(False)
    train_as(ifx.trace(net, x, role="teacher"), small)
    assert all(parameter.requires_grad for parameter in source_of(small).build().parameters())


def test_what_a_library_has_written_on_a_layer_does_not_matter():
    """YOLO's code numbers its layers: `layer.i, layer.f, layer.type`."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(None, 2, "nearest"), nn.Conv2d(8, 2, 1)).eval()
    for number, layer in enumerate(net):
        layer.i, layer.f, layer.type, layer.np = number, -1, "torch.nn", 0
    x = torch.randn(2, 3, 6, 6)
    small = ifx.shrink(ifx.trace(net, x), ratio=0.5).value
    written = source_of(small)
    assert "nn.Upsample(scale_factor=2.0" in written.text
    assert torch.equal(written.build().eval()(x), small.graph_module(x))
