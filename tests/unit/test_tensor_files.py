"""Files of tensors are proven when they are read back: no changed byte goes unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.loading.state_dicts import load_weights
from indistill_fx.runs.checkpoint import load_checkpoint, save_checkpoint
from indistill_fx.system.tensor_files import DamagedFileError, load_tensors, save_tensors

TENSORS = {
    "weight": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    "steps": torch.tensor(7),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "mask": torch.tensor([True, False]),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS, {"epoch": "3"})
    found, header = load_tensors(tmp_path / "x")
    assert header == {"epoch": "3"}
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


@pytest.mark.parametrize("times", [1, 4, 5])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(times: int, tmp_path: Path, monkeypatch) -> None:
    """safetensors reads the header first, and opens the file again for the tensors."""
    path, written = tmp_path / "last.safetensors", [0]
    save_tensors(path, {"steps": torch.tensor(0)})

    def opened(*args, **kwargs):
        file = safe_open(*args, **kwargs)
        if written[0] < times:
            written[0] += 1
            save_tensors(path, {"steps": torch.tensor(written[0])})
        return file

    monkeypatch.setattr("indistill_fx.system.tensor_files.safe_open", opened)
    if times == 5:
        with pytest.raises(DamagedFileError, match="replaced again and again"):
            load_tensors(path)
    else:
        assert int(load_tensors(path)[0]["steps"]) == times


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path: Path, bit: int) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, TENSORS, {"epoch": 3})
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        try:
            found, state = load_checkpoint(path)
        except ConfigError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert state == {"epoch": 3}
            assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert refused > 0.9 * len(whole)


def test_a_changed_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    module = nn.Linear(3, 2)
    save_tensors(path, module.state_dict())
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    save_file(load_file(path) | {"bias": torch.zeros(2)}, path, metadata=header)
    with pytest.raises(DamagedFileError, match=r"`bias` was changed since it was written"):
        load_tensors(path)
    with pytest.raises(ifx.ConfigError, match=r"student.safetensors` is damaged: `bias` was changed"):
        load_weights(module, path)


def test_files_of_other_programs_have_no_digests_and_are_read(tmp_path: Path) -> None:
    save_file({"weight": TENSORS["weight"]}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")[0]["weight"], TENSORS["weight"])
