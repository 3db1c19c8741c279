"""The first capture method: `torch.fx` symbolic tracing, with a record of which module each tensor is the output of."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from indistill_fx.errors import FrontendError
from indistill_fx.graph.draws import TensorDraws
from indistill_fx.graph.ops import attribute, is_users_function, package_of
from indistill_fx.passes.capture.captured import (
    Captured,
    Request,
    argument_names,
    assemble,
    is_leaf,
    made_from,
    returned,
)
from indistill_fx.passes.capture.symbolic_sizes import current_place, note_place
from indistill_fx.passes.capture.torch_functions import DrawError, watching_autocast


def _kept_whole(module: nn.Module) -> set[Callable[..., Any]]:
    """The functions of graphs in a module that are not torch's or ours: an earlier tracing kept them whole (`torch.fx.wrap`)."""
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    called = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return {target for target in called if is_users_function(target) or package_of(target) == "torchvision"}


class _Tracer(fx.Tracer):
    """fx's tracer, which also notes the outputs of modules that are not leaves."""

    def __init__(self, asked: Request):
        super().__init__(autowrap_functions=tuple(_kept_whole(asked.module)))
        self.inputs, self.kwargs, self.wanted_leaves = asked.inputs, asked.kwargs, frozenset(asked.leaves)
        # The tensors before the model's code assigns to them.
        self.own = {**dict(asked.module.named_parameters()), **dict(asked.module.named_buffers())}
        self.names = {id(tensor): name for name, tensor in self.own.items()}
        self.calls: Counter[str] = Counter()
        self.outputs: list[tuple[str, str, int]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.wanted_leaves or is_leaf(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are nodes, so that they follow training and `.to(device)`; found by identity in constant time."""
        name = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder per argument of the example call; arguments it leaves out keep their defaults, as in the call."""
        names = argument_names(self.root, len(self.inputs))
        positional = [self._argument(name, value) for name, value in zip(names, self.inputs, strict=True)]
        keyword = {name: self._argument(name, value) for name, value in self.kwargs.items()}

        def call(root: nn.Module) -> Any:
            return root_fn(root, *positional, **keyword)

        return call, [self.root]

    def _argument(self, name: str, value: Any) -> Any:
        return self._proxies(value, self.create_node("placeholder", name, (), {}))

    def _proxies(self, value: Any, node: fx.Node) -> Any:
        """The argument as the module gets it: tensors, also those in lists and dicts, are symbolic, all else is as in the example."""
        if isinstance(value, Tensor):
            return self.proxy(node)
        if type(value) is dict:
            return {key: self._proxies(entry, self._part(node, key)) for key, entry in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._proxies(entry, self._part(node, key)) for key, entry in enumerate(value))
        return value

    def _part(self, node: fx.Node, key: Any) -> fx.Node:
        return self.create_node("call_function", operator.getitem, (node, key), {})

    def create_arg(self, a: Any) -> Any:
        """A value as an argument of a node; numpy's numbers, which generated code could not write, as Python's."""
        if is_dataclass(a) and not isinstance(a, (type, dict, tuple)):
            entries = {name: self.create_arg(entry) for name, entry in made_from(a).items()}
            return self.create_node("call_function", type(a), (), entries)
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        """Create a node; nodes that read a size also record the place in the code."""
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        reads = target == "size" if kind == "call_method" else target is getattr and args[1:] == ("shape",)
        return note_place(node) if reads else node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        self.calls[path] += 1
        name = path if self.calls[path] == 1 else f"{path}@{self.calls[path]}"
        result = super().call_module(m, forward, args, kwargs)
        position = len(self.graph.nodes)
        self.outputs += [(tap, proxy.node.name, position) for tap, proxy in returned(name, result, fx.Proxy)]
        return result


def _from_one(stack: Mapping[str, Any]) -> dict[str, Any]:
    """The module calls around a node, the second call of `a` as `a@2`, as everywhere here; fx writes `a@1`."""
    calls = ((*call.partition("@"), value) for call, value in stack.items())
    return {f"{path}@{int(index) + 1}" if index else path: value for path, _, index, value in calls}


def capture_symbolic(asked: Request) -> Captured:
    """Trace with symbolic values; tensors that are not buffers are constants, so none may be drawn.

    Raises:
        FrontendError: the code asks a symbolic value for something only a concrete one has.
    """

    def refuse() -> None:
        raise DrawError("{}: {} would be one draw for good".format(*current_place()))

    tracer = _Tracer(asked)
    try:
        with watching_autocast() as notes, TensorDraws(drawing=refuse):
            graph = tracer.trace(asked.module)
    except FrontendError:
        raise
    except Exception as error:
        raise FrontendError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    for node in graph.nodes:
        # By this mark the code of every copy of the graph would enter its functions in a list of fx's that outlives it; and passes hand
        # it on to other functions, whose entry makes all later tracing fail. `_kept_whole` serves in its place.
        node.meta.pop("is_wrapped", None)
        node.meta["nn_module_stack"] = _from_one(node.meta.get("nn_module_stack", {}))
    tensors = tracer.own
    named = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    targets = {name: tensors[name] if name in tensors else attribute(asked.module, name) for name in named}
    graph_module = assemble(graph, targets, type(asked.module).__name__)
    return Captured(graph_module, tuple(tracer.outputs), notes=tuple(dict.fromkeys(notes)))
