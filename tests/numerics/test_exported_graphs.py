"""Graphs that our own passes made can be deployed too: taps as named outputs, a narrowed teacher."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import indistill_fx as ifx

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.fc = nn.Linear(12, 5)
        generator = torch.Generator().manual_seed(1)
        for norm in (self.layer1[1], self.layer2[1]):
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def teacher():
    return ifx.trace(Net().eval(), X, role="teacher")


@pytest.mark.parametrize("widths", [{}, {"layer1": 4, "layer2": 6}])
def test_taps_are_named_outputs_with_the_values_of_the_module(teacher, tmp_path, widths):
    taps, path = ["layer1", "layer2"], tmp_path / "taps.onnx"
    model = ifx.narrow(teacher, widths=widths).value if widths else teacher
    report = ifx.export_onnx(ifx.instrument(model, taps), path, X, batch_sizes=(1, 3))
    assert report.output_names == (*taps, "output")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = dict(zip(report.output_names, session.run(None, {"input": X.numpy()}), strict=True))
    with torch.no_grad():
        first = teacher.module.layer1(X)
        expected = {"layer1": first.numpy(), "layer2": teacher.module.layer2(first).numpy()}
        np.testing.assert_allclose(got["output"], teacher.module(X).numpy(), atol=1e-5)
    for tap in taps:
        value = got[tap]
        assert value.shape[1] == widths.get(tap, expected[tap].shape[1])
        for channel in range(value.shape[1]):
            gaps = np.abs(expected[tap] - value[:, channel : channel + 1]).max((0, 2, 3))
            assert gaps.min() < 1e-5, f"{tap}: channel {channel} is none of the teacher's"


def test_a_shrunk_network_is_exported_with_its_own_values(teacher, tmp_path):
    small = ifx.shrink(teacher, ratio=0.5).value.graph_module
    report = ifx.export_onnx(small, tmp_path / "small.onnx", X, batch_sizes=(1, 3, 5))
    assert [row.batch_size for row in report.parity] == [1, 3, 5]
    assert report.parameters < 0.4 * sum(p.numel() for p in teacher.module.parameters())
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"input": X.numpy()})[0], small(X).numpy(), atol=1e-5)
