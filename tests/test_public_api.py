"""The public names are those of the contract, they are what they say, and `--help` does not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import indistill_fx as ifx

CONTRACT = (
    "AlignmentPlan ConfigError Curriculum ExportError FrontendError IndistillError MatchError Pair PassError "
    "PassResult PruneError Stage TracedModel TrainError VerifyError __version__ "
    "align compile_stages distill export_onnx instrument load narrow shrink trace"
).split()


def test_public_names():
    assert sorted(ifx.__all__) == sorted(CONTRACT)
    for name in CONTRACT:
        assert getattr(ifx, name) is not None


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
