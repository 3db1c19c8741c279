"""Pickled graph modules: read from the source in the file, which is never run."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from indistill_fx.errors import ConfigError
from indistill_fx.loading.allow_list import GRAPH_FUNCTIONS
from indistill_fx.loading.load import load_source


class Forms(nn.Module):
    """Uses every form of statement that torch.fx writes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(4, 1, 1))

    def forward(self, x: Tensor, flag: bool = True, *rest: Tensor) -> dict[str, Any]:
        y = self.body(x) * self.scale
        y = y + self.shift
        batch, channels = y.shape[0], y.size(1)
        z = torch.flatten(y, 1).to(torch.float64).view(batch, channels, -1)
        mask = torch.arange(channels, device=y.device)[None, :, None] > 1
        z = torch.where(mask, z, float("-inf")).softmax(dim=1)
        pooled = nn.functional.interpolate(y, scale_factor=0.5, mode="bilinear").clamp(min=-0.5) ** 2
        return {"a": -z, "b": (pooled, y.ndim), "c": [torch.add(y, 1, alpha=2)], "d": y[..., 0]}


def reload(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "graph.pt")
    return load_source(str(folder / "graph.pt")).module


def test_every_form_that_fx_writes_is_read(tmp_path):
    model = fx.symbolic_trace(Forms().eval())
    loaded, x = reload(model, tmp_path), torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0, equal_nan=True)
    told = [[(n.name, n.op, n.target, str(n.args), str(n.kwargs)) for n in m.graph.nodes] for m in (model, loaded)]
    assert told[0] == told[1]


def test_what_is_written_in_place_stays_in_place(tmp_path):
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(operator.iadd, (x, 1))
    graph.output(x)
    given = torch.zeros(2)
    assert reload(fx.GraphModule(nn.Module(), graph), tmp_path)(given).tolist() == given.tolist() == [1, 1]


@pytest.mark.parametrize("training", (False, True))
def test_torchvisions_feature_extractor_loads(tmp_path, training):
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(weights=None).train(training)
    extractor = create_feature_extractor(model, {"stage2": "a", "stage4.3": "b"})
    loaded, x = reload(extractor, tmp_path), torch.randn(2, 3, 64, 64)
    assert loaded.training is training
    assert loaded.state_dict().keys() == extractor.state_dict().keys()
    for name, value in extractor.eval()(x).items():
        assert torch.equal(loaded.eval()(x)[name], value)


def test_a_graph_module_inside_of_a_module_loads(tmp_path):
    model = nn.Sequential(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU())), nn.Linear(3, 1))
    x = torch.randn(4, 2)
    assert torch.equal(reload(model, tmp_path)(x), model(x))


def test_functions_of_torchvision_that_are_kept_whole_are_read(tmp_path):
    model = torchvision.models.swin_transformer.SwinTransformer([2, 2], 8, [1, 1], [1, 1], [4, 4], num_classes=2).eval()
    traced = create_feature_extractor(model, ["features.3", "head"])
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(reload(traced, tmp_path)(x)["head"], model(x))


def test_every_function_that_torchvision_keeps_whole_may_be_called():
    kept = {(home.get("__name__", ""), name) for (_, name), home in fx._symbolic_trace._wrapped_fns_to_patch.items()}
    kept = {(module, name) for module, name in kept if module.startswith("torchvision.")}
    assert len(kept) > 10
    assert [f"{module}.{name}" for module, name in kept if name not in GRAPH_FUNCTIONS.get(module, ())] == []


class Written:
    """Pickles as a graph module with source code of one's choice."""

    def __init__(self, body: str, imports: str = "import torch", **state: Any):
        module = nn.Module()
        module.conv = nn.Conv2d(3, 4, 3)
        module.conv.register_buffer("kept", torch.ones(1))
        vars(module).update(state)
        code = (
            body
            if "def " in body
            else "def forward(self, x):\n" + "".join(f"    {line}\n" for line in body.split("\n"))
        )
        self.made = {**vars(module), "_code": code}, imports

    def __reduce__(self) -> Any:
        return fx.graph_module.reduce_graph_module, self.made


