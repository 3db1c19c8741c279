"""The graph while it is made: every call is put into it and run on the meta device; what only constants go into is computed at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodDescriptorType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from indistill_fx.graph.names import is_plain_path, reserved, writable
from indistill_fx.loading.onnx.values import Size, Sizes, Traced, Undecided, Value, list_of

LARGEST_CONSTANT = 1 << 26
"""Elements of a constant that is computed while converting: 256 MiB."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Op:
    """One operator of the file, ready for its rule.

    Args:
        kind: `Conv`, `Relu`, …
        name: the node's own, or that of its first output.
        inputs: values, None where an optional one is left out.
        names: of the inputs.
        attributes: by name.
        opset: version of the operator set.
        outputs: how many are asked for.
    """

    kind: str
    name: str
    inputs: tuple[Value | None, ...]
    names: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int
    outputs: int = 1

    def input(self, number: int) -> Value | None:
        """An optional input."""
        return self.inputs[number] if number < len(self.inputs) else None

    def required(self, number: int) -> Value:
        """An input that the operator must have.

        Raises:
            Undecided: the node does not have it.
        """
        value = self.input(number)
        if value is None:
            raise Undecided(f"lacks its input {number}")
        return value

    def constant(self, number: int) -> Tensor | None:
        """An optional input that must be a constant.

        Raises:
            Undecided: it is not a constant.
        """
        value = self.input(number)
        if value is not None and not isinstance(value, Tensor):
            raise Undecided(f"has an input {self.names[number]!r} that is not a constant")
        return value

    def required_constant(self, number: int, name: str) -> Tensor:
        """A required input that must be a constant, such as "its weights".

        Raises:
            Undecided: it is missing, or not a constant.
        """
        value = self.constant(number)
        if value is None:
            raise Undecided(f"lacks {name}")
        return value

    def get(self, name: str, default: T) -> T:
        """An attribute, or its default."""
        found: T = self.attributes.get(name, default)
        return found

    def numbers(self, name: str, number: int) -> list[Any] | None:
        """A list that is an attribute in older operator sets and an input in newer ones; None if it is left out."""
        if name in self.attributes:
            return list(self.attributes[name])
        value = self.input(number)
        return None if value is None else list_of(value)


