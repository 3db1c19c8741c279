import contextlib
import dataclasses
import hashlib
import json
import logging
import random
import runpy
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import indistill_fx as ifx
from indistill_fx.deploy import export_onnx as export
from indistill_fx.deploy import onnx_capture
from indistill_fx.deploy.check_onnx import check_onnx
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.metadata import weights_digest
from indistill_fx.deploy.onnx_session import open_session, random_inputs
from indistill_fx.deploy.parity import allowed_difference, prove
from indistill_fx.errors import ConfigError, ExportError

ROOT = Path(__file__).parents[2]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def unsettled(module):
    """Batch norms that are not the identity, so that losing one shows."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(torch.randn(part.num_features, generator=generator))
            part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
    return module


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, classes)
        unsettled(self)

    def features(self, x):
        return F.relu(self.bn(self.conv(x)))

    def forward(self, x):
        return self.fc(self.drop(self.features(x).mean((2, 3))))


def digest(module):
    """Everything a caller could notice: weights, buffers, gradients' absence, flags, attributes, random states."""
    seen = hashlib.sha256()
    for name, part in module.named_modules():
        seen.update(f"{name} {part.training} {sorted(k for k in part.__dict__)} {part.__dict__.get('cache')}".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        seen.update(
            f"{name} {id(tensor)} {tensor.requires_grad} {tensor.grad}".encode() + tensor.detach().numpy().tobytes()
        )
    seen.update(torch.get_rng_state().numpy().tobytes() + repr((random.getstate(), np.random.get_state())).encode())
    return seen.hexdigest()


def run(path, *arrays):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays, strict=True)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    module = Net().train()
    module.bn.eval()
    real = torch.randn(100, 3, 8, 8)
    before = digest(module)
    report = export_onnx(module, path, X, metadata={"classes": '["a"]'}, real_inputs=real)
    assert digest(module) == before
    return module, path, report


def test_file_agrees_at_three_batch_sizes_and_the_report_is_true(exported):
    module, path, report = exported
    assert [row.batch_size for row in report.parity] == [1, 7, 64]
    assert {row.output for row in report.parity} == {"output"}
    assert 0 < report.max_abs <= 1e-4
    assert report.max_abs == max(row.max_abs for row in (*report.parity, *report.real.parity))
    assert report.path == path and report.size == path.stat().st_size
    assert report.parameters == sum(p.numel() for p in module.parameters())
    assert report.latency_ms > 0 and report.notes == ()
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(run(path, x.numpy())[0]), module.eval()(x), rtol=0, atol=1e-5)


def test_real_inputs_are_compared_and_their_classes_counted(exported):
    real = exported[2].real
    assert real.rows == 100 and real.agreement == 1.0
    assert set(real.per_class.values()) == {1.0}
    assert [(row.batch_size, row.output) for row in real.parity] == [(100, "output")]


def test_names_sizes_and_metadata_of_the_file(exported):
    module, path, report = exported
    model = onnx.load(path)
    assert [
        (i.name, [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]) for i in model.graph.input
    ] == [("input", ["batch", 3, 8, 8])]
    assert report.input_names == ("input",) and report.output_names == ("output",)
    assert {"fc.weight", "fc.bias", "conv.weight"} <= {t.name for t in model.graph.initializer}
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata == {
        "classes": '["a"]',
        "model_class": "Net",
        "weights": weights_digest(module),
        "indistill_fx": ifx.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }
    assert model.producer_name == "indistill-fx"
    assert model.opset_import[0].version == report.opset
    assert str(ROOT).encode() not in path.read_bytes(), "the file tells nothing of this machine"


def test_nothing_lies_beside_the_file(exported):
    assert [p.name for p in exported[1].parent.iterdir()] == ["net.onnx"]


