"""Score channels by the curvature of the output's divergence: what moves the model's own answers.

Every channel gets a factor, one for each sample, wherever it is read; the factors are 1. A label is drawn from the model's own answer, and
the squared derivative of its log-likelihood by the factor, averaged over the samples, is twice the rise of KL(before || after) to second
order if the channel fades. No labels are needed.

Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv:1801.05787. Deviations: labels are drawn from
the model, not given; the factor stands where the channel is read, not where it is made, and is one for all layers that share the channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import evaluating
from indistill_fx.passes.pruning.dependencies import Coupling, Units
from indistill_fx.passes.pruning.masked import MaskedLogits
from indistill_fx.traced import TracedModel


class _Gated(MaskedLogits):
    """A run with a factor on every channel that is read.

    Args:
        model: the network.
        found: which units stand where.
        class_of: the class of each unit.
        gates: (batch, classes).
    """

    def __init__(self, model: TracedModel, found: Coupling, class_of: Units, gates: Tensor):
        super().__init__(model, {})
        self.found, self.class_of, self.gates = found, class_of, gates
        self.read: set[int] = set()

    def mask(self, node: Any, axis: int, value: Tensor) -> Tensor:
        """The factors of an axis."""
        units = self.found.axes.get((node.name, axis)) if isinstance(node, fx.Node) else None
        batch = self.facts[node.name].batch_axis if units is not None and node.name in self.facts else None
        if units is None or batch is None or value.shape[batch] != len(self.gates) or batch == axis:
            return value.new_ones(())
        classes = self.class_of[units]
        self.read.update(classes.tolist())
        factors = self.gates[:, torch.from_numpy(classes).to(self.gates.device)].to(value.dtype)
        factors = factors if batch < axis else factors.T
        return factors.view([value.shape[k] if k in (batch, axis) else 1 for k in range(value.dim())])

    def touches(self, node: fx.Node) -> bool:
        """Factors may stand everywhere."""
        return True


def _surprise(scores: Tensor, axis: int | None, *, seed: int) -> Tensor:
    """-log of the likelihood, by the model's own answer, of labels drawn from it, but for a constant.

    Args:
        scores: the answer.
        axis: of its classes. Without one, or with one entry there, the answer is the mean of a normal distribution of variance 1.
        seed: of the draw.
    """
    draw = torch.Generator().manual_seed(seed)
    if axis is None or scores.shape[axis] < 2:
        noise = torch.randn(scores.shape, generator=draw).to(scores.device)
        return (scores - scores.detach() - noise).square().sum() / 2
    scores = scores.movedim(axis, -1).flatten(0, -2)
    labels = torch.multinomial(scores.detach().softmax(-1).cpu(), 1, generator=draw).to(scores.device)
    return -scores.log_softmax(-1).gather(1, labels).sum()


def fisher_scores(
    model: TracedModel, found: Coupling, class_of: Units, batches: Iterable[Any], *, instead: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One score per class of units.

    Args:
        model: traced; it is not changed.
        found: units and where they stand.
        class_of: the class of each unit.
        batches: unlabelled ones do.
        instead: scores of classes that no operation reads in a way a factor can be put on (heads of a whole attention layer).

    Raises:
        ConfigError: no batch.
    """
    total, samples, read = np.zeros(len(instead)), 0, set[int]()
    axis = model.facts[model.logits].channel_axis
    for batch in batches:
        inputs, _ = model.inputs_in(batch, where="The criterion `fisher`")
        first = next(value for value in inputs if isinstance(value, Tensor) and value.dim())
        gates = torch.ones(len(first), len(instead), device=first.device, requires_grad=True)
        run = _Gated(model, found, class_of, gates)
        with evaluating(model.graph_module), torch.enable_grad():
            run.run(*inputs)
            (slopes,) = torch.autograd.grad(_surprise(run.logits.float(), axis, seed=samples), gates)
        total += slopes.double().square().sum(0).cpu().numpy()
        samples, read = samples + len(first), read | run.read
    if not samples:
        raise ConfigError("The loader yielded no batch.", where="loader", hint="Give an iterable of batches of inputs.")
    unread = np.array(sorted(set(range(len(instead))) - read), dtype=np.int64)
    total /= samples
    total[unread] = instead[unread]
    return total
