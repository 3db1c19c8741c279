"""Operations without an ONNX form are exported by others: the same values, and files that runtimes read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.onnx_substitutes import Substitutes

ROWS, FAR, PICTURE = (3, 6, 8), (2, 40, 8), (2, 4, 9, 8)
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "distances": (lambda x: torch.cdist(x, x[:, 1:] + 1), ROWS),
    "distances of many": (lambda x: torch.cdist(x, x + 1), FAR),
    "distances of many, subtracted": (
        lambda x: torch.cdist(x, x + 1, compute_mode="donot_use_mm_for_euclid_dist"),
        FAR,
    ),
    "city block": (lambda x: torch.cdist(x, x + 1, p=1), ROWS),
    "cubes": (lambda x: torch.cdist(x, x + 1, p=3.0), ROWS),
    "largest": (lambda x: torch.cdist(x, x + 1, p=float("inf")), ROWS),
    "differing": (lambda x: torch.cdist(x.round(), x.round().flip(1), p=0), ROWS),
    "k-th value": (lambda x: x.kthvalue(2, 1)[0], ROWS),
    "k-th place": (lambda x: x.kthvalue(k=3, dim=-1, keepdim=True).indices.float(), ROWS),
    "median": (lambda x: torch.median(x, 1).values, ROWS),
    "median of all": (lambda x: x - x[0].median(), ROWS),
    "running product": (lambda x: (1 - x).cumprod(1), ROWS),
    "places among bounds": (lambda x: torch.searchsorted(torch.linspace(-1, 1, 5), x.round()).float(), ROWS),
    "places behind equals": (lambda x: torch.searchsorted(torch.arange(-2.0, 3), x.round(), right=True).float(), ROWS),
    "places in rows": (lambda x: torch.searchsorted(x.sort(-1)[0], x * 0.9).float(), ROWS),
    "stable order": (lambda x: (x > 0).float().argsort(dim=1, stable=True).float(), ROWS),
    "stable order, falling": (lambda x: (x > 0).float().sort(dim=-1, descending=True, stable=True)[1].float(), ROWS),
    "stable, of numbers": (lambda x: torch.sort((3 * x).long(), stable=True).indices.float(), ROWS),
    "membership": (lambda x: torch.isin(x.round(), torch.tensor([0.0, 1.0])).float(), ROWS),
    "taken along": (lambda x: torch.take_along_dim(x, x.argsort(1), 1), ROWS),
    "taken along, spread": (lambda x: torch.take_along_dim(x, x.mean(2, keepdim=True).argsort(1), 1), ROWS),
    "hypotenuse": (lambda x: torch.hypot(x, x + 1), ROWS),
    "random leaks": (lambda x: F.rrelu(x), ROWS),
    "own divisor": (lambda x: F.avg_pool2d(x, (2, 3), padding=1, divisor_override=5), PICTURE),
    "pyramid pooling": (
        lambda x: torch.cat([F.adaptive_max_pool2d(x, n).flatten(1) for n in (1, 2, 3, 5)], 1),
        PICTURE,
    ),
    "places of the largest": (lambda x: F.adaptive_max_pool2d(x, (4, 3), return_indices=True)[1].float(), PICTURE),
    "uneven mean": (lambda x: F.adaptive_avg_pool3d(x, (3, 4, 5)), PICTURE),
}


class Computes(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_computes_what_torch_does(name: str) -> None:
    function, shape = FORMS[name]
    x = torch.randn(shape)
    with Substitutes():
        found = function(x)
    torch.testing.assert_close(found, function(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["distances of many", "median", "places in rows", "pyramid pooling", "own divisor", "taken along"]
)
def test_files_hold_the_forms(name: str, tmp_path: Path) -> None:
    """`export_onnx` compares the file with the module at several batch sizes."""
    function, shape = FORMS[name]
    export_onnx(Computes(function).eval(), tmp_path / "model.onnx", torch.randn(shape))


def test_a_chain_of_matrices(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    export_onnx(
        Computes(lambda x: torch.linalg.multi_dot([x, torch.ones(8, 3), torch.eye(3)])).eval(), tmp_path / "m.onnx", x
    )