def test_outputs_are_named_by_keys_even_if_the_graph_uses_such_names_inside(tmp_path):
    class Taps(Net):
        def forward(self, x):
            h = self.features(x)
            return {"relu": h, "layer1.0:relu@2": h + 1, "conv2d": h * 2}, self.fc(h.mean((2, 3))), x, h, None, 3

    path = tmp_path / "taps.onnx"
    module = Taps().eval()
    report = export_onnx(module, path, X, batch_sizes=(1, 2), opset=22)
    assert report.opset == onnx.load(path).opset_import[0].version == 22
    names = ("relu", "layer1.0:relu@2", "conv2d", "output_0", "output_1", "output_2")
    assert report.output_names == names
    assert len(report.parity) == 2 * 6
    relu, tap, double, logits, same, again = run(path, X.numpy())
    with torch.no_grad():
        expected = module.features(X).numpy()
    np.testing.assert_allclose(relu, expected, atol=1e-5)
    np.testing.assert_allclose(tap, expected + 1, atol=1e-5)
    np.testing.assert_allclose(double, expected * 2, atol=1e-5)
    np.testing.assert_array_equal(relu, again)
    np.testing.assert_array_equal(same, X.numpy())
    assert logits.shape == (2, 5)


def test_two_inputs_of_tokens_and_a_mask_take_their_names_from_the_forward(tmp_path):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(11, 4), nn.Linear(4, 3)

        def forward(self, ids, mask):
            return self.fc((self.embed(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    ids = torch.tensor([[3, 10, 0, 1, 2]])
    report = export_onnx(Text(), tmp_path / "text.onnx", (ids, torch.ones_like(ids)), opset=18)
    assert report.opset == onnx.load(tmp_path / "text.onnx").opset_import[0].version == 18
    assert report.input_names == ("ids", "mask")
    assert [row.batch_size for row in report.parity] == [1, 7, 64]
    with pytest.raises(ConfigError, match="input_names gives 1 \\(a\\), but the module has 2 inputs"):
        export_onnx(Text(), tmp_path / "text.onnx", (ids, torch.ones_like(ids)), input_names=["a"])


def test_given_names_are_used_and_names_used_twice_refused(tmp_path):
    path, module, x = tmp_path / "m.onnx", nn.Linear(2, 2), torch.randn(2, 2)
    path.write_bytes(b"an older file, to be replaced")
    report = export_onnx(module, path, x, input_names=["image"], output_names=["logits"], batch_sizes=(1,))
    assert (report.input_names, report.output_names) == (("image",), ("logits",))
    assert run(path, np.zeros((1, 2), np.float32))[0].shape == (1, 2)
    with pytest.raises(ConfigError, match="used twice: image"):
        export_onnx(module, path, x, input_names=["image"], output_names=["image"])


def test_opsets_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="knows no opset 99"):
        export_onnx(Net(), tmp_path / "m.onnx", X, opset=99)
    with pytest.raises(ExportError, match="cannot be expressed in opset 13; torch's exporter kept opset 18") as caught:
        export_onnx(Net(), tmp_path / "m.onnx", X, opset=13)
    assert (caught.value.got, caught.value.expected) == (18, 13)
    assert list(tmp_path.iterdir()) == []


class Steps(nn.Module):
    """Decides by value, after leaving traces in itself."""

    def __init__(self):
        super().__init__()
        self.cache = None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.cache = x * 2
        self.seen += 1
        if x.sum() > 0:
            return x
        return -x


def test_failed_export_says_why_in_one_paragraph_and_leaves_all_as_it_was(tmp_path, capfd, caplog):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an older good file")
    module = Steps().train()
    before = digest(module)
    with pytest.raises(ExportError) as caught:
        export_onnx(module, path, X)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    assert "torch cannot export `Steps`" in message
    assert "data-dependent" in message and "test_export.py:" in message and "if x.sum() > 0:" in message
    assert "torch.where" in message
    assert digest(module) == before
    assert path.read_bytes() == b"an older good file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert capfd.readouterr() == ("", "") and caplog.records == []


def test_unsupported_operation_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(ExportError, match=r"No ONNX function found .*linalg_eig.* replace it, or try another opset"):
        export_onnx(Odd(), tmp_path / "m.onnx", X)


def test_float64_that_onnxruntime_cannot_compute_says_what_to_do(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double().eval()
    with pytest.raises(ExportError, match=r"weights are float64.*model\.float\(\)"):
        export_onnx(net, tmp_path / "x.onnx", example_inputs=torch.randn(2, 3, 8, 8).double())
    export_onnx(net.float(), tmp_path / "x.onnx", example_inputs=torch.randn(2, 3, 8, 8))


def test_complex_output_and_no_output_are_refused(tmp_path):
    class Returns(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    with pytest.raises(ExportError, match="Output `output` of `Returns` is complex"):
        export_onnx(Returns(lambda x: x + 1j), tmp_path / "m.onnx", X)
    with pytest.raises(ExportError, match="returns no tensor"):
        export_onnx(Returns(lambda x: 3), tmp_path / "m.onnx", X)


def test_random_behaviour_in_eval_is_detected_and_named(tmp_path):
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.ReLU(), Noisy())

        def forward(self, x):
            return {"logits": self.blocks(x)}

    with pytest.raises(ExportError, match=r"`Outer` is random in eval mode.* output `logits`.*`Outer\.blocks\.1`"):
        export_onnx(Outer(), tmp_path / "m.onnx", X)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen += 1
            return x + self.seen

    with pytest.raises(ExportError, match="it keeps a state"):
        export_onnx(Counts(), tmp_path / "m.onnx", X)


def test_a_fixed_batch_must_be_asked_for(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, x):
            return self.fc(x.view(2, -1))

    with pytest.raises(ExportError, match=r"fixes the batch of its input to 2 .*dynamic_batch=False"):
        export_onnx(Fixed(), tmp_path / "m.onnx", X)
    assert list(tmp_path.iterdir()) == []
    report = export_onnx(Fixed(), tmp_path / "m.onnx", X, dynamic_batch=False)
    assert [row.batch_size for row in report.parity] == [2]
    assert report.notes == ("The batch size is fixed to 2; latency is for that batch.",)


def test_real_inputs_need_not_divide_by_a_fixed_batch(tmp_path):
    real = torch.randn(11, 3, 8, 8)
    report = export_onnx(Net(), tmp_path / "m.onnx", real[:4], dynamic_batch=False, real_inputs=real)
    assert (report.real.rows, report.real.agreement) == (11, 1.0)
    assert [(row.batch_size, row.max_abs < 1e-4) for row in report.real.parity] == [(11, True)]


def test_digest_of_weights_is_of_values_not_of_names_and_counters():
    module = Net()
    before = weights_digest(module)
    module.bn.num_batches_tracked += 1
    assert weights_digest(nn.Sequential(module)) == before
    module.bn.running_mean[0] += 1e-3
    changed = weights_digest(module)
    with torch.no_grad():
        module.fc.bias[0] += 1e-3
    assert len({before, changed, weights_digest(module)}) == 3


def test_dynamic_size_is_proven_at_another_size_and_refused_where_the_code_fixes_it(tmp_path):
    report = export_onnx(Net(), tmp_path / "m.onnx", X, dynamic_size=True, batch_sizes=(1, 3))
    assert [row.batch_size for row in report.parity] == [1, 3, 3]
    assert run(tmp_path / "m.onnx", np.zeros((2, 3, 31, 17), np.float32))[0].shape == (2, 5)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(ExportError, match=r"and size 40x72: mat1 and mat2 shapes .*dynamic_size=False"):
        export_onnx(flat, tmp_path / "flat.onnx", X, dynamic_size=True)


class Pixels(nn.Module):
    """Takes uint8 pixels, and normalises them itself."""

    def __init__(self, order):
        super().__init__()
        self.order, self.net = order, Net()

    def forward(self, pixels):
        return self.net(pixels.permute(self.order) / 255.0)


@pytest.mark.parametrize(
    ("order", "shape", "open_shape"),
    [
        ((0, 1, 2, 3), (2, 3, 8, 12), ["batch", 3, "height", "width"]),
        ((0, 3, 1, 2), (2, 8, 12, 3), ["batch", "height", "width", 3]),
    ],
)
def test_dynamic_size_of_pixels_whichever_axis_has_the_colours(tmp_path, order, shape, open_shape):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    report = export_onnx(Pixels(order).eval(), tmp_path / "m.onnx", pixels, dynamic_size=True, batch_sizes=(1, 3))
    assert [row.batch_size for row in report.parity] == [1, 3, 3]
    assert onnxruntime.InferenceSession(tmp_path / "m.onnx").get_inputs()[0].shape == open_shape


def test_preprocessing_takes_pixels_and_computes_the_same(tmp_path, exported):
    module = exported[0].eval()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    path = tmp_path / "pixels.onnx"
    report = export_onnx(module, path, X, preprocess=(mean, std), real_inputs=torch.randn(9, 3, 8, 8))
    assert report.real.rows == 9
    graph = onnx.load(path).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert {t.name for t in graph.initializer} >= {"fc.weight", "from_pixels.scale"}
    pixels = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    images = ((pixels / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, pixels.numpy())[0], module(images).numpy(), atol=1e-5)
    with pytest.raises(ConfigError, match=r"only for images .*\(2, 7\)"):
        export_onnx(nn.Linear(7, 2), tmp_path / "m.onnx", torch.randn(2, 7), preprocess=(mean, std))


def test_weights_beside_the_file(tmp_path):
    path = tmp_path / "big.onnx"
    report = export_onnx(nn.Linear(300, 300), path, torch.randn(2, 300), external_data=True, batch_sizes=(1, 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert report.size == sum(p.stat().st_size for p in tmp_path.iterdir()) > 360_000 > path.stat().st_size
    assert run(path, np.zeros((4, 300), np.float32))[0].shape == (4, 300)


def test_path_is_tried_before_anything_runs(tmp_path):
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError

    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "missing" / "m.onnx", "No such file or directory"),
        (tmp_path / "file" / "m.onnx", "Not a directory"),
        (tmp_path, "it is a directory"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            export_onnx(Never(), path, X)
        assert caught.value.where == str(path)


def test_inputs_the_module_cannot_take(tmp_path):
    with pytest.raises(ConfigError, match=r"`Net` does not run on the example inputs \(shapes \(2, 1, 8, 8\)\)"):
        export_onnx(Net(), tmp_path / "m.onnx", torch.randn(2, 1, 8, 8))


def test_tolerance_names_output_difference_and_opset(tmp_path):
    with pytest.raises(ExportError) as caught:
        export_onnx(Net(), tmp_path / "m.onnx", X, tolerance=1e-12, opset=20)
    message = str(caught.value)
    assert "output `output` at batch size" in message and "opset 20" in message and "tolerance 1e-12" in message
    assert 0 < caught.value.got < 1e-4 and caught.value.expected == 1e-12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["weight", "batch norm", "node"])
def test_a_wrong_export_is_caught(tmp_path, monkeypatch, harm):
    """The negative control: what a faulty exporter would write must not get the name."""
    true_capture = onnx_capture.capture

    def faulty_capture(*args, **kwargs):
        program = true_capture(*args, **kwargs)
        graph = program.model.graph
        if harm == "node":
            relu = next(node for node in graph if node.op_type == "Relu")
            relu.op_type = "Sigmoid"
        else:
            name = "fc.bias" if harm == "weight" else "conv.weight_bias"
            key = next(key for key in graph.initializers if key.startswith(name))
            value = graph.initializers[key].const_value.numpy().copy()
            value[0] += 0.01
            graph.initializers[key].const_value = export_tensor(value, key)
        return program

    def export_tensor(value, name):
        import onnx_ir

        return onnx_ir.Tensor(value, name=name)

    monkeypatch.setattr(export, "capture", faulty_capture)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an older good file")
    with pytest.raises(ExportError, match="onnxruntime and torch disagree"):
        export_onnx(Net(), path, X)
    assert path.read_bytes() == b"an older good file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_users_own_warnings_and_log_levels_survive(tmp_path):
    class Warns(nn.Linear):
        def forward(self, x):
            warnings.warn("mine", UserWarning, stacklevel=1)
            return super().forward(x)

    level = logging.getLogger("torch.onnx").level
    with pytest.warns(UserWarning, match="mine"):
        export_onnx(Warns(2, 2), tmp_path / "m.onnx", torch.randn(2, 2), batch_sizes=(1,))
    assert logging.getLogger("torch.onnx").level == level


def test_module_of_a_loaded_archive_can_be_exported(tmp_path):
    program = torch.export.export(Net().eval(), (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    report = export_onnx(program.module(), tmp_path / "m.onnx", X)
    assert [row.batch_size for row in report.parity] == [1, 7, 64]


@pytest.mark.parametrize("built_in", [True, False])
def test_serving_example_needs_neither_torch_nor_us(tmp_path, exported, built_in):
    module = exported[0].eval()
    path, picture = tmp_path / "m.onnx", tmp_path / "p.png"
    names = {"classes": json.dumps(["ant", "bee", "cat", "dog", "elk"])}
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    extra = {} if built_in else {"mean": json.dumps(mean), "std": json.dumps(std)}
    export_onnx(module, path, X, preprocess=(mean, std) if built_in else None, metadata=names | extra, batch_sizes=(1,))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); assert 'torch' not in sys.modules"
    script = ROOT / "examples" / "serve_onnx.py"
    with contextlib.chdir(tmp_path):
        run_code = code.replace("sys.argv[1]", repr(str(script)))
        done = subprocess.run(
            [sys.executable, "-c", run_code, path, picture, "--top", "2"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    images = ((torch.tensor(pixels)[None] / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        odds = module(images).softmax(1)[0]
    best = int(odds.argmax())
    label = ["ant", "bee", "cat", "dog", "elk"][best]
    assert f"{picture}: {label} ({odds[best]:.1%})" in done.stdout


def test_the_server_names_by_its_number_what_the_file_has_no_name_for(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    nn.init.constant_(module[1].bias, 0.0)
    module[1].bias.data[4] = 100.0
    export_onnx(
        module, tmp_path / "x.onnx", torch.randn(1, 3, 8, 8), metadata={"classes": '["ant", "bee"]'}, batch_sizes=(1,)
    )
    classify = runpy.run_path(str(ROOT / "examples" / "serve_onnx.py"))["Classifier"](tmp_path / "x.onnx")
    assert classify(Image.new("RGB", (8, 8)))[0][0] == "class 4"


class TwoHeads(nn.Module):
    """Two heads whose largest classes are never the same."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        logits = self.net(x)
        return {"logits": logits, "fine": -logits}


@pytest.mark.parametrize(("logits", "names"), [("fine", None), (1, None), ("fine", ["a", "b"]), (None, ["a", "b"])])
def test_the_classes_are_those_of_the_output_that_is_named(tmp_path, logits, names):
    module, x = TwoHeads().eval(), torch.randn(40, 3, 8, 8)
    path = tmp_path / "two.onnx"
    report = export_onnx(module, path, X, real_inputs=x, logits=logits, output_names=names)
    judged = "logits" if logits is None else "fine"
    assert report.logits == (judged if names is None else names[judged == "fine"])
    assert report.real.per_class.keys() == set(module(x)[judged].argmax(1).tolist())
    checked = ifx.check_onnx(path, module, X, real_inputs=x, logits=logits)
    assert checked.real.per_class == report.real.per_class
    batches = [(x, module(x)["fine"].argmax(1))]
    small = ifx.quantize_onnx(
        path, tmp_path / "int8.onnx", evaluation=batches, calibration=batches, max_drop=1, logits=report.logits
    )
    assert small.metric_fp32 == (judged == "fine")


def test_an_output_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="There is no output 'finer': the outputs are logits, fine"):
        export_onnx(TwoHeads().eval(), tmp_path / "two.onnx", X, logits="finer")


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        (torch.float16, r"weights are torch\.float16.*Raise the tolerance"),
        (torch.bfloat16, "few operators in bfloat16"),
    ],
)
def test_models_in_half_precision_say_what_to_do(tmp_path, dtype, hint):
    net = deep(dtype)
    with pytest.raises(ExportError, match=hint + r".*model\.float\(\)"):
        export_onnx(net, tmp_path / "x.onnx", X.to(dtype), tolerance=1e-9)


def deep(dtype):
    torch.manual_seed(3)
    layers = [
        part for _ in range(6) for part in (nn.Conv2d(3, 3, 3, padding=1), unsettled(nn.BatchNorm2d(3)), nn.SiLU())
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 5)).to(dtype).eval()


def test_the_tolerance_follows_the_precision_and_can_fail(tmp_path):
    half = deep(torch.float16)
    report = export_onnx(half, tmp_path / "half.onnx", X.half())
    worst = max(row.max_rel for row in report.parity)
    assert 0 < worst < 8 * torch.finfo(torch.float16).eps == allowed_difference(half, X.half()) == 0.0078125
    assert check_onnx(report.path, half, X.half()).agrees
    # the negative control: an output that is off by 2% of the range, and, in float32, by the tolerance of float16
    for dtype, share in ((torch.float16, 0.02), (torch.float32, 0.0078125)):
        model = deep(dtype)
        session = open_session(export_onnx(model, tmp_path / "right.onnx", X.to(dtype)).path)
        allowed = allowed_difference(model, X.to(dtype))
        with torch.no_grad():
            assert not prove(session, model, (X.to(dtype),), batch_sizes=(7,), tolerance=allowed).failures
            outputs = model(random_inputs((X.to(dtype),), 7, seed=0)[0])
            model[-1].bias[2] += share * (outputs.max() - outputs.min())
            (failure,) = prove(session, model, (X.to(dtype),), batch_sizes=(7,), tolerance=allowed).failures
        assert f"(tolerance {allowed:g} of a range of" in failure


def test_the_coarsest_of_weights_and_inputs_sets_the_tolerance():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    expected = {deep(torch.float64): 1e-4, deep(torch.float32): 1e-4, mixed: 0.0625, nn.ReLU(): 1e-4}
    assert {model: allowed_difference(model, X) for model in expected} == expected
    assert allowed_difference(nn.ReLU(), X.half(), torch.arange(2)) == 0.0078125


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    hidden: torch.Tensor | None = None


class LikeAModelOutput(OrderedDict):
    """Of a library that does not tell torch how to take it apart."""


class LikeDiffusers(OrderedDict):
    """Of a library that tells torch how to take it apart, but not what the parts are called."""


torch.utils._pytree.register_pytree_node(
    LikeDiffusers,
    lambda value: ([*value.values()], [*value]),
    lambda parts, keys: LikeDiffusers(zip(keys, parts, strict=True)),
)


@pytest.mark.parametrize("kind", [Answer, LikeAModelOutput, LikeDiffusers])
def test_outputs_in_objects_have_their_names(kind, tmp_path):
    """The module was said to return no tensor."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return (
                kind(scores=self.layer(x), hidden=x.relu())
                if kind is Answer
                else kind({"scores": self.layer(x), "hidden": x.relu()})
            )

    net, x = Net().eval(), torch.randn(4, 6)
    report = export_onnx(net, tmp_path / "net.onnx", x)
    session = open_session(report.path)
    assert [entry.name for entry in session.get_outputs()] == ["scores", "hidden"]
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found[0], net.layer(x).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(found[1], x.relu().numpy())


def test_an_output_called_as_an_input_gets_another_name_and_only_axes_of_one_are_squeezed(tmp_path):
    """In torch, squeezing an axis that is longer than 1 does nothing; the exporter's file was not valid."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, sample, shift):
            y = self.layer(sample.squeeze(1)) + shift
            return {"sample": y.squeeze(0), "both": y[:, :, None].squeeze((1, 2)), "one": y[:, :, None].squeeze(2)}

    net, x, shift = Net().eval(), torch.randn(4, 5, 4), torch.randn(4, 1, 1)
    report = export_onnx(net, tmp_path / "net.onnx", (x, shift), batch_sizes=(2, 3))
    assert (report.input_names, report.output_names) == (("sample", "shift"), ("out_sample", "both", "one"))
    graph = onnx.load(report.path).graph
    read = {name for node in graph.node for name in node.input}
    assert {initializer.name for initializer in graph.initializer} <= read
    found = open_session(report.path).run(None, {"sample": x.numpy(), "shift": shift.numpy()})
    for got, expected in zip(found, net(x, shift).values(), strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)


def test_windows_counted_by_a_quotient_of_sizes_export_with_an_open_batch(tmp_path):
    """torch.export takes the example's number for `int` of a size, and the file was wrong for other batches; it was refused."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.side = nn.Linear(3, 6), 4
            self.register_buffer("mask", torch.randn(4, 16, 6))

        def forward(self, x):
            h, w = x.shape[2:]
            x = x.unfold(2, self.side, self.side).unfold(3, self.side, self.side).permute(0, 2, 3, 4, 5, 1)
            windows = self.layer(x.reshape(-1, self.side * self.side, 3))
            batch = int(windows.shape[0] / (h * w / self.side / self.side))
            return (windows.view(batch, -1, 16, 6) * self.mask).mean((1, 2))

    net, x = Windows().eval(), torch.randn(2, 3, 8, 8)
    report = export_onnx(net, tmp_path / "net.onnx", x, batch_sizes=(1, 3, 5))
    assert report.max_abs < 1e-5 and "traced graph" in report.notes[0]
    graph = ifx.trace(net, x).graph_module
    assert int not in {node.target for node in graph.graph.nodes}
    with torch.no_grad():
        torch.testing.assert_close(graph(torch.randn(5, 3, 8, 8)).shape, net(torch.randn(5, 3, 8, 8)).shape)


def test_the_exporters_functions_are_kept_and_none_is_added_to_them(tmp_path, monkeypatch):
    """Each file is the one that torch writes by itself, though the table of functions is built once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    built, build = [], ONNXRegistry.from_torchlib
    monkeypatch.setattr(onnx_capture, "_FUNCTIONS", {})
    counted = staticmethod(lambda *opset, **named: built.append(1) or build(*opset, **named))
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", counted)
    for name in ("a", "b"):
        export_onnx(Net(), tmp_path / f"{name}.onnx", X, batch_sizes=(1,))
    assert len(built) == 1
    (table,) = onnx_capture._FUNCTIONS.values()
    functions = {name: list(forms) for name, forms in table.functions.items()}
    with onnx_capture._functions_kept():
        ONNXRegistry.from_torchlib(table.opset_version).functions["aten::relu"].clear()
        assert {name: list(forms) for name, forms in table.functions.items()} == functions
    monkeypatch.setattr(onnx_capture, "_functions_kept", contextlib.nullcontext)
    export_onnx(Net(), tmp_path / "c.onnx", X, batch_sizes=(1,))
    assert len(built) > 1  # the control: torch by itself builds it anew
    one, two, alone = (onnx.load(tmp_path / f"{name}.onnx").graph.node for name in "abc")
    assert [*map(str, one)] == [*map(str, two)] == [*map(str, alone)]


def test_categories_that_are_given_as_real_numbers_are_compared_on_rows_of_the_example(tmp_path):
    """As DeepCTR has them, beside other columns; random ones are out of range."""

    class Clicks(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(6, 1)

        def forward(self, x):
            return self.head(torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1))

    x = torch.cat([torch.tensor([[6.0], [2.0], [0.0]]), torch.randn(3, 2)], 1)
    report = export_onnx(Clicks(), tmp_path / "m.onnx", x)
    assert report.notes == (
        "The model refuses random inputs (tokens, lengths): it was compared on rows of the example alone.",
    )
    assert {row.batch_size for row in report.parity} == {1, 7, 64}
