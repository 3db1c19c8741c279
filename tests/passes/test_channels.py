"""Every channel rule, in the forms an operation comes in: the narrowed tap is exact, and sunk as far as it should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from indistill_fx.graph.attention import HeadAttention, window_attention
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.channels.rules import RULES
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.traced import TracedModel

C = 12


class Form(nn.Module):
    """A convolution, some operation, and a reader."""

    def __init__(self, operation: Callable[..., Tensor], part: nn.Module | None = None, channels: int = C):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.side = nn.Conv2d(3, channels, 1), nn.Conv2d(3, channels, 1)
        self.part = part if part is not None else nn.Identity()
        self.scale = nn.Parameter(torch.randn(1, channels, 1, 1))
        self.tap = nn.Identity()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        y = (
            self.operation(self, self.stem(x), self.side(x))
            if self.operation.__code__.co_argcount == 3
            else self.operation(self, self.stem(x))
        )
        return self.tap(y).flatten(1).sum(1)


def _values(graph_module: fx.GraphModule, node: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run_keeping(graph_module, [node], x)[1][node]


def narrowed(
    module: nn.Module, *, size: int = 4, axis: int | None = None, seed: int = 0
) -> tuple[TracedModel, list[str]]:
    """Narrow the tap to random halves, both sorted, and compare; returns the last narrowed model and where it stopped."""
    module = module.double().eval()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.running_mean)
            nn.init.uniform_(child.running_var, 0.5, 1.5)
            nn.init.normal_(child.weight)
            nn.init.normal_(child.bias)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    teacher = trace(module, x)
    tap = "tap"
    at = teacher.facts_of(tap).channel_axis
    assert at is not None and (axis is None or at == axis)
    whole = _values(teacher.graph_module, teacher.node(tap).name, x)
    generator, stopped = torch.Generator().manual_seed(seed), []
    for _ in range(3):
        channels = whole.shape[at]
        kept = sorted(torch.randperm(channels, generator=generator)[: max(1, channels // 2)].tolist())
        slim = narrow(teacher, kept={tap: kept})
        got = _values(slim.value.graph_module, slim.value.node(tap).name, x)
        expected = whole.index_select(at, torch.tensor(kept))
        assert got.shape == expected.shape == slim.value.facts_of(tap).shape
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
        stopped += [stop.reason for stop in slim.report.taps[0].stopped]
    return slim.value, stopped


def _shuffle(m: Form, x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def _gate(m: Form, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.mean((2, 3), keepdim=True)) * m.scale


SUNK: dict[str, Callable[[], nn.Module]] = {
    "unary function": lambda: Form(lambda m, x: F.gelu(F.relu(x).sigmoid_() * 2).clamp(min=-1).to(x.dtype)),
    "dropout": lambda: Form(lambda m, x: F.dropout(x, 0.5, training=m.training)),
    "batch norm": lambda: Form(lambda m, x: m.part(x), nn.BatchNorm2d(C)),
    "functional batch norm": lambda: Form(
        lambda m, x: F.batch_norm(x, m.part.running_mean, m.part.running_var, m.part.weight, m.part.bias),
        nn.BatchNorm2d(C),
    ),
    "instance norm": lambda: Form(lambda m, x: m.part(x), nn.InstanceNorm2d(C, affine=True)),
    "group norm of single channels": lambda: Form(lambda m, x: m.part(x), nn.GroupNorm(C, C)),
    "prelu": lambda: Form(lambda m, x: m.part(x), nn.PReLU(C)),
    "shared prelu": lambda: Form(lambda m, x: m.part(x), nn.PReLU()),
    "add": lambda: Form(lambda m, x, y: x + y),
    "add to itself": lambda: Form(lambda m, x: x + x),
    "gate": lambda: Form(_gate),
    "expand_as": lambda: Form(lambda m, x, y: x.mean((2, 3), keepdim=True).expand_as(y)),
    "expand": lambda: Form(lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)),
    "grouped heads": lambda: Form(
        lambda m, x, y: F.scaled_dot_product_attention(x, y[:, : C // 3], y[:, C // 3 : 2 * C // 3], enable_gqa=True)
    ),
    "heads with one key": lambda: Form(
        lambda m, x, y: F.scaled_dot_product_attention(x, y[:, :1], y[:, 1:2], enable_gqa=True)
    ),
    "where": lambda: Form(lambda m, x, y: torch.where(x > 0, x, y)),
    "cat": lambda: Form(lambda m, x, y: torch.cat([x, y, x], 1)),
    "cat of space": lambda: Form(lambda m, x, y: torch.cat([x, y], dim=-1)),
    "stack": lambda: Form(lambda m, x, y: torch.stack([x, y], 2).sum(2)),
    "chunk": lambda: Form(lambda m, x, y: torch.cat([x, y], 1).chunk(4, 1)[1] + x.chunk(2, 1)[1]),
    "split": lambda: Form(lambda m, x: x.split([5, 7], dim=1)[1]),
    "unbind": lambda: Form(lambda m, x: m.part(x.unbind(2)[1]), nn.BatchNorm1d(C)),
    "select": lambda: Form(lambda m, x: x.select(2, 1)),
    "slices": lambda: Form(lambda m, x: x[:, 2:10:2, 1:]),
    "narrow": lambda: Form(lambda m, x: x.narrow(1, 3, 8)),
    "max pool": lambda: Form(lambda m, x: F.avg_pool2d(F.max_pool2d(x, 2), 2)),
    "adaptive pool and flatten": lambda: Form(lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "squeeze": lambda: Form(lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1)),
    "mean": lambda: Form(lambda m, x: x.mean([2, 3])),
    "amax": lambda: Form(lambda m, x: torch.amax(x, dim=(2, 3))),
    "interpolate": lambda: Form(lambda m, x: F.interpolate(x, scale_factor=2.0)),
    "pad": lambda: Form(lambda m, x: F.pad(x, (1, 1, 2, 0))),
    "roll": lambda: Form(lambda m, x: torch.roll(x, (1, 1), (2, 3))),
    "pixel shuffle": lambda: Form(lambda m, x: F.pixel_shuffle(x, 2)),
    "channel shuffle by hand": lambda: Form(lambda m, x: m.part(_shuffle(m, x)), nn.BatchNorm2d(C)),
    "channel shuffle": lambda: Form(lambda m, x: m.part(x), nn.ChannelShuffle(3)),
    "glu": lambda: Form(lambda m, x: F.glu(x, dim=1)),
    "depthwise": lambda: Form(lambda m, x: m.part(x), nn.Conv2d(C, C, 3, groups=C)),
    "depth multiplier": lambda: Form(lambda m, x: m.part(x), nn.Conv2d(C, 3 * C, 3, groups=C)),
    "grouped": lambda: Form(lambda m, x: m.part(x), nn.Conv2d(C, 2 * C, 3, groups=3)),
    "transposed": lambda: Form(lambda m, x: m.part(x), nn.ConvTranspose2d(C, 10, 2, 2)),
    "transposed depthwise": lambda: Form(lambda m, x: m.part(x), nn.ConvTranspose2d(C, C, 2, 2, groups=C)),
    "transposed grouped": lambda: Form(lambda m, x: m.part(x), nn.ConvTranspose2d(C, 2 * C, 2, 2, groups=3)),
    "functional conv": lambda: Form(
        lambda m, x: F.conv2d(x, m.part.weight, m.part.bias, padding=1), nn.Conv2d(C, 8, 3)
    ),
    "functional grouped conv": lambda: Form(
        lambda m, x: F.conv2d(x, m.part.weight, m.part.bias, groups=3), nn.Conv2d(C, 9, 1, groups=3)
    ),
    "standardised weight": lambda: Form(
        lambda m, x: F.conv2d(x, (m.part.weight - m.part.weight.mean((1, 2, 3), keepdim=True)) / 2), nn.Conv2d(C, 8, 3)
    ),
    "linear on the last axis": lambda: Form(lambda m, x: m.part(x.permute(0, 2, 3, 1)), nn.Linear(C, 10)),
    "functional linear": lambda: Form(
        lambda m, x: F.linear(x.flatten(2).transpose(1, 2), m.part.weight, m.part.bias), nn.Linear(C, 10)
    ),
    "bilinear": lambda: Form(
        lambda m, x, y: m.part(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.Bilinear(C, C, 10)
    ),
    "functional bilinear": lambda: Form(
        lambda m, x, y: F.bilinear(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1), m.part.weight, m.part.bias).permute(
            0, 3, 1, 2
        ),
        nn.Bilinear(C, C, 10),
    ),
    "linear on another axis": lambda: Form(lambda m, x: m.part(x), nn.Linear(4, 6)),
    "attention": lambda: Form(
        lambda m, x: m.part(*[x.flatten(2).transpose(1, 2)] * 3)[0], nn.MultiheadAttention(C, 3, batch_first=True)
    ),
    "einsum": lambda: Form(lambda m, x, y: torch.einsum("bchw,bkhw->bck", x, y).unsqueeze(-1)),
    "matmul": lambda: Form(lambda m, x, y: torch.matmul(x.flatten(2), y.flatten(2).transpose(1, 2)).unsqueeze(-1)),
    "padded channels": lambda: Form(lambda m, x: F.pad(x, (0, 0, 0, 0, 3, 3))),
}
STOPS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer norm": (lambda: Form(lambda m, x: m.part(x.permute(0, 2, 3, 1)), nn.LayerNorm(C)), "layer norm"),
    "RMS norm": (lambda: Form(lambda m, x: m.part(x.permute(0, 2, 3, 1)), nn.RMSNorm(C)), "rms norm"),
    "group norm": (lambda: Form(lambda m, x: m.part(x), nn.GroupNorm(3, C)), "group norm"),
    "softmax": (lambda: Form(lambda m, x: x.softmax(1)), "softmax mixes the channels"),
    "cumsum": (lambda: Form(lambda m, x: x.cumsum(1)), "cumsum mixes the channels"),
    "sort": (lambda: Form(lambda m, x: x.argsort(1).to(x.dtype) * x), "argsort mixes the channels"),
    "renorm": (lambda: Form(lambda m, x: x.renorm(2, 2, 1.0)), "no channel rule for renorm"),
}


@pytest.mark.parametrize("name", SUNK)
def test_sinks(name: str) -> None:
    _, stopped = narrowed(SUNK[name]())
    allowed = {"padded channels": {"the padded channels stand between the others"}}.get(name, set())
    assert set(stopped) <= allowed


@pytest.mark.parametrize("name", STOPS)
def test_stops(name: str) -> None:
    make, reason = STOPS[name]
    _, stopped = narrowed(make())
    assert stopped and all(reason in stop for stop in stopped)


def test_hooked_module_is_a_wall() -> None:
    form = Form(lambda m, x: m.part(x), nn.Conv2d(C, 8, 1))
    form.part.register_forward_hook(lambda *_: None)
    _, stopped = narrowed(form)
    assert set(stopped) == {"it has hooks (test_hooked_module_is_a_wall.<locals>.<lambda>), which may do anything"}


def test_grouped_convolution_drops_the_groups_nobody_wants() -> None:
    form = Form(lambda m, x: m.part(x), nn.Conv2d(C, 6, 1, groups=3)).double().eval()
    teacher = trace(form, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    slim = narrow(teacher, kept={"tap": [2, 3]}).value
    conv = next(m for m in slim.graph_module.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 2)
    assert (conv.groups, conv.in_channels) == (1, 4)
    stem = [m for m in slim.graph_module.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    assert {m.out_channels for m in stem} == {C, 4}  # what the group reads is all that is left of the stem's copy


def test_originals_stay_and_slices_are_their_own() -> None:
    form = Form(lambda m, x: m.part(x), nn.BatchNorm2d(C)).double().eval()
    form.stem.weight.requires_grad_(False)
    teacher = trace(form, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    slim = narrow(teacher, kept={"tap": [0, 5]}).value.graph_module
    copies = [m for m in slim.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 2]
    assert len(copies) == 1 and not copies[0].weight.requires_grad
    copies[0].weight.data.zero_()
    assert form.stem.weight.abs().sum() > 0


@pytest.mark.parametrize(("height", "width", "shift"), [(14, 14, 3), (13, 9, 3), (7, 7, 3), (4, 5, 3), (8, 8, 0)])
@pytest.mark.parametrize("cosine", [False, True])
def test_window_attention_equals_torchvision(height: int, width: int, shift: int, cosine: bool) -> None:
    from torchvision.models.swin_transformer import shifted_window_attention

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    c, heads, window = 12, 3, 7
    args = (
        random(2, height, width, c),
        random(3 * c, c),
        random(c, c),
        random(1, heads, 49, 49),
        [window, window],
        heads,
        [shift, shift],
    )
    extra = {
        "qkv_bias": random(3 * c),
        "proj_bias": random(c),
        "logit_scale": random(heads, 1, 1) if cosine else None,
        "training": False,
    }
    expected = shifted_window_attention(*args, **extra)
    assert torch.allclose(
        window_attention(*args, **extra), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max())
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_head_attention_equals_torch(batch_first: bool, weights: bool) -> None:
    from indistill_fx.passes.channels.attention import free_heads

    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, kdim=6, vdim=5, batch_first=batch_first).double().eval()
    free = free_heads(module)
    assert isinstance(free, HeadAttention)
    q, k, v = (torch.randn(2, 4, n, dtype=torch.float64) for n in (12, 6, 5))
    q, k, v = (x if batch_first else x.transpose(0, 1) for x in (q, k, v))
    mask = torch.randn(4, 4).gt(0.8)
    padding = torch.tensor([[False, False, True, False]] * 2)
    expected = module(q, k, v, key_padding_mask=padding, attn_mask=mask, need_weights=weights)
    got = free(q, k, v, key_padding_mask=padding, attn_mask=mask, need_weights=weights)
    assert torch.allclose(got[0], expected[0], rtol=1e-12, atol=1e-12)
    assert (got[1] is None) == (expected[1] is None)
    assert got[1] is None or torch.allclose(got[1], expected[1], rtol=1e-12, atol=1e-12)


def test_table_names_are_operations() -> None:
    assert all(name == name.lower() and callable(rule) for name, rule in RULES.items())
