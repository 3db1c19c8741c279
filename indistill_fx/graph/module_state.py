"""Run somebody else's module and leave it as it was found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from indistill_fx.graph.edit import with_tensors
from indistill_fx.graph.values import Values
from indistill_fx.system.random_state import randomness_kept


def shadow(module: nn.Module, *, training: bool, memo: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A copy of a module tree that has training flags of its own and shares every parameter and buffer."""
    memo = {} if memo is None else memo
    if isinstance(module, torch.jit.ScriptModule):
        return module  # compiled code cannot be copied without its tensors
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
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def uncompiled(module: nn.Module) -> nn.Module:
    """The user's own module, where torch.compile has wrapped it: its layers have the names that the user gave them."""
    while isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
        module = inner
    return module


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


_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def weights_kept(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Put the values of all parameters back when the block ends; what it gives puts them back at once.

    Some forward passes write parameters (`self.weight.data = normalize(self.weight)`), which no version counter shows. So values are
    compared in the second call, which follows the module's own first run (there, a sample of each large one), and at the end; in every
    call once a write was found.
    """
    weights = [(weight, weight.data, _version(weight)) for weight in module.parameters()]
    values = Values(weight for weight, *_ in weights)
    calls, writes = 0, False

    def put_back(*, last: bool = False) -> None:
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

    try:
        yield put_back
    finally:
        put_back(last=True)


def _version(tensor: Tensor) -> int:
    """How often torch has seen it written; made in inference mode, it does not count."""
    return 0 if tensor.is_inference() else tensor._version


class Buffers:
    """The buffers of a module as they are now, and other tensors that its parts hold as attributes."""

    def __init__(self, module: nn.Module):
        self.module, parts = module, parts_of(module)
        self._registries = [(part._buffers, dict(part._buffers)) for part in parts if not _is_compiled(part)]
        buffers = {id(buffer): buffer for part in parts for buffer in part._buffers.values() if buffer is not None}
        self._ids = frozenset(buffers)
        held = {id(value): value for part in parts for value in vars(part).values() if isinstance(value, Tensor)}
        self._values = Values({**held, **buffers}.values())

    def written(self) -> dict[str, Tensor]:
        """Copies of those that have another value than before, or are other tensors."""
        same = self._ids - {id(buffer) for buffer, _ in self._values.changed()}
        return {name: b.detach().clone() for name, b in self.module.named_buffers() if id(b) not in same}

    def put_back(self) -> None:
        """The tensors, and their values."""
        for registry, entries in self._registries:
            registry.clear()
            registry.update(entries)
        self._values.put_back()


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[Buffers]:
    """Put all buffers back when the block ends."""
    buffers = Buffers(module)
    try:
        yield buffers
    finally:
        buffers.put_back()


@contextmanager
def untouched(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Put flags, buffers, attributes and random state back when the block ends, however it ends.

    Parameters keep their identity; their values are `weights_kept`'s business. Attributes count because a forward pass
    that caches a tensor leaves a fake one in place when it is traced.

    Args:
        module: the module whose forward will run, or be traced, inside the block.

    Yields:
        What puts all but the random state back at once.
    """
    plain = (part for part in parts_of(module) if not _is_compiled(part))
    parts = [(part, dict(part.__dict__), [dict(part.__dict__[r]) for r in _REGISTRIES]) for part in plain]
    buffers = Buffers(module)

    def put_back() -> None:
        for part, own, registries in parts:
            for name, entries in zip(_REGISTRIES, registries, strict=True):
                own[name].clear()
                own[name].update(entries)
            part.__dict__.clear()
            part.__dict__.update(own)
        buffers.put_back()

    with randomness_kept():
        try:
            yield put_back
        finally:
            put_back()


def _is_compiled(part: nn.Module) -> bool:
    """TorchScript keeps attributes where Python cannot replace them; its code does not write them in a forward pass unnoticed."""
    return isinstance(part, torch.jit.ScriptModule)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, without autograd, and untouched afterwards.

    The flags are written directly: the module of a loaded `torch.export` archive refuses `.eval()`.
    """
    with untouched(module), mode(module, training=False), torch.no_grad():
        yield
