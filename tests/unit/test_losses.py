"""Every loss against the formula written out in numpy loops, in float64; then the frame around them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.losses import EMBEDDING, Outputs
from indistill_fx.losses.base import MainLoss
from indistill_fx.losses.registry import MAIN_LOSSES, WARMUP_LOSSES, asked_of_the_data, main_loss, warmup_loss
from indistill_fx.losses.task import Classification, Embedding, MultiLabel, Regression

B, C = 6, 5


def outputs(seed, *, widths=(3, 4), sizes=(6, 4), embedding=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    features = {f"layer{i}": draw(B, w, n, n) for i, (w, n) in enumerate(zip(widths, sizes, strict=True), 1)}
    return Outputs(3 * draw(B, C), draw(B, embedding), features, torch.tensor([4, 0, 9, 2, 7, 5]))


STUDENT = outputs(0)
TEACHER = outputs(1, widths=(5, 6), sizes=(6, 4), embedding=9)
LABELS = torch.tensor([0, 1, 4, 2, 0, 3])


def material(name, dtype=torch.float64):
    """Outputs of student and teacher and labels that the loss can read; for cwd they have positions, for simkd one last width."""
    last = 4 if name == "simkd" else 6
    student, teacher = outputs(0, dtype=dtype), outputs(1, widths=(5, last), sizes=(6, 4), embedding=9, dtype=dtype)
    if name != "cwd":
        return student, teacher, LABELS
    g = torch.Generator().manual_seed(5)
    dense = [torch.randn(B, C, 3, 2, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]
    labels = torch.randint(C, (B, 3, 2), generator=g)
    return student._replace(logits=dense[0]), teacher._replace(logits=dense[1]), labels


def shapes(values):
    return {EMBEDDING: tuple(values.embedding.shape)} | {n: tuple(f.shape) for n, f in values.features.items()}


def build(name, **options):
    if name == "crd":
        options = {"samples": 12, "negatives": 20, "width": 8} | options
    torch.manual_seed(3)
    return main_loss(name, student_shapes=shapes(STUDENT), teacher_shapes=shapes(TEACHER), **options).double()


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def cross_entropy(logits, labels):
    return -np.mean([math.log(softmax(z)[y]) for z, y in zip(logits.numpy(), labels.numpy(), strict=True)])


def numpy_kd(s, t, labels, temperature=4.0):
    total = 0.0
    for a, b in zip(s.logits.numpy(), t.logits.numpy(), strict=True):
        p, q = softmax(a / temperature), softmax(b / temperature)
        total += sum(q[c] * math.log(q[c] / p[c]) for c in range(C))
    return temperature**2 * total / B


def numpy_dkd(s, t, labels, alpha=1.0, beta=8.0, temperature=4.0):
    target = others = 0.0
    for a, b, y in zip(s.logits.numpy(), t.logits.numpy(), labels.numpy(), strict=True):
        p, q = softmax(a / temperature), softmax(b / temperature)
        target += q[y] * math.log(q[y] / p[y]) + (1 - q[y]) * math.log((1 - q[y]) / (1 - p[y]))
        p, q = softmax(np.delete(a, y) / temperature), softmax(np.delete(b, y) / temperature)
        others += sum(q[c] * math.log(q[c] / p[c]) for c in range(C - 1))
    return temperature**2 * (alpha * target + beta * others) / B


def numpy_dist(s, t, labels):
    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / (math.sqrt((a**2).sum()) * math.sqrt((b**2).sum()) + 1e-8)

    p, q = (np.array([softmax(z) for z in x.logits.numpy()]) for x in (s, t))
    inter = 1 - np.mean([pearson(p[i], q[i]) for i in range(B)])
    return inter + 1 - np.mean([pearson(p[:, c], q[:, c]) for c in range(C)])


def numpy_mlkd(s, t, labels):
    total = 0.0
    for temperature in (2.0, 3.0, 4.0, 5.0, 6.0):
        p, q = (np.array([softmax(z / temperature) for z in x.logits.numpy()]) for x in (s, t))
        total += temperature**2 * (q * np.log(q / p)).sum() / B
        total += sum((p[i] @ p[j] - q[i] @ q[j]) ** 2 for i in range(B) for j in range(B)) / B
        total += sum((p[:, i] @ p[:, j] - q[:, i] @ q[:, j]) ** 2 for i in range(C) for j in range(C)) / C
    return total / 5


def distributions(f, kernel):
    k = np.array([[kernel(f[i], f[j]) for j in range(B)] for i in range(B)])
    return k / k.sum(1, keepdims=True)


def cosine_kernel(eps):
    def kernel(a, b):
        return ((a / (np.linalg.norm(a) + eps)) @ (b / (np.linalg.norm(b) + eps)) + 1) / 2

    return kernel


def numpy_pkt_features(f_s, f_t):
    f_s, f_t = f_s.reshape(B, -1), f_t.reshape(B, -1)
    total = 0.0
    for kernel in (cosine_kernel(1e-6), lambda a, b: 1 / (1 + math.sqrt(((a - b) ** 2).sum() + 1e-6))):
        p, q = distributions(f_s, kernel), distributions(f_t, kernel)
        total += np.mean([(q[i, j] - p[i, j]) * math.log(q[i, j] / p[i, j]) for i in range(B) for j in range(B)])
    return total


def numpy_pkt(s, t, labels):
    return numpy_pkt_features(s.embedding.numpy(), t.embedding.numpy())


def numpy_pkt_kl(s, t, labels):
    p, q = (distributions(x.embedding.numpy(), cosine_kernel(1e-7)) for x in (s, t))
    return np.mean([q[i, j] * math.log((q[i, j] + 1e-7) / (p[i, j] + 1e-7)) for i in range(B) for j in range(B)])


def numpy_attention(f, power=2.0):
    maps = np.array([[np.mean(np.abs(x[:, i, j]) ** power) for i, j in np.ndindex(x.shape[1:])] for x in f])
    return maps / np.linalg.norm(maps, axis=1, keepdims=True)


def numpy_at(s, t, labels):
    return sum(
        np.mean((numpy_attention(f.numpy()) - numpy_attention(t.features[name].numpy())) ** 2)
        for name, f in s.features.items()
    )


def numpy_sp(s, t, labels):
    gram = []
    for x in (s, t):
        f = x.features["layer2"].numpy().reshape(B, -1)
        g = np.array([[f[i] @ f[j] for j in range(B)] for i in range(B)])
        gram.append(g / np.linalg.norm(g, axis=1, keepdims=True))
    return ((gram[1] - gram[0]) ** 2).sum() / B**2


def smooth_l1(a, b):
    d = np.abs(a - b)
    return np.mean(np.where(d < 1, d**2 / 2, d - 0.5))


def numpy_rkd(s, t, labels):
    distances, angles = [], []
    for x in (s, t):
        f = x.embedding.numpy()
        d = np.array([[np.linalg.norm(f[i] - f[j]) for j in range(B)] for i in range(B)])
        distances.append(d / d[d > 0].mean())
        e = np.zeros((B, B, B))
        for i, j, k in np.ndindex(B, B, B):
            u, v = f[j] - f[i], f[k] - f[i]
            if i not in (j, k):
                e[i, j, k] = u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
        angles.append(e)
    return 25 * smooth_l1(*distances) + 50 * smooth_l1(*angles)


REFERENCES = {
    "kd": (numpy_kd, 0.9, 0.1),
    "dkd": (numpy_dkd, 1.0, 1.0),
    "dist": (numpy_dist, 2.0, 1.0),
    "mlkd": (numpy_mlkd, 1.0, 1.0),
    "pkt": (numpy_pkt, 1.0, 0.0),
    "pkt_kl": (numpy_pkt_kl, 30000.0, 1.0),
    "at": (numpy_at, 1000.0, 1.0),
    "sp": (numpy_sp, 3000.0, 1.0),
    "rkd": (numpy_rkd, 1.0, 1.0),
}
LEARNED = {"fitnet", "vid", "crd", "reviewkd"}
ELSEWHERE = {"simkd"}  # in passes/test_reuse.py
DENSE = {"cwd"}  # in test_dense_losses.py


def test_every_loss_is_covered():
    assert set(REFERENCES) | LEARNED | DENSE | ELSEWHERE | {"labels"} == set(MAIN_LOSSES)


def test_the_help_names_every_loss():
    from indistill_fx.cli.distill import command

    said = next(option.help for option in command.params if option.name == "main")
    assert said == f"Main loss: {', '.join(MAIN_LOSSES)} or file.py:loss."


@pytest.mark.parametrize("name", REFERENCES)
def test_main_loss_equals_numpy(name):
    reference, weight, weight_labels = REFERENCES[name]
    expected = weight * reference(STUDENT, TEACHER, LABELS) + weight_labels * cross_entropy(STUDENT.logits, LABELS)
    assert main_loss(name)(STUDENT, TEACHER, LABELS).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", REFERENCES)
def test_options_are_heeded(name):
    reference, *_ = REFERENCES[name]
    loss = main_loss(name, weight=3.0, weight_labels=0.5)
    expected = 3.0 * reference(STUDENT, TEACHER, LABELS) + 0.5 * cross_entropy(STUDENT.logits, LABELS)
    assert loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(expected, rel=1e-10)


def test_labels_loss_asks_nothing_of_the_teacher():
    loss = main_loss("labels", weight_labels=2.0)
    assert loss.needs == frozenset()
    value = loss(STUDENT, Outputs(None, None, {}), LABELS)
    assert value.item() == pytest.approx(2 * cross_entropy(STUDENT.logits, LABELS), rel=1e-12)


@pytest.mark.parametrize(("name", "options"), [("kd", {"temperature": 2.0}), ("dkd", {"beta": 2.0, "alpha": 0.5})])
def test_method_options_reach_the_formula(name, options):
    expected = REFERENCES[name][0](STUDENT, TEACHER, LABELS, **options)
    loss = main_loss(name, weight=1.0, weight_labels=0.0, **options)
    assert loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(expected, rel=1e-10)


def test_dkd_ramps_over_training_steps_only():
    loss, full = main_loss("dkd", ramp_steps=4, weight_labels=0.0), main_loss("dkd", weight_labels=0.0)
    whole = full(STUDENT, TEACHER, LABELS).item()
    seen = [loss(STUDENT, TEACHER, LABELS).item() / whole for _ in range(6)]
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert loss.eval()(STUDENT, TEACHER, LABELS).item() == pytest.approx(whole)
    assert int(loss.step) == 6


def test_dkd_is_finite_for_a_certain_teacher():
    certain = STUDENT._replace(logits=torch.nn.functional.one_hot(LABELS, C) * 1e4)
    student = STUDENT._replace(logits=-certain.logits.double().requires_grad_())
    value = main_loss("dkd")(student, certain._replace(logits=certain.logits.double()), LABELS)
    assert value.isfinite()


def test_fitnet_equals_numpy():
    loss = build("fitnet", weight_labels=0.0).train()
    conv, norm, _ = loss.regressor
    assert loss.hint == "layer2"
    x = STUDENT.features["layer2"].numpy()
    w, b = conv.weight.detach().numpy()[:, :, 0, 0], conv.bias.detach().numpy()
    y = np.array([[[w @ x[i, :, h, v] + b for v in range(4)] for h in range(4)] for i in range(B)])  # B, H, W, C
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + norm.eps)
    expected = 100 * np.mean((np.maximum(y, 0).transpose(0, 3, 1, 2) - TEACHER.features["layer2"].numpy()) ** 2)
    assert loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [((8, 8), (4, 4), nn.Conv2d), ((4, 4), (8, 8), nn.ConvTranspose2d), ((7, 6), (5, 5), nn.Conv2d)],
)
def test_fitnet_reaches_the_teachers_resolution(student, teacher, kind):
    loss = main_loss(
        "fitnet", student_shapes={"a": (B, 3, *student)}, teacher_shapes={"a": (B, 5, *teacher)}, relu=False
    )
    assert isinstance(loss.regressor[0], kind)
    assert loss.regressor(torch.randn(B, 3, *student)).shape == (B, 5, *teacher)


def test_fitnet_refuses_what_it_cannot_reach():
    with pytest.raises(ConfigError, match="3x3 at 'a' to the teacher's 8x8"):
        main_loss("fitnet", student_shapes={"a": (B, 3, 3, 3)}, teacher_shapes={"a": (B, 5, 8, 8)})
    with pytest.raises(ConfigError, match="'a' is none"):
        main_loss("vid", student_shapes={"a": (B, 3)}, teacher_shapes={"a": (B, 5)})
    with pytest.raises(ConfigError, match="Pairs: layer1, layer2"):
        build("fitnet", hint="layer3")


def test_vid_equals_numpy():
    loss = build("vid", weight_labels=0.0)
    expected = 0.0
    for i, (name, f) in enumerate(STUDENT.features.items()):
        a, b, c = (loss.means[i][k].weight.detach().numpy()[:, :, 0, 0] for k in (0, 2, 4))
        variance = np.log1p(np.exp(loss.scales[i].detach().numpy())) + 1e-5
        assert variance == pytest.approx(5.0, rel=1e-6)
        x, t = f.numpy(), TEACHER.features[name].numpy()
        terms = []
        for n, h, w in np.ndindex(B, *x.shape[2:]):
            mean = c @ np.maximum(b @ np.maximum(a @ x[n, :, h, w], 0), 0)
            terms.append(0.5 * ((mean - t[n, :, h, w]) ** 2 / variance + np.log(variance)))
        expected += np.mean(terms)
    assert loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(expected, rel=1e-10)


def numpy_crd(loss, drawn, labels_known, scales):
    """One direction per anchor; returns the loss and the two scales."""
    n, k, index = 12, 20, STUDENT.indices.numpy()
    normal = {}
    for key, x in (("student", STUDENT), ("teacher", TEACHER)):
        layer = getattr(loss, f"project_{key}")
        y = x.embedding.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        normal[key] = y / np.linalg.norm(y, axis=1, keepdims=True)
    total, new_scales = 0.0, []
    for side, (anchor, bank) in enumerate((("student", "teacher"), ("teacher", "student"))):
        m = getattr(loss, f"bank_{bank}").numpy()
        score = [[math.exp(normal[anchor][i] @ m[j] / 0.07) for j in range(n)] for i in range(B)]
        kept = [[j for j in drawn if labels_known[j] != int(LABELS[i]) and j != index[i]] for i in range(B)]
        every = [score[i][j] for i in range(B) for j in [index[i], *kept[i]]]
        scale = np.mean(every) * n if scales is None else scales[side]
        new_scales.append(scale)
        for i in range(B):
            c = len(kept[i]) / n
            p = score[i][index[i]] / scale
            total -= math.log(p / (p + c + 1e-7))
            total -= sum(math.log(c / (score[i][j] / scale + c + 1e-7)) for j in kept[i])
        assert any(len(x) < k for x in kept)
    return total / B, new_scales, normal


def test_crd_equals_numpy_and_remembers():
    loss = build("crd", weight=1.0, weight_labels=0.0).train()
    scales, known = None, [-1] * 12
    for step in range(3):
        torch.manual_seed(100 + step)
        drawn = torch.randint(12, (20,)).tolist()
        expected, scales, normal = numpy_crd(loss, drawn, known, scales)
        banks = {key: getattr(loss, f"bank_{key}").clone().numpy() for key in ("student", "teacher")}
        torch.manual_seed(100 + step)
        assert loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(expected, rel=1e-9)
        for place, y in zip(STUDENT.indices.tolist(), LABELS.tolist(), strict=True):
            known[place] = y
        for key, bank in banks.items():
            for i, place in enumerate(STUDENT.indices.tolist()):
                mixed = 0.5 * bank[place] + 0.5 * normal[key][i]
                bank[place] = mixed / np.linalg.norm(mixed)
            np.testing.assert_allclose(getattr(loss, f"bank_{key}").numpy(), bank, rtol=1e-10)


def test_crd_evaluation_leaves_the_bank_alone():
    loss = build("crd").eval()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss(STUDENT, TEACHER, LABELS)
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


CRD_LABELS = {
    "a column": (LABELS[:, None], Classification(), LABELS),
    "smoothed": (0.9 * F.one_hot(LABELS, C) + 0.1 / C, Classification(), LABELS),
    "some zeros": (F.one_hot(LABELS, C + 1)[:, 1:].double(), Classification(), LABELS - 1),
    "some unknown": (LABELS.masked_fill(LABELS == 0, -100), Classification(), LABELS.masked_fill(LABELS == 0, -1)),
    "multilabel": (F.one_hot(LABELS, C), MultiLabel(), torch.full((B,), -1)),
    "values": (LABELS.double() / 3, Regression(), torch.full((B,), -1)),
    "counts": (LABELS, Regression(), torch.full((B,), -1)),
    "none": (None, Embedding(), torch.full((B,), -1)),
}


@pytest.mark.parametrize("form", CRD_LABELS)
@pytest.mark.parametrize("logits", [True, False], ids=["with logits", "without"])
def test_crd_takes_labels_of_every_form(form, logits):
    """What is not one class a sample was an error of torch's."""
    labels, task, known = CRD_LABELS[form]
    loss = build("crd", weight_labels=0.0, task=task)
    student = STUDENT if logits else STUDENT._replace(logits=None)
    for _ in range(2):
        assert loss(student, TEACHER, labels).isfinite()
    assert torch.equal(loss.bank_labels[STUDENT.indices], known)


