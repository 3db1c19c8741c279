"""A bound on what a constructor allocates: a file says how large a model is to be, and may lie."""

from __future__ import annotations

import math
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from indistill_fx.errors import ConfigError

_SLACK = 1 << 24
"""Elements beside the weights: masks, tables of positions, what initialisation needs for a moment."""


class Bounded(TorchDispatchMode):
    """Within the block no more elements are asked for than a file of weights accounts for; more is refused before memory is taken.

    Args:
        where: names who asks, for the message.
        elements: how many numbers the file of weights holds.

    Raises:
        ConfigError: more than four times as many, and 16 million, were asked for.
    """

    def __init__(self, where: str, elements: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self._where, self._elements = where, elements
        self._left = 4 * elements + _SLACK

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what is requested, then continue."""
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        size = named.get("size")
        if isinstance(size, (list, tuple)) and not func.is_view:
            self._left -= math.prod(map(int, size))
        if self._left < 0:
            raise ConfigError(
                f"{self._where} describes a model with many more elements than its weights have ({self._elements:,}).",
                where=self._where,
                expected=f"about {self._elements:,} numbers",
                hint="It is damaged, or does not belong to the weights.",
            )
        return func(*args, **(kwargs or {}))
