import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from indistill_fx.errors import ConfigError
from indistill_fx.graph.preprocess import FromPixels, Preprocess

positive = st.floats(0.05, 2)


@given(st.lists(st.tuples(st.floats(-1, 1), positive), min_size=1, max_size=4), st.integers(0, 2**31))
def test_pixels_survive_the_way_there_and_back(channels, seed):
    preprocess = Preprocess(*zip(*channels, strict=True))
    pixels = torch.randint(
        0, 256, (2, 3, 4, len(channels)), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    images = FromPixels(preprocess)(pixels)
    assert torch.equal(preprocess.to_pixels(images), pixels)
    assert preprocess.to_pixels(pixels) is pixels


def test_normalises_as_torchvision_does():
    pixels = torch.arange(2 * 2 * 3, dtype=torch.uint8).view(1, 2, 2, 3)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    got = FromPixels(Preprocess.make((mean.tolist(), std.tolist())))(pixels)
    torch.testing.assert_close(got, expected)


def test_metadata_round_trip_and_scalars():
    preprocess = Preprocess.make((0.5, 0.25))
    assert preprocess == Preprocess((0.5,), (0.25,))
    assert Preprocess.from_metadata(preprocess.metadata()) == preprocess
    assert Preprocess.from_metadata({}) is None
    assert Preprocess.make(None) is None


@pytest.mark.parametrize("pair", [((0.1, 0.2), (1.0,)), ((0.1,), (0.0,)), ((), ())])
def test_refuses_pairs_that_cannot_be(pair):
    with pytest.raises(ConfigError, match="one mean and one positive standard deviation per channel"):
        Preprocess.make(pair)
