import copy

import onnx
import pytest
import torch
from onnx.numpy_helper import from_array, to_array
from torch import nn

from indistill_fx.deploy.check_onnx import check_onnx
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.quantize import quantize_onnx
from indistill_fx.errors import ConfigError
from indistill_fx.graph.preprocess import Preprocess
from indistill_fx.runs.load import load

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )
        module[1].running_mean.normal_()
        module[1].running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("deployed") / "net.onnx"
    export_onnx(module, path, X, preprocess=(0.5, 0.25))
    return module, path


def edit(path, out, change):
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, out)
    return out


def test_an_unharmed_file_agrees_in_all(deployed):
    module, path = deployed
    report = check_onnx(path, module, X, real_inputs=torch.randn(20, 3, 8, 8))
    assert report.agrees and report.differences == () and report.notes == ()
    assert [row.batch_size for row in report.parity] == [1, 7, 64]
    assert report.real.rows == 20 and report.max_abs < 1e-4
    assert report.opset == 20 and report.size == path.stat().st_size
    assert module.training, "flags are put back"


@pytest.mark.parametrize("keep", [0, 20, 0.5, -5])
def test_truncated_file(deployed, tmp_path, keep):
    content = deployed[1].read_bytes()
    keep = int(keep * len(content)) if isinstance(keep, float) else keep
    (tmp_path / "t.onnx").write_bytes(content[:keep])
    report = check_onnx(tmp_path / "t.onnx", deployed[0], X)
    assert not report.agrees and len(report.differences) == 1
    assert "t.onnx" in report.differences[0]
    assert "cannot be read as ONNX" in report.differences[0] or "is empty" in report.differences[0]


def test_edited_weight_is_named_with_the_number_of_values(deployed, tmp_path):
    def change(graph):
        tensor = next(t for t in graph.initializer if t.name == "5.weight")
        values = to_array(tensor).copy()
        values[0, :2] += 0.5
        tensor.CopyFrom(from_array(values, tensor.name))

    report = check_onnx(edit(deployed[1], tmp_path / "e.onnx", change), deployed[0], X)
    assert report.differences[-1] == "weight `5.weight` differs in 2 of 20 values, by up to 0.5"
    assert report.differences[0].startswith("output `output` at batch size 1 differs by up to")


def test_edited_weight_without_effect_is_found_too(deployed, tmp_path):
    """A bias so low that its channel is dead, edited: no output shows it."""
    module = copy.deepcopy(deployed[0])
    with torch.no_grad():
        module[1].bias[0] = -1e4
    path = tmp_path / "dead.onnx"
    export_onnx(module, path, X, batch_sizes=(1,))
    with torch.no_grad():
        module[1].bias[0] = -2e4
    report = check_onnx(path, module, X)
    assert len(report.differences) == 1
    assert "differs in 1 of 4 values, by up to 1e+04" in report.differences[0]


def test_edited_graph_is_described(deployed, tmp_path):
    def swap(graph):
        next(n for n in graph.node if n.op_type == "Relu").op_type = "Sigmoid"

    def retune(graph):
        gemm = next(n for n in graph.node if n.op_type == "Gemm")
        next(a for a in gemm.attribute if a.name == "alpha").f = 2.0

    report = check_onnx(edit(deployed[1], tmp_path / "s.onnx", swap), deployed[0], X)
    assert report.differences[-1] == "the file's graph has 1 Sigmoid too many, 1 Relu too few"
    report = check_onnx(edit(deployed[1], tmp_path / "r.onnx", retune), deployed[0], X)
    assert any("(Gemm `" in d and "has other inputs, outputs or attributes" in d for d in report.differences)


def test_another_model(deployed):
    other = copy.deepcopy(deployed[0])
    with torch.no_grad():
        other[0].weight[1] *= 2
    report = check_onnx(deployed[1], other, X)
    assert "weight `0.weight` differs in 27 of 108 values" in report.differences[-1]
    wider = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))
    report = check_onnx(deployed[1], wider, X)
    assert any("has shape (1, 5), the module's (1, 7)" in d for d in report.differences)


def test_other_terms(deployed):
    module, path = deployed
    report = check_onnx(path, module, X, opset=18, input_names=["x"], output_names=["y"], batch_sizes=(1,))
    assert report.differences == (
        "the file's opset is 20, expected 18",
        "the file's inputs are named input, expected x",
        "the file's outputs are named output, expected y",
    )
    report = check_onnx(path, module, torch.randn(2, 3, 9, 8))
    assert report.differences == (
        "input `input` has shape ['batch', 8, 8, 3] in the file, [2, 9, 8, 3] for the module",
    )
    assert report.parity == () and "not compared" in report.notes[0]
    report = check_onnx(path, module, (X, X))
    assert report.differences == ("the file has 1 inputs (input), the module takes 2",)


def test_fixed_batch_and_missing_file(tmp_path):
    module = nn.Linear(3, 2)
    export_onnx(module, tmp_path / "m.onnx", torch.randn(4, 3), dynamic_batch=False)
    report = check_onnx(tmp_path / "m.onnx", module, torch.randn(2, 3))
    assert report.agrees and [row.batch_size for row in report.parity] == [4]
    assert report.notes == ("The file's batch size is fixed to 4; it was compared at that size only.",)
    with pytest.raises(ConfigError, match="There is no file"):
        check_onnx(tmp_path / "none.onnx", module, torch.randn(2, 3))


