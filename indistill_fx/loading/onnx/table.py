"""Which rule makes what of an operator. The whole of what is known of ONNX's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from indistill_fx.loading.onnx import (
    arithmetic_of_sizes,
    elementwise,
    layers,
    pooling,
    quantised,
    recurrent,
    reductions,
    shapes,
)
from indistill_fx.loading.onnx.builder import Builder, Op
from indistill_fx.loading.onnx.values import Sizes

RULES: dict[str, Callable[[Op, Builder], Any]] = {
    **dict.fromkeys(elementwise.UNARY, elementwise.unary),
    **dict.fromkeys("LeakyRelu Elu Celu Selu ThresholdedRelu HardSigmoid".split(), elementwise.with_slope),
    "Gelu": elementwise.gelu,
    "Clip": elementwise.clip,
    **dict.fromkeys("Add Sub Mul Div Pow".split(), elementwise.arithmetic),
    **dict.fromkeys(elementwise.COMPARISONS, elementwise.comparison),
    **dict.fromkeys("Sum Mean Min Max".split(), elementwise.of_several),
    "Mod": elementwise.modulo,
    "Where": elementwise.where,
    **dict.fromkeys(("Cast", "CastLike"), elementwise.cast),
    **dict.fromkeys(("Identity", "Dropout"), elementwise.identity),
    "PRelu": elementwise.prelu,
    "Conv": layers.convolution,
    "ConvTranspose": layers.transposed_convolution,
    "Gemm": layers.gemm,
    "MatMul": layers.matmul,
    "BatchNormalization": layers.batch_norm,
    "LayerNormalization": layers.layer_norm,
    "InstanceNormalization": layers.instance_norm,
    "GroupNormalization": layers.group_norm,
    "LRN": layers.local_response_norm,
    **dict.fromkeys(("RNN", "GRU", "LSTM"), recurrent.recurrent),
    "QuantizeLinear": quantised.quantize,
    "DequantizeLinear": quantised.dequantize,
    "DynamicQuantizeLinear": quantised.dynamic_quantize,
    "QLinearConv": quantised.convolution,
    "QLinearMatMul": quantised.matmul,
    "ConvInteger": quantised.whole_convolution,
    "MatMulInteger": quantised.whole_matmul,
    "MaxPool": pooling.max_pool,
    "AveragePool": pooling.average_pool,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), pooling.global_pool),
    "Pad": pooling.pad,
    **dict.fromkeys(("Resize", "Upsample"), pooling.resize),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), pooling.depth_to_space),
    **dict.fromkeys(
        "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp".split(),
        reductions.reduction,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax"), reductions.softmax),
    **dict.fromkeys(("ArgMax", "ArgMin"), reductions.argument),
    "TopK": reductions.top_k,
    "CumSum": reductions.running_sum,
    "Einsum": reductions.einsum,
    "MeanVarianceNormalization": reductions.mean_variance,
    "Shape": shapes.shape,
    "Size": shapes.entries,
    "Reshape": shapes.reshape,
    "Flatten": shapes.flatten,
    "Squeeze": shapes.squeeze,
    "Unsqueeze": shapes.unsqueeze,
    "Transpose": shapes.transpose,
    "Concat": shapes.concat,
    "Split": shapes.split,
    "Slice": shapes.cut,
    "Gather": shapes.gather,
    "IsInf": elementwise.is_infinite,
    "GatherElements": shapes.gather_elements,
    "GatherND": shapes.gather_nd,
    "ScatterND": shapes.scatter_nd,
    "Expand": shapes.expand,
    "Tile": shapes.tile,
    "ConstantOfShape": shapes.constant_of_shape,
    "Range": shapes.span,
    "Constant": shapes.constant,
    "Trilu": shapes.triangle,
}
"""Operator -> rule."""

SIZE_RULES: dict[str, Callable[[Op], Sizes]] = {
    **dict.fromkeys(
        "Add Sub Mul Div Mod Min Max Equal Less LessOrEqual Greater GreaterOrEqual And Or".split(),
        arithmetic_of_sizes.binary,
    ),
    **dict.fromkeys(("Floor", "Ceil"), arithmetic_of_sizes.rounding),
    "Cast": arithmetic_of_sizes.cast,
    "Identity": arithmetic_of_sizes.identity,
    **dict.fromkeys(("Neg", "Not"), arithmetic_of_sizes.negation),
    "Where": arithmetic_of_sizes.where,
    "Gather": arithmetic_of_sizes.gather,
    "Slice": arithmetic_of_sizes.cut,
    "Concat": arithmetic_of_sizes.concat,
    "Reshape": arithmetic_of_sizes.reshape,
    "Squeeze": arithmetic_of_sizes.squeeze,
    "Unsqueeze": arithmetic_of_sizes.unsqueeze,
    **dict.fromkeys(("ReduceProd", "ReduceSum"), arithmetic_of_sizes.product),
}
"""Operator -> rule where numbers of shapes go in, and no data."""
