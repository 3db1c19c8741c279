"""Rung one of the ladder: `torch.fx` symbolic tracing, with a record of which module each tensor is the output of."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from indistill_fx.errors import FrontendError


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured graph, before anything is known of its values.

    Attributes:
        graph_module: the graph over the module's own leaf modules.
        outputs: (tap name, node name, how many nodes stood in the graph when the module returned it), innermost module first.
        leaves: modules kept as one node because their code could not be traced.
        specialisations: decisions taken by the example input.
        notes: anything else for the report.
    """

    graph_module: fx.GraphModule
    outputs: tuple[tuple[str, str, int], ...]
    leaves: tuple[str, ...] = ()
    specialisations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Tracer(fx.Tracer):
    """fx's tracer, which also notes the outputs of modules that are not leaves."""

    def __init__(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Sequence[str]):
        super().__init__()
        self.inputs, self.kwargs, self.wanted_leaves = inputs, kwargs, frozenset(leaves)
        self.calls: Counter[str] = Counter()
        self.outputs: list[tuple[str, str, int]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.wanted_leaves or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder per argument of the example call; arguments it leaves out keep their defaults, as in the call."""
        names = [name for name in inspect.signature(root_fn).parameters if name != "self"]
        names += [f"input_{k}" for k in range(len(names), len(self.inputs))]
        positional = [self._argument(name, value) for name, value in zip(names, self.inputs, strict=False)]
        keyword = {name: self._argument(name, value) for name, value in self.kwargs.items()}

        def call(root: nn.Module) -> Any:
            return root_fn(root, *positional, **keyword)

        return call, [self.root]

    def _argument(self, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {})
        return self.proxy(node) if isinstance(value, Tensor) else value

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        self.calls[path] += 1
        name = path if self.calls[path] == 1 else f"{path}@{self.calls[path]}"
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.outputs.append((name, result.node.name, len(self.graph.nodes)))
        return result


def capture_symbolic(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Sequence[str]
) -> Captured:
    """Trace with symbolic values.

    Raises:
        FrontendError: the code asks a symbolic value for something only a concrete one has.
    """
    tracer = _Tracer(inputs, kwargs, leaves)
    try:
        graph = tracer.trace(module)
    except Exception as error:
        raise FrontendError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return Captured(fx.GraphModule(tracer.root, graph, class_name=type(module).__name__), tuple(tracer.outputs))
