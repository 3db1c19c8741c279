"""Every error says what happened, where, and what to do; read off the raise sites."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from indistill_fx import errors
from indistill_fx.errors import ConfigError, IndistillError

PACKAGE = Path(errors.__file__).parent
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, IndistillError)} - {
    "PassError",
    "VerifyError",
}  # these two are defects of ours, and name the pass
REASONS = "passes/capture"
"""A capture method's error is the reason why the next one is tried; `trace` says what to do when all have failed."""


def incomplete(source: str) -> list[str]:
    """The calls in a text that make an error without a place or without a remedy."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if None not in given and not ("where" in given and given & {"hint", "expected"}):
            found.append(f"line {node.lineno}: {ast.unparse(node)[:100]}")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_error_has_its_three_parts(file: Path) -> None:
    if REASONS not in file.as_posix():
        assert incomplete(file.read_text()) == []


def test_a_planted_error_without_a_remedy_is_found() -> None:
    assert len(incomplete("raise ConfigError('Wrong.', where='here')")) == 1
    assert len(incomplete("raise MatchError('Wrong.', hint='Do this.')")) == 1
    assert incomplete("raise ConfigError('Wrong.', where='here', hint='Do this.')") == []


def test_what_was_expected_stands_in_for_a_hint() -> None:
    assert (
        str(ConfigError("epochs is -1.", where="epochs", expected="0 or more")) == "epochs is -1. Expected: 0 or more."
    )
    assert str(ConfigError("on is 'x'.", where="on", expected=["a", "b"])) == "on is 'x'. Expected: a, b."
    assert str(ConfigError("on is 'x'.", where="on", expected=["a"], hint="Take a.")) == "on is 'x'. Take a."


def test_an_error_of_a_library_becomes_one_of_ours() -> None:
    ours = ConfigError("`a.txt` cannot be read", where="a.txt", hint="Copy it again.")
    with pytest.raises(ConfigError) as caught, errors.instead_of(OSError, ours):
        Path("/no/such/file").read_bytes()
    assert str(caught.value) == "`a.txt` cannot be read: No such file or directory. Copy it again."
    assert isinstance(caught.value.__cause__, FileNotFoundError) and caught.value.where == "a.txt"


def test_errors_of_ours_and_other_kinds_pass_as_they_are() -> None:
    ours = ConfigError("It failed", where="here", hint="Do this.")
    inner = errors.ExportError("Inner.", where="there", hint="Do that.")
    with pytest.raises(errors.ExportError) as caught, errors.instead_of(Exception, ours):
        raise inner
    assert caught.value is inner
    with pytest.raises(KeyError), errors.instead_of(OSError, ours):
        {}["missing"]
