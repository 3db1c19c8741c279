"""Nothing of a trace outlives it: stand-ins for tensors and sizes are not found in the caches of the user's code afterwards."""

from __future__ import annotations

import functools
import importlib
import sys

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from indistill_fx.passes.capture.exported import capture_exported
from indistill_fx.passes.capture.recording import capture_leaves, capture_shapes
from indistill_fx.passes.capture.symbolic import capture_symbolic
from indistill_fx.passes.capture.trace import trace

BY_SIZE: dict[object, Tensor] = {}
BY_NAME: dict[str, Tensor] = {}


@functools.cache
def positions(h: int, w: int) -> Tensor:
    return torch.arange(h * w).view(1, 1, h, w).float()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.own: dict[object, Tensor] = {}
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.more(y)  # type: ignore[no-any-return]

    def more(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class LruCache(Base):
    def more(self, y: Tensor) -> Tensor:
        return positions(y.shape[2], y.shape[3])


class ModuleDict(Base):
    def more(self, y: Tensor) -> Tensor:
        key = y.shape[2], y.shape[3]
        if key not in BY_SIZE:
            BY_SIZE[key] = torch.ones(1, 1, *key)
        return BY_SIZE[key]


class Attribute(Base):
    def more(self, y: Tensor) -> Tensor:
        if y.shape[2] not in self.own:
            self.own[y.shape[2]] = torch.ones(1, 1, y.shape[2], y.shape[3])
        return self.own[y.shape[2]]


class Named(Base):
    def more(self, y: Tensor) -> Tensor:
        if "ones" not in BY_NAME or BY_NAME["ones"].shape[2] != y.shape[2]:
            BY_NAME["ones"] = torch.ones(1, 1, y.shape[2], y.shape[3])
        return BY_NAME["ones"]


class CachedMethod(Base):
    @functools.cache  # noqa: B019
    def table(self) -> Tensor:
        return self.conv.bias.detach().view(1, -1, 1, 1) * 2

    def more(self, y: Tensor) -> Tensor:
        return self.table()


class CachedProperty(Base):
    @functools.cached_property
    def table(self) -> Tensor:
        return self.conv.bias.detach().view(1, -1, 1, 1) * 2

    def more(self, y: Tensor) -> Tensor:
        return self.table


class Keeps(Base):
    def more(self, y: Tensor) -> Tensor:
        self.seen.append(y.mean())
        return self.seen[-1]


class Einops(Base):
    def more(self, y: Tensor) -> Tensor:
        t = rearrange(y, "b c h w -> b (h w) c")
        return rearrange(t, "b (h w) c -> b c h w", h=y.shape[2], w=y.shape[3])  # type: ignore[no-any-return]


MODULES = [LruCache, ModuleDict, Attribute, Named, CachedMethod, CachedProperty, Keeps, Einops]


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("capture", [capture_symbolic, capture_shapes, capture_leaves, capture_exported])
@pytest.mark.parametrize("make", MODULES)
def test_the_module_works_as_before_after_a_trace(make, capture, role, monkeypatch):
    BY_SIZE.clear(), BY_NAME.clear(), positions.cache_clear()
    monkeypatch.setattr(importlib.import_module("indistill_fx.passes.capture.trace"), "_METHODS", {"only": capture})
    module = make().train(role == "student")
    try:
        trace(module, torch.randn(2, 3, 8, 8), role=role)
    except Exception as error:
        assert type(error).__name__ == "FrontendError"  # a method may refuse, but not break the module
    assert len(module.own) == len(module.seen) == len(BY_SIZE) == len(BY_NAME) == 0
    for size in (8, 6):
        x = torch.randn(2, 3, size, size)
        y = module.conv(x)
        assert torch.equal(module(x), y + type(module).more(module, y))


def test_code_that_looks_things_up_by_size_is_traced_and_the_size_is_a_decision():
    class Net(Base):
        def more(self, y):
            if y.shape[2] > 100:  # symbolic tracing stops here
                return y
            return positions(y.shape[2], y.shape[3])

    module = Net().eval()
    model = trace(module, torch.randn(2, 3, 8, 8))
    assert model.report.method == "shapes" and model.report.leaves == ()
    assert any("shape" in line for line in model.report.specialisations)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(model.graph_module(x), module(x))


class AsksThePython(nn.Module):
    """As transformers' masks do: it looks at what is loaded, and loads more on the way."""

    def forward(self, x: Tensor) -> Tensor:
        if "colorsys" not in sys.modules:
            importlib.import_module("colorsys")
        return x * 2.0


def test_what_python_itself_keeps_is_not_put_back():
    """sys.modules was, so that what a forward imported was imported twice: torch.export failed on transformers' models."""
    sys.modules.pop("colorsys", None)
    trace(AsksThePython(), torch.randn(2, 3))
    assert "colorsys" in sys.modules


class NotInstalled:
    """What stands for an optional package, as in MONAI: whatever is looked up in it raises its own error."""

    def __getattr__(self, name: str) -> object:
        raise ImportError(f"needs a package that is not installed ({name})")


def test_a_stand_in_for_a_package_that_is_not_installed_is_left_alone() -> None:
    optional = NotInstalled()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fast = nn.Conv2d(3, 4, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return optional.attend(x) if self.fast else self.conv(x)  # type: ignore[operator, no-any-return]

    assert trace(Net(), torch.randn(2, 3, 8, 8)).report.leaves == ()
