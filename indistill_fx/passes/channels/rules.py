"""The channel rules: for each operation, how a selection of its output's channels is obtained from its inputs and weights.

One table serves every pass that works on channels. A rule answers a `Cut` (node, axes, index) with a `Propagation` (select these of the
inputs, slice these weights, emit this call), or with `Blocked` and the reason. Operations without a rule are blocked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch

from indistill_fx.graph.computed_weights import why_opaque
from indistill_fx.graph.ops import BINARY, UNARY
from indistill_fx.passes.channels import (
    attention,
    comparisons,
    elementwise,
    joining,
    layout,
    lookups,
    norms,
    producers,
    space,
    writing,
)
from indistill_fx.passes.channels.call import SPECTRA, Call, read_call
from indistill_fx.passes.channels.selection import Blocked, Cut, Part, Propagation
from indistill_fx.traced import NodeFacts

Rule = Callable[[Call, Cut], Propagation | Blocked]

FILLED = tuple("zeros ones full empty new_zeros new_ones new_full new_empty".split())
"""Operations that make a tensor of one value, of any size."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY | BINARY | elementwise.OTHERS, elementwise.elementwise),
    "prelu": elementwise.prelu,
    "conv": producers.conv,
    "conv_transpose": producers.conv,
    "deform_conv2d": producers.deformed,
    "conv_per_sample": producers.per_sample,
    "linear": producers.linear,
    "embedding": producers.embedding,
    "embedding_bag": producers.embedding_bag,
    "bilinear": producers.bilinear,
    "get_attr": producers.constant,
    "batch_norm": norms.per_channel_norm,
    "instance_norm": norms.per_channel_norm,
    "group_norm": norms.group_norm,
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.layer_norm,
    **dict.fromkeys(
        "softmax log_softmax softmin softmax2d normalize cumsum cumprod logcumsumexp argsort".split(), norms.along_axis
    ),
    **dict.fromkeys(
        "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool lp_pool1d lp_pool2d lp_pool3d interpolate upsample "
        "upsample_nearest2d upsample_bilinear2d upsampling_nearest2d upsampling_bilinear2d grid_sample".split(),
        space.per_channel_map,
    ),
    **dict.fromkeys(
        [
            "pad",
            "constant_pad_nd",
            *(f"{k}_pad{n}d" for k in "zero constant reflection replication circular".split() for n in (1, 2, 3)),
        ],
        space.pad,
    ),
    **dict.fromkeys(
        "mean sum amax amin var std prod logsumexp norm vector_norm argmax argmin all any nansum nanmean count_nonzero".split(),
        space.reduction,
    ),
    "roll": space.shift,
    "flip": space.flip,
    "rot90": space.turned,
    **dict.fromkeys(("tril", "triu"), space.triangle),
    **dict.fromkeys((f"fft_{kind}" for kind in SPECTRA), space.spectrum),
    **dict.fromkeys(("view_as_real", "view_as_complex"), space.complex_view),
    **dict.fromkeys((f"max_unpool{n}d" for n in (1, 2, 3)), space.unpool),
    **dict.fromkeys(("unfold", "im2col"), space.unfold),
    **dict.fromkeys(("fold", "col2im"), space.fold),
    "getattr": joining.field,
    "pixel_shuffle": space.pixel_shuffle,
    "pixel_unshuffle": space.pixel_unshuffle,
    "channel_shuffle": space.channel_shuffle,
    "glu": norms.glu,
    **dict.fromkeys(attention.PRODUCTS, attention.matmul),
    **dict.fromkeys(attention.BY_LETTERS, attention.einsum),
    "scaled_dot_product_attention": attention.fused,
    **dict.fromkeys(comparisons.COMPARISONS, comparisons.compared),
    **dict.fromkeys(("shifted_window_attention", "window_attention"), attention.windows),
    "_get_relative_position_bias": attention.position_bias,
    "_patch_merging_pad": attention.patch_merging,
    **dict.fromkeys("view reshape flatten unflatten squeeze unsqueeze".split(), layout.reshape),
    **dict.fromkeys("permute transpose movedim t mt numpy_t".split(), layout.permute),
    "expand": layout.expand,
    "repeat": layout.repeat,
    "repeat_interleave": layout.repeat_interleave,
    "cat": joining.cat,
    "stack": joining.stack,
    "getitem": joining.getitem,
    **dict.fromkeys(
        "gather take_along_dim scatter scatter_add scatter_reduce index_add index_copy index_fill diff".split(),
        lookups.along_places,
    ),
    **dict.fromkeys("select narrow slice index_select".split(), joining.slicing),
    "with_item": writing.written,
    **dict.fromkeys(FILLED, writing.filled),
}
"""Operation -> rule. The whole of what the passes know of channels."""


def consult(cut: Cut, facts: Mapping[str, NodeFacts]) -> Propagation | Blocked:
    """How a selection is obtained, by the rule of the node's operation."""
    node = cut.node
    if node.name not in facts:
        return Blocked("its value is not one tensor")
    trimmed = _without_ones(cut, facts[node.name].shape)
    if trimmed is not None:
        return trimmed
    if node.op == "placeholder":
        return Blocked("an input of the network")
    call = read_call(node, facts)
    if call.module is not None and (reason := why_opaque(call.module)) is not None:
        return Blocked(reason)
    rule = RULES.get(call.op)
    if rule is not None and (reason := call.why_computed) is not None:
        return Blocked(reason)
    if rule is None:
        return Blocked(f"no channel rule for {call.op}")
    return rule(call, cut)


def _everything(cut: Cut, facts: Mapping[str, NodeFacts]) -> Propagation | None:
    known = facts.get(cut.node.name)
    if known is None or cut.index != tuple(range(prod(known.shape[cut.start : cut.stop]))):
        return None
    return Propagation(
        lambda out, _: cut.node if cut.width == 1 else out.function(torch.flatten, cut.node, cut.start, cut.stop - 1)
    )


def _without_ones(cut: Cut, shape: tuple[int, ...]) -> Propagation | None:
    """Axes of size one at the ends of merged axes do not matter: select without them, then flatten."""
    start, stop = cut.start, cut.stop
    while stop - start > 1 and shape[stop - 1] == 1:
        stop -= 1
    while stop - start > 1 and shape[start] == 1:
        start += 1
    if (start, stop) == (cut.start, cut.stop):
        return None
    extra = cut.width - (stop - start)
    part = Part(Cut(cut.node, start, stop, cut.index))
    return Propagation(lambda out, new: out.function(torch.flatten, new[0], cut.start, cut.start + extra), (part,))


def trace_back(cuts: Iterable[Cut], facts: Mapping[str, NodeFacts]) -> dict[Cut, Propagation | Blocked]:
    """Every selection that the given ones lead to, with how it is obtained. A selection of everything is the node itself."""
    answers: dict[Cut, Propagation | Blocked] = {}
    open_cuts = list(cuts)
    while open_cuts:
        cut = open_cuts.pop()
        if cut in answers:
            continue
        answer = answers[cut] = _everything(cut, facts) or consult(cut, facts)
        if isinstance(answer, Propagation):
            open_cuts += [*answer.weights, *(part.cut for part in answer.parts)]
    return answers
