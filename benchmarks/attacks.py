"""Files that attack and files that are honest, made by code and loaded as a user would: how many do harm, how many are refused.

    python benchmarks/attacks.py [--json FILE]

Every file is given to `indistill-fx inspect`, or to what else reads it, in a process of its own (forked, 60 s of a processor, 2 GiB
beyond what torch itself takes), in an empty folder with a home of its own. Counted of hostile files: code run (a canary lies there),
files written elsewhere, exit code 1 ("our fault"), a crash, too long or too much memory. Counted of honest files: refused.
Whole models of torchvision and timm: benchmarks/load_sweep.py.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import pickle
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

SECONDS, BYTES, WAITED = 60, 2 << 30, 600
"""Of the processor, of memory beyond torch's own, and of the clock, for a machine with other work."""
Make = Callable[[Path], list[str]]
"""Writes a file into a folder; returns the arguments for the command line."""


class Reduced:
    """Pickles as a call."""

    def __init__(self, *recipe: Any):
        self.recipe = recipe

    def __reduce__(self) -> Any:
        return self.recipe


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()


def inspect(path: Path) -> list[str]:
    return ["inspect", str(path), "--input", "3x8x8"]


def saved(value: Any, *, beside: str = "", **options: Any) -> Make:
    """A file of torch.save; with `beside`, weights for that model."""

    def make(folder: Path) -> list[str]:
        held = value(folder) if callable(value) and not isinstance(value, nn.Module) else value
        torch.save(held, folder / "file.pt", **options)
        return (
            inspect(folder / "file.pt")
            if not beside
            else ["inspect", f"{beside}@{folder / 'file.pt'}", "--input", "3x64x64"]
        )

    return make


def with_attribute(name: str, value: Any) -> nn.Module:
    model = network()
    vars(model[2])[name] = value
    return model


def renamed(registry: str, name: str) -> nn.Module:
    model = network()
    if registry == "_modules":
        model._modules = {name if key == "2" else key: part for key, part in model._modules.items()}
    else:
        vars(model[0])[registry][name] = nn.Parameter(torch.ones(1))
    return model


# ---- hostile -------------------------------------------------------------------------------------------------------------
def payloads(canary: str) -> dict[str, Any]:
    touch = f"open({canary!r}, 'w').close()"
    return {
        "os.system": Reduced(os.system, (f"touch {canary}",)),
        "eval": Reduced(eval, (touch,)),
        "exec": Reduced(exec, (touch,)),
        "open": Reduced(open, (canary, "w")),
        "subprocess": Reduced(subprocess.call, (["touch", canary],)),
        "getattr": Reduced(Reduced(getattr, (pathlib.Path(canary), "touch")), ()),
        "torch.load": Reduced(torch.storage._load_from_bytes, (pickle.dumps(Reduced(os.system, (f"touch {canary}",))),)),
        "numpy objects": np.array([Reduced(os.system, (f"touch {canary}",))], dtype=object),
        "a rebuilt type": Reduced(torch._tensor._rebuild_from_type_v2, (os.system, int, (f"touch {canary}",), {})),
    }  # fmt: skip


def hostile_pickles(canary: str) -> Iterator[tuple[str, Make]]:
    for name, payload in payloads(canary).items():
        for format_, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
            yield f"{name} alone, {format_}", saved(payload, **options)
            yield f"{name} in a module, {format_}", saved(with_attribute("tag", payload), **options)
        yield f"{name} as a weight", saved({"w": payload}, beside="torchvision:squeezenet1_1")
        yield f"{name} as a hook", saved(with_attribute("_forward_hooks", {0: payload}))
    code = f'x" if getattr(__import__("os"), "system")("touch {canary}") else "y'.replace(".", "-")
    for name in (code, "a.b", 'a"b', "a\\", "\x1b[2J", "a\nb", "", "x" * 10_000, "\uff46orward"):
        for registry in ("_modules", "_parameters", "_buffers"):
            yield f"a name {name[:12]!r} in {registry}", saved(renamed(registry, name))
    for name in ("forward", "train", "_forward_hooks", "_modules", "__class__", "__dict__", "training", "to"):
        yield f"a part that hides {name}", saved(renamed("_modules", name))
        yield f"an attribute that hides {name}", saved(with_attribute(name, 5))


