"""Make taps outputs of the graph: features without hooks, which survive compile, DDP, autocast and export.

`instrument` keeps the network's own output beside the features; `cut` drops it, and with it everything after the deepest tap.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from indistill_fx.graph.edit import ending_at, output_node
from indistill_fx.passes.contract import PassResult, Rewrite
from indistill_fx.traced import TracedModel


def instrument(traced: TracedModel, taps: Sequence[str]) -> fx.GraphModule:
    """Make a graph that returns chosen features along with the model's output.

    Args:
        traced: a traced (or narrowed) model. It is not changed; the new graph shares its leaf modules.
        taps: names of tensors, as in `traced.taps`.

    Returns:
        A GraphModule: inputs → (dict of tap name → the tensor as it is at that place, the model's own output).

    Raises:
        ConfigError: a name is not a tap; the message offers the nearest.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> x = torch.randn(2, 1, 8, 8)
        >>> tapped = ifx.instrument(ifx.trace(DigitsTeacher(), x), ["layer1", "layer3"])
        >>> features, logits = tapped(x)
        >>> features["layer3"].shape, logits.shape
        (torch.Size([2, 128, 2, 2]), torch.Size([2, 10]))
    """
    return _with_outputs(traced, taps, keep_output=True)


def cut(traced: TracedModel, taps: Sequence[str]) -> PassResult[fx.GraphModule, Rewrite]:
    """A graph from the model's inputs to (features, None), which holds nothing after the deepest tap.

    Args:
        traced: a traced (or narrowed) model. Not changed; the new graph shares its leaf modules.
        taps: names of tensors, as in `traced.taps`.

    Raises:
        ConfigError: a name that is not a tap; offers the nearest.
    """
    new = _with_outputs(traced, taps, keep_output=False)
    removed = len(traced.graph_module.graph.nodes) - len(new.graph.nodes)
    return PassResult(new, Rewrite(done=(f"outputs: {', '.join(taps)}", f"{removed} operations after them removed")))


def _with_outputs(traced: TracedModel, taps: Sequence[str], *, keep_output: bool) -> fx.GraphModule:
    output = output_node(traced.graph_module.graph).args[0] if keep_output else None
    return ending_at(traced.graph_module, ({tap: traced.node(tap) for tap in taps}, output))