def test_samples_of_unknown_class_are_negatives_of_each_other_in_crd(monkeypatch):
    loss, counts = build("crd", weight_labels=0.0), []
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.cat([STUDENT.indices] * 2))
    monkeypatch.setattr(
        loss, "_contrast", lambda anchor, bank, index, drawn, other, side: counts.append(other.sum(1)) or anchor.sum()
    )
    for _ in range(2):
        loss(STUDENT, TEACHER, torch.tensor([-100, -100, 4, 4, 0, 3]))
    assert counts[-1].tolist() == [10, 10, 8, 8, 10, 10]  # of twelve: without itself and those of its class


def test_crd_needs_sample_indices():
    with pytest.raises(ConfigError, match="sample indices"):
        build("crd")(STUDENT._replace(indices=None), TEACHER, LABELS)
    with pytest.raises(ConfigError, match="'samples'"):
        main_loss("crd", student_shapes=shapes(STUDENT), teacher_shapes=shapes(TEACHER))


def numpy_cosine(f_s, f_t):
    flat = zip(f_s.reshape(B, -1), f_t.reshape(B, -1), strict=True)
    return 1 - np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in flat])


WARMUP_REFERENCES = {
    "mse": lambda s, t: sum((x - y) ** 2 for x, y in zip(s.flat, t.flat, strict=True)) / s.size,
    "cosine": numpy_cosine,
    "at": lambda s, t: np.mean((numpy_attention(s) - numpy_attention(t)) ** 2),
    "pkt": numpy_pkt_features,
}


