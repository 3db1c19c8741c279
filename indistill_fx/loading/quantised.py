"""Quantised tensors and layers from a file, repacked from weights and settings that were checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INTEGERS = {"QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32}
"""What the elements of a quantised storage are."""

_PACKED_LINEAR = "__torch__.torch.classes.quantized.LinearPackedParamsBase"
_PACKED_CELL = "__torch__.torch.classes.rnn.CellParamsBase"


def quantise(values: Tensor, quantizer: Any) -> Tensor | None:
    """A quantised tensor of integers and the scale they stand for, per tensor or per channel; None if these do not go together."""
    match quantizer:
        case (torch.per_tensor_affine, float(scale), int(zero)):
            return torch._make_per_tensor_quantized_tensor(values, scale, zero)
        case (torch.per_channel_affine, Tensor() as scales, Tensor() as zeros, int(axis)) if 0 <= axis < values.dim():
            if scales.shape == zeros.shape == values.shape[axis : axis + 1]:
                return torch._make_per_channel_quantized_tensor(values, scales, zeros, axis)
    return None


def pack(state: Any) -> Any:
    """The packed weights of a quantised layer, from what they hold; None if the state is not one's.

    Args:
        state: as torch pickles it: what is in it, and the name of its class. Of a linear layer that is its weight and bias, of a
            cell of a recurrent one its biases and the packed weights of two linear layers.
    """
    match state:
        case ((Tensor() as weight, None | Tensor() as bias), str(name)) if name == _PACKED_LINEAR:
            if weight.is_quantized and weight.dim() == 2 and _is_bias(bias, weight):
                return torch.ops.quantized.linear_prepack(weight, bias)
        case (
            ("quantized_dynamic", [Tensor() as first, Tensor() as second], [], [0 | 1 as reduce], [inputs, hidden]),
            str(name),
        ):
            if (
                name == _PACKED_CELL
                and isinstance(inputs, torch.ScriptObject)
                and isinstance(hidden, torch.ScriptObject)
            ):
                weights = [torch.ops.quantized.linear_unpack(layer)[0] for layer in (inputs, hidden)]
                if all(_is_bias(bias, weight) for bias, weight in zip((first, second), weights, strict=True)):
                    make = torch.ops.quantized.make_quantized_cell_params_dynamic
                    return make(inputs, hidden, first, second, bool(reduce))
    return None


def fill_convolution(module: nn.Module, state: Any) -> bool:
    """Set the state of a quantised convolution, a tuple; whether it was one's."""
    match state:
        case (int(inputs), int(outputs), kernel, stride, padding, dilation, bool(), output_padding, int(groups), str(),
              Tensor() as weight, None | Tensor() as bias, float(), int(), bool()):  # fmt: skip
            dimensions = weight.dim() - 2
            if (
                type(module).__module__ == "torch.ao.nn.quantized.modules.conv"
                and weight.is_quantized and _is_bias(bias, weight) and 1 <= dimensions <= 3
                and groups > 0 and outputs % groups == 0 and inputs % groups == 0
                and tuple(weight.shape) in ((outputs, inputs // groups, *kernel), (inputs, outputs // groups, *kernel))
                and all(_are_sizes(sizes, dimensions) for sizes in (kernel, stride, padding, dilation, output_padding))
            ):  # fmt: skip
                nn.Module.__init__(module)
                module.__setstate__(state)
                return True
    return False


def _is_bias(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is None or (bias.dim() == 1 and bias.is_floating_point() and len(bias) in weight.shape[:2])


def _are_sizes(sizes: Any, dimensions: int) -> bool:
    legal = isinstance(sizes, (tuple, list)) and len(sizes) == dimensions
    return legal and all(type(size) is int and 0 <= size < 1 << 16 for size in sizes)
