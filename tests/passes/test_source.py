"""Networks as source code: what is written computes the same, in both modes, and needs nothing of ours."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.shufflenetv2 import ShuffleNetV2

import indistill_fx as ifx
from indistill_fx.compression.write_source import source_of
from tests.nets import Cnn32, Overwritten, PreActivation, Residual, TinyTransformer, images, seeded, unsettle


def traced(module: nn.Module, inputs: Tensor, *, ratio: float | None = None) -> ifx.TracedModel:
    model = ifx.trace(unsettle(module), (inputs,), role="teacher")
    return model if ratio is None else ifx.shrink(model, ratio=ratio).value


def results(module: nn.Module, inputs: Tensor, *, training: bool) -> list[Tensor]:
    """The output; in train mode the gradients of all parameters and of the input too, ordered by shape and sum, and the statistics."""
    module = copy.deepcopy(module)
    for part in module.modules():
        part.training = training
    for parameter in module.parameters():
        parameter.requires_grad_()
    x = inputs.clone().requires_grad_()
    torch.manual_seed(0)
    output = module(x)
    if not training:
        return [output.detach()]
    output.square().sum().backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    rest = sorted([*grads, *(b.double() for b in module.buffers())], key=lambda t: (tuple(t.shape), float(t.sum())))
    return [output.detach(), x.grad, *rest]


def assert_same(model: ifx.TracedModel, inputs: Tensor) -> str:
    source = source_of(model)
    student = source.build()
    for training in (False, True):
        expected = results(model.graph_module, inputs, training=training)
        for one, other in zip(expected, results(student, inputs, training=training), strict=True):
            assert torch.equal(one, other)
    return source.text


@pytest.mark.parametrize("make", [Cnn32, Residual, Overwritten, PreActivation])
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_outputs_and_gradients_are_the_graphs(make, ratio):
    size = 32 if make is Cnn32 else 16
    assert_same(traced(seeded(make), images(4, size), ratio=ratio), images(5, size, seed=1))


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_transformer_too(ratio):
    model = seeded(TinyTransformer)
    assert_same(traced(model, images(3, 16), ratio=ratio), images(4, 16, seed=1))


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("mobilenet_v3_small", 32), ("shufflenet_v2_x0_5", 32), ("swin_t", 32), ("squeezenet1_1", 33)],
)
def test_torchvision(name, size):
    import torchvision

    torch.manual_seed(0)
    model = traced(torchvision.models.get_model(name, num_classes=7), images(2, size), ratio=0.5)
    assert_same(model, images(4, size, seed=1))


def test_blocks_of_one_structure_share_a_class_and_names_stay():
    import torchvision

    source = source_of(traced(torchvision.models.resnet18(num_classes=7), images(2, 32), ratio=0.5))
    assert [line for line in source.text.splitlines() if line.startswith("class ")] == [
        "class BasicBlock(nn.Module):",
        "class BasicBlock2(nn.Module):",
        "class Student(nn.Module):",
    ]
    original = torchvision.models.resnet18(num_classes=7).state_dict()
    assert source.state.keys() == original.keys()
    assert "        self.conv1 = nn.Conv2d(3, 32, 7, stride=2, padding=3, bias=False)\n" in source.text


def test_weights_that_are_one_stay_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
            self.head = nn.Linear(6, 6)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(self.embed(x))))

    student = source_of(traced(Tied(), torch.randn(3, 6))).build()
    assert student.head.weight is student.embed.weight
    assert_same(traced(Tied(), torch.randn(3, 6)), torch.randn(4, 6))


class Twice(nn.Module):
    """A block called twice, and one whose calls differ, which cannot be a class."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor, bend: bool = False) -> Tensor:
            return F.relu(self.conv(x)) if bend else self.conv(x)

    def __init__(self):
        super().__init__()
        self.inner, self.other = self.Inner(), self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) + x
        x = self.inner(x) * 2
        return self.other(self.other(x) - 1, bend=True).mean((2, 3))


