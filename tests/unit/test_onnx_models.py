"""ONNX files as teachers: the same stages as with the module they came from, black boxes, and files that are refused."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import digest
from indistill_fx.loading.load import load_source
from tests.nets import unsettle


class Conv(nn.Module):
    """Residual, depthwise, squeeze and excitation, concatenation."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish())
        self.deep = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.head = nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.norm(self.deep(x)))
        x = x + y * self.gate(y)
        x = self.down(x)
        x = torch.cat([x, self.pool(x)], 1)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A patch embedding, a class token, one block of attention, a norm."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 17, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(x)
        return self.head(x[:, 0])


class Decoder(nn.Module):
    """Up again: transposed convolution, resizing, pixel shuffle; a map comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8))
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.shuffle = nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        wide = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(torch.cat([self.up(x), wide, F.pixel_shuffle(self.shuffle(x), 2)], 1))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return unsettle(make()).eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@functools.cache
def file_of(make: type[nn.Module], legacy: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path, module = Path(folder) / "t.onnx", made(make)
        if not legacy:
            ifx.export_onnx(module, path, images(2))
            return path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # without dynamic axes for one sample, which of an attention cannot be undone
            free = {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"]} if make is Attention else {}
            torch.onnx.export(module, (images(1),), str(path), dynamo=False, **free)
        return path.read_bytes()


def exported(make: type[nn.Module], path: Path, *, legacy: bool = False) -> str:
    path.write_bytes(file_of(make, legacy))
    return str(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("make", [Conv, Attention, Decoder])
def test_a_converted_file_computes_what_the_module_does_at_any_batch_size(make, legacy, tmp_path):
    module = made(make)
    source = load_source(exported(make, tmp_path / "t.onnx", legacy=legacy))
    assert source.input_size == (3, 16, 16) and "converted from ONNX" in source.notes[0]
    for count in (1, 2, 5):
        with torch.no_grad():
            assert torch.allclose(source.module(images(count)), module(images(count)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_layers_have_the_names_of_their_weights(legacy, tmp_path):
    converted = ifx.load(exported(Conv, tmp_path / "t.onnx", legacy=legacy))
    names = {name for name, part in converted.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))}
    assert names == {"stem.0", "deep", "gate.1", "down.0", "head"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("make", [Conv, Attention])
def test_a_stage_with_an_onnx_teacher_equals_the_stage_with_its_module(make, legacy, tmp_path):
    """Warm-up of pairs that both sides name, narrowed to the student's width, and the main stage."""
    module = made(make)
    converted = ifx.load(exported(make, tmp_path / "t.onnx", legacy=legacy))
    batch = (images(6), torch.tensor([0, 1, 2, 3, 4, 0]))
    plans = [
        ifx.align(teacher, made(lambda: make(4)).train(), example_inputs=images(2)) for teacher in (module, converted)
    ]
    assert [pair.student for pair in plans[0].pairs] == [pair.student for pair in plans[1].pairs]
    losses = []
    for teacher, plan in zip((module, converted), plans, strict=True):
        student = made(lambda: make(4)).train()
        # exporters fold norms into weights, by which channels are ranked: the same channels for both
        kept = {pair.student: pair.kept for pair in plans[0].pairs}
        assert all(kept.values())
        own = [pair.model_copy(update={"kept": kept[pair.student]}) for pair in plan.pairs]
        plan = plan.model_copy(update={"pairs": tuple(own)})
        stages = ifx.compile_stages(
            teacher, student, plan, example_inputs=images(2), curriculum=Curriculum(lengths=[1] * len(plan.pairs))
        )
        losses.append([stage.eval()(batch).item() for stage in stages])
        assert len(losses[-1]) == len(plan.pairs) + 1 > 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_plan_narrows_a_converted_teacher(tmp_path):
    converted = ifx.load(exported(Conv, tmp_path / "t.onnx"))
    student = made(lambda: Conv(4)).train()
    plan = ifx.align(converted, student, example_inputs=images(2))
    curriculum = Curriculum(lengths=[1] * len(plan.pairs))
    stage = ifx.compile_stages(converted, student, plan, example_inputs=images(2), curriculum=curriculum)[0]
    assert stage.macs[0] < ifx.trace(converted, images(2)).macs / 2
    assert sum(parameter.requires_grad for parameter in stage.teacher.parameters()) == 0