class Written:
    """Pickles as a graph module with source code of one's choice."""

    def __init__(self, body: str, imports: str = "import torch"):
        module = nn.Module()
        module.conv = nn.Conv2d(3, 4, 3)
        code = body if "def " in body else f"def forward(self, x):\n    {body}\n    return y\n"
        self.made = {**vars(module), "_code": code}, imports

    def __reduce__(self) -> Any:
        return torch.fx.graph_module.reduce_graph_module, self.made


def hostile_graphs(canary: str) -> Iterator[tuple[str, Make]]:
    """Graph modules, which torch would load by running the source in them."""
    run = f"__import__('os').system('touch {canary}')"
    for name, code in {
        "a call": f"y = {run}",
        "a nested call": f"y = torch.relu({run})",
        "an imported function": f"y = system('touch {canary}')",
        "os by way of torch": f"y = torch.os.system('touch {canary}')",
        "torch.load": f"y = torch.load({canary!r}, weights_only=False)",
        "torch.save": f"y = torch.save(x, {canary!r})",
        "an operator that makes files": f"y = torch.from_file({canary!r}, shared=True, size=4)",
        "an operator without checks": "y = torch.segment_reduce(x, 'max', unsafe=True)",
        "a method that writes": f"y = x.numpy().tofile({canary!r})",
        "dunder attributes": "y = x.__class__.__mro__",
        "a part by code": f'y = getattr(self, "conv\\"); {run}; (\\"")(x)',
        "a hook hung": "y = self.conv.register_forward_hook(print)",
        "a default": f"def forward(self, x=({run})):\n    return x",
        "a decorator": f"@(lambda f: {run})\ndef forward(self, x):\n    return x",
        "code before it": f"{run}\ndef forward(self, x):\n    return x",
        "a loop without end": "def forward(self, x):\n    while True: pass\n    return x",
        "brackets without end": f"y = {'(' * 10**5}{')' * 10**5}",
        "attributes without end": f"y = x{'.T' * 10**5}",
        "3 MB of operands": f"y = ({'x, ' * 10**6})",
    }.items():
        yield f"a graph with {name}", saved(Written(code, "import torch\nfrom os import system as system"))
    yield "a graph with an import that runs", saved(Written("y = self.conv(x)", f"import torch\n{run}"))


