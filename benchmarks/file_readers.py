"""Everything that reads a file or a text from outside, each with sound files to start from, for `fuzz_readers.py`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from sound_files import (
    exported,
    feature_indices,
    in_a_file,
    model,
    onnx_models,
    picture_caches,
    pictures,
    saved,
    stories,
)
from torch import nn

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "0.1.0"
Reader = Callable[[Path], object]
Readers = dict[str, tuple[Reader, Callable[[], list[bytes]]]]
"""By name: what reads a file, and sound files to start from."""


def reader(name: str) -> tuple[Reader, Callable[[], list[bytes]]]:
    """One of them; of the others nothing is imported."""
    return next(group for group, names in GROUPS.items() if name in names)()[name]


def model_files() -> Readers:
    from safetensors.torch import save as to_bytes

    from indistill_fx.loading.load import load_source
    from indistill_fx.loading.state_dicts import load_weights, read_state_dict

    def program() -> list[bytes]:
        batch = ({0: torch.export.Dim("batch")},)
        made = torch.export.export(model(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=batch)
        return [saved(lambda file: torch.export.save(made, file))]

    def whole() -> list[bytes]:
        return [saved(lambda f, m=m: torch.save(m, f)) for m in (model(), torch.fx.symbolic_trace(model()))]

    def legacy() -> list[bytes]:
        return [saved(lambda f: torch.save(model(), f, _use_new_zipfile_serialization=False))]

    def as_pt(path: Path) -> object:
        return load_source(str(path.rename(path.with_suffix(".pt"))))

    return {
        "module": (as_pt, whole),
        "legacy module": (as_pt, legacy),
        "weights": (
            lambda path: load_weights(model(), path),
            lambda: [saved(lambda f: torch.save({"state_dict": model().state_dict(), "epoch": 3}, f))],
        ),
        "safetensors": (
            lambda path: read_state_dict(path),
            lambda: [to_bytes(model().state_dict(), {"sha256": "{}"}), to_bytes(model().state_dict())],
        ),
        "pt2": (lambda path: load_source(str(path.rename(path.with_suffix(".pt2")))), program),
    }


def onnx_files() -> Readers:
    """Teachers, converted and as black boxes; and deployed files, which are compared with a module."""
    from indistill_fx.deploy import check_onnx
    from indistill_fx.deploy.bench import example_of
    from indistill_fx.deploy.onnx_session import feed, file_size, open_session
    from indistill_fx.loading.onnx.models import convert_file, run_file

    fresh = check_onnx.capture
    module, images = model(), torch.randn(2, 3, 8, 8)

    @lru_cache(maxsize=1)
    def captured() -> Any:
        names = {"input_names": ["x"], "output_names": ["y"]}
        whole = check_onnx.Deployed(module, None)
        return fresh(whole, (images,), opset=18, dynamic_batch=True, dynamic_size=False, **names)

    check_onnx.capture = lambda *_, **__: captured()  # an export takes seconds, and is of the module, not of the file

    def beside(path: Path) -> Path:
        (path.parent / "w.bin").write_bytes(bytes(4096))
        return path.rename(path.with_suffix(".onnx"))

    def deployed(path: Path) -> object:
        file = beside(path)
        feed(open_session(file), example_of(file))
        file_size(file)
        return check_onnx.check_onnx(file, module, images, batch_sizes=(1, 2), real_inputs=images)

    return {
        "ONNX model": (lambda path: convert_file(beside(path)), onnx_models),
        "ONNX black box": (lambda path: run_file(beside(path), ["t"]), onnx_models),
        "deployed ONNX": (deployed, lambda: [*exported(), *onnx_models()]),
    }


def plans() -> Readers:
    from indistill_fx import align, trace
    from indistill_fx.demo import DigitsStudent, DigitsTeacher
    from indistill_fx.graph.view import Figures, Rescaling, View
    from indistill_fx.passes.capture.trace import as_traced
    from indistill_fx.plan import AlignmentPlan

    example = torch.randn(2, 1, 8, 8)
    teacher, student = trace(DigitsTeacher(), example, role="teacher"), trace(DigitsStudent(), example, role="student")
    own = align(teacher.module, student.module, example_inputs=example)
    figures = Rescaling(given=Figures(mean=(0.5,), std=(0.5,)), wanted=Figures(mean=(0.1,), std=(0.2,)))
    view = View(size=(16, 16), channels=3, rescaling=figures, dtype="float64", classes=(1, 0))

    def used(path: Path) -> object:
        """Read, shown, compared with another and with the models, and what the teacher sees by it."""
        plan = AlignmentPlan.load(path)
        plan.diff(own), own.diff(plan), plan.drift(teacher, student), plan.with_penultimate()
        for seen in filter(None, (plan.view, *plan.views)):
            if (seen.size or (1, 1)) < (512, 512):
                as_traced(DigitsTeacher(), example, role="teacher", view=seen)
        return plan.described_views, plan.check(teacher, student)

    def with_views() -> list[bytes]:
        plain = view.model_copy(update={"channels": None, "dtype": None})
        views = ({"view": plain}, {"view": view}, {"views": (view, None)})
        return [own.model_copy(update=one).model_dump_json().encode() for one in ({}, *views)]

    return {
        "plan": (AlignmentPlan.load, lambda: [(GOLDEN / "plan.json").read_bytes()]),
        "plan with views": (used, with_views),
    }


def run_files() -> Readers:
    from safetensors.torch import save_file

    from indistill_fx.demo import DigitsStudent
    from indistill_fx.report.pages import run_page
    from indistill_fx.report.read_runs import read_runs
    from indistill_fx.runs.directory import RunDirectory
    from indistill_fx.runs.load import keep_export, load_run, run_fingerprint
    from indistill_fx.training.recipes import kept_curriculum

    def placed(path: Path, name: str) -> Path:
        home = path.parent / "run"
        shutil.copytree(GOLDEN / "run", home, dirs_exist_ok=True)
        save_file(DigitsStudent().state_dict(), home / "student.safetensors")
        path.replace(home / name)
        return home

    def run(path: Path) -> object:
        home = placed(path, "run.json")
        run_fingerprint(home)
        read_runs(home)
        return load_run(home)

    def to_resume(path: Path) -> object:
        """run.json of a run that goes on: its report is kept, and the warm-up that it had."""
        home = placed(path, "run.json")
        kept_curriculum(home)
        with RunDirectory(home, resume=True) as directory:
            directory.begin(resumed=True, settings={})
            directory.log({"kind": "epoch", "epochs": 1, "step": 1})
        return run_page(home)

    def rewound(path: Path) -> object:
        home = placed(path, "metrics.jsonl")
        with RunDirectory(home, resume=True) as directory:
            directory.rewind(1, 10)
        return run_page(home)

    def export(path: Path) -> object:
        home = placed(path, "export.json")
        read_runs(home)
        keep_export(home, size=3, latency_ms=0.5)
        return run_page(home)

    about = {
        "model": "indistill_fx.demo:DigitsStudent", "input_size": [1, 8, 8], "classes": ["a"],
        "normalisation": [[0.5], [0.5]], "inputs": ["x:int64[0..9]x4"],
    }  # fmt: skip
    told = json.loads((GOLDEN / "run" / "run.json").read_text()) | {"about": about}
    told |= {"phases": [{"name": "pairs", "length": 3, "unit": "epochs", "main": False}]}
    numbers = {"path": "a.onnx", "size": 100, "macs": 5, "latency_ms": 0.5, "int8_size": 40, "int8_value": 0.9}
    lines = (GOLDEN / "run" / "metrics.jsonl").read_bytes()
    return {
        "run.json": (run, lambda: [json.dumps(told).encode()]),
        "run.json, resumed": (to_resume, lambda: [json.dumps(told).encode()]),
        "metrics": (lambda path: read_runs(placed(path, "metrics.jsonl")), lambda: [lines]),
        "metrics, resumed": (rewound, lambda: [lines]),
        "export.json": (export, lambda: [json.dumps(numbers).encode()]),
        "compress.json": (story_reader(), stories),
    }


def story_reader() -> Reader:
    """compress.json beside this user's own student.py, of the very compression that is to go on."""
    from indistill_fx import trace
    from indistill_fx.compression.made import read_made
    from indistill_fx.loading.spec import parse_spec
    from indistill_fx.runs.directory import COMPRESSION
    from indistill_fx.runs.signature import sign
    from indistill_fx.system.tensor_files import save_tensors

    student = nn.Sequential(nn.Linear(2, 2))
    code = "from torch import nn\n\n\nclass Student(nn.Sequential):\n    def __init__(self):\n        super().__init__(nn.Linear(2, 2))\n"
    teacher = trace(student, torch.randn(2, 2), role="teacher")

    def read(path: Path) -> object:
        home = path.parent / "run"
        home.mkdir()
        os.environ["HOME"] = str(path.parent.parent)  # where the key lies that this user signs with
        (home / "student.py").write_text(code)
        save_tensors(home / "start.safetensors", student.state_dict())
        told, identity = None, {}
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(path.read_bytes())
        if isinstance(told, dict):
            identity, told["seal"] = told.get("identity"), sign(parse_spec(f"{home / 'student.py'}:Student"))
            told["source"] = sha256(code.encode()).hexdigest()
            (home / COMPRESSION).write_text(json.dumps(told))
        else:
            path.replace(home / COMPRESSION)
        made = read_made(home, identity, teacher)
        return made and [str(step) for step in made.steps], made and max(step.accuracy or 0.0 for step in made.steps)

    return read