def test_a_black_box_has_the_files_logits_and_its_taps(tmp_path):
    module = made(Conv)
    path = exported(Conv, tmp_path / "t.onnx")
    names = [name for node in onnx.load(path).graph.node for name in node.output]
    taps = [name for name in names if "relu" in name or "cat" in name]
    box = load_source(f"onnxruntime:{path}?taps={','.join(taps)}").module
    assert len(taps) >= 2 and [name for name, _ in box.named_children()] == [*taps, "output"]
    assert set(taps) <= set(ifx.trace(box, images(2)).taps)
    model = onnx.load(path)
    model.graph.output.extend(helper.make_tensor_value_info(tap, onnx.TensorProto.FLOAT, None) for tap in taps)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    seen: dict[str, Tensor] = {}
    for tap in taps:
        box.get_submodule(tap).register_forward_hook(lambda _, __, out, tap=tap: seen.update({tap: out}))
    for count in (1, 3):
        with torch.no_grad():
            assert torch.allclose(box(images(count)), module(images(count)), rtol=1e-5, atol=1e-5)
        for tap, value in zip(taps, session.run(taps, {"input": images(count).numpy()}), strict=True):
            assert torch.allclose(seen[tap], torch.from_numpy(value), rtol=1e-5, atol=1e-5)


def test_a_stage_with_a_black_box_equals_the_stage_with_its_module(tmp_path):
    module = made(Conv)
    path = exported(Conv, tmp_path / "t.onnx")
    tap = next(name for node in onnx.load(path).graph.node for name in node.output if "cat" in name)
    box = ifx.load(f"onnxruntime:{path}?taps={tap}")
    batch = (images(6), torch.tensor([0, 1, 2, 3, 4, 0]))
    losses, kept = [], None
    for teacher, name in ((module, ":cat"), (box, tap)):
        student = made(lambda: Conv(4)).train()
        traced = ifx.trace(teacher, images(2)), ifx.trace(student, images(2), role="student")
        plan = ifx.align(*traced, fixed=[(name, ":cat")])
        pair = next(pair for pair in plan.pairs if pair.student == ":cat")
        kept = kept or pair.kept  # a black box has no weights to rank channels by
        plan = plan.model_copy(update={"pairs": (pair.model_copy(update={"kept": kept}),)})
        stages = ifx.compile_stages(*traced, plan, curriculum=Curriculum(lengths=1))
        losses.append([stage.eval()(batch).item() for stage in stages])
    assert len(losses[0]) == 2 and len(kept) == 16
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_black_box_without_taps_teaches_its_logits(tmp_path):
    path = exported(Conv, tmp_path / "t.onnx")
    box, student = ifx.load(f"onnxruntime:{path}"), made(lambda: Conv(4)).train()
    data = [(images(8), torch.arange(8) % 5)]
    record = ifx.distill(box, student, data, curriculum=Curriculum(lengths=[]), epochs=2, device="cpu")
    reference = ifx.distill(
        made(Conv), made(lambda: Conv(4)).train(), data, curriculum=Curriculum(lengths=[]), epochs=2, device="cpu"
    )
    assert record.epochs[-1].loss == pytest.approx(reference.epochs[-1].loss, rel=1e-4)


