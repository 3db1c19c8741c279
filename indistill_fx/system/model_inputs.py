"""What a model takes: the arguments of its forward, by its signature."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn

INDICES = "indices"
"""Name of the samples' places in the data set."""
LEFT_OUT = "left_out"
"""Key in the meta of a graph's inputs: the optional arguments of the model that it was captured without."""
FORM = "form"
"""Key in the meta of a graph's input: its form, see `Inputs.forms`."""
Form = tuple[str, ...] | None
"""Of an argument: None: one tensor; the names of a dict's entries; or empty: a dict, tuple or list of tensors, of unknown entries."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model's forward takes.

    Attributes:
        names: of its arguments, in order.
        required: those without a default; of a model whose arguments all have one, the first.
        anything: whether it takes further arguments by any name.
        owner: whose they are, for messages.
        left_out: of a graph: the model's optional arguments that it was captured without.
        forms: of the arguments of which it is known whether they are one tensor or several.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    anything: bool = False
    owner: str = ""
    left_out: tuple[str, ...] = ()
    forms: Mapping[str, Form] = dataclasses.field(default_factory=dict)

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
            forms = {str(node.target): node.meta[FORM] for node in nodes if FORM in node.meta}
            return Inputs(names, required, owner=type(model).__name__, left_out=left_out, forms=forms)
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
        kinds = {name: _kind_of(hint) for name, hint in _hints(function).items() if name in names}
        forms = {name: kind for name, kind in kinds.items() if not isinstance(kind, str)}
        return Inputs(names, required, any(p.kind is p.VAR_KEYWORD for p in parameters), forms=forms)


def form_of(value: Any) -> Form:
    """The form of an argument: see `Inputs.forms`."""
    if isinstance(value, Mapping):
        return tuple(map(str, value))
    return () if isinstance(value, (tuple, list)) else None


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters; none where they are names that cannot be looked up."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # the user's own annotations may be anything
        return {}


def _kind_of(hint: Any) -> Form | Literal["unknown"]:
    """What an annotation says of the form of an argument."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = {_kind_of(choice) for choice in typing.get_args(hint) if choice is not type(None)}
        return kinds.pop() if len(kinds) == 1 else "unknown"
    kind = origin or hint
    if not isinstance(kind, type):
        return "unknown"
    if typing.is_typeddict(kind):
        return tuple(typing.get_type_hints(kind))
    if issubclass(kind, Tensor):
        return None
    return () if issubclass(kind, (Mapping, Sequence)) and not issubclass(kind, (str, bytes)) else "unknown"
