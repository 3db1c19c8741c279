"""What a batch is. A loader may give it in many forms; here it is taken apart, and nowhere else.

A batch is one tensor of inputs; a sequence of the inputs in order, then the labels, then the sample indices; or entries by name: a
mapping of any kind, a dataclass, a named tuple. By name, every model gets the inputs that its signature asks for, and what nobody asks
for (file names, masks of another model) is left alone. A model of one input gets the only one that there is, whatever its name.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.errors import ConfigError

LABELS = ("labels", "label", "targets", "target")
"""Names of the labels; the first one that is there counts."""
INDICES = "indices"
"""Name of the samples' places in the data set."""
FEATURES = "teacher_features"
"""Name of the teacher's features in a batch of a stage that has no teacher of its own."""
LEFT_OUT = "left_out"
"""Key in the meta of a graph's inputs: the optional arguments of the model that it was captured without."""
Sizes = tuple[int | None, ...]
"""Of a tensor; None for an axis of any size."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model's forward takes.

    Attributes:
        names: of its arguments, in order.
        required: those without a default; of a model whose arguments all have one, the first.
        anything: whether it takes further arguments by any name.
        owner: whose they are, for messages.
        left_out: of a graph: the model's optional arguments that it was captured without.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    anything: bool = False
    owner: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def by_number(self) -> bool:
        """Whether the only input is the index of each sample, as for a teacher of saved outputs."""
        return self.required == (INDICES,)

    @staticmethod
    def of(model: nn.Module) -> Inputs:
        """The inputs of a module, from its forward's signature; of a graph, from its placeholders."""
        if isinstance(model, fx.GraphModule):
            nodes = [node for node in model.graph.nodes if node.op == "placeholder"]
            names = tuple(str(node.target) for node in nodes)
            required = tuple(str(node.target) for node in nodes if not node.args) or names[:1]
            left_out = next((node.meta[LEFT_OUT] for node in nodes if LEFT_OUT in node.meta), ())
            return Inputs(names, required, owner=type(model).__name__, left_out=left_out)
        # the wrapper that torch.compile puts around a module
        while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        return dataclasses.replace(Inputs.of_function(model.forward), owner=type(model).__name__)

    def without(self, names: Container[str]) -> Inputs:
        """The inputs without some arguments, which do not come from the batch."""
        names_left, required = (tuple(n for n in given if n not in names) for given in (self.names, self.required))
        return dataclasses.replace(self, names=names_left, required=required)

    @staticmethod
    def of_function(function: Callable[..., Any]) -> Inputs:
        """The inputs of any function, from its signature."""
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        rest = ("input",) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else ()
        names = tuple(p.name for p in named) or rest
        required = tuple(p.name for p in named if p.default is p.empty) or names[:1]
        return Inputs(names, required, any(p.kind is p.VAR_KEYWORD for p in parameters))


@dataclass(frozen=True, slots=True, eq=False)  # older versions of torch.compile hash it before it has its fields
class Call:
    """The arguments of one model's forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, model: Callable[..., Any]) -> Any:
        """The model's output for this batch."""
        return model(*self.args, **self.kwargs)

    @property
    def first(self) -> Tensor | None:
        """The first argument that is a tensor."""
        return next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)), None)

    def plus(self, more: Mapping[str, Any]) -> Call:
        """The call with further arguments."""
        return Call(self.args, {**self.kwargs, **more}) if more else self

    @staticmethod
    def of_example(example: Any, model: Inputs, *, where: str) -> Call:
        """Example inputs as a call.

        Args:
            example: a tensor; the arguments in order; or tensors by name, of which the model gets what it takes.
            model: what it takes.
            where: who asks, for messages.

        Raises:
            ConfigError: by name, an input is missing.
        """
        if isinstance(example, Call):
            return example
        if model.by_number:
            return Call((torch.arange(2),))
        if isinstance(example, Tensor):
            return Call((example,))
        entries = named(example)
        if entries is None or (isinstance(example, tuple) and not _names_tell(entries, (model,))):
            return Call(tuple(example))
        return _by_name(entries, model, example, where)

    def to(self, device: torch.device) -> Call:
        """The call with its tensors on a device."""
        return self.changed(lambda tensor: tensor.to(device))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with a function applied to each of its tensors."""

        def new(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Call(tuple(map(new, self.args)), {name: new(value) for name, value in self.kwargs.items()})

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The arguments by name, in order."""
        found = dict(zip(names, self.args, strict=False)) | {key: v for key, v in self.kwargs.items() if v is not None}
        return {name: found[name] for name in names if name in found}


@dataclass(frozen=True, slots=True)
class Parts:
    """A batch taken apart.

    Attributes:
        calls: one for each of the models, in their order.
        labels: None where there are none.
        indices: likewise, (batch,).
        features: the teacher's, by tap name; None where there are none.
    """

    calls: tuple[Call, ...]
    labels: Tensor | None = None
    indices: Tensor | None = None
    features: Mapping[str, Tensor] | None = None


