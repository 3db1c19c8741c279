"""The blocks of a network, found in its dataflow: no name, class or container of a module is looked at.

Rules, in order:
  1. A block mixes positions, then transforms them. A layer that mixes (see `layers`) opens a block. A pointwise merge after a merge (the
     MLP after the attention), a pointwise unit after depthwise work (a separable convolution), and a pointwise unit that reads a
     concatenation and fuses it, to a sixth of its width or more, belong to the block before them. Other pointwise units (the
     expansion before a head, a squeeze, a transition with a norm first) belong to none. Where the input has no positions, or no layer
     mixes them, all mix.
  2. The block's output is the last tensor of the chain after it: through activations, channel shuffles, norms of units, pooling of
     stride one. Not through the norm after a sum, which opens the next block, unless the network norms each sum before anybody else
     reads it (post-norm); nor through activations after a sum, where most sums are read by several before any activation
     (pre-activation). Windows are laid out as a map again, where the next layers do so. Dropout and identity make no tensor of their own.
  3. In a plain chain whose every unit is followed by pooling, the pooling closes the block.
  4. The main output itself is not a block: losses on logits deal with it. Nor is a tensor without an axis of channels, such as a
     spectrogram: there is nothing to narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from indistill_fx.graph.ops import UNARY
from indistill_fx.passes.structure.dominators import Flow
from indistill_fx.passes.structure.layers import POOLS, STRIDED_POOLS, Form, Layer, Look
from indistill_fx.traced import TracedModel

IDLE = frozenset(
    (
        "dropout",
        "alpha_dropout",
        "identity",
        "clone",
        "contiguous",
        "detach",
        "stochastic_depth",
        "drop_path",
        "only_in_training",
        "to",
        "float",
        "half",
    )
)
"""Operations that leave the values as they are, when the model is evaluated."""

_FUSED = 1 / 6
"""Least share of a concatenation's width that a fusing unit keeps; a squeeze keeps less."""

_ACTIVATIONS = UNARY - IDLE
_LAYOUTS = frozenset(("view", "reshape", "permute", "transpose", "flatten", "unflatten"))
_REDUCTIONS = frozenset(("mean", "var", "var_mean", "std", "std_mean", "rsqrt"))


@dataclass(frozen=True, slots=True)
class Block:
    """One block, known by its end.

    Attributes:
        output: the tensor that the next block reads.
        pre_activation: the tensor that the block's last activation reads; `output` where none follows.
        last_conv: the last convolution or linear layer before `output`.
        start: the result of the block's last layer.
        form: what the block is: a merge, a separable convolution, any other unit.
        dilation: the largest of its convolutions.
        level: halvings of the output's sides since the input.
        depth: share of the network's MACs spent up to the output.
    """

    output: str
    pre_activation: str
    last_conv: str
    start: str
    form: Form
    dilation: int
    level: float
    depth: float


def find_blocks(traced: TracedModel, flow: Flow) -> tuple[Block, ...]:
    """The blocks on the main path, in order.

    Args:
        traced: the model.
        flow: its information flow.

    Returns:
        The blocks.
    """
    return _blocks(Look(traced, flow)) or _blocks(Look(traced, flow, flat=True))


def _blocks(look: Look) -> tuple[Block, ...]:
    traced, flow = look.traced, look.flow
    layers = list(look.layers())
    merges = [layer for layer in layers if layer.form == "merge"]
    closing = _closing_layers(layers, look)
    post_norm = _norms_sums(merges[:-1], look)
    pooled = not merges and _pools_every([layer.place for layer in closing], look)
    early = _reads_sums(merges[:-1], look)
    found = [_block(layer, look, post_norm=post_norm, early=early, pooled=pooled) for layer in closing]
    blocks = [b for b in found if b is not None and traced.facts[b.output].channel_axis is not None]
    last = flow.main_path[-1]
    return tuple(b for b in blocks if len(flow.ends) > 1 or last not in (b.start, b.output))


def _closing_layers(layers: Sequence[Layer], look: Look) -> list[Layer]:
    """The last layer of every block, with the block's data from its first layer."""
    closing: list[Layer] = []
    open_for_more = False
    for layer in layers:
        if layer.mixes:
            closing.append(layer)
            open_for_more = True
        elif open_for_more and _completes(layer, closing[-1], look):
            open_for_more = closing[-1].concatenates and layer.form == "unit"
            closing[-1] = replace(
                closing[-1], place=layer.place, last_conv=layer.last_conv, bare=False, is_sum=layer.is_sum
            )
    return closing


