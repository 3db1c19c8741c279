"""The weights of an ONNX file beside those of a fresh export: equal, or for int8 the nearest numbers of their scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from indistill_fx.deploy.onnx_session import Array

if TYPE_CHECKING:
    import onnx


SHOWN = 5
_TURNED = "_Transposed"  # suffix that onnxruntime's dynamic quantiser appends to the name of a weight it transposes


def wrong_weights(model: onnx.ModelProto, fresh: onnx.ModelProto, *, strict: bool) -> list[str]:
    """What differs, one sentence a weight.

    Args:
        model: the file's.
        fresh: the module's export.
        strict: a weight that only one of them has is a difference, too.
    """
    got, expected = _arrays(model), _arrays(fresh)
    found = []
    if strict and got.keys() != expected.keys():
        for verb, names in (("lacks", expected.keys() - got.keys()), ("has besides", got.keys() - expected.keys())):
            if names:
                found.append(f"the file {verb} the weights {', '.join(sorted(names)[:SHOWN])}")
    for name in [name for name in expected if name in got]:
        found += _wrong_weight(name, got[name], expected[name])
    return _shortened(found)


def wrong_int8_weights(model: onnx.ModelProto, fresh: onnx.ModelProto) -> tuple[list[str], int, int]:
    """What differs by more than rounding, how many of the module's weights were compared, and how many there are."""
    got = _arrays(model)
    expected = {name: array for name, array in _arrays(fresh).items() if array.dtype.kind == "f"}
    found: list[str] = []
    compared = 0
    lstms = {name for node in model.graph.node if node.op_type == "DynamicQuantizeLSTM" for name in node.input[1:3]}
    for name, array in expected.items():
        if name in got:
            compared += 1
            found += _wrong_weight(name, got[name], array)
            continue
        own = array.swapaxes(1, 2) if f"{name}_quantized" in lstms else array
        for written, turned in ((name, own), (f"{name}{_TURNED}", array.T)):
            parts = _quantised(written, got)
            if parts is not None:
                compared += 1
                found += _wrong_numbers(name, *parts, turned)
                break
    return _shortened(found), compared, len(expected)


def _arrays(model: onnx.ModelProto) -> dict[str, Array]:
    from onnx.numpy_helper import to_array

    return {tensor.name: to_array(tensor) for tensor in model.graph.initializer}


def _quantised(name: str, got: dict[str, Array]) -> tuple[Array, Array, Array] | None:
    """Integers, scale and zero point of a weight or a bias, whose names differ."""
    numbers = got.get(f"{name}_quantized")
    for stem in (name, f"{name}_quantized"):
        scale, zero = got.get(f"{stem}_scale"), got.get(f"{stem}_zero_point")
        if numbers is not None and scale is not None and zero is not None:
            return numbers, scale, zero
    return None


def _wrong_weight(name: str, got: Array, expected: Array) -> Iterator[str]:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        yield f"weight `{name}` is {got.dtype}{list(got.shape)}, the module's {expected.dtype}{list(expected.shape)}"
        return
    exact = got.dtype.kind != "f"
    close = got == expected if exact else np.isclose(got, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
    if not close.all():
        gap = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()
        yield f"weight `{name}` differs in {int((~close).sum())} of {got.size} values, by up to {gap:.3g}"


def _wrong_numbers(name: str, numbers: Array, scale: Array, zero: Array, expected: Array) -> Iterator[str]:
    if numbers.shape != expected.shape:
        yield f"weight `{name}` has shape {list(numbers.shape)}, the module's {list(expected.shape)}"
        return
    # One scale per output channel: the first axis of a convolution's weight, the last axis of a matrix product's.
    if scale.ndim == 2 and numbers.ndim == 3:  # of an LSTM's weight: one per direction and output channel
        options = [[scale.shape[0], 1, scale.shape[1]]]
    elif scale.size > 1:
        axis = next((axis for axis in (0, -1) if numbers.shape[axis] == scale.size), None)
        if axis is None:
            yield f"weight `{name}` has {scale.size} scales for the shape {list(numbers.shape)}"
            return
        shape = [1] * numbers.ndim
        shape[axis] = scale.size
        options = [shape] if numbers.ndim != 2 or numbers.shape[0] != numbers.shape[1] else [shape, shape[::-1]]
    else:
        options = [[1] * numbers.ndim]
    misses = [_steps_off(numbers, scale.reshape(form), zero.reshape(form), expected) for form in options]
    steps = min(misses, key=lambda off: float(off.max(initial=0)))
    if (far := steps > 0.51).any():
        yield (
            f"weight `{name}` differs in {int(far.sum())} of {far.size} int8 values, by up to {steps.max():.3g} steps "
            f"of its scale"
        )


def _steps_off(numbers: Array, scale: Array, zero: Array, expected: Array) -> Array:
    """The largest distance of the stored numbers from the module's values, in quantisation steps."""
    step = np.maximum(scale.astype(np.float64), np.finfo(np.float64).tiny)
    off: Array = np.abs(expected.astype(np.float64) / step + zero.astype(np.float64) - numbers.astype(np.float64))
    return off


def _shortened(found: list[str]) -> list[str]:
    more = len(found) - SHOWN
    return found if more <= 0 else [*found[:SHOWN], f"and {more} more weights differ"]
