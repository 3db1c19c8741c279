"""Losses on logits at many positions, ignored positions and labels that are probabilities, each against numpy in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from indistill_fx.errors import ConfigError
from indistill_fx.losses import Outputs
from indistill_fx.losses.positions import IGNORED
from indistill_fx.losses.registry import main_loss
from indistill_fx.losses.review import context_loss

B, C, H, W = 3, 4, 5, 2


def draw(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def side(logits):
    return Outputs(logits, None, {}, None)


STUDENT, TEACHER = draw(0, B, C, H, W), draw(1, B, C, H, W)
LABELS = torch.randint(C, (B, H, W), generator=torch.Generator().manual_seed(2))
SOME = LABELS.masked_fill(torch.rand(B, H, W, generator=torch.Generator().manual_seed(3)) < 0.4, IGNORED)
PER_POSITION = ["kd", "dkd", "dist"]


def rows(logits):
    return logits.movedim(1, -1).reshape(-1, C)


@pytest.mark.parametrize("name", PER_POSITION)
def test_positions_are_samples(name):
    """The loss of maps is the classifier's loss of all their positions as one batch, soft part and labels' part."""
    dense = main_loss(name)(side(STUDENT), side(TEACHER), LABELS)
    flat = main_loss(name)(side(rows(STUDENT)), side(rows(TEACHER)), LABELS.flatten())
    assert dense.item() == pytest.approx(flat.item(), rel=1e-12)


def test_kd_is_the_mean_over_positions():
    """Also at another size of the same picture: the balance with the labels' part does not move."""
    mean = np.mean(
        [main_loss("kd", weight_labels=0)(side(STUDENT[:, :, h, w]), side(TEACHER[:, :, h, w])).item()
         for h in range(H) for w in range(W)]
    )  # fmt: skip
    for factor in (1, 3):
        large = [z.repeat_interleave(factor, 2).repeat_interleave(factor, 3) for z in (STUDENT, TEACHER)]
        found = main_loss("kd", weight_labels=0)(side(large[0]), side(large[1]))
        assert found.item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("name", PER_POSITION)
def test_ignored_positions_do_not_count(name):
    kept = (SOME != IGNORED).flatten()
    assert 0 < kept.sum() < kept.numel()
    dense = main_loss(name)(side(STUDENT), side(TEACHER), SOME)
    flat = main_loss(name)(side(rows(STUDENT)[kept]), side(rows(TEACHER)[kept]), SOME.flatten()[kept])
    assert dense.item() == pytest.approx(flat.item(), rel=1e-12)
    moved = STUDENT + 5 * draw(9, *STUDENT.shape) * (SOME == IGNORED).unsqueeze(1)
    assert main_loss(name)(side(moved), side(TEACHER), SOME).item() == pytest.approx(dense.item(), rel=1e-12)
    assert main_loss(name)(side(moved), side(TEACHER), LABELS).item() != pytest.approx(dense.item(), rel=1e-6)


@pytest.mark.parametrize("name", [*PER_POSITION, "mlkd", "labels"])
@pytest.mark.parametrize("soft", [False, True], ids=["class numbers", "probabilities"])
def test_ignored_samples_do_not_count(name, soft):
    """Of probabilities those that are all 0, as mixing makes them of -100."""
    labels = torch.tensor([2, IGNORED, 0, 3, IGNORED, 1])
    kept, s, t = labels != IGNORED, draw(4, 6, C), draw(5, 6, C)
    if soft:
        labels = draw(6, 6, C).softmax(1) * kept[:, None]
    found = main_loss(name)(side(s), side(t), labels)
    expected = main_loss(name)(side(s[kept]), side(t[kept]), labels[kept])
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", [*PER_POSITION, "cwd"])
def test_a_batch_in_which_nothing_counts_gives_no_gradient(name):
    student = STUDENT.clone().requires_grad_()
    loss = main_loss(name, weight_labels=0.0)(side(student), side(TEACHER), torch.full_like(LABELS, IGNORED))
    loss.backward()
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


def numpy_cwd(student, teacher, mask, temperature=4.0):
    total = 0.0
    for b in range(B):
        for c in range(C):
            s, t = (np.exp(z[b, c].numpy()[mask[b]] / temperature) for z in (student, teacher))
            p, q = s / s.sum(), t / t.sum()
            total += (q * np.log(q / p)).sum()
    return temperature**2 * total / (B * C)


