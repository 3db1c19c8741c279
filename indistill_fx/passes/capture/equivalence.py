"""What the module itself computes on the example, and whether a graph computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointFunction

from indistill_fx.errors import FrontendError
from indistill_fx.graph.draws import Generators
from indistill_fx.graph.edit import batch_of, batch_size
from indistill_fx.graph.module_state import Change, State, real_dtype, state_kept
from indistill_fx.passes.capture.captured import tensors
from indistill_fx.system.exact_arithmetic import exact_arithmetic

_SIZES = (2, 3)
_TOLERANCE = 1e-5
_GRADIENT_TOLERANCE = 1e-4
_SMALL = (40, 64)  # the first is cheapest; some networks need a multiple of 32
_LARGE = 64


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a module: its arguments, the tensors it returned, what it wrote, and gradients by parameter if asked for.

    Attributes:
        kept_gradients: names of buffers that depend on parameters afterwards, so that the next backward pass fails.
    """

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]
    buffers: dict[str, Tensor]
    changed: list[Change]
    gradients: dict[nn.Parameter, Tensor]
    kept_gradients: set[str]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep fused inference kernels off: their operations cannot be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Run the code of reentrant activation checkpoints as it stands: their own function runs it without gradients."""

    def apply(function: Callable[..., Any], _preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)

    with patch.object(CheckpointFunction, "apply", apply):
        yield


class Reference:
    """A module and its example, run on demand on batches of several sizes. Buffers written by a run are put back.

    Args:
        module: in the mode (train or eval) in which it is traced.
        inputs: example arguments.
        kwargs: example keyword arguments.
        gradients: whether the graph will be trained, so that the gradients of the parameters must agree too.
        put_back: gives the parameters the values they had, called after each run of module or graph; returns whether they had others.
        forget: gives attributes, buffers and caches what they had, called after each capture: code may keep a stand-in of a tensor there.
            Returns the attributes that were others.
        generators: the random generators that its code can draw from, if they are known.

    Attributes:
        changed: attributes of the module that its forward changes, by name, as far as was seen.
        writes_weights: whether a run has changed a parameter.
        whole, in_pieces: submodules that no graph follows, and whether one of them takes a larger batch apart into more pieces.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        gradients: bool = False,
        put_back: Callable[[], bool] = lambda: False,
        forget: Callable[[], Sequence[Change]] = lambda: (),
        generators: Generators | None = None,
    ):
        self.module, self.inputs, self.kwargs, self.gradients = module, inputs, kwargs, gradients
        self._put_back, self._forget = put_back, forget
        self.writes_weights = False
        self.changed: dict[str, Change] = {}
        self.whole, self.in_pieces = tuple[str, ...](), False
        self.generators = generators or Generators(module)
        self.example = batch_size((inputs, kwargs))
        self.notes: tuple[str, ...] = ()
        self._runs: dict[tuple[int, int, int, bool], Run | str] = {}
        self._sizes: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes to compare: two, or only the example's where the module accepts no other.

        Raises:
            FrontendError: the module fails on the example input itself (where="forward").
        """
        if not self._sizes:
            failures = {size: run for size in _SIZES if isinstance(run := self._run(size), str)}
            if not failures:
                self._sizes = _SIZES
                return self._sizes
            run = self._run(self.example)
            if isinstance(run, str):
                dtype = other_dtype(self.module, tensors((self.inputs, self.kwargs)), run)
                raise FrontendError(
                    f"the forward of {type(self.module).__name__} fails on the example input {self._shapes()}: {run}",
                    where="dtype" if dtype else "forward",
                    hint=dtype
                    or "Check the shape of one sample (--input or example_inputs, channels first, such as 3x224x224), or, "
                    "if it comes from the data, how images are prepared (--size, --channels).",
                )
            size, failure = next(iter(failures.items()))
            self._sizes = (self.example,)
            self.notes = (
                *self.notes,
                f"the module itself fails with batch size {size} ({failure}); only {self.example} was checked",
            )
        return self._sizes

    @property
    def lists_samples(self) -> bool:
        """Whether the module returns tensors for each sample, as detectors do: their number changes with the batch size."""
        runs = [self._run(size) for size in self.sizes]
        return len({len(run.outputs) for run in runs if isinstance(run, Run)}) > 1

    def put_back(self) -> bool:
        """Restore the parameters' values; records, and returns, whether they had changed."""
        self.writes_weights |= self._put_back()
        return self.writes_weights

    def forget(self) -> None:
        """Restore attributes, buffers and caches to their state before a capture, and record what had changed."""
        self._note(self._forget())

    def keep_whole(self, paths: Iterable[str]) -> None:
        """Note submodules that a graph cannot follow."""
        self.whole = tuple(dict.fromkeys((*self.whole, *paths)))

    def _note(self, changed: Sequence[Change]) -> None:
        # constants that fx itself added
        self.changed.update((c.name, c) for c in changed if not c.attribute.startswith("_tensor_constant"))

    def kept(self, graph_module: nn.Module) -> AbstractContextManager[State | None]:
        """Within the block a graph may run; state that its parts keep between calls is restored afterwards."""
        return state_kept(graph_module) if self.changed else nullcontext()

    @property
    def unregistered(self) -> dict[str, Tensor]:
        """Tensors that the forward changes although they are not buffers, by the names of their attributes; results of autograd apart."""
        before = {name: change.before for name, change in self.changed.items()}
        return {name: value for name, value in before.items() if isinstance(value, Tensor) and value.is_leaf}

    @property
    def written(self) -> list[Tensor]:
        """The tensors that the forward changes, parameters (all, if one is), buffers or others."""
        names = {name for run in self._runs.values() if isinstance(run, Run) for name in run.buffers}
        buffers = (buffer for name, buffer in self.module.named_buffers() if name in names) if names else ()
        return [*buffers, *self.unregistered.values(), *(self.module.parameters() if self.writes_weights else ())]

    @contextmanager
    def any_size(self) -> Iterator[None]:
        """Within the block, assume that the module accepts two batch sizes; if the block fails, test it by running the module."""
        self._sizes = _SIZES
        try:
            yield
        except BaseException:
            self._sizes = ()
            raise

    def batch(self, size: int, crop: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example with another batch size, images cropped to `crop` pixels if that is given."""
        given = (self.inputs, dict(self.kwargs))
        if crop:
            given = tree_map(lambda leaf: leaf[:, :, :crop, :crop] if isinstance(leaf, Tensor) else leaf, given)
        inputs, kwargs = batch_of(given, size, example_size=self.example)
        return inputs, kwargs

    def compare(self, graph_module: nn.Module, *, size_free: bool = False) -> tuple[tuple[int, float], ...]:
        """Run the graph beside the module, with the same seed: outputs and, in train mode, buffers must agree.

        Args:
            graph_module: takes the module's arguments, keyword arguments too, in order.
            size_free: no size of the example has decided anything in the graph, so one batch size is enough, of cropped images.

        Returns:
            (batch size, largest difference relative to the largest value) per batch size compared.

        Raises:
            FrontendError: they differ, or the graph fails.
        """
        checked = self._compare_sizes(graph_module, size_free=size_free)
        if self.changed or self.writes_weights:
            self._compare_calls(graph_module)
        return checked

    def _compare_sizes(self, graph_module: nn.Module, *, size_free: bool) -> tuple[tuple[int, float], ...]:
        for crop in _SMALL if size_free and self._croppable() else ():
            with suppress(FrontendError):  # the module may treat small images differently
                return ((_SIZES[0], self._difference(graph_module, _SIZES[0], crop)),)
        if size_free:
            return ((_SIZES[0], self._difference(graph_module, _SIZES[0])),)
        return tuple((size, self._difference(graph_module, size)) for size in self.sizes)

    def _compare_calls(self, graph_module: nn.Module) -> None:
        """Require that two successive calls agree, if the first one changes any state."""
        try:
            self._difference(graph_module, self.sizes[0], calls=2)
        except FrontendError as error:
            names = ", ".join(f"`{name}`" for name in self.changed) or "what it writes into parameters"
            owners = dict.fromkeys(change.part for change in self.changed.values())
            self.keep_whole(filter(None, owners))
            raise FrontendError(
                f"the forward keeps {names} from one call to the next, which the graph does not: at the second call, {error.message}",
                where=next(iter(self.changed), ""),
                hint="Keep it in a buffer of a fixed shape (register_buffer), or move the code that changes it into a submodule"
                " of its own, which then stays one node in the graph.",
            ) from error

    def _croppable(self) -> bool:
        given = tensors((self.inputs, self.kwargs))
        return bool(given) and all(tensor.dim() == 4 and min(tensor.shape[2:]) >= _LARGE for tensor in given)

    def _run(self, size: int, crop: int = 0, calls: int = 1) -> Run | str:
        gradients = calls == 1 and self._wants_gradients(size)
        key = (size, crop, calls, gradients)
        if key not in self._runs:
            inputs, kwargs = self.batch(size, crop)
            run = self._once(self.module, inputs, kwargs, gradients=gradients, calls=calls)
            if isinstance(run, str) and gradients:
                plain = self._once(self.module, inputs, kwargs, gradients=False)
                if isinstance(plain, Run):
                    self.gradients = False
                    self.notes = (
                        *self.notes,
                        f"gradients were not compared, because the module itself cannot be trained as it is ({run})",
                    )
                run = plain
            if isinstance(run, Run):
                self._note(run.changed)
            self._runs[key] = run
        return self._runs[key]

    def _once(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        gradients: bool,
        calls: int = 1,
    ) -> Run | str:
        self.generators.restart()
        try:
            return _run_module(module, inputs, kwargs, gradients=gradients, calls=calls)
        finally:
            self.put_back()

    def _difference(self, graph_module: nn.Module, size: int, crop: int = 0, calls: int = 1) -> float:
        run = self._run(size, crop, calls)
        if isinstance(run, str):
            raise FrontendError(f"the module fails with batch size {size}: {run}")
        gradients = calls == 1 and self._wants_gradients(size)
        graph_run = self._once(graph_module, (*run.inputs, *run.kwargs.values()), {}, gradients=gradients, calls=calls)
        if isinstance(graph_run, str):
            raise FrontendError(f"the graph fails with batch size {size}: {graph_run}")
        if [leaf.shape for leaf in run.outputs] != [leaf.shape for leaf in graph_run.outputs]:
            raise FrontendError(f"with batch size {size} the graph's outputs have other shapes than the module's")
        worst = max(
            (relative_difference(a, b) for a, b in zip(run.outputs, graph_run.outputs, strict=True)), default=0.0
        )
        if not worst <= _TOLERANCE:
            raise FrontendError(
                f"with batch size {size} the graph differs from the module by {worst:.1e} of the largest value"
            )
        self._compare_buffers(run, graph_run, graph_module, size)
        self._compare_gradients(run, graph_run)
        if graph_run.kept_gradients and not run.kept_gradients:
            names = ", ".join(f"`{name}`" for name in sorted(graph_run.kept_gradients))
            raise FrontendError(f"the graph would write {names} with gradients, which the module does without")
        return worst

    def _compare_buffers(self, run: Run, graph_run: Run, graph_module: nn.Module, size: int) -> None:
        if not run.buffers and not graph_run.buffers:
            return
        unwritten = dict(self.module.named_buffers())
        names = {id(buffer): name for name, buffer in unwritten.items()}
        for own_name, buffer in graph_module.named_buffers():
            name = names.get(id(buffer), own_name)
            if name in unwritten and (own_name in graph_run.buffers or name in run.buffers):
                expected, got = run.buffers.get(name, unwritten[name]), graph_run.buffers.get(own_name, buffer)
                if not relative_difference(expected, got) <= _TOLERANCE:
                    raise FrontendError(f"with batch size {size} the graph leaves another value in the buffer `{name}`")

    def _wants_gradients(self, size: int) -> bool:
        # Gradients are compared at one batch size only, because they are expensive.
        return self.gradients and size == (_SIZES[0] if not self._sizes else self._sizes[0])

    def _compare_gradients(self, run: Run, graph_run: Run) -> None:
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        largest = max((float(g.abs().max()) for g in run.gradients.values() if g.numel()), default=0.0)
        for parameter in (parameter for parameter in {**run.gradients, **graph_run.gradients} if parameter.numel()):
            a, b = (side.gradients.get(parameter, torch.zeros(())) for side in (run, graph_run))
            if not float((a - b).abs().max()) <= _GRADIENT_TOLERANCE * max(largest, 1e-30):
                name = names.get(parameter, "a parameter")
                raise FrontendError(
                    f"the graph's gradient of `{name}` is not the module's (a custom gradient, or one switched off?)"
                )

    def _shapes(self) -> str:
        return ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors((self.inputs, self.kwargs)))


def _run_module(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], *, gradients: bool, calls: int
) -> Run | str:
    """The result of the last of several successive calls; the earlier ones get other data."""
    with state_kept(module) as state:
        try:
            with torch.set_grad_enabled(gradients), plain_attention(), plain_checkpoints(), exact_arithmetic():
                for _ in range(calls - 1):
                    _forward(module)(*tree_map(_halved, inputs), **tree_map(_halved, kwargs))
                outputs = tensors(_forward(module)(*inputs, **kwargs))
            written, changed, kept = state.written_buffers(), state.changed(), state.with_gradients()
            found = _gradients(module, outputs) if gradients else {}
        except Exception as error:  # the caller's code may raise anything
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return Run(inputs, kwargs, [output.detach() for output in outputs], written, changed, found, kept)


def _halved(leaf: Any) -> Any:
    return leaf / 2 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _forward(module: nn.Module) -> Callable[..., Any]:
    """The function to call: a graph's forward itself unless that skips a hook, because fx prints exceptions otherwise."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return module.forward if isinstance(module, fx.GraphModule) and not hooked else module


def _gradients(module: nn.Module, outputs: list[Tensor]) -> dict[nn.Parameter, Tensor]:
    """Gradients of a random combination of all outputs; those of parameters that it does not depend on are left out."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    outputs = [output for output in outputs if output.requires_grad and output.numel()]
    if not outputs or not trained:
        return {}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.autograd.grad(outputs, trained, weights, allow_unused=True)
    return {parameter: gradient for parameter, gradient in zip(trained, found, strict=True) if gradient is not None}


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference relative to the largest finite value; NaN and infinity must stand at the same places."""
    if not expected.numel():
        return 0.0
    if expected.is_complex():
        expected, got = torch.view_as_real(expected), torch.view_as_real(got)
    a, b = expected.detach().double(), got.detach().double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = a[finite].abs().max().clamp_min(1e-30)
    return float((a - b)[finite].abs().max() / scale)


def other_dtype(module: nn.Module, given: Sequence[Tensor], error: str) -> str | None:
    """What to do if a module failed because the inputs' dtype is not its weights'; None if that is not the reason."""
    weights = real_dtype(module)
    other = next((x.dtype for x in given if x.dtype != weights), None)
    if weights is None or other is None or "type" not in error:
        return None
    own = f", or the model be in {other} (model.to({other}))" if other.is_floating_point else ""
    return (
        f"The weights are {weights}, an input is {other}: let the loader give it as {weights} (x.to({weights})){own}."
    )
