"""A stage spread over processes: torch's `fully_shard` while it trains, the user's own parameters again afterwards.

`fully_shard` puts other parameters into the student's layers. Whoever reads the student in between (checkpoints, validation) needs
the whole tensors in the user's own parameters, and needs them again when the stage is over: `Shards.whole`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from indistill_fx.system.signals import Interrupted


class Shards:
    """Shards a stage in place. All processes must do all of this alike.

    As a context, it ends with `restore`; where an error ends it, only if that is a signal, which stops all processes
    alike: with any other, this one would wait for the others for good.

    Args:
        stage: on its device, with the weights to begin with.
        teacher: the frozen half of it, if it has one; gathered for its own forward only.
    """

    def __init__(self, stage: nn.Module, teacher: nn.Module | None = None):
        frozen = {id(parameter) for parameter in teacher.parameters()} if teacher is not None else set()
        found = [(owner, name, parameter) for owner in stage.modules() for name, parameter in owner._parameters.items()]
        self._own = [
            (owner, name, parameter)
            for owner, name, parameter in found
            if parameter is not None and id(parameter) not in frozen
        ]
        if teacher is not None and frozen:
            fully_shard(teacher)
        fully_shard(stage)
        self._spread = [(owner, name, owner.get_parameter(name)) for owner, name, _ in self._own]
        self._forget()

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Interrupted):
            self.restore()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block, the student has its complete, unsharded parameters."""
        self.restore()
        try:
            yield
        finally:
            for owner, name, shard in self._spread:
                owner._parameters[name] = shard
            self._forget()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the student its own parameters back, with their trained values."""
        for (owner, name, parameter), (_, _, shard) in zip(self._own, self._spread, strict=True):
            if not parameter.numel():  # a parameter that two layers share is filled once
                parameter.data = gathered(shard) if isinstance(shard, DTensor) else shard.data
            owner._parameters[name] = parameter

    def _forget(self) -> None:
        """Free the memory of the unsharded parameters."""
        for _, _, parameter in self._own:
            parameter.data = parameter.data.new_empty(0)


def gathered(value: Tensor) -> Tensor:
    """The whole of a tensor that is spread over processes; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def spread_optimizer(tensors: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Entries `optimizer/index/key` of a checkpoint, spread as the parameters of that index are."""
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        parts = name.split("/")
        parameter = parameters[int(parts[1])] if parts[0] == "optimizer" else None
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        found[name] = value
    return found