def _completes(layer: Layer, block: Layer, look: Look) -> bool:
    """Whether a pointwise layer belongs to the block before it."""
    nodes = [look.flow.main_path[place] for place in (block.place, layer.place)]
    if not look.flat and not look.flow.on_one_level(*nodes):
        return False
    if layer.form == "merge":
        return block.form == "merge" or block.bare
    directly = not any(_norms(name, look) for name in look.flow.main_path[block.place + 1 : layer.place])
    return block.bare or (block.concatenates and directly and block.width * _FUSED <= layer.width <= block.width)


def _norms_sums(merges: Sequence[Layer], look: Look) -> bool:
    """Whether most of these merges are first normalised, and several nodes read the norm's result."""
    readers = [look.flow.readers[look.flow.main_path[layer.place]] for layer in merges]
    alone = [names[0] for names in readers if len(names) == 1]
    normed = [name for name in alone if "norm" in look.operation(name) and _many_read(name, look)]
    return 2 * len(normed) > len(readers)


def _many_read(norm: str, look: Look) -> bool:
    """Whether several nodes read the norm's result, or the result of the activation after it."""
    readers = look.flow.readers[norm]
    while len(readers) == 1 and look.operation(readers[0]) in _ACTIVATIONS:
        readers = look.flow.readers[readers[0]]
    return len(readers) > 1


def _reads_sums(merges: Sequence[Layer], look: Look) -> bool:
    """Whether most of these merges are read directly, by a shortcut and by a branch that begins with an activation."""
    readers = [look.flow.readers[look.flow.main_path[layer.place]] for layer in merges]
    plain = [names for names in readers if len(names) > 1 and any(look.operation(n) in _ACTIVATIONS for n in names)]
    return 2 * len(plain) > len(readers)


def _pools_every(places: Sequence[int], look: Look) -> bool:
    """Whether there are several units, and pooling that leaves a map after each."""
    if len(places) < 2:
        return False
    spans = [look.flow.main_path[a:b] for a, b in zip(places, [*places[1:], len(look.flow.main_path)], strict=True)]
    pools = [any(look.operation(name) in STRIDED_POOLS and name in look.flow.levels for name in span) for span in spans]
    return all(pools)


def _block(layer: Layer, look: Look, *, post_norm: bool, early: bool, pooled: bool) -> Block | None:
    """Follow the chain after a layer to the block's output; None where there are no positions left."""
    levels, start = look.flow.levels, look.flow.main_path[layer.place]
    if start not in levels and not look.flat:
        return None
    level, form, output, read = levels.get(start, 0.0), look.facts[start], start, None
    norms_left, pools_left = int(post_norm), int(pooled)
    for name in look.flow.main_path[layer.place + 1 :]:
        operation, known = look.operation(name), look.facts.get(name)
        if known is None or look.works(name) or look.is_busy(name):
            break
        if layer.is_sum and _norms(name, look):
            if not norms_left:
                read = read or _normed_before_activation(name, look)
                break
            norms_left -= 1
        if early and layer.is_sum and operation in _ACTIVATIONS:
            break
        if operation in POOLS:
            if name not in levels and not look.flat:
                break
            if not look.flat and not look.flow.on_one_level(start, name):
                if not pools_left:
                    break
                pools_left -= 1
            form, output = known, name
        elif operation not in IDLE and (known.shape, known.kind) == (form.shape, form.kind):
            read = read or (output if operation in _ACTIVATIONS else None)
            output = name
        elif operation in _LAYOUTS and look.is_picture(name) and not look.is_picture(output):
            form, output = known, name
    return Block(
        output=output,
        pre_activation=read or output,
        last_conv=layer.last_conv,
        start=start,
        form=layer.form,
        dilation=layer.dilation,
        level=levels.get(output, level),
        depth=look.flow.depth[start],
    )


def _norms(name: str, look: Look) -> bool:
    """Whether the node is a norm, or the end of one written as single operations: branches with reductions and without weights."""
    reduces = any(look.operation(other) in _REDUCTIONS for other in look.flow.regions[name])
    return "norm" in look.operation(name) or (reduces and not look.is_busy(name))


def _normed_before_activation(norm: str, look: Look) -> str | None:
    readers = look.flow.readers[norm]
    return norm if len(readers) == 1 and look.operation(readers[0]) in _ACTIVATIONS else None