def checkpoints() -> Readers:
    from safetensors.torch import save as to_bytes

    from indistill_fx.curriculum import Budget
    from indistill_fx.runs.checkpoint import load_checkpoint, restore_model, restore_optimizer, save_checkpoint
    from indistill_fx.runs.saved_outputs import load_outputs
    from indistill_fx.training.identity import changes
    from indistill_fx.training.state import Phase, State, check_parts, placed

    last = GOLDEN / "run" / "checkpoints" / "last.safetensors"
    held, told = load_checkpoint(last)
    live = {name: value.clone() for name, value in held.items() if not name.startswith("optimizer/")}
    whole = {**told, "phases": ["main"], "identity": {"epochs": 3, "batch size": 4, "schedule": "constant"}}

    def checkpoint(path: Path) -> object:
        return State.read(check_parts(load_checkpoint(path)[1], path)["state"], path)

    def resumed(path: Path) -> object:
        """All that a run which goes on takes from it."""
        tensors, found = load_checkpoint(path)
        parts, phases = check_parts(found, path), [Phase("main", nn.Identity(), Budget(4))]
        changes({"epochs": 4, "batch size": 4, "schedule": "constant"}, parts["identity"], path)
        state = placed(State.read(parts["state"], path), parts["phases"] or ["main"], phases, path)
        restore_model(live, tensors)
        shapes = [held[f"optimizer/{k}/exp_avg"].shape for k in range(sum("exp_avg_sq" in name for name in held))]
        optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(shape)) for shape in shapes])
        if parts["optimizer"] is not None:
            restore_optimizer(optimizer, tensors, parts["optimizer"])
        return state

    def outputs(path: Path) -> object:
        folder = path.parent / "saved"
        folder.mkdir()
        path.replace(folder / "outputs.safetensors")
        made = load_outputs(f"saved:{folder}").module
        return made(torch.tensor([0, 1]))

    def sound_outputs() -> list[bytes]:
        tables = {"logits": torch.randn(3, 2), "layer1": torch.randn(3, 2, 2, 2), "layer1.0": torch.randn(3, 2)}
        state = {"data": "ab", "samples": 3, "teacher": "t.pt", "axes": {"layer1": 1}}
        bare = to_bytes(tables, {"state": json.dumps({"schema_version": 1, **state})})
        return [in_a_file(lambda file: save_checkpoint(file, tables, state)), bare]

    return {
        "checkpoint": (checkpoint, lambda: [last.read_bytes()]),
        "checkpoint, resumed": (resumed, lambda: [to_bytes(held, {"state": json.dumps(whole)}), last.read_bytes()]),
        "saved outputs": (outputs, sound_outputs),
    }


