"""Groups of channels that stay or go together: what each is worth, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from indistill_fx.passes.pruning.criteria import UNITS, Scorer
from indistill_fx.passes.pruning.dependencies import Coupling, Made, Units
from indistill_fx.passes.pruning.fisher import fisher_scores

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Group:
    """Classes whose first maker is one layer, the same number of its channels each.

    Attributes:
        path: of that layer.
        classes: their numbers.
        channels: how many of the layer's channels each of them holds.
    """

    path: str
    classes: Units
    channels: int


@dataclass(frozen=True, slots=True)
class Classes:
    """Classes of units.

    Attributes:
        class_of: the class of each unit.
        scores: of each class; the highest stay.
        groups: of classes that may go.
        reasons: why a class stays.
    """

    class_of: Units
    scores: NDArray[np.float64]
    groups: tuple[Group, ...]
    reasons: Mapping[int, str]


def classify(found: Coupling, scorer: Scorer, loader: Iterable[Any] | None = None) -> Classes:
    """Join tied units to classes, score these and put them into groups; `loader` is for the criteria that score classes by data.

    Raises:
        PruneError: a layer's weights are not numbers.
    """
    class_of = join(found)
    count = int(class_of.max(initial=-1)) + 1
    reasons: dict[int, str] = {}
    for units, reason in found.frozen:
        for k in set(class_of[units].tolist()):
            reasons.setdefault(k, reason)
    total, times = np.zeros(count), np.zeros(count)
    paths: dict[str, int] = {}
    first, each = np.full(count, -1), np.zeros(count, dtype=np.int64)
    for made in found.made:
        scores = _scores(made, scorer)
        classes = class_of[made.units]
        np.add.at(total, classes, scores)
        np.add.at(times, classes, 1)
        members, channels = np.unique(classes, return_counts=True)
        new = first[members] < 0
        first[members[new]] = paths.setdefault(made.path, len(paths))
        each[members[new]] = channels[new]
    free = first >= 0
    free[list(reasons)] = False
    groups = _groups(np.flatnonzero(free), first, each, list(paths))
    known = Classes(class_of, total / np.maximum(times, 1), groups, reasons)
    if scorer.name in UNITS and loader is not None:
        known = replace(known, scores=fisher_scores(scorer.model, found, class_of, loader, instead=known.scores))
    return replace(known, scores=_isomorphic(found, known)) if scorer.name == "isomorphic" else known


def _isomorphic(found: Coupling, classes: Classes) -> NDArray[np.float64]:
    """Scores as ranks among the groups of one structure, in (0, 1], so that a budget takes as much of every structure.

    Source: Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024. Deviation: two groups are of one structure if their channels
    stand at the same operations, as many times.
    """
    group_of = np.full(len(classes.scores), -1)
    for k, group in enumerate(classes.groups):
        group_of[group.classes] = k
    places: list[list[tuple[str, int | str]]] = [[] for _ in classes.groups]
    for (node, axis), units in found.axes.items():
        for k in np.unique(group_of[classes.class_of[units]]).tolist():
            if k >= 0:
                places[k].append((found.ops.get(node, node), axis))
    kinds: dict[object, list[int]] = {}
    for k, channel_places in enumerate(places):
        kinds.setdefault(tuple(sorted(map(str, channel_places))), []).append(k)
    scores = classes.scores.copy()
    for members in kinds.values():
        pool = np.concatenate([classes.groups[k].classes for k in members])
        order = np.argsort(np.argsort(classes.scores[pool], kind="stable"), kind="stable")
        scores[pool] = (order + 1) / len(pool)
    return scores


def join(found: Coupling) -> Units:
    """Connected components, numbered by their first units: roots hook onto the lower root of a pair, until no pair has two.

    SciPy's would do, but its import takes longer than shrinking a ResNet-18.
    """
    root = np.arange(found.count)
    if not found.pairs:
        return root
    a, b = (np.concatenate([pair[side] for pair in found.pairs]) for side in (0, 1))
    while (root[a] != root[b]).any():
        lower = np.minimum(root[a], root[b])
        np.minimum.at(root, np.concatenate([root[a], root[b]]), np.concatenate([lower, lower]))
        while ((onward := root[root]) != root).any():
            root = onward
    return np.unique(root, return_inverse=True)[1].astype(np.int64)


def _scores(made: Made, scorer: Scorer) -> NDArray[np.float64]:
    scores = scorer(made.node, made.path, made.weight)
    if scorer.name != "isomorphic":  # the isomorphic criterion compares layers of equal structure as they are
        scores = scores / scores.mean().clamp_min(1e-30)
    return scores.numpy()


def _groups(free: Units, first: Units, each: Units, paths: Sequence[str]) -> tuple[Group, ...]:
    """Classes grouped by the first layer that makes them, and the number of its channels in each class."""
    _, begins, kind = np.unique(np.stack([first, each])[:, free], axis=1, return_index=True, return_inverse=True)
    by_kind = [free[kind.reshape(-1) == k] for k in np.argsort(begins)]
    return tuple(Group(paths[first[classes[0]]], classes, int(each[classes[0]])) for classes in by_kind)


def refill(found: Coupling, classes: Classes, stay: Mask) -> Mask:
    """No axis may become empty: where one would, its best class stays too."""
    stay = stay.copy()
    arrays = {id(units): units for units in (*found.axes.values(), *found.weights.values())}
    for units in arrays.values():
        own_classes = classes.class_of[units]
        if len(own_classes) and not stay[own_classes].any():
            stay[own_classes[np.argmax(classes.scores[own_classes])]] = True
    return stay


@dataclass(frozen=True, slots=True)
class Cost:
    """Work and parameters of a network as functions of the classes that stay."""

    found: Coupling
    class_of: Units

    def macs(self, stay: Mask) -> int:
        """Multiply-accumulates of one sample."""
        return sum(self.macs_of_nodes(stay).values())

    def macs_of_nodes(self, stay: Mask) -> dict[str, int]:
        """The same, node by node."""
        share, total = self._shares(stay), dict[str, float]()
        for name, macs, axes in self.found.work:
            total[name] = total.get(name, 0.0) + macs * prod(share(units) for units in axes)
        return {name: round(macs) for name, macs in total.items()}

    def params(self, stay: Mask) -> int:
        """Number of parameters."""
        share = self._shares(stay)
        axes: dict[int, list[Units]] = {}
        for (tensor, _), units in self.found.weights.items():
            axes.setdefault(tensor, []).append(units)
        sizes = {
            t: self.found.tensors[t].numel() for t in axes if isinstance(self.found.tensors[t], torch.nn.Parameter)
        }
        removed = sum(size - size * prod(share(units) for units in axes[t]) for t, size in sizes.items())
        return round(self._all_params() - removed)

    def _all_params(self) -> int:
        return sum(
            self.found.tensors[t].numel()
            for t in self.found.tensors
            if isinstance(self.found.tensors[t], torch.nn.Parameter)
        )

    def _shares(self, stay: Mask) -> Callable[[Units], float]:
        known: dict[int, float] = {}

        def share(units: Units) -> float:
            if id(units) not in known:
                known[id(units)] = float(stay[self.class_of[units]].mean()) if len(units) else 1.0
            return known[id(units)]

        return share
