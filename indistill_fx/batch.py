"""What a batch is. A loader may give it in many forms; here it is taken apart, and nowhere else.

A batch is one tensor of inputs; a sequence of the inputs in order, then the labels, then the sample indices; or entries by name: a
mapping of any kind, a dataclass, a named tuple. By name, every model gets the inputs that its signature asks for, and what nobody asks
for (file names, masks of another model) is left alone. A model of one input gets the only one that there is, or that is more than a
number for each sample, whatever its name.

In a sequence the inputs may be one part of their own, by name or in order, and the labels may lie in a mapping:
`({"image": x}, y)`, `((x, mask), y)`, `(x, {"labels": y})`. So may they by name: `{"inputs": {"image": x}, "labels": y}`.

An input is a tensor, or a dict, tuple or list of tensors if the model may take that: by the example it was traced with, or as far as its
signature does not say otherwise. The entries of a dict that it takes may lie in the batch one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from indistill_fx.errors import ConfigError
from indistill_fx.system.call import Call
from indistill_fx.system.model_inputs import INDICES, Inputs
from indistill_fx.system.nested import described, is_own_class, listed, named, replaced, tensors_of

LABELS = ("labels", "label", "targets", "target")
"""Names of the labels; the first one that is there counts."""
FEATURES = "teacher_features"
"""Name of the teacher's features in a batch of a stage that has no teacher of its own."""
_SPECIAL = {*LABELS, INDICES, FEATURES}
Sizes = tuple[int | None, ...]
"""Of a tensor; None for an axis of any size."""


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


@dataclass(frozen=True, slots=True)
class _Form:
    """What is what in a batch.

    Attributes:
        inputs: in order, or by name.
        apart: whether they are a part of their own, so that optional ones may be among those in order.
        beside: what lies with the labels or with inputs in order, by name; a model may ask for it.
        labels: as they are.
        indices: likewise; None where there are none, or something else.
    """

    inputs: Sequence[Any] | Mapping[str, Any]
    apart: bool
    beside: Mapping[str, Any]
    labels: Tensor | None
    indices: Tensor | None


