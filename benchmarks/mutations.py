"""Changes in one part of a file, for `fuzz_readers.py`: an archive's entry, a value of JSON, a tensor file's header, a field of ONNX."""

from __future__ import annotations

import io
import json
import random
import zipfile
from typing import Any

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**30,
    2**31,
    2**63,
    "",
    "x",
    "a.b",
    "../a",
    "\x1b[2J\n",
    "é",
    "x" * 5000,
]
ODD += [[], {}, [1], ["a"], [[]], {"a": 1}, [0.5, float("nan")], float("inf"), "main", "logits", "int64", "float32"]


def mutate(content: bytes, most: int, seed: int) -> bytes:
    """Change a file: within one of its parts, or anywhere."""
    import atheris

    dice = random.Random(seed)
    if dice.random() >= 0.2:
        for way in (_archive, _tensors, _json, _lines, _onnx):
            found = way(content, dice)
            if found is not None:
                return found[:most]
    return bytes(atheris.Mutate(content, most))


def _archive(content: bytes, dice: random.Random) -> bytes | None:
    import atheris

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:
        return None
    if not entries:
        return None
    place = dice.randrange(len(entries))
    name, held = entries[place]
    entries[place] = name, _json(held, dice) or bytes(atheris.Mutate(held, 2 * len(held) + 64))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as whole:
        for name, held in entries:
            whole.writestr(name, held)
    return buffer.getvalue()


def _tensors(content: bytes, dice: random.Random) -> bytes | None:
    """A safetensors file's header, or the JSON in one of its texts."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    told = header.get("__metadata__") if isinstance(header, dict) else None
    told = told if isinstance(told, dict) else {}
    inner = [name for name, text in told.items() if isinstance(text, str) and text.startswith("{")]
    if inner and dice.random() < 0.7:
        name = dice.choice(inner)
        told[name] = (_json(told[name].encode(), dice) or b"").decode("utf-8", "replace")
        told.pop("sha256", None)
        changed = json.dumps(header).encode()
    else:
        changed = _json(content[8 : 8 + length], dice) or b""
    changed += b" " * (-len(changed) % 8)
    return len(changed).to_bytes(8, "little") + changed + content[8 + length :]


def _json(content: bytes, dice: random.Random) -> bytes | None:
    try:
        value = json.loads(content)
        places = list(_places(value))
    except (ValueError, RecursionError):
        return None
    if not places:
        return None
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        home, key = dice.choice(places)
        _change(home, key, dice, places)
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def _change(home: Any, key: Any, dice: random.Random, places: list[tuple[Any, Any]]) -> None:
    how = dice.random()
    if isinstance(home, list) and not -len(home) <= key < len(home):
        return
    if how < 0.1:
        home.pop(key) if isinstance(home, list) else home.pop(key, None)
    elif how < 0.2 and isinstance(home, dict):
        home[str(dice.choice(ODD))[:40]] = home.get(key)
    elif how < 0.3:
        other, place = dice.choice(places)
        held = other.get(place) if isinstance(other, dict) else other[place] if place < len(other) else None
        home[key] = held if isinstance(held, str | int | float | None) else json.loads(json.dumps(held))
    else:
        home[key] = dice.choice(ODD)


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(part)


def _lines(content: bytes, dice: random.Random) -> bytes | None:
    lines = content.split(b"\n")
    places = [number for number, line in enumerate(lines) if line.startswith(b"{")]
    if not places:
        return None
    place = dice.choice(places)
    lines[place] = _json(lines[place], dice) or lines[place][:-1]
    return b"\n".join(lines)


def _onnx(content: bytes, dice: random.Random) -> bytes | None:
    """One field of a message, anywhere in an ONNX file."""
    if not content.startswith(b"\x08"):
        return None
    import onnx

    try:
        model = onnx.load_model_from_string(content)
    except Exception:
        return None
    messages = list(_messages(model))
    for _ in range(dice.choice((1, 1, 2))):
        _change_field(dice.choice(messages), dice)
    return bytes(model.SerializeToString())


def _messages(message: Any) -> Any:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if hasattr(value, "add") else [value]:
                yield from _messages(part)


def _change_field(message: Any, dice: random.Random) -> None:
    field = dice.choice(list(message.DESCRIPTOR.fields))
    value = getattr(message, field.name)
    if hasattr(value, "add"):
        if len(value) and dice.random() < 0.5:
            del value[dice.randrange(len(value))]
        elif len(value):
            value.append(value[dice.randrange(len(value))])
        return
    if field.type == field.TYPE_MESSAGE:
        message.ClearField(field.name)
        return
    try:
        if hasattr(value, "append"):
            value.append(_odd_of(field, dice))
            if len(value) > 1 and dice.random() < 0.7:
                value[dice.randrange(len(value))] = value.pop()
        else:
            setattr(message, field.name, _odd_of(field, dice))
    except (TypeError, ValueError):
        return


def _odd_of(field: Any, dice: random.Random) -> Any:
    kinds = {field.TYPE_FLOAT: [0.0, 1e30, float("nan"), -1.0], field.TYPE_DOUBLE: [0.0, float("inf")]}
    kinds[field.TYPE_STRING] = kinds[field.TYPE_BYTES] = [
        "",
        "x",
        "t",
        "y",
        "w",
        "../w.bin",
        "w.bin",
        "Relu",
        "Conv",
        "Add",
        "self",
    ]
    found = dice.choice(kinds.get(field.type, [0, 1, 2, -1, 7, 100, 2**31 - 1, -(2**31), 2**62]))
    return found.encode() if field.type == field.TYPE_BYTES else found
