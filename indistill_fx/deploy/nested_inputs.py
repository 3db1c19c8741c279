"""The tensors of a module's arguments one by one, as an ONNX file takes them: `obs.image`, `state.0`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from indistill_fx.batch import split
from indistill_fx.errors import ConfigError
from indistill_fx.system.model_inputs import Inputs


@dataclass(frozen=True, slots=True)
class Form:
    """How tensors one by one become the arguments of a module.

    Attributes:
        names: of the tensors, by argument and place in it; none where the tensors are the arguments in order.
        spec: the form of the arguments, those in order and those by name.
        given: of every leaf of the form, whether it is a tensor; else it is None.
    """

    names: tuple[str, ...]
    spec: pytree.TreeSpec
    given: tuple[bool, ...]

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, in order and by name."""
        left = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(left) if here else None for here in self.given], self.spec)
        return args, kwargs

    @staticmethod
    def of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Form, tuple[Any, ...]]:
        """The form of some arguments, and what is in it: tensors, or what an ONNX file cannot take."""
        found, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        leaves = [(path, leaf) for path, leaf in found if leaf is not None]
        plain = not kwargs and len(leaves) == len(args) == len(found)
        own = Inputs.of(module).names
        names = () if plain else tuple(_name(path, own) for path, _ in leaves)
        return Form(names, spec, tuple(leaf is not None for _, leaf in found)), tuple(leaf for _, leaf in leaves)


def in_batch(batch: Any, names: Sequence[str], *, where: str) -> tuple[list[Tensor], Tensor | None]:
    """The tensors of a batch that a file takes, in its order, and the labels.

    Args:
        batch: as the file takes it, tensor by tensor; or as the module that it was exported from takes it: in dicts and tuples.
        names: of the file's inputs.
        where: who asks, for messages.

    Raises:
        ConfigError: the batch lacks one.
    """
    try:
        parts = split(batch, Inputs(tuple(names), tuple(names), forms=dict.fromkeys(names)), where=where)
        return list(parts.calls[0].by_name(names).values()), parts.labels
    except ConfigError:
        taken = _arguments(names)
        if len(taken.names) == len(names):
            raise
        parts = split(batch, taken, where=where)
        return [_entry(parts.calls[0].by_name(taken.names), name.split(".")) for name in names], parts.labels


def _arguments(names: Sequence[str]) -> Inputs:
    """The arguments whose entries are the inputs of a file: `obs` of `obs.image` and `obs.vector`."""
    entries: dict[str, list[str]] = {}
    for name in names:
        argument, *entry = name.split(".")
        entries.setdefault(argument, []).extend(entry[:1])
    forms = {
        name: None if not parts else () if all(part.isdigit() for part in parts) else tuple(dict.fromkeys(parts))
        for name, parts in entries.items()
    }
    return Inputs(tuple(entries), tuple(entries), forms=forms)


def _entry(values: Any, path: Sequence[str]) -> Tensor:
    for step in path:
        values = values[step] if isinstance(values, Mapping) else values[int(step)]
    assert isinstance(values, Tensor)
    return values


def _name(path: pytree.KeyPath, own: Sequence[str]) -> str:
    _, argument, *inner = (str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
    if argument.isdigit():
        argument = own[int(argument)] if int(argument) < len(own) else f"input_{argument}"
    return ".".join((argument, *inner))