def data_files() -> Readers:
    from indistill_fx.data.class_names import read_classes
    from indistill_fx.data.pictures import read_head, read_picture
    from indistill_fx.errors import IndistillError

    def picture(path: Path) -> object:
        read_head(str(path))
        return read_picture(str(path))

    def classes(path: Path) -> object:
        """As a list in lines, and as one in JSON."""
        (path.parent / "a.txt").write_bytes(path.read_bytes())
        with contextlib.suppress(IndistillError):
            read_classes(str(path.parent / "a.txt"))
        return read_classes(str(path.rename(path.with_suffix(".json"))))

    def sound_classes() -> list[bytes]:
        return [b'["cat", "dog", 3]', b"cat\ndog\n", b"0\n1\n2\n"]

    return {
        "picture": (picture, pictures),
        "picture cache": (picture_cache_reader(), picture_caches),
        "feature cache": (feature_cache_reader, feature_indices),
        "classes": (classes, sound_classes),
    }


def picture_cache_reader() -> Reader:
    from indistill_fx.data.decoding import decode
    from indistill_fx.data.image_folders import Listing

    names: list[str] = []

    def read(path: Path) -> object:
        """Bytes in the place of the cache, whose name stays the same; a damaged one is made anew."""
        cache, shown = path.parent / "cache", path.parent / "0.png"
        shown.write_bytes(pictures()[0])
        os.utime(shown, (0, 0))
        listing = Listing(path.parent, (str(shown),), None, ())
        if not names:
            decode(listing, (4, 4), cache=cache)
            names.append(next(cache.glob("*.safetensors")).name)
        cache.mkdir(exist_ok=True)
        path.replace(cache / names[0])
        return decode(listing, (4, 4), cache=cache)

    return read