@pytest.mark.parametrize("name", WARMUP_LOSSES)
def test_warmup_loss_equals_numpy(name):
    s, t = outputs(5).features["layer1"], outputs(6).features["layer1"]
    expected = WARMUP_REFERENCES[name](s.numpy(), t.numpy())
    assert warmup_loss(name)(s, t).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", WARMUP_LOSSES)
def test_warmup_losses_say_whether_widths_must_agree(name):
    loss = warmup_loss(name)
    narrow, wide = STUDENT.features["layer1"], TEACHER.features["layer1"]
    if loss.needs_equal_widths:
        with pytest.raises(ConfigError, match="Narrow the teacher"):
            loss(narrow, wide)
    else:
        assert loss(narrow, wide).isfinite()


@pytest.mark.parametrize("name", WARMUP_LOSSES)
def test_a_feature_is_at_no_distance_from_itself(name):
    f = STUDENT.features["layer1"]
    assert warmup_loss(name)(f, f).item() == pytest.approx(0, abs=1e-12)
    assert warmup_loss(name)(f, f.flip(0)).item() > 1e-6


def test_attention_pools_the_larger_map():
    loss = warmup_loss("at")
    large, small = outputs(2, sizes=(6, 4)).features["layer1"], outputs(3, sizes=(3, 3)).features["layer1"]
    halved = F.avg_pool2d(large, 2)
    assert torch.equal(loss(large, small), loss(halved, small))
    assert torch.equal(loss(small, large), loss(small, halved))


