"""Random numbers that a forward uses outside tensors are drawn anew at each run of the graph, or the trace is refused."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import ExportError, FrontendError
from indistill_fx.graph import draws
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.capture.exported import capture_exported
from indistill_fx.passes.capture.recorded_graph import RecordedGraph
from indistill_fx.passes.capture.recording import capture_leaves, capture_shapes
from indistill_fx.passes.capture.symbolic import capture_symbolic
from indistill_fx.passes.capture.trace import trace
from indistill_fx.traced import TracedModel

HERE = Path(__file__).name
NAMED = np.random.default_rng(1)
Draw = Callable[["LayerDrop"], Any]
DRAWS: dict[str, Draw] = {}
"""Ways to draw outside tensors: true in half of all calls."""


def draw(function: Draw) -> Draw:
    DRAWS[function.__name__] = function
    return function


@draw
def item(part):
    return torch.rand(1).item() < 0.5


@draw
def compared(part):
    return torch.rand(()) < 0.5


@draw
def number(part):
    return float(torch.rand(())) < 0.5


@draw
def boolean(part):
    return bool(torch.bernoulli(torch.full((), 0.5)).bool())


@draw
def in_place(part):
    return torch.empty(()).random_(0, 2)


@draw
def into_a_view(part):
    numbers = torch.empty(4)
    numbers[1].uniform_()
    return numbers.tolist()[1] < 0.5


@draw
def index(part):
    return (True, False)[torch.randint(0, 2, ())]


@draw
def size(part):
    return len((torch.rand(1) < 0.5).nonzero())


@draw
def array(part):
    return torch.rand(3).numpy()[0] < 0.5


@draw
def layer_of_torch(part):
    return part.dropout(torch.ones(())).item()


@draw
def distribution(part):
    return torch.distributions.Bernoulli(0.5).sample().item()


@draw
def permutation(part):
    return torch.randperm(2)[0] == 0


@draw
def of_python(part):
    return random.random() < 0.5


@draw
def of_numpy(part):
    return np.random.rand() < 0.5


@draw
def of_its_own_generator(part):
    return part.generator.random() < 0.5


@draw
def of_a_named_generator(part):
    return NAMED.random() < 0.5


class LayerDrop(nn.Module):
    """A layer that is left out in half of the calls of train mode."""

    def __init__(self, draw: Draw, number: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.draw, self.dropout = draw, nn.Dropout(0.5)
        self.generator, self.torch_generator = np.random.default_rng(number), torch.Generator().manual_seed(number)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.draw(self):
            return x
        return self.layer(x)  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.layers = nn.ModuleList(make(k) for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


WHOLE = ("layers.0", "layers.1", "layers.2")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(draw: Draw = item) -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda number: LayerDrop(draw, number)).train()


def outcomes(model: Callable[[Tensor], Tensor], runs: int = 120) -> int:
    """How many different results a model in train mode has for one batch."""
    with torch.no_grad():
        return len({tuple(model(X)[0].tolist()) for _ in range(runs)})


def student(module: nn.Module) -> TracedModel:
    before = digest(module)
    traced = trace(module, X, role="student")
    assert digest(module) == before
    return traced


@pytest.mark.parametrize("name", DRAWS)
def test_each_layer_is_left_out_anew(name: str) -> None:
    module = net(DRAWS[name])
    traced = student(module)
    assert traced.report.leaves == WHOLE
    if name == "item":
        assert re.match(rf"symbolic: {HERE}:\d+: torch\.rand\(1\) would be one draw for good", traced.report.refused[0])
    assert outcomes(traced.graph_module) == outcomes(module) == 8
    note = next(note for note in traced.report.notes if note.startswith("`layers.0`, `layers.1`, `layers.2`: one node"))
    place = re.search(rf"{HERE}:(\d+) uses a random number outside tensors \(`(.+)`\)", note)
    assert place is not None
    line = Path(__file__).read_text().splitlines()[int(place[1]) - 1]
    assert place[2] in line or line.strip().startswith(place[2])
    assert traced.macs == trace(net(), X).macs  # those of all layers, whichever the runs of the trace left out
    module.eval()
    torch.testing.assert_close(traced.graph_module.eval()(X), module(X))


@pytest.mark.parametrize("name", ["of_python", "of_numpy", "of_its_own_generator"])
@pytest.mark.parametrize("steps", [{4}, {21}, {44, 63}], ids=str)
def test_another_thread_that_draws_meanwhile_changes_nothing(
    name: str, steps: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At these steps of the trace, counted through all of its attempts, Python's and numpy's generators are drawn from by others."""
    quiet = student(net(DRAWS[name])).report
    count, create = 0, RecordedGraph.create

    def meanwhile(graph: RecordedGraph, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count in steps:
            random.random(), np.random.rand()
        return create(graph, *args)

    meanwhile.__code__ = meanwhile.__code__.replace(
        co_filename=draws.__file__
    )  # else these would be lines of the user's
    monkeypatch.setattr(RecordedGraph, "create", meanwhile)
    traced = student(net(DRAWS[name]))
    assert count >= max(steps)
    assert (traced.report.leaves, traced.report.notes) == (quiet.leaves, quiet.notes)
    assert traced.report.leaves == WHOLE and outcomes(traced.graph_module) == 8


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_attention_draws_only_where_it_drops(share: float) -> None:
    """Torch tags it as an operation that may draw; what is decided by its result is decided by the data."""

    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2)
            tokens = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=share)
            return (tokens if tokens.sum() > 1e9 else tokens * 2).unflatten(2, x.shape[2:])

    report = trace(Net(lambda _: Attends()), X).report
    assert report.leaves == WHOLE
    assert any("draws anew" in note for note in report.notes) is (share > 0)