def feature_cache_reader(path: Path) -> object:
    """As found; and with the right digest of what it says, which is where a damaged file never comes to."""
    from indistill_fx.system.tensor_files import text_digest
    from indistill_fx.training.feature_cache import FeatureStore, fault_of

    (path.parent / "0.bin").write_bytes(bytes(96))
    index = path.rename(path.with_name("features.json"))
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        taps = json.loads(index.read_bytes()).get("taps")
        if index.stat().st_size % 2:
            index.write_text(json.dumps({"taps": taps, "digest": text_digest(taps)}))
    return fault_of(path.parent) or FeatureStore(path.parent, ["x"], 2).features


def texts() -> Readers:
    from indistill_fx.loading.inputs import example_inputs, parse_input
    from indistill_fx.loading.spec import parse_spec
    from indistill_fx.runs.load import absolute
    from indistill_fx.runs.signature import is_signed, sign

    def text(parse: Callable[[str], object]) -> Reader:
        return lambda path: parse(path.read_bytes().decode("utf-8", "replace"))

    def code(path: Path) -> object:
        """What may be code: found, signed and compared, and never run."""
        os.environ["HOME"] = str(path.parent.parent)
        spec = path.read_bytes().decode("utf-8", "replace")
        for name in ("models.py", "student.py"):
            (path.parent / name).write_text("")
        os.chdir(path.parent)
        return is_signed(parse_spec(spec), sign(parse_spec(absolute(spec))))

    specs = ["torchvision:resnet18?num_classes=10@w.pt", "models.py:make?width=(1,2)", "a@b.pt", "C:\\m.pt"]
    codes = [
        "student.py:Student@student.safetensors",
        "torch.nn:Linear?in_features=1",
        "models.py:make",
        "os:system?x=1",
    ]
    inputs = ["3x32x32", "input_ids:int64[0..30521]x128", "mask:boolx8"]
    both = "\n".join(inputs[1:])
    return {
        "spec": (text(parse_spec), lambda: [spec.encode() for spec in specs]),
        "code spec": (code, lambda: [spec.encode() for spec in codes]),
        "input": (text(parse_input), lambda: [shape.encode() for shape in inputs]),
        "inputs": (text(lambda found: example_inputs(found.split("\n"))), lambda: [both.encode()]),
    }


GROUPS: dict[Callable[[], Readers], tuple[str, ...]] = {
    model_files: ("module", "legacy module", "weights", "safetensors", "pt2"),
    onnx_files: ("ONNX model", "ONNX black box", "deployed ONNX"),
    plans: ("plan", "plan with views"),
    run_files: ("run.json", "run.json, resumed", "metrics", "metrics, resumed", "export.json", "compress.json"),
    checkpoints: ("checkpoint", "checkpoint, resumed", "saved outputs"),
    data_files: ("picture", "picture cache", "feature cache", "classes"),
    texts: ("spec", "code spec", "input", "inputs"),
}
NAMES = tuple(name for names in GROUPS.values() for name in names)