def altered(edit: Callable[[dict[str, bytes]], Any], *, program: bool = False) -> Make:
    """An archive of torch.save or torch.export, one of whose entries was changed."""

    def make(folder: Path) -> list[str]:
        content, path = io.BytesIO(), folder / ("file.pt2" if program else "file.pt")
        if program:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                batch = ({0: torch.export.Dim("batch")},)
                torch.export.save(
                    torch.export.export(network(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=batch), content
                )
        else:
            torch.save(network(), content)
        with zipfile.ZipFile(content) as archive:
            entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        edit(entries)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(f"archive/{name}", data)
        return inspect(path)

    return make


def node(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def edit(entries: dict[str, bytes]) -> None:
        loaded = json.loads(entries["models/model.json"])
        loaded["graph_module"]["graph"]["nodes"][-1].update(changes)
        entries["models/model.json"] = json.dumps(loaded).encode()

    return edit


def replaced(name: str, old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def edit(entries: dict[str, bytes]) -> None:
        text = entries[name].decode()
        if old not in text:
            raise ValueError(f"{old!r} is not in {name}")
        entries[name] = text.replace(old, new).encode()

    return edit


def hostile_programs(canary: str) -> Iterator[tuple[str, Make]]:
    text = [{"name": "", "arg": {"as_string": f"touch {canary}"}, "kind": 1}]
    for target in (
        *(
            "torch.os.system",
            "torch.ops.aten._print.default",
            "torch.ops.aten.from_file.default",
            "builtins.eval",
            "os.system",
        ),
        *("torch.ops.aten.set_.source_Tensor", "torch.ops.aten.resize_.default", "torch.hub.load", "torch.load"),
        *("torch.ops.aten.segment_reduce.default", "torch.ops.aten._sparse_coo_tensor_unsafe.default"),
    ):
        yield f"a program that calls {target}", altered(node(target=target, inputs=text), program=True)
    weights, model = "data/weights/model_weights_config.json", "models/model.json"
    yield (
        "a weight that is pickled",
        altered(replaced(weights, '"use_pickle": false', '"use_pickle": true'), program=True),
    )
    yield (
        "a weight of 10**12 elements",
        altered(replaced(weights, '{"as_int": 144}', '{"as_int": 1000000000000}'), program=True),
    )
    yield "a weight that hides forward", altered(replaced(weights, '"4.weight"', '"forward"'), program=True)
    named = f'"relu = __import__("os").system("touch {canary}"); y"'.replace('("', "('").replace('")', "')")
    yield "a name that is code", altered(replaced(model, '"relu"', named), program=True)
    yield (
        "a library",
        altered(lambda entries: entries.update({"data/aotinductor/model/a.so": b"\x7fELF"}), program=True),
    )


def hostile_archives(canary: str) -> Iterator[tuple[str, Make]]:
    evil = pickle.dumps(Reduced(os.system, (f"touch {canary}",)), 2)
    yield "another pickle", altered(lambda entries: entries.update({"data.pkl": evil}))
    yield "a pickle at a second place", altered(lambda entries: entries.update({"DATA.pkl": evil}))
    yield "an entry that climbs", altered(lambda entries: entries.update({"../../../canary": b"x"}))
    yield "a storage cut short", altered(lambda entries: entries.update({"data/0": b"x"}))
    yield (
        "brackets without end",
        altered(lambda entries: entries.update({"data.pkl": b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."})),
    )
    yield (
        "a key without end",
        altered(lambda entries: entries.update({"data.pkl": b"\x80\x02}N" + b"\x85" * 10**6 + b"Ns."})),
    )

    def raw(content: bytes, name: str) -> Make:
        def make(folder: Path) -> list[str]:
            (folder / name).write_bytes(content)
            return inspect(folder / name)

        return make

    header = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    yield "a bare pickle", raw(evil, "file.pt")
    yield "a nested header", raw(len(header).to_bytes(8, "little") + header, "file.safetensors")
    yield "a huge header", raw((1 << 62).to_bytes(8, "little") + b"{}", "file.safetensors")
    yield "nothing", raw(b"", "file.pt")


def hostile_runs(canary: str) -> Iterator[tuple[str, Make]]:
    touch = f"touch {canary}"
    for spec in (
        "evil.py:make", f"os:system?command='{touch}'", f"subprocess:call?args='{touch}'&shell=True", "builtins:exec",
        "timm:resnet10t?checkpoint_path='evil.pt'", "\0", "x" * 10_000, "indistill_fx.demo:DigitsStudent?width=" + "[" * 5000,
    ):  # fmt: skip

        def make(folder: Path, spec: str = spec) -> list[str]:
            (folder / "run").mkdir()
            told = {"status": "done", "about": {"model": spec, "input_size": [1, 8, 8], "seal": "0" * 64}}
            (folder / "run" / "run.json").write_text(json.dumps(told))
            (folder / "evil.py").write_text(f"open({canary!r}, 'w').close()\n")
            save_file(nn.Linear(2, 2).state_dict(), folder / "run" / "student.safetensors")
            return ["inspect", str(folder / "run")]

        yield f"a run of {spec[:30]!r}", make


def pictures_of(content: Callable[[bytes], bytes], *, name: str = "0.png", size: int = 0) -> Make:
    """A folder of pictures, one of which was changed, under a model that is measured on them."""

    def make(folder: Path) -> list[str]:
        sound = io.BytesIO()
        Image.new("RGB", (8, 8)).save(sound, {"png": "PNG", "gif": "GIF", "webp": "WEBP"}[name.rpartition(".")[2]])
        for split in ("train", "test"):
            for label in "ab":
                place = folder / "data" / split / label
                place.mkdir(parents=True)
                (place / f"1{name}").write_bytes(sound.getvalue())
        with open(folder / "data" / "test" / "a" / name, "wb") as file:
            file.write(content(sound.getvalue()))
            file.truncate(max(size, file.tell()))
        torch.save(network(), folder / "file.pt")
        return ["evaluate", str(folder / "file.pt"), "--data", f"imagefolder:{folder / 'data'}"]

    return make


def _with_chunk(kind: bytes, data: bytes, times: int = 1) -> Callable[[bytes], bytes]:
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return lambda png: png[:33] + times * chunk + png[33:]


def hostile_sizes(canary: str) -> Iterator[tuple[str, Make]]:
    """What is small on the disk and large in memory."""
    many = {f"w{k}": torch.ones(1).expand(1 << 26) for k in range(512)}
    yield "512 tensors expanded to 64 million elements", saved(many, beside="torchvision:squeezenet1_1")
    yield "as many as buffers of a module", saved(lambda _: with_attribute("_buffers", dict(many)))
    squeezed = zlib.compress(bytes(1 << 30), 9)
    yield "a gibibyte of text in a PNG", pictures_of(_with_chunk(b"zTXt", b"Comment\0\0" + squeezed))
    yield "a gibibyte of profile in a PNG", pictures_of(_with_chunk(b"iCCP", b"profile\0\0" + squeezed))
    small = b"Comment\0\0" + zlib.compress(bytes(1 << 20), 9)
    yield "a thousand texts of a mebibyte in a PNG", pictures_of(_with_chunk(b"zTXt", small, 1000))
    yield "8 GiB of nothing behind a WebP", pictures_of(lambda webp: webp, name="0.webp", size=8 << 30)
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0"
    yield "10 MB of comment in a GIF", pictures_of(lambda gif: gif[:781] + comment + gif[781:], name="0.gif")
    for name, line in (("run.json", b'{"a": "'), ("metrics.jsonl", b'{"kind": "epoch", "stage": "')):

        def endless(folder: Path, name: str = name, line: bytes = line) -> list[str]:
            (folder / "run").mkdir()
            (folder / "run" / "run.json").write_text("{}")
            with open(folder / "run" / name, "wb") as file:
                file.write(line)
                file.truncate(8 << 30)
            return ["report", str(folder / "run"), "-o", str(folder / "page.html")]

        yield f"8 GiB in one line of {name}", endless

    def stages(folder: Path) -> list[str]:
        (folder / "run").mkdir()
        (folder / "run" / "run.json").write_text("{}")
        lines = (json.dumps({"kind": "epoch", "stage": f"s{k}", "epoch": 1, "loss": 1.0}) for k in range(100_000))
        (folder / "run" / "metrics.jsonl").write_text("\n".join(lines))
        return ["report", str(folder / "run"), "-o", str(folder / "page.html")]

    yield "100,000 stages in metrics.jsonl", stages


def hostile(canary: str) -> dict[str, Make]:
    """All hostile files, by name; each would make the canary if it ran."""
    kinds = (hostile_pickles, hostile_graphs, hostile_programs, hostile_archives, hostile_runs, hostile_sizes)
    return {name: make for kind in kinds for name, make in kind(canary)}


# ---- honest --------------------------------------------------------------------------------------------------------------
def squeezenet() -> dict[str, torch.Tensor]:
    import torchvision

    weights: dict[str, torch.Tensor] = torchvision.models.squeezenet1_1().state_dict()
    return weights


def beside(**more: Any) -> Make:
    return saved(lambda _: {"state_dict": squeezenet(), **more}, beside="torchvision:squeezenet1_1")


class AttributeDict(dict):  # type: ignore[type-arg]
    """As Lightning keeps hyperparameters."""


def honest() -> dict[str, Make]:
    """One honest file of every kind that people save."""
    import timm
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    net, quantise = network, torch.ao.quantization.quantize_dynamic
    optimiser = torch.optim.Adam(net().parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 3)
    made: dict[str, Make] = {
        f"a module, protocol {protocol}": saved(net(), pickle_protocol=protocol) for protocol in (2, 3, 4, 5)
    }
    things: dict[str, Any] = {
        "Namespace": argparse.Namespace(lr=0.1), "AttributeDict": AttributeDict(lr=0.1),
        "a path": Path("a"), "numpy float": np.float64(1),
        "numpy array": np.ones(3), "numpy state": np.random.get_state(), "random state": torch.get_rng_state(),
        "device": torch.device("cuda:0"),
        "defaultdict": collections.defaultdict(list, a=[1]), "optimiser": optimiser.state_dict(), "optimiser itself": optimiser,
        "schedule": schedule.state_dict(), "schedule itself": schedule, "date": datetime.now(UTC), "dtype": torch.float16, "a class": dict,
        "set": {1, 2}, "frozenset": frozenset((1, 2)), "complex": 1 + 2j, "range": range(3), "large number": 10**30, "bytes": b"x",
        "Counter": collections.Counter("ab"), "module": net(), "nested": {"a": [{"b": (1, None, True)}]},
    }  # fmt: skip
    made |= {f"{name} beside weights": beside(thing=thing) for name, thing in things.items()}
    spec = "torchvision:squeezenet1_1"
    for key in ("state_dict", "model_state_dict", "model", "net", "module"):
        made[f"weights under {key}"] = saved(lambda _, key=key: {key: squeezenet()}, beside=spec)
    made |= {
        "weights": saved(lambda _: squeezenet(), beside=spec),
        "weights before 1.6": saved(lambda _: squeezenet(), beside=spec, _use_new_zipfile_serialization=False),
        "weights of DataParallel": saved(lambda _: {f"module.{k}": v for k, v in squeezenet().items()}, beside=spec),
        "weights of torch.compile": saved(
            lambda _: {f"_orig_mod.{k}": v for k, v in squeezenet().items()}, beside=spec
        ),
        "DataParallel": saved(nn.DataParallel(net())),
        "AveragedModel": saved(torch.optim.swa_utils.AveragedModel(net())),
        "a model in a checkpoint": saved({"model": net(), "optimizer": optimiser, "args": argparse.Namespace()}),
        "hyphens in names": saved(renamed("_modules", "block4-0")),
        "a keyword as name": saved(renamed("_modules", "class")),
        "a sparse buffer": saved(with_attribute("mask", torch.eye(3).to_sparse())),
        "a sparse buffer, CSR": saved(with_attribute("mask", torch.eye(3).to_sparse_csr())),
        "quantised tensor": saved(with_attribute("q", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))),
        "a traced module": saved(torch.fx.symbolic_trace(net())),
        "torchvision's feature extractor": saved(
            lambda _: create_feature_extractor(torchvision.models.shufflenet_v2_x0_5(), {"stage2": "a", "stage4": "b"})
        ),
        "features_only": saved(timm.create_model("resnet10t", features_only=True)),
        "an exported program": altered(lambda _: None, program=True),
        "a program on cuda": altered(
            lambda entries: entries.update(
                {
                    name: data.replace(b'"cpu"', b'"cuda"')
                    for name, data in entries.items()
                    if name.endswith("weights_config.json")
                }
            ),
            program=True,
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made["quantised linear layers"] = saved(quantise(net()))
        recurrent = saved(quantise(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM}))
        made["quantised recurrent layers"] = lambda folder: [
            "load",
            recurrent(folder)[1],
        ]  # it gives no one tensor to inspect
    return made


# ---- running -------------------------------------------------------------------------------------------------------------
def run_one(make: Make, folder: Path, canary: Path) -> dict[str, Any]:
    """Make a file and load it in a forked process; what came of it."""
    files, work, home = (folder / name for name in ("files", "work", "home"))
    for place in (files, work, home):
        place.mkdir(parents=True)
    try:
        arguments = make(files)
    except Exception as error:  # torch itself does not write it
        return {"outcome": "not made", "said": f"{type(error).__name__}: {error}"[:200]}
    before, start = {str(path) for path in folder.rglob("*")}, time.monotonic()
    asked = [arguments[k + 1] for k, argument in enumerate(arguments) if argument == "-o"]
    child = os.fork()
    if not child:
        _load(arguments, work, home, folder.with_suffix(".said"))
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - start > WAITED:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    seconds = time.monotonic() - start
    ran, written = (
        canary.exists(),
        [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if str(path) not in {*before, *asked}],
    )
    canary.unlink(missing_ok=True)
    said = folder.with_suffix(".said").read_text(errors="replace")[:300] if folder.with_suffix(".said").exists() else ""
    outcome = {0: "loaded", 2: "refused", 1: "our fault"}.get(os.waitstatus_to_exitcode(status), "crashed")
    computed = usage.ru_utime + usage.ru_stime
    if seconds > WAITED or computed > SECONDS:
        outcome = "hung"
    return {"outcome": outcome, "ran": ran, "written": written, "seconds": round(computed, 2), "said": said,
            "peak_mib": usage.ru_maxrss >> 10}  # fmt: skip


def _load(arguments: list[str], work: Path, home: Path, said: Path) -> None:
    """In the child; never returns."""
    code = 1
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        os.environ["HOME"] = str(home)
        os.chdir(work)
        from indistill_fx.cli import run
        from indistill_fx.loading.load import load_source

        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            code = run(arguments) if arguments[0] != "load" else 2 * (load_source(arguments[1]) is None)
        said.write_text(err.getvalue())
    finally:
        os._exit(code)


def import_first(folder: Path) -> None:
    """Load sound files in this process, so that no fork has to import what loading needs."""
    from indistill_fx.cli import run

    folder.mkdir()
    sound = [saved(network()), beside(), altered(lambda _: None, program=True), pictures_of(lambda content: content)]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        for number, make in enumerate(sound):
            (folder / str(number)).mkdir()
            run(make(folder / str(number)))


def count(makes: dict[str, Make], top: Path, canary: Path, *, show: bool = False) -> dict[str, dict[str, Any]]:
    """What came of every file."""
    found: dict[str, dict[str, Any]] = {}
    for number, (name, make) in enumerate(makes.items()):
        found[name] = run_one(make, top / str(number), canary)
        if show:
            print(f"{found[name]['outcome']:9} {name}: {found[name].get('said', '')[:110]!r}", flush=True)
    return found


def faults(found: dict[str, dict[str, Any]], *, may_be_refused: bool) -> list[str]:
    """The files that did what none may do."""
    legal = ("loaded", "refused", "not made") if may_be_refused else ("loaded",)
    return [name for name, one in found.items() if one["outcome"] not in legal or one.get("ran") or one.get("written")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        canary = Path(name, "canary")
        import_first(Path(name, "sound"))
        evil = count(hostile(str(canary)), Path(name, "hostile"), canary, show=True)
        good = count(honest(), Path(name, "honest"), canary, show=True)
    wrong, refused = faults(evil, may_be_refused=True), faults(good, may_be_refused=False)
    made = sum(one["outcome"] != "not made" for one in evil.values())
    print(
        f"{made} hostile files: {len(wrong)} did harm {wrong}; {len(good)} honest files: {len(refused)} refused {refused}"
    )
    if options.json:
        record = {
            "date": datetime.now(UTC).isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        record |= {"hostile_files": made, "harm": wrong, "honest_files": len(good), "refused": refused}  # type: ignore[dict-item]
        options.json.write_text(json.dumps({**record, "hostile": evil, "honest": good}, indent=1) + "\n")
    sys.exit(bool(wrong or refused))


if __name__ == "__main__":
    main()