def call_of(example: Any, model: Inputs, *, where: str) -> Call:
    """Example inputs as a call.

    Args:
        example: a tensor; the arguments in order; or arguments by name, of which the model gets what it takes. A tuple of a class of its
            own whose names are not those of the arguments is one argument.
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
    entries = _entries(example, (model,))
    if entries is not None:
        return _by_name(_Form(entries, True, {}, None, None), entries, model, example, where)
    return Call((example,) if is_own_class(example) else tuple(example))


def split(batch: Any, *models: Inputs, where: str) -> Parts:
    """Take a batch apart for one model or several.

    Args:
        batch: in any of the forms above.
        models: what each takes.
        where: who asks, for messages: `Stage `layer1``.

    Raises:
        ConfigError: it is in none of the forms, an input is missing or no tensor; says which, and what the batch has.
    """
    form = _form_of(batch, models, where)
    if form.labels is not None and not form.labels.ndim:
        hint = "Let the loader yield batches, not samples."
        raise unfit(where, "labels", "a single number", "a tensor (batch, …)", hint)
    if isinstance(form.inputs, Mapping):
        calls = tuple(_by_name(form, form.inputs, model, batch, where) for model in models)
        return Parts(calls, _widened(form.labels), form.indices, form.inputs.get(FEATURES))
    return Parts(_in_order(form, form.inputs, models, batch, where), _widened(form.labels), form.indices)


def _form_of(batch: Any, models: Sequence[Inputs], where: str) -> _Form:
    entries = _entries(batch, models)
    if entries is not None:
        label = _label_in(entries)
        labels, indices = entries[label] if label else None, entries.get(INDICES)
        apart = _only_structure(entries, models)
        if apart is not None:
            return _with_rest(apart, (labels, indices), batch, models, where)
        for name, value in (("labels", labels), (INDICES, indices)):
            _require_tensor(value, name, where)
        return _Form(entries, False, {}, labels, indices)
    values: Sequence[Any] = (batch,) if isinstance(batch, Tensor) else batch
    if isinstance(values, (tuple, list)) and len(values) > 1 and _is_structure(values[0]):
        return _with_rest(values[0], values[1:], batch, models, where)
    plain = [model for model in models if not model.by_number]
    count = max([len(model.required) for model in plain] or [1])  # older versions of torch.compile know no `default=`
    if isinstance(values, (tuple, list)):
        count = next((place for place in range(1, min(count, len(values))) if _holds_labels(values, place)), count)
    if not isinstance(values, (tuple, list)) or len(values) < count:
        names = next((model.required for model in plain if len(model.required) == count), ("inputs",))
        raise ConfigError(
            f"{where} got a batch it cannot read: {described(batch)}.",
            where=where, got=type(batch).__name__, expected=f"inputs {', '.join(names)}, then labels",
            hint=f"Let the loader yield a tuple of tensors ({', '.join(names)}, labels) or a dict with these names.",
        )  # fmt: skip
    for name, value in zip(plain[0].names if plain else (), values[:count], strict=False):
        _require_input(value, name, plain[0], where, "Yield tensors, or one dict.")
    labels, beside = _labels_and_more((*values[count:], None)[0], batch, where)
    optional = next((name for model in plain for name in (*model.names, *model.left_out)[count:]), None)
    rest = values[count + 1 : None if plain else count + 2]  # without a model, what is there is not known
    indices = _indices_in([value for value in rest if plain or _are_numbers(value)], beside, where, optional)
    return _Form(values[:count], False, beside, labels, indices)


def _indices_in(rest: Sequence[Any], more: Mapping[str, Any], where: str, optional: str | None = None) -> Tensor | None:
    """The sample indices: what follows the labels, or an entry by name. Texts may follow; a tensor would be ignored."""
    found = _different(rest[0], where) if rest and _are_numbers(rest[0]) else more.get(INDICES)
    ignored = next((value for value in rest if isinstance(value, Tensor) and value is not found), None)
    if ignored is None:
        return found if _are_numbers(found) else None
    advice = f"If it is the input `{optional}`, let" if optional else "Leave it out, or let"
    raise unfit(
        where, "the entry after the labels", f"a tensor {tuple(ignored.shape)} that nothing would use", "sample indices (batch,)",
        f"{advice} the loader yield a dict with the inputs and `labels` by name. Weights of samples and second labels are not supported.",
    )  # fmt: skip


def _different(found: Tensor, where: str) -> Tensor:
    """Whole numbers after the labels, if they can be the samples' places. Not on a device: to look at them means to wait."""
    if found.device.type != "cpu" or torch.compiler.is_compiling():
        return found
    wrong = "negative" if bool((found < 0).any()) else "equal" if len(found.unique()) < len(found) else None
    if wrong:
        raise unfit(
            where, "the entry after the labels", f"whole numbers, some of them {wrong}", "sample indices, all different",
            "Leave it out, or give it a name: let the loader yield a dict. Indices drawn with replacement are `indices` there.",
        )  # fmt: skip
    return found


def _with_rest(inputs: Any, rest: Sequence[Any], batch: Any, models: Sequence[Inputs], where: str) -> _Form:
    """The form of a batch whose inputs are a part of their own, before the labels and the indices."""
    entries = _entries(inputs, models)
    own = _label_in(entries or {})
    twice = next((name for name in named(rest[0]) or () if name in (entries or {})), None)
    if own is not None and rest[0] is not None and not any(own in model.required for model in models):
        twice = own
    if twice is not None:
        raise ConfigError(
            f"{where} got a batch it cannot read: {described(batch)}. There is `{twice}` among the inputs and beside them.",
            where=twice, got="two entries", expected="one",
            hint="Let the loader yield whole batches: the inputs, then the labels, each of all samples in one tensor.",
        )  # fmt: skip
    labels, beside = _labels_and_more(rest[0], batch, where)
    if labels is None and entries is not None and own is not None:
        labels = entries[own]
    more = {**beside, **(entries or {})}
    _require_tensor(more.get(INDICES), INDICES, where)
    indices = _indices_in(rest[1:], more, where)
    beside = beside if indices is None else {**beside, INDICES: indices}
    return _Form(inputs if entries is None else entries, True, beside, labels, indices)


def _labels_and_more(found: Any, batch: Any, where: str) -> tuple[Tensor | None, Mapping[str, Any]]:
    """Labels from their place, and what lies with them by name: of a mapping, its entry of that name, or its only tensor."""
    entries = named(found)
    if entries is None:
        _require_tensor(found, "labels", where, "Yield tensors, or one dict.")
        return found, {}
    tensors = [name for name, value in entries.items() if isinstance(value, Tensor) and name not in _SPECIAL]
    label = _label_in(entries) or (tensors[0] if len(tensors) == 1 else None)
    if label is None:
        raise ConfigError(
            f"{where} got a batch it cannot read: {described(batch)}. Which of {listed(tuple(entries))} are the labels is not said.",
            where="labels", got=list(entries), expected="labels",
            hint="Let the loader yield them as a tensor, or under the name `labels`.",
        )  # fmt: skip
    _require_tensor(entries[label], "labels", where)
    return entries[label], {name: value for name, value in entries.items() if name != label}