def named(batch: Any) -> dict[str, Any] | None:
    """The entries of a batch by name; None if it has no names.

    A named tuple has names where they say what is what: where labels are among them, or an input of that name is asked for (`split`).
    """
    if isinstance(batch, Mapping):
        return {str(key): batch[key] for key in batch}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    return None


def split(batch: Any, *models: Inputs, where: str) -> Parts:
    """Take a batch apart for one model or several.

    Args:
        batch: in any of the forms above.
        models: what each takes.
        where: who asks, for messages: `Stage `layer1``.

    Raises:
        ConfigError: it is in none of the forms, an input is missing or no tensor; says which, and what the batch has.
    """
    entries = named(batch)
    if entries is not None and isinstance(batch, tuple) and not _names_tell(entries, models):
        entries = None
    if entries is None:
        return _by_order(batch, models, where)
    labels = next((entries[name] for name in LABELS if name in entries), None)
    indices, features = entries.get(INDICES), entries.get(FEATURES)
    for name, value in (("labels", labels), (INDICES, indices)):
        if value is not None and not isinstance(value, Tensor):
            raise unfit(where, name, f"of type {type(value).__name__}", "a tensor", "Let the loader yield tensors.")
    calls = tuple(_by_name(entries, model, batch, where) for model in models)
    return Parts(calls, _widened(labels), indices, features)


def _names_tell(entries: Mapping[str, Any], models: Sequence[Inputs]) -> bool:
    return any(name in entries for name in LABELS) or all(n in entries for model in models for n in model.required)


def _by_name(entries: Mapping[str, Any], model: Inputs, batch: Any, where: str) -> Call:
    special = {*LABELS, INDICES, FEATURES} - {*model.required}
    free = {name: value for name, value in entries.items() if name not in special}
    chosen = {name: value for name, value in free.items() if name in model.names or model.anything}
    missing = [name for name in model.required if name not in chosen]
    only = [value for value in free.values() if isinstance(value, Tensor)]
    if missing and not chosen and len(model.required) == len(only) == 1:
        return Call((), {missing[0]: only[0]})
    if missing:
        raise ConfigError(
            f"{where} got a batch it cannot read: {_described(batch)}. It has no `{missing[0]}`.",
            where=missing[0],
            got=list(entries),
            expected=list(model.required),
            hint=f"{model.owner or 'The model'} takes {_listed(model.names)}. Let the loader yield them by name, or in order as a tuple: "
            "the inputs, then the labels.",
        )
    for name, value in chosen.items():
        if not isinstance(value, Tensor) and name in model.required:
            raise unfit(where, name, f"of type {type(value).__name__}", "a tensor", "Let the loader yield tensors.")
    order = (*(name for name in model.names if name in chosen), *(name for name in chosen if name not in model.names))
    return Call((), {name: chosen[name] for name in order if isinstance(chosen[name], Tensor)})


def _by_order(batch: Any, models: Sequence[Inputs], where: str) -> Parts:
    values: Sequence[Any] = (batch,) if isinstance(batch, Tensor) else batch
    plain = [model for model in models if not model.by_number]
    count = max([len(model.required) for model in plain] or [1])  # older versions of torch.compile know no `default=`
    if not isinstance(values, (tuple, list)) or len(values) < count:
        names = next(model.required for model in models if len(model.required) == count)
        raise ConfigError(
            f"{where} got a batch it cannot read: {_described(batch)}.",
            where=where,
            got=type(batch).__name__,
            expected=f"inputs {', '.join(names)}, then labels",
            hint=f"Let the loader yield a tuple of tensors ({', '.join(names)}, labels) or a dict with these names.",
        )
    labels, indices = (*values[count:], None, None)[:2]
    given = [pair for model in plain for pair in zip(model.required, values, strict=False)]
    for name, value in (*given, *([("labels", labels)] if labels is not None else [])):
        if not isinstance(value, Tensor):
            raise unfit(where, name, f"of type {type(value).__name__}", "a tensor", "Yield tensors, or one dict.")
    numbers = isinstance(indices, Tensor) and indices.ndim == 1 and not indices.is_floating_point()
    optional = next((name for model in plain for name in (*model.names, *model.left_out)[count:]), None)
    if optional is not None and isinstance(indices, Tensor) and not numbers:
        hint = f"They come after the labels. If an entry is `{optional}`, let the loader yield a dict of inputs by name, with `labels`."
        raise unfit(where, INDICES, f"of shape {tuple(indices.shape)}", "(batch,) whole numbers", hint)
    if len(plain) < len(models) and not numbers:
        hint = "Saved outputs go by the samples' numbers; give a loader of `open_data`."
        raise unfit(where, INDICES, "absent", "(batch,) whole numbers", hint)
    calls = tuple(Call((indices,) if model.by_number else tuple(values[: len(model.required)])) for model in models)
    return Parts(calls, _widened(labels), indices if numbers else None)


