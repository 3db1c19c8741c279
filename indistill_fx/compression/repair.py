"""Repair a shrunk network before training, with unlabelled batches: its norms, and the weights that read removed channels.

Both networks run side by side, node by node, on the same batches:
  - `readers`: the weights of a convolution or linear layer are refitted, by least squares, so that from what arrives in the smaller
    network it reproduces the original's outputs at the remaining channels. Later layers see the outputs of repaired earlier ones.
  - `norms`: a batch norm's statistics are those of what arrives in the smaller network.

Source: least squares on a layer's outputs: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017. Deviations:
every reader, not only those of pruned channels; fitted in order on the repaired inputs; regularised towards their old weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import evaluating
from indistill_fx.passes.channels.call import Call, read_call
from indistill_fx.passes.contract import PassResult
from indistill_fx.traced import TracedModel

_PULLS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights of the pull towards the old weights, in parts of the mean square of what arrives; held-out samples decide."""
_START = 2
"""Where among them the search begins. Each one tried costs a factorisation, which for wide layers is most of the repair's time."""
_HELD_OUT = 4
"""One of so many samples of every batch is held out while the pull is chosen."""
_ROWS = 1 << 16
"""Positions of one batch that a layer's fit looks at, at most."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was repaired.

    Attributes:
        norms: layers with new statistics.
        readers: layers with new weights, and the mean squared error of their outputs before and after, relative to the outputs' own
            square, on a quarter of the samples that was held out.
        skipped: layers that were left, and why.
    """

    norms: tuple[str, ...]
    readers: Mapping[str, tuple[float, float]]
    skipped: tuple[str, ...]


def repair(
    original: TracedModel,
    smaller: TracedModel,
    axes: Mapping[tuple[str, int | str], Sequence[int]],
    batches: Iterable[Any],
    *,
    norms: bool = True,
    readers: bool = True,
) -> PassResult[TracedModel, Repaired]:
    """A repaired copy.

    Args:
        original: traced.
        smaller: what `shrink` made of it; it is not changed.
        axes: the entries that stayed (`ShrinkReport.axes`).
        batches: unlabelled ones do.
        norms: re-estimate the statistics of batch norms.
        readers: fit convolutions and linear layers.

    Raises:
        ConfigError: no batches, or none that go with the model.
    """
    inputs = [original.inputs_in(batch, where="The repair")[0] for batch in batches]
    if not inputs:
        raise ConfigError(
            "There are no batches to repair from.", where="loader", hint="Give a loader with at least one batch."
        )
    new = copy.deepcopy(smaller.graph_module)
    run = _SideBySide(original, smaller, new, axes, inputs)
    with evaluating(original.graph_module), _evaluating_only(new):
        report = run.walk(norms=norms, readers=readers)
    return PassResult(replace(smaller, graph_module=new, module=new), report)


class _evaluating_only:  # noqa: N801
    """Eval mode and no gradients, for a network whose weights are overwritten."""

    def __init__(self, module: torch.nn.Module):
        self.flags = [(part, part.training) for part in module.modules()]
        self.gradients = torch.no_grad()

    def __enter__(self) -> None:
        self.gradients.__enter__()
        for part, _ in self.flags:
            part.training = False

    def __exit__(self, *error: Any) -> None:
        self.gradients.__exit__(*error)
        for part, flag in self.flags:
            part.training = flag


class _SideBySide:
    def __init__(
        self,
        original: TracedModel,
        smaller: TracedModel,
        new: fx.GraphModule,
        axes: Mapping[tuple[str, int | str], Sequence[int]],
        inputs: Sequence[Sequence[Any]],
    ):
        self.original, self.facts, self.new, self.axes = original, smaller.facts, new, axes
        self.large = [_Steps(original.graph_module, given) for given in inputs]
        self.small = [_Steps(new, given) for given in inputs]

    def walk(self, *, norms: bool, readers: bool) -> Repaired:
        """Run both networks node by node, in step, and repair the smaller one on the way."""
        norms_done: list[str] = []
        fitted: dict[str, tuple[float, float]] = {}
        skipped: list[str] = []
        done: set[int] = set()
        for node in self.new.graph.nodes:
            for steps in self.large:
                steps.until(node.name)
            call = read_call(node, self.facts) if node.op.startswith("call") and node.name in self.facts else None
            if call is not None and norms and call.op == "batch_norm":
                if self._norm(call):
                    norms_done.append(call.path)
            elif call is not None and readers and call.op in ("conv", "linear"):
                why = self._reader(call, fitted, done)
                if why:
                    skipped.append(f"{call.path}: {why}")
            for steps in self.small:
                steps.one(node)
        return Repaired(tuple(dict.fromkeys(norms_done)), fitted, tuple(skipped))

    def _norm(self, call: Call) -> bool:
        mean, var = call.constant("running_mean"), call.constant("running_var")
        if mean is None or var is None:
            return False
        count, total, squares = (
            0,
            torch.zeros_like(mean, dtype=torch.float64),
            torch.zeros_like(var, dtype=torch.float64),
        )
        for steps in self.small:
            x = steps.env[call.input].double().transpose(0, 1).flatten(1)
            count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
        if count < 2:
            return False
        mean_now = total / count
        mean.copy_(mean_now)
        var.copy_((squares / count - mean_now.square()).clamp_min(0) * count / (count - 1))
        return True

    def _reader(self, call: Call, fitted: dict[str, tuple[float, float]], done: set[int]) -> str:
        """Fit one layer; returns the reason if it was not fitted, or an empty text."""
        weight, bias = call.constant("weight"), call.constant("bias")
        if weight is None or weight.dim() not in (2, 4) or not isinstance(weight, torch.nn.Parameter):
            return "its weights are computed, or it is not a layer of vectors or images"
        if id(weight) in done:
            return "it shares its weights with another layer, with which they are fitted"
        if call.op == "conv" and (call.get("groups", 1) != 1 or call.get("padding_mode", "zeros") != "zeros"):
            return "its groups read single channels" if call.get("groups", 1) != 1 else "its padding is not zeros"
        if call.op == "conv" and isinstance(call.get("padding", 0), str):
            return "its padding is given by name, not as numbers"
        done.add(id(weight))
        axis = self.facts[call.node.name].channel_axis
        kept = self.axes.get((call.node.name, axis)) if axis is not None else None
        # one part to fit with, one held out
        sums = [_Sums(weight[0].numel() + (bias is not None), weight) for _ in range(2)]
        for large, small in zip(self.large, self.small, strict=True):
            x, y = _rows(call, small.env[call.input], bias is not None), large.value(call.node.name)
            y = y if kept is None else y.index_select(axis or 0, torch.tensor(kept, device=y.device))
            y = y.movedim(1, -1).flatten(0, -2) if call.op == "conv" else y.flatten(0, -2)
            if len(x) > _ROWS:
                sampled = torch.linspace(0, len(x) - 1, _ROWS, device=x.device).long()
                x, y = x[sampled], y[sampled]
            first = len(x) - len(x) // _HELD_OUT  # rows are in sample order, so the held-out samples are the last ones
            sums[0].add(x[:first], y[:first])
            sums[1].add(x[first:], y[first:])
        before = torch.cat([weight.flatten(1), *([bias[:, None]] if bias is not None else [])], 1).double().T
        strength, error = _best_pull(lambda pull: sums[1].error(sums[0].fit(before, pull)))
        errors = sums[1].error(before), error
        after = (sums[0] + sums[1]).fit(before, strength)
        if not bool(after.isfinite().all()) or not errors[1] < errors[0]:
            return "fitting did not reduce the error on the held-out samples"
        flat = after.T
        weight.copy_(flat[:, : weight[0].numel()].reshape(weight.shape))
        if bias is not None:
            bias.copy_(flat[:, -1])
        fitted[call.path] = errors
        return ""


