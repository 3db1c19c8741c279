"""Run directories whose entries have other types than ours, and names that no file system likes: read, or refused with a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from indistill_fx.cli import run as run_cli
from indistill_fx.compression.made import read_made
from indistill_fx.demo import DigitsStudent
from indistill_fx.errors import ConfigError, IndistillError
from indistill_fx.loading.spec import parse_spec
from indistill_fx.report.read_runs import read_runs
from indistill_fx.runs.directory import BEST, COMPRESSION, LAST, STUDENT
from indistill_fx.runs.load import absolute, load_run, run_fingerprint
from indistill_fx.system.tensor_files import load_tensors, save_tensors
from indistill_fx.training.identity import changes
from indistill_fx.training.recipes import kept_curriculum
from tests.faults.harness import run

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0" / "run"
ODD: tuple[Any, ...] = (None, True, -1, 10**400, float("nan"), "x\x1b[2J\n", "", [], [[]], [1, "a"], {}, {"a": [{}]})
ABOUT = {
    "model": "indistill_fx.demo:DigitsStudent",
    "seal": "x",
    "data": "digits",
    "input_size": [1, 8, 8],
    "classes": [str(number) for number in range(10)],
    "normalisation": [[0.5], [0.5]],
    "inputs": ["words:int64[0..9]x4", "image:3x8"],
}
MORE = {
    "about": ABOUT,
    "result": {"digest": "ab", "epochs": []},
    "phases": [{"name": "main", "length": 3, "unit": "epochs"}],
}


def changed(value: Any) -> Iterator[Any]:
    """The value with each of its parts, one after the other, replaced by something odd."""
    yield from ODD
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for other in changed(part):
            yield {**value, key: other} if isinstance(value, dict) else [*value[:key], other, *value[key + 1 :]]


def test_a_run_json_of_any_types_is_read_or_refused(tmp_path: Path) -> None:
    place = Path(shutil.copytree(GOLDEN, tmp_path / "run"))
    told = json.loads((place / "run.json").read_text()) | MORE
    del told["settings"], told["environment"]["versions"]["torch"]
    torch.manual_seed(0)
    save_tensors(place / STUDENT, DigitsStudent().state_dict())
    outcomes = {"read": 0, "refused": 0}
    for one in changed(told):
        (place / "run.json").write_text(json.dumps(one))
        assert read_runs(place)
        assert isinstance(run_fingerprint(place), str)
        if isinstance(one, dict) and one.get("about") == ABOUT:
            continue  # `load_run` reads nothing else
        try:
            load_run(place)
            outcomes["read"] += 1
        except ConfigError as error:
            assert str(place) in str(error) or one["about"]["model"] in ("", "x\x1b[2J\n")
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("entry", ["resumed", "teacher_accuracy", "changes", "started", "status", "schema_version"])
@pytest.mark.parametrize("odd", ["x", [], {}, -1.5], ids=repr)
def test_a_run_is_resumed_whatever_its_run_json_holds(entry: str, odd: Any, tmp_path: Path) -> None:
    place = Path(shutil.copytree(GOLDEN, tmp_path / "run"))
    told = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps(told | {entry: odd}))
    if (entry == "schema_version" and odd != -1.5) or entry == "schema_version":
        with pytest.raises(ConfigError, match="later version"):
            run(place)
        return
    assert run(place).steps
    assert json.loads((place / "run.json").read_text())["status"] == "done"


def test_a_checkpoint_whose_state_has_any_types_is_refused(tmp_path: Path) -> None:
    place = Path(shutil.copytree(GOLDEN, tmp_path / "run"))
    tensors, header = load_tensors(place / LAST)
    whole = json.loads(header["state"])
    refused = 0
    for key in ("history", "notes", "leg", "steps", "lowest", "best", "seconds"):
        for odd in (*ODD[1:], [{"stage": "main"}], {"main": "x"}, [whole["state"]["history"][0] | {"loss": "x"}]):
            if odd in ([], {}) or (odd == -1 and key in ("lowest", "best", "seconds")):
                continue
            state = whole | {"state": whole["state"] | {key: odd}}
            save_tensors(place / LAST, tensors, {"state": json.dumps(state)})
            with pytest.raises(ConfigError, match="not a checkpoint of a run"):
                run(place)
            refused += 1
    for odd in (5, "main", [5], {}):
        save_tensors(place / LAST, tensors, {"state": json.dumps(whole | {"phases": odd})})
        with pytest.raises(ConfigError, match="which stages its run has"):
            run(place)
    assert refused > 60


@pytest.mark.parametrize("odd", ["x", [], {"a": 1}, True, None])
def test_a_checkpoint_of_an_odd_number_of_epochs_is_of_another_run(odd: Any) -> None:
    asked = {"epochs": 3, "schedule": "constant"}
    with pytest.raises(ConfigError, match="epochs"):
        changes(asked, {"epochs": odd}, Path("last.safetensors"))
    assert changes(asked, {"epochs": 2}, Path("last.safetensors")) == {"epochs": (2, 3)}


LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", LONG],
        ["inspect", f"{LONG}.pt"],
        ["inspect", f"{LONG}.py:make"],
        ["inspect", f"torchvision:resnet18@{LONG}.pt"],
        ["evaluate", LONG, "--data", "digits"],
        ["evaluate", "indistill_fx.demo:DigitsStudent", "--data", f"imagefolder:{LONG}"],
        ["evaluate", "indistill_fx.demo:DigitsStudent", "--data", f"{LONG}.py:make"],
        ["report", LONG],
        ["distill", f"saved:{LONG}", "indistill_fx.demo:DigitsStudent", "--data", "digits", "-o", "run"],
        ["report", ".", "-o", LONG],
        ["check", f"{LONG}.onnx", "indistill_fx.demo:DigitsStudent"],
        ["bench", f"{LONG}.onnx"],
        ["export", "indistill_fx.demo:DigitsStudent", "--input", "1x8x8", "-o", f"{LONG}.onnx"],
        ["prune", "indistill_fx.demo:DigitsStudent", "--input", "1x8x8", "--ratio", "0.5", "-o", LONG],
        ["prune", "indistill_fx.demo:DigitsStudent", "--input", "1x8x8", "--ratio", "0.5", "-o", f"{LONG}/"],
        ["align", "indistill_fx.demo:DigitsTeacher", "indistill_fx.demo:DigitsStudent", "--input", "1x8x8", "-o", LONG],
        ["train", "indistill_fx.demo:DigitsStudent", "--data", "digits", "--limit", "20", "--epochs", "1", "-o", LONG],
    ],
    ids=lambda command: " ".join(command).replace(LONG, "LONG"),
)
def test_names_that_are_too_long_are_refused_with_a_sentence(
    command: list[str], tmp_path: Path, monkeypatch, capfd
) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert run_cli(command) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) >= 1


@pytest.mark.parametrize("folder", ["why? not", "me@work", "a:b", "50% off & more", "ü漢字", "-x", "{}", "[bold]"])
def test_folders_may_have_any_names(folder: str, tmp_path: Path, monkeypatch) -> None:
    home = tmp_path / folder
    home.mkdir()
    (home / "models.py").write_text("from indistill_fx.demo import DigitsStudent as make\n")
    save_tensors(home / "w.safetensors", DigitsStudent().state_dict())
    torch.save(DigitsStudent(), home / "model.pt")
    found = parse_spec(f"{home}/models.py:make?widths=(4,4)@{home}/w.safetensors")
    assert (found.place, found.name, found.weights) == (f"{home}/models.py", "make", f"{home}/w.safetensors")
    assert found.arguments == {"widths": (4, 4)}
    assert parse_spec(f"{home}/model.pt").place == f"{home}/model.pt"
    run_dir = str(home / "run")
    monkeypatch.chdir(home)
    train = ["train", "models.py:make", "--data", "digits", "--limit", "40", "--epochs", "1"]
    assert run_cli([*train, "-o", run_dir]) == 0
    assert run_cli(["evaluate", run_dir, "--data", "digits", "--limit", "40"]) == 0
    assert run_cli(["inspect", f"{home}/models.py:make@{home}/w.safetensors", "--input", "1x8x8"]) == 0
    assert run_cli(["report", run_dir, "-o", str(home / "page.html")]) == 0


def test_other_names_with_zero_bytes_are_refused(tmp_path: Path) -> None:
    for spec in ("a\0b", "a\0b.pt", "a\0.py:make"):
        with pytest.raises(IndistillError):
            load_run(spec) if spec == "a\0b" else parse_spec(spec) and run_fingerprint(spec) == "?" and load_run(spec)


def test_figures_that_cannot_be_are_named(tmp_path: Path) -> None:
    """It was said that run.json does not say which model was trained."""
    place = Path(shutil.copytree(GOLDEN, tmp_path / "run"))
    told = json.loads((place / "run.json").read_text())
    save_tensors(place / STUDENT, DigitsStudent().state_dict())
    for odd in ("a", [[0.0], [0.0]], [[float("inf")], [1.0]], [[0.0, 0.0], [1.0]], [[0.0, 0.0], [1.0, 1.0]], 5):
        (place / "run.json").write_text(json.dumps(told | {"about": ABOUT | {"normalisation": odd}}))
        with pytest.raises(ConfigError, match="describes impossible classes, normalisation or logits"):
            load_run(place)
    for odd in (["a"], True, -1, 5000, 1.5, "a" * 300):
        (place / "run.json").write_text(json.dumps(told | {"about": ABOUT | {"logits": odd}}))
        with pytest.raises(ConfigError, match="describes impossible classes, normalisation or logits: logits at"):
            load_run(place)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"phases": 5}',
        '{"phases": [5]}',
        '{"phases": [{"main": 0, "name": [], "length": 1}]}',
    ],
    ids=["nested", "a number", "numbers", "a list as a name"],
)
def test_the_warm_up_of_a_run_json_that_makes_no_sense_is_chosen_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    assert kept_curriculum(tmp_path) is None


STEP = {"name": "x", "macs": 1, "parameters": 1, "divergence": None, "accuracy": None, "latency_ms": None}


@pytest.mark.parametrize(
    "odd",
    [
        *({"made": "1"}, {"made": 9}, {"made": None}, {"steps": [{"name": "x"}]}, {"steps": 3}),
        *({"widths": ...}, {"repaired": ...}, "[" * 100_000),
        *(
            {"steps": [STEP | {name: odd}]}
            for name, odd in (("macs", "x"), ("accuracy", {}), ("metric", 5), ("shown", []))
        ),
        {"steps": [STEP | {"accuracy": float("nan")}]},
    ],
    ids=lambda odd: str(odd)[:30],
)
def test_a_story_of_a_compression_that_makes_no_sense_is_begun_anew(odd: Any, tmp_path: Path) -> None:
    """What was missing was missed after training, by a KeyError."""
    story: dict[str, Any] = {"identity": {}, "seal": None, "made": 1, "widths": {}, "sensitivity": [], "repaired": None}
    story["steps"] = [STEP]
    told = {name: value for name, value in (story | odd).items() if value is not ...} if isinstance(odd, dict) else None
    (tmp_path / COMPRESSION).write_text(odd if told is None else json.dumps(told))
    assert read_made(tmp_path, {"teacher": "another"}, None) is None
    (tmp_path / COMPRESSION).write_text(json.dumps(story))  # one that makes sense is not
    with pytest.raises(ConfigError, match="holds a compression with another"):
        read_made(tmp_path, {"teacher": "another"}, None)


@pytest.mark.parametrize(
    "about", [{}, ABOUT | {"input_size": [0]}, ABOUT | {"classes": 5}, ABOUT | {"model": "a.py:make"}]
)
@pytest.mark.parametrize("there", [None, STUDENT, BEST])
def test_a_hint_names_only_weights_that_are_there(about: dict[str, Any], there: str | None, tmp_path: Path) -> None:
    place = tmp_path / "run"
    (place / "checkpoints").mkdir(parents=True)
    (place / "run.json").write_text(json.dumps({"about": about}))
    if there is not None:
        save_tensors(place / there, DigitsStudent().state_dict())
    with pytest.raises(ConfigError) as caught:
        load_run(place)
    if there is None:
        assert "@" not in str(caught.value) and "no weights of a trained model" in str(caught.value)
    else:
        assert f"@{place / there}." in str(caught.value)


def test_names_of_weights_with_zero_bytes_stay_as_they_are() -> None:
    assert absolute("models.py:make@a\0b") == "models.py:make@a\0b"