def test_a_layer_that_draws_by_a_generator_of_torch_is_left_out_anew() -> None:
    """No graph can hold the generator."""
    module = net(lambda part: torch.rand((), generator=part.torch_generator) < 0.5)
    state = module.layers[0].torch_generator.get_state()
    traced = student(module)
    assert torch.equal(state, module.layers[0].torch_generator.get_state())
    assert traced.report.leaves == WHOLE and outcomes(traced.graph_module) == 8


@pytest.mark.parametrize("name", DRAWS)
def test_nothing_changes_in_eval_mode(name: str) -> None:
    """Where the code draws in train mode only."""
    module, without = net(DRAWS[name]), net(lambda part: False)
    graphs = [trace(each, X) for each in (module, without)]
    assert graphs[0].report.leaves == graphs[0].report.notes == ()
    assert graphs[0].report.method == "symbolic"
    assert str(graphs[0].graph_module.graph) == str(graphs[1].graph_module.graph)


@pytest.mark.parametrize("name", DRAWS)
def test_a_model_whose_own_code_draws_is_refused(name: str) -> None:
    class Root(LayerDrop):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer[0](x)
            return y if self.draw(self) else self.layer[1](y)  # type: ignore[no-any-return]

    with pytest.raises(FrontendError, match=rf"uses a random number outside tensors at {HERE}:\d+: `.+`") as found:
        trace(Root(DRAWS[name], 0), torch.randn(2, 8, 6, 6), role="student")
    assert "submodule of its own" in found.value.hint


def test_pairing_finds_each_layer_that_is_left_out() -> None:
    teacher, small = net(), net(of_python)
    plan = ifx.align(teacher, small, example_inputs=X)
    assert {(pair.teacher, pair.student) for pair in plan.pairs} >= {(name, name) for name in WHOLE}
    stages = ifx.compile_stages(teacher, small, plan, main="kd", example_inputs=X)
    with torch.no_grad():
        losses = [{float(stage((X, torch.tensor([1, 2, 1, 2])))) for _ in range(40)} for stage in stages]
    assert len(losses[-1]) > 4  # whichever of three layers are left out


def test_layers_are_trained_as_they_are_left_out() -> None:
    """As often as a layer runs, its weights have gradients."""
    traced = student(net())
    weight, run = traced.module.layers[1].layer[0].weight, 0  # type: ignore[union-attr, index, union-attr]
    for _ in range(100):
        weight.grad = None
        traced.graph_module(X).sum().backward()
        run += weight.grad is not None
    assert 30 < run < 70