def test_attention_refuses_vectors():
    with pytest.raises(ConfigError, match="compares attention over space"):
        warmup_loss("at")(STUDENT.embedding, TEACHER.embedding)


@pytest.mark.parametrize("name", sorted(MAIN_LOSSES))
def test_only_what_is_needed_is_read(name):
    """What `needs` leaves out may be absent on the teacher's side, and what it names may not."""
    student, teacher, labels = material(name)
    loss = build(name, **({} if name == "labels" else {"weight_labels": 1.0}))
    given = {
        "logits": teacher.logits if "logits" in loss.needs else None,
        "embedding": teacher.embedding if "embedding" in loss.needs else None,
        "features": teacher.features if "features" in loss.needs else {},
    }
    assert loss(student, Outputs(**given), labels).isfinite()
    for absent in loss.needs:
        with pytest.raises((ConfigError, KeyError)):
            loss(student, Outputs(**(given | {absent: {} if absent == "features" else None})), labels)


@pytest.mark.parametrize("name", sorted(MAIN_LOSSES))
def test_gradients_reach_the_student_only(name):
    def leaves(values):
        return Outputs(
            values.logits.clone().requires_grad_(),
            values.embedding.clone().requires_grad_(),
            {n: f.clone().requires_grad_() for n, f in values.features.items()},
            values.indices,
        )

    def tensors(values):
        return [values.logits, values.embedding, *values.features.values()]

    *sides, labels = material(name)
    student, teacher = (leaves(side) for side in sides)
    loss = build(name)
    loss(student, teacher, labels).backward()
    assert any(x.grad is not None and x.grad.abs().sum() > 0 for x in tensors(student))
    assert all(x.grad is None or x.grad.isfinite().all() for x in tensors(student))
    assert all(x.grad is None for x in tensors(teacher))
    assert all(p.grad is not None for p in loss.parameters() if name != "crd" or p.shape)


