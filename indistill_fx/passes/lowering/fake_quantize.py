"""Compute in floats what an int8 file will compute, so that a network can be trained for it.

Rules, in order:
  1. Weights of convolutions and linear layers are rounded per output channel to 7 bits, 64 steps on either side of 0: what
     `quantize_onnx` writes. A batch norm after the layer scales whole channels, so folding it before or after the rounding is the same.
  2. What convolutions, linear layers, sums, concatenations and poolings read is rounded to 8 bits without a sign. The range is a
     moving average of what training shows; in eval mode it stands still.
  3. Everything else stays in floats, as do the weights of convolutions that are called as functions.

Rounding passes gradients through as if it were not there, within the range.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.graph.edit import add_module, copy_graph, stand_in
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.passes.contract import PassResult, Rewrite
from indistill_fx.traced import TracedModel

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_READERS = frozenset({"conv", "linear", "add", "cat", "max_pool", "avg_pool", "adaptive_avg_pool", "mean"})
_MOST_WEIGHT, _LEVELS = 64, 255
_SMALLEST = 1e-8


class RoundedActivation(nn.Module):
    """A tensor rounded to 256 levels between the bounds that training has shown.

    Args:
        momentum: weight of the newest batch in the moving average of the bounds.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, momentum: float = 0.01):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype; 0 is one of the levels."""
        if self.training:
            self._watch(x.detach())
        scale = ((self.high - self.low) / _LEVELS).clamp_min(_SMALLEST)
        zero = torch.round(-self.low / scale).clamp(0, _LEVELS).to(torch.int32)
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, _LEVELS)
        return torch.where(self.seen, rounded, x.float()).to(x.dtype)

    def _watch(self, x: Tensor) -> None:
        low, high = x.amin().float().clamp_max(0), x.amax().float().clamp_min(0)
        kept = torch.where(self.seen, 1 - self.momentum, 0.0)
        self.low.copy_(torch.minimum(low, low + kept * (self.low - low)))
        self.high.copy_(torch.maximum(high, high + kept * (self.high - high)))
        self.seen.fill_(True)


class RoundedLayer(nn.Module):
    """A layer that computes with its weight rounded, per output channel, to 64 steps on either side of 0.

    Args:
        layer: a convolution or linear layer; its tensors are shared.
    """

    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of `x`."""
        weight = self.layer.weight
        bounds = weight.detach().float().flatten(1).abs().amax(1)
        scale = (bounds / _MOST_WEIGHT).clamp_min(_SMALLEST)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -_MOST_WEIGHT, _MOST_WEIGHT)
        rounded = rounded.to(weight.dtype)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, rounded, self.layer.bias)
        result: Tensor = self.layer._conv_forward(x, rounded, self.layer.bias)
        return result


def fake_quantize(model: TracedModel) -> PassResult[TracedModel, Rewrite]:
    """The network as it will compute in int8, on the same parameters.

    Args:
        model: a traced student. Training the new one trains its layers.

    Returns:
        The new model; the report names what is rounded, and the layers that stay in floats.
    """
    new, _ = copy_graph(model.graph_module)
    facts, done, skipped = dict(model.facts), [], []
    rounded: dict[fx.Node, fx.Node] = {}
    for node in list(new.graph.nodes):
        layer = attribute(new, str(node.target)) if node.op == "call_module" else None
        if node.name not in facts or not (isinstance(layer, Layer) or op_name(node) in _READERS):
            continue
        for source in node.all_input_nodes:
            if _is_activation(source, model):
                value = rounded.get(source) or _rounded(new, source, facts)
                rounded[source] = value
                node.replace_input_with(source, value)
        if isinstance(layer, Layer):
            stand_in(node, add_module(new, f"{node.target}_rounded", RoundedLayer(layer)))
            done.append(model.tap_name(node))
        elif op_name(node) in ("conv", "linear"):
            skipped.append(f"{model.tap_name(node)}: its weight is not a layer's own")
    new.delete_all_unused_submodules()
    new.recompile()
    report = Rewrite(tuple(done), tuple(skipped))
    return PassResult(replace(model, graph_module=new, facts=facts), report)


def _is_activation(node: fx.Node, model: TracedModel) -> bool:
    facts = model.facts.get(node.name)
    return facts is not None and facts.dtype.is_floating_point and facts.batch_axis is not None


def _rounded(new: fx.GraphModule, source: fx.Node, facts: dict[str, Any]) -> fx.Node:
    """A node that rounds the value of another one."""
    name = add_module(new, f"{source.name}_rounded", RoundedActivation())
    with new.graph.inserting_after(source):
        node = new.graph.call_module(name, (source,))
    facts[node.name] = replace(facts[source.name], macs=0, parameters=0)
    return node
