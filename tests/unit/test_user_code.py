"""What the user's own files may import: the files beside them, and those of no other folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import indistill_fx as ifx
from indistill_fx.data import open_data
from indistill_fx.errors import ConfigError, FrontendError


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


FOLDERS = {"old": 3, "new": 5}
"""Two folders of the user's with files of the same names, and the width that each one's layers.py makes."""


@pytest.fixture
def two_folders(here):
    before = set(sys.modules)
    for folder, width in FOLDERS.items():
        Path(folder, "parts").mkdir(parents=True)
        Path(folder, "parts", "sizes.py").write_text(f"WIDTH = {width}\n")  # in a package without __init__.py
        Path(folder, "layers.py").write_text(
            "from torch import nn\nfrom parts.sizes import WIDTH\ndef layer(): return nn.Linear(WIDTH, 2)\n"
        )
        Path(folder, "models.py").write_text(
            "import layers\ndef make(): return layers.layer()\n"
            "def lazy():\n    from layers import layer\n    return layer()\n"
            "def make_loaders(batch_size):\n    from parts.sizes import WIDTH\n    raise KeyError(WIDTH)\n"
        )
    yield here
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("factory", ["make", "lazy"])
def test_each_folder_has_its_own_modules(two_folders, factory):
    """Whichever was imported first, teacher and student are made of the files beside them."""
    for _ in range(2):
        for folder, width in FOLDERS.items():
            assert ifx.load(f"{folder}/models.py:{factory}").in_features == width
    assert "layers" not in sys.modules, "neither's: a later import fails, and never finds the other's"


def test_a_module_of_the_working_directory_is_not_another_folders(two_folders, monkeypatch):
    monkeypatch.delitem(sys.modules, "models", raising=False)  # another test's
    assert ifx.load("old/models.py:make").in_features == 3
    monkeypatch.chdir("new")
    assert ifx.load("layers:layer").in_features == 5
    assert ifx.load("models:lazy").in_features == 5


def test_loaders_may_import_their_neighbours_when_they_are_called(two_folders):
    for folder, width in FOLDERS.items():
        with pytest.raises(KeyError, match=str(width)):
            open_data(f"{folder}/models.py:make_loaders")


def test_one_folders_modules_are_not_importable_from_another(two_folders):
    assert ifx.load("old/models.py:make").in_features == 3
    Path("new", "layers.py").unlink()
    with pytest.raises(FrontendError, match="No module named 'layers'"):
        ifx.load("new/models.py:make")
    assert ifx.load("old/models.py:lazy").in_features == 3


def test_a_relative_import_in_a_file_gets_a_hint(here):
    Path("models.py").write_text("from .layers import layer\n")
    with pytest.raises(FrontendError, match=r"models\.py:1: ModuleNotFoundError") as error:
        ifx.load("models.py:make")
    assert "package.module:name" in str(error.value)


def test_a_file_that_is_a_link_to_itself_is_no_file(here):
    Path("models.py").symlink_to("models.py")
    with pytest.raises(ConfigError, match="There is no file"):
        ifx.load("models.py:make")