HARMFUL: dict[str, Callable[[str], Written]] = {
    "a call of a builtin": lambda c: Written(f"y = open({c!r}, 'w')\nreturn y"),
    "a call while importing": lambda c: Written("return x", f"import torch\nopen({c!r}, 'w')\ny = open({c!r}, 'w')"),
    "a default": lambda c: Written(f"def forward(self, x, y=open({c!r}, 'w')):\n    return x"),
    "an annotation": lambda c: Written(f"def forward(self, x: open({c!r}, 'w')) -> open({c!r}, 'w'):\n    return x"),
    "a decorator": lambda c: Written(f"@(lambda f: open({c!r}, 'w'))\ndef forward(self, x):\n    return x"),
    "a second function": lambda c: Written(f"open({c!r}, 'w')\ndef forward(self, x):\n    return x"),
    "an import in the body": lambda c: Written("import os\nreturn x"),
    "an import of another": lambda c: Written(f"y = system('touch {c}')\nreturn y", "from os import system as system"),
    "an import as torch": lambda c: Written(f"y = torch.system('touch {c}')\nreturn y", "import os as torch"),
    "from os import as torch": lambda c: Written(f"y = torch('touch {c}')\nreturn y", "from os import system as torch"),
    "torch.os": lambda c: Written(f"y = torch.os.system('touch {c}')\nreturn y"),
    "torch.load": lambda c: Written(f"y = torch.load({c!r}, weights_only=False)\nreturn y"),
    "torch.save": lambda c: Written(f"y = torch.save(x, {c!r})\nreturn y"),
    "torch.from_file": lambda c: Written(f"y = torch.from_file({c!r}, shared=True, size=4)\nreturn y"),
    "torch.hub": lambda c: Written("y = torch.hub.load('a', 'b')\nreturn y"),
    "an operator that prints": lambda c: Written("y = torch.ops.aten._print.default('a')\nreturn y"),
    "an operator without checks": lambda c: Written("y = torch.segment_reduce(x, 'max', unsafe=True)\nreturn y"),
    "a method that writes": lambda c: Written(f"y = x.numpy().tofile({c!r})\nreturn y"),
    "a method with a callback": lambda c: Written("y = x.apply_(open)\nreturn y"),
    "a method that resizes": lambda c: Written("y = x.resize_(10)\nreturn y"),
    "a method of a module": lambda c: Written("y = self.conv.register_forward_hook(x)\nreturn y"),
    "a method of the graph": lambda c: Written("y = self.to_folder('a')\nreturn y"),
    "dunder attributes": lambda c: Written("y = x.__class__\nz = y.__mro__\nreturn z"),
    "getattr by name": lambda c: Written("y = getattr(x, '__class__')\nreturn y"),
    "a format": lambda c: Written("y = '{0.__class__}'.format(x)\nreturn y"),
    "a lambda": lambda c: Written(f"y = (lambda: open({c!r}, 'w'))()\nreturn y"),
    "a comprehension": lambda c: Written(f"y = [open({c!r}, 'w') for z in x]\nreturn y"),
    "a nested call": lambda c: Written(f"y = torch.relu(open({c!r}, 'w'))\nreturn y"),
    "a name that is not a name": lambda c: Written("y = self.conv(x, **{'a b': x})\nreturn y"),
    "a part by code": lambda c: Written(f"y = getattr(self, 'conv\\\"; open({c!r}, chr(119)); \\\"')(x)\nreturn y"),
    "a part that is none": lambda c: Written("y = self._forward_hooks(x)\nreturn y"),
    "a part of a part that is none": lambda c: Written("y = self.conv.forward(x)\nreturn y"),
    "a tensor that is none": lambda c: Written("y = self.conv.nothing\nreturn y"),
    "self as a value": lambda c: Written("y = torch.relu(self)\nreturn y"),
    "a loop": lambda c: Written("while True:\n    pass\nreturn x"),
    "no return": lambda c: Written("y = x"),
    "another meaning of torch": lambda c: Written("torch = x\ny = torch.relu(x)\nreturn y"),
    "another meaning of self": lambda c: Written("self = x\nreturn self"),
    "another meaning of len": lambda c: Written(f"y = len({c!r})\nreturn y", "from os import system as len"),
    "an f-string": lambda c: Written("y = f'{x}'\nreturn y"),
    "a walrus": lambda c: Written("y = (z := x)\nreturn z"),
    "a hook": lambda c: Written("return x", _forward_hooks={0: print}),
    "brackets without end": lambda c: Written("y = " + "(" * 10_000 + ")" * 10_000 + "\nreturn y"),
    "attributes without end": lambda c: Written("y = x" + ".T" * 100_000 + "\nreturn y"),
    "signs without end": lambda c: Written("y = " + "-" * 100_000 + "1\nreturn y"),
    "a megabyte of code": lambda c: Written("y = (" + "x, " * (1 << 20) + ")\nreturn y"),
    "names within names": lambda c: Written("y = [x, x]\n" + "y = [y, y]\n" * 40 + "z = torch.cat(y)\nreturn z"),
    "a text used often": lambda c: Written(f"y = {'a' * 10**5!r}\n" + "z = torch.relu(y)\n" * 10**5 + "return z"),
    "a list of two names": lambda c: Written("y = [x]\nz = y\ny += [x]\nreturn z"),
    "a number of two names": lambda c: Written("y = x.size(0)\nz = y\ny += 1\nw = y + z\nreturn w"),
    "a keyword twice": lambda c: Written("y = torch.add(x, x, alpha=1, alpha=2)\nreturn y"),
    "a slice by keyword": lambda c: Written("y = x[slice(1, stop=2)]\nreturn y"),
    "an input called len": lambda c: Written("def forward(self, x, len):\n    y = len(x)\n    return y"),
    "an input called slice": lambda c: Written("def forward(self, x, slice):\n    y = x[slice(0, 1)]\n    return y"),
    "an input called torch": lambda c: Written(
        "def forward(self, x, torch):\n    y = clamp(x, 0.5)\n    return y", "from torch import clamp"
    ),
    "an input called getattr": lambda c: Written("def forward(self, x, getattr):\n    return x", ""),
    "an import as another": lambda c: Written("y = torch.relu(x)\nreturn y", "import torch\nimport os as torch"),
    "an import in a condition": lambda c: Written(
        "y = f(x, x)\nreturn y", "from torch import sub as f\nif True:\n    from torch import add as f"
    ),
    "an import and an assignment": lambda c: Written("y = f(x)\nreturn y", "from torch import relu as f\nf = print"),
    "the class of an operator": lambda c: Written("y = torch.ops.aten.add.__class__(x)\nreturn y"),
    "no Python": lambda c: Written("def forward(self, x):\n    return x\0"),
    "a dotless import": lambda c: Written("y = a(x)\nreturn y", "from . import a"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_code_of_another_form_is_refused_and_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    torch.save(HARMFUL[name](str(canary)), tmp_path / "graph.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = load_source(str(tmp_path / "graph.pt")).module
        except ConfigError as error:
            assert "graph.pt" in str(error)
        else:  # what is no part of the graph is left out
            assert name in ("an annotation", "a hook")
            assert [node.op for node in loaded.graph.nodes][-1] == "output"
    assert not canary.exists()


def test_a_slice_by_another_name_is_a_slice(tmp_path):
    imports = "from builtins import slice as part"
    torch.save(Written("y = x[part(1, 3)]\nreturn y", imports), tmp_path / "graph.pt")
    assert load_source(str(tmp_path / "graph.pt")).module(torch.arange(5)).tolist() == [1, 2]


def test_what_hangs_beside_the_graph_is_not_made(tmp_path):
    """torch would keep it: here the file's own graphs, which name classes of torch.fx, stay descriptions."""
    torch.save(Written("y = self.conv(x)\nreturn y", tag=print, forward=print), tmp_path / "graph.pt")
    loaded = load_source(str(tmp_path / "graph.pt")).module
    assert not hasattr(loaded, "tag")
    assert loaded(torch.ones(1, 3, 3, 3)).shape == (1, 4, 1, 1)
