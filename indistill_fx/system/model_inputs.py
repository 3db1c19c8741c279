"""What a model takes: the arguments of its forward, by its signature."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

INDICES = "indices"
"""Name of the samples' places in the data set."""
LEFT_OUT = "left_out"
"""Key in the meta of a graph's inputs: the optional arguments of the model that it was captured without."""


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