def test_blocks_called_twice():
    text = assert_same(traced(Twice(), images(3, 8, channels=4)), images(4, 8, channels=4, seed=1))
    assert "self.inner(x)" in text
    assert "self.other.conv(" in text


@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    stride=st.integers(1, 2),
    split=st.booleans(),
    power=st.floats(0.1, 3),
)
@settings(max_examples=20, deadline=None)
def test_random_chains_of_blocks(widths, stride, split, power):
    class Part(nn.Module):
        def __init__(self, cin: int, cout: int):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(cin, 2 * cout, 3, stride, 1), nn.BatchNorm2d(2 * cout)
            self.register_buffer("scale", torch.tensor(power))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            if split:
                a, b = y.chunk(2, 1)
                return a * torch.sigmoid(b) * self.scale
            return F.gelu(y[:, : y.shape[1] // 2]) + y[:, ::2] * power

    parts = [Part(cin, cout) for cin, cout in zip([3, *widths], widths, strict=False)]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 2))
    torch.manual_seed(0)
    text = assert_same(traced(model, images(3, 8)), images(4, 8, seed=1))
    assert text.count("class Part") == 1


def test_it_loads_without_this_package(tmp_path):
    source = source_of(traced(seeded(TinyTransformer), images(2, 16), ratio=0.5))
    spec = source.save(tmp_path / "small")
    code = (
        "import sys, torch; sys.modules['indistill_fx'] = None; sys.path.insert(0, '.')\n"
        "from safetensors.torch import load_file\nfrom student import Student\n"
        "model = Student()\nmodel.load_state_dict(load_file('student.safetensors'))\n"
        "print(model.eval()(torch.ones(1, 3, 16, 16)).sum().item())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "small", capture_output=True, text=True, check=True
    )
    loaded = ifx.load(spec).eval()
    assert float(told.stdout) == pytest.approx(loaded(torch.ones(1, 3, 16, 16)).sum().item(), rel=1e-5)
    assert "indistill" not in source.text


class Strange(nn.Module):
    """Its norm is not a layer of torch.nn, and a graph keeps it whole."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([float(v) for v in x.detach().sum((1,)).tolist()])[:, None] * x


def test_what_cannot_be_written_is_named():
    model = nn.Sequential(nn.Linear(4, 4), Strange(), nn.Linear(4, 2))
    with pytest.raises(ifx.ExportError, match=r"`1` cannot be written as source code: it is a .*Strange"):
        source_of(traced(model, torch.randn(3, 4)))


class Parts(nn.Module):
    """Convolves each sample with filters of its own, and writes into a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.style, self.weight = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8, 3, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        b, c, h, w = y.shape
        filters = (self.weight * self.style(y.mean((2, 3))).view(b, 1, c, 1, 1)).view(b * c, c, 3, 3)
        y = F.conv2d(y.reshape(1, b * c, h, w), filters, padding=1, groups=b).view(b, c, h, w)
        z = y.clone()
        z[:, :, 1:-1] = y[:, :, 1:-1].relu()
        z[..., :2] = 0.5
        return self.head(z.mean((2, 3)))  # type: ignore[no-any-return]


def test_filters_of_each_sample_and_writes_into_slices_are_written() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    model = traced(Parts(), x, ratio=0.5)
    assert torch.equal(source_of(model).build().eval()(x), model.graph_module(x))


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), lambda: Dropping()]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_dtype_is_written_in_that(make, dtype: torch.dtype) -> None:
    net = make().to(dtype)
    x = torch.randn(2, next(net.parameters()).shape[1], dtype=dtype)
    model = ifx.trace(net, x)
    source = source_of(model)
    assert f"self.to({dtype})" in source.text
    assert torch.equal(source.build().eval()(x), model.graph_module(x))


def test_a_network_of_two_dtypes_is_refused_by_its_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8).double(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).float())  # type: ignore[no-any-return]

    with pytest.raises(ifx.ExportError, match=r"its weights are torch\.float32 and torch\.float64"):
        source_of(ifx.trace(Mixed(), torch.randn(2, 4, dtype=torch.float64)))


