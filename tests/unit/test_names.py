"""Names of modules are data: nothing in them becomes code, hides a method, or reaches torch.fx as it is."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.graph.names import is_plain, reserved, writable, writable_paths
from indistill_fx.traced import Role


class Branches(nn.Module):
    """Parts under the names given, one after the other; a classifier of two classes."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.parts = nn.ModuleDict()
        for name in names:
            self.parts._modules[name] = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts.values():
            x = part(x)
        return self.head(x.mean((2, 3)))


def code(canary: Path) -> str:
    """A name that is Python between the quotes that torch.fx puts around it."""
    path = "+chr(47)+".join(repr(part).replace('"', "") for part in str(canary).strip("/").replace(".", "-").split("/"))
    return f'x" if getattr(__import__("os"), "mkdir")(chr(47)+{path}) else "y'


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    "names", [("my-key", "my_key_", "3x3"), ("class", "None"), ("graph", "code", "meta"), ("\uff46orward", "größe")]
)
def test_any_name_is_traced_under_one_that_fx_can_write(names: tuple[str, ...], role: Role) -> None:
    model, images = Branches(names), torch.randn(2, 3, 9, 9)
    traced = ifx.trace(model, images, role=role)
    targets = [str(node.target) for node in traced.graph_module.graph.nodes if node.op == "call_module"]
    assert len(set(targets)) == len(targets) == 2 + 3 * len(names)
    assert all(writable(part) == part for target in targets for part in target.split("."))
    assert torch.equal(traced.graph_module.eval()(images), model.eval()(images))
    odd = [name for name in names if writable(name) != name]
    renamed = [note for note in traced.report.notes if "in the graph" in note]
    assert [note.split("'")[1] for note in renamed] == [f"parts.{name}" for name in odd]


def test_a_model_with_names_as_code_is_distilled_and_none_of_it_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    teacher, student = Branches((code(canary), "b")), Branches(("a", code(canary) + "z"))
    batches = [(torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 0, 1])) for _ in range(2)]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    ifx.distill(teacher, student, batches, curriculum=Curriculum(lengths=1), epochs=1, progress=False, device="cpu")
    assert not list(tmp_path.iterdir())
    assert student.state_dict().keys() == before.keys()
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_the_name_is_code_without_care(tmp_path: Path) -> None:
    """The negative control: torch.fx itself runs it."""
    root, graph, name = nn.Module(), fx.Graph(), code(tmp_path / "canary")
    root._modules[name] = nn.ReLU()
    graph.output(graph.call_module(name, (graph.placeholder("x"),)))
    with pytest.raises(AttributeError):
        fx.GraphModule(root, graph)(torch.ones(1))
    assert (tmp_path / "canary").exists()


@example([[":module:"], [":module", "a"], ["?module"]])
@settings(deadline=None, max_examples=300)
@given(st.lists(st.lists(st.text(min_size=1).filter(lambda t: "." not in t), min_size=1, max_size=3), max_size=6))
def test_two_paths_never_become_one(paths: list[list[str]]) -> None:
    joined = list(dict.fromkeys(".".join(path) for path in paths))
    found = writable_paths(joined)
    assert list(found) == joined
    assert len(set(found.values())) == len(joined)
    for old, new in found.items():
        assert all(is_plain(part) and part not in reserved() for part in new.split("."))
        assert old.count(".") == new.count(".")
    for first, second in itertools.combinations(joined, 2):  # what stood in one module stands in one module
        shared = [a == b for a, b in zip(first.split("."), second.split("."), strict=False)]
        alike = [a == b for a, b in zip(found[first].split("."), found[second].split("."), strict=False)]
        assert shared[0] == alike[0]


@pytest.mark.parametrize("name", ["conv1", "0", "größe", "class", "_x", "block4-0"])
def test_plain_names(name: str) -> None:
    assert is_plain(name)


@pytest.mark.parametrize(
    "name", ["", "a.b", "a-", "-", "a b", "a\n", "3x3", "9" * 12, "\uff46", '"', "\u00b2", "a" * 256, "\x1b"]
)
def test_names_that_are_more_than_names(name: str) -> None:
    assert not is_plain(name)
    assert is_plain(writable(name))
