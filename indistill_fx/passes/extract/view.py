"""What a teacher sees: the difference between a batch made for the student and what the teacher wants, as nodes of the teacher's graph.

Rules, in order:
  1. Images (real numbers of four axes) are resized, brought to three channels, rescaled channel by channel, brought to one channel; all
     real numbers are cast to the teacher's dtype.
  2. What the teacher delivers is cast to the student's dtype.
  3. Of its logits, those are delivered that stand for the student's classes, in the student's order.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.errors import ConfigError
from indistill_fx.graph.edit import copy_graph, input_nodes, output_node, sweep
from indistill_fx.graph.module_state import device_of
from indistill_fx.graph.view import View, coloured, grey, rescaled, resized
from indistill_fx.passes.contract import PassResult, Rewrite
from indistill_fx.traced import NodeFacts, TracedModel


def view_between(teacher: TracedModel, student: TracedModel, asked: View | None = None) -> View | None:
    """The teacher's view of the student's batches: its own, then what differs between the inputs that the two were traced with.

    Args:
        teacher: traced, with inputs as it sees them.
        student: traced.
        asked: what else is asked for, such as a plan's view.

    Raises:
        ConfigError: the images of the two have other numbers of channels than 1 and 3, or the teacher was traced with images of another
            size than is asked for.
    """
    teacher_images, student_images = _pictures(teacher), _pictures(student)
    found: dict[str, Any] = {}
    if len(teacher_images) == len(student_images) == 1:
        (first,), (second,) = teacher_images, student_images
        if first.shape[1] != second.shape[1]:
            found["channels"] = first.shape[1]
            if {first.shape[1], second.shape[1]} != {1, 3}:
                raise ConfigError(
                    f"The teacher takes images with {first.shape[1]} channels, and the student takes {second.shape[1]}.",
                    where="channels",
                    got=first.shape[1],
                    expected=second.shape[1],
                    hint="Only grey (1) and RGB (3) can be converted: put a convolution before the student.",
                )
        if first.shape[2:] != second.shape[2:]:
            found["size"] = tuple(first.shape[2:])
    dtypes = [next((value.dtype for value in _reals(model)), None) for model in (teacher, student)]
    if None not in dtypes and dtypes[0] != dtypes[1]:
        found["dtype"] = str(dtypes[0]).removeprefix("torch.")
    if (
        asked is not None
        and asked.size is not None
        and teacher_images
        and asked.size != tuple(teacher_images[0].shape[2:])
    ):
        raise ConfigError(
            f"The teacher is to be given images of {_sides(asked.size)}, but it was traced with {_sides(teacher_images[0].shape[2:])}.",
            where="size",
            got=tuple(teacher_images[0].shape[2:]),
            expected=asked.size,
            hint="Align anew with that size, or trace the teacher with images of it.",
        )
    return View.combined(teacher.view, View(**found), asked)


def _sides(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _reals(model: TracedModel) -> list[Tensor]:
    return [value for value in model.example.tensors if value.is_floating_point()]


def _pictures(model: TracedModel) -> list[Tensor]:
    return [value for value in _reals(model) if value.ndim == 4]


def see(
    graph_module: fx.GraphModule, view: View, facts: Mapping[str, NodeFacts]
) -> PassResult[fx.GraphModule, Rewrite]:
    """Rule 1.

    Args:
        graph_module: the teacher's.
        view: what it sees.
        facts: of the model it was cut from.
    """
    new, _ = copy_graph(graph_module)
    graph, done = new.graph, list[str]()
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        factors = _factors(new, graph, view, "view", device_of(new))
    for node in input_nodes(graph, facts):
        known, readers = facts[node.name], list(node.users)
        if not readers or not known.dtype.is_floating_point:
            continue
        with graph.inserting_before(first if node.op == "placeholder" else node.next):
            value, change = _seen(graph, node, view, factors, picture=len(known.shape) == 4)
        done += [f"{node.target if node.op == 'placeholder' else node.name}: {line}" for line in change]
        for reader in readers:
            reader.replace_input_with(node, value)
    return PassResult(sweep(new), Rewrite(done=tuple(done)))


def as_seen(
    root: nn.Module, graph: fx.Graph, inputs: Sequence[tuple[fx.Node, Any]], view: View, name: str
) -> list[Any]:
    """Inputs as one of several teachers sees them, in a graph that is being made.

    Args:
        root: of the module that it will be; constants go there.
        graph: the graph.
        inputs: each with an example of its value: a tensor, or several in a dict, tuple or list.
        view: the teacher's.
        name: what its constants are called by.
    """
    factors = _factors(root, graph, view, name, device_of(root))

    def seen(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: seen(graph.call_function(operator.getitem, (node, key)), part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            parts = [seen(graph.call_function(operator.getitem, (node, i)), part) for i, part in enumerate(value)]
            return type(value)(parts)
        real = isinstance(value, Tensor) and value.is_floating_point()
        return _seen(graph, node, view, factors, picture=value.ndim == 4)[0] if real else node

    return [seen(node, value) for node, value in inputs]


def _factors(root: nn.Module, graph: fx.Graph, view: View, name: str, device: torch.device) -> tuple[fx.Node, ...]:
    if view.rescaling is None:
        return ()
    factors = {f"{name}_scale": view.rescaling.scale, f"{name}_shift": view.rescaling.shift}
    return tuple(_constant(root, graph, name, value, device) for name, value in factors.items())


def _seen(
    graph: fx.Graph, value: fx.Node, view: View, factors: tuple[fx.Node, ...], *, picture: bool
) -> tuple[fx.Node, list[str]]:
    """An input of real numbers as a teacher sees it, and what was done, in words."""
    done = []
    if picture and view.size is not None:
        value = graph.call_function(resized, (value, view.size))
        done.append(f"resized to {_sides(view.size)}")
    if picture and view.channels == 3:
        value = graph.call_function(coloured, (value,))
        done.append("grey in three channels")
    if picture and view.rescaling is not None:
        value = graph.call_function(rescaled, (value, *factors))
        done.append(f"normalised by {view.rescaling.wanted}")
    if picture and view.channels == 1:
        value = graph.call_function(grey, (value,))
        done.append("RGB in grey")
    if view.dtype is not None:
        value = graph.call_method("to", (value, getattr(torch, view.dtype)))
        done.append(f"cast to {view.dtype}")
    return value, done


def deliver(
    graph_module: fx.GraphModule, dtype: torch.dtype, classes: Mapping[str, tuple[int, Sequence[int]]]
) -> PassResult[fx.GraphModule, Rewrite]:
    """Rules 2 and 3.

    Args:
        graph_module: the teacher's half, whose output is (features by tap, None).
        dtype: the student's.
        classes: by tap, the axis of its classes and those that are delivered.
    """
    new, _ = copy_graph(graph_module)
    output, done = output_node(new.graph), list[str]()
    parts: Any = output.args[0]
    delivered = dict(parts[0])
    with new.graph.inserting_before(output):
        for tap, node in delivered.items():
            if tap in classes:
                axis, chosen = classes[tap]
                index = _constant(new, new.graph, "view_classes", torch.tensor(chosen), device_of(new))
                node = new.graph.call_function(torch.index_select, (node, axis, index))
                done.append(f"{tap}: {len(chosen)} classes in the student's order")
            delivered[tap] = new.graph.call_method("to", (node, dtype))
    output.args = ((delivered, *parts[1:]),)
    done.append(f"delivered in {str(dtype).removeprefix('torch.')}")
    return PassResult(sweep(new), Rewrite(done=tuple(done)))


def _constant(root: nn.Module, graph: fx.Graph, name: str, value: Tensor, device: torch.device) -> fx.Node:
    root.register_buffer(name, value.to(device), persistent=False)
    return graph.get_attr(name)
