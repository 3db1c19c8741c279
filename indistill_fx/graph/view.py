"""How a teacher sees a batch made for a student: with another size, normalisation, dtype or classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from indistill_fx.system.values import Value

_Side = Annotated[int, Field(ge=1, lt=1 << 16)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Means = Annotated[tuple[_Number, ...], Field(min_length=1, max_length=1 << 16)]
_Deviations = Annotated[tuple[Annotated[_Number, Field(gt=0)], ...], Field(min_length=1, max_length=1 << 16)]
_MOST_PIXELS = 1 << 24
"""That a view may resize an image to: 192 MiB in three channels."""
_Classes = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(max_length=1 << 20)]


class Figures(Value):
    """What images are normalised by: mean and standard deviation of every channel, of values from 0 to 1."""

    mean: _Means
    std: _Deviations

    @model_validator(mode="after")
    def _as_many(self) -> Figures:
        if len(self.mean) != len(self.std):
            raise ValueError("mean and std have one number each for every channel")
        return self

    def __str__(self) -> str:
        mean, std = (", ".join(f"{number:.4g}" for number in numbers) for numbers in (self.mean, self.std))
        return f"mean {mean} and std {std}"


class Rescaling(Value):
    """From images normalised by some figures to images normalised by others."""

    given: Figures
    wanted: Figures

    @model_validator(mode="after")
    def _same_channels(self) -> Rescaling:
        if len(self.given.mean) != len(self.wanted.mean):
            raise ValueError("the figures given and those wanted are of as many channels")
        return self

    @property
    def scale(self) -> Tensor:
        """The factor of each channel, (channels, 1, 1)."""
        given, wanted = (_column(figures.std) for figures in (self.given, self.wanted))
        return (given / wanted).float()

    @property
    def shift(self) -> Tensor:
        """The offset of each channel, added after the factor, (channels, 1, 1)."""
        given, wanted = (_column(figures.mean) for figures in (self.given, self.wanted))
        return ((given - wanted) / _column(self.wanted.std)).float()


class View(Value):
    """How a teacher sees a batch that was made for the student. Images are tensors of real numbers, (batch, channels, height, width).

    Attributes:
        size: height and width in pixels that images are resized to; None: as they are.
        channels: how many channels images get: 3 copies grey into three equal channels, 1 takes the luma of RGB; None: as they are.
        rescaling: from the mean and standard deviation that the batch is normalised by to those that the teacher wants; of three channels
            if `channels` changes their number; None: as they are.
        dtype: what real numbers are cast to last, as torch writes it; None: as they are.
        classes: the teacher's outputs in the order of the student's classes; None: both have the same; empty: they have none in common.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> view = ifx.View(size=(16, 16), channels=3)
        >>> print(view)
        sees inputs resized to 16x16, with their grey in three channels
        >>> view.apply(torch.randn(4, 1, 8, 8)).shape
        torch.Size([4, 3, 16, 16])
    """

    size: tuple[_Side, _Side] | None = None
    channels: Literal[1, 3] | None = None
    rescaling: Rescaling | None = None
    dtype: Annotated[str, Field(pattern="^(float(16|32|64)|bfloat16)$")] | None = None
    classes: _Classes | None = None

    @model_validator(mode="after")
    def _fits_in_memory(self) -> View:
        if self.size is not None and self.size[0] * self.size[1] > _MOST_PIXELS:
            raise ValueError(f"size is {self.size[0]}x{self.size[1]} pixels, and at most {_MOST_PIXELS:,} are made")
        return self

    @staticmethod
    def combined(*views: View | None) -> View | None:
        """One view of several: each entry is taken from the first view that has it.

        Args:
            views: the first one has precedence; None says nothing.

        Returns:
            The view; None if no view says anything.
        """
        fields: dict[str, object] = {}
        for view in views:
            for name in View.model_fields:
                if view is not None and getattr(view, name) is not None:
                    fields.setdefault(name, getattr(view, name))
        return View.model_construct(**fields) if fields else None  # type: ignore[arg-type]

    def apply(self, value: Tensor) -> Tensor:
        """An input as the teacher sees it.

        Args:
            value: images (batch, channels, height, width), or any other tensor; whole numbers stay as they are.

        Returns:
            A tensor with the same batch.
        """
        if not value.is_floating_point():
            return value
        if value.ndim == 4 and self.size is not None:
            value = resized(value, self.size)
        if value.ndim == 4 and self.channels == 3:
            value = coloured(value)
        if value.ndim == 4 and self.rescaling is not None:
            scale, shift = (factors.to(value.device) for factors in (self.rescaling.scale, self.rescaling.shift))
            value = rescaled(value, scale, shift)
        if value.ndim == 4 and self.channels == 1:
            value = grey(value)
        return value.to(getattr(torch, self.dtype)) if self.dtype else value

    def chosen(self, logits: Tensor, axis: int = 1) -> Tensor:
        """The teacher's logits for the student's classes.

        Args:
            logits: of the teacher.
            axis: of its outputs.

        Returns:
            The same with the student's classes on that axis.
        """
        if self.classes is None:
            return logits
        return logits.index_select(axis, torch.tensor(self.classes, dtype=torch.int64, device=logits.device))

    def __str__(self) -> str:
        """The view in words; empty if it changes nothing."""
        changes = [f"resized to {'x'.join(map(str, self.size))}"] if self.size is not None else []
        changes += [_CHANNELS[self.channels]] if self.channels is not None else []
        if self.rescaling is not None:
            changes.append(f"normalised by {self.rescaling.wanted} instead of {self.rescaling.given}")
        changes += [f"in {self.dtype}"] if self.dtype else []
        sentences = [f"sees inputs {', '.join(changes)}"] if changes else []
        if self.classes is not None:
            sentences.append(
                f"its outputs {_shortened(self.classes)} are the student's classes" if self.classes else _STRANGERS
            )
        return "; ".join(sentences)


_CHANNELS = {1: "in grey", 3: "with their grey in three channels"}
_STRANGERS = "it has no classes in common with the student"


def resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Images of another height and width: bilinear, each pixel a mean over what it covers."""
    return F.interpolate(pictures, size=size, mode="bilinear", antialias=True)


def coloured(pictures: Tensor) -> Tensor:
    """Grey images (batch, 1, height, width) in three channels alike; those of three as they are."""
    return pictures.expand(-1, 3, -1, -1)


def grey(pictures: Tensor) -> Tensor:
    """The luma of RGB images (batch, 3, height, width), (batch, 1, height, width): 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    red, green, blue = pictures[:, 0:1], pictures[:, 1:2], pictures[:, 2:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue


def rescaled(pictures: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Each channel times scale plus shift, both (channels, 1, 1)."""
    return torch.addcmul(shift.to(pictures.dtype), pictures, scale.to(pictures.dtype))


def _column(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1)


def _shortened(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown}, … ({len(numbers)} in all)" if len(numbers) > 6 else shown