@pytest.mark.parametrize("name", sorted(MAIN_LOSSES))
def test_compiles_whole_and_agrees(name):
    given = material(name)
    plain, compiled = build(name), build(name)
    torch._dynamo.reset()
    fast = torch.compile(compiled, fullgraph=True, backend="eager")
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = plain(*given)
        torch.manual_seed(seed)
        torch.testing.assert_close(fast(*given), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", sorted(MAIN_LOSSES))
def test_autocast_changes_nothing(name):
    """Under autocast a bfloat16 matrix product would lose PKT's small differences."""
    student, teacher, labels = material(name, torch.float32)
    values = []
    for enabled in (False, True):
        loss = build(name).float()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(loss(student, teacher, labels))
    assert torch.equal(*values)
    halves = Outputs(
        student.logits.bfloat16(),
        student.embedding.bfloat16(),
        {k: v.half() for k, v in student.features.items()},
        student.indices,
    )
    assert build(name).float()(halves, teacher, labels).dtype == torch.float32


@pytest.mark.parametrize("name", ["pkt", "rkd"])
def test_distances_survive_a_large_offset_in_float32(name):
    """|a|^2 + |b|^2 - 2ab cancels; taken about the mean it does not."""
    loss = main_loss(name, weight_labels=0.0)
    student, teacher = outputs(0, dtype=torch.float32), outputs(1, dtype=torch.float32)
    if name == "pkt":  # its other kernel, the cosine, does depend on the offset
        from indistill_fx.losses.relations import _student_t_kernel as kernel

        torch.testing.assert_close(
            kernel(student.embedding + 1000), kernel(STUDENT.embedding).float(), rtol=1e-3, atol=0
        )
        return
    moved = student._replace(embedding=student.embedding + 1000)
    assert loss(moved, teacher, LABELS).item() == pytest.approx(loss(student, teacher, LABELS).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["pkt", "pkt_kl", "rkd", "at", "sp", "dist"])
def test_dead_features_give_finite_gradients(name):
    dead = torch.zeros(B, 7, dtype=torch.float64, requires_grad=True)
    student = Outputs(
        dead[:, :C] + 0,
        dead,
        {n: dead[:, :3, None, None] * f for n, f in STUDENT.features.items() if n == "layer1"},
        None,
    )
    teacher = Outputs(TEACHER.logits, TEACHER.embedding, {"layer1": TEACHER.features["layer1"]}, None)
    value = main_loss(name)(student, teacher, LABELS)
    value.backward()
    assert dead.grad.isfinite().all()


def test_opposite_vectors_give_a_finite_pkt():
    f = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    value = warmup_loss("pkt")(f, torch.randn(3, 4))
    value.backward()
    assert value.isfinite()
    assert f.grad.isfinite().all()


@pytest.mark.parametrize("name", ["pkt", "pkt_kl", "sp", "rkd", "dist", "mlkd"])
def test_the_last_batch_may_have_one_sample(name):
    """rkd divided by the mean of no distances."""
    student, teacher = (
        Outputs(values.logits[:1], values.embedding[:1], {key: f[:1] for key, f in values.features.items()})
        for values in (STUDENT, TEACHER)
    )
    vector, feature = student.embedding.clone().requires_grad_(), student.features["layer2"].clone().requires_grad_()
    student = student._replace(embedding=vector, features={"layer2": feature}, logits=student.logits + vector[:, :5])
    value = main_loss(name)(student, teacher, LABELS[:1])
    value.backward()
    assert value.isfinite() and all(x.grad is None or x.grad.isfinite().all() for x in (vector, feature))


def test_equal_vectors_span_no_angle():
    """They had a gradient of 1e12 in rkd: the same sample twice in a batch undid the training."""
    f = STUDENT.embedding.clone()
    f[1] = f[0]
    f.requires_grad_()
    main_loss("rkd", distance=0.0, weight_labels=0.0)(STUDENT._replace(embedding=f), TEACHER, LABELS).backward()
    assert f.grad.norm() < 100


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_pkt_and_rkd_do_not_see_a_rotation(seed, scale):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(B, 7, generator=g, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, generator=g, dtype=torch.float64))
    a, b = Outputs(None, f, {}), Outputs(None, f @ rotation, {})
    for name in ("pkt", "pkt_kl", "rkd"):
        assert main_loss(name, weight=1.0, weight_labels=0.0)(a, b).item() == pytest.approx(0, abs=1e-9)
    scaled = a._replace(embedding=scale * f)
    assert main_loss("rkd", weight_labels=0.0)(scaled, b).item() == pytest.approx(0, abs=1e-9)


