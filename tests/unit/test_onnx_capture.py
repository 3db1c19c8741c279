"""What torch's exporter does not do, or does wrong, and export makes good."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.errors import ExportError


class Attention(nn.Module):
    """Fused attention over so many axes, with or without a mask that is given for every head."""

    def __init__(self, axes: int, masked: bool):
        super().__init__()
        self.axes, self.layer = axes, nn.Linear(4, 12)
        self.register_buffer("mask", torch.rand(5, 5) > 0.3 if masked else None)

    def forward(self, x):
        query, key, value = (
            self.layer(x)[(slice(None), *(None,) * (self.axes - 3))]
            .expand(-1, *(2,) * (self.axes - 3), -1, -1)
            .chunk(3, -1)
        )
        mask = self.mask if self.mask is None else self.mask.expand(query.shape[0], *(1,) * (self.axes - 3), -1, -1)
        return F.scaled_dot_product_attention(query.sin(), key, value, attn_mask=mask)


@pytest.mark.parametrize("axes", [3, 4, 5, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_of_any_number_of_axes(axes, masked, tmp_path):
    own = F.scaled_dot_product_attention
    torch.manual_seed(0)
    report = export_onnx(Attention(axes, masked), tmp_path / "a.onnx", torch.randn(2, 5, 4))
    assert len(report.parity) == 3
    assert report.max_abs < 1e-5
    assert F.scaled_dot_product_attention is own


class Clipped(nn.Module):
    """Clamps one tensor by two pairs of equal bounds, of which the exporter loses one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        for name, bound in (("low", -0.25), ("high", 0.25)):
            for k in range(2):
                self.register_buffer(f"{name}{k}", torch.tensor(bound))

    def forward(self, x):
        x = x * 2
        first, second = (
            layer(x.clamp(self.get_buffer(f"low{k}"), self.get_buffer(f"high{k}")))
            for k, layer in enumerate(self.layers)
        )
        return first + second


def test_equal_bounds_of_one_tensors_clamps_are_kept(tmp_path):
    report = export_onnx(Clipped(), tmp_path / "clipped.onnx", torch.randn(2, 6))
    assert len(report.parity) == 3
    assert report.max_abs < 1e-5


class PerSample(nn.Module):
    """Filters for each sample, as one convolution whose groups are as many as samples and channels."""

    def __init__(self):
        super().__init__()
        self.filters = nn.Linear(6, 6 * 9)

    def forward(self, x):
        weight = self.filters(x.mean((2, 3))).view(-1, 1, 3, 3)
        return F.conv2d(x.view(1, -1, *x.shape[2:]), weight, groups=6 * x.shape[0]).view(x.shape[0], 6, -1)


def test_a_constant_of_onnx_that_follows_from_the_batch_is_named(tmp_path):
    x = torch.randn(2, 6, 8, 8)
    with pytest.raises(ExportError) as refused:
        export_onnx(PerSample(), tmp_path / "a.onnx", x)
    assert "Unsupported attribute type" in refused.value.message and "It comes from" not in refused.value.message
    assert refused.value.hint.endswith("export with dynamic_batch=False (--fixed-batch).")
    assert export_onnx(PerSample(), tmp_path / "a.onnx", x, dynamic_batch=False).max_abs < 1e-5


class Siamese(nn.Module):
    """One encoder for two inputs, which go through it as one batch; the way in which its result is taken apart."""

    def __init__(self, way):
        super().__init__()
        self.encoder, self.way = nn.Linear(6, 4), way

    def forward(self, a, b):
        first, second = self.way(self.encoder(torch.cat([a, b])))
        return first - 2 * second


PARTS = {
    "chunk by name": lambda z: torch.chunk(input=z, chunks=2, dim=-2),
    "split": lambda z: z.split(z.shape[0] // 2),
    "two of four": lambda z: torch.cat([z, z.sin()]).chunk(4)[1:3],
}


@pytest.mark.parametrize("way", PARTS)
def test_parts_of_a_batch_that_are_equal_whatever_its_size(way, tmp_path):
    torch.manual_seed(0)
    net, x = Siamese(PARTS[way]), torch.randn(2, 6)
    report = export_onnx(net, tmp_path / "a.onnx", (x, x), batch_sizes=(1, 3, 8))
    assert {parity.batch_size for parity in report.parity} == {1, 3, 8}
    assert report.max_abs < 1e-6


def test_parts_whose_number_follows_from_the_batch_are_refused(tmp_path):
    net = Siamese(lambda z: z[::2].chunk(2))
    with pytest.raises(ExportError, match="The model's code fixes the batch of its input to 4"):
        export_onnx(net, tmp_path / "a.onnx", (torch.randn(4, 6), torch.randn(4, 6)))
