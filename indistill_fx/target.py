"""What stages are lowered for: the device they run on, the dtype they compute in, and whether torch.compile comes after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from indistill_fx.errors import ConfigError

Kind = Literal["cpu", "cpu reduced", "cpu compiled", "cuda", "cuda reduced", "cuda compiled", "other"]
"""Targets that are lowered alike; the keys of `passes.lowering.table`."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where, and in which precision, a stage will run.

    Attributes:
        device: as torch writes it: `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: what matrix products and convolutions are computed in: float32, float64, bfloat16 or float16.
        compiled: whether `torch.compile` follows, which then chooses layouts and fuses operations itself.

    Raises:
        ConfigError: there is no such device, or it cannot compute in that dtype; the message lists what there is.

    Examples:
        >>> import indistill_fx as ifx
        >>> ifx.Target().kind, ifx.Target(compiled=True).kind
        ('cpu', 'cpu compiled')
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    def __post_init__(self) -> None:
        available = available_devices()
        device = _device(self.device)
        known = device is not None and (device.type == "cpu" or f"{device.type}:{device.index or 0}" in available)
        if device is None or not known:
            raise ConfigError(
                f"There is no device {self.device!r} here.",
                where="device",
                got=self.device,
                expected=available,
                hint=f"This machine has: {', '.join(available)}.{_why_no_cuda() if device and device.type == 'cuda' else ''}",
            )
        if self.dtype not in _DTYPES:
            raise ConfigError(
                f"Training is not possible in {str(self.dtype).removeprefix('torch.')}.",
                where="dtype",
                got=self.dtype,
                expected=[str(dtype).removeprefix("torch.") for dtype in _DTYPES],
            )
        if not _computes(device, self.dtype):
            raise ConfigError(
                f"The device {self.device!r} cannot compute in {str(self.dtype).removeprefix('torch.')}.",
                where="dtype",
                got=self.dtype,
                hint="Take float32 (--mixed-precision no), or another device.",
            )

    @property
    def kind(self) -> Kind:
        """The kind of target, which decides the lowerings."""
        device, reduced = torch.device(self.device).type, self.dtype in (torch.bfloat16, torch.float16)
        if device == "cuda":
            return "cuda compiled" if self.compiled else "cuda reduced" if reduced else "cuda"
        if device != "cpu":
            return "other"
        if self.compiled:
            return "cpu compiled"
        return "cpu reduced" if reduced else "cpu"

    @staticmethod
    def of(module: nn.Module) -> Target:
        """The target of a module: its device, eager, in the dtype of its weights.

        Args:
            module: any module.

        Returns:
            A target.
        """
        weight = next((p for p in module.parameters() if p.dtype in _DTYPES), None)
        return Target() if weight is None else Target(str(weight.device), weight.dtype)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def chosen_device(name: str) -> torch.device:
    """The device of that name; of `auto` an accelerator, if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device; names what is there.
    """
    if name != "auto":
        return torch.device(Target(name).device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def old_driver() -> str:
    """What torch says of a driver of NVIDIA's that is too old for it; empty where there is none, or it is not."""
    message = _why_no_cuda()
    return message.strip() if "driver" in message and "too old" in message else ""


def _why_no_cuda() -> str:
    """What torch has to say where it can use no GPU of NVIDIA's: built without CUDA, no driver, or one that is too old."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return " This torch is built without CUDA."
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" torch says: {' '.join(str(error).split())}"
    return ""


def available_devices() -> list[str]:
    """The devices of this machine that torch can use, as torch writes them."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps:0")
    return found


def _device(name: str) -> torch.device | None:
    try:
        return torch.device(name)
    except RuntimeError:
        return None


def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cuda" and dtype == torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported())
    return device.type != "mps" or dtype != torch.float64
