"""Every public name says what it takes, what it returns, what it raises, and shows an example that runs."""

from __future__ import annotations

import ast
import builtins
import doctest
import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import indistill_fx as ifx
from indistill_fx import errors

NAMES = [name for name in ifx.__all__ if name != "__version__"]
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def section(text: str, title: str) -> str:
    """The lines of a section of a docstring."""
    found = re.search(rf"^{title}:\n((?:[ ]{{4}}.*\n?|\n)+)", text, flags=re.M)
    return textwrap.dedent(found[1]) if found else ""


def entries(text: str, *titles: str) -> set[str]:
    """What the sections describe, by name."""
    return {name for title in titles for name in re.findall(r"^(\w+): \S", section(text, title), flags=re.M)}


def raised(function: Any) -> set[str]:
    """Our errors that a function raises itself, or by the functions of its own module that it calls."""
    tree = ast.parse(Path(inspect.getsourcefile(function) or "").read_text(encoding="utf-8"))
    known = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found: set[str] = set()
    seen: set[str] = set()
    todo = [ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]]
    while todo:
        for node in ast.walk(todo.pop()):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                found |= {node.exc.func.id} & ERRORS
            if name in known and name not in seen:
                seen.add(name)
                todo.append(known[name])
                result = known[name].returns  # a function that makes an error is called in order to raise it
                found |= {result.id} & ERRORS if isinstance(result, ast.Name) else set()
    return found


def lacks_of_function(function: Any, *, about: str = "", example: bool = True) -> list[str]:
    """What the docstring of a function or method does not say. `about`: its class's docstring, which may name what all methods take."""
    text = inspect.getdoc(function) or ""
    taken = inspect.signature(function).parameters.keys() - {"self", "cls"}
    named = set(re.findall(r"`(\w+)`", about.split("\nAttributes:")[0] + text)) if about else set()
    lacks = [f"no entry for the argument {name}" for name in sorted(taken - entries(text, "Args") - named)]
    returns = inspect.signature(function).return_annotation
    if not about and returns not in ("None", None) and not section(text, "Returns"):
        lacks.append("no Returns")
    missing = raised(function) - set(re.findall(r"\w+Error", text))
    return lacks + [f"does not say when it raises {name}" for name in sorted(missing)] + lacks_of_example(text, example)


def lacks_of_example(text: str, wanted: bool = True) -> list[str]:
    return ["no example"] if wanted and ">>>" not in section(text, "Examples") else []


def lacks_of(value: Any) -> list[str]:
    """What the docstrings of a public function, or of a public class and its methods, do not say."""
    if not inspect.isclass(value):
        return lacks_of_function(value)
    text = inspect.getdoc(value) or ""
    fields = value.model_fields if issubclass(value, BaseModel) else inspect.signature(value).parameters
    own = "__init__" in vars(value) or issubclass(value, BaseModel)  # else its base says what it takes
    taken = fields.keys() if own else set()
    lacks = [f"no entry for {name}" for name in sorted(taken - entries(text, "Args", "Attributes"))]
    lacks += lacks_of_example(text)
    for name, member in vars(value).items():
        method = inspect.unwrap(getattr(member, "__func__", member))
        if name.startswith("_") or isinstance(member, type) or not inspect.isfunction(method):
            continue
        lacks += [f"{name}: {lack}" for lack in lacks_of_function(method, about=text or "-", example=False)]
    return lacks


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name):
    assert lacks_of(getattr(ifx, name)) == []


def planted(x, y):
    """Do something.

    Args:
        x: what it is.
    """
    if y:
        raise errors.ConfigError("No.", where="y", hint="Leave it out.")
    return x


def test_a_planted_function_without_its_parts_is_found():
    assert lacks_of(planted) == ["no entry for the argument y", "no Returns", "no example"]


@dataclass
class Planted:
    """Holds something.

    Attributes:
        x: what it is.
    """

    x: int
    y: int

    def method(self, z: int) -> None:
        """Nothing is said of its argument."""
        refuse()


def refuse() -> None:
    raise ConfigError("No.", where="z", hint="Leave it out.")


ConfigError = errors.ConfigError


def test_a_planted_class_without_its_parts_is_found():
    assert lacks_of(Planted) == [
        "no entry for y",
        "no example",
        "method: no entry for the argument z",
        "method: does not say when it raises ConfigError",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_stands_alone(name):
    """It imports or makes what it uses. That it runs is seen to by `--doctest-modules` (pyproject.toml)."""
    parts = doctest.DocTestParser().get_examples(section(inspect.getdoc(getattr(ifx, name)) or "", "Examples"))
    tree = ast.parse("".join(part.source for part in parts))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    for node in ast.walk(tree):
        made |= {(alias.asname or alias.name) for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)}
        made |= (
            {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name else set()
        )
        made |= {node.arg} if isinstance(node, ast.arg) else set()
    assert {node.id for node in names} - made == set()
