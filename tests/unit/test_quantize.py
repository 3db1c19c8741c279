import json
import subprocess
import sys

import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from indistill_fx.deploy import quantize
from indistill_fx.deploy.bench import bench
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.quantize import quantize_onnx
from indistill_fx.errors import ConfigError, ExportError

MEAN, STD = 0.3, 0.35


def block(cin, cout):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


class Digits:
    """A CNN trained on scikit-learn's digits for a second, its file, and batches of real data."""

    def __init__(self, directory):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            images, labels = load_digits(return_X_y=True)
            images = (torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - MEAN) / STD
            labels = torch.tensor(labels)
            self.module = nn.Sequential(
                block(1, 16), block(16, 32), nn.MaxPool2d(2), block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(32, 10),
            )  # fmt: skip
            optimiser = torch.optim.AdamW(self.module.parameters(), 3e-3)
            for _ in range(8):
                for rows in torch.randperm(1200).split(64):
                    loss = nn.functional.cross_entropy(self.module(images[rows]), labels[rows])
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
        self.module.eval()
        self.evaluation = list(zip(images[1200:].split(100), labels[1200:].split(100), strict=True))
        self.calibration = [(x,) for x in images[:300].split(100)]
        self.example = images[:2]
        self.path = directory / "digits.onnx"
        export_onnx(self.module, self.path, self.example)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return Digits(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("calibrate", ["minmax", "entropy", "percentile"])
def test_static_int8_keeps_the_accuracy_and_is_smaller(digits, tmp_path, calibrate, capfd, caplog):
    out = tmp_path / "int8.onnx"
    report = quantize_onnx(
        digits.path, out, evaluation=digits.evaluation, calibration=digits.calibration, calibrate=calibrate
    )
    with torch.no_grad():
        right = sum(int((digits.module(x).argmax(1) == y).sum()) for x, y in digits.evaluation)
    assert report.metric_fp32 == pytest.approx(right / 597) and report.metric_fp32 > 0.9
    assert report.drop <= 0.01 and report.metric_int8 > 0.9 and report.agreement > 0.98
    assert (report.method, report.calibration) == ("static", calibrate)
    assert (report.calibration_rows, report.evaluation_rows) == (300, 597)
    assert report.size_int8 == out.stat().st_size < report.size_fp32 / 2
    for files, side in ((report.metric_fp32, 0), (report.metric_int8, 1)):
        rows = {c: sum(int((y == c).sum()) for _, y in digits.evaluation) for c in range(10)}
        assert sum(rows[c] * both[side] for c, both in report.per_class.items()) == pytest.approx(597 * files)
    metadata = {p.key: p.value for p in onnx.load(out).metadata_props}
    told = json.loads(metadata.pop("int8"))
    assert told["method"] == "static" and told["metric_int8"] == report.metric_int8
    assert metadata == {p.key: p.value for p in onnx.load(digits.path).metadata_props}
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]
    assert capfd.readouterr().out == "" and caplog.records == []


def test_weights_are_int8_with_a_scale_per_channel(digits, tmp_path):
    out = tmp_path / "int8.onnx"
    quantize_onnx(digits.path, out, evaluation=digits.evaluation, calibration=digits.calibration)
    graph = onnx.load(out).graph
    weights = {t.name: t for t in graph.initializer if t.name.startswith("1.0.weight")}
    quantised = next(t for name, t in weights.items() if name.endswith("_quantized"))
    assert quantised.data_type == onnx.TensorProto.INT8
    assert next(t for name, t in weights.items() if name.endswith("_scale")).dims == [32]


def test_dynamic_int8_needs_no_calibration(digits, tmp_path):
    report = quantize_onnx(digits.path, tmp_path / "int8.onnx", evaluation=digits.evaluation, method="dynamic")
    assert (report.calibration, report.calibration_rows) == (None, 0)
    assert report.drop <= 0.01
    assert "MatMulInteger" in {n.op_type for n in onnx.load(tmp_path / "int8.onnx").graph.node}


