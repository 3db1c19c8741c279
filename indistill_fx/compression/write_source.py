"""A network as source code: `student.py` with a class `Student`, and a file of weights. Plain PyTorch, without indistill-fx.

Rules, in order:
  1. A module of the original becomes a class again where its nodes stand together and all its calls do the same.
  2. Modules that differ in numbers only share a class, and the numbers become its arguments.
  3. What no output needs is left out, checks of sizes too: it would be passed from class to class for nothing.
  4. The written code is run with the saved weights: its outputs must be bit-identical to the graph's.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from indistill_fx.compression.source_blocks import Writer
from indistill_fx.compression.source_classes import class_texts
from indistill_fx.compression.source_forward import self_path
from indistill_fx.compression.source_layers import without_copies
from indistill_fx.compression.source_pieces import Imports, Line, unwritable
from indistill_fx.compression.source_scopes import Dissolve, scopes_of
from indistill_fx.errors import ConfigError, ExportError
from indistill_fx.graph.edit import copy_graph, sweep
from indistill_fx.graph.module_state import mode, untouched
from indistill_fx.runs.directory import PLAN
from indistill_fx.runs.model_facts import FACTS
from indistill_fx.system.exact_arithmetic import exact_arithmetic
from indistill_fx.system.files import make_folder, staged
from indistill_fx.system.nested import map_tensors
from indistill_fx.system.tensor_files import header_of
from indistill_fx.traced import TracedModel

SOURCE, WEIGHTS = "student.py", "student.safetensors"
_CODE = "code"
"""The entry of the weights' header that holds the digest of student.py; digests of other files go by their names."""


@dataclass(frozen=True)
class StudentSource:
    """A network as source code.

    Attributes:
        text: of `student.py`.
        state: weights and buffers by the names they have in `Student`.
    """

    text: str
    state: dict[str, Tensor]

    def build(self) -> nn.Module:
        """Build a new `Student` with these weights, in train mode."""
        namespace = types.ModuleType("student")
        other = sys.modules.get("student")
        sys.modules["student"] = namespace  # dataclasses look there for the module that they stand in
        try:
            exec(compile(self.text, SOURCE, "exec"), namespace.__dict__)
        finally:
            del sys.modules["student"]
            if other is not None:
                sys.modules["student"] = other
        student: nn.Module = namespace.Student()
        student.load_state_dict(self.state)
        return student

    def save(self, directory: Path, beside: Mapping[str, str] | None = None) -> str:
        """Write all files or none, the weights first; the header of these holds the digests of all the others.

        Args:
            directory: created if it does not exist.
            beside: texts of further files by name; one that is empty is not written, and an older file of that name is removed.

        Returns:
            The model spec that loads them.

        Raises:
            ConfigError: they cannot be written.
        """
        make_folder(directory)
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.state.items()}
        texts = {SOURCE: self.text, **(beside or {})}
        digests = {_entry(name): _digest(text.encode()) for name, text in texts.items() if text}
        with staged(directory / SOURCE) as draft:
            draft.with_name(WEIGHTS).write_bytes(save(tensors, digests))
            for name, text in texts.items():
                if text:
                    draft.with_name(name).write_bytes(text.encode())
        for name in (name for name, text in texts.items() if not text):
            (directory / name).unlink(missing_ok=True)
        return f"{directory / SOURCE}:Student@{directory / WEIGHTS}"


def check_own(directory: Path) -> None:
    """Refuse to overwrite what was changed since `StudentSource.save` wrote it.

    Raises:
        ConfigError: the directory holds a student.py, student.safetensors, plan.json or student.json that `save` did not write, or that
            was changed.
    """
    weights = directory / WEIGHTS
    known = header_of(weights)
    if weights.exists() and _CODE not in known:
        raise overwritten(weights)
    for name in (SOURCE, PLAN, FACTS):
        file = directory / name
        if file.exists() and (not file.is_file() or known.get(_entry(name)) != _digest(file.read_bytes())):
            raise overwritten(file)


def _entry(name: str) -> str:
    return _CODE if name == SOURCE else name


def overwritten(file: Path) -> ConfigError:
    """The error for a student that would be lost."""
    train = f" To train it as it is: distill TEACHER {file}:Student." if file.name == SOURCE else ""
    return ConfigError(
        f"{file} was written or changed by somebody else, and would be overwritten.",
        where=str(file),
        hint=f"Move it away, or name another directory.{train}",
    )