@pytest.mark.parametrize("labels", [LABELS, SOME], ids=["all", "some ignored"])
def test_cwd_equals_numpy(labels):
    found = main_loss("cwd", weight=1.0, weight_labels=0.0)(side(STUDENT), side(TEACHER), labels)
    assert found.item() == pytest.approx(numpy_cwd(STUDENT, TEACHER, (labels != IGNORED).numpy()), rel=1e-10)


@pytest.mark.parametrize("name", ["kd", "dkd", "mlkd"])
def test_standardized_logits(name):
    """By numpy's own mean and deviation; and blind to every sample's shift and scale, which the plain loss is not."""
    s, t = draw(4, B, C), draw(5, B, C)
    labels = LABELS[:, 0, 0]
    arrays = [z.numpy() for z in (s, t)]
    by_hand = [(z - z.mean(1, keepdims=True)) / (1e-7 + z.std(1, ddof=1, keepdims=True)) for z in arrays]
    expected = main_loss(name, weight_labels=0.0)(*(side(torch.from_numpy(z)) for z in by_hand), labels)
    loss = main_loss(name, weight_labels=0.0, standardize=True)
    assert loss(side(s), side(t), labels).item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss(side(3 * s + 7), side(t), labels).item() == pytest.approx(expected.item(), rel=1e-5)
    plain = main_loss(name, weight_labels=0.0)
    assert plain(side(3 * s + 7), side(t), labels).item() != pytest.approx(
        plain(side(s), side(t), labels).item(), rel=0.01
    )


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def numpy_soft_dkd(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0):
    total = 0.0
    for a, b, y in zip(student.numpy(), teacher.numpy(), labels.numpy(), strict=True):
        p, q = softmax(a / temperature), softmax(b / temperature)
        for c in range(C):
            target = q[c] * math.log(q[c] / p[c]) + (1 - q[c]) * math.log((1 - q[c]) / (1 - p[c]))
            p_others, q_others = (softmax(np.delete(z, c) / temperature) for z in (a, b))
            total += y[c] * (alpha * target + beta * (q_others * np.log(q_others / p_others)).sum())
    return temperature**2 * total / len(student)


@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=20)
def test_dkd_of_mixed_labels_is_the_expectation_over_the_label(seed, share):
    s, t = draw(seed, B, C), draw(seed + 1, B, C)
    first, second = (F.one_hot(LABELS[:, k, 0], C).double() for k in (0, 1))
    mixed = share * first + (1 - share) * second
    found = main_loss("dkd", weight_labels=0.0)(side(s), side(t), mixed)
    assert found.item() == pytest.approx(numpy_soft_dkd(s, t, mixed), rel=1e-9)


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_one_hot_probabilities_are_classes(name):
    for shape in ((), (H, W)):
        s, t = draw(4, B, C, *shape), draw(5, B, C, *shape)
        labels = LABELS if shape else LABELS[:, 0, 0]
        hot = F.one_hot(labels, C).double()
        hot = hot.movedim(-1, 1) if shape else hot
        found = main_loss(name)(side(s), side(t), hot)
        assert found.item() == pytest.approx(main_loss(name)(side(s), side(t), labels).item(), rel=1e-9)


@pytest.mark.parametrize("margin", [5.0, 30.0, 200.0, 2000.0])
@pytest.mark.parametrize("sure", ["student", "teacher", "both", "of different classes"])
def test_one_hot_probabilities_are_classes_for_sure_networks_too(margin, sure):
    """dkd took 1 - p for 1e-12 at least, so that value and gradient were wrong from a margin of 27.6 T on."""
    labels = LABELS[:, 0, 0]
    hot = F.one_hot(labels, C).double()
    other = hot.roll(1, 1) if sure == "of different classes" else hot
    s, t = draw(4, B, C) + margin * hot * (sure != "teacher"), draw(5, B, C) + margin * other * (sure != "student")
    found = []
    for form in (labels, hot):
        student = s.clone().requires_grad_()
        loss = main_loss("dkd", temperature=1.0, weight_labels=0.0)(side(student), side(t), form)
        loss.backward()
        found.append((loss.detach(), student.grad))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_labels_that_fit_no_form_are_refused():
    with pytest.raises(
        ConfigError, match=r"Labels of shape \(3, 5\) \(int64\) do not fit logits of shape \(3, 4, 5, 2\)"
    ):
        main_loss("kd")(side(STUDENT), side(TEACHER), LABELS[:, :, 0])


