"""Training for int8: the rounded graph computes what the int8 file computes, and training on it repairs what rounding breaks."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn

import indistill_fx as ifx
from benchmarks.qat import EXAMPLE, Separable, int8_of, trained
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.passes.lowering.fake_quantize import RoundedActivation, RoundedLayer, fake_quantize
from indistill_fx.runs.load import about
from indistill_fx.training.chain import distill_for_int8


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", batch_size=64)


@pytest.fixture(scope="module", name="trained")
def fixture_trained(data: Data) -> Separable:
    return trained(data)


def watched(net: nn.Module, data: Data) -> nn.Module:
    """The rounded graph, its ranges those of the training images, its norms' statistics as they were."""
    graph = fake_quantize(ifx.trace(net, EXAMPLE, role="student")).value.graph_module
    graph.eval()
    for part in graph.modules():
        part.training = isinstance(part, RoundedActivation)
    with torch.no_grad():
        for batch in data.train_plain:
            graph(batch[0])
    return graph.eval()


def ranged_by_floats(net: nn.Module, data: Data) -> nn.Module:
    """The rounded graph with the ranges that the file was given: those of the float network's activations."""
    traced = ifx.trace(net, EXAMPLE, role="student")
    graph = fake_quantize(traced).value.graph_module.eval()
    ranges: dict[str, RoundedActivation] = {
        str(node.args[0]): graph.get_submodule(str(node.target))
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), RoundedActivation)
    }

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name in ranges:
                one = ranges[n.name]
                one.low.copy_(torch.minimum(one.low, value.min()))
                one.high.copy_(torch.maximum(one.high, value.max()))
                one.seen.fill_(True)
            return value

    with torch.no_grad():
        for batch in data.train_plain:
            Watch(traced.graph_module.eval()).run(batch[0])
    return graph


def test_weights_are_rounded_per_output_channel() -> None:
    layer = nn.Conv2d(3, 5, 3)
    weight = layer.weight.detach().numpy().astype(np.float64)
    scale = np.abs(weight).reshape(5, -1).max(1).reshape(5, 1, 1, 1) / 64
    wanted = torch.from_numpy(np.rint(weight / scale) * scale).float()
    x = torch.randn(2, 3, 8, 8)
    expected = nn.functional.conv2d(x, wanted, layer.bias)
    assert torch.allclose(RoundedLayer(layer)(x), expected, atol=1e-5)
    assert not torch.allclose(layer(x), expected, atol=1e-3)


def test_activations_are_rounded_between_what_training_has_shown() -> None:
    rounded = RoundedActivation()
    x = torch.tensor([-1.0, 0.0, 0.3, 4.1])
    assert torch.equal(rounded.eval()(x), x)  # nothing seen yet
    rounded.train()(x)
    step = 5.1 / 255
    expected = np.rint(x.numpy() / step) * step
    assert np.allclose(rounded.eval()(x).numpy(), expected, atol=1e-6)
    assert rounded(torch.tensor([9.0])).item() == pytest.approx(4.1, abs=step)


def test_the_report_names_layers_and_what_stays_in_floats() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))
            self.weight = nn.Parameter(torch.randn(10, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.first(x).mean((2, 3)), self.weight)

    net = Net()
    result = fake_quantize(ifx.trace(net, EXAMPLE, role="student"))
    assert result.report.done == ("first",)
    assert len(result.report.skipped) == 1 and "not a layer's own" in result.report.skipped[0]
    result.value.graph_module(EXAMPLE).sum().backward()
    assert net.first.parametrizations.weight.original1.grad is not None


def test_the_rounded_graph_computes_what_the_int8_file_does(trained: Separable, data: Data, tmp_path: Path) -> None:
    net = copy.deepcopy(trained)
    net.spread()
    int8_of(net, data, tmp_path)
    x = next(iter(data.test))[0]
    session = ort.InferenceSession(str(tmp_path / "int8.onnx"))
    file = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        rounded, plain = ranged_by_floats(net, data)(x), net(x)
    error = (plain - file).norm()
    assert error > 0.1 * file.norm()  # there is something to predict
    assert (rounded - file).norm() < 0.06 * error  # what is left: biases are whole numbers in the file


def test_training_repairs_what_rounding_breaks(trained: Separable, data: Data, tmp_path: Path) -> None:
    net = copy.deepcopy(trained)
    net.spread()
    before = evaluate(net, data.test).accuracy
    assert before == pytest.approx(evaluate(trained, data.test).accuracy, abs=0.01)
    (tmp_path / "before").mkdir()
    broken = int8_of(net, data, tmp_path / "before")
    assert broken.metric_int8 < before - 0.3
    assert evaluate(watched(copy.deepcopy(net), data), data.test).accuracy < before - 0.3  # and it is foreseen

    teacher, statistics = copy.deepcopy(net), net.point[1].running_mean.clone()
    distill_for_int8(
        teacher, net, data.train, epochs=6, learning_rate=3e-3, run_dir=tmp_path / "run", progress=False,
        example_inputs=EXAMPLE, about=about("indistill_fx.demo:DigitsStudent", "digits", (1, 8, 8)),
    )  # fmt: skip
    assert torch.equal(net.point[1].running_mean, statistics)
    assert net.training is False  # as it was given
    (tmp_path / "after").mkdir()
    assert int8_of(net, data, tmp_path / "after").metric_int8 > before - 0.08


def test_what_the_user_has_put_into_eval_mode_stays_there(data: Data, tmp_path: Path) -> None:
    net = Separable().train()
    net.depth.eval()
    seen: list[tuple[bool, bool, bool]] = []
    net.point[2].register_forward_pre_hook(
        lambda *_: seen.append((net.depth.training, net.stem[1].training, net.training))
    )
    shared = {"run_dir": tmp_path, "progress": False, "example_inputs": EXAMPLE}
    distill_for_int8(Separable(), net, data.train, epochs=1, **shared)
    assert set(seen[-2:]) == {(False, False, True)}
    assert net.training and not net.depth.training and net.stem[1].training  # as it was given


def test_the_schedule_of_the_run_before_is_left_behind(data: Data, tmp_path: Path) -> None:
    """`--schedule step --milestones 1 --qat 2` failed after the whole training, because a cosine has no milestones."""
    record = distill_for_int8(
        Separable(), Separable(), data.train, epochs=2, run_dir=tmp_path, progress=False, example_inputs=EXAMPLE, learning_rate=0.01,
        schedule="step", milestones=(1,), gamma=0.5, main_steps=3, rise_steps=10**6,
    )  # fmt: skip
    assert [epoch.learning_rate for epoch in record.epochs] == pytest.approx([0.01, 0.005])
    assert not any("no effect" in note for stage in record.stages for note in stage.notes)


def test_it_goes_on_to_the_same_bits(data: Data, tmp_path: Path) -> None:
    """The ranges of activations are part of a checkpoint."""
    start = Separable().state_dict()

    def run(where: Path, epochs: int) -> nn.Module:
        net = Separable()
        net.load_state_dict(start)
        ifx.distill(
            Separable(), net, data.train, curriculum=ifx.Curriculum(lengths=[]), epochs=epochs, int8=True, resume=True,
            run_dir=where, progress=False, example_inputs=EXAMPLE, main_options={"weight_labels": 1.0},
        )  # fmt: skip
        return net

    torch.manual_seed(5)
    teacher_state = torch.get_rng_state()
    whole = run(tmp_path / "whole", 2)
    torch.set_rng_state(teacher_state)
    run(tmp_path / "parts", 1)
    torch.set_rng_state(teacher_state)
    parts = run(tmp_path / "parts", 2)
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