class Dropping(nn.Module):
    """Stochastic depth and functional dropout: what is computed depends on the mode."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.one(x), 0.3, self.training)
        y = self.two(x)
        if self.training:
            y = y * y.new_empty(y.shape[0], 1).bernoulli_(0.7) / 0.7
        return self.head(x + y)


def test_a_students_graph_keeps_both_modes():
    model = ifx.trace(Dropping(), (torch.randn(3, 6),), role="student")
    source = source_of(model)
    assert "self.training" in source.text
    student, x = source.build(), torch.randn(5, 6)
    for training in (True, False):
        outputs = []
        for module in (model.module, student):
            for part in module.modules():
                part.training = training
            torch.manual_seed(3)
            with torch.no_grad():
                outputs.append(module(x))
        assert torch.equal(*outputs)


def test_source_code_that_is_wrong_in_train_mode_alone_is_not_written(monkeypatch):
    from indistill_fx.compression import write_source

    model = ifx.trace(Dropping(), (torch.randn(3, 6),), role="student")
    right = write_source.class_texts
    wrong = lambda *given: [text.replace("self.training", "False") for text in right(*given)]  # noqa: E731
    monkeypatch.setattr(write_source, "class_texts", wrong)
    with pytest.raises(ifx.ExportError, match="computes something else in train mode"):
        source_of(model)


def test_blocks_that_read_any_number_of_features_share_a_class():
    model = DenseNet(growth_rate=8, block_config=(3, 2), num_init_features=16, num_classes=5)
    text = assert_same(traced(model, images(2, 32), ratio=0.5), images(3, 32, seed=1))
    assert text.count("class _DenseLayer") == 1 and "torch.cat(features, 1)" in text


def test_blocks_that_reorder_their_channels_share_a_class():
    model = ShuffleNetV2([2, 2, 2], [16, 32, 64, 64, 128], num_classes=5)
    text = assert_same(traced(model, images(2, 32), ratio=0.5), images(3, 32, seed=1))
    assert text.count("class InvertedResidual") == 2 and '"kept"' in text


class OwnLayers(nn.Module):
    """Layers written by hand that do what layers of torch.nn do, an in-place dropout, methods for signs, and sizes."""

    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x, approximate="tanh")

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    class Project(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    class Root(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.project, self.doubled = (
            self.Norm(12, eps=1e-3),
            self.Gelu(),
            self.Project(12, 12),
            self.Doubled(12, 12),
        )
        self.root = self.Root(12, eps=1e-4)
        self.tail = nn.Sequential(nn.Linear(12, 12), nn.Hardswish(), nn.Dropout(0.3, inplace=True), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.doubled(self.project(self.act(self.root(self.norm(x)))))
        y = y.add(x).mul(0.5).view((y.size(0), y.size(1) // 2, -1))
        return self.tail(y.view(x.size(0), 2 * y.size(1)).sub(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_layers_and_signs_are_written_as_a_person_would(ratio: float | None) -> None:
    torch.manual_seed(0)
    text = assert_same(traced(OwnLayers(), torch.randn(3, 12), ratio=ratio), torch.randn(5, 12))
    for part in (
        'self.act = nn.GELU(approximate="tanh")',
        "self.norm = nn.LayerNorm(12, eps=0.001)",
        "self.root = nn.RMSNorm(12, eps=0.0001)",
        "self.project = nn.Linear(12, ",
        "nn.Dropout(p=0.3)",
    ):
        assert part in text
    for part in (
        "inplace",
        "clone",
        ".size(",
        ".add(",
        ".mul(",
        ".sub(",
        "class Gelu",
        "class Norm",
        "class Root",
        "class Project",
    ):
        assert part not in text
    assert "class Doubled" in text and "view((" not in text


def test_a_write_into_a_copy_is_an_assignment() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.relu()
            z = y.clone()
            z[:, 1:, 0] = y[:, 1:, 0] * 2
            return z + y

    text = assert_same(traced(Writes(), torch.randn(2, 3, 4)), torch.randn(5, 3, 4))
    assert "[:, 1:, 0] = " in text and "with_item" not in text and text.count("clone()") == 1


def test_every_name_in_the_file_is_defined() -> None:
    for model in (traced(OwnLayers(), torch.randn(3, 12)), traced(Parts(), torch.randn(3, 3, 8, 8), ratio=0.5)):
        ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "-"]
        found = subprocess.run(ruff, input=source_of(model).text, text=True, capture_output=True)
        assert found.returncode == 0, found.stdout


def test_long_calls_have_one_argument_per_line() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(
                "abcdefghijkl,abcdefghijkl->abcdefghij", x.reshape(-1, *[1] * 11), x.reshape(-1, *[1] * 11)
            )

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_rather_long_name, self.another_rather_long_name = (nn.Parameter(torch.randn(4)) for _ in range(2))
            self.register_buffer("the_running_mean", torch.zeros(4))
            self.register_buffer("the_running_variance", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = F.batch_norm(
                x,
                self.the_running_mean,
                self.the_running_variance,
                self.a_rather_long_name,
                self.another_rather_long_name,
            )
            return y + x

    for make in (Many, Wide):
        text = assert_same(
            traced(make(), torch.randn(3, 4) if make is Wide else torch.randn(3)),
            torch.randn(5, 4) if make is Wide else torch.randn(5),
        )
        assert max(map(len, text.splitlines())) <= 120
    assert "            self.the_running_mean,\n" in text


def test_arguments_that_are_always_equal_are_one() -> None:
    """Heads of 1, 2 and 4 are one number in three places; a stride of 2 and a size of 2 in one block of two are equal by chance."""

    class Attention(nn.Module):
        def __init__(self, heads: int, stride: int) -> None:
            super().__init__()
            self.qkv, self.heads, self.stride = nn.Linear(24, 72), heads, stride

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.reshape(part.shape[0], self.heads, -1) for part in self.qkv(x).chunk(3, 1))
            return (q * k + v).flatten(1) * self.stride

    model = traced(nn.Sequential(Attention(1, 1), Attention(2, 2), Attention(4, 2)), torch.randn(3, 24))
    text = assert_same(model, torch.randn(5, 24))
    assert text.count("def __init__(self, size, value):") == 1
    pair = traced(nn.Sequential(Attention(1, 1), Attention(2, 2)), torch.randn(3, 24))
    assert "def __init__(self, size, value):" in assert_same(pair, torch.randn(5, 24))


def test_values_that_a_layer_has_by_default_are_defaults_of_the_class() -> None:
    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int = 1) -> None:
            super().__init__()
            self.conv = nn.Conv2d(before, after, 3, stride=stride, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu()

    class Pair(nn.Module):
        def __init__(self, before: int, after: int, stride: int = 1) -> None:
            super().__init__()
            self.one, self.two = Block(before, after, stride), Block(after, after)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) * 2  # type: ignore[no-any-return]

    model = traced(nn.Sequential(Pair(3, 4), Pair(4, 5, 2), Pair(5, 6)), images(2, 8))
    text = assert_same(model, images(3, 8, seed=1))
    for line in (
        "    def __init__(self, conv_in, conv_out, conv_stride=1):",
        "        self.one = Block(conv_in=conv_in, conv_out=conv_out, conv_stride=conv_stride)",
        "        self.two = Block(conv_in=conv_out, conv_out=conv_out)",
        "            Pair(conv_in=3, conv_out=4),",
        "            Pair(conv_in=4, conv_out=5, conv_stride=2),",
    ):
        assert line in text.splitlines() or line.removeprefix("    ") in text.splitlines(), text


def test_signs_bind_as_in_the_graph() -> None:
    class Signs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[1]
            y = x.view(x.shape[0], (n - 1) * (n + 1) // (2 * n - 1) - (1 - n), -1) if n == 3 else x
            return (-2.0) ** y.flatten(1).round() - (x.flatten(1) - (1.0 - x.flatten(1))).pow(2) / (2 * n)

    x = torch.randn(2, 3, 3)
    assert_same(traced(Signs(), x), torch.randn(5, 3, 3))
