"""Records what a module computes while its own code runs on an example. See `shapes` for the rules."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from indistill_fx.errors import FrontendError
from indistill_fx.graph.draws import Lines, TensorDraws
from indistill_fx.graph.edit import mark_place
from indistill_fx.graph.module_state import settings_of
from indistill_fx.graph.ops import writes_first
from indistill_fx.passes.capture.captured import Captured, is_leaf, parts, returned, tensors
from indistill_fx.passes.capture.recorded_graph import RecordedGraph
from indistill_fx.passes.capture.symbolic_sizes import UnhashableSizeError, new_size, taken_number
from indistill_fx.passes.capture.torch_functions import (
    DATA,
    FACTORIES,
    SHAPES,
    SILENT,
    AppliedFunction,
    DrawError,
    as_call,
    before_own_gradients,
    decided,
    name_of,
    plain,
    refused_draw,
    refused_line,
    refused_write,
    watching_autocast,
    writes_itself,
)

_call_module = nn.Module.__call__
_apply = inspect.getattr_static(torch.autograd.Function, "apply")


class Recorder(RecordedGraph, TorchFunctionMode):
    """One run of a module, recorded.

    Args:
        module: the module; its code is run, its weights are not changed, its buffers may be.
        leaves: paths of submodules to keep as one node.
        unregistered: tensors that are held in attributes, are not buffers, and are changed by the code; by name.
        lines: finds draws from Python's and numpy's generators.
        given_up: submodules to keep as one node because they cannot be traced, each with the line of code that is why. Unless None, the
            smallest submodule that cannot be traced is kept likewise, instead of failing.
    """

    def __init__(
        self,
        module: nn.Module,
        leaves: Sequence[str],
        unregistered: Mapping[str, Tensor],
        lines: Lines,
        *,
        given_up: Mapping[str, str] | None = None,
    ):
        TorchFunctionMode.__init__(self)
        RecordedGraph.__init__(self, module, unregistered)
        self.wanted, self.give_up_submodules = frozenset((*leaves, *(given_up or ()))), given_up is not None
        self.paths = {id(part): path for path, part in module.named_modules()}
        self.calls: Counter[str] = Counter()
        self.given_up = dict(given_up or {})
        self.paused, self.plain_sizes = False, False
        self.hopeless: BaseException | None = None
        self.draws, self.lines = TensorDraws(), lines
        self.drawing: dict[tuple[str, str], list[str]] = {}
        self.leaf_draws = False

    def run(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the module once and record it.

        Raises:
            FrontendError: a part of the code cannot be traced.
        """
        self.placeholders(inputs, kwargs)
        self.grad = torch.is_grad_enabled()
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder.call(module, args, kwargs)

        try:
            autocast = watching_autocast(lambda: self.paused)
            with (
                patch.object(nn.Module, "__call__", call),
                self._own_gradients(),
                autocast as self.notes,
                self.lines,
                self.draws,
                self,
            ):
                result = self.module(*inputs, **kwargs)
                self._refuse_lines()
            self.graph.output(self.argument(result))
            self.write_back()
        except FrontendError:
            raise
        except Exception as error:  # the caller's code may raise anything, especially when it meets a recorded tensor
            raise FrontendError(
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            ) from error

    # ---- functions --------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Torch calls this instead of each of its functions."""
        kwargs, name = kwargs or {}, name_of(func)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if not self.paused and isinstance(source, nn.Parameter) and writes_itself(func, args, kwargs):
            raise refused_write(self.here(), self.names.get(id(source), ""))
        takes_draw = (name in DATA and self.draws.holds(args)) or (name in SHAPES and self.draws.sized(source))
        if self.paused or name in SILENT:
            self.draws.taken += takes_draw
            return func(*plain(args), **plain(kwargs))
        if takes_draw:
            raise refused_draw(self.here())
        known, taken = self.nodes.get(source) if source is not None else None, self.draws.taken
        if (
            name in SHAPES
            and source is not None
            and known is not None
            and (known in self.of_input or known in self.of_sizes)
        ):
            return self._shape(source, known, name, *args[1:], **kwargs)
        result = self._take_data(func, args, kwargs) if name in DATA else func(*plain(args), **plain(kwargs))
        if name in FACTORIES and isinstance(args[-1] if args else kwargs.get("data"), np.ndarray):
            return result  # a constant, whatever tensor gives dtype and device
        op, target, arguments = as_call(func, args)
        written = source if target is operator.setitem else None
        if not tensors(result) and written is None:
            return result
        if self.draws.taken != taken:
            self.draws.size_taken(result)
        inplace = writes_first(op, target, kwargs)
        if not inplace:
            result = _distinct(result, args)
        if isinstance(result, (tuple, list)) and known in self.of_input:
            self.book.decide(len(result), reported=False)
        node = self.create(op, target, self.argument(arguments), self.argument(kwargs))
        if inplace and source is not None and self.is_outside(source):
            raise refused_line(
                f"{self.here()} writes into a tensor that lives on after the call, and is not a buffer",
                expected="state in buffers, or in attributes of the module",
                instead="Keep the tensor with register_buffer",
            )
        if inplace and source is not None and self.node_of(source).op == "get_attr":
            self.of_state.update((self.node_of(source), node))
        self.track(result if written is None else written, node)
        return result

    def _shape(self, tensor: Tensor, node: fx.Node, name: str, dim: int | None = None) -> Any:
        if name in ("shape", "size") and dim is None:
            return torch.Size([self._size(n, node, k) for k, n in enumerate(tensor.shape)])
        if name == "size" and dim is not None:
            return self._size(tensor.shape[dim], node, int(dim))
        if name == "__len__":
            self.book.note_asking()
            return new_size(self.book, len(tensor), "size", (node, 0)).plain()  # `len` must return an int
        return new_size(self.book, tensor.numel(), "numel", (node,))

    def _size(self, value: int, node: fx.Node, axis: int) -> Any:
        size = new_size(self.book, value, "size", (node, axis))
        return size.plain() if self.plain_sizes and axis else size

    def _take_data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Rule 3. Data computed from sizes alone is a decision on sizes; unregistered tensors are always allowed."""
        of_sizes, taken = False, None
        for tensor in tensors(args):
            node = self.nodes.get(tensor)
            of_sizes |= node in self.of_sizes
            if id(tensor) in self.names or node in self.of_input or node in self.of_state:
                if name_of(func) in ("__int__", "__float__"):
                    self.book.note_asking()  # recorded once more, `int` and `float` call `item`
                if name_of(func) != "item" or node is None or tensor.is_complex():
                    raise self.refused_data()
                taken = node
        result = func(*plain(args), **plain(kwargs))
        if taken is not None:
            return taken_number(self.book, result, taken)
        if of_sizes:
            self.book.decide(str(result))
        return result

    # ---- modules ----------------------------------------------------------------------------------------------------
    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for `nn.Module.__call__`."""
        path = self.paths.get(id(module))
        if self.paused or path is None:
            return _call_module(module, *args, **kwargs)
        self._refuse_lines()
        self.calls[path] += 1
        name = path if self.calls[path] == 1 else f"{path}@{self.calls[path]}"
        before, outside = self.mark(), self.book.module
        self.stack[name], self.book.module = (path, type(module)), path
        try:
            if path in self.wanted or (path and is_leaf(module)):
                result = self._call_leaf(module, path, args, kwargs)
            else:
                try:
                    result = self._call_inside(module, args, kwargs, before)
                    self._refuse_lines()
                except Exception as error:
                    if not self.give_up_submodules or not path or error is self.hopeless:
                        raise
                    self.roll_back(before)
                    self.lines.skip()
                    self.given_up[path] = _place(error)
                    if isinstance(error, DrawError):
                        self.lines.suspect(path)
                        self.drawing.setdefault((error.where, str(error.got)), []).append(path)
                    result = self._call_leaf(module, path, args, kwargs)
        finally:
            self.stack.pop(name, None)
            self.book.module = outside
        for tap, tensor in returned(name, result, Tensor):
            node = self.nodes.get(tensor)
            if node is not None:
                self.outputs.append((tap, node, self.order[-1]))
        return result

    def _call_inside(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: tuple[int, int, int, int]
    ) -> Any:
        """Run the module's own code; code that looks things up by size gets plain numbers, which are decisions, for all but the batch."""
        try:
            return _call_module(module, *args, **kwargs)
        except UnhashableSizeError:
            if self.plain_sizes:
                raise
            self.roll_back(before)
        self.plain_sizes = True
        try:
            return _call_module(module, *decided(args), **decided(kwargs))
        finally:
            self.plain_sizes = False

    def apply(self, function: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for `autograd.Function.apply` in the third method: one node, since its gradient is its own."""
        if self.paused:
            return _apply.__get__(None, function)(*args, **kwargs)
        name = f"_function{len(self.functions)}"
        self.functions[name] = f"{self.book.module}:{function.__name__}"
        return self._call_leaf(AppliedFunction(function), name, args, kwargs)

    @contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """In the third method: custom functions become nodes; one whose `apply` was taken from its class before cannot."""
        if not self.give_up_submodules:
            yield
            return
        recorder = self

        def apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            return recorder.apply(function, args, kwargs)

        def begin(function: type[torch.autograd.Function]) -> None:
            if recorder.grad and not recorder.paused:
                name = function.__name__
                raise refused_line(
                    f"{recorder.here()} calls {name}, a function with a gradient of its own, by an `apply` that was kept from before",
                    expected=f"{name}.apply(...) in the forward",
                    instead=f"Write {name}.apply(...) there",
                )

        with patch.object(torch.autograd.Function, "apply", classmethod(apply)), before_own_gradients(begin):
            yield

    def _call_leaf(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments, keywords = self.argument(args), self.argument(kwargs)
        self.paused = self.lines.paused = True
        taken, settings = self.draws.taken, _settings(module)
        try:
            result = _call_module(module, *plain(args), **plain(kwargs))
            if getattr(module, "inplace", False) is not True:
                result = _distinct(result, (args, kwargs))
        except Exception as error:
            self.hopeless = error
            raise
        finally:
            self.paused = self.lines.paused = False
            drawn = self.lines.leaf_draws(path) or self.draws.taken != taken
        if drawn:
            self.leaf_draws = True
            self._refuse_leak(module, path, result, settings)
        self.targets[path] = module
        node = self.create("call_module", path, arguments, keywords)
        if path in self.given_up:
            mark_place(node, self.given_up[path])
        self.track(result, node)
        return result

    # ---- draws ------------------------------------------------------------------------------------------------------
    def _refuse_lines(self) -> None:
        """Refuse a draw from Python's or numpy's generators by the code that has run until here."""
        if (place := self.lines.found()) is not None:
            raise refused_draw(self.here(), place=place)

    def _refuse_leak(self, module: nn.Module, path: str, result: Any, settings: object) -> None:
        """Refuse a leaf that draws, where other code may get the number from it."""
        if not all(leaf is None or isinstance(leaf, Tensor) for _, leaf in parts(result)):
            raise refused_draw(self.here())
        if _settings(module) != settings:
            raise FrontendError(
                f"`{path}` draws random numbers outside tensors, and changes its attributes, which other code may read",
                where=path,
                hint="Keep what only its own code reads in attributes whose names begin with _.",
            )

    def node_of(self, tensor: Tensor) -> fx.Node:
        """As the recording's own; a drawn tensor that no function has returned must not become a constant."""
        if self.nodes.get(tensor) is None and id(tensor) not in self.names and self.draws.holds(tensor):
            raise refused_draw(self.here())
        return super().node_of(tensor)

    def captured(self, leaves: Sequence[str] = ()) -> Captured:
        """As the recording's own; modules that stay whole because they draw have a line each in the report."""
        for (place, expression), paths in self.drawing.items():
            names = ", ".join(f"`{path}`" for path in dict.fromkeys(paths))
            self.notes.append(
                f"{names}: one node that draws anew at each call, because {place} uses a random number outside tensors"
                f" (`{expression}`); layers inside cannot be paired"
            )
        return replace(super().captured(leaves), draws=self.leaf_draws)


def _place(error: Exception) -> str:
    """The line of code that cannot be traced, or what it raises."""
    if isinstance(error, FrontendError) and error.got is not None:
        return f"{error.where}: {error.got}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _settings(module: nn.Module) -> object:
    return None if is_leaf(module) else settings_of(module)


def _distinct(result: Any, args: Any) -> Any:
    """The result; as a new tensor object if the function returned its argument itself (dropout in eval mode, contiguous, to)."""
    if isinstance(result, Tensor):
        return result.view_as(result) if any(result is given for given in tensors(args)) else result
    return result
