"""student.json and ONNX files keep the task, and the output named by --logits: what reads them infers neither anew."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.loading.load import Source
from indistill_fx.runs.model_facts import facts_of, with_facts

MODELS = """
import torch
from torch import nn
from indistill_fx.losses.task import Regression, Segmentation

class Two(nn.Module):  # `logits` is the distractor; what is trained and measured is `aux`
    def __init__(self, width=8, names=True):
        super().__init__()
        self.names = names
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.first, self.second = nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(self, x):
        features = self.body(x)
        if self.names:
            return {"logits": self.first(features), "aux": self.second(features)}
        return self.first(features), self.second(features)

def two(width=8, names=True):
    torch.manual_seed(0)
    made = Two(width, names)
    with torch.no_grad():  # no class is preferred, so that the labels can be what it says
        made.second.bias -= made.second(made.body(X)).mean(0)
    return made

def one():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def value():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))

def dense():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))

def double():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).double()

def words():
    return nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))

def drawn(seed=0):
    return torch.Generator().manual_seed(seed)

def both(inputs, labels):
    return [(inputs[:8], labels[:8])], [(inputs[8:], labels[8:])]

X = torch.randn(16, 1, 8, 8, generator=drawn())

def classes():
    return both(X, two()(X)["aux"].argmax(1))

def counts():  # all 0 or 1 in the test set, like labels that are on or off
    labels = torch.randn(16, 1, generator=drawn(1)) * 3
    labels[8:] = (labels[8:] > 0).float()
    return both(X, labels)

def maps():
    labels = torch.randint(3, (16, 8, 8), generator=drawn(1))
    labels[:, :4] = 254
    return both(X, labels)

void = Segmentation(void=254)

class Doses(Regression):
    name = "doses"