def test_missing_weights_file(tmp_path):
    module = nn.Linear(300, 300)
    export_onnx(module, tmp_path / "m.onnx", torch.randn(2, 300), external_data=True, batch_sizes=(1,))
    assert check_onnx(tmp_path / "m.onnx", module, torch.randn(2, 300), batch_sizes=(1,)).agrees
    (tmp_path / "m.onnx.data").unlink()
    (difference,) = check_onnx(tmp_path / "m.onnx", module, torch.randn(2, 300)).differences
    assert "lacks its weights" in difference and "m.onnx.data" in difference


@pytest.fixture(scope="module", params=["static", "dynamic"])
def int8(request, deployed, tmp_path_factory):
    """The file in int8, and real inputs the module's own classes tell apart."""
    module, path = deployed
    out = tmp_path_factory.mktemp("int8") / "int8.onnx"
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    real = Preprocess.make((0.5, 0.25)).to_pixels(x)
    with torch.no_grad():
        labels = copy.deepcopy(module).eval()(x).argmax(1)
    quantize_onnx(path, out, evaluation=[(real, labels)], calibration=[real], method=request.param, max_drop=0.5)
    return module, out


def test_int8_is_proven_up_to_rounding(int8):
    report = check_onnx(int8[1], int8[0], X)
    assert report.agrees and len(report.parity) == 3
    off, classes = report.notes
    assert off.startswith("The file is quantised: on random inputs its outputs are off by up to")
    assert classes == "Its classes were not compared, because that needs real inputs."
    report = check_onnx(int8[1], int8[0], X, real_inputs=torch.randn(50, 3, 8, 8), agreement=0.5)
    assert report.agrees and report.real.rows == 50
    report = check_onnx(int8[1], int8[0], X, real_inputs=torch.randn(50, 3, 8, 8), agreement=1.1)
    assert report.differences[-1].endswith("samples the module's class; 110.00% are required")


def test_int8_weight_off_by_one_step_is_found(int8, tmp_path):
    def change(graph):
        tensor = next(t for t in graph.initializer if "0.weight" in t.name and t.name.endswith("_quantized"))
        values = to_array(tensor).copy()
        values.flat[5] += 1 if values.flat[5] < 0 else -1
        tensor.CopyFrom(from_array(values, tensor.name))

    (difference,) = check_onnx(edit(int8[1], tmp_path / "e.onnx", change), int8[0], X).differences
    assert "weight `0.weight" in difference and "differs in 1 of 108 int8 values, by up to" in difference


def test_int8_of_another_module(int8):
    other = copy.deepcopy(int8[0])
    with torch.no_grad():
        other[5].bias[0] += 5e-8  # less than any tolerance
    (difference,) = check_onnx(int8[1], other, X).differences
    assert difference.startswith("the file says that it was made from the weights ")
    with torch.no_grad():
        other[5].bias[0] += 3
    assert any("weight `5.bias` differs in 1 of 5" in line for line in check_onnx(int8[1], other, X).differences)


def test_metadata(deployed, tmp_path):
    module, path = deployed
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {p.key: p.value for p in model.metadata_props} | {"classes": '["cat", "dog"]'})
    onnx.save(model, tmp_path / "m.onnx")
    report = check_onnx(tmp_path / "m.onnx", module, X, metadata={"classes": '["dog", "cat"]', "std": "[1.0]"})
    assert report.differences == (
        'the file\'s metadata says `classes` is ["cat", "dog"], expected ["dog", "cat"]',
        "the file's metadata has no `std`, expected [1.0]",
    )
    assert check_onnx(tmp_path / "m.onnx", module, X, metadata={"classes": '["cat", "dog"]'}).agrees


def test_a_file_agrees_with_itself(deployed, tmp_path):
    """The graph that a file is read as is another one when it is exported again; what it computes is the same."""
    spec, other = str(deployed[1]), tmp_path / "other.onnx"
    for module in (load(spec), load(f"onnxruntime:{spec}")):
        report = check_onnx(spec, module, X)
        assert report.agrees and len(report.parity) == 3
        (note,) = report.notes
        assert note.startswith("Only outputs were compared: what was read from an ONNX file has another graph")
    edit(spec, other, lambda graph: shift(next(w for w in graph.initializer if w.dims == [5])))
    assert "differs" in check_onnx(other, load(spec), X).differences[0]
    own = load(spec)  # a file made of it is compared as any other
    export_onnx(own, other, X)
    assert check_onnx(other, own, X).notes == ()


def test_an_int8_file_agrees_with_itself_and_on_real_inputs_with_the_file_that_it_was_made_from(int8, deployed):
    assert check_onnx(int8[1], load(f"onnxruntime:{int8[1]}"), X).agrees
    float_module = load(str(deployed[1]))
    (difference,) = check_onnx(int8[1], float_module, X).differences
    assert difference == "whether it is off by rounding alone cannot be said without real inputs"
    assert check_onnx(int8[1], float_module, X, real_inputs=torch.randn(50, 3, 8, 8), agreement=0.5).agrees


def shift(weight):
    weight.CopyFrom(from_array(to_array(weight) + 1, weight.name))
