"""Run somebody else's module and leave it as it was found."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from indistill_fx.errors import FrontendError
from indistill_fx.graph.caches import OWN_ATTRIBUTES, as_before, containers_of, copy_of, held_values, restore
from indistill_fx.graph.computed_weights import left_behind, write_out_weights
from indistill_fx.graph.edit import with_tensors
from indistill_fx.graph.ops import attribute, has_attribute
from indistill_fx.graph.values import Values, dense_parts
from indistill_fx.system.random_state import is_generator, randomness_kept, set_state_of, state_of


def shadow(module: nn.Module, *, training: bool, memo: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A copy of a module tree that has training flags of its own and shares every parameter and buffer."""
    memo = {} if memo is None else memo
    if isinstance(module, torch.jit.ScriptModule):
        return module  # TorchScript code cannot be copied without its tensors
    if module not in memo:
        new = memo[module] = with_tensors(module, {})
        for name, child in module._modules.items():
            if child is not None:
                new._modules[name] = shadow(child, training=training, memo=memo)
        new.__dict__["training"] = training
    return memo[module]


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Set train or eval mode, and put every flag back as it was, whatever happens. Flags are written without calling `train()`."""
    before = [(child, child.training) for child in parts_of(module)]
    try:
        for child, flag in before:
            if flag is not training:
                child.training = training
        yield
    finally:
        for child, flag in before:
            if child.training is not flag:
                child.training = flag


def digest(module: nn.Module) -> str:
    """Digest of a module's weights, buffers, training and gradient flags: equal before and after what must not touch it."""
    total = hashlib.sha256()
    for name, child in module.named_modules():
        total.update(f"{name} {child.training} {type(child).__qualname__}".encode())
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    tensors: Iterable[tuple[str, Tensor]] = (*parameters, *buffers)
    for name, tensor in tensors:
        shape = "nested" if tensor.is_nested else tuple(tensor.shape)
        total.update(f"{name} {tensor.dtype} {shape} {tensor.requires_grad}".encode())
        for part in () if tensor.is_meta else dense_parts(tensor):
            total.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def uncompiled(module: nn.Module) -> nn.Module:
    """The user's own module, where torch.compile has wrapped it: its layers have the names that the user gave them."""
    while isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
        module = inner
    return module


def real_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's weights: that of the first of at least 16 bits; None where it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1), None)


