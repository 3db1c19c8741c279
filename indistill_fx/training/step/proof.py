"""Whether a recorded step does what the step does as it is: both are taken from one state, and what they change is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

State = Mapping[str, Sequence[Tensor]]
"""The tensors that a step changes, by what they are: weights, moments, …"""

_TOLERANCE = 0.1
"""Share of the change of a kind of tensors, as an L2 norm: operations of a GPU that add in no fixed order come nowhere near it."""
_ROUGH = 0.5
"""Likewise where Adam makes a whole step of a gradient that is nothing but rounding, such as that of a bias before a norm. What the
gradients were is then seen in its moments."""


def state_of(module: nn.Module, optimizer: Any, average: nn.Module | None = None) -> State:
    """What a training step changes.

    Args:
        module: batch → loss.
        optimizer: of its parameters.
        average: a moving average of them; None: there is none.
    """
    entries = [(key, v) for state in optimizer.state.values() for key, v in state.items() if isinstance(v, Tensor)]
    return {
        "weights": [parameter for parameter in module.parameters() if parameter.requires_grad],
        "buffers": list(module.buffers()),
        "optimiser's state": [value for key, value in entries if key != "step"],
        _COUNTS: [value for key, value in entries if key == "step"],
        "moving average": list(average.state_dict().values()) if average is not None else [],
    }


_COUNTS = "optimiser's count of steps"


def _tolerance(kind: str, state: State) -> float:
    """The tolerance for the weights; the state of Adam and its variants has a step counter."""
    return _ROUGH if kind in ("weights", "moving average") and state.get(_COUNTS) else _TOLERANCE


class Snapshot:
    """A copy of the state of a step on the host, so that it takes no memory of the device.

    Args:
        state: the tensors themselves.
        scaler: of float16 gradients; None: there is none.
    """

    def __init__(self, state: State, scaler: GradScaler | None = None):
        self._state, self._scaler = state, scaler
        self._scale = scaler.state_dict() if scaler is not None else {}
        self._values = {kind: [_on_host(tensor) for tensor in tensors] for kind, tensors in state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the tensors' values, in place."""
        for kind, tensors in self._state.items():
            for tensor, value in zip(tensors, self._values[kind], strict=True):
                tensor.copy_(value)
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scale)

    @torch.no_grad()
    def first_difference(self, expected: Snapshot) -> str | None:
        """The first kind of tensors whose values differ from the expected ones; None if none differs.

        Args:
            expected: the state that the unrecorded step reaches from this snapshot.
        """
        for kind, tensors in self._state.items():
            change = difference = 0.0
            for now, before, right in zip(tensors, self._values[kind], expected._values[kind], strict=True):
                current = _on_host(now)
                if kind == _COUNTS or not current.is_floating_point():
                    if not torch.equal(current, right):
                        return kind
                    continue
                change += _square(right, before)
                difference += _square(current, right)
            if difference > _tolerance(kind, self._state) ** 2 * change or difference == math.inf:
                return kind
        return None


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _square(one: Tensor, other: Tensor) -> float:
    """The squared distance; infinite if exactly one of the two is not finite."""
    gap = torch.where(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True), 0.0, one.double() - other.double())
    return float(gap.square().nan_to_num(nan=torch.inf, posinf=torch.inf).sum())