def _entries(batch: Any, models: Sequence[Inputs]) -> dict[str, Any] | None:
    """The entries of a batch by name; None if it has no names.

    A named tuple has names where they say what is what: where labels are among them, or an input of that name is asked for.
    """
    entries = named(batch)
    if entries is None or not isinstance(batch, tuple) or _label_in(entries) is not None:
        return entries
    return entries if all(name in entries for model in models for name in model.required) else None


def _only_structure(entries: Mapping[str, Any], models: Sequence[Inputs]) -> Any:
    """The one entry that holds the inputs, if no other one can: no model asks for an entry, and no other is a tensor."""
    free = {name: value for name, value in entries.items() if name not in _SPECIAL}
    holding = [value for value in free.values() if isinstance(value, Tensor) or _is_structure(value)]
    asked = any(name in model.names for name in free for model in models)
    return holding[0] if len(holding) == 1 and not asked and not isinstance(holding[0], Tensor) else None


def _holds_labels(values: Sequence[Any], place: int) -> bool:
    """Whether there lie the labels, by name, perhaps with some inputs: not an input that takes a dict."""
    entries = named(values[place])
    return entries is not None and (_label_in(entries) is not None or place == len(values) - 1)


def _is_structure(value: Any) -> bool:
    return not isinstance(value, Tensor) and bool(tensors_of(value))


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) or _is_structure(value)


def _label_in(entries: Mapping[str, Any]) -> str | None:
    return next((name for name in LABELS if name in entries), None)


def _are_numbers(indices: Any) -> bool:
    return isinstance(indices, Tensor) and indices.ndim == 1 and not indices.is_floating_point()


def _require_tensor(value: Any, name: str, where: str, hint: str = "Let the loader yield tensors.") -> None:
    if value is not None and not isinstance(value, Tensor):
        raise unfit(where, name, f"of type {type(value).__name__}", "a tensor", hint)


def _require_input(
    value: Any, name: str, model: Inputs, where: str, hint: str = "Let the loader yield tensors."
) -> None:
    """Refuse what is no tensor, unless it consists of tensors and the model may take that."""
    one = name in model.forms and model.forms[name] is None
    if one or not _is_structure(value) or _label_in(named(value) or {}) is not None:  # with labels, it is a sample
        _require_tensor(value, name, where, hint)


def _in_order(form: _Form, values: Sequence[Any], models: Sequence[Inputs], batch: Any, where: str) -> tuple[Call, ...]:
    if form.apart:
        _require_as_many(values, form.labels, models, batch, where)
    calls = []
    for model in models:
        if model.by_number:
            if form.indices is None:
                hint = "Saved outputs go by the samples' numbers; give a loader of `open_data`."
                raise unfit(where, INDICES, "absent", "(batch,) whole numbers", hint)
            calls.append(Call((form.indices,)))
            continue
        args = _taken(values, model) if form.apart else tuple(values[: len(model.required)])
        for name, value in zip(model.names, args, strict=False):
            _require_input(value if value is not None else (), name, model, where, "Yield tensors, or one dict.")
        more = len(args) < len(model.required) or any(name in form.beside for name in model.names[len(args) :])
        by_name = dict(zip(model.names, args, strict=False))
        calls.append(_by_name(form, by_name, model, batch, where) if more else Call(args))
    return tuple(calls)


def _taken(values: Sequence[Any], model: Inputs) -> tuple[Any, ...]:
    """The arguments, of inputs in order that are a part of their own: one by one; or all together, if the model takes a tuple alone."""
    return (values,) if _is_one_argument(values, model) else tuple(values[: len(model.names)])


def _is_one_argument(values: Sequence[Any], model: Inputs) -> bool:
    several = len(model.required) == 1 and model.forms.get(model.required[0]) is not None
    return several and isinstance(values[0], Tensor)


