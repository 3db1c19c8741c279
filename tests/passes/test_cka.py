"""Similarity on data: equal to CKA computed at once on all features, and what it is known to be invariant to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pairing.cka import cka, hsic
from indistill_fx.passes.pairing.match import match
from tests.nets import Residual, images, seeded


def reference(x: Tensor, y: Tensor) -> float:
    """CKA with the unbiased HSIC, written out with loops over the formula's terms."""
    n = len(x)

    def h(a: Tensor, b: Tensor) -> Tensor:
        k, l = a @ a.T, b @ b.T  # noqa: E741
        k, l = k.fill_diagonal_(0), l.fill_diagonal_(0)  # noqa: E741
        one = torch.ones(n, 1, dtype=x.dtype)
        first = torch.trace(k @ l) + (one.T @ k @ one * (one.T @ l @ one) / ((n - 1) * (n - 2))).squeeze()
        return (first - 2 / (n - 2) * (one.T @ k @ l @ one).squeeze()) / (n * (n - 3))

    return float(h(x, y) / (h(x, x) * h(y, y)).sqrt())


def test_streamed_over_one_batch_it_is_the_formula() -> None:
    model, other = trace(seeded(Residual, 4, 1), images()), trace(seeded(Residual, 6, 2, seed=3), images())
    batch = images(12, seed=5)
    rows = cka([(batch, torch.zeros(12))])(model, other, ["layer1", "layer3"], ["layer2", "layer3"])
    with torch.no_grad():
        one, two = model.module.eval(), other.module.eval()
        stem = one.layer1(one.stem(batch))
        features = [stem, one.layer3(one.layer2(stem))]
        deep = two.layer2(two.layer1(two.stem(batch)))
        theirs = [deep, two.layer3(deep)]
    for i, a in enumerate(features):
        for j, b in enumerate(theirs):
            assert rows[i][j] == pytest.approx(
                max(0.0, reference(a.flatten(1).double(), b.flatten(1).double())), abs=1e-6
            )


def test_a_layer_is_like_itself_scaled_and_turned_and_unlike_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    noise = torch.randn(400, 6, generator=generator, dtype=torch.float64)

    def alike(a: Tensor, b: Tensor) -> float:
        grams = [(rows @ rows.T)[None] for rows in (a, b)]
        return float(hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])).sqrt())

    assert alike(x, 3 * x @ turn + 1) == pytest.approx(1.0)
    assert abs(alike(x, noise)) < 0.05


def test_batches_add_up_and_small_rests_are_left_out() -> None:
    model = trace(seeded(Residual, 4, 1), images())
    batches = [images(32, seed=k) for k in range(4)]
    taps = ["layer1", "layer2", "layer3"]
    all_at_once = cka([torch.cat(batches)])(model, model, taps, taps)
    streamed = cka([*batches, images(2)], batches=None)(model, model, taps, taps)
    for i in range(3):
        assert streamed[i][i] == pytest.approx(1.0)
        for j in range(3):
            assert streamed[i][j] == pytest.approx(all_at_once[i][j], abs=0.1)
    assert cka(batches, batches=1)(model, model, taps, taps) != streamed


def test_it_finds_the_layer_that_is_the_same_and_changes_nothing() -> None:
    teacher = trace(seeded(Residual, 4, 2), images())
    student = trace(seeded(Residual, 4, 2), images(), role="student")
    before = [digest(model.module) for model in (teacher, student)]
    found = match(teacher, student, every_block=True, similarity=cka([images(16, seed=9)]))
    assert [(pair.teacher, pair.student) for pair in found.value] == [
        (pair.student, pair.student) for pair in found.value
    ]
    assert len(found.value) == 6
    assert all("data" in pair.reason and pair.score == pytest.approx(1.0, abs=1e-4) for pair in found.value)
    assert [digest(model.module) for model in (teacher, student)] == before


def test_a_dict_of_inputs_is_read_by_name() -> None:
    model = trace(seeded(Residual, 4, 1), images())
    assert cka([{"x": images(8), "labels": torch.zeros(8)}])(model, model, ["layer1"], ["layer1"])[0][
        0
    ] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        ([], "no batch of at least 4"),
        ([images(3)], "no batch of at least 4"),
        ([{"y": images(8), "z": images(8)}], "a dict of y, z. It has no `x`"),
        (["x"], "a str"),
    ],
)
def test_loaders_that_do_not_fit_are_refused(loader: list[object], text: str) -> None:
    model = trace(seeded(Residual, 4, 1), images())
    with pytest.raises(ConfigError, match=text):
        cka(loader)(model, model, ["layer1"], ["layer1"])
