"""Sizes that a file asks for are bounded before memory is taken, and reading stays linear."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import indistill_fx as ifx
from indistill_fx.data.class_names import read_classes
from indistill_fx.data.pictures import read_head, read_picture
from indistill_fx.demo import DigitsStudent
from indistill_fx.errors import ConfigError
from indistill_fx.loading.pt2 import _check_expression, _check_payloads, _UnfitError
from indistill_fx.loading.state_dicts import count_numbers, load_weights
from indistill_fx.plan import AlignmentPlan
from indistill_fx.report.read_runs import MOST_STAGES, read_run
from indistill_fx.runs.checkpoint import load_checkpoint
from indistill_fx.runs.load import load_run
from indistill_fx.system.files import TooLargeError, parse_json
from indistill_fx.system.tensor_files import save_tensors


def run_of(place: Path, spec: str, size: list[int], weights: nn.Module) -> Path:
    place.mkdir()
    (place / "run.json").write_text(json.dumps({"status": "done", "about": {"model": spec, "input_size": size}}))
    save_tensors(place / "student.safetensors", weights.state_dict())
    return place


HUGE = [
    "torchvision:resnet18?num_classes=3000000",
    "torchvision:squeezenet1_1?num_classes=10000000",
    "torchvision:mobilenet_v3_small?num_classes=100000000",
    "timm:resnet10t?num_classes=3000000",
    "torchvision:vit_b_16?num_classes=9000000",
]


@pytest.mark.parametrize(
    "inputs",
    [
        "3x8",
        [],
        ["3x8"] * 65,
        ["a" * 201 + ":3"],
        [3],
        ["4000x4000x8"],
        ["8x1000x1000"] * 9,
        ["x:float64x99999x99999"],
        ["a:3", "3"],
    ],
)
def test_inputs_that_a_run_describes_are_bounded(tmp_path, inputs):
    about = {"model": "indistill_fx.demo:DigitsStudent", "input_size": [1, 8, 8], "inputs": inputs}
    (tmp_path / "run.json").write_text(json.dumps({"status": "done", "about": about}))
    save_tensors(tmp_path / "student.safetensors", DigitsStudent().state_dict())
    with pytest.raises(ifx.ConfigError, match=r"run\.json describes impossible inputs"):
        load_run(tmp_path)


@pytest.mark.parametrize("spec", HUGE)
def test_a_run_that_asks_for_a_huge_model_is_refused_before_memory_is_taken(tmp_path, spec):
    place = run_of(tmp_path / "run", spec, [3, 32, 32], nn.Linear(2, 2))
    code = f"import sys; from indistill_fx.cli import run; sys.exit(run(['inspect', {str(place)!r}]))"
    bound = 3 << 30  # of address space: torch alone maps more than two

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit
    )
    assert done.returncode == 2, done.stderr[-500:]
    assert "many more elements than its weights have (6)" in done.stderr


@pytest.mark.parametrize(
    "spec",
    [
        "torchvision:resnet18?num_classes=7",
        "torchvision:swin_t?num_classes=7",
        "torchvision:googlenet?aux_logits=False",
    ],
)
def test_honest_runs_are_within_the_bound(tmp_path, spec):
    model = ifx.load(spec)
    place = run_of(tmp_path / "run", spec, [3, 64, 64], model)
    assert count_numbers(place / "student.safetensors") == sum(t.numel() for t in model.state_dict().values())
    found = load_run(place).module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [[3, 1 << 14, 1 << 14], [1 << 27], [2] * 17, [0, 3], [3, -1, 2], [1e3, 2], [True, 3]])
def test_inputs_that_a_file_asks_for_fit_in_memory(tmp_path, size):
    place = run_of(tmp_path / "run", "torchvision:resnet18", size, torchvision.models.resnet18())
    with pytest.raises(ifx.ConfigError, match="an input has the size"):
        load_run(place)


X, Y = "Symbol('s0', positive=True, integer=True)", "Symbol('s1', positive=True, integer=True)"


@pytest.mark.parametrize(
    "text",
    [
        f"Pow(Add({', '.join([X, Y] * 10)}), Integer(8))",
        f"Mul({', '.join([f'Add({X}, {Y})'] * 12)})",
        f"Mul({', '.join([f'Pow({X}, Integer(8))'] * 25)}, Pow(Add({X}, {Y}), Integer(8)))",
    ],
    ids=["a power of a sum", "a product of sums", "terms and degree"],
)
def test_shape_expressions_are_bounded_in_degree_and_terms(text):
    with pytest.raises(_UnfitError, match="shape expression"):
        _check_expression(text)


def test_shape_expressions_of_real_programs_are_within_the_bound():
    _check_expression(X)
    _check_expression(f"Add(Integer(1), FloorDiv(Add({X}, Integer(-1)), Integer(2)))")
    _check_expression(f"Mul(Integer(3), Pow(Add({X}, {Y}), Integer(2)), {Y})")


def test_metadata_of_pictures_are_bounded(tmp_path):
    """A gibibyte of text in a kilobyte of PNG; a sparse file that Pillow would read whole; a long comment is read and not kept."""
    black = Image.new("L", (4, 4))
    sound = io.BytesIO()
    black.save(sound, "PNG")
    squeezed = zlib.compress(bytes(64 << 20), 9)
    for kind, head in ((b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"profile\0\0")):
        text = kind + head + squeezed
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        (tmp_path / "text.png").write_bytes(sound.getvalue()[:33] + chunk + sound.getvalue()[33:])
        with pytest.raises(ifx.ConfigError, match=r"cannot be read: .*(too large|Decompressed)"):
            read_picture(str(tmp_path / "text.png"))
    black.save(tmp_path / "sparse.webp", "WEBP")
    with open(tmp_path / "sparse.webp", "r+b") as file:
        file.truncate(8 << 30)
    with pytest.raises(ifx.ConfigError, match="more than any image"):
        read_head(str(tmp_path / "sparse.webp"))
    black.save(tmp_path / "long.gif", comment=b"x" * 200_000)
    assert read_picture(str(tmp_path / "long.gif")).size == (4, 4)


def test_expanded_tensors_are_bounded_in_their_sum(tmp_path):
    """Each of them is within the bound, and together they are not: whoever copies them would take 64 GiB."""
    many = [torch.ones(1).expand(1 << 26) for _ in range(256)]
    torch.save({"state_dict": {f"w{k}": tensor for k, tensor in enumerate(many)}}, tmp_path / "many.pt")
    with pytest.raises(ifx.ConfigError, match="declares a tensor"):
        load_weights(nn.Linear(1, 1), tmp_path / "many.pt")
    config = {
        f"w{k}": {
            "use_pickle": False,
            "path_name": f"weight_{k}",
            "tensor_meta": {
                "dtype": 7,
                "sizes": [{"as_int": 1 << 26}],
                "strides": [{"as_int": 0}],
                "storage_offset": {"as_int": 0},
            },
        }
        for k in range(256)
    }
    stored = {f"data/weights/weight_{k}": 4 for k in range(256)}
    with pytest.raises(_UnfitError, match="together show"):
        _check_payloads({"config": config}, "data/weights/model_weights_config.json", stored)
    _check_payloads({"config": dict(list(config.items())[:4])}, "data/weights/model_weights_config.json", stored)


def test_twenty_thousand_stages_are_read_and_the_first_thousand_shown(tmp_path):
    count = 20_000
    names = [f"layer{k}: a" for k in range(count)]
    told = {
        "schedule": [f"{name}: 1 epoch" for name in names],
        "phases": [{"name": name, "length": 1} for name in names],
    }
    (tmp_path / "run.json").write_text(json.dumps(told))
    line = {"kind": "epoch", "epoch": 1, "loss": 1.0, "epochs": 1, "step": 1}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line | {"stage": name}) + "\n" for name in names))
    found = read_run(tmp_path)
    assert len(found.phases) == MOST_STAGES
    assert found.phases[7].text == "layer7: a: 1 epoch"
    assert found.phases[7].epochs[0].loss == 1.0
    assert f"Only the first {MOST_STAGES:,} of {count:,} stages are shown." in found.missing


def test_a_plan_cannot_ask_for_pictures_that_fill_the_memory(tmp_path):
    told = json.loads((Path(__file__).parents[1] / "golden" / "0.1.0" / "plan.json").read_text())
    for size, fits in (([65535, 65535], False), ([4096, 4096], True)):
        (tmp_path / "plan.json").write_text(json.dumps(told | {"view": {"size": size}}))
        with nullcontext() if fits else pytest.raises(ifx.ConfigError, match="at most 16,777,216 are made"):
            assert AlignmentPlan.load(tmp_path / "plan.json").view.size == tuple(size)


VALUES = {
    "lists": "[" + "[]," * 1_100_000 + "0]",
    "lists in lists": "[" + ("[" * 400 + "]" * 400 + ",") * 3000 + "0]",
    "keys": "{" + ",".join(f'"{number}":0' for number in range(1_100_000)) + "}",
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_a_json_text_are_counted_before_they_are_made(kind):
    """A hundred bytes of memory for three of text: 64 MiB of brackets took more than two gigabytes."""
    with pytest.raises(TooLargeError, match="more than 1,048,576 values"):
        parse_json(VALUES[kind])
    with pytest.raises(TooLargeError):
        parse_json(VALUES[kind].encode())


@pytest.mark.parametrize("kind", VALUES)
def test_a_million_values_in_a_plan_are_refused_before_each_gets_an_error(tmp_path, kind):
    golden = (Path(__file__).parents[1] / "golden" / "0.1.0" / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(golden.replace("{", '{"a":' + VALUES[kind] + ",", 1))
    with pytest.raises(ConfigError, match="more than 1,048,576 values"):
        AlignmentPlan.load(tmp_path / "plan.json")


def test_a_run_of_millions_of_values_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"about": ' + VALUES["lists"] + "}")
    with pytest.raises(ConfigError, match="does not say which model"):
        load_run(tmp_path)
    assert any("more than 1,048,576 values" in line for line in read_run(tmp_path).missing)


def test_a_program_of_millions_of_values_is_refused(tmp_path):
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), tmp_path / "sound.pt2")
    with zipfile.ZipFile(tmp_path / "sound.pt2") as old, zipfile.ZipFile(tmp_path / "file.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, "[" + "[]," * 4_200_000 + "0]" if name.endswith("models/model.json") else old.read(name))
    with pytest.raises(ConfigError, match="more than 4,194,304 values"):
        ifx.load(str(tmp_path / "file.pt2"))


def test_headers_of_tensor_files_are_bounded(tmp_path):
    """The library reads 100 MB of header, which took gigabytes."""
    header = b'{"__metadata__":{' + b",".join(b'"%d":""' % number for number in range(1_500_000)) + b"}}"
    (tmp_path / "file.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for read in (lambda path: load_weights(DigitsStudent(), path), count_numbers, load_checkpoint):
        with pytest.raises(ConfigError, match="at most 16,777,216"):
            read(tmp_path / "file.safetensors")


def test_files_that_begin_with_a_byte_order_mark_are_read(tmp_path):
    """As editors and shells on Windows write them."""
    golden = Path(__file__).parents[1] / "golden" / "0.1.0" / "plan.json"
    (tmp_path / "plan.json").write_text(golden.read_text(), encoding="utf-8-sig")
    assert AlignmentPlan.load(tmp_path / "plan.json") == AlignmentPlan.load(golden)
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    assert read_classes(str(tmp_path / "classes.txt")) == ("cat", "dog")


def test_a_jpeg_that_goes_over_its_pixels_thousands_of_times_is_refused(tmp_path):
    """10,000 passes over 88 million pixels are 1.3 MB, and took minutes."""
    content = io.BytesIO()
    Image.new("L", (64, 64), 128).save(content, "JPEG", progressive=True)
    jpeg = content.getvalue()
    start = jpeg.rindex(b"\xff\xda")
    for times, fits in ((50, True), (200, False)):
        (tmp_path / "0.jpg").write_bytes(jpeg[:-2] + jpeg[start:-2] * times + jpeg[-2:])
        with nullcontext() if fits else pytest.raises(ifx.ConfigError, match="at most 100 are read"):
            assert read_picture(str(tmp_path / "0.jpg")).size == (64, 64)
