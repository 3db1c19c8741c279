"""The axis after the batch may hold frames or steps instead of channels: graphs work for any number of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import shrink
from tests.numerics.masked_reference import run_masked


class Clip(nn.Module):
    """Clips of shape (batch, frames, channels, height, width): frames are folded into the batch, and channels shifted between frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, clip: Tensor) -> Tensor:
        n, t = clip.shape[:2]
        x = self.conv(clip.flatten(0, 1)).relu()
        x = x.view(n, t, *x.shape[1:])
        quarter = x.shape[2] // 4
        x = torch.cat((F.pad(x[:, 1:, :quarter], (0, 0, 0, 0, 0, 0, 0, 1)), x[:, :, quarter:]), 2)
        return self.head(self.mix(x.flatten(0, 1)).mean((2, 3)).unflatten(0, (n, t)).amax(1))  # type: ignore[no-any-return]


class GreyClip(nn.Module):
    """Clips of shape (batch, frames, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.mix(self.conv(clip.reshape(-1, 1, *clip.shape[2:])).relu())
        return self.head(x.mean((2, 3)).view(-1, clip.shape[1], 16).amax(1))  # type: ignore[no-any-return]


class Series(nn.Module):
    """Series of shape (batch, steps, features), with a learned embedding of positions, as many as there are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(6, 16), nn.Parameter(torch.randn(1, 32, 16))
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, series: Tensor) -> Tensor:
        batch, steps, features = series.shape
        x = self.embed(series.reshape(batch * steps, features)).view(batch, steps, 16) + self.positions[:, :steps]
        return self.head(self.mix(x.relu()).mean(1))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "clip": (Clip, (2, 4, 3, 12, 12), (3, 8, 3, 20, 12)),
    "grey clip": (GreyClip, (2, 4, 12, 12), (3, 8, 12, 12)),
    "series": (Series, (2, 7, 6), (3, 14, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_frames(name: str) -> None:
    make, shape, other_shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make().double().eval()
    traced = trace(net, torch.randn(shape).double())
    assert traced.report.specialisations == ()
    other = torch.randn(other_shape).double()
    with torch.no_grad():
        torch.testing.assert_close(traced.graph_module(other), net(other), rtol=1e-12, atol=1e-12)
        result = shrink(traced, ratio=0.5)
        assert set(result.report.widths.values()) == {(16, 8), (4, 4)}
        torch.testing.assert_close(result.value.graph_module(other), run_masked(traced, result.report, other))


def test_steps_of_one_input_beside_a_picture() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look, self.series = nn.Conv2d(3, 4, 3), Series()

        def forward(self, picture: Tensor, series: Tensor) -> Tensor:
            return self.series(series) + self.look(picture).mean((2, 3))  # type: ignore[no-any-return]

    net = Both().eval()
    graph = trace(net, (torch.randn(2, 3, 8, 8), torch.randn(2, 7, 6))).graph_module
    longer = torch.randn(3, 3, 8, 8), torch.randn(3, 14, 6)
    torch.testing.assert_close(graph(*longer), net(*longer))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_channels_of_frames_are_narrowed_and_not_the_frames(name: str) -> None:
    make, shape, _ = NETWORKS[name]
    traced = trace(make().eval(), torch.randn(shape))
    taps = [names[0] for node, names in traced.aliases.items() if 16 in traced.facts[node].shape[1:]]
    assert len(taps) > 4
    assert {traced.facts_of(tap).channels for tap in taps} == {16}
    for tap in taps:
        assert narrow(traced, kept={tap: range(8)}).report.taps[0].stopped == ()


def test_one_value_for_each_sample_is_no_channel() -> None:
    class Verify(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 8)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return F.cosine_similarity(self.embed(left), self.embed(right)).unsqueeze(1)

    traced = trace(Verify(), (torch.randn(2, 6), torch.randn(2, 6)))
    facts = traced.facts["cosine_similarity"], traced.facts["unsqueeze"]
    assert [(fact.shape, fact.batch_axis, fact.channel_axis) for fact in facts] == [((2,), 0, None), ((2, 1), 0, 1)]