def test_unknown_names_and_options_are_refused_with_the_legal_ones():
    with pytest.raises(
        ConfigError, match=r"'kdd' is not a main loss. Nearest: kd.*Choose from: labels, kd, dkd.*file.py:name"
    ):
        main_loss("kdd")
    with pytest.raises(ConfigError, match=r"'mze' is not a warm-up loss. Nearest: mse"):
        warmup_loss("mze")
    with pytest.raises(ConfigError, match=r"no option 'temprature'. Nearest: temperature"):
        main_loss("kd", temprature=2)
    with pytest.raises(ConfigError, match="temperature is 0"):
        main_loss("kd", temperature=0)
    with pytest.raises(ConfigError, match="nothing to minimise"):
        main_loss("pkt", weight=0)
    with pytest.raises(ConfigError, match=r"logits of shape \(6, 5\), the teacher \(6, 4\)"):
        main_loss("kd")(STUDENT, TEACHER._replace(logits=TEACHER.logits[:, :4]), LABELS)
    for logits, said in (
        (
            torch.zeros(6, 8, 5),
            "of different forms, which this loss cannot compare. A model that returns another form in train mode",
        ),
        (torch.zeros(6, 5, 2, 2), "the same classes, but at other positions. Let one of them resize its logits"),
    ):
        student = STUDENT._replace(logits=torch.zeros(6, 5, 4, 4))
        with pytest.raises(ConfigError, match=said):
            main_loss("kd")(student, TEACHER._replace(logits=logits), None)
    with pytest.raises(ConfigError, match="reads the labels"):
        main_loss("kd")(STUDENT, TEACHER, None)


