"""Files that attack: names that are code, archives that two readers read differently, libraries that lie beside data, copied signatures."""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.cli import run as run_cli
from indistill_fx.loading.operators import may_be_called
from indistill_fx.runs.load import about, load_run
from indistill_fx.system.files import clear_drafts, replace_file, save_json


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))


def renamed(module: nn.Module, registry: str, old: str, new: str) -> nn.Module:
    held = vars(module)[registry]
    vars(module)[registry] = {new if name == old else name: value for name, value in held.items()}
    return module


CODE = 'x" if getattr(__import__("os"), "system")("touch canary") else "y'
NAMES = [CODE, "a.b", "a b", "", "a\nb", "\x1b[2J", "\uff46", "1x", "x" * 300, "9" * 12]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("registry", ["_modules", "_parameters", "_buffers"])
def test_names_in_a_file_are_identifiers_or_numbers(here, registry, name):
    model = network()
    if registry == "_modules":
        renamed(model, registry, "1", name)
    else:
        vars(model[0])[registry] = {**vars(model[0])[registry], name: nn.Parameter(torch.ones(1))}
    torch.save(model, "evil.pt")
    with pytest.raises(ifx.ConfigError, match="not an identifier or number"):
        ifx.load("evil.pt")
    assert run_cli(["inspect", "evil.pt", "--input", "3x8x8"]) == 2
    assert not Path("canary").exists()


@pytest.mark.parametrize("name", ["forward", "train", "eval", "_forward_hooks", "to", "state_dict", "training"])
def test_no_name_hides_what_every_module_has(here, name):
    torch.save(renamed(network(), "_modules", "1", name), "evil.pt")
    with pytest.raises(ifx.ConfigError, match="hides what every module has"):
        ifx.load("evil.pt")


def test_no_attribute_stands_in_the_place_of_a_method_and_no_hook_comes_along(here):
    model = network()
    model[1].__dict__["state_dict"] = 5
    torch.save(model, "evil.pt")
    with pytest.raises(ifx.ConfigError, match=r"in the place of a method|could change what its code does"):
        ifx.load("evil.pt")
    model = network()
    model[1]._forward_hooks[0] = nn.functional.relu
    torch.save(model, "evil.pt")
    with pytest.raises(ifx.ConfigError, match="attaches hooks to modules"):
        ifx.load("evil.pt")
    model = network()
    model[1].__dict__["_forward_pre_hooks"] = 5
    torch.save(model, "evil.pt")
    with pytest.raises(ifx.ConfigError, match="attaches hooks to modules"):
        ifx.load("evil.pt")


def test_an_honest_file_still_loads(here):
    model = nn.Sequential(network(), nn.ModuleDict({"left": nn.ReLU(), "right_2": nn.GELU()})["left"])
    torch.save(model, "sound.pt")
    assert torch.equal(ifx.load("sound.pt")(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8)))


def test_what_is_checked_is_what_is_loaded(here):
    """A second directory behind a zip64 locator: one reader sees the honest pickle, another one the evil one."""
    torch.save(network(), "sound.pt")
    evil = network()
    renamed(evil, "_modules", "1", CODE)
    torch.save(evil, "evil.pt")
    sound, other = Path("sound.pt").read_bytes(), Path("evil.pt").read_bytes()
    end = sound.rindex(b"PK\x05\x06")
    count, _, _ = struct.unpack("<HLL", sound[end + 10 : end + 20])
    at = other.rindex(b"PK\x05\x06")
    size64, start64 = struct.unpack("<LL", other[at + 12 : at + 20])
    record = b"PK\x06\x06" + struct.pack(
        "<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, size64, len(sound[:end]) + start64
    )
    two = sound[:end] + other[:at] + record
    two += b"PK\x06\x07" + struct.pack("<LQL", 0, len(sound[:end]) + at, 1) + sound[end:]
    Path("two.pt").write_bytes(two)
    with pytest.raises(ifx.ConfigError):
        ifx.load("two.pt")
    assert not Path("canary").exists()