def _digest(code: bytes) -> str:
    return sha256(code).hexdigest()


def source_of(model: TracedModel) -> StudentSource:
    """Write a network as source code, and prove it.

    Args:
        model: any traced network, shrunk or not; it is not changed.

    Returns:
        The source and the weights.

    Raises:
        ExportError: a construct has no source code; it is named.
    """
    if model.report.lacks_eval_mode:
        problem = "in eval mode its source code would compute what train mode does; trace it with role='teacher'"
        raise unwritable("the network", problem)
    model = _as_loaded(model)
    graph_module, dissolved = sweep(without_copies(copy_graph(model.graph_module)[0])), set[str]()
    while True:
        root, places = scopes_of(graph_module, dissolved)
        writer = Writer(graph_module, places, model.facts)
        try:
            block = writer.root(root)
            break
        except Dissolve as found:
            if not found.path or found.path in dissolved:
                raise unwritable(found.path or "the network", "its layers do not stand where their names say") from None
            dissolved.add(found.path)
    state = {name: tensor.detach().clone() for name, tensor in writer.state.items()}
    block = replace(block, setup=(*block.setup, *_in_dtype(state), *_frozen(writer.state)))
    classes = "\n\n".join(class_texts(block, writer.imports.records))
    text = _head(model) + _imports(writer.imports, classes) + "\n\n" + classes
    source = StudentSource(text, state)
    _prove(source, model, writer.state)
    return source


def _as_loaded(model: TracedModel) -> TracedModel:
    """The model with its weights in the order in memory in which a file gives them back: torch rounds otherwise in another order."""
    tensors = (*model.graph_module.parameters(), *model.graph_module.buffers())
    if all(tensor.is_contiguous() for tensor in tensors if tensor.layout is torch.strided):
        return model
    own = copy.deepcopy(model.graph_module)
    for tensor in (*own.parameters(), *own.buffers()):
        if tensor.layout is torch.strided:
            tensor.data = tensor.data.contiguous()
    return replace(model, graph_module=own)


def _in_dtype(state: Mapping[str, Tensor]) -> list[Line]:
    """The line that converts a network of another dtype than torch's own."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return [] if len(dtypes) != 1 or dtypes == {torch.get_default_dtype()} else [(f"self.to({dtypes.pop()})",)]


def _frozen(tensors: Mapping[str, Tensor]) -> Iterator[Line]:
    """Lines for what the network does not train: a layer or block as a whole, where all of it is frozen; none where all is."""
    flags = {name: tensor.requires_grad for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    done: set[str] = set()
    for name, trained in flags.items():
        parts = name.split(".")
        owners = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        if trained or not any(flags.values()) or not tensors[name].is_floating_point():
            continue
        frozen = next(
            owner for owner in owners if not any(flags[other] for other in flags if f"{other}.".startswith(f"{owner}."))
        )
        if frozen not in done:
            done.add(frozen)
            yield (f"{self_path(frozen)}.requires_grad_(False)",)


def _head(model: TracedModel) -> str:
    parameters = sum(parameter.numel() for parameter in model.graph_module.parameters())
    sizes = [tuple(value.shape[1:]) for value in model.example.tensors]
    shapes = ", ".join("x".join(map(str, size)) for size in sizes)
    return (
        f'"""Student: {parameters:,} parameters, {model.macs:,} multiply-accumulates a sample of {shapes}.\n\n'
        f'    student = Student()\n    student.load_state_dict(safetensors.torch.load_file("{WEIGHTS}"))\n"""\n\n'
    )


