"""int8 files of every task are judged by the task's own metric, as `evaluate` measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

import indistill_fx as ifx
from indistill_fx.deploy import quantize
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.quantize import QuantizeReport, quantize_onnx
from indistill_fx.errors import ConfigError, ExportError
from indistill_fx.losses.task import Classification, Language, Task

WORDS, COUNT = 11, 24


class Words(nn.Module):
    """Logits (batch, length, words)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 32), nn.Linear(32, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.table(ids)).relu())  # type: ignore[no-any-return]


def convolutions(outputs: int, *end: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, outputs, 3, padding=1), *end)


class Ages(Task):
    name = "ages"

    def check(self, logits: Tensor, labels: Tensor) -> None: ...

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - labels).abs().mean()

    def metrics(self, outputs: int) -> dict[str, Any]:
        return {"years off": MeanAbsoluteError()}


def case(name: str) -> tuple[nn.Module, Tensor, Tensor, str | Task | None, str]:
    """Model, inputs, labels that it gets right mostly but not always, task and the metric that decides."""
    torch.manual_seed(1)
    pictures, ids = torch.randn(COUNT, 3, 8, 8), torch.randint(0, WORDS, (COUNT, 7))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model, inputs, task, metric = {
        "language": (Words(), ids, Language(shift=False), "perplexity"),
        "language, shifted": (Words(), ids, "language", "perplexity"),
        "segmentation": (convolutions(4), pictures, None, "mean_iou"),
        "multilabel": (convolutions(5, pooled), pictures, "multilabel", "mean_average_precision"),
        "regression": (convolutions(2, pooled), pictures, "regression", "rmse"),
        "probabilities": (convolutions(4, pooled), pictures, None, "accuracy"),
        "own": (convolutions(1, pooled), pictures, Ages(), "years off"),
    }[name]
    with torch.no_grad():
        exact = model.eval()(inputs)
    noisy = exact + 0.3 * exact.std() * torch.randn_like(exact)
    labels = {
        "language": lambda: noisy.argmax(-1).masked_fill(torch.rand(COUNT, 7) < 0.2, -100),
        "language, shifted": lambda: ids.clone(),
        "segmentation": lambda: noisy.argmax(1).masked_fill(torch.rand(COUNT, 8, 8) < 0.1, 255),
        "multilabel": lambda: (noisy > noisy.median(0).values).float(),
        "probabilities": lambda: (4 * noisy).softmax(1),
    }.get(name, lambda: noisy)()
    return model, inputs, labels, task, metric


CASES = ["language", "language, shifted", "segmentation", "multilabel", "regression", "probabilities", "own"]


def quantized(
    name: str, folder: Path, **options: Any
) -> tuple[QuantizeReport, nn.Module, list[tuple[Tensor, Tensor]], str | Task | None, str]:
    model, inputs, labels, task, metric = case(name)
    export_onnx(model, folder / "float.onnx", inputs[:2])
    batches = [*zip(inputs.split(10), labels.split(10), strict=True)]
    report = quantize_onnx(
        folder / "float.onnx", folder / "int8.onnx", evaluation=batches, calibration=batches, task=task,
        **{"max_drop": 0.2, **options},
    )  # fmt: skip
    return report, model, batches, task, metric


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "static") for name in CASES), ("language", "dynamic"), ("language, shifted", "dynamic")],
)
def test_the_metric_is_that_of_evaluate(name: str, method: str, tmp_path: Path) -> None:
    report, model, batches, task, metric = quantized(name, tmp_path, method=method)
    measured = ifx.evaluate(model, batches, task=task)
    assert report.metric == metric == measured.metric.name and report.share == measured.metric.share
    assert report.metric_fp32 == pytest.approx(measured.value, rel=1e-4) and report.evaluation_rows == COUNT
    small = ifx.evaluate(ifx.load(f"onnxruntime:{tmp_path / 'int8.onnx'}"), batches, task=task)
    assert report.metric_int8 == pytest.approx(small.value, rel=1e-4)
    worse = report.metric_fp32 - report.metric_int8
    worse = worse if measured.metric.higher_is_better else -worse
    assert report.drop == pytest.approx(worse if report.share else worse / report.metric_fp32)
    assert (report.agreement is None) == (name in ("regression", "own"))
    assert bool(report.per_class) == (name == "probabilities")


@pytest.mark.parametrize("name", [name for name in CASES if name != "language, shifted"])  # its labels are random
def test_a_file_that_got_worse_is_not_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the last layer of the int8 file is turned round."""
    prepare = quantize._prepare

    def turned(source: Path, prepared: Path, *, beside: bool) -> None:
        prepare(source, prepared, beside=beside)
        model = onnx.load(prepared)
        weight = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")][-1].input[1]
        last = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
        last.CopyFrom(numpy_helper.from_array(-3 * numpy_helper.to_array(last), last.name))
        onnx.save(model, prepared)

    monkeypatch.setattr(quantize, "_prepare", turned)
    with pytest.raises(
        ExportError,
        match=r"was not written: int8 has .* on 24 samples, fp32 .*; the (drop|rise) of .* is more than 20\.00%",
    ):
        quantized(name, tmp_path)
    assert not (tmp_path / "int8.onnx").exists()
    monkeypatch.undo()
    quantized(name, tmp_path)


def test_a_metric_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from indistill_fx.losses.metrics import Perplexity

    values = iter([torch.tensor(3.0), torch.tensor(torch.nan)])
    monkeypatch.setattr(Perplexity, "compute", lambda self: next(values))
    with pytest.raises(ExportError, match="int8 has nan perplexity"):
        quantized("language", tmp_path)


def test_data_that_says_nothing(tmp_path: Path) -> None:
    model, inputs, labels, _, _ = case("segmentation")
    export_onnx(model, tmp_path / "float.onnx", inputs[:2])

    def run(evaluation: list[Any], **options: Any) -> None:
        quantize_onnx(
            tmp_path / "float.onnx", tmp_path / "int8.onnx", evaluation=evaluation, calibration=[(inputs,)], **options
        )

    with pytest.raises(ConfigError, match="The evaluation data is empty"):
        run([])
    with pytest.raises(ConfigError, match="None of the evaluation data's labels counts"):
        run([(inputs, torch.full_like(labels, -100))])
    with pytest.raises(ConfigError, match="need labels"):
        run([(inputs,)])
    with pytest.raises(ConfigError, match="The task embedding has no labels"):
        run([(inputs, labels)], task="embedding")
    with pytest.raises(ConfigError, match="Label 255 is out of range"):
        run([(inputs, labels)], task=Classification())


def test_attention_is_found_behind_a_guard(tmp_path: Path) -> None:
    """The exporter replaces rows that are not numbers after the softmax."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = Words()

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words.table(ids)
            x = x + nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=x.new_ones(1, 7, 7).bool())
            return self.words.head(self.words.mix(x).relu())  # type: ignore[no-any-return]

    for number, (model, found) in enumerate([(Attends(), True), (Words(), False)]):
        export_onnx(model.eval(), tmp_path / f"{number}.onnx", torch.randint(0, WORDS, (2, 7)))
        assert quantize._has_attention(onnx.load(tmp_path / f"{number}.onnx")) is found
