"""Every form of spec, loaded; every mistake in one, answered."""

from __future__ import annotations

import argparse
import subprocess
import sys
import textwrap
import types
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.export
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from indistill_fx.errors import ConfigError, FrontendError, IndistillError
from indistill_fx.loading.inputs import parse_input
from indistill_fx.loading.load import load_source
from indistill_fx.loading.spec import parse_spec
from indistill_fx.loading.state_dicts import load_weights
from indistill_fx.runs.load import load

FACTORIES = """
    import torch
    from torch import nn

    ready = nn.Linear(2, 2)
    width = 3


    class Net(nn.Module):
        def __init__(self, width: int = 4, name: str = "net"):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
            self.name = name

        def forward(self, x):
            return self.body(x)


    def make(width: int = 4):
        return Net(width).eval()


    def fail_deep():
        return nn.Linear("three", 2)  # line 24


    def fail():
        return [][1]  # line 28


    def leave():
        raise SystemExit(3)


    def make_nothing():
        return 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the user's code in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(textwrap.dedent(FACTORIES))
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if name.startswith(("nets", "broken", "pkg")):
            del sys.modules[name]


def randomise(module: nn.Module) -> nn.Module:
    """Statistics and weights unlike those of a fresh model, so that not loading them would show."""
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
    return module


def assert_same(module: nn.Module, other: nn.Module) -> None:
    ours, theirs = module.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [type(part).__name__ for part in module.modules()] == [type(part).__name__ for part in other.modules()]
    assert [part.training for part in module.modules()] == [part.training for part in other.modules()]


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": torchvision.models.resnet18,
    "torchvision vit_b_16": torchvision.models.vit_b_16,
    "torchvision swin_t": torchvision.models.swin_t,
    "torchvision mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "torchvision googlenet": lambda: torchvision.models.googlenet(init_weights=False),
    "torchvision lraspp": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None),
    "timm resnet10t": lambda: timm.create_model("resnet10t"),
    "timm vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto"),
    "timm fasternet_t0": lambda: timm.create_model("fasternet_t0"),  # holds one of its own methods
    "torch function": lambda: nn.TransformerEncoderLayer(8, 2, activation=torch.relu),
    "torch.nn.functional": lambda: nn.TransformerEncoderLayer(8, 2, activation="gelu"),
    "recurrent": lambda: nn.LSTM(3, 4, bidirectional=True),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_module_is_loaded_as_it_was_saved(name: str, tmp_path: Path) -> None:
    model = WHOLE[name]().eval()
    list(model.modules())[-1].train()
    torch.save(model, tmp_path / "model.pt")
    source = load_source(str(tmp_path / "model.pt"))
    assert_same(source.module, model)
    assert source.kind == "module file"
    if name == "timm vit_tiny":
        assert source.input_size == (3, 32, 32)
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(source.module.eval()(images), model.eval()(images))


def test_odd_tensors_of_a_module_are_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.register_buffer("expanded", torch.arange(3.0)[:, None].expand(3, 5))
    model.register_buffer("empty", torch.empty(0, 4))
    model.register_buffer("eighth", torch.ones(4).to(torch.float8_e4m3fn))
    model.register_buffer("short", torch.ones(4, dtype=torch.bfloat16)[1:])
    model.scale = nn.Parameter(torch.ones(2))
    model.scale.is_scale = True
    torch.save(model, tmp_path / "odd.pt")
    loaded: Any = load(str(tmp_path / "odd.pt"))
    assert loaded[1].weight is loaded[0].weight
    assert loaded.expanded.stride() == (1, 0) and torch.equal(loaded.expanded, model.expanded)
    assert loaded.scale.is_scale and loaded.eighth.dtype is torch.float8_e4m3fn and loaded.short.shape == (3,)


def test_data_parallel_wrapper_is_taken_off(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(nn.Linear(2, 3)), tmp_path / "model.pt")
    source = load_source(str(tmp_path / "model.pt"))
    assert type(source.module) is nn.Linear
    assert source.notes == ("taken out of its DataParallel wrapper",)


def test_foreign_class_needs_trust(here: Path) -> None:
    torch.save(load("nets:make"), "net.pt")
    with pytest.raises(ConfigError, match=r"names things outside .* nets\.Net.*nothing in it was run.*--trust nets"):
        load("net.pt")
    source = load_source("net.pt", trust=["nets"])
    assert type(source.module).__name__ == "Net"
    assert source.notes == ("trusted package nets: nets.Net",)
    with pytest.raises(ConfigError, match="not a list of packages"):
        load("net.pt", trust="nets")
    with pytest.raises(ConfigError, match="cannot be trusted"):
        load("net.pt", trust=["nets; import os"])


def test_honest_files_that_are_refused_get_a_way_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"weight": torch.ones(1), "args": argparse.Namespace(lr=1)}, "checkpoint.pt")
    with pytest.raises(ConfigError, match=r"argparse\.Namespace.*ask for its weights alone"):
        load("nets:make@checkpoint.pt")
    monkeypatch.setattr(load("nets:make").__class__, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Net", sys.modules["nets"].Net, raising=False)
    torch.save(load("nets:make"), "script.pt")
    with pytest.raises(ConfigError, match=r"__main__\.Net.*script\.py:make_model@"):
        load("script.pt")


def test_trusted_package_is_found_in_the_working_directory(here: Path) -> None:
    torch.save(load("nets:make"), "net.pt")
    del sys.modules["nets"]
    path = list(sys.path)
    assert type(load("net.pt", trust=["nets"])).__name__ == "Net"
    assert sys.path == path
    del sys.modules["nets"]
    (here / "nets.py").unlink()
    with pytest.raises(ConfigError, match=r"trusted nets\.Net cannot be imported: ModuleNotFoundError"):
        load("net.pt", trust=["nets"])


def test_class_that_the_installed_library_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        layer = type("Layer", (nn.Identity,), {"__module__": "torchvision.ops.removed"})
        patch.setitem(sys.modules, "torchvision.ops.removed", types.SimpleNamespace(Layer=layer))
        torch.save(nn.Sequential(layer()), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"needs torchvision\.ops\.removed\.Layer, which the installed torchvision"):
        load(str(tmp_path / "model.pt"))


# --- constructors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "size", "mean"),
    [
        ("torchvision:resnet18", (3, 224, 224), 0.485),
        ("torchvision:inception_v3", (3, 299, 299), 0.485),
        ("torchvision:googlenet", (3, 224, 224), 0.485),
        ("torchvision:vit_b_32?image_size=64", (3, 64, 64), 0.485),
        ("torchvision:lraspp_mobilenet_v3_large", (3, 520, 520), 0.485),
        ("torchvision:r3d_18", None, 0.43216),
        ("timm:resnet10t", (3, 176, 176), 0.485),
        ("timm:resnet10t?in_chans=1&num_classes=7", (1, 176, 176), 0.485),
        ("timm:vit_tiny_patch16_224?img_size=64&depth=1", (3, 64, 64), 0.5),
    ],
)
def test_constructor_knows_its_input(spec: str, size: tuple[int, ...] | None, mean: float) -> None:
    source = load_source(spec)
    assert source.input_size == size
    assert source.normalisation is not None and source.normalisation[0][0] == mean
    assert source.kind == spec.partition(":")[0]
    assert all(part.training for part in source.module.modules())


def test_arguments_reach_the_constructor() -> None:
    model: Any = load("torchvision:resnet18?num_classes=10&zero_init_residual=True&width_per_group=64")
    assert model.fc.out_features == 10
    assert not model.layer1[0].bn2.weight.any()
    timm_model: Any = load("timm:resnet10t?num_classes=0&act_layer=silu")
    assert isinstance(timm_model.act1, nn.SiLU)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet8", r"torchvision has no model 'resnet8'\. Nearest: resnet18"),
        ("timm:resnet10", r"timm has no model 'resnet10'\. Nearest: resnet10t"),
        (
            "torchvision:resnet18?num_clases=10",
            r"unexpected keyword.*'num_clases'.*Its arguments: .*num_classes=1000",
        ),
        ("torchvision:fcn_resnet50?aux_los=1", r"there is no argument 'aux_los'.*Its arguments: .*aux_loss=None"),
        ("torchvision:resnet18?num_classes=ten", r"num_classes='ten'.*Its arguments: "),
        (
            "timm:resnet10t?num_clases=10",
            r"unexpected keyword argument 'num_clases'.*Its arguments: num_classes=1000",
        ),
        ("torchvision:resnet18?weights=IMAGENET", r"no weights 'IMAGENET'\. Choose from: IMAGENET1K_V1, DEFAULT"),
        ("torchvision:resnet18?num_classes", r"'num_classes' is not an argument.*name=value"),
        ("torchvision:resnet18?width=1&width=2", r"is not an argument of its own"),
        ("torchvision:", "names no model"),
        (":make", "names no model"),
    ],
)
def test_wrong_constructor_is_answered(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["torchvision:resnet18?weights=DEFAULT", "torchvision:resnet18?pretrained=True"])
def test_failing_download_is_answered(spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def refuse(request: Any, *_: Any, **__: Any) -> None:
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(FrontendError, match=r"pretrained weights: URLError.*no route.*@weights\.safetensors"):
        load(spec)
    assert "download.pytorch.org" in asked[0]


def test_pretrained_reaches_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    with pytest.raises(FrontendError, match="timm:resnet10t could not be built with pretrained weights: OSError"):
        load("timm:resnet10t?pretrained=True")


def test_missing_timm_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install \"indistill-fx\[timm\]\""):
        load("timm:resnet10t")


# --- the user's own code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["nets.py", "nets"])
def test_factory_or_class_is_called(place: str, here: Path) -> None:
    made = load_source(f"{place}:make?width=7")
    assert made.kind == "factory" and made.input_size is None
    assert made.module.state_dict()["body.0.weight"].shape == (7, 3)
    assert not made.module.training
    named: Any = load(f"{place}:Net?width=2&name=small")
    assert named.name == "small" and named.training


def test_package_in_the_working_directory_is_found(here: Path) -> None:
    (here / "pkg").mkdir()
    (here / "pkg" / "models.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(1, 1)\n")
    path = list(sys.path)
    assert isinstance(load("pkg.models:make"), nn.Linear)
    assert sys.path == path


def test_a_mere_folder_among_the_libraries_hides_no_file(here: Path, monkeypatch) -> None:
    (here / "nets_of_mine.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(1, 1)\n")
    (here / "libraries" / "nets_of_mine").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(here / "libraries"), *sys.path])
    assert isinstance(load("nets_of_mine:make"), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("nets.py:fail", FrontendError, r"nets\.py:fail failed at .*nets\.py:28: IndexError"),
        ("nets.py:fail_deep", FrontendError, r"failed at .*nets\.py:24: TypeError"),
        ("nets.py:leave", FrontendError, r"failed at .*nets\.py:32: SystemExit: 3"),
        ("nets.py:make_nothing", FrontendError, "made no module but a value of type int"),
        ("nets.py:mak", ConfigError, r"has no 'mak'\. Nearest: make"),
        ("nets.py:ready", ConfigError, "is a module already made, not a factory"),
        ("nets.py:width", ConfigError, "is a int, not a factory"),
        ("nets.py:make?with=3", ConfigError, r"unexpected keyword argument 'with'.*It takes \(width: int = 4\)"),
        ("net.py:make", ConfigError, r"no file 'net\.py'"),
        ("netz:make", ConfigError, "no Python module 'netz'"),
        ("nets.sub:make", ConfigError, r"no Python module 'nets\.sub'"),
        ("broken.py:make", FrontendError, r"Importing broken\.py failed at .*broken\.py:2: ZeroDivisionError"),
        ("broken_syntax.py:make", FrontendError, r"failed at .*broken_syntax\.py:2: SyntaxError"),
        ("broken_import:make", FrontendError, r"broken_import\.py:1: ModuleNotFoundError: No module named 'absent'"),
        ("broken_exit.py:make", FrontendError, r"broken_exit\.py:2: SystemExit"),
    ],
)
def test_failing_code_is_answered_by_file_and_line(spec: str, kind: type, message: str, here: Path) -> None:
    (here / "broken.py").write_text("import torch\nwidth = 1 / 0\n")
    (here / "broken_syntax.py").write_text("import torch\nwidth = = 1\n")
    (here / "broken_import.py").write_text("import absent\n")
    (here / "broken_exit.py").write_text("import sys\nsys.exit('usage: …')\n")
    with pytest.raises(kind, match=message):
        load(spec)


# --- weights --------------------------------------------------------------------------------------------------------


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".old")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".old"])
@pytest.mark.parametrize("model", ["nets.py:make", "torchvision:squeezenet1_1?num_classes=2"])
def test_weights_are_loaded(model: str, suffix: str, here: Path) -> None:
    expected = randomise(load(model))
    save_weights(expected.state_dict(), here / f"weights{suffix}")
    source = load_source(f"{model}@weights{suffix}")
    assert_same(source.module, expected)
    assert source.notes == ()


def test_wrapped_weights_are_unwrapped_and_noted(here: Path) -> None:
    expected = randomise(load("nets:make"))
    state = {f"module.{key}": value for key, value in expected.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, "checkpoint.pt")
    source = load_source("nets:make@checkpoint.pt")
    assert_same(source.module, expected)
    assert source.notes == (
        "weights: taken from 'state_dict' of the checkpoint",
        "weights: the prefix 'module.' was removed from every key",
    )


def test_weights_of_another_model_are_listed(here: Path) -> None:
    state = load("nets:make?width=5").state_dict()
    del state["body.1.bias"]
    state["head.weight"] = torch.ones(2)
    save_file(state, "weights.safetensors")
    with pytest.raises(ConfigError) as caught:
        load("nets:make@weights.safetensors")
    message = str(caught.value)
    assert "not those of this Net: 1 missing: body.1.bias; 1 unexpected: head.weight; 5 of another shape" in message
    assert "body.0.weight (file (5, 3), model (4, 3))" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whole.pt", "is a whole module, not a state dict.*without a model before it"),
        ("list.pt", "holds a list, not a state dict"),
        ("empty.pt", "is not a state dict: it is empty"),
        ("mixed.pt", "is not a state dict: epoch is not a tensor"),
        ("absent.pt", r"no file `absent\.pt`.*Nearest: "),
    ],
)
def test_file_that_is_no_state_dict_is_answered(name: str, message: str, here: Path) -> None:
    torch.save(nn.Linear(1, 1), "whole.pt")
    torch.save([torch.ones(1)], "list.pt")
    torch.save({}, "empty.pt")
    torch.save({"a": torch.ones(1), "epoch": 3}, "mixed.pt")
    with pytest.raises(ConfigError, match=message):
        load(f"nets:make@{name}")


# --- exported programs ----------------------------------------------------------------------------------------------


def export(module: nn.Module, images: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)


@pytest.mark.parametrize("training", [False, True])
def test_exported_program_is_loaded(training: bool, tmp_path: Path) -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.AdaptiveAvgPool2d(2), nn.Flatten(1))
    model = randomise(body).train(training)
    images = torch.randn(3, 3, 9, 9)
    export(model, images, tmp_path / "model.pt2")
    source = load_source(str(tmp_path / "model.pt2"))
    assert source.kind == "exported program" and source.input_size == (3, 9, 9)
    assert source.example_inputs is not None and torch.equal(source.example_inputs[0], images)
    assert source.module.training is training
    assert ("training mode" in source.notes[0]) is training
    other = torch.randn(5, 3, 9, 9)
    assert torch.equal(source.module(other), model(other))
    source.module.train().eval()  # flags can be kept and restored, as on any module
    assert {key for key in source.module.state_dict() if "num_batches" not in key} <= set(model.state_dict())


def test_exported_program_takes_weights(here: Path) -> None:
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.ReLU()) for _ in range(2))
    images = torch.randn(2, 3)
    export(model, images, here / "model.pt2")
    save_file(other.state_dict(), "other.safetensors")
    loaded = load("model.pt2@other.safetensors")
    assert torch.equal(loaded(images), other(images))
    assert not torch.equal(loaded(images), model(images))


# --- files of other kinds -------------------------------------------------------------------------------------------


def write_others(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    torch.save(model, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), folder / "state.pt")
    torch.save(model.state_dict(), folder / "old_state.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": model.state_dict(), "epoch": 1}, folder / "checkpoint.pt")
    torch.save(torch.ones(2), folder / "tensor.pt")
    save_file(model.state_dict(), folder / "state.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(model).save(folder / "script.pt")
    np.savez(folder / "arrays.npz", a=np.ones(2))
    contents = {
        "empty.pt": b"",
        "text.pt": "größer\nals".encode(),
        "page.pt": b"<!DOCTYPE html><html>404",
        "pointer.pt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "plain.pt": b"\x80\x04K\x01.",
        "noise.pt": bytes(range(255, 0, -1)),
        "half.pt": (folder / "state.pt").read_bytes()[:700],
        "keras.pt": b"\x89HDF\r\n\x1a\n",
        "packed.pt": b"\x1f\x8b\x08",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.pt").mkdir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("legacy.pt", r"whole module in the format before PyTorch 1\.6.*Save it again"),
        ("state.pt", r"is a state dict of 2 tensors.*torchvision:NAME@.*state\.pt"),
        ("old_state.pt", "is a state dict of 2 tensors"),
        ("checkpoint.pt", "is a state dict of 2 tensors"),
        ("state.safetensors", "is a state dict of 2 tensors"),
        ("tensor.pt", "neither a module nor a state dict"),
        ("script.pt", "TorchScript archive"),
        ("arrays.npz", "numpy archive"),
        ("empty.pt", "is empty"),
        ("text.pt", "a text file that begins with 'größer'"),
        ("page.pt", "a text file that begins with '<!DOCTYPE html>"),
        ("pointer.pt", "a Git LFS pointer.*git lfs pull"),
        ("plain.pt", "a plain pickle"),
        ("noise.pt", "not a model file, or its beginning is damaged"),
        ("half.pt", "is damaged"),
        ("keras.pt", "an HDF5 file"),
        ("packed.pt", "a gzip archive"),
        ("folder.pt", "is a directory"),
        ("stat.pt", r"no file `stat\.pt`.*Nearest: .*state\.pt"),
        ("no/such/model.pt", "There is no directory `no/such` either"),
        ("a" * 5000, "There is no file"),
        ("a" * 5000 + ".pt", "cannot be read"),
        ("a\0b.pt", "There is no file"),
        ("resnet18", "torchvision:resnet18 or timm:resnet18"),
        ("", "The model spec is empty"),
        ("state.pt?width=3", "gives arguments to a file"),
        ("nets.py:make@", "names no weights after '@'"),
    ],
)
def test_file_of_another_kind_is_answered(name: str, message: str, here: Path) -> None:
    write_others(here)
    with pytest.raises(ConfigError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


# --- parsing --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_input_shapes_are_read(size: list[int]) -> None:
    assert parse_input("x".join(map(str, size))).shape == tuple(size)
    assert parse_input(" " + "X".join(map(str, size)) + "\n").shape == tuple(size)


@pytest.mark.parametrize(
    "text", ["", "x", "3x", "3xx4", "3x0x3", "-1x3", "3,32,32", "3x3.5", "axb", "٣x٣", "1e3", "9" * 12]
)
def test_other_input_shapes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="3x224x224"):
        parse_input(text)


def test_input_beyond_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="would not fit in memory"):
        parse_input("3x100000x100000")


VALUES = st.one_of(
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(), max_size=3),
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, min_size=1, max_size=4))
def test_arguments_are_python_literals(arguments: dict[str, Any]) -> None:
    query = "&".join(f"{key}={value!r}" for key, value in arguments.items())
    assert parse_spec(f"pkg.nets:make?{query}").arguments == arguments


def test_other_arguments_are_strings() -> None:
    assert parse_spec("a.py:b?c=hello&d=1,2&e=&f='x'").arguments == {"c": "hello", "d": (1, 2), "e": "", "f": "x"}


@given(st.text(max_size=30))
def test_any_text_is_loaded_or_answered(text: str) -> None:
    try:
        parse_spec(text)
    except IndistillError as error:
        assert str(error)


def test_loading_is_not_paid_for_by_importing() -> None:
    script = "import sys; import indistill_fx.loading.load; print([m for m in ('torch', 'torchvision', 'timm') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_weights_without_the_counters_of_batch_norms_are_loaded_and_that_is_said(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.weight)
    torch.save(
        {name: value for name, value in norm.state_dict().items() if "num_batches" not in name}, tmp_path / "w.pt"
    )
    fresh = nn.BatchNorm2d(3)
    (note,) = load_weights(fresh, tmp_path / "w.pt")
    assert torch.equal(fresh.weight, norm.weight) and "step counters of 1 batch norms" in note
