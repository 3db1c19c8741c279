"""Files of somebody who means harm: no code of theirs runs, nothing is waited for, and no size they promise is believed.

Model files have tests of their own (tests/unit/test_safe_loading.py); here are run directories, plans, images and names.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from indistill_fx.cli import run as run_cli
from indistill_fx.cli.common import console
from indistill_fx.data.decoding import decode
from indistill_fx.data.image_folders import list_images
from indistill_fx.data.pictures import read_picture
from indistill_fx.errors import ConfigError
from indistill_fx.loading.spec import parse_spec
from indistill_fx.plan import AlignmentPlan
from indistill_fx.report import run_page
from indistill_fx.runs.load import about, load, load_run
from indistill_fx.runs.signature import sign
from indistill_fx.system.terminal import SafeConsole, printable
from indistill_fx.training.progress import Reporter
from tests.faults.harness import Victims, run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another user's home, so that the key is not that of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run_directory(place: Path, **kept: object) -> Path:
    place.mkdir()
    (place / "run.json").write_text(json.dumps({"status": "done", "about": {"input_size": [1, 8, 8], **kept}}))
    save_file(nn.Linear(2, 2).state_dict(), place / "student.safetensors")
    return place


CODE = (
    "{folder}/evil.py:make",
    "subprocess:call?args='touch {canary}'&shell=True",
    "os:system?command='touch {canary}'",
    "builtins:exec",
    "{folder}/evil.py:make@{folder}/student.safetensors",
    "timm:resnet10t?pretrained=True&pretrained_cfg={{'file':'{folder}/evil.pt'}}",
    "timm:resnet10t?checkpoint_path='{folder}/evil.pt'",
    "torchvision:resnet18?weights='DEFAULT'",
)


@pytest.mark.parametrize("spec", CODE)
@pytest.mark.parametrize("proof", [None, "", "0" * 64, 5])
def test_code_that_a_run_directory_names_is_not_run(spec: str, proof: object, tmp_path: Path) -> None:
    place, canary = tmp_path / "run", tmp_path / "canary"
    spec = spec.format(folder=place, canary=canary)
    run_directory(place, model=spec, seal=proof)
    (place / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\ndef make(): pass\n")
    with pytest.raises(ConfigError, match="so it was not run"):
        load_run(place)
    assert not canary.exists()
    assert not (tmp_path / "home" / ".local").exists()  # reading makes no key


def test_the_same_code_is_run_when_this_user_started_the_run_with_it(tmp_path: Path) -> None:
    place, canary = tmp_path / "run", tmp_path / "canary"
    code = tmp_path / "mine.py"
    code.write_text(
        f"from torch import nn\nopen({str(canary)!r}, 'w').close()\ndef make():\n    return nn.Linear(2, 2)\n"
    )
    run_directory(place, **about(f"{code}:make", "digits", (1, 8, 8)))
    assert isinstance(load_run(place).module, nn.Linear)
    assert canary.exists()
    told = json.loads((place / "run.json").read_text())
    (tmp_path / "home" / ".local" / "state" / "indistill-fx" / "key").unlink()  # another user, or another machine
    with pytest.raises(ConfigError, match="so it was not run"):
        load_run(place)
    assert len(told["about"]["seal"]) == 64


def test_a_seal_is_for_one_spec_and_its_key_is_private(tmp_path: Path) -> None:
    first = sign(parse_spec("a.py:make"))
    assert first == sign(parse_spec("a.py:make")) != sign(parse_spec("b.py:make"))
    key = tmp_path / "home" / ".local" / "state" / "indistill-fx" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key.parent.iterdir()] == ["key"]


def test_a_run_of_a_library_model_needs_no_seal(tmp_path: Path) -> None:
    place = run_directory(tmp_path / "run", model="torchvision:squeezenet1_1?num_classes=2")
    with pytest.raises(
        ConfigError, match="are not those of this SqueezeNet"
    ):  # it was built, and the weights are a Linear's
        load_run(place)


def test_timm_does_not_load_files_by_itself() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match="takes no checkpoint_path"):
        load("timm:resnet10t?checkpoint_path='x.pt'")


PAIR = '{"teacher": "a", "student": "b", "teacher_shape": [1, 4], "student_shape": [1, 2]}'
HEAD = '{"teacher": {"name": "A", "fingerprint": "1"}, "student": {"name": "A", "fingerprint": "1"}, "pairs": ['
PLANS = {
    "a million pairs": (HEAD + ",".join([PAIR] * 10**6) + "]}", "larger than 64 MiB"),
    "twenty thousand pairs": (HEAD + ",".join([PAIR] * 20_000) + "]}", "at most 10000 items"),
    "a number of 5,000 digits": (HEAD + PAIR.replace("4", "1" * 5000) + "]}", "not JSON"),
    "a hundred thousand brackets": ("[" * 10**5, "not JSON"),
    "a shape of 10**12": (HEAD + PAIR.replace("4", str(10**12)) + "]}", "less than 2147483648"),
    "half a character": (HEAD.replace("A", r"\ud800") + "]}", "not JSON"),
    "a name of a megabyte": (HEAD + PAIR.replace('"a"', f'"{"x" * 10**6}"') + "]}", "at most 4096 characters"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_too_large_to_be_one_is_refused(name: str, tmp_path: Path) -> None:
    text, reason = PLANS[name]
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        AlignmentPlan.load(tmp_path / "plan.json")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_plan(path: str) -> None:
    with pytest.raises(ConfigError, match=r"it is a device, not a file"):
        AlignmentPlan.load(path)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file closefile\nshowpage\n"
IMAGES = {
    "ten thousand megapixels": (png(100_000, 100_000), "decompression bomb"),
    "a hundred megapixels": (png(10_000, 10_000), "decompression bomb"),
    "less than it says": (png(64, 64), "cannot be read"),
    "PostScript, which Ghostscript would run": (EPS, "cannot identify image file"),
    "nothing": (b"", "cannot identify image file"),
    "noise": (bytes(range(256)) * 40, "cannot identify image file"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_is_none_is_refused_before_it_takes_memory(name: str, tmp_path: Path) -> None:
    content, reason = IMAGES[name]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_picture(str(path))
    assert caught.value.where == str(path)


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path: Path, victims: Victims) -> None:
    os.mkfifo(tmp_path / "image.png")
    assert victims.run("reads_an_image", tmp_path / "image.png", seconds=30) == 6


def test_a_cache_of_other_images_is_made_anew(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a" / "0.png")
    listing = list_images(tmp_path / "images")
    good = decode(listing, (8, 8), cache=tmp_path / "cache")
    (found,) = (tmp_path / "cache").glob("*.safetensors")
    for tensors in ({"images": torch.zeros(9, 3, 8, 8, dtype=torch.uint8)}, {"other": torch.zeros(1)}):
        save_file(tensors, found)
        again = decode(listing, (8, 8), cache=tmp_path / "cache")
        assert torch.equal(again.values, good.values)
        assert "were damaged" in again.note
    flipped = bytearray(found.read_bytes())
    flipped[-1] ^= 4
    found.write_bytes(flipped)
    again = decode(listing, (8, 8), cache=tmp_path / "cache")
    assert torch.equal(again.values, good.values)
    assert "`images` was changed" in again.note
    assert not decode(listing, (8, 8), cache=tmp_path / "cache").note


NASTY = "layer\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\r[bold]x[/]\ud800"
OBEYED = ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\r")


def test_text_is_made_printable_and_stays_json() -> None:
    shown = printable(NASTY)
    assert shown == r"layer\u001b[2J\u001b]0;owned\u0007\u009b31m\u202egnp\u000d[bold]x[/]\ud800"
    assert json.loads(f'"{shown}"') == NASTY
    assert printable("two\tlines\nof ünïcode ↔ 漢字") == "two\tlines\nof ünïcode ↔ 漢字"


def test_the_console_shows_names_and_keeps_its_own_colours() -> None:
    from rich.text import Text

    from indistill_fx.cli.tables import plain_table

    out = StringIO()
    screen = SafeConsole(file=out, force_terminal=True, width=200, color_system="standard")
    table = plain_table(NASTY)
    table.add_row(NASTY)
    screen.print(NASTY, table, Text(NASTY, style="bold red"))
    assert not any(command in out.getvalue() for command in OBEYED)
    assert out.getvalue().count("[bold]x[/]") == 4  # the line, the head, the cell and the bold text
    assert "\x1b[1;31m" in out.getvalue()
    assert isinstance(console(), SafeConsole)


def test_a_line_break_in_a_name_forges_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.text import Text

    from indistill_fx.cli.tables import plain_table

    out, forged = StringIO(), "a.pt\nForged"
    screen = SafeConsole(file=out, width=200)
    table = plain_table(forged)
    table.add_row(Text(forged))
    screen.print(forged, table, Text(forged, style="bold red"), f"{forged}.")
    Reporter(shown=True, steps={}).say(forged)
    assert run_cli(["inspect", forged]) == 2
    shown = (out.getvalue() + capsys.readouterr().err).splitlines()
    assert not [line for line in shown if line.strip().startswith("Forged")]
    assert sum("Forged" in line for line in shown) == 6


def test_an_error_shows_names_and_obeys_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["inspect", str(tmp_path / NASTY[:-1])], ["report", "x", NASTY[:-1]], [NASTY[:-1]]):
        assert run_cli(arguments) == 2
        shown = capsys.readouterr().err
        assert "owned" in shown  # click strips colours itself, and shows some names by their repr
        assert not any(command in shown for command in OBEYED)


def test_no_environment_variable_gets_into_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run directory and its page hold of the machine: nothing of the environment, where secrets are."""
    secret = "s3cr3t-value"
    for name in ("TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    run(tmp_path / "run")
    (tmp_path / "run" / "page.html").write_text(run_page(tmp_path / "run"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_half_a_character_in_a_sealed_spec_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps({"about": {"model": "\ud800.py:make", "input_size": [1], "seal": "\ud800"}})
    )
    with pytest.raises(ConfigError):
        load_run(tmp_path)