WRONG = {
    ("kd", "temperature", "hot"): "Loss 'kd': `temperature` is the str 'hot', but must be a number.",
    ("kd", "weight", None): "Loss 'kd': `weight` is None, but must be a number.",
    ("kd", "weight", math.nan): "Loss 'kd': `weight` is nan. Expected: a finite number.",
    ("dkd", "alpha", (1,)): "Loss 'dkd': `alpha` is the tuple (1,), but must be a number.",
    ("dkd", "ramp_steps", "5"): "Loss 'dkd': `ramp_steps` is the str '5', but must be a whole number.",
    ("dist", "beta", math.inf): "Loss 'dist': `beta` is inf. Expected: a finite number.",
    ("mlkd", "temperatures", 3.0): "Loss 'mlkd': `temperatures` is the float 3.0, but must be a list (of a number).",
    (
        "crd",
        "samples",
        -1,
    ): "Loss 'crd' cannot be made with {'samples': -1}: Trying to create tensor with negative dimension -1",
    ("crd", "temperature", -1): "temperature is -1; it divides the logits.",
    ("reviewkd", "width", "8"): "Loss 'reviewkd': `width` is the str '8', but must be a whole number.",
    ("vid", "initial_variance", -1): "Loss 'vid' cannot be made with {'initial_variance': -1}: math domain error.",
}


