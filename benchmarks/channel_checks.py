"""What `channels.py` does to one model: narrow every tap, halve it, halve it by Torch-Pruning. Each returns plain values."""

from __future__ import annotations

import copy
import gc
import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from zoo import ZooModel

from indistill_fx.errors import IndistillError
from indistill_fx.graph.edit import output_node, sweep
from indistill_fx.graph.interpret import run_looking
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import ShrinkReport, shrink
from indistill_fx.traced import TracedModel
from tests.numerics.masked_reference import run_masked

TOLERANCE = 1e-10
_SLICES = 1e10
"""Taps narrowed at once are as many as models of this many bytes hold; their slices take far less."""
_MOST = 64
_SMALL = 64
"""Height and width of pictures where the network does not mind; channels do not depend on the size."""
_FIXED = ("inception", "googlenet", "vit", "maxvit", "swin")


def features(traced: TracedModel, kept: dict[str, list[int]], x: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Run a graph once and keep, of every tap, the channels wanted and how far the whole feature moves between two samples.

    Args:
        traced: the model.
        kept: tap -> channels.
        x: the input.
    """
    taps = {traced.node(tap).name: tap for tap in kept}
    found: dict[str, tuple[Tensor, float]] = {}

    def look(node: fx.Node, value: Any) -> None:
        if (tap := taps.get(node.name)) is not None:
            known = traced.facts_of(tap)
            wanted = value.index_select(known.channel_axis or 0, torch.tensor(kept[tap]))
            halves = value.movedim(known.batch_axis or 0, 0).unflatten(0, (2, -1))
            found[tap] = wanted, _gap(*halves) or float(value[value.isfinite()].abs().max()) or 1.0

    with torch.no_grad():
        run_looking(traced.graph_module, look, x)
    return found


def narrow_one(model: ZooModel) -> dict[str, Any]:
    """Narrow every tap to a random half, many at a time, and compare with the whole network, which runs once."""
    start = time.process_time()
    model, module = _smallest(model)
    module = module.double()
    x = model.example(2).double()
    traced = trace(module, x)
    chooser = random.Random(0)
    taps = [
        names[0]
        for node, names in traced.aliases.items()
        if (known := traced.facts[node]).channel_axis is not None
        and known.batch_axis is not None
        and known.channels > 1
        and traced.node(names[0]).op not in ("placeholder", "output")
    ]
    kept = {tap: sorted(chooser.sample(range(n := traced.facts_of(tap).channels), max(1, n // 2))) for tap in taps}
    whole = features(traced, kept, x)
    worst, failures, stopped, absorbed, seconds = 0.0, [], Counter[str](), 0, 0.0
    seen = could = 0
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    at_once = max(3, min(_MOST, int(_SLICES / (size + 1))))
    for at in range(0, len(taps), at_once):
        some = taps[at : at + at_once]
        before = time.process_time()
        result = narrow(traced, kept={tap: kept[tap] for tap in some})
        seconds += time.process_time() - before
        for tap, got, report in zip(some, _features(result.value, some, x), result.report.taps, strict=True):
            expected, moving = whole.pop(tap)
            right = got.shape == expected.shape and tuple(got.shape) == result.value.facts_of(tap).shape
            difference = _gap(got, expected) / moving if right else float("inf")
            worst = max(worst, difference)
            if right and len(kept[tap]) > 1:
                axis = traced.facts_of(tap).channel_axis or 0
                seen += _gap(got, expected.roll(1, axis)) / moving > TOLERANCE
                could += 1
            failures += [] if difference <= TOLERANCE else [f"{tap}: {difference:.1e}"]
            absorbed += not report.stopped
            stopped.update({stop.reason for stop in report.stopped})
    return {
        "ok": not failures,
        "taps": len(taps),
        "absorbed": absorbed,
        "worst": worst,
        "control": (seen, could),
        "failures": failures[:20],
        "stopped": dict(stopped.most_common(12)),
        "narrow_seconds": round(seconds, 2),
        "seconds": round(time.process_time() - start, 1),
        "size": model.size,
        "rung": traced.report.method,
    }


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; equal infinities (with which maps are padded for max-pooling) differ by nothing."""
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())


def _features(slim: TracedModel, taps: list[str], *inputs: Tensor) -> list[Tensor]:
    """The narrowed features; the graph, which is the caller's own, is cut down to them."""
    graph_module = slim.graph_module
    output_node(graph_module.graph).args = ([slim.node(tap) for tap in taps],)
    sweep(graph_module)
    with torch.no_grad():
        return [value.detach() for value in graph_module(*inputs)]


def _smallest(model: ZooModel) -> tuple[ZooModel, nn.Module]:
    """The model on small pictures if it takes them, else on its own."""
    tries = [model]
    if (
        model.id == "torchvision:inception_v3"
    ):  # its auxiliary head, which needs 299, is none of the network in eval mode
        tries.insert(0, replace(model, size=96, options={**model.options, "aux_logits": False}))
    elif model.source == "timm":
        tries.insert(0, replace(model, size=min(96, model.size)))
    elif not model.family.startswith(_FIXED) or model.family == "googlenet":
        tries.insert(0, replace(model, size=_SMALL))
    for smaller in tries[:-1]:
        try:
            module = smaller.build()
            with torch.no_grad():
                module(smaller.example(2))
        except Exception:  # whatever a network says about pictures of the wrong size
            continue
        return smaller, module
    return model, model.build()


