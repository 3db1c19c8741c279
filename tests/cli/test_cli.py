"""The command line as a user meets it: tables, files, exit codes; and for each bad input one paragraph, code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle

import onnx
import pytest
import torch

import indistill_fx as ifx
from indistill_fx.cli import _COMMANDS, run
from indistill_fx.compression.write_source import StudentSource, check_own
from indistill_fx.errors import ConfigError

MODELS = """
from torch import nn

def make(width=8):
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 10))

def vector():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def fails():
    raise KeyError("no such width")
"""

LONG = """
from torch import nn

class Last(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.an_uncommonly_long_name_for_a_layer_that_people_do_write = nn.Linear(width, width)

    def forward(self, x):
        return x + self.an_uncommonly_long_name_for_a_layer_that_people_do_write(x.mean((1, 2), keepdim=True)).relu()

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        blocks = nn.Sequential(Last(width), Last(width))
        self.encoder_of_the_backbone = nn.ModuleDict({"the_first_and_only_stage_of_the_network": blocks})
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.encoder_of_the_backbone["the_first_and_only_stage_of_the_network"](self.stem(x).permute(0, 2, 3, 1))
        return self.head(x.mean((1, 2)))

def make(width=8):
    return Net(width)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    torch.manual_seed(0)  # factories make random weights, and the weights choose the channels
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_align_prints_a_table_and_writes_a_plan_that_reloads(here, capsys):
    code, out, _ = told(
        capsys, "align", "models.py:make?width=16", "models.py:make", "--input", "1x8x8", "-o", "plan.json"
    )
    assert code == 0
    assert "8 of 16" in out
    assert "16 of 32" in out
    assert "Reasons:" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    plan = ifx.AlignmentPlan.load("plan.json")
    assert [(pair.teacher, pair.student) for pair in plan.pairs] == [("3", "3"), ("7", "7")]
    code, out, _ = told(capsys, "align", "models.py:make?width=16", "models.py:make", "--input", "1x8x8", "--json")
    assert json.loads(out) == plan.model_dump(mode="json")


@pytest.mark.parametrize("command", [[], *([name] for name in _COMMANDS)], ids=lambda value: " ".join(value))
def test_help_shows_examples_line_by_line(capsys, command):
    assert run([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "\\b" not in out and "\b" not in out
    examples = [line for line in out.splitlines() if "indistill-fx " in line and "Usage" not in line]
    assert all(line.count("indistill-fx ") == 1 for line in examples)
    assert [line for line in examples if line.startswith("    indistill-fx ")]


def test_align_on_data_with_pairs_kept_and_an_earlier_plan(here, capsys):
    pair = ("models.py:make?width=16", "models.py:make")
    code, out, _ = told(
        capsys, "align", *pair, "--similarity", "cka", "--data", "digits", "--batches", "2", "-o", "a.json"
    )
    assert code == 0
    assert "linear CKA on the data given" in " ".join(out.split())
    code, out, err = told(capsys, "align", *pair, "--input", "1x8x8", "--pair", "3=7", "--diff", "a.json")
    assert (code, err) == (0, "")
    assert "- 3 ↔ 3" in out
    assert "+ 3 ↔ 7" in out
    assert "Not paired: teacher `7` (32x2x2): the pairs asked for stand in its way" in out
    code, out, _ = told(capsys, "align", *pair, "--input", "1x8x8", "--explain", "2")
    assert "Pair 2, 7 ↔ 7: the candidates that lost" in out


def test_align_ranks_channels_by_a_criterion_that_looks_at_data(here, capsys):
    arguments = ("align", "models.py:make?width=16", "models.py:make", "--data", "digits", "--batches", "2")
    kept = {}
    for criterion in ("l1", "activation", "taylor"):
        assert told(capsys, *arguments, "--criterion", criterion, "-o", f"{criterion}.json")[0] == 0
        kept[criterion] = [pair.kept for pair in ifx.AlignmentPlan.load(f"{criterion}.json").pairs]
    assert kept["l1"] != kept["activation"] != kept["taylor"]
    code, _, err = told(capsys, *arguments, "--criterion", "fisher")
    assert code == 2
    assert "`fisher` is one of `shrink`" in " ".join(err.split())


def test_an_edited_plan_is_taken_and_brought_up_to_date(here, capsys):
    arguments = ("align", "models.py:make?width=16", "models.py:make", "--input", "1x8x8")
    told(capsys, *arguments, "-o", "plan.json")
    plan = ifx.AlignmentPlan.load("plan.json")
    kept = plan.model_copy(update={"pairs": (plan.pairs[1].model_copy(update={"student": "6"}),)})
    kept.save("edited.json")
    code, _, err = told(capsys, *arguments, "--plan", "edited.json", "-o", "new.json")
    assert (code, err) == (0, "")
    (pair,) = ifx.AlignmentPlan.load("new.json").pairs
    assert (pair.teacher, pair.student, pair.student_shape, pair.adapter) == ("7", "6", (1, 16, 4, 4), "pool")
    assert pair.kept is not None
    assert len(pair.kept) == 16
    other = ("align", "models.py:make?width=32", "models.py:make", "--input", "1x8x8")
    code, _, err = told(capsys, *other, "--plan", "edited.json")
    assert code == 0
    assert "`0` was conv 16x8x8, 160 parameters, is conv 32x8x8, 320 parameters" in err


def test_tables_fit_100_columns_however_long_the_names_are(here, capsys):
    (here / "long.py").write_text(LONG)
    for options in ((), ("--every-block",), ("--explain", "1")):
        code, out, _ = told(capsys, "align", "long.py:make?width=16", "long.py:make", "--input", "3x16x16", *options)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 100
        assert "8 of 16" in out  # channels, not positions: the maps are channels last


def test_inspect(here, capsys):
    code, out, _ = told(capsys, "inspect", "models.py:make", "--input", "1x8x8")
    assert code == 0
    assert "stage exit" in out
    assert "equal to the module at batch size 2." in out
    code, out, _ = told(capsys, "inspect", "models.py:make", "--input", "1x8x8", "--json")
    assert json.loads(out)["macs"] == ifx.trace(ifx.load("models.py:make"), torch.randn(1, 1, 8, 8)).macs


def test_train_distill_evaluate_export(here, capsys):
    quick = ["--data", "digits", "--epochs", "1", "--limit", "200", "--batch-size", "32"]
    assert told(capsys, "train", "models.py:make?width=16", "-o", "teacher", *quick)[0] == 0
    teacher = "models.py:make?width=16@teacher/student.safetensors"
    code, out, _ = told(capsys, "distill", teacher, "models.py:make", "-o", "run", "--warmup", "1,1", *quick)
    assert code == 0
    assert "Test accuracy" in out
    code, out, _ = told(capsys, "evaluate", "run", "--data", "digits", "--json")
    measured = json.loads(out)["accuracy"]
    module = ifx.load("models.py:make@run/student.safetensors").eval()
    code, out, _ = told(capsys, "export", "run", "-o", "student.onnx", "--data", "digits")
    assert code == 0
    assert "100.00% of" in out
    assert set(json.loads((here / "run" / "export.json").read_text())) == {"path", "size", "latency_ms"}
    assert told(capsys, "check", "student.onnx", "--against", "run")[0] == 0
    assert told(capsys, "check", "student.onnx", "--against", "run", "--data", "digits")[0] == 0
    assert told(capsys, "export", "run", "-o", "alone.onnx")[0] == 0
    for file in ("student.onnx", "alone.onnx"):
        facts = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        assert json.loads(facts["classes"]) == list("0123456789")
        assert (json.loads(facts["mean"]), json.loads(facts["std"])) == ([0.3053], [0.3760])
        assert facts["run"].endswith(json.loads((here / "run" / "run.json").read_text())["result"]["digest"][:16])
    code, out, _ = told(capsys, "check", "student.onnx", "--against", "models.py:make", "--input", "1x8x8")
    assert code == 2
    assert "differs" in out
    from indistill_fx.data.open import open_data
    from indistill_fx.evaluation.accuracy import evaluate

    assert evaluate(module, open_data("digits").test).accuracy == measured
    code, _, err = told(capsys, "distill", teacher, "models.py:make", "-o", "run", *quick)
    assert code == 2
    assert "already holds a run" in err


def test_prune_gives_a_model_that_loads(here, capsys):
    code, _, _ = told(
        capsys, "prune", "models.py:make?width=16", "--ratio", "0.5", "--input", "1x8x8", "-o", "small.pt2"
    )
    assert code == 0
    module = ifx.load("small.pt2")
    assert sum(p.numel() for p in module.parameters()) == sum(
        p.numel() for p in ifx.load("models.py:make").parameters()
    )


def test_prune_writes_source_code_into_a_directory(here, capsys):
    code, out, _ = told(
        capsys, "prune", "models.py:make?width=16", "--ratio", "0.5", "--input", "1x8x8", "-o", "small/"
    )
    assert code == 0
    assert "small/student.py:Student@small/student.safetensors" in out
    module = ifx.load("small/student.py:Student@small/student.safetensors")
    assert module.state_dict().keys() == ifx.load("models.py:make").state_dict().keys()


def test_prune_does_not_overwrite_what_was_edited(here, capsys):
    command = ("prune", "models.py:make?width=16", "--input", "1x8x8", "-o", "small/", "--ratio")
    for ratio in ("0.5", "0.25"):  # its own is written anew
        assert told(capsys, *command, ratio)[0] == 0
    code, weights, plan, facts = (
        here / "small" / f"{name}" for name in ("student.py", "student.safetensors", "plan.json", "student.json")
    )
    kept = {file: file.read_bytes() for file in (code, weights, plan)}
    of_ones_own = b'{"classes": ["ant", "bee"]}'  # where prune knew nothing to write
    for file, edited in (
        (code, kept[code] + b"# mine\n"),
        (weights, b"trained elsewhere"),
        (plan, kept[plan].replace(b'"score": 1.0', b'"score": 0.5', 1)),
        (facts, of_ones_own),
    ):
        assert edited not in kept.values()
        for other, content in kept.items():
            other.write_bytes(content)
        file.write_bytes(edited)
        status, _, said = told(capsys, *command, "0.5")
        assert (
            status == 2
            and f"small/{file.name} was written or changed by somebody else, and would be overwritten." in said
        )
        assert "Move it away, or name another directory." in said and file.read_bytes() == edited


def test_prune_leaves_no_plan_of_another_network(here, capsys):
    assert (
        told(capsys, "prune", "models.py:make?width=16", "--input", "1x8x8", "--ratio", "0.5", "-o", "small/")[0] == 0
    )
    source = StudentSource((here / "small/student.py").read_text(), {"weight": torch.zeros(1)})
    source.save(here / "small", {"plan.json": "", "student.json": "{}"})
    assert sorted(file.name for file in (here / "small").iterdir()) == [
        "student.json",
        "student.py",
        "student.safetensors",
    ]
    check_own(here / "small")
    source.save(here / "small")  # says nothing of other files
    with pytest.raises(ConfigError, match=r"student\.json was written or changed by somebody else"):
        check_own(here / "small")


def test_hints_name_what_the_command_has(here, capsys):
    assert told(capsys, "inspect", "models.py:make")[2].endswith("Give the shape (--input 3x224x224).\n")
    assert "(--input 3x224x224) or the data" in told(capsys, "export", "models.py:make", "-o", "x.onnx")[2]


def test_an_onnx_file_is_called_so(here, capsys):
    code, _, said = told(capsys, "export", "models.py:make", "-o", "x.txt")
    assert code == 2 and said == "Error: x.txt does not end in .onnx. Write -o x.onnx.\n"


def test_a_program_with_a_fixed_batch_says_so(here, capsys):
    program = torch.export.export(ifx.load("models.py:make").eval(), (torch.randn(1, 1, 8, 8),))
    torch.export.save(program, "fixed.pt2")
    code, _, said = told(capsys, "evaluate", "fixed.pt2", "--data", "digits")
    assert code == 2 and "takes only batches of 1, but got one of" in said and "bug" not in said


def test_prune_refuses_a_budget_that_removes_nothing(here, capsys):
    code, _, said = told(
        capsys, "prune", "indistill_fx.demo:DigitsStudent", "--input", "1x8x8", "--macs", "1", "-o", "small/"
    )
    assert code == 2 and "as it is: it has" in said and not (here / "small").exists()


def test_prune_names_what_has_no_source_code_and_gives_a_program_instead(here, capsys):
    (here / "strange.py").write_text(
        "import torch\nfrom torch import fx, nn\n\n@fx.wrap\ndef bend(x):\n    return x.sin()\n\n"
        "class Strange(nn.Module):\n    def forward(self, x):\n        return bend(x)\n\n"
        "def make():\n    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), Strange())\n"
    )
    code, out, _ = told(capsys, "prune", "strange.py:make", "--ratio", "0.5", "--input", "4", "-o", "small/")
    assert code == 0
    assert "`bend` cannot be written as source code: it calls `bend` of `" in out
    assert sorted(path.name for path in (here / "small").iterdir()) == ["student.pt2"]
    assert ifx.load("small/student.pt2")(torch.randn(3, 4)).shape == (3, 4)


def test_prune_tells_widths_cost_and_time(here, capsys):
    wide = ("prune", "models.py:make?width=16", "--input", "1x8x8", "-o", "small.pt2")
    code, out, _ = told(capsys, *wide, "--ratio", "0.5")
    assert code == 0
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in out.splitlines() if line.strip()}
    assert [row for name, row in rows.items() if name.isdigit()] == [["16", "8"], ["32", "16"]]  # stages
    assert {"parameters", "MACs", "ms, batch 1 (median)"} <= set(rows)
    code, out, _ = told(capsys, *wide, "--ratio", "0.5", "--layers", "--criterion", "taylor", "--data", "digits")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert [rows[name] for name in ("0", "4", "9")] == [["16", "8"], ["32", "16"], ["10", "10"]]


def test_prune_by_a_plan_narrows(here, capsys):
    write_inputs(here)
    code, out, _ = told(
        capsys, "prune", "models.py:make?width=16", "--plan", "plan.json", "--input", "1x8x8", "-o", "slim.pt2"
    )
    assert code == 0
    assert "8 of 16" in out and "16 of 32" in out
    features, logits = ifx.load("slim.pt2")(torch.randn(2, 1, 8, 8))
    assert {tuple(feature.shape[:2]) for feature in features.values()} == {(2, 8), (2, 16)}
    assert logits.shape == (2, 10)


def test_pruned_and_narrowed_models_are_exported(here, capsys):
    given = ["--input", "1x8x8"]
    ifx.align(*(ifx.load(f"models.py:make?width={n}") for n in (16, 8)), example_inputs=torch.randn(2, 1, 8, 8)).save(
        "plan.json"
    )
    for how, outputs in ((["--ratio", "0.5"], ["output"]), (["--plan", "plan.json"], ["3", "7", "output"])):
        assert told(capsys, "prune", "models.py:make?width=16", *how, *given, "-o", "m.pt2")[0] == 0
        code, out, _ = told(capsys, "export", "m.pt2", "-o", "m.onnx", "--json")
        assert code == 0
        report = json.loads(out)
        assert report["output_names"] == outputs
        assert [row["batch_size"] for row in report["parity"]] == [n for n in (1, 7, 64) for _ in outputs]
        assert told(capsys, "check", "m.onnx", "--against", "m.pt2")[0] == 0


class Canary:
    def __reduce__(self):
        return os.system, ("touch canary",)


def write_inputs(here) -> None:
    (here / "text.pt").write_text("hello")
    (here / "evil.pt").write_bytes(b"")
    torch.save(Canary(), here / "evil.pt", pickle_module=pickle)
    (here / "empty").mkdir()
    plan = ifx.align(*(ifx.load(f"models.py:make?width={n}") for n in (16, 8)), example_inputs=torch.randn(2, 1, 8, 8))
    plan.save(here / "plan.json")
    (here / "torn.json").write_text(plan.model_dump_json()[:-40])
    (here / "typo.json").write_text(plan.model_dump_json().replace('"teacher":"7"', '"teacher":"77"'))


BAD = [
    (["align", "absent.pt", "models.py:make"], "no file `absent.pt`"),
    (["align", "text.pt", "models.py:make"], "is a text file"),
    (["align", "evil.pt", "models.py:make"], "nothing in it was run"),
    (["align", "torchvision:resnet81", "models.py:make"], "Nearest: resnet18"),
    (["align", "models.py:mak", "models.py:make"], "Nearest: make"),
    (["align", "models.py:fails", "models.py:make", "--input", "1x8x8"], "no such width"),
    (["align", "models.py:make", "models.py:make"], "Give the shape (--input"),
    (["align", "models.py:make", "models.py:make", "--input", "8by8"], "is not an input shape"),
    (["align", "models.py:make", "models.py:make", "--input", "3x8x8"], "fails on the example input"),
    (
        ["align", "models.py:make", "models.py:vector", "--input", "1x8x8"],
        "No stages were found in the student, so nothing can be paired",
    ),
    (["align", "models.py:make", "models.py:make", "--input", "1x8x8", "-o", "nowhere/plan.json"], "nowhere"),
    (["align", "models.py:make", "models.py:make", "--input", "1x8x8", "--pair", "3,7"], "--pair layer2=layer3"),
    (["align", "models.py:make", "models.py:make", "--input", "1x8x8", "--pair", "3=7", "--pair", "7=3"], "`3` ↔ `7`"),
    (["align", "models.py:make", "models.py:make", "--input", "1x8x8", "--plan", "typo.json"], "no layer named `77`"),
    (["align", "models.py:make", "models.py:make", "--input", "1x8x8", "--diff", "torn.json"], "torn.json"),
    (["align", "models.py:make", "models.py:make", "--input", "1x8x8", "--similarity", "cka"], "needs --data"),
    (["align", "models.py:make", "models.py:make", "--input", "1x8x8", "--explain", "3"], "There is no pair 3"),
    (["distill", "models.py:make", "models.py:make", "--data", "imagefolder:empty", "-o", "run"], "has no train/"),
    (["distill", "models.py:make", "models.py:make", "--data", "nothing", "-o", "run"], "is not a data set"),
    (
        ["distill", "models.py:make", "models.py:make?width=4", "--data", "digits", "--plan", "plan.json", "-o", "run"],
        "plan does not fit",
    ),
    (
        [
            "distill",
            "models.py:make?width=16",
            "models.py:make",
            "--data",
            "digits",
            "--plan",
            "typo.json",
            "-o",
            "run",
        ],
        "no layer `77`",
    ),
    (
        [
            "distill",
            "models.py:make?width=16",
            "models.py:make",
            "--data",
            "digits",
            "--plan",
            "torn.json",
            "-o",
            "run",
        ],
        "torn.json",
    ),
    (["distill", "models.py:make", "models.py:make", "--data", "digits", "--main", "kdd", "-o", "run"], "Nearest: kd"),
    (
        ["distill", "models.py:make", "models.py:make", "--data", "digits", "--warmup", "a", "-o", "run"],
        "not a list of whole numbers",
    ),
    (["evaluate", "empty", "--data", "digits"], "empty"),
    (["export", "models.py:make", "--input", "1x8x8", "-o", "nowhere/student.onnx"], "nowhere"),
    (["export", "models.py:make", "--input", "1x8x8", "-o", "s.onnx", "--int8"], "no data to calibrate"),
    (["prune", "models.py:make", "--input", "1x8x8", "-o", "s.pt2"], "how small"),
    (["prune", "models.py:make", "--input", "1x8x8", "-o", "s.pt2", "--width", "0:9"], "LAYER=N"),
    (["prune", "models.py:make", "-o", "s.pt2", "--plan", "plan.json", "--ratio", "0.5"], "--ratio would name them"),
    (
        ["prune", "models.py:make", "--input", "1x8x8", "-o", "s.pt2", "--ratio", "0.5", "--criterion", "taylor"],
        "--data",
    ),
    (["alain"], "No such command"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_paragraph_code_2_and_leaves_nothing(here, capsys, arguments, message):
    write_inputs(here)
    before = sorted(path.name for path in here.iterdir() if path.name != "__pycache__")
    code, out, err = told(capsys, *arguments)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in out + err
    assert len([line for line in err.strip().splitlines() if line.startswith(("Error", "indistill-fx failed"))]) == 1
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == before


def test_debug_shows_the_traceback(here, capsys):
    code, _, err = told(capsys, "align", "absent.pt", "models.py:make", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_a_ratio_by_which_nothing_goes_is_refused(here, capsys):
    (here / "one.py").write_text("from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Linear(6, 3))\n")
    code, _, err = told(capsys, "prune", "one.py:make", "--input", "6", "--ratio", "0.5", "-o", "less/")
    assert code == 2
    assert (
        "With a ratio of 0.5 the network would lose no channel. Not removable: 3 channels, an output of the network."
        in err
    )
    assert not (here / "less").exists()


def test_our_own_fault_is_code_1(here, capsys, monkeypatch):
    monkeypatch.setattr(
        "indistill_fx.cli.common.open_model", None
    )  # not a function of the test's: that would be the user's code
    code, _, err = told(capsys, "inspect", "models.py:make")
    assert code == 1
    assert "our fault" in err