def test_dynamic_int8_of_a_transformer(tmp_path):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
            self.fc = nn.Linear(16, 4)

        def forward(self, ids):
            return self.fc(self.encoder(self.embed(ids)).mean(1))

    module, ids = Text().eval(), torch.randint(0, 20, (64, 6))
    export_onnx(module, tmp_path / "text.onnx", ids[:2])
    with torch.no_grad():
        labels = module(ids).argmax(1)
    report = quantize_onnx(
        tmp_path / "text.onnx", tmp_path / "int8.onnx", evaluation=[(ids, labels)], method="auto", max_drop=0.2
    )
    assert report.method == "dynamic"
    assert report.metric_fp32 == 1.0 and report.metric_int8 > 0.8
    assert report.size_int8 < report.size_fp32


def test_preprocessing_stays_and_float_batches_become_pixels(digits, tmp_path):
    path = tmp_path / "pixels.onnx"
    export_onnx(digits.module, path, digits.example, preprocess=(MEAN, STD))
    report = quantize_onnx(path, tmp_path / "int8.onnx", evaluation=digits.evaluation, calibration=digits.calibration)
    assert report.drop <= 0.01 and report.metric_fp32 > 0.9
    graph = onnx.load(tmp_path / "int8.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_a_fixed_batch_is_filled_up_and_convolutions_are_static(digits, tmp_path):
    """597 rows and 37 calibration rows in pieces of 4: the last pieces are not full."""
    path = tmp_path / "fixed.onnx"
    export_onnx(digits.module, path, digits.calibration[0][0][:4], dynamic_batch=False)
    report = quantize_onnx(
        path, tmp_path / "int8.onnx", evaluation=digits.evaluation, calibration=[digits.calibration[0][0][:37]],
        method="auto",
    )  # fmt: skip
    assert (report.method, report.calibration_rows, report.evaluation_rows) == ("static", 37, 597)
    with torch.no_grad():
        right = sum(int((digits.module(x).argmax(1) == y).sum()) for x, y in digits.evaluation)
    assert report.metric_fp32 == pytest.approx(right / 597) and report.drop <= 0.01


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_weights_of_a_large_model_stay_beside_the_file(tmp_path, monkeypatch, method):
    monkeypatch.setattr(quantize, "_BESIDE", 100_000)
    module, x = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 4)), torch.randn(64, 200)
    export_onnx(module, tmp_path / "big.onnx", x[:2], external_data=True, batch_sizes=(1,))
    with torch.no_grad():
        data = [(x, module(x).argmax(1))]
    out = tmp_path / "out"
    out.mkdir()
    report = quantize_onnx(
        tmp_path / "big.onnx", out / "int8.onnx", evaluation=data, calibration=data, method=method, max_drop=0.2
    )
    assert sorted(p.name for p in out.iterdir()) == ["int8.onnx", "int8.onnx.data"]
    assert report.size_int8 == sum(p.stat().st_size for p in out.iterdir()) < report.size_fp32 / 2
    assert report.metric_int8 > 0.8