def shrink_one(model: ZooModel) -> dict[str, Any]:
    """Halve a network, run it in both modes, and compare it with the masked original, in float64."""
    model = small_picture(model)
    module, x = model.build(), model.example(2)
    gc.collect()
    start = time.process_time()
    traced = trace(module, x)
    seen = time.process_time()
    try:
        result = shrink(traced, ratio=0.5)
    except IndistillError as error:
        return {"ok": False, "refused": str(error)}
    done = time.process_time()
    small, report = result.value.graph_module, result.report
    found: dict[str, Any] = {
        "trace_seconds": round(seen - start, 3),
        "shrink_seconds": round(done - seen, 3),
        "macs": report.macs,
        "parameters": report.parameters,
        "layers": len(report.layers),
        "whole": [layer.path for layer in report.layers if len(layer.kept) == layer.of],
        "inexact": _inexact(report),
        "frozen": {frozen.reason: frozen.channels for frozen in report.frozen},
        "rung": traced.report.method,
        "size": model.size,
        "train": _runs(copy.deepcopy(small).train(), x),
        "eval": _runs(small.eval(), x),
    }
    found |= _equivalence(traced, small, report, x.double())
    found["ok"] = (
        found["eval"] is True
        and found["train"] is True
        and not found["inexact"]
        and report.parameters[1] < 0.75 * report.parameters[0]
        and found["difference"] <= TOLERANCE
        and found["control"] > 1e-6
    )
    return found


def _inexact(report: ShrinkReport) -> dict[str, list[int]]:
    """Layers that lost channels, but did not get round(ratio x width) in their units of removal."""
    return {
        layer.path: [len(layer.kept), layer.of, layer.each]
        for layer in report.layers
        if len(layer.kept) < layer.of and len(layer.kept) != (layer.of // layer.each + 1) // 2 * layer.each
    }


def _equivalence(traced: TracedModel, small: fx.GraphModule, report: ShrinkReport, x: Tensor) -> dict[str, Any]:
    """Sliced against masked; and with two kept columns of a reader swapped, which must show."""
    small.double()
    traced.graph_module.double()
    expected = first_tensor(run_masked(traced, report, x))
    moving = float((expected[0] - expected[1]).abs().max()) or 1.0
    with torch.no_grad():
        difference = float((first_tensor(small(x)) - expected).abs().max()) / moving
        control, place = 0.0, 0
        while control <= 1e-6 and place < 16:  # the first channels of a reader may be dead
            _swap_columns(small, place)
            control = float((first_tensor(small(x)) - expected).abs().max()) / moving
            place += 2
    return {"difference": difference, "control": control, "moving": moving}


def _swap_columns(small: fx.GraphModule, place: int) -> None:
    """Exchange two neighbouring channels that a layer in the middle and the last one read."""
    readers = [m for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.shape[1] > 1]
    for reader in (readers[len(readers) // 2], readers[-1]):  # the middle one may be a gate that is shut
        first, second = place % reader.weight.shape[1], (place + 1) % reader.weight.shape[1]
        reader.weight[:, [first, second]] = reader.weight[:, [second, first]]


def first_tensor(value: Any) -> Tensor:
    """The first tensor of an output, however it is packed."""
    if isinstance(value, Tensor):
        return value
    return first_tensor(next(iter(value.values() if isinstance(value, dict) else value)))


def _runs(module: nn.Module, x: Tensor) -> bool | str:
    try:
        with torch.no_grad():
            return bool(first_tensor(module(x)).isfinite().all())
    except Exception as error:  # anything may go wrong in a broken network
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def torch_pruning_one(model: ZooModel) -> dict[str, Any]:
    """The same by Torch-Pruning: L1, ratio 0.5, the classifier left whole."""
    import torch_pruning as tp

    model = small_picture(model)
    module, x = model.build(), model.example(2)
    last = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    heads = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == 1000] or [last]
    before = sum(p.numel() for p in module.parameters())
    gc.collect()
    start = time.process_time()
    pruner = tp.pruner.MagnitudePruner(
        module, x, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=heads
    )
    pruner.step()
    seconds = time.process_time() - start
    after = sum(p.numel() for p in module.parameters())
    return {
        "seconds": round(seconds, 3),
        "parameters": [before, after],
        "eval": _runs(module.eval(), x),
        "train": _runs(module.train(), x),
    }


def small_picture(model: ZooModel) -> ZooModel:
    """A classifier on small pictures, where its family takes them in both modes."""
    small = model.source == "torchvision" and not model.family.startswith(_FIXED)
    return replace(model, size=_SMALL) if small else model


def exact_one(channels: int) -> list[str]:
    """Ask a convolution of so many channels for 1, 2, … of them, by width and by ratio, and `narrow` too; returns what was wrong."""
    net = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Conv2d(channels, 4, 1))
    traced = trace(net, torch.randn(2, 3, 4, 4))
    wrong = []
    for n in range(1, channels + 1):
        got = {
            "ratio": shrink(traced, ratio=n / channels).value.graph_module.get_submodule("0").weight.shape[0],
            "widths": shrink(traced, widths={"0": n}).value.graph_module.get_submodule("0").weight.shape[0],
            "narrow": narrow(traced, widths={"0": n}).value.facts_of("0").channels,
        }
        wrong += [f"{way}: {n} of {channels} gave {k}" for way, k in got.items() if k != n]
    return wrong
