"""Hostile files whose format itself is bent: zip archives, headers of safetensors, JSON, for `attacks.py`."""

from __future__ import annotations

import io
import json
import stat
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from files_made import Make, altered, exported_program, inspect, network
from hostile_others import DIGITS
from safetensors.torch import save as to_safetensors

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "0.1.0"


def formats(canary: str) -> Iterator[tuple[str, Make]]:
    """All of them."""
    for kind in (hostile_zips, hostile_headers, hostile_json):
        yield from kind(canary)


# ---- zip -----------------------------------------------------------------------------------------------------------------
Entries = dict[str, bytes]


def hostile_zips(canary: str) -> Iterator[tuple[str, Make]]:
    """Archives that two readers read differently, that climb out of a folder, or that grow."""
    evil = b"cos\nsystem\n(S'touch " + canary.encode() + b"'\ntR."

    def twice(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name, data)
        if name.endswith(("data.pkl", "model.json")):
            archive.writestr(name, evil)

    def link(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(name)
        entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, canary if "data/" in name else data)

    def streamed(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(name)
        entry.flag_bits |= 8
        archive.writestr(entry, data)

    def absolute(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name, data)
        archive.writestr(canary, b"x")
        archive.writestr(f"{name.partition('/')[0]}/{'../' * 20}{canary}", b"x")

    def squeezed(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        long = bytes(1 << 28) if "data/" in name else data
        archive.writestr(name, long, zipfile.ZIP_DEFLATED)

    def other_names(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name.replace("/", "\\"), data)

    def upper(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name, data)
        archive.writestr(name.upper(), evil)
        archive.writestr(f"{name}\0.txt", evil)

    ways = {"every entry twice": twice, "entries that are links": link, "sizes behind the entries": streamed,
            "absolute names": absolute, "storages that grow": squeezed, "names with backslashes": other_names,
            "names in capitals too": upper}  # fmt: skip
    for program in (False, True):
        kind = "a .pt2" if program else "a .pt"
        for name, write in ways.items():
            yield f"{kind} with {name}", _archive(program, write)
        for name, edit in {
            "another archive before it": lambda content: _small({"archive/data.pkl": evil}) + content,
            "another archive after it": lambda content: content + _small({"archive/data.pkl": evil}),
            "another archive in its comment": lambda content: _commented(content, _small({"archive/data.pkl": evil})),
            "sizes of 2**32 in its directory": lambda content: _patched(content, b"PK\1\2", 20, b"\xff" * 8),
            "offsets beyond the end": lambda content: _patched(content, b"PK\1\2", 42, b"\xff\xff\xff\x7f"),
            "all entries at one place": lambda content: _patched(content, b"PK\1\2", 42, bytes(4)),
            "the sign of encryption": lambda content: _patched(content, b"PK\1\2", 8, b"\1\0"),
            "other names at its entries": lambda content: content.replace(b"PK\3\4", b"PK\3\4", 1).replace(b"data.pkl", b"DATA.pkl", 1),
            "a count of 65,535 entries": lambda content: _patched(content, b"PK\5\6", 8, b"\xff\xff\xff\xff"),
            "a directory of negative size": lambda content: _patched(content, b"PK\5\6", 12, b"\xff\xff\xff\xff"),
            "its end cut off": lambda content: content[:-30],
        }.items():  # fmt: skip
            yield f"{kind} with {name}", _archive(program, lambda a, n, d: a.writestr(n, d), edit)

    lists = b'{"graph_module":[' + b"[]," * 20_000_000 + b"0]}"
    yield (
        "a .pt2 with 20 million lists in its program",
        altered(lambda e: e.update({"models/model.json": lists}), program=True),
    )

    def many(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name, data)
        if "data.pkl" in name:
            for k in range(60_000):
                archive.writestr(f"archive/x/{k}", b"")

    yield "a .pt with 60,000 entries", _archive(False, many)


def _archive(
    program: bool, write: Callable[[zipfile.ZipFile, str, bytes], None], edit: Callable[[bytes], bytes] = bytes
) -> Make:
    def make(folder: Path) -> list[str]:
        written = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(_sound(program))) as old, zipfile.ZipFile(written, "w") as new:
            for name in old.namelist():
                write(new, name, old.read(name))
        path = folder / ("file.pt2" if program else "file.pt")
        path.write_bytes(edit(written.getvalue()))
        return inspect(path)

    return make


@lru_cache
def _sound(program: bool) -> bytes:
    content = io.BytesIO()
    torch.export.save(exported_program(), content) if program else torch.save(network(), content)
    return content.getvalue()


def _small(entries: Entries) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return content.getvalue()


def _commented(content: bytes, comment: bytes) -> bytes:
    return content[:-2] + len(comment).to_bytes(2, "little") + comment


def _patched(content: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """With a value in every record that begins with a mark."""
    made, place = bytearray(content), content.find(mark)
    while place >= 0:
        made[place + offset : place + offset + len(value)] = value
        place = content.find(mark, place + 1)
    return bytes(made)


# ---- safetensors -----------------------------------------------------------------------------------------------------------
def hostile_headers(canary: str) -> Iterator[tuple[str, Make]]:
    """Headers of safetensors files, as the weights of a student and as those of a run."""
    sound = to_safetensors({"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)})
    length = int.from_bytes(sound[:8], "little")
    header, data = sound[8 : 8 + length].decode().strip(), sound[8 + length :]
    first = json.loads(header)["fc.weight"]
    entry = json.dumps(first)

    def told(**changes: Any) -> str:
        return json.dumps({**json.loads(header), "fc.weight": {**first, **changes}})

    texts = {
        "overlapping tensors": header.replace(json.dumps(first["data_offsets"]).replace(" ", ""), "[0,160]"),
        "tensors that all lie at one place": told(data_offsets=[0, 40], shape=[10]),
        "one name twice": f'{{"fc.weight":{entry},{header[1:]}',
        "a name in two normal forms": f'{{"caf\\u00e9":{entry},"cafe\\u0301":{entry},{header[1:]}',
        "offsets that run backwards": told(data_offsets=[160, 0]),
        "negative offsets": told(data_offsets=[-160, 0]),
        "offsets beyond the file": told(data_offsets=[0, 1 << 62]),
        "a size of 2**62": told(shape=[1 << 62, 4]),
        "sizes whose product is 40 again": told(shape=[1 << 32, 1 << 32, 40]),
        "10,000 axes": told(shape=[1] * 10_000 + [10, 4]),
        "a size of nothing beside 2**62": told(shape=[0, 1 << 62], data_offsets=[0, 0]),
        "a size that is NaN": told(shape=[float("nan"), 4]),
        "a size of 1e999": header.replace("[10,4]", "[1e999,4]"),
        "an unknown type of numbers": told(dtype="F8_E8M0"),
        "a type that is code": told(dtype="__class__"),
        "metadata that are no text": json.dumps({**json.loads(header), "__metadata__": {"state": {"a": [1]}}}),
        "100,000 metadata": json.dumps({**json.loads(header), "__metadata__": {str(k): "x" for k in range(100_000)}}),
        "names that turn the line": json.dumps({**json.loads(header), "\u202efc.\x1b[2J\u2066": first}),
        "half a character as a name": f'{{"\\ud800":{entry},{header[1:]}',
        "a byte order mark": "\ufeff" + header,
        "brackets without end": '{"a":' * 50_000 + "1" + "}" * 50_000,
        "a comment": header + "/* */",
        "nothing": "",
        "an empty name": f'{{"":{entry},{header[1:]}',
        "7 million metadata": '{"__metadata__":{' + ",".join(f'"{k}":""' for k in range(7_000_000)) + "}}",
        "a name of 10 MB": f'{{"{"x" * 10_000_000}":{entry},{header[1:]}',
    }  # fmt: skip
    for name, text in texts.items():
        encoded = text.encode("utf-8", "surrogatepass")
        content = len(encoded).to_bytes(8, "little") + encoded + data
        for place in ("weights", "run"):

            def make(folder: Path, content: bytes = content, place: str = place) -> list[str]:
                run = run_of(folder)
                (run / "student.safetensors").write_bytes(content)
                source = str(run) if place == "run" else f"{DIGITS}@{run / 'student.safetensors'}"
                return ["inspect", source, "--input", "1x8x8"]

            yield f"a safetensors header with {name}, {place}", make


def run_of(folder: Path) -> Path:
    """A run directory of our own student, without weights."""
    run = folder / "run"
    run.mkdir()
    told = {"status": "done", "about": {"model": DIGITS, "input_size": [1, 8, 8], "data": "digits"}, "phases": []}
    (run / "run.json").write_text(json.dumps(told))
    return run


# ---- JSON ----------------------------------------------------------------------------------------------------------------
def hostile_json(canary: str) -> Iterator[tuple[str, Make]]:
    """Texts in the place of every JSON file."""
    plan = (GOLDEN / "plan.json").read_text()
    script = "<script>open()</script>"
    texts: dict[str, bytes] = {
        "UTF-16": plan.encode("utf-16"),
        "UTF-8 with a byte order mark": b"\xef\xbb\xbf" + plan.encode(),
        "UTF-32": plan.encode("utf-32-be"),
        "Latin-1": plan.replace("{", '{"caf\xe9": 1, ', 1).encode("latin-1"),
        "NaN and infinity": plan.replace("{", '{"a": [NaN, Infinity, -Infinity, 1e999], ', 1).encode(),
        "one key twice": plan.replace("{", '{"schema_version": 99, ', 1).encode(),
        "a million keys": plan.replace("{", "{" + "".join(f'"k{k}": 0, ' for k in range(10**6)), 1).encode(),
        "brackets in keys": b'{"a":' * 100_000,
        "a number of a million digits": plan.replace("{", '{"a": 1' + "0" * 10**6 + ", ", 1).encode(),
        "script": json.dumps({"a": script, "teacher": {"name": script}, "about": {"model": script}}).encode(),
        "zeros": bytes(1 << 20),
        "only a string": b'"plan"',
        "20 million lists": b"[" + b"[]," * 20_000_000 + b"0]",
        "33 million lists in 80,000": b"[" + (b"[" * 400 + b"]" * 400 + b",") * 80_000 + b"0]",
        "9 million objects": b"[" + b'{"":0},' * 9_000_000 + b"0]",
        "a yaml": b"!!python/object/apply:os.system ['touch " + canary.encode() + b"']\n",
    }  # fmt: skip
    commands: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
        "the plan": ("plan.json", lambda run: ["align", DIGITS, DIGITS, "--input", "1x8x8", "--plan", str(run / "plan.json")]),
        "run.json": ("run.json", lambda run: ["inspect", str(run)]),
        "metrics.jsonl": ("metrics.jsonl", lambda run: ["report", str(run), "-o", str(run.parent / "page.html")]),
        "export.json": ("export.json", lambda run: ["report", str(run), "-o", str(run.parent / "page.html")]),
    }  # fmt: skip
    for name, content in texts.items():
        for what, (file, command) in commands.items():

            def make(folder: Path, content: bytes = content, file: str = file, command: Any = command) -> list[str]:
                run = run_of(folder)
                (run / file).write_bytes(content)
                arguments: list[str] = command(run)
                return arguments

            yield f"{name} in {what}", make