def test_losses_for_one_form_of_logits_say_so():
    with pytest.raises(ConfigError, match="mlkd relates the samples of a batch"):
        main_loss("mlkd")(side(STUDENT), side(TEACHER), LABELS)
    with pytest.raises(ConfigError, match="cwd compares maps"):
        main_loss("cwd")(side(STUDENT[:, :, 0, 0]), side(TEACHER[:, :, 0, 0]), LABELS[:, 0, 0])


def maps(seed, widths, sizes):
    return {f"layer{k}": draw(seed + k, B, w, n, n) for k, (w, n) in enumerate(zip(widths, sizes, strict=True))}


def pooled(f, side_length):
    n = f.shape[-1]
    edges = [(k * n // side_length, -(-(k + 1) * n // side_length)) for k in range(side_length)]
    return np.stack([np.stack([f[:, :, a:b, c:d].mean((2, 3)) for c, d in edges], -1) for a, b in edges], 2)


def numpy_context(a, b):
    """The authors' HCL: a size that is left out does not halve the weight."""
    loss, weight, total = np.mean((a - b) ** 2), 1.0, 1.0
    for length in (4, 2, 1):
        if length >= a.shape[2]:
            continue
        weight /= 2
        loss += weight * np.mean((pooled(a, length) - pooled(b, length)) ** 2)
        total += weight
    return loss / total


@pytest.mark.parametrize("height", [8, 4, 3, 2, 1])
def test_context_loss_equals_the_authors(height):
    one, other = draw(1, B, 2, height, height), draw(2, B, 2, height, height)
    expected = numpy_context(one.numpy(), other.numpy())
    assert context_loss(one, other).item() == pytest.approx(expected, rel=1e-12)


def convolved(f, weight, bias=None):
    """A convolution of size 1 or 3 with as much padding."""
    r = weight.shape[-1] // 2
    padded = np.pad(f, ((0, 0), (0, 0), (r, r), (r, r)))
    n = f.shape[2]
    out = sum(
        np.einsum("bchw,oc->bohw", padded[:, :, i : i + n, j : j + n], weight[:, :, i, j])
        for i in range(2 * r + 1)
        for j in range(2 * r + 1)
    )
    return out + (0 if bias is None else bias[:, None, None])


def normed(f):
    return (f - f.mean((0, 2, 3), keepdims=True)) / np.sqrt(f.var((0, 2, 3), keepdims=True) + 1e-5)


def test_reviewkd_equals_numpy():
    student, teacher = maps(10, (3, 4, 6), (8, 4, 2)), maps(20, (5, 5, 7), (8, 4, 4))
    torch.manual_seed(0)
    loss = main_loss(
        "reviewkd",
        student_shapes={n: tuple(f.shape) for n, f in student.items()},
        teacher_shapes={n: tuple(f.shape) for n, f in teacher.items()},
        weight=1.0,
        weight_labels=0.0,
    ).double()
    expected, deeper = 0.0, None
    for k in (2, 1, 0):
        x = normed(convolved(student[f"layer{k}"].numpy(), loss.entries[k][0].weight.detach().numpy()))
        if deeper is not None:
            grown = deeper[:, :, np.arange(x.shape[2]) * deeper.shape[2] // x.shape[2]]
            grown = grown[:, :, :, np.arange(x.shape[2]) * deeper.shape[2] // x.shape[2]]
            share = loss.shares[k]
            z = convolved(np.concatenate((x, grown), 1), share.weight.detach().numpy(), share.bias.detach().numpy())
            z = 1 / (1 + np.exp(-z))
            x = x * z[:, :1] + grown * z[:, 1:]
        target = teacher[f"layer{k}"].numpy()
        if x.shape[2] != target.shape[2]:
            places = np.arange(target.shape[2]) * x.shape[2] // target.shape[2]
            x = x[:, :, places][:, :, :, places]
        expected += numpy_context(normed(convolved(x, loss.exits[k][0].weight.detach().numpy())), target)
        deeper = x
    found = loss(Outputs(None, None, student, None), Outputs(None, None, teacher, None), None)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_reviewkd_trains_every_part_of_its_own():
    student = {name: f.requires_grad_() for name, f in maps(10, (3, 4), (8, 4)).items()}
    teacher = maps(20, (5, 5), (8, 4))
    shapes = [{n: tuple(f.shape) for n, f in features.items()} for features in (student, teacher)]
    loss = main_loss("reviewkd", student_shapes=shapes[0], teacher_shapes=shapes[1], weight_labels=0.0).double()
    loss(Outputs(None, None, student, None), Outputs(None, None, teacher, None), None).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert all(f.grad is not None for f in student.values())
