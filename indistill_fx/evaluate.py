"""How good a trained model is: accuracy and loss on a test set, and retrieval with its features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from indistill_fx.bars import followed
from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from indistill_fx.data import Data
    from indistill_fx.traced import TracedModel


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy (0 to 1), mean cross-entropy, number of samples and of classes of a test set."""

    accuracy: float
    loss: float
    count: int
    classes: int

    @property
    def no_better_than_chance(self) -> bool:
        """Whether it is within five points of what guessing one of the classes gets."""
        return self.accuracy < 1 / self.classes + 0.05


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Mean average precision and precision among the first k, by cosine and by Euclidean distance; 0 to 1."""

    map_cosine: float
    map_euclidean: float
    precision_cosine: float
    precision_euclidean: float
    k: int


def evaluate(
    module: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    logits: str | int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Classify a whole test set in eval mode, without gradients; the module is left as it was found.

    Args:
        module: inputs -> logits (batch, classes).
        loader: batches (inputs, labels, …), or dicts of inputs by name with `labels`.
        device: where to compute; the default is where the module lies. The module is not moved.
        logits: which entry of a dict (key) or tuple (place) the logits are.
        progress: show a bar where standard error is a terminal.

    Returns:
        Accuracy, loss, count, classes.

    Raises:
        ConfigError: no batches, no logits, or a label beyond the classes.
    """
    correct, loss, count, classes = 0, 0.0, 0, 0
    for outputs, labels in _outputs(module, loader, device, progress):
        scores = select_logits(outputs, logits)
        _check_labels(labels, scores)
        loss += F.cross_entropy(scores.float(), labels, reduction="sum").item()
        correct += int((scores.argmax(1) == labels).sum())
        count, classes = count + len(labels), scores.shape[1]
    if not count:
        raise ConfigError("The loader has no batches to evaluate on.", where="loader", got=0, expected="at least 1")
    return Evaluation(correct / count, loss / count, count, classes)


