"""A factor for each channel, however its shape is written, loses its entries with the channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.passes.test_more_networks import WIDTH, Maps, halved, narrowed, traced

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda scale: scale.view(WIDTH, 1, 1),
    "view of a tuple": lambda scale: scale.view((WIDTH, 1, 1)),
    "view with the rest": lambda scale: scale.view(-1, 1, 1),
    "view with the batch": lambda scale: scale.view(1, -1, 1, 1),
    "reshape": lambda scale: scale.reshape(1, WIDTH, 1, 1),
    "index": lambda scale: scale[:, None, None],
    "unsqueeze": lambda scale: scale.unsqueeze(-1).unsqueeze(-1),
    "unflatten": lambda scale: scale.unflatten(0, (WIDTH, 1, 1)),
    "expand": lambda scale: scale.view(WIDTH, 1, 1).expand(WIDTH, 16, 16),
    "transpose": lambda scale: scale.view(1, 1, WIDTH).transpose(0, 2),
}


class Scaled(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor], *, first: bool):
        super().__init__()
        self.scale, self.form, self.first = nn.Parameter(torch.rand(WIDTH) + 0.5), form, first
        self.norm, self.pool = nn.BatchNorm2d(WIDTH), nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.form(self.scale)
        return (scale * x if self.first else x.mul(scale)) + self.pool(self.norm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [False, True])
def test_factors_of_channels(form, first):
    model, x = traced(lambda: Maps(Scaled(FORMS[form], first=first)))
    narrowed(model, x)
    report = halved(model, x)
    assert [frozen.reason for frozen in report.frozen] == ["an output of the network"]
    assert report.parameters[1] / report.parameters[0] < 0.4