class Loop(nn.Module):
    """Draws for each of its layers, as encoders of speech do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training and torch.rand([]) < 0.5:
                continue
            x = block(x)
        return x


def test_the_smallest_module_that_draws_stays_whole() -> None:
    module = Net(lambda number: nn.Sequential(Loop()) if number == 1 else nn.Conv2d(8, 8, 3, padding=1)).train()
    traced = student(module)
    assert traced.report.leaves == ("layers.1.0",)
    assert outcomes(traced.graph_module) == outcomes(module) == 8
    assert any("`torch.rand([]) < 0.5`" in note and "cannot be paired" in note for note in traced.report.notes)


class Number(nn.Module):
    def forward(self) -> float:
        return random.random()


class Asks(nn.Module):
    """Takes a number that its submodule has drawn: by a return value, or by an attribute."""

    def __init__(self, *, returned: bool) -> None:
        super().__init__()
        self.conv, self.number, self.returned = (
            nn.Conv2d(8, 8, 3, padding=1),
            Number() if returned else Keeps(),
            returned,
        )

    def forward(self, x: Tensor) -> Tensor:
        found = self.number()
        left_out = found < 0.5 if self.returned else self.number.skips
        return x if left_out else self.conv(x)  # type: ignore[no-any-return]


class Keeps(nn.Module):
    skips = False

    def forward(self) -> None:
        self.skips = bool(torch.rand(()) < 0.5)


@pytest.mark.parametrize("returned", [True, False])
def test_a_number_that_leaves_the_module_that_draws_it(returned: bool) -> None:
    module = Net(lambda number: Asks(returned=returned)).train()
    if returned:
        traced = student(module)
        assert traced.report.leaves == WHOLE
        assert outcomes(traced.graph_module) == 8
    else:
        with pytest.raises(
            FrontendError, match=r"`layers.0` draws random numbers outside tensors, and changes its attributes"
        ):
            student(module)


class Chooses(nn.Module):
    """Draws, chooses and counts with tensors alone."""

    def __init__(self, *, by_size: bool) -> None:
        super().__init__()
        self.conv, self.by_size = nn.Conv2d(8, 8, 3, padding=1), by_size

    def forward(self, x: Tensor) -> Tensor:
        if self.by_size:
            return x + self.conv(x)[:, torch.rand(8) < 0.5].sum(1, keepdim=True)
        return torch.where(torch.rand(()) < 0.5, x, self.conv(x))


@pytest.mark.parametrize("by_size", [True, False])
def test_draws_that_stay_in_tensors_are_nodes(by_size: bool) -> None:
    module = Net(lambda number: Chooses(by_size=by_size)).train()
    traced = student(module)
    assert traced.report.leaves == traced.report.notes == ()
    assert outcomes(traced.graph_module) >= 8


@pytest.mark.parametrize(
    "make",
    [
        lambda _: nn.Dropout2d(0.5),
        lambda _: torchvision.ops.StochasticDepth(0.5, "row"),
        lambda _: torchvision.ops.StochasticDepth(0.5, "batch"),
        lambda _: torchvision.ops.DropBlock2d(0.3, 3),
    ],
)
def test_layers_that_draw_tensors_stay_as_they_were(make: Callable[[int], nn.Module]) -> None:
    module = Net(make).train()
    traced = student(module)
    assert traced.report.leaves == ()
    assert min(outcomes(traced.graph_module), outcomes(module)) > 1


def test_transformers_are_not_one_node() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    traced = trace(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(), torch.randn(2, 5, 16), role="student"
    )
    assert traced.report.leaves == traced.report.notes == ()
    assert "layers.1.linear2" in traced.facts or traced.facts_of("layers.1.linear2").macs


METHODS = {"symbolic": capture_symbolic, "shapes": capture_shapes, "leaves": capture_leaves, "export": capture_exported}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["item", "compared", "of_python"])
def test_no_capture_method_repeats_a_draw(monkeypatch: pytest.MonkeyPatch, method: str, name: str) -> None:
    monkeypatch.setattr(
        importlib.import_module("indistill_fx.passes.capture.trace"), "_METHODS", {method: METHODS[method]}
    )
    if method != "leaves":
        with pytest.raises(FrontendError):
            student(net(DRAWS[name]))
    else:
        assert outcomes(student(net(DRAWS[name])).graph_module) == 8


def test_a_factor_that_is_drawn_is_drawn_anew_by_an_exported_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand(()).item()

    monkeypatch.setattr(
        importlib.import_module("indistill_fx.passes.capture.trace"), "_METHODS", {"export": capture_exported}
    )
    assert outcomes(student(Net(lambda _: Scales())).graph_module) == 120


def test_a_draw_that_nobody_watched_would_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this watch the graph has one outcome, and the comparison with the module does not show it."""
    monkeypatch.setattr(
        draws.TensorDraws,
        "__torch_dispatch__",
        lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {})),
    )
    monkeypatch.setattr(draws.TensorDraws, "holds", lambda self, value: False)
    traced = student(net(compared))
    assert traced.report.leaves == () and outcomes(traced.graph_module) == 1 < outcomes(traced.module)


def test_random_generators_are_left_as_they_were() -> None:
    module = net(of_a_named_generator)
    for generator in (of_python, of_numpy, of_its_own_generator, of_a_named_generator):
        module.layers[0].draw = generator  # type: ignore[union-attr, index]
        states = random.getstate(), NAMED.bit_generator.state, module.layers[0].generator.bit_generator.state
        arrays = np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]
        student(module)
        assert states == (random.getstate(), NAMED.bit_generator.state, module.layers[0].generator.bit_generator.state)
        assert arrays == np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]


def test_source_code_of_a_student_that_draws_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"`layers.0` cannot be written as source code: it is a .*LayerDrop"):
        source_of(student(net()))


def test_channels_around_layers_that_are_left_out_stay() -> None:
    small = ifx.shrink(student(net()), ratio=0.5)
    assert small.report.widths["stem"] == (8, 8)
    assert "`layers.0` (LayerDrop)" in small.report.frozen[0].reason
    assert outcomes(small.value.graph_module.train()) == 8
    assert ifx.shrink(trace(net(), X), ratio=0.5).report.widths["layers.0.layer.0"] == (8, 4)
