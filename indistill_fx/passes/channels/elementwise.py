"""Rules of operations that treat every entry alone, or two broadcast operands entry by entry."""

from __future__ import annotations

from torch import fx

from indistill_fx.passes.channels.call import Call, again, slice_weights
from indistill_fx.passes.channels.selection import Blocked, Cut, Part, Propagation

OTHERS = frozenset(
    "where masked_fill eq ne lt le gt ge and or xor invert not logical_and logical_or logical_xor logical_not bitwise_and bitwise_or "
    "bitwise_xor bitwise_not isnan isinf isfinite signbit lerp addcmul addcdiv fmax fmin rsub remainder fmod mod floordiv floor_divide "
    "reciprocal absolute positive negative sign sgn copysign heaviside floor ceil round trunc fix frac nan_to_num exp2 expm1 log2 log10 "
    "log1p logit logaddexp logaddexp2 xlogy erf erfc erfinv sin cos tan sinc asin acos atan arcsin arccos arctan atan2 arctan2 hypot "
    "sinh cosh asinh acosh atanh tanhshrink softshrink hardshrink complex polar angle conj real imag double bfloat16 bool int long type "
    "short byte char cpu as_tensor asarray alias_copy resolve_conj resolve_neg to_dense fill deg2rad rad2deg lgamma digamma i0 float_power "
    "nextafter ldexp gcd lcm isclose greater greater_equal less less_equal not_equal feature_alpha_dropout "
    "expand_as zeros_like ones_like full_like empty_like copy".split()
) | frozenset(
    f"special_{name}"
    for name in "digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 i0e i1 i1e log1p log_ndtr logit ndtr ndtri psi round sinc "
    "xlog1py xlogy zeta".split()
)
"""Elementwise operations besides those in `graph.ops`."""
_FOLLOWS_FIRST = frozenset("type_as to".split())
"""Operations whose further tensors are looked at, not computed with."""


def elementwise(call: Call, cut: Cut) -> Propagation | Blocked:
    """Every operand that has the selected axes is selected in the same way; those that broadcast along them are not."""
    parts = operand_parts(call, cut)
    return parts if isinstance(parts, Blocked) else Propagation(again(call, [part.cut for part in parts]), parts)


def operand_parts(call: Call, cut: Cut) -> tuple[Part, ...] | Blocked:
    """The selections of broadcast operands that make the selection of their result."""
    shape = call.output_shape
    wanted = shape[cut.start : cut.stop]
    operands = call.node.all_input_nodes[:1] if call.op in _FOLLOWS_FIRST else call.node.all_input_nodes
    parts = []
    for operand in operands:
        own_shape = call.shape(operand)
        if own_shape is None:
            continue
        shift = len(shape) - len(own_shape)
        start, stop = max(cut.start - shift, 0), max(cut.stop - shift, 0)
        if stop - start == cut.width and own_shape[start:stop] == wanted:
            parts.append(Part(Cut(operand, start, stop, cut.index)))
        elif any(n != 1 for n in own_shape[start:stop]):
            return Blocked("its operands broadcast along some of the merged axes")
        elif stop - start > 1:
            parts.append(Part(Cut(operand, start, stop, (0,))))
    return tuple(parts)


def prelu(call: Call, cut: Cut) -> Propagation | Blocked:
    """One slope for all, or one per channel on axis 1."""
    below = Part(Cut(call.input, cut.start, cut.stop, cut.index))
    weight = call.constant("weight")
    if weight is None and isinstance(call.get("weight"), fx.Node):
        return Blocked("its slopes are computed")
    if weight is None or weight.numel() == 1 or cut.start > 1:
        return Propagation(again(call, [below.cut]), (below,))
    if (cut.start, cut.stop) != (1, 2):
        return Blocked("its slopes belong to axis 1, which is merged with others here")
    return slice_weights(call, {"weight": (0, cut.index)}, parts=[below], num_parameters=len(cut.index))
