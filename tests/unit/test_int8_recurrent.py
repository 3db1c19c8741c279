"""int8 files of recurrent networks: LSTMs are rounded by the dynamic method only, other kinds by none."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import indistill_fx as ifx
from indistill_fx.cli import run
from indistill_fx.deploy.bench import bench


class Recurrent(nn.Module):
    def __init__(self, kind="LSTM", both=True, head=True, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = getattr(nn, kind)(width, 8, batch_first=True, bidirectional=both)
        self.head = nn.Linear(16 if both else 8, 4) if head else nn.Identity()

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def files(tmp_path, net, method):
    net = net.eval()
    x = torch.randn(48, 5, net.rnn.input_size)
    with torch.no_grad():
        batches = [(x, net(x).argmax(1))]
    ifx.export_onnx(net, tmp_path / "net.onnx", x[:2])
    return ifx.quantize_onnx(
        tmp_path / "net.onnx",
        tmp_path / "int8.onnx",
        evaluation=batches,
        calibration=batches,
        method=method,
        max_drop=1,
    ), x


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_what_stays_in_float_is_said(tmp_path, kind, method):
    report, _ = files(tmp_path, Recurrent(kind), method)
    assert report.in_float == ({} if (kind, method) == ("LSTM", "dynamic") else {kind: 1})


@pytest.mark.parametrize("form", [{}, {"both": False}, {"head": False}, {"width": 32}])  # width 32: a square weight
def test_an_lstm_in_int8_is_checked_as_int8(tmp_path, form):
    net = Recurrent(**form)
    _, x = files(tmp_path, net, "dynamic")
    report = ifx.check_onnx(tmp_path / "int8.onnx", net, x[:2], real_inputs=x)
    assert report.agrees, report.differences
    rows = bench({"int8": tmp_path / "int8.onnx"}, x[:2], batches=(1,), threads=(1,), seconds=0.01).rows
    assert rows[0].runtime == "onnxruntime int8"
    model = onnx.load(tmp_path / "int8.onnx")
    weight = next(one for one in model.graph.initializer if one.name.endswith("_quantized") and len(one.dims) == 3)
    numbers = numpy_helper.to_array(weight).copy()
    numbers[0, 0, :3] ^= 64
    weight.CopyFrom(numpy_helper.from_array(numbers, weight.name))
    onnx.save(model, tmp_path / "int8.onnx")
    said = ifx.check_onnx(tmp_path / "int8.onnx", net, x[:2], real_inputs=x).differences
    assert any("differs in 3 of" in line and "steps of its scale" in line for line in said), said


@pytest.mark.parametrize(
    ("kind", "method", "hint"),
    [("LSTM", "static", "--dynamic"), ("GRU", "static", "leave int8 out"), ("GRU", "dynamic", "leave int8 out")],
)
def test_a_file_in_which_nothing_is_rounded_is_not_written(tmp_path, kind, method, hint):
    with pytest.raises(ifx.ExportError, match="none of the model's operators can be computed in int8") as caught:
        files(tmp_path, Recurrent(kind, head=False), method)
    assert hint in str(caught.value.hint) and not (tmp_path / "int8.onnx").exists()


def test_export_says_what_stays_in_float(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.rnn, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.rnn(x)[0][:, -1])\n"
        "def data():\n"
        "    x = torch.randn(32, 5, 8)\n"
        "    return [(x, torch.arange(32) % 4)], [(x, torch.arange(32) % 4)]\n"
    )
    command = ["export", "nets.py:Net", "-o", "net.onnx", "--int8", "--data", "nets.py:data", "--max-drop", "100"]
    assert run([*command, "--static"]) == 0
    assert "1 LSTM layer: computed in float; with --dynamic, in int8" in capsys.readouterr().out
    assert run([*command, "--dynamic"]) == 0
    assert "computed in float" not in capsys.readouterr().out
