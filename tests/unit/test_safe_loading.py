"""Files that would do harm: every one is refused, and nothing in it runs.

Most payloads are loaded without care as well, and must do their work then: else refusing them would prove nothing.
"""

from __future__ import annotations

import functools
import io
import json
import operator
import os
import pickle
import re
import runpy
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.export
import torch.hub
from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.loading.load import load_source
from indistill_fx.loading.pickle_make import Maker, UnfitError
from indistill_fx.loading.safe_pickle import open_saved
from indistill_fx.runs.load import load

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class Reduced:
    """Pickles as a call: function, arguments and, if given, the state set afterwards."""

    def __init__(self, *recipe: Any):
        self.recipe = recipe

    def __call__(self) -> None:
        """Only so that pickle takes it for the function of another call."""

    def __reduce__(self) -> Any:
        return self.recipe


class Pickler(pickle.Pickler):
    """Writes Python modules, which no pickler does by itself, as what imports them."""

    def reducer_override(self, value: Any) -> Any:
        return (__import__, (value.__name__,)) if isinstance(value, types.ModuleType) else NotImplemented


def written(value: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def as_zip(path: Path, data: bytes, **others: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **others}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def as_legacy(path: Path, data: bytes) -> Path:
    path.write_bytes(written(MAGIC) + written(PROTOCOL) + written({}) + data + written([]))
    return path


def holding(value: Any, name: str = "tag") -> nn.Module:
    module = nn.ReLU()
    vars(module)[name] = value
    return module


def touch(path: Path) -> Reduced:
    return Reduced(os.system, (f"touch {path}",))


def hub_folder(canary: Path) -> Path:
    folder = canary.parent / "hub"
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"open({str(canary)!r}, 'w').close()\ndef make():\n    return None\n")
    return folder


