"""Weights as other trainers save them: every one lands in its place, or the file is refused; and what was chosen is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.loading.load import load_source
from indistill_fx.loading.state_dicts import load_weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        for value in self.state_dict().values():
            if value.is_floating_point():
                nn.init.uniform_(value, 0.5, 1.5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def below(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in module.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("net.", {}),  # Lightning, whose attribute has any name
        ("model.", {"criterion.weight": torch.ones(3)}),
        ("model._orig_mod.", {"metric.total": torch.ones(())}),
        ("_orig_mod.module.", {}),  # compiled DDP
        ("_forward_module.", {}),  # Fabric
        ("module.", {"n_averaged": torch.tensor(3)}),  # AveragedModel
    ],
)
def test_weights_below_any_attribute_of_a_wrapper_are_found(
    prefix: str, beside: dict[str, Tensor], tmp_path: Path
) -> None:
    trained, fresh = Net(), Net()
    torch.save({"state_dict": below(prefix, trained) | beside, "hyper_parameters": {"lr": 0.1}}, tmp_path / "w.ckpt")
    notes = load_weights(fresh, tmp_path / "w.ckpt")
    assert_same(fresh, trained)
    assert all(key in notes[-1] for key in beside)


def test_a_module_compiled_in_part_is_loaded(tmp_path: Path) -> None:
    trained, fresh = Net(), Net()
    torch.save({key.replace("conv.", "conv._orig_mod."): v for key, v in trained.state_dict().items()}, tmp_path / "w")
    load_weights(fresh, tmp_path / "w")
    assert_same(fresh, trained)


def test_two_sets_of_weights_in_one_state_dict_are_refused(tmp_path: Path) -> None:
    torch.save(below("student.", Net()) | below("teacher.", Net()), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"2 sets of weights that fit the model, below 'student.' and 'teacher.'"):
        load_weights(Net(), tmp_path / "w.pt")


def test_a_part_of_a_larger_model_is_not_taken_for_the_model(tmp_path: Path) -> None:
    larger = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    torch.save(larger.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"2 unexpected: 1\.weight, 1\.bias"):
        load_weights(nn.ModuleDict({"0": nn.Linear(2, 2)}), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["state_dict_ema", "ema", "params_ema"])
@pytest.mark.parametrize("nested", [False, True])
def test_other_weights_of_the_same_model_are_said(name: str, nested: bool, tmp_path: Path) -> None:
    trained, average, fresh = Net(), Net(), Net()
    other: dict[str, Any] = {"module": below("module.", average), "updates": 3} if nested else average.state_dict()
    rest = {"optimizer": {"state": {0: {"momentum": torch.ones(3)}}}, "callbacks": {"best": {"score": torch.ones(())}}}
    torch.save({"state_dict": trained.state_dict(), name: other, **rest}, tmp_path / "w.pt")
    assert load_weights(fresh, tmp_path / "w.pt") == (
        f"weights: taken from 'state_dict' of the checkpoint, which has others under '{name}' (?entry={name})",
    )
    assert_same(fresh, trained)
    load_weights(fresh, tmp_path / "w.pt", entry=name)
    assert_same(fresh, average)


def test_another_whole_model_in_a_checkpoint_is_said(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2), "ema": nn.Linear(2, 2), "epoch": 3}, tmp_path / "w.pt")
    assert load_source(str(tmp_path / "w.pt")).notes == (
        "the model was taken from 'model' of the checkpoint, which has others under 'ema' (?entry=ema)",
    )


def test_an_entry_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text("from torch import nn\ndef make(entry=2):\n    return nn.Linear(2, entry)\n")
    trained, average = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({"model": trained, "callbacks": {"best": average, 3: average.state_dict()}}, "w.pt")
    assert_same(load_source("w.pt").module, trained)
    assert_same(load_source("w.pt?entry=callbacks/best").module, average)
    assert_same(load_source("nets.py:make@w.pt?entry=callbacks/3").module, average)
    assert_same(load_source("nets.py:make?entry=2@w.pt?entry=callbacks/3").module, average)
    assert load_source("nets.py:make?entry=5").module.out_features == 5  # the function's own
    torch.save(average.state_dict(), "x.pt?entry=ema")
    assert_same(load_source("nets.py:make@x.pt?entry=ema").module, average)


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("w.pt?entry=modal", "`w.pt` has no entry 'modal'.", "Nearest: model."),
        ("w.pt?entry=zzz", "`w.pt` has no entry 'zzz'.", "Choose from: averages, model, number."),
        ("w.pt?entry=number/a", "`w.pt` has no entry 'number/a'.", "It holds no entries: name the file alone."),
        ("w.pt?entry=number", "`w.pt` holds neither a module nor a state dict under 'number'.", "Save the model whole"),
        (
            "w.pt?entry=averages",
            "`w.pt?entry=averages` is a state dict of 2 tensors",
            "models.py:make_model@w.pt?entry=averages.",
        ),
        ("w.pt?entry=", "names no entry", "w.pt?entry=ema"),
        (
            "nets.py:make@w.pt?entry=model",
            "`w.pt?entry=model` is a whole module, not a state dict.",
            "w.pt?entry=model.",
        ),
        (
            "nets.py:make@w.pt?entry=number",
            "`w.pt?entry=number` holds a int, not a state dict.",
            "Give a file of weights",
        ),
        ("nets.py:make@w.safetensors?entry=ema", "only files of torch.save have entries", "Name the file alone"),
    ],
)
def test_an_entry_that_is_not_there(
    spec: str, message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    torch.save({"model": nn.Linear(2, 2), "averages": nn.Linear(2, 2).state_dict(), "number": 3}, "w.pt")
    save_model(nn.Linear(2, 2), "w.safetensors")
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load_source(spec)
    assert hint in raised.value.hint


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_would_lose_their_meaning_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    state = Net().state_dict()
    torch.save(state | {"fc.weight": (state["fc.weight"] * 100).to(dtype)}, tmp_path / "w.pt")
    message = f"1 of another kind of numbers: fc.weight (file {dtype}, model torch.float32)"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_weights(Net(), tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_another_precision_are_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    trained, fresh = Net().to(dtype), Net()
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt")
    assert_same(fresh, trained.float())


def test_a_shared_tensor_is_loaded_by_one_of_its_names(tmp_path: Path) -> None:
    trained, fresh = Tied(), Tied()
    save_model(trained, str(tmp_path / "w.safetensors"))
    load_weights(fresh, tmp_path / "w.safetensors")
    assert_same(fresh, trained)
    assert fresh.head.weight is fresh.embedding.weight


def test_two_tensors_for_a_shared_one_are_refused(tmp_path: Path) -> None:
    state = {"embedding.weight": torch.zeros(7, 4), "head.weight": torch.ones(7, 4)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"different weights for `embedding.weight` and `head.weight`"):
        load_weights(Tied(), tmp_path / "w.pt")


def write_shards(folder: Path, state: dict[str, Tensor], places: dict[str, str]) -> Path:
    for name in {"a.safetensors", "b.safetensors"}:
        save_file({key: state[key] for key in state if places[key] == name}, str(folder / name))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_the_files_of_an_index_are_read(tmp_path: Path) -> None:
    trained, fresh = Net(), Net()
    state = trained.state_dict()
    places = {key: "a.safetensors" if key.startswith("fc") else "b.safetensors" for key in state}
    notes = load_weights(fresh, write_shards(tmp_path, state, places))
    assert notes == ("weights: read from the 2 files of the index",)
    assert_same(fresh, trained)


@pytest.mark.parametrize("place", ["../a.safetensors", "/etc/passwd", "model.safetensors.index.json", 3])
def test_an_index_names_files_beside_it_only(place: Any, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc.weight": place}}))
    with pytest.raises(ConfigError, match="is not an index of weights"):
        load_weights(Net(), index)


def test_a_file_that_lacks_what_the_index_says_is_named(tmp_path: Path) -> None:
    state = Net().state_dict()
    index = write_shards(tmp_path, state, dict.fromkeys(state, "a.safetensors"))
    index.write_text(json.dumps({"weight_map": {"fc.weight": "a.safetensors", "gone.weight": "a.safetensors"}}))
    with pytest.raises(ConfigError, match=r"a.safetensors` lacks `gone.weight`"):
        load_weights(Net(), index)
