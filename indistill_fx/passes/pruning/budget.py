"""Decide which classes of channels stay: by widths, by a ratio, or by a budget of work or parameters.

Rules, in order:
  1. A class is scored by the weights that make it: each layer's scores are brought to mean 1, and a class gets the mean over the
     layers that make it. So scores can be compared over the whole network.
  2. `widths`: the best classes of that layer, exactly as many as asked for.
  3. `ratio`: in every group the best classes, round(ratio x size), at least one. A layer that only hands on channels of several groups
     (a depthwise one after a channel shuffle) gets round(ratio x size) too, by the exchanges inside groups that cost least.
  4. `macs`, `params`: the best classes of the whole network; of every group at least a tenth. The largest network within the budget.
  5. `round_to` rounds every group up to a multiple, by its next best classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, lcm

import numpy as np

from indistill_fx.errors import PruneError
from indistill_fx.passes.pruning.dependencies import Coupling, Units
from indistill_fx.passes.pruning.groups import Classes, Group, Mask
from indistill_fx.traced import TracedModel

FLOOR = 0.1
"""Smallest part of a group that a budget leaves."""


def by_ratio(classes: Classes, stay: Mask, ratio: float, round_to: int | None, settled: Mask) -> Mask:
    """Rule 3, for the groups that no width has settled."""
    stay = stay.copy()
    for group in classes.groups:
        if not settled[group.classes].any():
            _keep_best(classes, group, stay, max(1, floor(len(group.classes) * ratio + 0.5)), round_to)
    return stay


def even_out(classes: Classes, found: Coupling, stay: Mask, ratio: float, round_to: int | None, settled: Mask) -> Mask:
    """Rule 3, second sentence. Every group keeps its number of classes; a layer with no possible exchange keeps its width."""
    stay, touched, group_of = stay.copy(), settled.copy(), np.full(len(stay), -1)
    for k, group in enumerate(classes.groups):
        group_of[group.classes] = k
    for made in found.made:
        class_of = classes.class_of[made.units]
        if len(set(group_of[class_of].tolist())) < 2:
            continue
        members, channels = np.unique(class_of, return_counts=True)
        if (channels != channels[0]).any():
            continue
        layer = Group(made.path, members, int(channels[0]))
        target = rounded(max(1, floor(len(members) * ratio + 0.5)), layer, round_to)
        inside = np.zeros(len(stay), dtype=bool)
        inside[members] = True
        while (kept_count := int(stay[members].sum())) != target:
            pair = _exchange(classes, group_of, stay, inside, touched, more=kept_count < target)
            if pair is None:
                break
            stay[list(pair)] = ~stay[list(pair)]
        touched[members] = True
    return stay


def _exchange(
    classes: Classes, group_of: Units, stay: Mask, inside: Mask, touched: Mask, *, more: bool
) -> tuple[int, int] | None:
    """The best pair to exchange: a class of the layer and one of the same group in another layer. None if there is none."""
    best: tuple[float, int, int] | None = None
    for k in np.unique(group_of[inside & ~touched]).tolist():
        same_group = (group_of == k) & ~touched if k >= 0 else np.zeros(len(stay), dtype=bool)
        inside_classes, outside_classes = (
            np.flatnonzero(same_group & inside & (stay != more)),
            np.flatnonzero(same_group & ~inside & (stay == more)),
        )
        if not len(inside_classes) or not len(outside_classes):
            continue
        sign = 1 if more else -1  # add the best channels, or remove the worst
        a = inside_classes[np.argmax(sign * classes.scores[inside_classes])]
        b = outside_classes[np.argmin(sign * classes.scores[outside_classes])]
        loss = sign * float(classes.scores[b] - classes.scores[a])
        if best is None or loss < best[0]:
            best = loss, int(a), int(b)
    return None if best is None else best[1:]


def _keep_best(classes: Classes, group: Group, stay: Mask, count: int, round_to: int | None) -> None:
    count = rounded(count, group, round_to)
    order = np.argsort(-classes.scores[group.classes], kind="stable")
    stay[group.classes] = False
    stay[group.classes[order[:count]]] = True


def rounded(count: int, group: Group, round_to: int | None) -> int:
    """A number of classes whose channels are a multiple; all of them if there are too few."""
    if not round_to:
        return count
    step = lcm(round_to, group.channels) // group.channels
    return min(len(group.classes), ceil(count / step) * step)


def why_frozen(found: Coupling, classes: Classes) -> str:
    """A sentence with up to three reasons why layers cannot lose channels; empty where there are none."""
    made = {k for layer in found.made for k in classes.class_of[layer.units].tolist()}  # not the network's inputs
    reasons = [reason for _, reason in found.recomputed] + [why for k, why in classes.reasons.items() if k in made]
    reasons = list(dict.fromkeys(reasons))[:3]
    return f" Some layers cannot lose channels: {'; '.join(reasons)}." if reasons else ""


def nothing_free(found: Coupling, classes: Classes) -> PruneError:
    """The error of a network in which every channel must stay."""
    return PruneError(
        f"No channel of this network can be removed.{why_frozen(found, classes)}",
        where="budget",
        hint="Take another teacher, or a student of your own with `distill`.",
    )


def by_budget(
    classes: Classes,
    found: Coupling,
    stay: Mask,
    fits: Callable[[Mask], bool],
    size: Callable[[Mask], str],
    round_to: int | None,
    settled: Mask,
    wanted: str,
) -> Mask:
    """Rule 4: the most classes that fit, the best of the whole network first.

    Raises:
        PruneError: even the smallest network does not fit.
    """
    open_groups = [group for group in classes.groups if not settled[group.classes].any()]
    pool = np.concatenate([group.classes for group in open_groups]) if open_groups else np.array([], dtype=np.int64)
    order = pool[np.argsort(-classes.scores[pool], kind="stable")]

    def best(count: int) -> Mask:
        chosen = np.zeros(len(stay), dtype=bool)
        chosen[order[:count]] = True
        result = stay.copy()
        for group in open_groups:
            least = max(1, ceil(FLOOR * len(group.classes)))
            _keep_best(classes, group, result, max(least, int(chosen[group.classes].sum())), round_to)
        return result

    if not fits(best(0)):
        if not classes.groups:
            raise nothing_free(found, classes)
        raise PruneError(
            f"The network cannot be made smaller than {size(best(0))}, but the budget is {wanted}: every layer keeps at least "
            f"{FLOOR:.0%} of its channels, and outputs keep all of theirs.{why_frozen(found, classes)}",
            where="budget",
            got=wanted,
            expected=size(best(0)),
            hint="Give a larger budget, or name widths.",
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(best(middle)) else (low, middle - 1)
    return best(low)


def by_widths(
    classes: Classes, found: Coupling, model: TracedModel, widths: Mapping[str, int], stay: Mask
) -> tuple[Mask, Mask]:
    """Rule 2; returns what stays, and which classes are settled.

    Raises:
        PruneError: a width the layer cannot have, or that another request rules out.
    """
    stay, owner = stay.copy(), np.full(len(stay), -1)
    taps, grouped = list(widths), {int(k) for group in classes.groups for k in group.classes}
    sizes = {tap: len(np.unique(_classes_of(classes, found, model, tap))) for tap in taps}
    for tap in sorted(taps, key=lambda t: sizes[t]):
        at = _classes_of(classes, found, model, tap)
        members, channels = np.unique(at, return_counts=True)
        fixed = np.array([k in classes.reasons or k not in grouped or owner[k] >= 0 for k in members.tolist()])
        _choose(
            classes,
            tap,
            widths,
            members,
            channels,
            fixed,
            stay,
            [taps[k] for k in dict.fromkeys(owner[members].tolist()) if k >= 0],
        )
        owner[members[~fixed]] = taps.index(tap)
    return stay, owner >= 0


def _choose(
    classes: Classes,
    tap: str,
    widths: Mapping[str, int],
    members: Units,
    channels: Units,
    fixed: Mask,
    stay: Mask,
    others: Sequence[str],
) -> None:
    """Keep the best of the classes that are still undecided, so that the layer has the requested width."""
    width, total = widths[tap], int(channels.sum())
    open_ones, size = members[~fixed], channels[~fixed]
    kept_count = int(channels[fixed & stay[members]].sum())
    if others and (kept_count + int(size.sum()) < width or (len(open_ones) == 0 and kept_count != width)):
        raise PruneError(
            f"`{tap}`: asked for {width} of its {total} channels, but it is tied to `{others[0]}`, "
            f"for which {widths[others[0]]} are asked; "
            "give both the same width.",
            where=tap,
            got=width,
            expected=kept_count,
        )
    if len(open_ones) == 0 and kept_count != width:
        reason = classes.reasons.get(int(members[0]), "no rule covers what makes them")
        raise PruneError(
            f"`{tap}`: none of its {total} channels can be removed: {reason}.",
            where=tap,
            got=width,
            hint="Leave it out, or narrow a layer with fewer dependents.",
        )
    if len(open_ones) == 0:
        return
    each = int(size[0])
    if (size != each).any() or (width - kept_count) % each or width - kept_count < each:
        raise PruneError(
            f"`{tap}`: asked for {width} of its {total} channels, but only {each} at a time can be removed ({kept_count} always stay).",
            where=tap,
            got=width,
            expected=f"{kept_count} plus a multiple of {each}",
            hint=f"Give {kept_count + max(1, round((width - kept_count) / each)) * each}.",
        )
    order = np.argsort(-classes.scores[open_ones], kind="stable")
    stay[open_ones] = False
    stay[open_ones[order[: (width - kept_count) // each]]] = True


def _classes_of(classes: Classes, found: Coupling, model: TracedModel, tap: str) -> Units:
    known, node = model.facts_of(tap), model.node(tap)
    units = None if known.channel_axis is None else found.axes.get((node.name, known.channel_axis))
    if units is None:
        raise PruneError(
            f"`{tap}` makes no channels that could be removed: its tensor ({'x'.join(map(str, known.shape))}) is fixed.",
            where=tap,
            hint="Name a layer that has filters, such as a convolution.",
        )
    return classes.class_of[units]
