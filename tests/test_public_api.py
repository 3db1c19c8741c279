"""The public names are those of the contract, their signatures are the golden file's, and `--help` does not wait for torch."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import indistill_fx as ifx

GOLDEN = Path(__file__).parent / "golden" / "public_api.txt"
CONTRACT = (
    "AlignmentPlan ConfigError Curriculum ExportError FrontendError IndistillError MatchError Pair PassError "
    "PassResult PruneError Stage Target Task TracedModel TrainError VerifyError View __version__ "
    "align check_onnx compare compile_stages compress distill distill_chain ensemble evaluate export_onnx instrument load narrow open_data "
    "quantize_onnx reuse_classifier save_outputs shrink trace train"
).split()


def signature_lines() -> str:
    """One line for each public name: what it is, and how it is called."""
    lines = []
    for name in sorted(ifx.__all__):
        value = getattr(ifx, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            lines.append(f"{name}: {value.__mro__[1].__name__}")
        elif inspect.isclass(value) and issubclass(value, BaseModel):
            lines.append(f"{name}({', '.join(value.model_fields)})")
        elif callable(value):
            lines.append(f"{name}{re.sub(' at 0x[0-9a-f]+', '', str(inspect.signature(value)))}")
        else:
            lines.append(f"{name}: {type(value).__name__}")
    return "\n".join(lines) + "\n"


def test_public_names():
    assert sorted(ifx.__all__) == sorted(CONTRACT)
    for name in CONTRACT:
        assert getattr(ifx, name) is not None


def test_no_module_hides_a_public_name():
    modules = {path.stem for path in Path(ifx.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules.isdisjoint(CONTRACT)


def test_signatures_are_the_golden_ones():
    """After a change that is meant: `python -m tests.test_public_api`, and look at the difference."""
    assert signature_lines() == GOLDEN.read_text(encoding="utf-8")


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ifx.nothing  # noqa: B018


@pytest.mark.parametrize(
    "command", [[], ["align"], ["inspect"], ["distill"], ["train"], ["evaluate"], ["export"], ["demo"], ["prune"]]
)
def test_help_imports_no_torch(command):
    code = f"import sys; from indistill_fx.cli import run; assert run({[*command, '--help']!r}) == 0"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: indistill-fx" in done.stdout


if __name__ == "__main__":
    GOLDEN.write_text(signature_lines(), encoding="utf-8")