def _require_as_many(
    values: Sequence[Any], labels: Tensor | None, models: Sequence[Inputs], batch: Any, where: str
) -> None:
    """Refuse inputs that are more or fewer than the models take, or that have other samples than the labels: a list of samples."""
    plain = [model for model in models if not model.by_number]
    for model in plain:
        most = max(len(model.names) for model in plain) if not model.left_out else len(model.names)
        if not len(model.required) <= len(values) <= most and not _is_one_argument(values, model):
            raise ConfigError(
                f"{where} got a batch it cannot read: {described(batch)}. It has {len(values)} inputs in order, and "
                f"{model.owner or 'the model'} takes {listed(model.names)}.",
                where=where, got=len(values), expected=f"inputs {', '.join(model.names)}",
                hint="Let the loader yield the inputs by name: a dict with these names, and `labels`.",
            )  # fmt: skip
    counts = [len(value) for value in values if isinstance(value, Tensor) and value.ndim]
    if labels is not None and any(count != len(labels) for count in counts):
        hint = "Let the loader stack the samples: each input, and the labels, as one tensor, batch first."
        raise unfit(where, "labels", f"of {len(labels)} samples", f"of as many as the inputs ({counts[0]})", hint)


def _by_name(form: _Form, inputs: Mapping[str, Any], model: Inputs, batch: Any, where: str) -> Call:
    special, entries = _SPECIAL - {*model.required}, {**form.beside, **inputs}
    free = {name: value for name, value in entries.items() if name not in special}
    chosen = {name: value for name, value in free.items() if name in model.names or (model.anything and name in inputs)}
    for name, parts in model.forms.items():  # a dict whose entries are those of the batch
        if parts and name not in chosen and all(part in free for part in parts):
            chosen[name] = {part: free[part] for part in parts}
    missing = [name for name in model.required if name not in chosen]
    own = {name: value for name, value in free.items() if name in inputs and _is_input(value)}
    only = [value for value in own.values() if isinstance(value, Tensor)]
    only = [value for value in only if value.ndim > 1] if len(only) > 1 else only
    if missing and not chosen and len(model.required) == 1:
        known = missing[0] in model.forms
        if len(only) == 1 and model.forms.get(missing[0]) is None and all(isinstance(v, Tensor) for v in own.values()):
            return Call((), {missing[0]: only[0]})
        if own and (model.forms[missing[0]] == () if known else form.apart and len(own) > 1):
            return Call((), {missing[0]: own})
    if missing:
        raise ConfigError(
            f"{where} got a batch it cannot read: {described(batch)}. It has no `{missing[0]}`.",
            where=missing[0], got=list(entries), expected=list(model.required),
            hint=f"{model.owner or 'The model'} takes {listed(model.names)}. Let the loader yield them by name, or in order, then labels."
            + (f" If `{missing[0]}` is a dict, let it yield (the dict, labels), or write `{missing[0]}: dict` in the forward's signature."
               if len(model.required) == 1 < len(only) else ""),
        )  # fmt: skip
    for name in model.required:
        _require_input(chosen[name], name, model, where)
    order = (*(name for name in model.names if name in chosen), *(name for name in chosen if name not in model.names))
    return Call((), {k: chosen[k] for k in order if _is_input(chosen[k]) or k in model.required})  # required: or None


def _widened(labels: Tensor | None) -> Tensor | None:
    """Integers of any width as int64. Other labels and all shapes stay as they are: the task interprets them."""
    if labels is None or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return labels
    return labels.long()


def inputs_and_labels(batch: Any, *, where: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors of a batch that are inputs as far as can be known without a model, by name, and the labels.

    Inputs in order have the names of their places: `0`.

    Raises:
        ConfigError: as `split`.
    """
    form = _form_of(batch, (), where)
    inputs = form.inputs if isinstance(form.inputs, Mapping) else {str(i): value for i, value in enumerate(form.inputs)}
    found = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name not in _SPECIAL}
    return found, form.labels


def with_labels(batch: Any, labels: Tensor, *models: Inputs) -> Any:
    """The batch, which has labels, with others in their place; see `split`."""
    return replaced(batch, {id(_form_of(batch, models, "The batch").labels): labels})


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
    inputs = parts.calls[0].by_name(model.names)
    return inputs | {LABELS[0]: parts.labels, INDICES: parts.indices, FEATURES: look_up(parts.indices)}


def unfit(where: str, name: str, got: str, expected: str, hint: str) -> ConfigError:
    """The error for an entry of a batch that is not what it has to be."""
    text = f"{where}: {f'`{name}`' if name.isidentifier() else name} of the batch is {got}, not {expected}."
    return ConfigError(text, where=name, got=got, expected=expected, hint=hint)