@pytest.mark.parametrize(("name", "option", "value"), WRONG)
def test_options_of_another_type_are_refused_by_name(name, option, value):
    """Some came to nothing before a step of training failed, some said that a str cannot be compared with an int."""
    shapes = {"student_shapes": {"a": (2, 3, 4, 4), EMBEDDING: (2, 5)}}
    shapes["teacher_shapes"] = shapes["student_shapes"]
    more = {"samples": 10} if name == "crd" and option != "samples" else {}
    with pytest.raises(ConfigError) as caught:
        main_loss(name, **shapes, **more, **{option: value})
    assert str(caught.value).startswith(WRONG[name, option, value])


def test_the_frame_of_the_losses_names_what_it_is_not_given_rightly():
    for weights in ({"weight": "a", "weight_labels": 1}, {"weight": 1, "weight_labels": None}):
        with pytest.raises(
            ConfigError, match=r"^MainLoss: `weight(_labels)?` is .*, but must be a number\. Give a number, 0"
        ):
            MainLoss(**weights)
    with pytest.raises(ConfigError, match=r"^KDLoss: weight nan and weight_labels 0.1 leave nothing to minimise"):
        MAIN_LOSSES["kd"](weight=math.nan)


class Needy(nn.Module):
    def __init__(self, power):
        super().__init__()
        self.power = power

    def forward(self, student, teacher):
        return (student - teacher).abs().pow(self.power).mean()


class Open(Needy):
    def __init__(self, **options):
        super().__init__(**options)


def test_a_loss_of_the_users_that_lacks_an_option_is_told_which():
    with pytest.raises(ConfigError, match=r"^Loss 'Needy' needs the option 'power'\. Expected: power\.$"):
        warmup_loss(Needy)
    s, t = outputs(5).features["layer1"], outputs(6).features["layer1"]
    assert torch.equal(warmup_loss(Open, power=3)(s, t), warmup_loss(Needy, power=3)(s, t))
    with pytest.raises(ConfigError, match=r"^Loss 'mse' has no option 'power'\."):
        warmup_loss("mse", power=2)


USER_CODE = """
from torch import nn

def loss(student, teacher, labels, factor=1.0):
    return factor * (student.logits - teacher.logits).abs().mean()

loss.needs = {"logits"}

class Loss(nn.Module):
    def __init__(self, *, power=2):
        super().__init__()
        self.power = power

    def forward(self, student_feature, teacher_feature):
        return (student_feature - teacher_feature).abs().pow(self.power).mean()

number = 3
"""


def test_the_users_own_losses(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(USER_CODE)
    loss = main_loss(f"{file}:loss", factor=2.0)
    assert loss.needs == {"logits"}
    expected = 2 * (STUDENT.logits - TEACHER.logits).abs().mean()
    assert torch.equal(loss(STUDENT, TEACHER, LABELS), expected)
    warm = warmup_loss(f"{file}:Loss", power=1)
    s, t = outputs(5).features["layer1"], outputs(6).features["layer1"]
    assert torch.equal(warm(s, t), (s - t).abs().mean())
    assert warm.needs_equal_widths
    assert torch.equal(warmup_loss(F.l1_loss)(s, t), (s - t).abs().mean())
    with pytest.raises(ConfigError, match=r"has no 'los'. Nearest: loss"):
        main_loss(f"{file}:los")
    with pytest.raises(ConfigError, match="There is no file"):
        main_loss(f"{tmp_path}/absent.py:loss")
    with pytest.raises(ConfigError, match="name or callable, not int"):
        main_loss(f"{file}:number")
    with pytest.raises(ConfigError, match=r"no option 'pover'. Nearest: power"):
        warmup_loss(f"{file}:Loss", pover=1)


def test_broken_user_code_is_named(tmp_path: Path):
    file = tmp_path / "broken.py"
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        main_loss(f"{file}:loss")


def test_a_loss_says_what_it_asks_of_the_data(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def loss(student, teacher, labels): ...\nloss.needs_indices = True\n")
    assert asked_of_the_data("crd") == {"indices", "samples"}
    assert asked_of_the_data("kd") == asked_of_the_data(F.l1_loss) == frozenset()
    assert asked_of_the_data(f"{file}:loss") == {"indices"}
    assert main_loss(f"{file}:loss").needs_indices and not main_loss(F.l1_loss).needs_indices
