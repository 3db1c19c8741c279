"""Criteria: each against its formula, and what is said where one does not apply."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.errors import ConfigError, PruneError
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.criteria import NAMES, UNITS, WEIGHTS, best, statistics
from indistill_fx.passes.pruning.narrow import choose_channels, narrow
from indistill_fx.passes.pruning.shrink import shrink
from indistill_fx.traced import TracedModel


class Net(nn.Module):
    """Two convolutions with a batch norm behind the first; a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 6, 3),
            nn.Linear(6, 4),
        )
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.norm(self.one(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def traced() -> TracedModel:
    return trace(Net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 3, 8, 8, generator=generator), torch.randint(0, 4, (5,), generator=generator))
        for _ in range(count)
    ]


def test_weight_criteria_equal_their_formulas() -> None:
    weight = torch.randn(5, 3, 2, 2)
    rows = weight.double().flatten(1)
    assert torch.allclose(WEIGHTS["l1"](weight), rows.abs().sum(1))
    assert torch.allclose(WEIGHTS["l2"](weight), rows.norm(dim=1))
    distances = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    assert torch.allclose(WEIGHTS["geometric_median"](weight), distances, rtol=1e-4)
    assert torch.equal(WEIGHTS["random"](weight), WEIGHTS["random"](weight + 1))


def test_ties_go_to_the_lower_index() -> None:
    assert best(torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]), 2) == (1, 2)


def test_batch_norm_scale_is_that_of_the_norm_behind(traced: TracedModel) -> None:
    module = traced.module
    assert isinstance(module, Net)
    expected = best(module.norm.weight.detach().abs(), 3)
    assert choose_channels(traced, {"norm": 3}, criterion="bn_scale") == {"norm": expected}
    layers = {layer.path: layer for layer in shrink(traced, ratio=0.5, criterion="bn_scale").report.layers}
    assert layers["one"].kept == best(module.norm.weight.detach().abs(), 4)
    assert (layers["one"].by, layers["two"].by) == ("bn_scale", "l1")


def test_activation_is_the_mean_over_the_data(traced: TracedModel) -> None:
    found = statistics(traced, {"norm": 1}, iter(batches()))
    module = traced.module.eval()
    assert isinstance(module, Net)
    with torch.no_grad():
        expected = torch.stack([module.norm(module.one(x)).abs().mean((0, 2, 3)) for x, _ in batches()]).mean(0)
    assert torch.allclose(found["norm"], expected.double(), rtol=1e-5)
    slim = narrow(traced, widths={"norm": 3}, criterion="activation", loader=iter(batches()))
    assert slim.report.kept["norm"] == best(found["norm"], 3)
    assert slim.report.taps[0].chosen_by == "activation at the layer"


@pytest.mark.parametrize("criterion", ["fisher", "isomorphic"])
def test_criteria_of_a_whole_network_do_not_rank_a_tap(criterion: str, traced: TracedModel) -> None:
    """They ranked by l2, under their own name."""
    with pytest.raises(ConfigError, match=f"`{criterion}` is one of `shrink`") as caught:
        narrow(traced, widths={"norm": 3}, criterion=criterion, loader=batches())
    assert caught.value.hint == "Give one of l1, l2, geometric_median, random, bn_scale, activation, taylor."


def test_taylor_is_gradient_times_activation(traced: TracedModel) -> None:
    found = statistics(traced, {"two": 1}, batches(), gradients=True)
    module = traced.module.eval()
    assert isinstance(module, Net)
    expected = torch.zeros(6)
    for x, labels in batches():
        feature = module.two(F.relu(module.norm(module.one(x)))).detach().requires_grad_()
        F.cross_entropy(module.head(F.relu(feature).mean((2, 3))), labels).backward()
        assert feature.grad is not None
        expected += (feature.grad * feature).sum((2, 3)).abs().sum(0).detach()
    assert torch.allclose(found["two"], expected.double() / 3, rtol=1e-4)
    assert isinstance(traced.module.head, nn.Linear)
    likely = [(x, F.one_hot(labels, traced.module.head.out_features).float()) for x, labels in batches()]
    assert torch.allclose(statistics(traced, {"two": 1}, likely, gradients=True)["two"], found["two"])  # probabilities


@pytest.mark.parametrize("column", [True, False])
def test_taylor_of_values_takes_the_squared_error(column: bool) -> None:
    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Linear(3, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(self.one(x).relu())
            return y if column else y.squeeze(1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, x, labels = Value().eval(), torch.randn(4, 3), torch.randn(4)
    feature = net.one(x).detach().requires_grad_()
    F.mse_loss(net.head(feature.relu())[:, 0], labels).backward()
    assert feature.grad is not None
    found = statistics(trace(net, x), {"one": 1}, [(x, labels)], gradients=True)["one"]
    assert torch.allclose(found, (feature.grad * feature).detach().abs().sum(0).double(), rtol=1e-4)


@pytest.mark.parametrize("criterion", NAMES)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_all_leave_the_model_alone(criterion: str, role: str) -> None:
    module = Net()
    module.norm.eval()
    before = digest(module)
    model = trace(module, torch.randn(2, 3, 8, 8), role=role)  # type: ignore[arg-type]
    if criterion not in UNITS:
        assert len(choose_channels(model, {"two": 3}, criterion=criterion, loader=batches())["two"]) == 3
    small = shrink(model, ratio=0.5, criterion=criterion, loader=batches())
    assert small.report.widths["two"] == (6, 3)
    assert digest(module) == before
    assert all(p.grad is None for p in module.parameters())


def test_a_function_of_ones_own(traced: TracedModel) -> None:
    kept = choose_channels(traced, {"two": 2}, criterion=lambda weight: torch.arange(len(weight)))
    assert kept == {"two": (4, 5)}
    with pytest.raises(PruneError, match="one score per row"):
        choose_channels(traced, {"two": 2}, criterion=lambda weight: weight)


def test_opaque_layers_are_ranked_by_activation() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    net = nn.Sequential(nn.Conv2d(3, 8, 1), Opaque(), nn.Conv2d(8, 2, 1)).eval()
    traced = trace(net, torch.randn(2, 3, 4, 4), leaves=["1"])
    slim = narrow(traced, widths={"1": 3})
    with torch.no_grad():
        scores = net[:2](traced.example_inputs[0]).abs().mean((0, 2, 3))
    assert slim.report.kept["1"] == best(scores, 3)
    assert slim.report.taps[0].chosen_by.startswith("activation on the example inputs")
    assert [stop.reason for stop in slim.report.taps[0].stopped] == ["no channel rule for Opaque"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "l3"}, "There is no criterion `l3`. Nearest: l2, l1"),
        ({"criterion": "activation"}, "needs data"),
        ({"criterion": "activation", "loader": []}, "no batch"),
        ({"criterion": "taylor", "loader": [torch.randn(2, 3, 8, 8)]}, "needs labels"),
        ({"criterion": "taylor", "loader": [(torch.randn(2, 3, 8, 8), torch.zeros(2, 5, 5).long())]}, "do not go with"),
        (
            {"criterion": "taylor", "loader": [(torch.randn(2, 3, 8, 8), torch.tensor([0, 99]))]},
            "Label 99 is out of range",
        ),
        ({"criterion": "activation", "loader": [{"x": 1}]}, "`x` of the batch is of type int, not a tensor"),
    ],
)
def test_refuses(traced: TracedModel, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_channels(traced, {"one": 2}, **options)  # type: ignore[arg-type]