@dataclass
class Builder:
    """A graph and its layers, growing.

    Args:
        counts: how many samples each of the runs on the meta device has.
        batch: the number of samples that the file is fixed to; None: any.
    """

    counts: tuple[int, ...]
    batch: int | None = None
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    _paths: set[str] = field(default_factory=set)
    _layers: dict[Any, tuple[str, Any]] = field(default_factory=dict)
    _constants: dict[int, tuple[Tensor, fx.Node]] = field(default_factory=dict)
    _turned: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    """Identity of a constant -> its name in the file."""

    def placeholder(self, name: str, samples: Sequence[Tensor]) -> Traced:
        """An input of the network."""
        return Traced(self.graph.placeholder(plain_name(name)), tuple(samples))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The value of a function's call.

        Args:
            function: of torch, torch.nn.functional or operator; a method of tensors as `Tensor.expand`.
            args: values, numbers, or lists of them.
            kwargs: likewise.

        Returns:
            A tensor if all operands are constants, otherwise a `Traced`; a tuple of these if the function returns several.
        """
        given = (args, kwargs)
        if not any(isinstance(leaf, (Traced, Size)) for leaf in _leaves(given)):
            return self._compute(function, args, kwargs)
        samples = []
        for number in range(len(self.counts)):
            own_args, own_kwargs = _map(given, partial(_sample, number=number))
            with torch.no_grad(), torch.device("meta"):
                samples.append(function(*own_args, **own_kwargs))
        node_args, node_kwargs = _map(given, self._in_graph)
        if isinstance(method := getattr(Tensor, function.__name__, None), MethodDescriptorType) and method is function:
            node = self.graph.call_method(function.__name__, node_args, node_kwargs)
        else:
            node = self.graph.call_function(function, node_args, node_kwargs)
        return self._returned(node, samples)

    def make(self, function: Callable[..., Any], *args: Any, dtype: torch.dtype) -> Any:
        """A new tensor, on the input's device: `torch.full`, `torch.arange`."""
        if not any(isinstance(leaf, Size) for leaf in _leaves(args)):
            return self._compute(function, args, {"dtype": dtype})
        first = next(node for node in self.graph.nodes if node.op == "placeholder")
        device = Size(self.graph.call_function(getattr, (first, "device")), (torch.device("meta"),) * len(self.counts))
        return self.call(function, *args, dtype=dtype, device=device)

    def turned(self, matrix: Tensor) -> Tensor:
        """A constant matrix, transposed. The same matrix always gives the same tensor, so that layers that share it stay one layer."""
        if id(matrix) not in self._turned:
            new = matrix.t().contiguous()
            self._turned[id(matrix)] = (matrix, new)
            self.names[id(new)] = self.names.get(id(matrix), "")
        return self._turned[id(matrix)][1]

    def constant_at(self, path: str) -> Tensor:
        """The constant that a `get_attr` node of the graph stands for."""
        *parents, name = path.split(".")
        found: Tensor = getattr(self.root.get_submodule(".".join(parents)), name)
        return found

    def layer(self, op: Op, make: Callable[[], nn.Module], weights: Mapping[str, Tensor | None], *inputs: Any) -> Any:
        """The value of a layer's call; a layer with the same weights and settings is reused.

        Args:
            op: the operation; the layer gets its name from the names of the inputs.
            make: makes it, on the meta device.
            weights: parameters and buffers by name.
            inputs: what it is called with; a tuple for several tensors in one argument.
        """
        with torch.device("meta"):
            module = make().eval()
        samples = []
        for number in range(len(self.counts)):
            with torch.no_grad():
                samples.append(module(*_map(inputs, partial(_sample, number=number))))
        key = (repr(module), *(id(weights[name]) if weights[name] is not None else 0 for name in sorted(weights)))
        if key not in self._layers:
            for name, tensor in weights.items():
                if name in module._buffers:
                    module._buffers[name] = tensor
                elif tensor is not None:
                    # by setattr, so that torch's recurrent layers see the new parameter
                    setattr(module, name, nn.Parameter(tensor))
            if "num_batches_tracked" in module._buffers:
                module._buffers["num_batches_tracked"] = torch.tensor(0)
            # the weights are kept, so that their ids stay valid
            self._layers[key] = self._place(self._name_of(op, weights), module), weights
        node = self.graph.call_module(self._layers[key][0], _map(inputs, self._in_graph))
        return self._returned(node, samples)

    def size(self, value: Traced, axis: int) -> Any:
        """The length of an axis: a number, or a `Size` if it depends on the input."""
        axis %= max(value.dim, 1)
        fixed = value.fixed(axis)
        if fixed is not None:
            return fixed
        node = self.graph.call_method("size", (value.node, axis))
        return Size(node, tuple(sample.shape[axis] for sample in value.samples))

    def plain(self, value: Value, *, beside: Value) -> Any:
        """An operand as a plain number if it is a size, or a constant with one entry, that broadcasts to the other operand."""
        if isinstance(value, np.ndarray):
            return one_of(value)
        if (
            isinstance(value, Tensor)
            and value.numel() == 1
            and isinstance(beside, Traced)
            and value.dim() <= beside.dim
        ):
            return value.item()
        return value

    def tensor(self, value: Value) -> Tensor | Traced:
        """A value as a tensor; sizes only if none of them depends on the input.

        Raises:
            Undecided: one does.
        """
        if not isinstance(value, np.ndarray):
            return value
        if any(isinstance(number, Size) for number in value.flat):
            raise Undecided("computes with the sizes of the input as with data")
        found: Tensor = settled(value)
        return found

    def _compute(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute a constant, first on the meta device to find its size."""
        own_args, own_kwargs = _map((args, kwargs), lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf)
        try:
            with torch.device("meta"):
                planned = function(*own_args, **own_kwargs)
            entries = sum(leaf.numel() for leaf in _leaves(planned) if isinstance(leaf, Tensor))
        except (NotImplementedError, RuntimeError):
            entries = 0  # the size depends on values: at most as large as the input
        if entries > LARGEST_CONSTANT:
            raise Undecided(f"makes a constant of {entries:,} numbers")
        with torch.no_grad():
            return function(*args, **kwargs)

    def _returned(self, node: fx.Node, samples: Sequence[Any]) -> Any:
        if isinstance(samples[0], (tuple, list)):
            return tuple(
                self._returned(self.graph.call_function(operator.getitem, (node, place)), parts)
                for place, parts in enumerate(zip(*samples, strict=True))
            )
        return Traced(node, tuple(samples))

    def _in_graph(self, leaf: Any) -> Any:
        if isinstance(leaf, (Traced, Size)):
            return leaf.node
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._constants:
            path = self._place(self.names.get(id(leaf), "constant"), None)
            *parents, name = path.split(".")
            parent = self._home(parents)
            if leaf.is_floating_point():
                parent.register_parameter(name, nn.Parameter(leaf))
            else:
                parent.register_buffer(name, leaf)
            self._constants[id(leaf)] = (leaf, self.graph.get_attr(path))
        return self._constants[id(leaf)][1]

    def _name_of(self, op: Op, weights: Mapping[str, Tensor | None]) -> str:
        """A layer's path, from the names of its weights; if the exporter renamed these, from the node's name."""
        for name in ("weight", "bias", "running_mean", "running_var"):
            weight = weights.get(name)
            text = self.names.get(id(weight), "") if weight is not None else ""
            if text.endswith(f".{name}"):
                return text.removesuffix(f".{name}")
        return ".".join(_without_repeats(op.name)) or op.name

    def _place(self, wanted: str, module: nn.Module | None) -> str:
        """Add the module at the wanted path, or at a similar one that is free; returns the path."""
        parts = [writable(part) if part not in reserved() else f"{part}_" for part in wanted.split(".") if part][-20:]
        parts = [part if is_plain_path(part) else "layer" for part in parts] or ["layer"]
        parts[0] = f"layer{parts[0]}" if parts[0].isdigit() and len(parts) == 1 else parts[0]
        path = ""
        for part in parts[:-1]:
            path = f"{path}.{part}" if path else part
            while path in self._paths:  # the path is taken by a layer, which cannot contain others
                path += "_"
        base, number = f"{path}.{parts[-1]}" if path else parts[-1], 1
        path = base
        while path in self._paths or any(other.startswith(f"{path}.") for other in self._paths):
            number += 1
            path = f"{base}_{number}"
        self._paths.add(path)
        if module is not None:
            *parents, name = path.split(".")
            self._home(parents).add_module(name, module)
        return path

    def _home(self, parents: Sequence[str]) -> nn.Module:
        home = self.root
        for parent in parents:
            if parent not in home._modules:
                home.add_module(parent, nn.Module())
            home = home.get_submodule(parent)
        return home


def plain_name(name: str) -> str:
    """An identifier like a tensor's name: signs that it cannot have are low lines."""
    base = "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in name).strip("_")[:200] or "tensor"
    return writable(base if not base[0].isdigit() else f"tensor_{base}")


def settled(value: Any) -> Any:
    """Numbers of shapes none of which follows from the input are a constant; anything else is left as it is."""
    if not isinstance(value, np.ndarray) or any(isinstance(number, Size) for number in value.flat):
        return value
    kinds = {type(number) for number in value.flat}
    dtype = torch.bool if kinds == {bool} else torch.float32 if float in kinds else torch.int64
    return torch.tensor(value.tolist(), dtype=dtype)


def one_of(value: Sizes) -> Any:
    """The one number of an array.

    Raises:
        Undecided: it has several.
    """
    if value.size != 1:
        raise Undecided("computes with the sizes of the input as with data")
    return value.reshape(-1)[0]


def _without_repeats(name: str) -> list[str]:
    """The path in a node name of torch's older exporter: `/layer1/layer1.0/conv1/Conv` -> layer1, 0, conv1."""
    path: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        names = part.split(".")
        for length in range(len(names), 0, -1):  # leave out the beginning of the part that repeats the end of the path
            if path[-length:] == names[:length]:
                names = names[length:]
                break
        path += names
    return path


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return [value]


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(function(value.start), function(value.stop), function(value.step))
    return function(value)


def _sample(leaf: Any, *, number: int) -> Any:
    if isinstance(leaf, (Traced, Size)):
        return leaf.samples[number]
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf
