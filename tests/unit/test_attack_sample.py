"""A sample of benchmarks/attacks.py: hostile files do no harm, honest ones load. The whole count is a command of its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from indistill_fx.cli import run as run_cli
from indistill_fx.errors import IndistillError
from indistill_fx.loading.load import load_source

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def attacks() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import attacks

    yield attacks
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.filterwarnings("ignore")
def test_hostile_files_do_no_harm(attacks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every twelfth; each is refused or loaded without its payload, and never our fault."""
    canary = tmp_path / "canary"
    monkeypatch.setenv("HOME", str(tmp_path))
    made = attacks.hostile(str(canary))
    assert len(made) >= 600
    for number, (name, make) in enumerate(list(made.items())[::12]):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            arguments = make(folder)
        except Exception:  # torch itself does not write it
            continue
        assert run_cli(arguments) in (0, 2), name
        assert not canary.exists(), name


@pytest.mark.filterwarnings("ignore")
def test_honest_files_load(attacks: Any, tmp_path: Path) -> None:
    refused = {}
    makes: dict[str, Callable[[Path], list[str]]] = attacks.honest()
    assert len(makes) >= 50
    for number, (name, make) in enumerate(makes.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            load_source(make(folder)[1])
        except IndistillError as error:
            refused[name] = str(error)
    assert refused == {}


def test_quantised_layers_compute_what_they_did(attacks: Any, tmp_path: Path) -> None:
    model, images = attacks.network(), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model)
        torch.save(quantised, tmp_path / "model.pt")
        assert torch.equal(load_source(str(tmp_path / "model.pt")).module(images), quantised(images))
        assert not torch.equal(quantised(images), model(images))