def _widened(labels: Tensor | None) -> Tensor | None:
    """Integers of any width as int64. Other labels and all shapes stay unchanged, because the task interprets them."""
    if labels is None or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return labels
    return labels.long()


def inputs_and_labels(batch: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors of a batch that are inputs as far as can be known without a model, by name, and the labels.

    A sequence is one input and its labels; its input has the name of its place, `0`.
    """
    entries = named(batch)
    if entries is None:
        values = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, (tuple, list)) else ()
        entries = dict(zip(("0", LABELS[0]), values, strict=False))
    labels = next((entries[name] for name in LABELS if isinstance(entries.get(name), Tensor)), None)
    special = {*LABELS, INDICES, FEATURES}
    return {k: v for k, v in entries.items() if isinstance(v, Tensor) and k not in special}, labels


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in a batch, whatever they mean."""
    entries = named(batch)
    single = isinstance(batch, Tensor) or not isinstance(batch, (tuple, list, Mapping))
    values = entries.values() if entries is not None else [batch] if single else batch
    return [value for value in values if isinstance(value, Tensor)]


def count_of(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor."""
    return next((len(value) for value in tensors_of(batch) if value.ndim), 0)


def samples_of(batch: Any, part: slice) -> Any:
    """Some samples of a batch, in the batch's own form; entries that are not tensors or lists of samples stay as they are."""
    count = count_of(batch)

    def cut(value: Any) -> Any:
        sized = isinstance(value, (Tensor, list, tuple)) and (not isinstance(value, Tensor) or value.ndim)
        return value[part] if sized and len(value) == count else value

    return _rebuilt(batch, cut)


def replaced(batch: Any, new: Mapping[int, Tensor]) -> Any:
    """The batch with other tensors in the places of some, which are named by their `id`."""
    return _rebuilt(batch, lambda value: new.get(id(value), value))


def with_labels(batch: Any, labels: Tensor, *models: Inputs) -> Any:
    """The batch with other labels; see `split`."""
    entries = named(batch)
    if entries is not None and isinstance(batch, tuple) and not _names_tell(entries, models):
        entries = None
    if entries is not None:
        return {**entries, next(name for name in LABELS if name in entries): labels}
    count = max((len(model.required) for model in models), default=1)
    values = (*batch[:count], labels, *batch[count + 1 :])
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def stand_in(batch: Any) -> Any:
    """One sample of zeros in the form of a batch that has none."""

    def filled(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: filled(entry) for key, entry in value.items()}
        empty = isinstance(value, Tensor) and value.ndim and not len(value)
        return value.new_zeros((1, *value.shape[1:])) if empty else value

    return _rebuilt(batch, filled)


def to_device(batch: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """The batch with its tensors on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each of its tensors changed, however deep, in the batch's own form; a mapping of any kind becomes a dict."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(value, change) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in dataclasses.fields(batch)]
        return dataclasses.replace(batch, **{name: map_tensors(getattr(batch, name), change) for name in names})
    return batch


def _rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    entries = named(batch)
    if entries is None:
        return type(batch)(change(value) for value in batch) if isinstance(batch, (tuple, list)) else batch
    changed = {name: change(value) for name, value in entries.items()}
    if isinstance(batch, tuple):
        return type(batch)(**changed)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **changed)
    return changed


def with_features(batch: Any, model: Inputs, look_up: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, Any]:
    """A batch by name with the teacher's features of its samples.

    Args:
        batch: inputs, labels and indices, in order or by name.
        model: the student.
        look_up: indices (batch,) → features by tap name.
    """
    parts = split(batch, model, where="The feature cache")
    if parts.indices is None:
        raise ConfigError("A batch has no sample indices.", where="feature cache", expected="inputs, labels, indices")
    inputs = parts.calls[0].tensors(model.names)
    return inputs | {LABELS[0]: parts.labels, INDICES: parts.indices, FEATURES: look_up(parts.indices)}


def unfit(where: str, name: str, got: str, expected: str, hint: str) -> ConfigError:
    """The error for an entry of a batch that is not what it has to be."""
    text = f"{where}: `{name}` of the batch is {got}, not {expected}."
    return ConfigError(text, where=name, got=got, expected=expected, hint=hint)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _described(batch: Any) -> str:
    entries = named(batch)
    if entries is not None:
        return f"a {type(batch).__name__} of {', '.join(entries)}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(entry).__name__ for entry in batch)}"
    return f"a {type(batch).__name__}"
