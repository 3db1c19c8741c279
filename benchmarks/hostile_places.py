"""Hostile places and pictures: links, pipes and devices in the place of files, pictures that are large or odd, for `attacks.py`."""

from __future__ import annotations

import io
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from files_made import Make, inspect, pictures_of
from hostile_formats import run_of
from hostile_others import DIGITS
from PIL import Image


def places(canary: str) -> Iterator[tuple[str, Make]]:
    """All of them."""
    for kind in (hostile_places, hostile_pictures):
        yield from kind(canary)


# ---- places --------------------------------------------------------------------------------------------------------------
def hostile_places(canary: str) -> Iterator[tuple[str, Make]]:
    """Links, pipes, devices and folders in the place of every file of a run directory, of a model and of a plan."""
    kinds: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo,
        "a link to a pipe": lambda path: (os.mkfifo(path.parent / "p"), path.symlink_to("p")),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to /dev/tty": lambda path: path.symlink_to("/dev/tty"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
        "a link to nothing": lambda path: path.symlink_to(canary),
        "a folder": Path.mkdir,
        "a socket": _socket,
        "a file that may not be read": lambda path: (path.write_bytes(b"x"), path.chmod(0)),
    }
    files: dict[str, Callable[[Path], list[str]]] = {
        "run.json": lambda run: ["inspect", str(run)],
        "student.safetensors": lambda run: ["inspect", str(run)],
        "metrics.jsonl": lambda run: ["report", str(run), "-o", str(run.parent / "page.html")],
        "export.json": lambda run: ["report", str(run), "-o", str(run.parent / "page.html")],
        "plan.json": lambda run: ["align", DIGITS, DIGITS, "--input", "1x8x8", "--plan", str(run / "plan.json")],
        "file.pt": lambda run: inspect(run / "file.pt"),
        "file.pt2": lambda run: inspect(run / "file.pt2"),
        "file.onnx": lambda run: inspect(run / "file.onnx"),
        "weights.pt": lambda run: ["inspect", f"{DIGITS}@{run / 'weights.pt'}", "--input", "1x8x8"],
        "weights.safetensors": lambda run: ["inspect", f"{DIGITS}@{run / 'weights.safetensors'}", "--input", "1x8x8"],
        "student.py": lambda run: ["inspect", f"{run / 'student.py'}:Student", "--input", "1x8x8"],
        "outputs.safetensors": lambda run: ["distill", f"saved:{run}", DIGITS, "--data", "digits", "-o", str(run.parent / "out")],
        "compress.json": lambda run: ["report", str(run), "-o", str(run.parent / "page.html")],
        "classes.txt": lambda run: ["distill", DIGITS, DIGITS, "--data", "digits", "--teacher-classes", str(run / "classes.txt"),
                                    "-o", str(run.parent / "out")],
    }  # fmt: skip
    for file, command in files.items():
        for kind, lay in kinds.items():

            def make(folder: Path, file: str = file, command: Any = command, lay: Any = lay) -> list[str]:
                run = run_of(folder)
                (run / file).unlink(missing_ok=True)
                lay(run / file)
                arguments: list[str] = command(run)
                return arguments

            yield f"{kind} in place of {file}", make
    for depth, name in ((200, "a"), (1, "x" * 255), (15, "y" * 255)):

        def deep(folder: Path, depth: int = depth, name: str = name) -> list[str]:
            place = os.open(folder, os.O_RDONLY)
            for _ in range(depth):
                os.mkdir(name, dir_fd=place)
                place = os.open(name, os.O_RDONLY, dir_fd=place)
            return ["report", str(folder), "-o", str(folder / "page.html")]

        yield f"{depth} folders named {name[:5]!r} in each other", deep

    def circle(folder: Path) -> list[str]:
        run = run_of(folder)
        (run / "again").symlink_to(run)
        return ["report", str(folder), "-o", str(folder / "page.html")]

    yield "a run directory that holds itself", circle


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # a socket's path may have 107 characters
    socket.socket(socket.AF_UNIX).bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


