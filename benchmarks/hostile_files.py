"""Hostile files, each of which would make the canary if it ran, or take memory or time that it must not, for `attacks.py`."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from files_made import Make, Reduced, altered, inspect, pictures_of, renamed, saved, with_attribute
from hostile_formats import formats
from hostile_others import others
from hostile_places import places
from safetensors.torch import save_file
from torch import nn


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
    own = (hostile_pickles, hostile_graphs, hostile_programs, hostile_archives, hostile_runs, hostile_sizes)
    kinds = (formats, places, *own, others)
    return {name: make for kind in kinds for name, make in kind(canary)}