"""
QUICK = ("--epochs", "1", "--device", "cpu")


@pytest.fixture
def told(tmp_path, printed):
    (tmp_path / "models.py").write_text(MODELS)
    return printed


def json_in(text):
    return json.loads(text[text.index("{\n") : text.index("\n}") + 2])


def compress(told, teacher, data, out, *more):
    options = ("--macs", "0.5", "--samples", "8", "--warmup", "1", *QUICK)
    return told("compress", teacher, "--data", f"models.py:{data}", *options, *more, "-o", out)


CASES = {
    "counts": ("value", "regression", {"name": "regression", "settings": {}}),
    "maps": ("dense", "models.py:void", {"name": "segmentation", "settings": {"void": 254}}),
}


@pytest.mark.parametrize("data", CASES)
def test_what_compress_writes_keeps_the_task(told, tmp_path, data):
    model, asked, facts = CASES[data]
    compress(told, f"models.py:{model}", data, "half", "--task", asked)
    kept = {"labels": facts, "inputs": ["float32x1x8x8"]}
    assert json.loads((tmp_path / "half/student.json").read_text()) == kept
    stated = {entry.key: entry.value for entry in onnx.load(tmp_path / "half/student.onnx").metadata_props}
    assert json.loads(stated["task"]) == facts and "logits" not in stated
    student = "half/student.py:Student@half/student.safetensors"
    measured = json.loads((tmp_path / "half/run.json").read_text())["result"]["metrics"]
    for spec in (student, "half/student.onnx", "onnxruntime:half/student.onnx"):
        evaluation = ("evaluate", spec, "--data", f"models.py:{data}")
        assert f"Task: {facts['name']}, as {spec} was trained." in told(*evaluation)
        assert json_in(told(*evaluation, "--json"))["metrics"] == pytest.approx(measured, rel=1e-4)
    told("export", student, "-o", "again.onnx")
    assert f"Task: {facts['name']}, as again.onnx was trained." in told(
        "evaluate", "again.onnx", "--data", f"models.py:{data}"
    )
    told("prune", "again.onnx", "--ratio", "0.5", "-o", "small/")
    assert json.loads((tmp_path / "small/student.json").read_text()) == kept


def test_a_student_of_such_a_teacher_learns_the_same_task(told, tmp_path):
    compress(told, "models.py:value", "counts", "half", "--task", "regression")
    quick = ("--data", "models.py:counts", "--no-warmup", *QUICK)
    said = told("distill", "half/student.onnx", "models.py:value", *quick, "-o", "run")
    assert "The task is regression, as half/student.onnx was trained; --task names another." in said
    assert json.loads((tmp_path / "run/run.json").read_text())["about"]["labels"]["name"] == "regression"


@pytest.mark.parametrize("names", ["True", "False"])
def test_the_named_output_goes_with_the_model(told, tmp_path, names):
    entry = "aux" if names == "True" else 1
    teacher = f"models.py:two?names={names}"
    compress(told, teacher, "classes", "half", "--logits", str(entry))
    facts = {"labels": {"name": "classification", "settings": {}}, "logits": entry, "inputs": ["float32x1x8x8"]}
    assert json.loads((tmp_path / "half/student.json").read_text()) == facts
    stated = {one.key: one.value for one in onnx.load(tmp_path / "half/student.onnx").metadata_props}
    assert stated["logits"] == ("aux" if names == "True" else "output_1")
    evaluation = ("--data", "models.py:classes", "--json")
    measured = json_in(told("evaluate", "half", *evaluation))
    for spec in ("half/student.py:Student@half/student.safetensors", "half/student.onnx"):
        found = json_in(told("evaluate", spec, *evaluation))
        assert found["loss"] == pytest.approx(measured["loss"], rel=1e-4), spec
    told("export", "half", "-o", "named.onnx", "--output-names", "logits,chosen")  # misleading names
    found = json_in(told("evaluate", "named.onnx", *evaluation))
    assert found["loss"] == pytest.approx(measured["loss"], rel=1e-4)
    told("check", "named.onnx", "--against", "half/student.onnx", "--data", "models.py:classes")
    told("prune", "half", "--ratio", "0.5", "-o", "small/")
    assert json.loads((tmp_path / "small/student.json").read_text())["logits"] == entry


def outputs_learned(tmp_path, name):
    return json.loads((tmp_path / name / "run.json").read_text())["about"].get("logits")


def test_teacher_and_student_each_have_their_own_logits(told, tmp_path, monkeypatch):
    from indistill_fx.training import distill as module

    seen = []
    compiled = module.compile_stages
    monkeypatch.setattr(
        module,
        "compile_stages",
        lambda *models, **more: seen.append([one.chosen for one in models[:2]]) or compiled(*models, **more),
    )
    quick = ("--data", "models.py:classes", "--no-warmup", *QUICK)
    told("train", "models.py:two", "--data", "models.py:classes", "--logits", "aux", *QUICK, "-o", "taught")
    told("export", "taught", "-o", "taught.onnx")
    for number, teacher in enumerate(("taught", "taught.onnx")):
        told("distill", teacher, "models.py:one", *quick, "-o", f"one{number}")
        told("distill", teacher, "models.py:two?width=4", *quick, "-o", f"two{number}")
        told("distill", teacher, "models.py:two?width=4", "--logits", "logits", *quick, "-o", f"asked{number}")
        kept = [outputs_learned(tmp_path, f"{name}{number}") for name in ("one", "two", "asked")]
        assert kept == [None, "aux", "logits"]
    assert seen == [["aux", None], ["aux", "aux"], ["logits", "logits"]] * 2
    of_teacher = json_in(told("evaluate", "taught", "--data", "models.py:classes", "--json"))["metrics"]
    assert json.loads((tmp_path / "one0/run.json").read_text())["teacher_metrics"] == of_teacher
    told("train", "taught", "--data", "models.py:classes", *QUICK, "-o", "on")
    assert outputs_learned(tmp_path, "on") == "aux"
    told("save-outputs", "taught", "--data", "digits", "--limit", "8", "-o", "saved")
    images = torch.stack([x for batch in ifx.open_data("digits", limit=8, augment=False).train for x in batch[0]])
    kept = ifx.load("saved:saved")(torch.arange(8))
    with torch.no_grad():
        expected = ifx.load("taught").eval()(images)
    assert sorted(kept.flatten().tolist()) == pytest.approx(sorted(expected["aux"].flatten().tolist()), abs=1e-4)


def test_several_teachers_each_have_their_own_logits(told, tmp_path):
    told("train", "models.py:two", "--data", "models.py:classes", "--logits", "aux", *QUICK, "-o", "taught")
    told("train", "models.py:one", "--data", "models.py:classes", *QUICK, "-o", "plain")
    quick = ("--data", "models.py:classes", "--no-warmup", *QUICK)
    told("distill", "taught", "models.py:one", "--teacher", "plain", *quick, "-o", "run")
    x = torch.randn(5, 1, 8, 8)
    modules = [ifx.load("taught").eval(), ifx.load("plain").eval()]
    both = ifx.ensemble(modules, example_inputs=x, logits=["aux", None])
    with torch.no_grad():
        expected = (modules[0](x)["aux"] + modules[1](x)) / 2
        assert torch.allclose(both(x), expected, atol=1e-6)
        assert torch.allclose(ifx.ensemble(modules, example_inputs=x, logits="aux")(x), expected, atol=1e-6)


def test_what_was_inferred_for_a_comparison_is_not_kept(told, tmp_path):
    told("export", "models.py:value", "-o", "plain.onnx", "--data", "models.py:counts")
    assert "task" not in {entry.key for entry in onnx.load(tmp_path / "plain.onnx").metadata_props}
    told("export", "models.py:value", "-o", "asked.onnx", "--data", "models.py:counts", "--task", "regression")
    assert "Task: regression, as asked.onnx was trained." in told(
        "evaluate", "asked.onnx", "--data", "models.py:counts"
    )


def test_code_that_a_file_names_is_run_only_as_it_was(told, tmp_path):
    (tmp_path / "own.py").write_text(MODELS)
    compress(told, "models.py:value", "counts", "half", "--task", "own.py:Doses")
    specs = ("half/student.py:Student@half/student.safetensors", "half/student.onnx")
    for spec in specs:
        assert "Task: doses, as" in told("evaluate", spec, "--data", "models.py:counts")
    (tmp_path / "own.py").write_text(MODELS + "raise SystemExit('was run')\n")
    for spec in specs:
        said = told("evaluate", spec, "--data", "models.py:counts", code=2)
        assert "was trained on a task of the user's own, `doses`" in said and "was run" not in said
        assert "--task file.py:task" in said
        assert "Task: regression, as requested." in told(
            "evaluate", spec, "--data", "models.py:counts", "--task", "regression"
        )


IMPOSSIBLE = ("[", "[]", "3", "[" * 10**5, '{"name": "segmentation", "settings": {"void": "254"}}')
IMPOSSIBLE += ('{"name": "segmentation", "settings": {"void": %s}}' % (10**400),)
OF_ONES_OWN = (
    '{"name": ["segmentation"], "settings": {}}',
    '{"name": "a", "code": ""}',
    '{"name": "a", "code": ":::"}',
)


@pytest.mark.parametrize("task", [*IMPOSSIBLE, *OF_ONES_OWN], ids=lambda text: text[:40])
def test_a_damaged_task_in_an_onnx_file_is_an_error(told, tmp_path, task):
    told("export", "models.py:dense", "-o", "dense.onnx", "--input", "1x8x8")
    model = onnx.load(tmp_path / "dense.onnx")
    onnx.helper.set_model_props(model, {"indistill_fx": "0.2.0", "task": task})
    onnx.save(model, tmp_path / "dense.onnx")
    said = told("evaluate", "dense.onnx", "--data", "models.py:maps", code=2)
    words = ("of its task `segmentation` is damaged", "impossible normalisation, task", "a task of the user's own")
    assert any(map(said.__contains__, words[2:] if task in OF_ONES_OWN else words[:2]))


def test_metadata_of_a_million_values_are_refused_before_they_take_memory(told, tmp_path):
    told("export", "models.py:dense", "-o", "dense.onnx", "--input", "1x8x8")
    for key in ("classes", "task", "mean", "preprocess"):
        model = onnx.load(tmp_path / "dense.onnx")
        onnx.helper.set_model_props(model, {"indistill_fx": "0.2.0", "std": "[1]", key: "[" + "0," * (1 << 20) + "0]"})
        onnx.save(model, tmp_path / "large.onnx")
        with pytest.raises(ConfigError, match=r"impossible|is invalid"):
            ifx.load(tmp_path / "large.onnx")


@pytest.mark.parametrize("made", ["double", "words"])
def test_a_student_of_unknown_data_knows_its_inputs(told, tmp_path, made):
    """Its commands asked for --input, though it was made with one."""
    asked, kept = {"double": ("12", "float64x12"), "words": ("int64[3..3]x5", "int64[3..3]x5")}[made]
    told("prune", f"models.py:{made}", "--ratio", "0.5", "--input", asked, "-o", "small/")
    kept_inputs = json.loads((tmp_path / "small/student.json").read_text())["inputs"]
    assert kept_inputs == [kept]
    student = "small/student.py:Student@small/student.safetensors"
    told("export", student, "-o", "small.onnx")
    told("check", "small.onnx", "--against", student)
    told("inspect", student)
    told("bench", student)
    told("prune", student, "--ratio", "0.5", "-o", "smaller/")
    assert json.loads((tmp_path / "smaller/student.json").read_text()) == {"inputs": kept_inputs}


@pytest.mark.parametrize("inputs", ["3x8", ["4000x4000x80"], ["a:3", "3"], ["shape"], {}])
def test_impossible_inputs_in_a_student_json_are_an_error(told, tmp_path, inputs):
    told("prune", "models.py:dense", "--ratio", "0.5", "--input", "1x8x8", "-o", "small/")
    (tmp_path / "small/student.json").write_text(json.dumps({"inputs": inputs}))
    said = told("inspect", "small/student.py:Student", code=2)
    assert "student.json describes impossible inputs" in said and "Remove it, and give what it would say" in said


@pytest.mark.parametrize("damage", [{"logits": ["aux"]}, {"logits": -1}, {"logits": True}, {"labels": {"name": 3}}])
def test_a_damaged_student_json_is_an_error(told, tmp_path, damage):
    told("prune", "models.py:dense", "--ratio", "0.5", "--input", "1x8x8", "-o", "small/")
    (tmp_path / "small/student.json").write_text(json.dumps(damage))
    said = told("evaluate", "small/student.py:Student@small/student.safetensors", "--data", "models.py:maps", code=2)
    assert "is damaged" in said or "was trained on a task of the user's own, `3`" in said


@pytest.mark.parametrize(
    ("kept", "size", "wanted"),
    [
        ({"inputs": ["float32x3x9x8"], "wanted_size": [9, 8]}, (3, 9, 8), (9, 8)),
        ({"inputs": ["float32x3x9x8"], "wanted_size": [32, 24]}, (3, 9, 8), (32, 24)),
        ({"inputs": ["float32x3x9x8"], "wanted_size": None}, (3, 9, 8), None),
        ({"inputs": ["float32x3x4x4"], "input_size": [3, 9, 8]}, (3, 9, 8), (9, 8)),  # as written before
        ({"input_size": [3, 9, 8]}, (3, 9, 8), (9, 8)),
    ],
)
def test_sizes_are_said_once_and_earlier_files_are_read(tmp_path, kept, size, wanted):
    (tmp_path / "student.json").write_text(json.dumps({"classes": ["ape", "bus"], "normalisation": None, **kept}))
    found = with_facts(Source(nn.Flatten(), f"{tmp_path}/student.py:Student", "factory"))
    assert (found.input_size, found.wanted_size, found.classes) == (size, wanted, ("ape", "bus"))
    for damage in ({"inputs": ["float32x-3"]}, {"input_size": [0, 1, 1]}, {"wanted_size": [1 << 40, 1]}, {"inputs": 5}):
        (tmp_path / "student.json").write_text(json.dumps({"classes": ["ape"], **damage}))
        with pytest.raises(ConfigError, match=r"damaged|describes impossible inputs"):
            with_facts(found)


def test_what_is_written_says_a_size_once():
    known = facts_of(("ape",), example=torch.zeros(2, 3, 9, 8), wanted_size=(9, 8))
    assert known == {"classes": ["ape"], "normalisation": None, "wanted_size": [9, 8], "inputs": ["float32x3x9x8"]}