def _best_pull(error_of: Callable[[float], float]) -> tuple[float, float]:
    """The pull with the least error, and that error: from the middle of `_PULLS` on in the direction in which the error falls."""
    found = {k: error_of(_PULLS[k]) for k in (_START, _START + 1)}
    step = 1 if found[_START + 1] < found[_START] else -1
    best = max(found) if step == 1 else _START
    while 0 <= best + step < len(_PULLS):
        found[best + step] = error_of(_PULLS[best + step])
        if not found[best + step] < found[best]:
            break
        best += step
    return _PULLS[best], found[best]


class _Sums:
    """The sums of a least-squares fit from rows x to targets y: x'x, x'y, y'y."""

    def __init__(self, size: int, weight: Tensor):
        self.gram, self.cross = (weight.new_zeros(size, n, dtype=torch.float64) for n in (size, len(weight)))
        self.power = weight.new_zeros((), dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        self.gram += (x.T @ x).double()
        self.cross += (x.T @ y).double()
        self.power += y.double().square().sum()

    def __add__(self, other: _Sums) -> _Sums:
        both = copy.copy(self)
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        both.power = self.power + other.power
        return both

    def fit(self, old: Tensor, strength: float) -> Tensor:
        """The weights (inputs, outputs) with the least squared error, regularised towards the old ones with `strength`."""
        weight = strength * self.gram.diagonal().mean().clamp_min(1e-12)
        matrix, wanted = self.gram.clone(), self.cross + weight * old
        matrix.diagonal().add_(weight)
        root, failed = torch.linalg.cholesky_ex(matrix)
        fitted: Tensor = torch.linalg.solve(matrix, wanted) if failed else torch.cholesky_solve(wanted, root)
        return fitted

    def error(self, weights: Tensor) -> float:
        """Squared error relative to the squared targets."""
        rest = self.power - 2 * (weights * self.cross).sum() + (weights * (self.gram @ weights)).sum()
        return float(rest / self.power.clamp_min(1e-30))


def _rows(call: Call, x: Tensor, ones: bool) -> Tensor:
    """A layer's inputs as rows, one for each position, with a 1 appended for the bias."""
    if call.op == "conv":
        kernel = tuple((call.constant("weight")).shape[2:])  # type: ignore[union-attr]
        options = {name: call.get(name, default) for name, default in (("dilation", 1), ("padding", 0), ("stride", 1))}
        x = F.unfold(x, kernel, **options).transpose(1, 2)
    x = x.flatten(0, -2)
    return torch.cat([x, x.new_ones(len(x), 1)], 1) if ones else x


class _Steps(fx.Interpreter):
    """Runs a graph one node at a time, and frees values that are no longer read."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]):
        super().__init__(graph_module)
        self.args_iter = iter(inputs)
        self.order = list(graph_module.graph.nodes)
        self.at = 0
        self.last = {source: node for node in self.order for source in node.all_input_nodes}
        self.names = {node.name: k for k, node in enumerate(self.order)}
        self.held: str = ""

    def one(self, node: fx.Node) -> None:
        """Compute a node."""
        self.env[node] = self.run_node(node)
        for source in node.all_input_nodes:
            if self.last[source] is node:
                self.env.pop(source, None)

    def until(self, name: str) -> None:
        """Compute all nodes up to the one of that name."""
        end = self.names.get(name, -1)
        while self.at <= end:
            self.one(self.order[self.at])
            self.at += 1

    def value(self, name: str) -> Tensor:
        """A node's value; it must be the one just computed."""
        value: Tensor = self.env[self.order[self.names[name]]]
        return value
