"""Shrinking: exact widths, coupled channels, rewritten arguments, budgets, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.errors import ConfigError, PruneError
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.criteria import WEIGHTS
from indistill_fx.passes.pruning.dependencies import Coupling
from indistill_fx.passes.pruning.groups import join
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import shrink
from indistill_fx.traced import TracedModel
from tests.numerics.masked_reference import run_masked

Op = Callable[..., Tensor]


class Middle(nn.Module):
    """Two convolutions, something between them and a head: conv -> operation -> head."""

    def __init__(self, operation: Op, *parts: nn.Module, channels: int = 16, reads: int = 16, spatial: bool = True):
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.side = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(3, channels, 3, padding=1)
        self.parts, self.operation = nn.ModuleList(parts), operation
        self.head = nn.Conv2d(reads, 5, 1) if spatial else nn.Linear(reads, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self, self.stem(x), self.side(x)))  # type: ignore[no-any-return]


def check(module: nn.Module, *, tolerance: float = 1e-10, **wish: Any) -> TracedModel:
    """Shrink, compare with the masked original, run in train mode, and make sure that the original is untouched."""
    module = module.double().eval()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.running_mean)
            nn.init.uniform_(child.running_var, 0.5, 1.5)
            nn.init.normal_(child.bias)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    traced = trace(module, x)
    before = digest(module)
    result = shrink(traced, **(wish or {"ratio": 0.5}))
    expected = run_masked(traced, result.report, x)
    small = result.value.graph_module
    with torch.no_grad():
        got = small(x)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * (expected[0] - expected[1]).abs().max()
    assert digest(module) == before
    shared = {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared
    small.train()
    small(x).sum().backward()
    idle = {n for n, p in small.named_parameters() if p.requires_grad and p.grad is None}
    assert all(n.startswith("side.") for n in idle), idle  # some operations leave it out
    again = trace(small.eval(), x)
    assert again.macs == result.value.macs
    assert result.report.macs == (traced.macs, again.macs)
    assert sum(p.numel() for p in small.parameters()) == result.report.parameters[1]
    for name, known in result.value.facts.items():
        if name in again.facts:
            assert again.facts[name].shape == known.shape, name
    return result.value


def widths(model: TracedModel) -> dict[str, int]:
    """Output channels of every convolution and linear layer."""
    return {n: m.weight.shape[0] for n, m in model.graph_module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def attend(m: Middle, x: Tensor, y: Tensor) -> Tensor:
    b, _, h, w = x.shape
    qkv = m.parts[0](x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, 4, 8).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, h * w, 32)


def non_local(m: Middle, x: Tensor, y: Tensor) -> Tensor:
    weights = (x.flatten(2).transpose(1, 2) @ y.flatten(2) / x.shape[1] ** 0.5).softmax(-1)
    return x + (weights @ y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], 16, 8, 8)


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: Middle(lambda m, x, y: F.relu(x)),
    "sum": lambda: Middle(lambda m, x, y: F.relu(x + y)),
    "cat": lambda: Middle(lambda m, x, y: torch.cat([x, F.relu(y)], 1), reads=32),
    "cat and chunk": lambda: Middle(lambda m, x, y: torch.mul(*torch.cat([x, y], 1).chunk(2, 1))),
    "uneven split": lambda: Middle(lambda m, x, y: F.relu(torch.cat([x, y], 1).split([20, 12], 1)[0]), reads=20),
    "slices": lambda: Middle(lambda m, x, y: torch.cat([x[:, ::2], x[:, 1::2] * 2], 1)),
    "batch norm": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.BatchNorm2d(16)),
    "group norm": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.GroupNorm(4, 16)),
    "group norm of single channels": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.GroupNorm(16, 16)),
    "functional group norm of single channels": lambda: Middle(
        lambda m, x, y: F.group_norm(x, x.shape[1], m.parts[0].weight, m.parts[0].bias), nn.GroupNorm(16, 16)
    ),
    "layer norm": lambda: Middle(lambda m, x, y: m.parts[0](x.permute(0, 2, 3, 1)), nn.LayerNorm(16), spatial=False),
    "functional layer norm": lambda: Middle(
        lambda m, x, y: F.layer_norm(x.permute(0, 2, 3, 1), (16,), m.parts[0].weight),
        nn.LayerNorm(16, bias=False),
        spatial=False,
    ),
    "RMS norm": lambda: Middle(lambda m, x, y: m.parts[0](x.permute(0, 2, 3, 1)), nn.RMSNorm(16), spatial=False),
    "RMS norm without weights": lambda: Middle(
        lambda m, x, y: m.parts[0](x.permute(0, 2, 3, 1)),
        nn.RMSNorm(16, eps=0.1, elementwise_affine=False),
        spatial=False,
    ),
    "functional RMS norm": lambda: Middle(
        lambda m, x, y: F.rms_norm(x.permute(0, 2, 3, 1), (16,), m.parts[0].weight, 1e-3), nn.RMSNorm(16), spatial=False
    ),
    "bilinear": lambda: Middle(
        lambda m, x, y: m.parts[0](x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)), nn.Bilinear(16, 16, 16), spatial=False
    ),
    "functional bilinear": lambda: Middle(
        lambda m, x, y: F.bilinear(z := x.permute(0, 2, 3, 1), z, m.parts[0].weight),
        nn.Bilinear(16, 16, 16),
        spatial=False,
    ),
    "depthwise": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.Conv2d(16, 32, 3, padding=1, groups=16), reads=32),
    "grouped": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.Conv2d(16, 16, 3, padding=1, groups=4)),
    "functional depthwise": lambda: Middle(
        lambda m, x, y: F.conv2d(x, m.parts[0].weight, m.parts[0].bias, padding=1, groups=16),
        nn.Conv2d(16, 16, 3, groups=16),
    ),
    "transposed": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.ConvTranspose2d(16, 16, 2, 2)),
    "transposed grouped": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.ConvTranspose2d(16, 16, 2, 2, groups=4)),
    "standardised weight": lambda: Middle(
        lambda m, x, y: F.conv2d(x, m.parts[0].weight / m.parts[0].weight.abs().amax((2, 3), keepdim=True)),
        nn.Conv2d(16, 16, 1),
    ),
    "prelu": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.PReLU(16)),
    "shuffle": lambda: Middle(lambda m, x, y: m.parts[0](shuffle(x, 2)), nn.Conv2d(16, 16, 3, padding=1, groups=4)),
    "channel shuffle": lambda: Middle(lambda m, x, y: m.parts[0](x), nn.ChannelShuffle(2)),
    "pixel shuffle": lambda: Middle(lambda m, x, y: F.pixel_shuffle(x, 2), reads=4),
    "gate": lambda: Middle(
        lambda m, x, y: x * m.parts[1](F.relu(m.parts[0](x.mean((2, 3), keepdim=True)))).sigmoid(),
        nn.Conv2d(16, 4, 1),
        nn.Conv2d(4, 16, 1),
    ),
    "gate by linear layers": lambda: Middle(
        lambda m, x, y: (
            x * m.parts[0](x.mean((2, 3)).view(x.size(0), x.size(1))).view(x.size(0), x.size(1), 1, 1).expand_as(x)
        ),
        nn.Linear(16, 16),
    ),
    "channel mean": lambda: Middle(
        lambda m, x, y: x * torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1).mean(1, keepdim=True)
    ),
    "flatten": lambda: Middle(lambda m, x, y: F.max_pool2d(x, 4).flatten(1), reads=64, spatial=False),
    "channels-last flatten": lambda: Middle(
        lambda m, x, y: F.max_pool2d(x, 4).permute(0, 2, 3, 1).reshape(x.size(0), -1), reads=64, spatial=False
    ),
    "constants": lambda: Middle(lambda m, x, y: x * m.parts[0].weight.view(1, 16, 1, 1), nn.BatchNorm2d(16)),
    "glu": lambda: Middle(lambda m, x, y: F.glu(x, 1), reads=8),
    "heads by hand": lambda: Middle(attend, nn.Linear(16, 96), reads=32, spatial=False),
    "non-local": lambda: Middle(non_local),
    "padded channels": lambda: Middle(
        lambda m, x, y: F.pad(x, (0, 0, 0, 0, 4, 4)) + m.parts[0](y), nn.Conv2d(16, 24, 1), reads=24
    ),
    "attention": lambda: Middle(
        lambda m, x, y: m.parts[0](*[x.flatten(2).transpose(1, 2)] * 3, need_weights=False)[0],
        nn.MultiheadAttention(16, 4, batch_first=True),
        spatial=False,
    ),
    "interpolation": lambda: Middle(lambda m, x, y: F.interpolate(x, size=y.shape[2:]) + y),
    "called twice": lambda: Middle(lambda m, x, y: m.parts[0](F.relu(m.parts[0](x))), nn.Conv2d(16, 16, 1)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_equals_masked(name: str) -> None:
    small = check(GRAPHS[name]())
    assert widths(small)["stem"] == 8
    assert widths(small)["head"] == 5


class MaskedAttention(nn.Module):
    """Tokens of 16 features; masks of the padding, of later tokens, and maybe one for each head."""

    def __init__(self, each_head: bool):
        super().__init__()
        self.stem, self.attention = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head, self.each_head = nn.Linear(16, 5), each_head
        self.register_buffer("later", torch.ones(9, 9, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        tokens = self.stem(x)
        mask = self.later
        if self.each_head:
            mask = torch.stack([mask, mask & False, mask, mask]).repeat(x.shape[0], 1, 1)
        return self.head(self.attention(tokens, tokens, tokens, padding, need_weights=False, attn_mask=mask)[0])


@pytest.mark.parametrize("each_head", [False, True])
def test_attention_with_masks(each_head: bool) -> None:
    """Padding and order do not concern the channels; where every head has a mask of its own, all heads stay."""
    torch.manual_seed(0)
    module = MaskedAttention(each_head).double().eval()
    inputs = torch.randn(3, 9, 6, dtype=torch.float64), torch.arange(9).expand(3, 9) > torch.tensor([[6], [8], [3]])
    traced = trace(module, inputs)
    result = shrink(traced, ratio=0.5)
    with torch.no_grad():
        got = result.value.graph_module(*inputs)
    assert (got - run_masked(traced, result.report, *inputs)).abs().max() < 1e-12
    attention = result.value.graph_module.get_submodule("attention")
    assert (attention.heads, attention.query.in_features) == (4 if each_head else 2, 8)
    assert not torch.equal(got[2], result.value.graph_module(inputs[0], torch.zeros_like(inputs[1]))[2])


@pytest.mark.parametrize("channels", [1, 3, 7, 16])
def test_asking_for_n_gives_n(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Conv2d(channels, 2, 1))
    traced = trace(net, torch.randn(2, 3, 4, 4))
    for n in range(1, channels + 1):
        assert shrink(traced, widths={"0": n}).report.widths["0"] == (channels, n)
        assert shrink(traced, ratio=n / channels).report.widths["0"] == (channels, n)


def test_keeps_the_largest_filters() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    small = shrink(trace(net, torch.randn(2, 3, 4, 4)), widths={"0": 3})
    norms = net[0].weight.detach().abs().sum((1, 2, 3))
    expected = sorted(norms.argsort(descending=True)[:3].tolist())
    assert list(small.report.layers[0].kept) == expected
    assert torch.equal(small.value.graph_module.get_submodule("0").weight, net[0].weight[expected])
    assert torch.equal(small.value.graph_module.get_submodule("2").weight, net[2].weight[:, expected])


def test_heads_are_units_and_keep_their_width() -> None:
    small = check(GRAPHS["heads by hand"]())
    assert widths(small)["parts.0"] == 3 * 2 * 8


def test_head_width_and_scale_of_attention_modules() -> None:
    small = check(GRAPHS["attention"]())
    attention: Any = small.graph_module.get_submodule("parts.0")
    assert (attention.heads, attention.head_dim, attention.query.in_features, attention.out.out_features) == (
        2,
        4,
        8,
        8,
    )


def test_shared_weights_stay_shared() -> None:
    small = check(GRAPHS["called twice"]())
    assert widths(small) == {"stem": 8, "side": 8, "parts.0": 8, "head": 5}


def test_unknown_operation_freezes_and_says_so() -> None:
    net = Middle(lambda m, x, y: x.sort(1)[0])
    result = shrink(trace(net, torch.randn(2, 3, 8, 8)), ratio=0.5)
    assert result.report.widths["stem"] == (16, 16)
    assert any("sort" in frozen.reason and frozen.channels == 16 for frozen in result.report.frozen)


def test_channels_that_only_go_together_are_reported() -> None:
    grouped = nn.Conv2d(24, 24, 1, groups=3), nn.Conv2d(24, 24, 1, groups=3)
    shuffled = Middle(lambda m, x, y: m.parts[1](shuffle(m.parts[0](x), 3)), *grouped, channels=24, reads=24)
    report = shrink(trace(shuffled.eval(), torch.randn(2, 3, 8, 8)), ratio=0.5).report
    assert report.widths["parts.0"] == (24, 24)
    (frozen,) = [frozen for frozen in report.frozen if "output" not in frozen.reason]
    assert (frozen.channels, frozen.reason) == (24, "those of `parts.0` can only be removed all at once")


def test_all_channels_that_stay_are_counted() -> None:
    def weigh(m: Middle, x: Tensor, y: Tensor) -> Tensor:
        return x * m.parts[0](x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()[..., None, None]

    along = Middle(weigh, nn.Conv1d(1, 1, 3, padding=1))
    report = shrink(trace(along.eval(), torch.randn(2, 3, 8, 8)), ratio=0.5).report
    assert report.widths["stem"] == (16, 16)
    assert {frozen.channels for frozen in report.frozen if "`parts.0` (conv) combines" in frozen.reason} == {16}


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_budgets(budget: float) -> None:
    net = nn.Sequential(
        *[m for k in range(4) for m in (nn.Conv2d(3 if k == 0 else 32, 32, 3, padding=1), nn.ReLU())],
        nn.Conv2d(32, 4, 1),
    )
    traced = trace(net, torch.randn(2, 3, 8, 8))
    for wish in ("macs", "params"):
        result = shrink(traced, **{wish: budget})
        before, after = result.report.macs if wish == "macs" else result.report.parameters
        assert 0.9 * budget <= after / before <= budget
        again = trace(result.value.graph_module, torch.randn(2, 3, 8, 8))
        assert again.macs == result.report.macs[1]


def test_round_to() -> None:
    net = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Conv2d(40, 30, 1), nn.ReLU(), nn.Conv2d(30, 2, 1))
    report = shrink(trace(net, torch.randn(2, 3, 4, 4)), ratio=0.3, round_to=8).report
    assert report.widths == {"0": (40, 16), "2": (30, 16), "4": (2, 2)}


def test_widths_and_ratio_together() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    report = shrink(trace(net, torch.randn(2, 3, 4, 4)), widths={"0": 5}, ratio=0.5).report
    assert report.widths == {"0": (16, 5), "2": (16, 8), "4": (2, 2)}


def test_result_stands_alone(tmp_path: Path) -> None:
    net = Middle(lambda m, x, y: F.relu(m.parts[0](x) + y), nn.BatchNorm2d(16)).eval()
    x = torch.randn(2, 3, 8, 8)
    small = shrink(trace(net, x), ratio=0.5).value.graph_module
    assert set(small.state_dict()) == set(net.state_dict())
    torch.export.save(torch.export.export(small, (x,)), tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    assert torch.allclose(loaded(x), small(x), atol=1e-6)
    assert max(found.max_abs for found in export_onnx(small, tmp_path / "small.onnx", (x,)).parity) < 1e-4
    again = shrink(trace(net, x), ratio=0.5, criterion="random").value.graph_module
    again.load_state_dict(small.state_dict())
    assert torch.allclose(again(x), small(x), atol=1e-6)
    optimizer = torch.optim.SGD(small.train().parameters(), lr=0.1)
    before = digest(net)
    F.cross_entropy(small(x).mean((2, 3)), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert digest(net) == before


CONFLICTS: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (
        GRAPHS["sum"],
        {"widths": {"stem": 8, "side": 12}},
        "`side`: asked for 12 of its 16 channels, but it is tied to `stem`",
    ),
    (GRAPHS["chain"], {"widths": {"stem": 17}}, "asked for 17 of its 16 channels"),
    (GRAPHS["chain"], {"widths": {"stem": 0}}, "asked for 0 of its 16 channels"),
    (GRAPHS["chain"], {"widths": {"head": 3}}, "none of its 5 channels can be removed: an output of the network"),
    (GRAPHS["grouped"], {"widths": {"parts.0": 6}}, "only 4 at a time can be removed"),
    (GRAPHS["called twice"], {"widths": {"stem": 4, "parts.0": 8}}, "tied to"),
    (
        GRAPHS["chain"],
        {"macs": 0.01},
        "cannot be made smaller than 7,552 MACs, but the budget is 604 MACs: every layer keeps at least 10%",
    ),
]


@pytest.mark.parametrize(("make", "wish", "message"), CONFLICTS)
def test_refuses(make: Callable[[], nn.Module], wish: dict[str, Any], message: str) -> None:
    net = make()
    before = digest(net)
    with pytest.raises(PruneError) as caught:
        shrink(trace(net, torch.randn(2, 3, 8, 8)), **wish)
    assert message in str(caught.value)
    assert digest(net) == before


def test_the_smallest_that_is_told_is_reached() -> None:
    model = trace(GRAPHS["chain"](), torch.randn(2, 3, 8, 8))
    assert shrink(model, macs=7552).value.macs == 7552
    with pytest.raises(PruneError, match="cannot be made smaller than 7,552 MACs"):
        shrink(model, macs=7551)


@pytest.mark.parametrize("criterion", [*WEIGHTS, "bn_scale", "activation", "taylor"])
def test_refuses_weights_that_are_not_numbers(criterion: str) -> None:
    """By whatever criterion: also one that never looks at the weight, and one that looks at what data makes of it."""
    net = GRAPHS["chain"]()
    with torch.no_grad():
        net.stem.weight[0, 0, 0, 0] = float("nan")
    x = torch.randn(2, 3, 8, 8)
    traced, batches = _traced_blindly(net), [(x, net(x).argmax(1))]
    for remove in (shrink, narrow):
        with pytest.raises(PruneError, match=r"`stem` has weights that are not finite"):
            remove(traced, widths={"stem": 8}, criterion=criterion, loader=batches)


@pytest.mark.parametrize("width", [8.5, "8", True, None])
def test_refuses_widths_that_are_no_whole_numbers(width: Any) -> None:
    traced = trace(GRAPHS["chain"](), torch.randn(2, 3, 8, 8))
    for remove in (shrink, narrow):
        with pytest.raises(PruneError, match="is not a number of channels"):
            remove(traced, widths={"stem": width})


def _traced_blindly(net: nn.Module) -> TracedModel:
    return trace(net, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "wish",
    [
        *({}, {"ratio": 0.0}, {"ratio": 1.5}, {"ratio": 0.5, "macs": 0.5}),
        *({"macs": -1}, {"params": float("nan")}, {"ratio": 0.5, "round_to": 0}),
    ],
)
def test_refuses_options(wish: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        shrink(trace(GRAPHS["chain"](), torch.randn(2, 3, 8, 8)), **wish)


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_ties_are_connected_components(count: int, ties: list[tuple[int, int]]) -> None:
    ties = [(a % count, b % count) for a, b in ties]
    found = Coupling({}, count=count, pairs=[(np.array([a]), np.array([b])) for a, b in ties])
    graph = nx.Graph(ties)
    graph.add_nodes_from(range(count))
    numbers = {k: n for n, part in enumerate(sorted(nx.connected_components(graph), key=min)) for k in part}
    assert join(found).tolist() == [numbers[k] for k in range(count)]


def test_a_student_with_masks_shrinks_after_it_has_run_with_gradients() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.Flatten(),
        nn.Linear(512, 6),
        nn.ReLU(),
        nn.Linear(6, 4),
    )
    torch.nn.utils.prune.random_unstructured(module[2], "weight", 0.3)
    x = torch.randn(2, 3, 8, 8)
    module(x).sum().backward()
    model = trace(module, x, role="student")
    module(x).sum().backward()  # the mask's result is part of a graph of gradients, which torch does not copy
    result = shrink(model, ratio=0.5)
    assert result.report.widths["0"] == (8, 8) and "hooks (" in result.report.frozen[0].reason
    assert result.report.widths["4"] == (6, 3)


def test_a_layer_whose_weight_is_recomputed_is_named_and_its_work_counted():
    norm = torch.nn.utils.parametrizations.weight_norm
    net = nn.Sequential(norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    report = shrink(trace(net, torch.randn(2, 4), role="student"), ratio=0.5).report
    assert report.macs == (4 * 8 + 8 * 6 + 6 * 3, 4 * 8 + 8 * 3 + 3 * 3)
    assert any(
        "`0` (" in frozen.reason and "recomputed at every call" in frozen.reason and frozen.channels == 8
        for frozen in report.frozen
    )
    alone = nn.Sequential(norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))
    for request in ({"macs": 0.5}, {"params": 10}):
        with pytest.raises(
            PruneError,
            match=r"^No channel of this network can be removed. .* `0` .* recomputed at every call.*an output of the network",
        ):
            shrink(trace(alone, torch.randn(2, 4), role="student"), **request)
    assert shrink(trace(alone, torch.randn(2, 4), role="student"), macs=1000).report.macs == (56, 56)  # fits as it is
    plain = shrink(
        trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4), role="student"), ratio=0.5
    )
    assert plain.report.macs == (56, 28) and len(plain.report.frozen) == 1


@pytest.mark.parametrize("mode", ["mean", "max", "sum"])
def test_bags_of_embeddings(mode: str) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.first, self.last = nn.EmbeddingBag(20, 16, mode=mode), nn.Linear(16, 12), nn.Linear(12, 3)
            self.other = nn.EmbeddingBag(20, 16, mode=mode)

        def forward(self, words: Tensor) -> Tensor:
            bags = self.other(words.flatten(), torch.arange(words.shape[0]) * words.shape[1])
            return self.last(self.first(self.table(words) + bags).relu())  # type: ignore[no-any-return]

    words = torch.randint(0, 20, (3, 6))
    traced = trace(Bags().double(), words)
    small = shrink(traced, ratio=0.5)
    assert {path: kept for path, (_, kept) in small.report.widths.items()} == {
        "table": 8, "other": 8, "first": 6, "last": 3
    }  # fmt: skip
    got = small.value.graph_module(words.flip(0))
    assert (got - run_masked(traced, small.report, words.flip(0))).abs().max() < 1e-12


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_calls_of_a_norm_without_weights_share_one_width(norm: type[nn.Module]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
            self.norm = norm(16, elementwise_affine=False)  # type: ignore[call-arg]

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(self.b(self.norm(self.a(x)).relu())).relu())  # type: ignore[no-any-return]

    traced = trace(Twice(), torch.randn(3, 8))
    small = shrink(traced, widths={"a": 4}).report.widths
    assert (small["a"], small["b"]) == ((16, 4), (16, 4))
    with pytest.raises(PruneError, match="`b`: asked for 8 of its 16 channels, but it is tied to `a`"):
        shrink(traced, widths={"a": 4, "b": 8})
