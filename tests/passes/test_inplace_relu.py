"""ReLUs that overwrite what only they read: values and gradients to the bit, taps as they were, and only where it is safe."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import indistill_fx as ifx
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.inplace_relu import inplace_relu
from tests.nets import Cnn32, images, seeded


class Net(nn.Module):
    """Every kind of value that a ReLU may overwrite, and one that it may not: exp's gradient is its result."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        self.again = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        y = F.relu(self.again(y))
        y = torch.relu(y + y.sin())
        y = self.pool(y - 0.5).relu()
        return F.relu(y.exp() - y).mean((2, 3)) + F.relu(y.exp()).mean((2, 3))


def overwriting(result) -> list[str]:
    return [entry.partition(":")[0] for entry in result.report.done]


def in_place(graph_module) -> int:
    return sum(node.kwargs.get("inplace") is True for node in graph_module.graph.nodes)


def test_values_and_gradients_are_equal_to_the_bit():
    torch.manual_seed(0)
    module, x, found = Net(), images(2, 12), []
    for over in (False, True):
        own = copy.deepcopy(module).train()
        graph = cut(ifx.trace(own, x, role="student"), [":mean"]).value
        if over:
            result = inplace_relu(graph)
            assert overwriting(result) == ["act", "relu", "relu_1", "relu_2"]
            graph = result.value
        value = graph(x)[0][":mean"]
        value.square().sum().backward()
        found.append((value, *(parameter.grad for parameter in own.parameters()), own.bn.running_var))
    assert len(found[0]) == 8 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(part.any() for part in found[0])


def test_a_tap_keeps_its_value():
    module, x = Net().eval(), images(2, 12)
    traced = ifx.trace(module, x, role="student")
    taps = ["bn", "act", "again"]
    plain = cut(traced, taps).value
    result = inplace_relu(plain)
    assert overwriting(result) == []
    assert "act: `bn` is read by others too" in result.report.skipped
    over = result.value
    assert all(torch.equal(plain(x)[0][tap], over(x)[0][tap]) for tap in taps)


def test_a_module_that_somebody_hooks_is_left_alone():
    module, x = Net(), images(2, 12)
    seen = []
    module.bn.register_forward_hook(lambda module, args, output: seen.append(output))
    result = inplace_relu(cut(ifx.trace(module, x, role="student"), [":mean"]).value)
    assert "act" not in overwriting(result)
    graph = result.value
    seen.clear()
    graph(x)
    assert (seen[0] < 0).any()


def test_a_backward_hook_still_works():
    module, x, seen = Net(), images(2, 12), []
    module.bn.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    result = inplace_relu(cut(ifx.trace(module, x, role="student"), [":mean"]).value)
    assert "act" not in overwriting(result)
    graph = result.value
    seen.clear()  # tracing runs the module too
    graph(x)[0][":mean"].sum().backward()
    assert seen == [(2, 4, 10, 10)]


@pytest.mark.parametrize(("build", "count"), [(torchvision.models.resnet18, 17), (torchvision.models.vgg11_bn, 8)])
def test_the_student_of_a_stage_runs_it(build, count):
    x = images(2, 32)
    stage = ifx.compile_stages(build(num_classes=10), build(num_classes=10), main=None, example_inputs=x)[-1]
    assert in_place(stage.student) == count
    assert in_place(stage.teacher) == 0


def test_a_stage_compiles_and_trains_alike():
    teacher, students = seeded(lambda: Cnn32((16, 32, 64), 128)).double(), [seeded(Cnn32).double() for _ in range(2)]
    x = images(4, 32).double()  # the two sum in another order
    losses = []
    for student, wrap in zip(
        students, (lambda s: s, lambda s: torch.compile(s, fullgraph=True, backend="aot_eager")), strict=True
    ):
        stage = ifx.compile_stages(teacher, student, main=None, example_inputs=x)[0].train()
        assert in_place(stage.student) == 1
        loss = wrap(stage)(x)
        loss.backward()
        losses.append((loss, student.conv1.weight.grad))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(*losses, strict=True))