LIVE: dict[str, Callable[[Path], Any]] = {
    "os.system": touch,
    "eval": lambda canary: Reduced(eval, (f"open({str(canary)!r}, 'w')",)),
    "exec": lambda canary: Reduced(exec, (f"open({str(canary)!r}, 'w')",)),
    "open": lambda canary: Reduced(open, (str(canary), "w")),
    "subprocess": lambda canary: Reduced(subprocess.call, (["touch", str(canary)],)),
    "getattr chain": lambda canary: Reduced(Reduced(getattr, (os, "system")), (f"touch {canary}",)),
    "getattr of torch": lambda canary: Reduced(
        Reduced(getattr, (Reduced(getattr, (torch, "os")), "system")), (f"touch {canary}",)
    ),
    "methodcaller": lambda canary: Reduced(operator.methodcaller("system", f"touch {canary}"), (os,)),
    "torch.load": lambda canary: Reduced(
        functools.partial(torch.load, weights_only=False), (io.BytesIO(saved(touch(canary))),)
    ),
    "torch.load of bytes": lambda canary: Reduced(torch.storage._load_from_bytes, (saved(touch(canary)),)),
    "torch.hub": lambda canary: Reduced(torch.hub._load_local, (str(hub_folder(canary)), "make")),
    "runpy": lambda canary: Reduced(runpy.run_path, (str(hub_folder(canary) / "hubconf.py"),)),
    "partial called": lambda canary: Reduced(functools.partial(os.system, f"touch {canary}"), ()),
    "partial filled": lambda canary: Reduced(
        Reduced(functools.partial, (nn.Linear,), (os.system, (f"touch {canary}",), {}, None)), ()
    ),
    "tensor of another type": lambda canary: Reduced(
        torch._tensor._rebuild_from_type_v2, (os.system, int, (f"touch {canary}",), {})
    ),
    "numpy array of objects": lambda canary: np.array([touch(canary)], dtype=object),
    "inside a module": lambda canary: nn.Sequential(nn.Tanh(), holding(touch(canary))),
    "among the hooks": lambda canary: holding(touch(canary), name="_forward_hooks"),
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize("name", LIVE)
def test_payload_is_refused_in_every_container(name: str, canary: Path, tmp_path: Path) -> None:
    payload = written(LIVE[name](canary))
    container, legacy = as_zip(tmp_path / "evil.pt", payload), as_legacy(tmp_path / "legacy.pt", payload)
    for path in (container, legacy):
        for spec in (str(path), f"torchvision:squeezenet1_1@{path}"):
            with pytest.raises(ConfigError, match="nothing in it was run") as caught:
                load(spec)
            assert not canary.exists(), spec
            assert "--trust" not in str(caught.value)
    assert_live(lambda: torch.load(container, weights_only=False), canary)


def test_payload_beside_weights_is_refused(canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(saved({"weight": torch.ones(2), "epoch": touch(canary)}))
    with pytest.raises(ConfigError, match="nothing in it was run"):
        load(f"torchvision:squeezenet1_1@{path}")
    assert not canary.exists()
    assert_live(lambda: torch.load(path, weights_only=False), canary)


def assert_live(load_unsafely: Callable[[], Any], canary: Path) -> None:
    """The negative control: loaded without care, the payload does its work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_unsafely()
        except Exception as error:  # once it ran, the rest of the file may make no sense
            assert canary.exists(), error
    assert canary.exists()


RELU = b"ctorch.nn.modules.activation\nReLU\n"
LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
PARTIAL = b"cfunctools\npartial\n"
GETATTR = b"c__builtin__\ngetattr\n"
ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def relu(*entries: bytes, modules: bytes = b"}") -> bytes:
    """A pickled ReLU, with more entries in its state."""
    names = [name for name, value in vars(nn.ReLU()).items() if isinstance(value, (dict, set)) and name != "_modules"]
    registries = b"".join(text(name) + b"}" for name in names)
    return (
        RELU
        + b")\x81}("
        + registries
        + text("training")
        + b"\x88"
        + text("_modules")
        + modules
        + b"".join(entries)
        + b"ub"
    )


def nest(depth: int) -> bytes:
    """Two modules that hold two that hold two …, all the same ones: 2**depth ways down."""
    wrapped = relu(modules=b"}" + text("c") + b"h\x00s")
    level = relu(modules=b"}(" + text("a") + wrapped + text("b") + wrapped + b"u")
    return relu() + b"q\x00" + (level + b"q\x00") * depth


# Nothing here names what is not on the list: an allow-list of classes alone would let each pass.
GADGETS = {
    "constructor called": LINEAR + b"K\x02K\x03\x86R",
    "constructor of a huge layer": LINEAR + b"J\x00\x00\x00\x10J\x00\x00\x00\x10\x86R",
    "made with arguments": LINEAR + b"K\x02K\x03\x86\x81",
    "constructor as forward": relu(text("forward") + PARTIAL + LINEAR + b"\x85R"),
    "class as __setstate__": relu(text("__setstate__") + LINEAR) + b"}b",
    "class as method": relu(text("train") + LINEAR),
    "compiled call": relu(text("_compiled_call_impl") + LINEAR),
    "hook": relu(text("_forward_hooks") + ORDERED + b"K\x00" + LINEAR + b"s"),
    "hook filled afterwards": relu(text("_forward_hooks") + ORDERED + b"q\x01") + b"h\x01K\x00" + LINEAR + b"s\x86",
    "partial of a partial": relu(text("f") + PARTIAL + PARTIAL + b"\x85R"),
    "partial of a call": relu(text("f") + PARTIAL + b"ctorch._utils\n_rebuild_tensor\n\x85R"),
    "partial that changes": relu(text("f") + PARTIAL + LINEAR + b"\x85R(" + PARTIAL + b")}Ntb"),
    "getattr of a method": GETATTR + relu() + text("load_state_dict") + b"\x86R",
    "getattr of a class": GETATTR + LINEAR + text("__init__") + b"\x86R",
    "getattr of a torch function": GETATTR + b"ctorch._C\n_VariableFunctionsClass\n" + text("from_file") + b"\x86R",
    "module called": relu() + b"K\x01\x85R",
    "codec": b"c_codecs\nencode\n" + text("a") + text("bz2") + b"\x86R",
    "layers to count to": b"ctorch.nn.modules.rnn\nLSTM\n)\x81}("
    + text("_all_weights")
    + b"](](K\x01ee"
    + text("num_layers")
    + b"J\xff\xff\xff\x7fub",
    "state of a container": ORDERED + b"}" + text("items") + LINEAR + b"sb",
}


@pytest.mark.parametrize("name", GADGETS)
def test_gadget_made_of_allowed_names_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing in it was run"):
        load(str(as_zip(tmp_path / "gadget.pt", b"\x80\x02" + GADGETS[name] + b".")))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            RELU + b")\x81q\x01" + relu(modules=b"}" + text("a") + b"h\x01s").removeprefix(RELU + b")\x81"),
            "holds itself",
        ),
        (nest(40), "too many modules"),
        (relu(modules=b"}" + text("a") + b"K\x01s"), "no proper modules"),
        (RELU + b")\x81}b", "has no"),
    ],
)
def test_module_that_cannot_be_walked_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(str(as_zip(tmp_path / "odd.pt", b"\x80\x02" + data + b".")))


def test_sound_modules_of_the_same_make_are_loaded(tmp_path: Path) -> None:
    loaded = load(str(as_zip(tmp_path / "sound.pt", b"\x80\x02" + relu(text("inplace") + b"\x89") + b".")))
    assert torch.equal(loaded(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    assert len(list(load(str(as_zip(tmp_path / "nest.pt", b"\x80\x02" + nest(3) + b"."))).modules())) == 10


NAMES = (
    "torchvision.datasets.utils download_url",
    "torchvision.models.resnet load_state_dict_from_url",
    "timm.models._hub load_state_dict_from_hf",
    "timm.models._factory create_model",
    "torch.nn.modules.module torch",
    "torch.nn.modules.module warnings",
    "torch.fx.graph_module reduce_graph_module",
    "torch.fx.graph_module GraphModule",
    "torch.jit._script RecursiveScriptModule",
    "torch.jit load",
    "torch.package.package_importer PackageImporter",
    "torch.serialization load",
    "torch.utils.data.dataset Dataset",
    "torch.distributed.rpc rpc_sync",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch.nn.modules..linear Linear",
    "torch.nn.modules.linear Linear.__init__",
    "torch.nn modules.linear.Linear",
    "numpy.core.multiarray _reconstruct",
    "numpy load",
    "copyreg _reconstructor",
    "builtins getattr.__call__",
    "__builtin__ apply",
    "posix system",
    "nt system",
    "importlib import_module",
)


@pytest.mark.parametrize("name", NAMES)
def test_name_that_is_no_module_class_is_refused(name: str, tmp_path: Path) -> None:
    place, attribute = name.split(" ")
    data = b"\x80\x02" + relu(text("tag") + f"c{place}\n{attribute}\n".encode()) + b"."
    with pytest.raises(ConfigError, match=r"names things outside|does not have"):
        load(str(as_zip(tmp_path / "named.pt", data)))


def test_no_package_is_imported_because_a_file_names_it(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evilpkg").mkdir()
    (tmp_path / "evilpkg" / "__init__.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Net: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = as_zip(tmp_path / "named.pt", b"\x80\x02cevilpkg\nNet\n)\x81.")
    with pytest.raises(ConfigError, match=r"evilpkg\.Net.*--trust evilpkg"):
        load(str(path))
    assert not canary.exists()
    assert "evilpkg" not in sys.modules
    with pytest.raises(ConfigError, match="holds a Net, not a module"):  # trusted, its code is run
        load(str(path), trust=["evilpkg"])
    assert canary.exists()
    del sys.modules["evilpkg"]


OPCODES = {
    "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01a\x85R.",
    "instance": b"(S'a'\niposix\nsystem\n.",
    "object": b"(cposix\nsystem\nS'a'\no.",
    "extension": b"\x80\x02\x82\x01.",
    "protocol 5 buffer": b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "huge string": b"\x80\x02X\xff\xff\xff\xffa.",
    "no end": b"\x80\x02N",
    "stack underflow": b"\x80\x02R.",
    "cycle": b"\x80\x02}q\x00" + text("a") + b"h\x00s.",
    "key without end": b"\x80\x02}N" + b"\x85" * 10**6 + b"Ns.",
    "keys without end": b"\x80\x02}(N" + b"\x85" * 10**6 + b"Nu.",
    "member without end": b"\x80\x02cbuiltins\nset\n](N" + b"\x85" * 10**6 + b"e\x85R.",
}


@pytest.mark.parametrize("name", OPCODES)
@pytest.mark.parametrize("wrap", [as_zip, as_legacy])
def test_opcodes_torch_never_writes_are_refused(name: str, wrap: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load(str(wrap(tmp_path / "odd.pt", OPCODES[name])))


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], stored: int, declared: int) -> tuple[bytes, bytes]:
    class Persistent(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", declared) if value == "the storage" else None

    file = io.BytesIO()
    rebuild = Reduced(torch._utils._rebuild_tensor_v2, ("the storage", 0, size, stride, False, OrderedDict()))
    Persistent(file, 2).dump({"weight": rebuild})
    return file.getvalue(), bytes(4 * stored)


@pytest.mark.parametrize(
    ("size", "stride", "stored", "declared"),
    [
        ((10**12,), (1,), 10, 10**12),  # the storage is said to be there
        ((10**12,), (1,), 10, 10),  # torch would enlarge it
        ((10**6, 10**6), (0, 0), 1, 1),  # nothing stored, 4 TB as soon as it is copied
        ((4,), (10**9,), 10, 10),
        ((2**62, 2**62), (1, 1), 10, 10),
        ((-1,), (1,), 10, 10),
        ((4, 4), (1,), 16, 16),
    ],
)
def test_more_elements_than_there_are_is_refused(
    size: tuple[int, ...], stride: tuple[int, ...], stored: int, declared: int, tmp_path: Path
) -> None:
    data, storage = tensor_pickle(size, stride, stored, declared)
    path = as_zip(tmp_path / "huge.pt", data, **{"data/0": storage})
    with pytest.raises(ConfigError, match=r"declares|calls torch\._utils\._rebuild_tensor_v2"):
        load(f"torchvision:resnet18@{path}")


def test_tensor_that_fits_is_read(tmp_path: Path) -> None:
    data, storage = tensor_pickle((2, 5), (5, 1), 10, 10)
    with pytest.raises(ConfigError, match="a state dict of 1 tensors"):
        load(str(as_zip(tmp_path / "fits.pt", data, **{"data/0": storage})))


def test_legacy_file_that_declares_more_than_it_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "legacy.pt"
    torch.save({"weight": torch.ones(64)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="declares 264 bytes of data and has 164"):
        load(f"torchvision:resnet18@{path}")


def test_ambiguous_archives_are_refused(tmp_path: Path) -> None:
    sound = as_zip(tmp_path / "sound.pt", b"\x80\x02" + relu() + b".")
    content = sound.read_bytes()
    (tmp_path / "before.pt").write_bytes(b"PK junk" + content)
    (tmp_path / "after.pt").write_bytes(content + b"junk")
    twice = as_zip(tmp_path / "twice.pt", b"\x80\x02N.", **{"DATA.PKL": b"\x80\x02N."})
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N." + bytes(10**6))
    load(str(sound))
    for path, reason in (
        (tmp_path / "before.pt", "damaged"),
        (tmp_path / "after.pt", "damaged"),
        (twice, "one name twice"),
        (tmp_path / "small.pt", "compressed"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load(str(path))


def test_entry_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    data, storage = tensor_pickle((10**10,), (1,), 10, 10**10)
    path = as_zip(tmp_path / "huge.pt", data, **{"data/0": storage})
    content = path.read_bytes()
    start = content.rindex(b"archive/data/0") - 46  # its record in the directory; both sizes say 40 bytes
    assert content[start + 20 : start + 28] == (40).to_bytes(4, "little") * 2
    path.write_bytes(content[: start + 20] + (4 * 10**9).to_bytes(4, "little") * 2 + content[start + 28 :])
    with pytest.raises(ConfigError, match="larger than the file"):
        load(str(path))


def test_archives_within_archives_are_refused(tmp_path: Path, canary: Path) -> None:
    inner = saved(touch(canary))
    with pytest.raises(ConfigError, match="TorchScript"):
        load(str(as_zip(tmp_path / "script.pt", b"\x80\x02N.", **{"constants.pkl": b"\x80\x02)."})))
    with pytest.raises(ConfigError, match=r"torch\.package"):
        load(str(as_zip(tmp_path / "package.pt", b"\x80\x02N.", **{".data/extern_modules": b""})))
    nested = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + b"B" + len(inner).to_bytes(4, "little") + inner + b"\x85R."
    with pytest.raises(ConfigError):
        load(str(as_zip(tmp_path / "nested.pt", nested)))
    assert not canary.exists()


def test_making_refuses_what_the_names_let_pass(tmp_path: Path, canary: Path) -> None:
    """Two guards: without the verdict on names, nothing is made that is on no list."""
    path = as_zip(tmp_path / "evil.pt", written(touch(canary)))
    with (
        path.open("rb") as file,
        open_saved(file, "evil.pt") as saved,
        pytest.raises(UnfitError, match=r"posix\.system"),
    ):
        Maker(saved.scan, lambda storage: torch.UntypedStorage(0)).make(saved.root)
    assert not canary.exists()


# --- .pt2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = (torch.randn(2, 4),)
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
        program = torch.export.export(model, images, dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)
    return path.read_bytes()


def rewrite(content: bytes, path: Path, change: Callable[[str, bytes], bytes], added: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            folder, _, name = entry.filename.partition("/")
            target.writestr(entry.filename, change(name, source.read(entry)))
        for name, data in added.items():
            target.writestr(f"{folder}/{name}", data)
    return path


def program(edit: Callable[[dict[str, Any]], Any]) -> Callable[[str, bytes], bytes]:
    """Edit the program's JSON."""

    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        loaded = json.loads(content)
        edit(loaded)
        return json.dumps(loaded).encode()

    return change


def symbols(replacement: str) -> Callable[[str, bytes], bytes]:
    """Put another expression in the place of the batch's symbol."""
    pattern = r"Symbol\('s\d+', positive=True, integer=True\)"

    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        changed, count = re.subn(pattern, lambda _: json.dumps(replacement)[1:-1], content.decode())
        assert count
        return changed.encode()

    return change


def entry(wanted: str, replacement: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, content: replacement if name == wanted else content


def unpickled_weight(canary: Path) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if name != "data/weights/model_weights_config.json":
            return saved(touch(canary)) if name == "data/weights/weight_0" else content
        config = json.loads(content)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    return change


def nodes(loaded: dict[str, Any]) -> list[dict[str, Any]]:
    return loaded["graph_module"]["graph"]["nodes"]


def call(target: str, argument: str) -> Callable[[str, bytes], bytes]:
    """Let the last operation be another, of one string."""
    inputs = [{"name": "", "arg": {"as_string": argument}, "kind": 1}]
    return program(lambda loaded: nodes(loaded)[-1].update(target=target, inputs=inputs))


def rename(new: str) -> Callable[[str, bytes], bytes]:
    """Give the first operation's result another name, everywhere."""

    def change(name: str, content: bytes) -> bytes:
        return content.replace(b'"linear"', json.dumps(new).encode()) if name == "models/model.json" else content

    return change


CONSTANTS = "data/constants/model_constants_config.json"
OPAQUE = {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}

# What torch.export.load itself would run, most of it before the first input comes.
EXPORTED: dict[str, Callable[[Path], Callable[[str, bytes], bytes]]] = {
    "unpickled weight": unpickled_weight,
    "unpickled examples": lambda canary: entry("data/sample_inputs/model.pt", saved(touch(canary))),
    "unpickled constant": lambda canary: entry(CONSTANTS, json.dumps(OPAQUE).encode()),
    "evaluated shape": lambda canary: symbols(f"Max(\"__import__('os').system('touch {canary}')\", 1)"),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_program_that_runs_code_is_refused(name: str, exported: bytes, tmp_path: Path, canary: Path) -> None:
    added = {"data/constants/opaque_obj_0": written(touch(canary))} if name == "unpickled constant" else {}
    path = rewrite(exported, tmp_path / "evil.pt2", EXPORTED[name](canary), added)
    with pytest.raises(ConfigError, match="nothing in it was run"):
        load(str(path))
    assert not canary.exists()
    assert_live(lambda: torch.export.load(path).module()(torch.randn(2, 4)), canary)


def test_guards_of_a_program_are_left_out(exported: bytes, tmp_path: Path, canary: Path) -> None:
    guard = f"__import__('os').system('touch {canary}') == 0"
    path = rewrite(exported, tmp_path / "evil.pt2", program(lambda loaded: loaded.update(guards_code=[guard])), {})
    assert load(str(path))(torch.randn(2, 4)).shape == (2, 3)
    assert not canary.exists()
    assert_live(lambda: torch.export.load(path).module()(torch.randn(2, 4)), canary)


UNFIT: dict[str, Callable[[str, bytes], bytes]] = {
    "a function of torch": call("torch.os.system", "touch canary"),
    "an attribute of an operator": call("torch.ops.aten.relu.default.__class__", "x"),
    "an operator that opens a file": call("torch.ops.aten.from_file.default", "canary"),
    "an operator that writes a file": call("torch.ops.image.write_file.default", "canary"),
    "an operator as argument": program(
        lambda loaded: nodes(loaded)[-1]["inputs"].append({"name": "f", "arg": {"as_operator": "torch.os.system"}})
    ),
    "a shape of strings": symbols("Max('1', 1)"),
    "a shape with an attribute": symbols("Integer(1).__class__"),
    "a shape with a foreign call": symbols("preview(1)"),
    "a shape that never ends": symbols("Pow(Pow(Integer(9), Integer(8)), Integer(8))"),
    "a shape of a large power": symbols("Pow(Integer(9), Integer(99999999))"),
    "a symbol to count to": program(
        lambda loaded: loaded["range_constraints"].update(u99999999={"min_val": 0, "max_val": 9})
    ),
    "a name in quotes": rename('x"); import os; ("'),
    "a name that is a statement": rename("linear = __import__('os').system('touch canary'); linear"),
    "inputs that import": program(
        lambda loaded: loaded["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec=json.dumps([1, {"type": "collections.defaultdict", "context": "null", "children_spec": []}])
        )
    ),
    "a script object": program(
        lambda loaded: loaded["graph_module"]["graph"].update(custom_obj_values={"a": {"name": "a"}})
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_program_of_more_than_tensor_operations_is_refused(name: str, exported: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing in it was run"):
        load(str(rewrite(exported, tmp_path / "evil.pt2", UNFIT[name], {})))


@pytest.mark.parametrize("added", ["data/aotinductor/model/a.so", "models/other.json", "data/constants/custom_obj_0"])
def test_archive_with_more_than_a_program_is_refused(added: str, exported: bytes, tmp_path: Path) -> None:
    path = rewrite(exported, tmp_path / "evil.pt2", lambda _, content: content, {added: b"\x7fELF"})
    with pytest.raises(ConfigError, match=f"holds '{added}'"):
        load(str(path))


def test_untouched_program_is_loaded(exported: bytes, tmp_path: Path) -> None:
    path = rewrite(exported, tmp_path / "sound.pt2", lambda _, content: content, {"extra/readme.txt": b"hello"})
    source = load_source(str(path))
    images = torch.randn(5, 4)
    assert source.example_inputs is not None and source.example_inputs[0].shape == (2, 4)
    assert torch.equal(source.module(images), torch.export.load(path).module()(images))