def embed(
    module: nn.Module | Callable[..., Any],
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Features of a whole data set, in eval mode, without gradients; a module is left as it was found.

    Args:
        module: inputs -> features (batch, ...): a module, a module's method, or a function, whose modules are yours to
            put in eval mode.
        loader: as for `evaluate`.
        device: as for `evaluate`.
        progress: as for `evaluate`.

    Returns:
        Features (count, width), flattened per sample, and labels (count,), both on the CPU.
    """
    batches = [(f.flatten(1).cpu(), labels.cpu()) for f, labels in _outputs(module, loader, device, progress)]
    if not batches:
        raise ConfigError("The loader has no batches to embed.", where="loader", got=0, expected="at least 1")
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)


def evaluate_retrieval(
    model: TracedModel, data: Data, *, k: int = 100, tap: str | None = None, progress: bool = False
) -> Retrieval:
    """Retrieve training images by test images with one layer's features; see `retrieval`.

    Args:
        model: traced; it is left as it was found, and nothing behind the tap is computed.
        data: its test set gives the queries, its plain training set the database.
        k: precision is taken among the first k.
        tap: whose features; the default is the penultimate vector.
        progress: as for `evaluate`.

    Returns:
        The measures.

    Raises:
        ConfigError: no such tap, or the model has no penultimate vector.
    """
    from indistill_fx.passes.instrument import cut

    tap = tap or _penultimate(model)
    part = _Feature(cut(model, [tap]), tap)
    (query, query_labels), (database, database_labels) = (
        embed(part, loader, progress=progress) for loader in (data.test, data.train_plain)
    )
    return retrieval(query, query_labels, database, database_labels, k=k)


def retrieval(
    query: Tensor,
    query_labels: Tensor,
    database: Tensor,
    database_labels: Tensor,
    *,
    k: int = 100,
    block: int = 256,
    interpolate: bool = True,
) -> Retrieval:
    """Rank the database for every query; a database sample of the query's class is relevant.

    Average precision of a query: the mean, over recall r = 0, 0.1, …, 1, of the highest precision at any rank whose
    recall is at least r. Only `block` queries are ranked at a time. Where scores tie, irrelevant samples are counted
    first.

    Args:
        query: (queries, width).
        query_labels: (queries,).
        database: (samples, width).
        database_labels: (samples,).
        k: precision is taken among the first k.
        block: queries ranked at a time.
        interpolate: False takes, for r > 0, the precision at the very rank where recall r is reached.

    Returns:
        Means over the queries.

    Raises:
        ConfigError: widths differ, the database has fewer than k samples or none of a query's class, or a feature is
            not finite.

    Source:
        The protocol of Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV
        2018.
        Deviation: the authors' code (and InDistill's, hence its published figures) interpolates over the first ranks
        only, as many as its batch has queries (128). `interpolate=False` comes within 0.2 points of those figures; on
        CIFAR-10 they lie 0.2 to 0.9 points below the interpolated ones.
    """
    _check_retrieval(query, query_labels, database, database_labels, k)
    query, database = (x if x.dtype == torch.float64 else x.float() for x in (query, database))
    order = torch.argsort(database_labels, stable=True)
    database, database_labels = database[order], database_labels[order]
    directions = F.normalize(database, dim=1).T
    middle = database.mean(0)  # distances do not change, their rounding shrinks
    offsets = (database - middle).T
    lengths = offsets.square().sum(0)
    sums = np.zeros(4)
    for label in torch.unique(query_labels).tolist():
        relevant = _range(database_labels, label)
        for part in torch.split(query[query_labels == label], block):
            cosine = F.normalize(part, dim=1) @ directions
            nearness = 2 * (part - middle) @ offsets - lengths  # orders as the Euclidean distance does
            sums += [*_scored(cosine, relevant, k, interpolate), *_scored(nearness, relevant, k, interpolate)]
    map_cosine, precision_cosine, map_euclidean, precision_euclidean = (sums / len(query)).tolist()
    return Retrieval(map_cosine, map_euclidean, precision_cosine, precision_euclidean, k)


def select_logits(outputs: Any, logits: str | int | None = None) -> Tensor:
    """The logits in a model's output.

    Args:
        outputs: a tensor, or a dict, tuple or object with attributes.
        logits: the key or place; not read where the output is one tensor, so that it may serve for a teacher and a
            student of which only one returns several.

    Returns:
        (batch, classes).

    Raises:
        ConfigError: there is no such entry, or it is no (batch, classes) tensor.
    """
    value = outputs
    if logits is not None and not isinstance(outputs, Tensor):
        try:
            value = outputs[logits]
        except (KeyError, IndexError, TypeError):
            value = getattr(outputs, str(logits), None)
    if isinstance(value, Tensor) and value.ndim == 2:
        return value
    shown = (
        f"a dict of {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
    )
    shown = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else shown
    raise ConfigError(
        f"The model gives {shown}, " + ("not logits." if logits is None else f"in which {logits!r} is not the logits."),
        where="logits",
        got=type(value).__name__,
        expected="a tensor (batch, classes)",
        hint="Say which entry holds the logits: logits=KEY (--logits KEY).",
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every submodule's own flag restored after."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, flag in flags:
            part.training = flag


def _penultimate(model: TracedModel) -> str:
    """The vector that the last layer with weights reads."""
    layers = [
        node for node in model.graph_module.graph.nodes if node.name in model.facts and model.facts[node.name].macs
    ]
    read = layers[-1].all_input_nodes[0].name if layers else ""
    if read not in model.facts or model.facts[read].kind != "vector":
        raise ConfigError("The model has no penultimate vector.", where="tap", hint="Name a layer: tap=….")
    return model.tap_name(read)


class _Feature(nn.Module):
    """One feature of a cut graph."""

    def __init__(self, graph: nn.Module, tap: str):
        super().__init__()
        self.graph, self.tap = graph, tap

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        features, _ = self.graph(*inputs, **named)
        feature: Tensor = features[self.tap]
        return feature


def _outputs(
    module: nn.Module | Callable[..., Any], loader: Iterable[Any], device: torch.device | str | None, progress: bool
) -> Iterator[tuple[Any, Tensor]]:
    owner = module if isinstance(module, nn.Module) else getattr(module, "__self__", None)
    owner = owner if isinstance(owner, nn.Module) else nn.Module()
    if device is None:
        device = next((p.device for p in (*owner.parameters(), *owner.buffers())), torch.device("cpu"))
    with evaluating(owner):
        for batch in followed(loader, "Evaluating", shown=progress):
            if isinstance(batch, Mapping):
                inputs = {key: value.to(device) for key, value in batch.items() if key not in ("labels", "indices")}
                yield module(**inputs), batch["labels"].to(device)
            else:
                yield module(batch[0].to(device)), batch[1].to(device)


def _check_labels(labels: Tensor, scores: Tensor) -> None:
    wrong = labels[(labels < 0) | (labels >= scores.shape[1])]
    if len(wrong):
        raise ConfigError(
            f"Label {int(wrong[0])} is out of range: the model has {scores.shape[1]} classes.",
            where="labels",
            got=int(wrong[0]),
            expected=f"0 to {scores.shape[1] - 1}",
            hint="Check that model and data have the same classes.",
        )


def _check_retrieval(query: Tensor, query_labels: Tensor, database: Tensor, database_labels: Tensor, k: int) -> None:
    if query.ndim != 2 or database.ndim != 2 or query.shape[1] != database.shape[1]:
        raise ConfigError(
            f"Queries {tuple(query.shape)} and database {tuple(database.shape)} are not vectors of one width.",
            where="retrieval",
        )
    if not 1 <= k <= len(database):
        raise ConfigError(f"k is {k}, but the database has {len(database)} samples.", where="k", got=k)
    if not (query.isfinite().all() and database.isfinite().all()):
        raise ConfigError("A feature is not finite, so nothing can be ranked by it.", where="retrieval")
    alone = query_labels[~torch.isin(query_labels, database_labels)]
    if len(alone):
        raise ConfigError(
            f"The database has no sample of class {int(alone[0])}, of which there are queries.",
            where="retrieval",
            got=int(alone[0]),
            hint="Give queries of the database's classes only.",
        )


def _range(sorted_labels: Tensor, label: int) -> slice:
    ends = torch.searchsorted(sorted_labels, torch.tensor([label, label + 1]))
    return slice(int(ends[0]), int(ends[1]))


def _scored(scores: Tensor, relevant: slice, k: int, interpolate: bool) -> tuple[float, float]:
    """Sums over the block's queries of average precision and precision at k.

    Ranks come from sorting the relevant and the irrelevant scores apart: numpy sorts plain numbers ten times as fast as
    torch sorts with indices.
    """
    values = scores.numpy()
    hits = np.sort(values[:, relevant], axis=1)[:, ::-1]
    others = np.sort(np.delete(values, relevant, axis=1), axis=1)
    better = others.shape[1] - torch.searchsorted(torch.from_numpy(others), torch.from_numpy(hits.copy())).numpy()
    found = np.arange(1, hits.shape[1] + 1)
    ranks = found + better
    precision: NDArray[Any] = found / ranks
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    places = [-(-tenths * len(found) // 10) - 1 for tenths in range(1, 11)]
    at_recall = (highest if interpolate else precision)[:, places]
    averages = (highest[:, 0] + at_recall.sum(1)) / 11
    return float(averages.sum()), float((ranks <= k).sum() / k)