# ---- pictures --------------------------------------------------------------------------------------------------------------
def hostile_pictures(canary: str) -> Iterator[tuple[str, Make]]:
    """Pictures of a folder that a model is measured on."""

    def encoded(mode: str = "RGB", size: tuple[int, int] = (8, 8), kind: str = "PNG", **options: Any) -> bytes:
        content = io.BytesIO()
        Image.new(mode, size).save(content, kind, **options)
        return content.getvalue()

    def frames(kind: str, count: int) -> bytes:
        pictures = [Image.new("RGB", (8, 8), (k % 256, 0, 0)) for k in range(count)]
        content = io.BytesIO()
        pictures[0].save(content, kind, save_all=True, append_images=pictures[1:])
        return content.getvalue()

    exif = Image.Exif()
    exif[0x010E] = "<script>" * 1000
    exif[0x0112] = 8
    jpeg = encoded(kind="JPEG")
    contents: dict[str, bytes | Callable[[], bytes]] = {
        "20,000 frames of a GIF": lambda: frames("GIF", 20_000),
        "2,000 frames of a PNG": lambda: frames("PNG", 2_000),
        "a CMYK JPEG": encoded("CMYK", kind="JPEG"),
        "EXIF that turns and holds a script": encoded(kind="JPEG", exif=exif),
        "EXIF that points to itself": _with_exif(jpeg, b"\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"),
        "EXIF of 65,535 entries": _with_exif(jpeg, b"\xff\xff" + b"\x0f\x01\x02\0\xff\xff\xff\x7f\0\0\0\0" * 5000),
        "a JPEG of 65,500 x 65,500": _of_size(jpeg, 65_500),
        "10,000 passes of a JPEG": lambda: repeated_scan(encoded("L", (9400, 9400), "JPEG", progressive=True), 10_000),
        "a JPEG cut short": jpeg[: len(jpeg) // 2],
        "a PNG of 2**31 - 1 lines": encoded()[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + encoded()[24:],
        "a PNG of no size": encoded()[:16] + struct.pack(">II", 0, 0) + encoded()[24:],
        "a PNG cut short": encoded(size=(64, 64))[:60],
        "a BMP whose size is negative": encoded(kind="BMP")[:18] + struct.pack("<ii", -8, -(2**31)) + encoded(kind="BMP")[26:],
        "a TIFF whose directories are a circle": _circle(encoded(kind="TIFF")),
        "a palette without colours": encoded("P")[:33] + encoded("P")[33:].replace(b"PLTE", b"pLTE"),
        "89,000,000 x 1": lambda: encoded("1", (89_000_000, 1)),
        "9,400 x 9,400 with a mask": lambda: encoded("RGBA", (9400, 9400)),
        "9,400 x 9,400 in CMYK": lambda: encoded("CMYK", (9400, 9400), "JPEG", quality=1),
        "9,400 x 9,400, grey in 16 bits": lambda: encoded("I;16", (9400, 9400)),
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:///etc/passwd"/></svg>',
        "a PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(" + canary.encode() + b") (w) file\n",
        "a PDF": b"%PDF-1.7\n",
        "an ICO of many": lambda: encoded(kind="ICO", sizes=[(k, k) for k in range(1, 9)]),
        "a 64-bit TIFF of floats": encoded("F", kind="TIFF"),
    }  # fmt: skip
    for name, content in contents.items():

        def make(folder: Path, content: Any = content) -> list[str]:
            return pictures_of(lambda _: content() if callable(content) else content)(folder)

        yield f"a picture: {name}", make
    for name in (
        "<img src=x onerror=alert(1)>",
        "=cmd|'c calc'!A0",
        "a\nError: b",
        "\u202egnp",
        "\x1b[2J",
        "caf\xe9",
        "\udcff",
    ):

        def classes(folder: Path, name: str = name) -> list[str]:
            arguments = pictures_of(lambda content: content)(folder)
            for split in ("train", "test"):
                (folder / "data" / split / "a").rename(folder / "data" / split / name)
            return [*arguments, "--json"]

        yield f"a class named {name!r}", classes

    def normal_forms(folder: Path) -> list[str]:
        arguments = pictures_of(lambda content: content)(folder)
        (folder / "data" / "train" / "a").rename(folder / "data" / "train" / "caf\xe9")
        (folder / "data" / "test" / "a").rename(folder / "data" / "test" / "cafe\u0301")
        return arguments

    yield "a class in two normal forms", normal_forms

    def links(folder: Path) -> list[str]:
        arguments = pictures_of(lambda content: content)(folder)
        place = folder / "data" / "test" / "a"
        (place / "again").symlink_to(place)
        for number, target in enumerate(("/dev/zero", "/etc/passwd", "/proc/self/mem", "nowhere")):
            (place / f"{number}link.png").symlink_to(target)
        os.mkfifo(place / "pipe.png")
        return arguments

    yield "pictures that are links and pipes", links


def _with_exif(jpeg: bytes, entries: bytes) -> bytes:
    data = b"Exif\0\0II*\0\x08\0\0\0" + entries
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


def _of_size(jpeg: bytes, side: int) -> bytes:
    place = jpeg.index(b"\xff\xc0")
    return jpeg[: place + 5] + struct.pack(">HH", side, side) + jpeg[place + 9 :]


def repeated_scan(jpeg: bytes, times: int) -> bytes:
    """The last pass over the pixels of a progressive JPEG again and again: each takes a hundred bytes, and as long as the first."""
    start, end = jpeg.rindex(b"\xff\xda"), len(jpeg) - 2
    return jpeg[:end] + jpeg[start:end] * times + jpeg[end:]


def _circle(tiff: bytes) -> bytes:
    """The next directory of the first is the first."""
    start = struct.unpack("<I", tiff[4:8])[0]
    count = struct.unpack("<H", tiff[start : start + 2])[0]
    end = start + 2 + 12 * count
    return tiff[:end] + struct.pack("<I", start) + tiff[end + 4 :]