def test_too_large_a_drop_leaves_no_file(digits, tmp_path):
    """Calibrated on images a thousand times too dark, every activation saturates."""
    out = tmp_path / "int8.onnx"
    out.write_bytes(b"an older good file")
    dark = [(x * 1e-3,) for (x,) in digits.calibration]
    with pytest.raises(ExportError, match=r"was not written: int8 has .* the drop of .* is more than 1\.00%") as caught:
        quantize_onnx(digits.path, out, evaluation=digits.evaluation, calibration=dark)
    assert caught.value.got > 0.01 == caught.value.expected
    assert out.read_bytes() == b"an older good file"
    assert [p.name for p in tmp_path.iterdir()] == ["int8.onnx"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "needs calibration data"),
        ({"calibration": []}, "needs calibration data"),
        ({"method": "statik", "calibration": []}, "`method` is 'statik'. Nearest: static"),
        ({"calibrate": "minimax", "calibration": []}, "`calibrate` is 'minimax'. Nearest: minmax"),
        ({"evaluation": []}, "evaluation data is empty"),
        ({"evaluation": [(torch.zeros(1, 1, 8, 8),)]}, "need labels"),
    ],
)
def test_missing_data_and_wrong_options(digits, tmp_path, options, reason):
    with pytest.raises(ConfigError, match=reason):
        quantize_onnx(digits.path, tmp_path / "o.onnx", **{"evaluation": digits.evaluation} | options)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_quantised(digits, tmp_path):
    with pytest.raises(ConfigError, match="There is no file"):
        quantize_onnx(tmp_path / "none.onnx", tmp_path / "o.onnx", evaluation=digits.evaluation)
    (tmp_path / "text.onnx").write_text("no onnx")
    with pytest.raises(ConfigError, match="cannot be read as ONNX"):
        quantize_onnx(tmp_path / "text.onnx", tmp_path / "o.onnx", evaluation=digits.evaluation)
    once = tmp_path / "once.onnx"
    quantize_onnx(digits.path, once, evaluation=digits.evaluation, calibration=digits.calibration)
    with pytest.raises(ConfigError, match="is quantised already"):
        quantize_onnx(once, tmp_path / "o.onnx", evaluation=digits.evaluation, calibration=digits.calibration)
    rows = bench({"fp32": digits.path, "int8": once}, digits.example, batches=(1,), threads=(1,), seconds=0.01).rows
    assert [row.runtime for row in rows] == ["onnxruntime fp32", "onnxruntime int8"]


def test_python_finds_the_same_modules_after_quantising(digits, tmp_path):
    """onnxruntime's quantiser puts a folder with `metrics.py` and `models/` on the search path, which would hide the user's files."""
    program = (
        "import sys, torch; from indistill_fx.deploy.quantize import quantize_onnx; path = list(sys.path); "
        "evaluation = [(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))]; "
        f"quantize_onnx({str(digits.path)!r}, {str(tmp_path / 'int8.onnx')!r}, evaluation=evaluation, method='dynamic'); "
        "assert any('onnxruntime.transformers' in name for name in sys.modules), 'the import has come'; "
        "assert sys.path == path, set(sys.path) - set(path)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class WithFeatures(nn.Module):
    def __init__(self, module, form):
        super().__init__()
        self.features, self.head, self.form = module[:-1], module[-1], form

    def forward(self, x):
        features = self.features(x)
        return self.form(features, self.head(features))


def test_the_logits_are_judged_where_features_come_first(digits, tmp_path):
    path = tmp_path / "both.onnx"
    module = WithFeatures(digits.module, lambda features, logits: {"features": features, "logits": logits})
    images = torch.cat([x for x, _ in digits.evaluation])
    exported = export_onnx(module, path, digits.example, real_inputs=images)
    assert set(exported.real.per_class) <= set(range(10))
    alone, both = (
        quantize_onnx(file, tmp_path / "int8.onnx", calibration=digits.calibration, evaluation=digits.evaluation)
        for file in (digits.path, path)
    )
    assert both.metric_fp32 == alone.metric_fp32 > 0.9
    assert abs(both.metric_int8 - alone.metric_int8) < 0.01


def test_two_outputs_of_which_either_may_be_the_logits(digits, tmp_path):
    path = tmp_path / "both.onnx"
    module = WithFeatures(digits.module, lambda features, logits: (features, logits))
    exported = export_onnx(module, path, digits.example, real_inputs=digits.evaluation[0][0])
    assert exported.real.agreement is None
    with pytest.raises(ConfigError, match="no output is called `logits`"):
        quantize_onnx(path, tmp_path / "int8.onnx", calibration=digits.calibration, evaluation=digits.evaluation)


def test_samples_without_a_class_do_not_count(digits, tmp_path):
    x, y = digits.evaluation[0]
    some = [(x, torch.where(torch.arange(len(y)) < 30, -100, y))]
    report, known = (
        quantize_onnx(
            digits.path, tmp_path / "int8.onnx", calibration=digits.calibration, evaluation=batches, max_drop=1
        )
        for batches in (some, [(x[30:], y[30:])])
    )
    assert report == known
