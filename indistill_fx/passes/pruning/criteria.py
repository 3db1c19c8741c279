"""Criteria: which channels are worth keeping. By the weights that make them, or by what data makes of them.

    l1                 sum of absolute weights of the filter; the paper's, and the default
    l2                 Euclidean norm of the filter
    bn_scale           absolute scale of the batch norm after the filter; L1 where there is none (Liu et al., arXiv:1708.06519)
    geometric_median   sum of distances to the other filters of the layer (He et al., arXiv:1811.00250)
    random             a fixed random order
    activation         mean absolute activation on data
    taylor             mean absolute sum of activation x gradient of the task's loss; needs labels (Molchanov et al., arXiv:1611.06440)
    fisher             mean squared gradient of the model's own log-likelihood by a factor on the channel; needs data, no labels (`fisher`)
    isomorphic         fisher where there is a loader, else L2, ranked among layers of one structure only (Fang et al., ECCV 2024)
    your own           a function of weights (rows, inputs, *kernel) -> scores (rows,)

The highest scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from indistill_fx.errors import ConfigError, PruneError, nearest
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.graph.module_state import mode
from indistill_fx.graph.ops import op_name
from indistill_fx.losses.choose_task import compared_input, infer_task
from indistill_fx.passes.channels.call import read_call
from indistill_fx.system.nested import tensors_of
from indistill_fx.traced import TracedModel

Criterion = Callable[[Tensor], Tensor]
"""Weights (rows, inputs, *kernel) -> one score per row."""


def l1(weight: Tensor) -> Tensor:
    """Sum of absolute weights of each filter, in their own precision or single, which is three times as fast as in double."""
    return weight.detach().abs().flatten(1).sum(1, dtype=torch.promote_types(weight.dtype, torch.float32)).double()


def l2(weight: Tensor) -> Tensor:
    """Euclidean norm of each filter."""
    return weight.detach().square().flatten(1).sum(1, dtype=torch.float64).sqrt()


def geometric_median(weight: Tensor) -> Tensor:
    """Sum of the distances of each filter to the others: those near the middle can be replaced by the rest."""
    rows = weight.detach().flatten(1).float()
    return torch.cdist(rows, rows).sum(1, dtype=torch.float64)


def random(weight: Tensor) -> Tensor:
    """A fixed random order, the same for every layer of one size."""
    return torch.rand(weight.shape[0], generator=torch.Generator().manual_seed(weight.shape[0]), dtype=torch.float64)


WEIGHTS: dict[str, Criterion] = {"l1": l1, "l2": l2, "geometric_median": geometric_median, "random": random}
"""Criteria that look at a layer's weights alone."""
DATA = ("activation", "taylor")
"""Criteria that look at data."""
UNITS = ("fisher", "isomorphic")
"""Criteria of the channels that go together, wherever they are read; `shrink` knows them."""
NAMES = (*WEIGHTS, "bn_scale", *DATA, *UNITS)


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores the rows of a layer's weights: by the weights, by the norm after the layer, or by statistics taken before.

    Attributes:
        name: of the criterion, for reports.
        weights: criterion for weights; also where there is nothing better.
        model: whose graph is looked at.
        scales: look for the batch norm after the layer first.
        statistics: per node, scores that data gave its channels.
    """

    name: str
    weights: Criterion
    model: TracedModel
    scales: bool
    statistics: Mapping[str, Tensor]

    def __call__(self, node: str, path: str, weight: Tensor) -> Tensor:
        """One score per row.

        Raises:
            PruneError: a score is not a number, or there is not one for each row.
        """
        _, scores = self.basis(node, len(weight))
        seen_by_score = scores is None and self.weights in (l1, l2)  # not-a-number weights are found through the score
        if scores is None:
            scores = self.weights(weight)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape[:1]:
            raise PruneError(
                f"The criterion gave `{path}` scores of shape {tuple(getattr(scores, 'shape', ()))}; it has {len(weight)} rows.",
                where=path,
                hint="A criterion takes weights (rows, inputs, *kernel) and returns one score per row.",
            )
        if not (bool(scores.isfinite().all()) and (seen_by_score or bool(weight.isfinite().all()))):
            raise unsound(path)
        return scores.detach().to("cpu", torch.float64)

    def basis(self, node: str, rows: int) -> tuple[str, Tensor | None]:
        """The weights that a layer is scored by, and its scores if they come from elsewhere."""
        scores = self.statistics.get(node)
        if scores is None and self.scales:
            scores = self._scale(node)
        if scores is not None and len(scores) == rows:
            return self.name, scores
        return "l1" if self.scales or self.statistics else self.name, None

    def _scale(self, name: str) -> Tensor | None:
        """Scales of the batch norm that reads a node."""
        node = next((node for node in self.model.graph_module.graph.nodes if node.name == name), None)
        for user in node.users if node is not None else ():
            if op_name(user) == "batch_norm":
                scale = read_call(user, self.model.facts).constant("weight")
                return None if scale is None else scale.detach().abs()
        return None


def unsound(path: str) -> PruneError:
    """The error for a layer that cannot be ranked: whatever the criterion, channels that are not numbers have no worth."""
    return PruneError(
        f"`{path}` has weights that are not finite numbers, so its channels cannot be ranked.",
        where=path,
        hint="Load weights that are finite.",
    )


def scorer_of(
    criterion: str | Criterion, model: TracedModel, loader: Iterable[Any] | None, axes: Mapping[str, int]
) -> Scorer:
    """The scorer of a criterion's name, or of the user's own function.

    Args:
        criterion: name or function.
        model: whose channels are scored.
        loader: batches for the criteria that need data.
        axes: the nodes whose channels these criteria look at, and their channel axis.

    Raises:
        ConfigError: no criterion of that name, or one that needs data without a loader.
    """
    if callable(criterion):
        return Scorer(getattr(criterion, "__name__", "own criterion"), criterion, model, False, {})
    if criterion not in NAMES:
        raise ConfigError(
            f"There is no criterion `{criterion}`.", where="criterion", got=criterion, hint=nearest(criterion, NAMES)
        )
    if criterion == "isomorphic" or (criterion == "fisher" and loader is not None):
        return Scorer(criterion, l2, model, False, {})
    if criterion not in DATA and criterion != "fisher":
        return Scorer(criterion, WEIGHTS.get(criterion, l1), model, criterion == "bn_scale", {})
    if loader is None:
        raise ConfigError(
            f"The criterion `{criterion}` needs data.",
            where="loader",
            hint="Give loader=…, an iterable of batches; on the command line, --data.",
        )
    return Scorer(criterion, l1, model, False, statistics(model, axes, loader, gradients=criterion == "taylor"))


def statistics(
    model: TracedModel, axes: Mapping[str, int], batches: Iterable[Any], *, gradients: bool = False
) -> dict[str, Tensor]:
    """Scores of the channels of some nodes, batch by batch: mean absolute activation, or mean |sum of gradient x activation|.

    The model runs in eval mode and is left as it was.

    Raises:
        ConfigError: no batch, or batches without labels that go with the output where gradients are asked for.
    """
    total: dict[str, Tensor] = {}
    samples = 0
    with mode(model.graph_module, training=False):
        for batch in batches:
            inputs, labels = model.inputs_in(batch, where=f"The criterion `{'taylor' if gradients else 'activation'}`")
            found = _gradients(model, axes, inputs, labels) if gradients else _activations(model, axes, inputs)
            samples += 1
            total = {name: total.get(name, 0) + value for name, value in found.items()}
    if not samples:
        raise ConfigError(
            "The loader yielded no batch.", where="loader", hint="Give an iterable of batches (inputs, labels)."
        )
    return {name: value / samples for name, value in total.items()}


def on_example(model: TracedModel, axes: Mapping[str, int]) -> dict[str, Tensor]:
    """Mean absolute activation of the channels of some nodes on the example inputs."""
    with mode(model.graph_module, training=False):
        return _activations(model, axes, model.example_values)


def _activations(model: TracedModel, axes: Mapping[str, int], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    with torch.no_grad():
        _, found = run_keeping(model.graph_module, axes, *inputs)
    return {name: value.double().abs().mean(_others(value, axes[name])).cpu() for name, value in found.items()}


def _gradients(
    model: TracedModel, axes: Mapping[str, int], inputs: tuple[Any, ...], labels: Tensor | None
) -> dict[str, Tensor]:
    if labels is None:
        raise ConfigError("The criterion `taylor` needs labels.", where="loader", hint="Give batches (inputs, labels).")
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.enable_grad():
        _, seen = run_keeping(model.graph_module, {*axes, model.logits}, *leaves)
        watched = {name: value for name, value in seen.items() if value.requires_grad}
        scores = seen[model.logits].float()
        loss = _loss(scores, labels, compared_input(tensors_of(inputs), labels), model.logits)
        grads = torch.autograd.grad(loss, list(watched.values()), allow_unused=True)
    found = {}
    for (name, value), grad in zip(watched.items(), grads, strict=True):
        if name in axes and grad is not None:
            product = (value.detach() * grad).double()
            batch = model.facts[name].batch_axis
            places = [axis for axis in _others(value, axes[name]) if axis != batch]
            each = product.sum(places, keepdim=True) if places else product
            found[name] = each.abs().sum(_others(each, axes[name])).cpu()
    return found


def _loss(scores: Tensor, labels: Tensor, first: Tensor | None, output: str) -> Tensor:
    """The loss of the task that labels and outputs show."""
    try:
        task = infer_task(scores, labels, first)
    except ConfigError as error:
        raise ConfigError(
            f"The criterion `taylor` takes the gradient of the task's loss, but labels of shape {tuple(labels.shape)} do not go "
            f"with the output `{output}` of shape {tuple(scores.shape)}.",
            where="loader",
            got=tuple(labels.shape),
            expected=tuple(scores.shape[:1] + scores.shape[2:]),
            hint="Give a class for every row (and place) of the output, or values in its shape, or take another criterion.",
        ) from error
    prepared, read = task.prepare(scores, task.read(labels))
    assert read is not None
    task.check(prepared, read)
    return task.loss(prepared, read)


def _others(value: Tensor, axis: int) -> list[int]:
    return [k for k in range(value.dim()) if k != axis]


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` entries with the highest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
