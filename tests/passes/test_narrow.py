"""Narrowed taps equal the whole taps at the kept channels, and have exactly the width asked for."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, fx, nn

from indistill_fx.errors import PruneError
from indistill_fx.graph.edit import SliceOf
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.extract.dedupe import dedupe
from indistill_fx.passes.extract.instrument import cut, instrument
from indistill_fx.passes.pruning.narrow import choose_channels, narrow
from indistill_fx.traced import TracedModel


class Cnn32(nn.Module):
    """The paper's assistant: three blocks conv, batch norm, ReLU, max pooling."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), hidden: int = 128):
        super().__init__()
        a, b, c = widths
        self.conv1, self.conv1_bn = nn.Conv2d(3, a, 3), nn.BatchNorm2d(a)
        self.conv2, self.conv2_bn = nn.Conv2d(a, b, 3), nn.BatchNorm2d(b)
        self.conv3, self.conv3_bn = nn.Conv2d(b, c, 3), nn.BatchNorm2d(c)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(4 * c, hidden), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1_bn(self.conv1(x))))
        x = self.pool(torch.relu(self.conv2_bn(self.conv2(x))))
        x = self.pool(torch.relu(self.conv3_bn(self.conv3(x))))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


def values(graph_module: fx.GraphModule, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """The tensors of some nodes, and the output."""
    with torch.no_grad():
        output, found = run_keeping(graph_module, names, x)
    return {**found, "output": output}


def randomise(module: nn.Module) -> nn.Module:
    """Batch norms far from the identity, in float64: a wrong slice cannot hide."""
    generator = torch.Generator().manual_seed(1)
    for child in module.modules():
        if (
            isinstance(child, nn.modules.batchnorm._BatchNorm)
            and child.running_mean is not None
            and child.running_var is not None
        ):
            child.running_mean.copy_(torch.randn(child.num_features, generator=generator) * 0.3)
            child.running_var.copy_(torch.rand(child.num_features, generator=generator) + 0.5)
            with torch.no_grad():
                child.weight.copy_(torch.rand(child.num_features, generator=generator) + 0.5)
                child.bias.copy_(torch.randn(child.num_features, generator=generator) * 0.3)
    return module.double().eval()


def assert_exact(
    teacher: TracedModel, slim: TracedModel, kept: dict[str, tuple[int, ...]], x: Tensor, tolerance: float = 1e-12
) -> None:
    """Every narrowed feature is the whole one at the kept channels, and the output is what it was."""
    whole = values(teacher.graph_module, [teacher.node(tap).name for tap in kept], x)
    narrowed = values(slim.graph_module, [slim.node(tap).name for tap in kept], x)
    for tap, index in kept.items():
        axis = teacher.facts_of(tap).channel_axis
        assert axis is not None
        expected, got = (
            whole[teacher.node(tap).name].index_select(axis, torch.tensor(index)),
            narrowed[slim.node(tap).name],
        )
        assert got.shape == expected.shape == slim.facts_of(tap).shape, tap
        assert (got - expected).abs().max() <= tolerance * expected.abs().max(), tap
    assert torch.equal(whole["output"], narrowed["output"])


def test_assistant_of_the_paper() -> None:
    module = randomise(Cnn32())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    teacher = trace(module, x)
    before = digest(module), digest(teacher.graph_module)
    taps = {"pool": (module.conv1, 8), "pool@2": (module.conv2, 16), "pool@3": (module.conv3, 32)}
    slim = narrow(teacher, widths={tap: width for tap, (_, width) in taps.items()})
    for tap, (conv, width) in taps.items():
        norms = conv.weight.detach().abs().sum((1, 2, 3))
        assert slim.report.kept[tap] == tuple(sorted(norms.argsort(descending=True)[:width].tolist()))
    assert_exact(teacher, slim.value, slim.report.kept, x)
    assert all(not tap.stopped and tap.absorbed for tap in slim.report.taps)
    assert (digest(module), digest(teacher.graph_module)) == before


ZOO = [
    "resnet18",
    "mobilenet_v2",
    "shufflenet_v2_x0_5",
    "googlenet",
    "densenet121",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
]


@pytest.mark.parametrize("name", ZOO)
def test_families(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = randomise(getattr(torchvision.models, name)(weights=None, num_classes=10))
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    teacher = trace(module, x)
    taps = [
        names[0]
        for node, names in teacher.aliases.items()
        if teacher.facts[node].kind == "map" and teacher.facts[node].channels > 3
    ]
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for tap in taps[3 :: max(1, len(taps) // 8)]:
        channels = teacher.facts_of(tap).channels
        kept[tap] = tuple(sorted(torch.randperm(channels, generator=generator)[: channels // 2].tolist()))
    slim = narrow(teacher, kept=kept)
    assert slim.report.kept == kept
    assert_exact(teacher, slim.value, kept, x)


class Blocks(nn.Module):
    """A residual sum whose trunk is read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(x + self.branch(x))  # type: ignore[no-any-return]


@pytest.fixture
def blocks() -> TracedModel:
    torch.manual_seed(0)
    return trace(randomise(Blocks()), torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_residual_sum_shares_one_ranking(blocks: TracedModel) -> None:
    module = blocks.module
    assert isinstance(module, Blocks)
    scores = [conv.weight.detach().abs().sum((1, 2, 3)) for conv in (module.stem, module.branch)]
    shared = sum(score / score.mean() for score in scores)
    assert isinstance(shared, Tensor)
    expected = tuple(sorted(shared.argsort(descending=True)[:3].tolist()))
    assert choose_channels(blocks, {":add": 3})[":add"] == expected


def test_selections_are_made_once(blocks: TracedModel) -> None:
    slim = narrow(blocks, kept={":add": (1, 4), "norm": (1, 4)}).value
    assert (
        sum(
            (part := SliceOf.at(node)) is not None and part.original == "norm" for node in slim.graph_module.graph.nodes
        )
        == 1
    )


def test_dedupe_selects_from_what_is_computed_anyway(blocks: TracedModel) -> None:
    slim = narrow(blocks, kept={":add": (1, 4)}).value
    graph_module, tap = slim.graph_module, slim.node(":add")
    output = next(iter(reversed(graph_module.graph.nodes)))
    output.args = (tap,)
    x = blocks.example_inputs[0]
    graph_module.recompile()
    expected = graph_module(x)
    deduped = dedupe(graph_module).value
    assert torch.allclose(deduped(x), expected, rtol=1e-12, atol=1e-12)
    convs = [
        node.target
        for node in deduped.graph.nodes
        if node.op == "call_module" and "Conv" in type(deduped.get_submodule(node.target)).__name__
    ]
    assert len(convs) == 2  # the stem is needed whole by the branch, so its copy is gone


def test_every_alias_names_the_narrowed_tensor() -> None:
    module = randomise(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 4, 1)))
    teacher = trace(module, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    slim = narrow(teacher, kept={"0": (0, 7)}).value
    assert slim.facts_of("0").channels == slim.facts_of("0.1").channels == 2
    assert slim.facts_of("0:whole").channels == 8
    assert teacher.facts_of("0").channels == 8


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"widths": {"conv2": 33}}, "asked for 33 of its 32 channels"),
        ({"widths": {"conv2": 0}}, "asked for 0 of its 32 channels"),
        ({"kept": {"conv2": [0, 0]}}, "channels 0 to 31"),
        ({"kept": {"conv2": [32]}}, "channels 0 to 31"),
        ({"widths": {"conv1": 4}, "kept": {":conv": [1, 2]}}, "the same tensor"),
    ],
)
def test_refuses(wish: dict[str, dict[str, object]], message: str) -> None:
    teacher = trace(Cnn32(), torch.randn(2, 3, 32, 32))
    with pytest.raises(PruneError, match=message):
        narrow(teacher, **wish)  # type: ignore[arg-type]


class Shuffled(nn.Module):
    """A channel shuffle, the tap at its end, and something behind it."""

    def __init__(self, groups: int = 2):
        super().__init__()
        self.groups = groups
        self.conv, self.last = nn.Conv2d(3, 8, 3, groups=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = (x := self.conv(x)).shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kept", [(0, 1, 5), (2, 3, 4, 7), tuple(range(8))])
def test_the_narrowed_tap_has_the_form_of_the_whole_one(kept: tuple[int, ...]) -> None:
    traced = trace(Shuffled(), torch.randn(2, 3, 7, 6))
    tap = next(
        name for name in traced.taps if traced.node(name).target == "view" and len(traced.facts_of(name).shape) == 4
    )
    slim = narrow(traced, kept={tap: kept}).value
    before, after = traced.facts_of(tap), slim.facts_of(tap)
    assert before.channel_axis == 1
    assert (after.channel_axis, after.kind, after.stride) == (before.channel_axis, before.kind, before.stride)
    assert after.shape == (2, len(kept), 5, 4)


def test_a_split_into_sizes_read_from_the_channels_passes() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            half = x.shape[1] // 2
            a, b = x.split([half, x.shape[1] - half], dim=1)
            return torch.relu(a) + b  # type: ignore[no-any-return]

    traced = trace(Halves().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    tap = next(name for name in traced.taps if "relu" in traced.node(name).name)
    result = narrow(traced, widths={tap: 2})
    (report,) = result.report.taps
    assert not report.stopped and report.absorbed
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    whole, slim = traced.node(tap).name, result.value.node(tap).name
    expected = values(traced.graph_module, [whole], x)[whole][:, list(report.kept)]
    torch.testing.assert_close(values(result.value.graph_module, [slim], x)[slim], expected, rtol=1e-12, atol=1e-12)


def test_a_layer_called_output_is_not_taken_for_the_output_of_a_graph() -> None:
    """Its name was free once the layer was narrowed, and the graph's own end took it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.output = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.input(x)
            return self.head(self.output(y.relu()) + y)  # type: ignore[no-any-return]

    x = torch.randn(2, 3, 6, 6)
    model = trace(Net().eval(), x)
    narrowed = narrow(model, kept={":add": [1, 4, 6]}).value
    half = cut(narrowed, taps=[":add"]).value
    whole, _ = instrument(model, [":add"])(x)
    for graph in (half, dedupe(half).value):
        torch.testing.assert_close(graph(x)[0][":add"], whole[":add"][:, [1, 4, 6]])
        taken = {node.target for node in graph.graph.nodes if node.op == "call_module"}
        assert not taken & {"output", "head"}  # only the narrow copy is computed