def left_in_eval(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that its user has put into eval mode, and that stay there while the model trains.

    Of a model in train mode, all that are in eval mode. One that is in eval mode as a whole came so from a file; of it, the batch norms
    whose parameters are frozen.
    """
    parts = [part for part in model.modules() if not part.training]
    if model.training:
        return parts
    norms = [part for part in parts if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine]
    return [norm for norm in norms if not any(parameter.requires_grad for parameter in norm.parameters())]


def settings_of(module: nn.Module) -> list[tuple[str, str, object]]:
    """A module's plain settings: (path, attribute, value) of every public number, text and tuple but the training flag."""
    return [
        (name, attribute, value)
        for name, part in module.named_modules()
        for attribute, value in sorted(vars(part).items())
        if _is_plain(value) and not attribute.startswith("_") and attribute != "training"
    ]


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def parts_of(module: nn.Module) -> list[nn.Module]:
    """What `module.modules()` gives, in its order; several times faster on deep networks."""
    found: dict[int, nn.Module] = {}
    todo = [module]
    while todo:
        part = todo.pop()
        if id(part) not in found:
            found[id(part)] = part
            todo += [child for child in reversed(part._modules.values()) if child is not None]
    return list(found.values())


_OF_RECURRENT = frozenset({"_flat_weights", "_flat_weight_refs"})
"""Where torch's recurrent layers list their parameters anew as they need it."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_KEPT = (*_REGISTRIES, *(name for name in sorted(OWN_ATTRIBUTES) if "_hooks" in name))


@contextmanager
def weights_kept(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Put the values of all parameters back when the block ends; what it gives puts them back at once, and returns whether one was written.

    Some forward passes write parameters (`self.weight.data = normalize(self.weight)`), which no version counter shows. So values are
    compared in the second call, which follows the module's own first run (there, a sample of each large one), and at the end; in every
    call once a write was found.
    """
    weights = [(weight, weight.data, _version(weight)) for weight in module.parameters()]
    values = Values(weight for weight, *_ in weights)
    calls, writes = 0, False

    def put_back(*, last: bool = False) -> bool:
        nonlocal calls, writes
        calls += 1
        for weight, data, version in weights:
            if weight.data_ptr() != data.data_ptr() or weight.shape != data.shape:
                weight.data, writes = data, True
            writes = writes or _version(weight) != version
        if writes or last or calls == 2:
            writes = values.put_back(sample=not (writes or last)) or writes
            if writes and not last:
                values.put_back()
        return writes

    try:
        yield put_back
    finally:
        put_back(last=True)


def _version(tensor: Tensor) -> int:
    """How often torch has recorded a write to the tensor; tensors made in inference mode have no counter."""
    return 0 if tensor.is_inference() else tensor._version


class State:
    """What a module holds at one time, beside its parameters: attributes of its parts, buffers, hooks, what lists and dictionaries hold.

    Args:
        module: whose forward will run.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        parts = [part for part in parts_of(module) if not _is_compiled(part)]
        self._parts = [(part, dict(part.__dict__), [dict(part.__dict__.get(r, ())) for r in _KEPT]) for part in parts]
        self._containers = [(place, held, copy_of(held)) for place, held in containers_of(parts)]
        self._buffers = {id(b): b for part in parts_of(module) for b in part._buffers.values() if b is not None}
        held = held_values(parts, (container for _, container, _ in self._containers))
        generators = {id(value): value for value in held if is_generator(value)}
        self._generators = [(generator, state_of(generator)) for generator in generators.values()]
        arrays = {id(value): _shared(value) for value in held if isinstance(value, np.ndarray)}
        shared = {key: tensor for key, tensor in arrays.items() if tensor is not None}
        self._arrays = {id(tensor): key for key, tensor in shared.items()}
        held_tensors = {id(value): value for value in held if isinstance(value, Tensor)}
        self._leaves = [t for t in (*held_tensors.values(), *self._buffers.values()) if t.is_leaf and not t._is_view()]
        self._values = Values([*{**held_tensors, **self._buffers}.values(), *shared.values()])

    def put_back(self) -> None:
        """Restore everything, with the stored values."""
        for part, attributes, registries in self._parts:
            for name, entries in zip(_KEPT, registries, strict=True):
                held = attributes.get(name, {})
                held.clear()
                held.update(entries)
            part.__dict__.clear()
            part.__dict__.update(attributes)
        for _, container, before in self._containers:
            if container or before:
                restore(container, before)
        self._values.put_back()
        for tensor in self._leaves:
            if not tensor.is_leaf:  # written with gradients, of which the next run must not find any
                tensor.detach_()
        for generator, state in self._generators:
            set_state_of(generator, state)

    def written_buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers that have new values or were replaced by other tensors."""
        same = self._buffers.keys() - {id(buffer) for buffer, _ in self._values.changed()}
        return {name: b.detach().clone() for name, b in self.module.named_buffers() if id(b) not in same}

    def with_gradients(self) -> set[str]:
        """The buffers that depend on parameters now, and did not before."""
        written = {id(tensor) for tensor in self._leaves if not tensor.is_leaf}
        return {name for name, buffer in self.module.named_buffers() if id(buffer) in written}

    def changed(self) -> list[Change]:
        """The attributes that have changed, apart from the values of buffers and parameters, and the training flags."""
        written = {self._arrays.get(id(tensor), id(tensor)) for tensor, _ in self._values.changed()}
        written |= {id(generator) for generator, state in self._generators if state_of(generator) != state}
        places = [
            (part, name)
            for part, attributes, _ in self._parts
            for name in {**attributes, **part.__dict__}
            if name not in OWN_ATTRIBUTES and _differs(attributes.get(name), part.__dict__.get(name), written)
        ]
        places += [
            place
            for place, held, entries in self._containers
            if not as_before(held, entries)
            or any(id(entry) in written for entry in (held.values() if isinstance(held, dict) else held))
        ]
        places += [
            (part, name)
            for part, attributes, registries in self._parts
            for registry, entries in zip(_REGISTRIES, registries, strict=False)
            for name in {**entries, **attributes[registry]}
            if not _same_entry(entries.get(name), attributes[registry].get(name))
        ]
        before = {id(part): attributes for part, attributes, _ in self._parts}
        paths = {id(part): path for path, part in self.module.named_modules()}
        return [
            Change(paths.get(id(part), ""), name, before[id(part)].get(name))
            for part, name in dict.fromkeys(places)
            if not (isinstance(part, nn.RNNBase) and name in _OF_RECURRENT)
        ]


def _differs(before: object, now: object, written: Container[int]) -> bool:
    if now is before:
        return id(before) in written
    return not (type(now) is type(before) and _is_plain(now) and now == before)


def _same_entry(before: object, now: object) -> bool:
    """Whether a part has the same submodule or parameter as before. A buffer may be a new tensor, because its value can be restored."""
    if now is before or not (isinstance(before, Tensor) and isinstance(now, Tensor)):
        return now is before
    return not isinstance(before, nn.Parameter) and (now.shape, now.dtype) == (before.shape, before.dtype)


def _shared(array: np.ndarray[Any, Any]) -> Tensor | None:
    """A tensor that shares the array's memory; None if that is impossible, or if the array is read-only."""
    with suppress(TypeError, ValueError):
        return torch.from_numpy(array) if array.flags.writeable else None
    return None


class Change(NamedTuple):
    """An attribute that a forward pass has changed: of which part, its name, and what stood there before."""

    part: str
    attribute: str
    before: Any

    @property
    def name(self) -> str:
        """The attribute's path in the whole module."""
        return f"{self.part}.{self.attribute}" if self.part else self.attribute


def own_layers(graph_module: fx.GraphModule) -> None:
    """Replace the layers that a graph calls by copies in eval mode that share the tensors: the caller may train the module meanwhile.

    Weights that are computed anew at every call (weight norm, spectral norm, masks of pruning) are written out.
    """
    memo: dict[nn.Module, nn.Module] = {}
    paths = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    # The outer modules first: a leaf may contain another.
    for path in sorted(paths, key=lambda path: path.count(".")):
        parent, _, name = path.rpartition(".")
        layer = shadow(attribute(graph_module, path), training=False, memo=memo)
        write_out_weights(layer)
        setattr(attribute(graph_module, parent), name, layer)
    graph_module.eval()


def own_state(module: nn.Module, changed: Iterable[Change], written: Iterable[Tensor]) -> None:
    """Give a module copies of what its forward changes, so that what else holds it does not change with it.

    Args:
        module: is changed: a graph with parts of its own, which shares attributes and tensors with another module.
        changed: attributes, by their names in both.
        written: tensors: parameters, buffers or others.

    Raises:
        FrontendError: an attribute holds what cannot be copied.
    """
    memo: dict[int, Any] = dict(left_behind(module))
    copies = {id(tensor): _copied(tensor, memo) for tensor in written}
    memo.update(copies)
    for part in parts_of(module) if copies else ():
        if not _is_compiled(part):
            registries: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, part.__dict__)
            for held in registries:
                held.update({name: copies[id(value)] for name, value in held.items() if id(value) in copies})
    for change in changed:
        if not has_attribute(module, change.name):  # the part is gone: its code is in the graph itself
            continue
        held = attribute(module, change.part).__dict__
        if change.attribute not in held:  # the part keeps it in a registry of its own
            continue
        try:
            held[change.attribute] = copy.deepcopy(held[change.attribute], memo)
        except Exception as error:  # the object's own code may raise anything
            raise FrontendError(
                f"the forward changes `{change.name}`, of which the teacher's graph needs a copy, and which cannot be copied ({error})",
                where=change.name,
                hint="Keep what changes in a buffer, a number or a list, or give its class a __deepcopy__.",
            ) from error


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy; views that share memory still share it in the copies."""
    new: Tensor = copy.deepcopy(tensor.detach(), memo)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


@contextmanager
def untouched(module: nn.Module) -> Iterator[State]:
    """Put flags, buffers, attributes and random state back when the block ends, however it ends.

    Parameters keep their identity; their values are `weights_kept`'s business. Attributes count because a forward pass
    that caches a tensor leaves a fake one in place when it is traced.

    Args:
        module: the module whose forward will run, or be traced, inside the block.

    Yields:
        The state that is put back; it does not hold the random state.
    """
    with randomness_kept(), state_kept(module) as state:
        yield state


@contextmanager
def state_kept(module: nn.Module) -> Iterator[State]:
    """As `untouched`, but for the random state."""
    state = State(module)
    try:
        yield state
    finally:
        state.put_back()


def _is_compiled(part: nn.Module) -> bool:
    """TorchScript keeps attributes where Python cannot replace them; its code does not write them in a forward pass unnoticed."""
    return isinstance(part, torch.jit.ScriptModule)


def device_of(module: nn.Module) -> torch.device:
    """Where a module is, by its first parameter or buffer; the CPU if it has neither."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


@contextmanager
def moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block a module is on a device, after it where it was. One that is spread over several stays where it is.

    Args:
        module: any.
        device: where to.
    """
    found = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    before = found.pop() if len(found) == 1 else device
    if before == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(before)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, without autograd, and untouched afterwards.

    The flags are written directly: the module of a loaded `torch.export` archive refuses `.eval()`.
    """
    with untouched(module), mode(module, training=False), torch.no_grad():
        yield