def _imports(imports: Imports, classes: str) -> str:
    """The import lines, and the source of our own classes and functions together with everything that they use."""
    own: dict[str, str] = {}
    todo = list(imports.own.items())
    lines = {"from torch import nn", *imports.lines}
    while todo:
        name, value = todo.pop(0)
        if name in own:
            continue
        module = inspect.getmodule(value)
        text = inspect.getsource(value)
        own[name] = text
        for used in sorted({node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}):
            found = getattr(module, used, None)
            if getattr(found, "__module__", None) == getattr(module, "__name__", "") and used not in own:
                todo.append((used, found))
            elif found is not None and used == "math":
                lines.add("import math")
            elif used == "functional":
                lines.add("from torch.nn import functional")
            elif found is not None and used in ("Sequence", "Mapping"):
                lines.add(f"from collections.abc import {used}")
            elif used == "Any":
                lines.add("from typing import Any")
            elif used == "Tensor":
                lines.add("from torch import Tensor, nn")
    records = imports.records.values()
    if records:
        lines.add("from typing import Any" + ", NamedTuple" * any("(NamedTuple)" in text for text in records))
        lines |= {"from dataclasses import dataclass"} if any("@dataclass" in text for text in records) else set()
    code = classes + "".join((*own.values(), *records))
    if re.search(r"(?<![\w.])torch\.", code):
        lines.add("import torch")
    if re.search(r"(?<![\w.])F\.", code):
        lines.add("import torch.nn.functional as F")
    if "from torch import Tensor, nn" in lines:
        lines.discard("from torch import nn")
    plain = sorted((line for line in lines if "torch" not in line), key=lambda line: (line.startswith("from"), line))
    torches = sorted((line for line in lines if "torch" in line), key=lambda line: (line.startswith("from"), line))
    future = "from __future__ import annotations\n\n" if own else ""
    head = future + "".join(f"{line}\n" for line in plain) + ("\n" if plain else "")
    body = "".join(f"\n\n{text}" for text in (*reversed(own.values()), *records))
    return head + "".join(f"{line}\n" for line in torches) + body


def _prove(source: StudentSource, model: TracedModel, tensors: Mapping[str, Tensor]) -> None:
    """Run the generated code and the graph in eval mode and in train mode, on the same random numbers, and compare outputs and buffers.

    Args:
        source: the generated code.
        model: the network.
        tensors: its parameters and buffers by their names in the code.

    Raises:
        ExportError: they differ, or the code does not run.
    """
    buffers = {name: value for name, value in tensors.items() if not isinstance(value, nn.Parameter)}
    device = next(iter(source.state.values()), torch.zeros(())).device
    for training in (False, True):
        try:
            expected = _outcome(model.graph_module, model, training, buffers)
        except RuntimeError:
            if training:  # such as a batch norm over one value
                return
            raise
        try:
            student = source.build().to(device)
            for name, parameter in student.named_parameters():  # torch multiplies by frozen weights in other orders
                parameter.requires_grad_(tensors[name].requires_grad)
            state = student.state_dict()
            got = _outcome(student, model, training, {name: state[name] for name in buffers})
        except ExportError:
            raise
        except Exception as error:  # the generated code may raise anything
            dtypes = {str(tensor.dtype) for tensor in source.state.values() if tensor.is_floating_point()}
            if dtypes - {"torch.float32"}:
                problem = (
                    f"its weights are {' and '.join(sorted(dtypes))}, and all layers of source code have one dtype"
                )
                raise unwritable("the network", problem) from error
            raise unwritable("the network", f"its source code does not run: {type(error).__name__}: {error}") from error
        difference = _difference(expected, got)
        if difference:
            where = "train" if training else "eval"
            raise unwritable("the network", f"its source code computes something else in {where} mode ({difference})")


Outcome = tuple[Any, dict[str, Tensor]]
"""Outputs, and the buffers afterwards."""


def _outcome(module: nn.Module, model: TracedModel, training: bool, buffers: Mapping[str, Tensor]) -> Outcome:
    """What a call does at the example, the module in one mode; it is as before afterwards."""
    inputs = map_tensors(model.example_values, lambda value: value.detach().clone())
    with untouched(module), mode(module, training=training), torch.no_grad(), exact_arithmetic():
        torch.manual_seed(0)
        return module(*inputs), {name: value.clone() for name, value in buffers.items()}


def _difference(expected: Outcome, got: Outcome) -> str:
    """What differs, in words; empty if nothing does."""
    outputs = [tree_flatten(_plain(outcome[0])) for outcome in (expected, got)]
    if outputs[0][1] != outputs[1][1]:
        return "its outputs have another structure"
    named = [("an output", *pair) for pair in zip(outputs[0][0], outputs[1][0], strict=True)]
    named += [(f"the buffer `{name}`", value, got[1][name]) for name, value in expected[1].items()]
    for what, one, other in named:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape:
                return f"{what} has the shape {tuple(other.shape)} instead of {tuple(one.shape)}"
            if not (torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)):
                return f"{what} differs by {float((one - other).abs().max()) if one.dtype != torch.bool else 1:.1e}"
        elif isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
            return f"{what} is {other!r} instead of {one!r}"
    return ""


def _plain(value: Any) -> Any:
    """Outputs with dicts, dataclasses, lists and tuples of any kind as dicts and lists."""
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