def test_one_grey_picture_tells_the_axes_of_a_black_box(tmp_path):
    """One sample of one channel: the axis of the batch and that of the channels look alike."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    path, grey = tmp_path / "grey.onnx", torch.randn(2, 1, 8, 8)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(net, (grey,), str(path), dynamo=True, verbose=False, dynamic_shapes=shapes)
    traced = ifx.trace(ifx.load(f"onnxruntime:{path}"), grey[:1], role="teacher")
    facts = traced.facts[traced.logits]
    assert (facts.kind, facts.batch_axis, facts.channel_axis) == ("vector", 0, 1)


def test_a_black_box_is_no_student(tmp_path):
    box = ifx.load(f"onnxruntime:{exported(Conv, tmp_path / 't.onnx')}")
    with pytest.raises(ConfigError, match="is a black box"):
        ifx.distill(made(Conv), box, [(images(8), torch.arange(8) % 5)], curriculum=Curriculum(lengths=[]), epochs=1)


def test_black_boxes_of_other_files_have_other_digests(tmp_path):
    first = ifx.load(f"onnxruntime:{exported(Conv, tmp_path / 'a.onnx')}")
    second = ifx.load(f"onnxruntime:{exported(Attention, tmp_path / 'b.onnx')}")
    model = onnx.load(tmp_path / "a.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1), bias.name))
    onnx.save(model, tmp_path / "c.onnx")
    third = ifx.load(f"onnxruntime:{tmp_path / 'c.onnx'}")
    assert len({digest(first), digest(second), digest(third)}) == 3 and digest(first) == digest(copy.deepcopy(first))


def small(
    nodes: list[onnx.NodeProto], *constants: onnx.TensorProto, batch: int | str = "n", **more: object
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], **more)
    model.ir_version = 10
    return model


def refusal(model: onnx.ModelProto, tmp_path: Path, spec: str = "{}") -> str:
    path = tmp_path / "t.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError) as caught:
        load_source(spec.format(path))
    return str(caught.value)


def test_an_operator_without_a_rule_is_named_and_the_black_box_offered(tmp_path):
    model = small([helper.make_node("NonZero", ["x"], ["i"], name="odd"), helper.make_node("Cast", ["i"], ["y"], to=1)])
    text = refusal(model, tmp_path)
    assert "no rule for the operator `NonZero` (node `odd`)" in text and f"onnxruntime:{tmp_path}/t.onnx" in text
    model = small([helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft", transB=1)])
    assert "`com.microsoft.FusedMatMul` (node `y`)" in refusal(model, tmp_path)


def test_sizes_follow_the_batch_and_control_flow_by_constants_is_followed(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["b"])], "then", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["c"])], "else", [], [helper.make_tensor_value_info("c", 1, None)]
    )
    constants = [
        numpy_helper.from_array(np.array(v), n) for n, v in {"zero": [0], "four": [4], "two": 2, "yes": True}.items()
    ]
    model = small(
        [
            helper.make_node("If", ["yes"], ["negative"], then_branch=branch, else_branch=other),
            helper.make_node("Shape", ["negative"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["count"]),
            helper.make_node("Mul", ["count", "two"], ["twice"]),
            helper.make_node("Size", ["x"], ["entries"]),
            helper.make_node("Div", ["entries", "four"], ["rows"]),
            helper.make_node("Concat", ["rows", "two_"], ["half"], axis=0),
            helper.make_node("Concat", ["twice", "two_"], ["long"], axis=0),
            helper.make_node("Reshape", ["negative", "long"], ["pairs"]),
            helper.make_node("ReduceSum", ["pairs"], ["all"], keepdims=1),
            helper.make_node("ConstantOfShape", ["half"], ["zeros"]),
            helper.make_node("Add", ["zeros", "all"], ["y"]),
        ],
        *constants,
        numpy_helper.from_array(np.array([2]), "two_"),
    )
    (tmp_path / "t.onnx").write_bytes(model.SerializeToString())
    converted, x = ifx.load(str(tmp_path / "t.onnx")), torch.randn(7, 4)
    assert torch.allclose(converted(x), (-x.sum()).expand(7, 2), atol=1e-5)


def test_weights_only_from_beside_the_file(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 64)
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "short").write_bytes(b"\0" * 8)
    weight = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    model = small([helper.make_node("MatMul", ["x", "w"], ["y"])], weight)
    held = model.graph.initializer[0]
    for location, offset in (
        ("../secret", "0"),
        (str(tmp_path / "secret"), "0"),
        ("link", "0"),
        ("gone", "0"),
        ("short", "0"),
        ("short", "-8"),
    ):
        held.ClearField("raw_data")
        del held.external_data[:]
        held.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": offset, "length": "64"}.items():
            held.external_data.add(key=key, value=value)
        for spec in ("{}", "onnxruntime:{}"):
            text = refusal(model, inside, spec)
            assert "only such files" in text or "end after" in text, (location, text)
    (inside / "own").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    held.external_data[0].value, held.external_data[1].value = "own", "0"
    (inside / "t.onnx").write_bytes(model.SerializeToString())
    for spec in ("", "onnxruntime:"):
        assert torch.equal(ifx.load(f"{spec}{inside}/t.onnx")(torch.ones(3, 4)), torch.ones(3, 4))


def test_damaged_and_greedy_files_are_refused(tmp_path):
    weight = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    model = small([helper.make_node("MatMul", ["x", "w"], ["y"])], weight)
    model.graph.initializer[0].dims[0] = 1 << 40
    assert "`w` of the ONNX file is damaged" in refusal(model, tmp_path)
    model = small([helper.make_node("ConstantOfShape", ["s"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])],
                  numpy_helper.from_array(np.array([1 << 40, 4]), "s"))  # fmt: skip
    assert "makes a constant of" in refusal(model, tmp_path)
    model = small([helper.make_node("Tile", ["x", "s"], ["y"])], numpy_helper.from_array(np.array([1, 1 << 30]), "s"))
    assert "too large" in refusal(model, tmp_path)
    assert "too large" in refusal(small([helper.make_node("Relu", ["x"], ["y"])], batch=1 << 40), tmp_path)
    assert "which nothing before it makes" in refusal(small([helper.make_node("Relu", ["q"], ["y"])]), tmp_path)
    functions = [
        helper.make_function("own", f"f{k}", ["a"], ["b"],
                             [helper.make_node(f"f{k + 1}", ["a"], [f"c{j}"], domain="own") for j in range(9)]
                             + [helper.make_node("Sum", [f"c{j}" for j in range(9)], ["b"])],
                             [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)])
        for k in range(12)
    ]  # fmt: skip
    functions.append(
        helper.make_function(
            "own", "f12", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 20)]
        )
    )
    bomb = small([helper.make_node("f0", ["x"], ["y"], domain="own")], functions=functions)
    bomb.opset_import.add(domain="own", version=1)
    assert "functions are expanded" in refusal(bomb, tmp_path) and "functions are expanded" in refusal(
        bomb, tmp_path, "onnxruntime:{}"
    )
    (tmp_path / "t.onnx").write_bytes(b"\x08\x0a" + b"\xff" * 64)
    with pytest.raises(ConfigError, match="damaged, or not an ONNX file"):
        load_source(str(tmp_path / "t.onnx"))


def test_what_a_spec_may_ask(tmp_path):
    path = exported(Conv, tmp_path / "t.onnx")
    for spec, text in {
        f"{path}?width=3": "takes no argument 'width'",
        f"{path}?taps=a": "takes no argument 'taps'",
        f"{path}?input=3x8x8": "is not 3x8x8",
        f"{path}@w.pt": "No weights can be loaded",
        f"onnxruntime:{path}?taps=nothing": "computes no tensor `nothing`",
        f"onnxruntime:{tmp_path}/gone.onnx": "There is no file",
        f"torchvision:resnet18@{path}": "a whole ONNX model, not weights",
    }.items():
        with pytest.raises(ConfigError, match="(?s)" + text.replace("?", r"\?")):
            load_source(spec)