def test_the_structure_of_a_file_is_read_once(here, monkeypatch):
    """What is made comes from the description that was checked; nobody opens the pickle again, and torch never sees it."""
    torch.save(network(), "sound.pt")
    opened = []
    original = zipfile.ZipFile.open

    def counting(archive, name, *args, **options):
        opened.append(getattr(name, "filename", name))
        return original(archive, name, *args, **options)

    monkeypatch.setattr(zipfile.ZipFile, "open", counting)
    monkeypatch.setattr(torch, "load", None)
    ifx.load("sound.pt")
    assert len(set(opened)) == len(opened) and sum(name.endswith("data.pkl") for name in opened) == 1


LIBRARIES = ("pydantic", "timm", "statistics", "wandb", "yaml")


@pytest.mark.parametrize("first", ["", "."], ids=["", "PYTHONPATH begins with a dot"])
@pytest.mark.parametrize("program", [["-m", "indistill_fx"], ["-c", "from indistill_fx.__main__ import main; main()"]])
def test_nothing_is_imported_from_where_data_lie(here, program, first):
    torch.save(network(), "sound.pt")
    for name in LIBRARIES:
        Path(f"{name}.py").write_text(f"open('canary-{name}', 'w').close()\n")
    path = "" if program[0] == "-m" else "import sys; sys.path.pop(0); "
    arguments = [program[0], path + program[1] if path else program[1]]
    done = subprocess.run(
        [sys.executable, *arguments, "inspect", "sound.pt", "--input", "3x8x8", "--trust", "torchvision"],
        capture_output=True, text=True, check=False,
        env={"PYTHONPATH": os.pathsep.join(filter(None, (first, str(Path(ifx.__file__).parents[1])))), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(here.glob("canary*"))


def compiled_beside(path: Path, source: str, flags: int = 1) -> None:
    """Other code in `__pycache__`, which Python would run in the file's place: never checked (1), or of the same date (0)."""
    path.write_text(source)
    other = compile(f"open('canary', 'w').close()\n{source}", path.name, "exec")
    file = Path(importlib.util.cache_from_source(str(path)))
    file.parent.mkdir(exist_ok=True)
    state = path.stat()
    head = importlib.util.MAGIC_NUMBER + flags.to_bytes(4, "little")
    head += struct.pack("<II", int(state.st_mtime), state.st_size) if not flags else bytes(8)
    file.write_bytes(head + marshal.dumps(other))


MAKE = "from torch import nn\n\n\ndef make():\n    return nn.Linear(2, 3)\n"


@pytest.mark.parametrize("flags", [0, 1], ids=["of the same date", "never checked"])
def test_what_lies_compiled_beside_the_users_file_is_not_run(here, flags):
    """Nobody who reads the file would see it, and a signature is of the file."""
    compiled_beside(Path("models.py"), MAKE, flags)
    assert ifx.load("models.py:make").out_features == 3
    assert not Path("canary").exists()
    spec = importlib.util.spec_from_file_location("plain", "models.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert Path("canary").exists(), "Python itself does run it"


def test_nor_beside_its_neighbours_nor_in_a_package(here):
    Path("mine").mkdir()
    compiled_beside(Path("neighbour_of_models.py"), MAKE)
    compiled_beside(Path("mine/__init__.py"), "")
    compiled_beside(Path("mine/models.py"), "from neighbour_of_models import make\n")
    Path("models.py").write_text("from neighbour_of_models import make\n")
    hooks, paths = list(sys.path_hooks), list(sys.path)
    for spec in ("models.py:make", "mine.models:make"):
        assert ifx.load(spec).out_features == 3
        sys.modules.pop("neighbour_of_models")
    assert not Path("canary").exists()
    assert (sys.path_hooks, sys.path) == (hooks, paths)


def test_the_users_own_file_finds_its_neighbours_but_they_are_no_libraries(here):
    Path("models.py").write_text(
        "import parts, statistics\nfrom torch import nn\ndef make(): return nn.Linear(parts.WIDTH, 2)\n"
    )
    Path("parts.py").write_text("WIDTH = 3\n")
    Path("statistics.py").write_text("open('canary', 'w').close()\n")
    assert ifx.load("models.py:make").in_features == 3
    assert not Path("canary").exists()


def test_code_below_the_folder_of_python_itself_is_compiled_anew(here, monkeypatch):
    """As in a container whose working directory is /usr/src/app, with Python in /usr."""
    monkeypatch.setattr(sys, "base_prefix", str(here))
    Path("app").mkdir()
    compiled_beside(Path("app/neighbour_below_python.py"), MAKE)
    Path("app/models.py").write_text("from neighbour_below_python import make\n")
    assert ifx.load("app/models.py:make").out_features == 3
    assert not Path("canary").exists()


def test_a_signature_is_of_the_code_and_not_of_its_name(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    Path("models.py").write_text("from torch import nn\ndef make(): return nn.Linear(3, 2)\n")
    told = {"status": "done", "about": about("models.py:make", "digits", (3,))}
    Path("run").mkdir()
    Path("run/run.json").write_text(json.dumps(told))
    from safetensors.torch import save_file

    save_file(nn.Linear(3, 2).state_dict(), "run/student.safetensors")
    assert load_run("run").module.in_features == 3
    Path("models.py").write_text(
        "open('canary', 'w').close()\nfrom torch import nn\ndef make(): return nn.Linear(3, 2)\n"
    )
    with pytest.raises(ifx.ConfigError, match=r"has changed since that run began.* so it was not run"):
        load_run("run")
    Path("elsewhere").mkdir()
    Path("elsewhere/models.py").write_text("open('canary', 'w').close()\n")
    told["about"]["model"] = str(here / "elsewhere/models.py:make")
    Path("run/run.json").write_text(json.dumps(told))
    with pytest.raises(ifx.ConfigError, match="was not run"):
        load_run("run")
    assert not Path("canary").exists()


def test_drafts_follow_no_link_and_leave_nothing(here):
    Path("mine").write_text("mine")
    for name in (".export.json.draft", ".plan.json.draft"):
        Path(name).symlink_to("mine")
    save_json(Path("export.json"), {"a": 1})
    seen = []
    replace_file(Path("plan.json"), lambda draft: (seen.append(draft.parent.name), draft.write_text("{}")))
    replace_file(Path("plan.json"), lambda draft: (seen.append(draft.parent.name), draft.write_text("{}")))
    assert Path("mine").read_text() == "mine" and len(set(seen)) == 2
    assert not Path("export.json").is_symlink()
    clear_drafts(here)
    assert sorted(path.name for path in here.iterdir()) == ["export.json", "mine", "plan.json"]


OPERATORS = {
    True: "conv2d.default batch_norm.default add_.Tensor relu.default scaled_dot_product_attention.default view.default to.dtype",
    False: "_print.default segment_reduce.default _sparse_coo_tensor_unsafe.default set_.source_Tensor resize_.default from_file.default "
    "record_stream.default _test_check_tensor.default",
}


@pytest.mark.parametrize(
    ("name", "allowed"), [(name, yes) for yes, names in OPERATORS.items() for name in names.split()]
)
def test_operators_that_a_program_may_call(name, allowed):
    packet, _, overload = name.partition(".")
    assert may_be_called("aten", packet, getattr(getattr(torch.ops.aten, packet), overload)) is allowed


def test_names_in_a_plan_neither_command_the_terminal_nor_forge_a_line(here, capsys):
    torch.save(network(), "sound.pt")
    assert run_cli(["align", "sound.pt", "sound.pt", "--input", "3x8x8", "-o", "plan.json"]) == 0
    plan = json.loads(Path("plan.json").read_text())
    plan["teacher"] |= {"name": "\x1b]0;owned\x07", "fingerprint": "0"}
    plan["layers"]["teacher"] = {"a\nerror: all is lost": "Conv2d", "\x1b[2J": "Conv2d"}
    Path("evil.json").write_text(json.dumps(plan))
    for option in ("--plan", "--diff"):
        capsys.readouterr()
        assert run_cli(["align", "sound.pt", "sound.pt", "--input", "3x8x8", option, "evil.json"]) == 0
        shown = "".join(capsys.readouterr())
        assert "\\u001b]0;owned" in shown
        assert "\x1b]" not in shown and "\x07" not in shown and "\nerror: all is lost" not in shown


def test_metrics_are_not_written_through_a_link(here):
    Path("run").mkdir()
    Path("run/metrics.jsonl").symlink_to(here / "elsewhere.txt")
    options = ["--data", "digits", "--limit", "24", "--epochs", "1", "-o", "run"]
    assert run_cli(["train", "indistill_fx.demo:DigitsStudent", *options]) == 2
    assert not Path("elsewhere.txt").exists()
