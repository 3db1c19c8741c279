"""Exported models of texts: any length, and queries that the mask leaves nothing to look at."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.onnx_session import random_inputs
from indistill_fx.errors import ConfigError, ExportError

IDS, MASK = torch.randint(0, 16, (2, 9), generator=torch.Generator().manual_seed(0)), torch.ones(2, 9, dtype=torch.long)
MASK[1, :4] = 0


class Reader(nn.Module):
    """One attention, causal and masked."""

    def __init__(self, *, fixed: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.queries, self.head, self.fixed = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 3), fixed

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.table(ids)
        before = torch.arange(ids.shape[1])[:, None] >= torch.arange(ids.shape[1])
        allowed = before & mask.bool()[:, None]
        seen = F.scaled_dot_product_attention(self.queries(hidden), hidden, hidden, attn_mask=allowed)
        return self.head(seen.view(len(ids), 9, 8) if self.fixed else seen)


def run(path, ids: Tensor, mask: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])


def test_padding_on_the_left_gives_what_torch_gives(tmp_path):
    """There the first queries see no position at all: torch's fused attention gives 0, a plain softmax the mean of all values."""
    model = Reader().eval()
    export_onnx(model, tmp_path / "m.onnx", {"ids": IDS, "mask": MASK}, batch_sizes=(1, 3))
    with torch.no_grad():
        wanted = model(IDS, MASK)
    torch.testing.assert_close(wanted[1, :4], model.head.bias.detach().expand(4, 3))
    torch.testing.assert_close(run(tmp_path / "m.onnx", IDS, MASK), wanted)


def test_masks_that_are_tried_are_rows_of_the_example():
    ids, mask = random_inputs((IDS, MASK), 50, seed=3)
    rows = {tuple(row) for row in mask.tolist()}
    assert rows == {tuple(row) for row in MASK.tolist()}
    assert ids.shape == (50, 9) and len(ids.unique()) == 16
    ids, mask = random_inputs((IDS, MASK), 5, other_size=True)
    assert ids.shape == mask.shape == (5, 5)


def test_the_length_can_be_left_open(tmp_path):
    model, path = Reader().eval(), tmp_path / "m.onnx"
    report = export_onnx(model, path, {"ids": IDS, "mask": MASK}, dynamic_size=True, batch_sizes=(1, 3))
    assert len(report.parity) == 3
    shapes = [[d.dim_param for d in x.type.tensor_type.shape.dim] for x in onnx.load(path).graph.input]
    assert shapes == [["batch", "length"], ["batch", "length"]]
    ids = torch.randint(0, 16, (4, 14))
    with torch.no_grad():
        torch.testing.assert_close(run(path, ids, torch.ones_like(ids)), model(ids, torch.ones_like(ids)))


def test_a_length_that_the_code_fixes_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"length.*9|9.*length"):
        export_onnx(Reader(fixed=True).eval(), tmp_path / "m.onnx", {"ids": IDS, "mask": MASK}, dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_texts_of_two_lengths_have_two_names(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(16, 8)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.table(target) + self.table(source).mean(1, keepdim=True)

    export_onnx(
        Pair().eval(), tmp_path / "m.onnx", {"source": IDS, "target": IDS[:, :6]}, dynamic_size=True, batch_sizes=(2,)
    )
    shapes = [[d.dim_param for d in x.type.tensor_type.shape.dim] for x in onnx.load(tmp_path / "m.onnx").graph.input]
    assert shapes == [["batch", "length"], ["batch", "length_2"]]


def test_a_model_that_refuses_random_tokens_is_compared_on_rows_of_the_example(tmp_path):
    class Ended(Reader):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            torch._check(torch.unique(ids[:, -1]).numel() == 1)
            return super().forward(ids, mask)

    ids = torch.cat([IDS[:, :-1], torch.full((2, 1), 2)], 1)
    report = export_onnx(Ended().eval(), tmp_path / "m.onnx", {"ids": ids, "mask": MASK}, batch_sizes=(1, 5))
    assert [row.batch_size for row in report.parity] == [1, 5] and "rows of the example" in report.notes[0]


def test_without_image_or_text_there_is_no_size_to_leave_open(tmp_path):
    with pytest.raises(ConfigError, match=r"needs an image .* or a text"):
        export_onnx(nn.Linear(4, 2), tmp_path / "m.onnx", torch.randn(2, 4), dynamic_size=True)
