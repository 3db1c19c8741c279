"""Evaluation against plain numpy and scikit-learn; and that it leaves everything as it was."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from sklearn.neighbors import NearestNeighbors
from torch import nn

import indistill_fx as ifx
from indistill_fx.data.open import open_data
from indistill_fx.errors import ConfigError
from indistill_fx.evaluation.accuracy import embed, evaluate
from indistill_fx.evaluation.outputs import select_logits
from indistill_fx.evaluation.retrieval import evaluate_retrieval, retrieval
from indistill_fx.passes.capture.trace import trace


class Net(nn.Module):
    def __init__(self, wrapped=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.head, self.wrapped = nn.Dropout(), nn.Linear(6, 10), wrapped

    def embedding(self, x):
        return self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    def forward(self, x):
        logits = self.head(self.embedding(x))
        return self.wrapped(logits) if self.wrapped else logits


def batches(count=50, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 1, 8, 8, generator=g), torch.randint(10, (count,), generator=g)
    return list(zip(x.split(size), y.split(size), strict=True))


def net(**options):
    torch.manual_seed(0)
    model = Net(**options)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}, [m.training for m in module.modules()]


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


def test_evaluate_equals_scikit_learn():
    model, loader = net(), batches()
    found = evaluate(model.train(), loader)
    with torch.no_grad():
        p = torch.cat([model.eval()(x) for x, _ in loader]).double().softmax(1).numpy()
    labels = torch.cat([y for _, y in loader]).numpy()
    assert found.count == 50
    assert found.accuracy == pytest.approx(accuracy_score(labels, p.argmax(1)))
    assert found.loss == pytest.approx(log_loss(labels, p, labels=range(10)), rel=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_module_is_left_as_it_was(mixed):
    model = net().train()
    if mixed:
        model.norm.eval()  # a frozen batch norm must stay frozen
    before, random = state(model), torch.get_rng_state()
    evaluate(model, batches())
    embed(model.embedding, batches())
    embed(model, batches())
    assert same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    with pytest.raises(ConfigError):
        evaluate(model, [*batches(), (torch.randn(2, 1, 8, 8), torch.tensor([3, 10]))])
    assert same(before, state(model))
    assert torch.is_grad_enabled()


def test_embed_puts_a_methods_module_in_eval_mode():
    model = net()
    features, labels = embed(model.train().embedding, batches())
    with torch.no_grad():
        expected = torch.cat([model.eval().embedding(x) for x, _ in batches()])
    assert torch.equal(features, expected)
    assert labels.tolist() == torch.cat([y for _, y in batches()]).tolist()
    assert embed(lambda x: x, batches())[0].shape == (50, 64)


def test_logits_in_dicts_and_tuples():
    loader, expected = batches(), evaluate(net(), batches())
    assert evaluate(net(wrapped=lambda z: {"logits": z, "other": 0}), loader, logits="logits") == expected
    assert evaluate(net(wrapped=lambda z: (0, z)), loader, logits=1) == expected
    assert evaluate(net(wrapped=lambda z: {"other": 0, "logits": z}), loader) == expected
    with pytest.raises(ConfigError, match=r"gives a dict of scores, other, not logits.*logits=KEY"):
        evaluate(net(wrapped=lambda z: {"scores": z, "other": 0}), loader)
    with pytest.raises(ConfigError, match="in which 'scores' is not the logits"):
        evaluate(net(wrapped=lambda z: {"logits": z}), loader, logits="scores")
    with pytest.raises(ConfigError, match=r"a tensor of shape \(\)"):
        select_logits(torch.zeros(()))
    assert select_logits(torch.zeros(2, 3, 4)).shape == (2, 3, 4)  # what it means is the task's


def test_a_place_may_be_a_text_of_digits_and_a_key_of_digits_a_number():
    """As on the command line, which cannot tell them apart."""
    loader, expected = batches(), evaluate(net(), batches())
    assert evaluate(net(wrapped=lambda z: [0, z]), loader, logits="1") == expected
    assert evaluate(net(wrapped=lambda z: {"0": 0, "1": z}), loader, logits=1) == expected
    assert evaluate(net(wrapped=lambda z: {"0": 0, "1": z}), loader, logits="1") == expected
    with pytest.raises(ConfigError, match=r"gives a list of 50x10, int, in which '2' is not the logits"):
        evaluate(
            net(wrapped=lambda z: [z, 0]),
            [(torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader]))],
            logits="2",
        )


@pytest.mark.parametrize("used", [evaluate, ifx.train])
def test_a_detector_is_told_what_can_be_measured(used):
    """It was advised to say which entry of its list holds the logits."""
    boxes = net(wrapped=lambda z: [{"boxes": row.reshape(-1, 2), "labels": row > 0} for row in z])
    with pytest.raises(
        ConfigError, match=r"gives a dict of boxes, labels for each sample, not logits\. It is a detector"
    ) as found:
        used(boxes, batches())
    assert "MeanAveragePrecision" in found.value.hint and "model.backbone" in found.value.hint


def test_batches_may_be_dicts_or_carry_indices():
    expected = evaluate(net(), batches())
    assert evaluate(net(), [{"x": x, "labels": y} for x, y in batches()]) == expected
    assert evaluate(net(), [(x, y, torch.arange(len(y))) for x, y in batches()]) == expected


@pytest.mark.parametrize(("right", "chance"), [(14, True), (16, False)])
def test_no_better_than_chance_is_within_five_points_of_guessing(right, chance):
    labels = torch.arange(100) % 10
    guesses = torch.where(torch.arange(100) < right, labels, (labels + 1) % 10)
    found = evaluate(nn.Identity(), [(torch.eye(10)[guesses], labels)])
    assert (found.accuracy, found.count, found.classes) == (right / 100, 100, 10)
    assert found.no_better_than_chance is chance


@pytest.mark.parametrize(("rare_right", "chance"), [(0, True), (2, False)])
def test_always_guessing_the_commonest_class_is_chance(rare_right, chance):
    """90 of 100 are right then; and who finds a fifth of the rare class does more, though accuracy hardly rises."""
    labels = (torch.arange(100) < 10).long()
    guesses = (torch.arange(100) < rare_right).long()
    found = evaluate(nn.Identity(), [(torch.eye(9)[guesses], labels)])
    assert (found.accuracy, found.recall, found.occurring) == (0.9 + rare_right / 100, 0.5 + rare_right / 20, 2)
    assert (found.classes, found.guesses) == (9, 2)
    assert found.no_better_than_chance is chance


@pytest.mark.parametrize(
    ("right", "elsewhere", "chance"), [(54, 46, False), (54, 0, True), (0, 100, True), (4, 96, True)]
)
def test_what_is_chance_follows_from_the_answers_that_the_model_gives(right, elsewhere, chance):
    """Of 1,000 outputs, on data of two classes: 54% that are right by looking are many where the other answers are other classes."""
    labels = torch.arange(100) % 2
    guesses = torch.where(torch.arange(100) < right, labels, 1 - labels)
    guesses[100 - elsewhere :] = 999
    found = evaluate(nn.Identity(), [(torch.eye(1000)[guesses], labels)])
    assert (found.accuracy, found.occurring, found.chance) == (right / 100, 2, (100 - elsewhere) / 200)
    assert found.no_better_than_chance is chance


def test_bad_labels_and_empty_loaders_are_refused():
    with pytest.raises(ConfigError, match="Label 10 is out of range: the model has 10 classes"):
        evaluate(net(), [(torch.randn(2, 1, 8, 8), torch.tensor([3, 10]))])
    with pytest.raises(ConfigError, match="no batches to evaluate"):
        evaluate(net(), [])
    with pytest.raises(ConfigError, match="no batches to embed"):
        embed(net(), [])


def reference(query, query_labels, database, database_labels, metric, k, interpolate=True):
    """Average precision straight from its definition, on scikit-learn's ranking."""
    neighbours = NearestNeighbors(n_neighbors=len(database), algorithm="brute", metric=metric).fit(database)
    order = neighbours.kneighbors(query, return_distance=False)
    averages, precisions = [], []
    for ranking, label in zip(order, query_labels, strict=True):
        hits = database_labels[ranking] == label
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        recall_in_tenths = 10 * np.cumsum(hits) / hits.sum()
        levels = [precision[recall_in_tenths >= r - 1e-9] for r in range(11)]
        averages.append(np.mean([level.max() if interpolate or r == 0 else level[0] for r, level in enumerate(levels)]))
        precisions.append(hits[:k].mean())
    return np.mean(averages), np.mean(precisions)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 20),
    samples=st.integers(5, 60),
    classes=st.integers(1, 5),
    k=st.integers(1, 5),
    block=st.integers(1, 8),
    interpolate=st.booleans(),
)
def test_retrieval_equals_scikit_learn(seed, queries, samples, classes, k, block, interpolate):
    rng = np.random.default_rng(seed)
    database, database_labels = rng.normal(size=(samples, 6)), rng.integers(classes, size=samples)
    query, query_labels = rng.normal(size=(queries, 6)) + 0.5, rng.choice(database_labels, queries)
    found = retrieval(
        *map(torch.from_numpy, (query, query_labels, database, database_labels)),
        k=k,
        block=block,
        interpolate=interpolate,
    )
    for metric in ("cosine", "euclidean"):
        mean, precision = reference(query, query_labels, database, database_labels, metric, k, interpolate)
        assert getattr(found, f"map_{metric}") == pytest.approx(mean, rel=1e-9)
        assert getattr(found, f"precision_{metric}") == pytest.approx(precision, rel=1e-9)


def test_retrieval_by_hand():
    """Ranks of the two relevant samples are 1 and 3: precision 1 up to recall 0.5, then 2/3."""
    database = torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    found = retrieval(torch.tensor([[0.9]]), torch.tensor([5]), database, torch.tensor([5, 7, 5, 7]), k=2)
    assert found.map_euclidean == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert found.precision_euclidean == 0.5


def test_interpolation_is_told_apart():
    """Relevant at ranks 2 and 3: at recall 0.5 the precision is 1/2, but 2/3 comes later."""
    database, labels = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[0.5]]), torch.tensor([1])
    assert retrieval(*query, database, labels, k=1).map_euclidean == pytest.approx(2 / 3)
    raw = retrieval(*query, database, labels, k=1, interpolate=False).map_euclidean
    assert raw == pytest.approx((2 / 3 + 5 * 1 / 2 + 5 * 2 / 3) / 11)


def test_ties_count_against_the_model():
    dead, labels = torch.zeros(10, 4), torch.arange(10) % 2
    found = retrieval(dead, labels, dead, labels, k=5)
    assert found.precision_cosine == found.precision_euclidean == 0
    assert found.map_cosine == pytest.approx(0.5)


@pytest.mark.parametrize(("low", "high", "width"), [(0, 16, 4), (0, 2, 64), (-8, 8, 32)])
@pytest.mark.parametrize("offset", [0, 300])
def test_equal_distances_of_different_vectors_tie(low, high, width, offset):
    """They were in the order of their rounding errors. Whole numbers are compared exactly here."""
    g = torch.Generator().manual_seed(0)
    query, database = (torch.randint(low, high, (n, width), generator=g) + offset for n in (12, 80))
    labels = torch.arange(80) % 4
    averages = []
    for vector, label in zip(query, labels, strict=False):
        dots, lengths = (database @ vector).tolist(), database.square().sum(1).tolist()
        by_cosine = [-Fraction(dot * abs(dot), length or 1) for dot, length in zip(dots, lengths, strict=True)]
        for distances in (by_cosine, (database - vector).square().sum(1).tolist()):
            hits = [bool(labels[i] == label) for i in range(80)]
            order = sorted(range(80), key=lambda i: (distances[i], hits[i]))
            found = np.array([hits[i] for i in order])
            precision, recall = np.cumsum(found) / np.arange(1, 81), np.cumsum(found) / 20
            averages.append(np.mean([precision[recall >= r / 10 - 1e-9].max() for r in range(11)]))
    found = retrieval(query.float() / 8, labels[:12], database.float() / 8, labels, k=1)
    assert found.map_cosine == pytest.approx(np.mean(averages[::2]), rel=1e-12)
    assert found.map_euclidean == pytest.approx(np.mean(averages[1::2]), rel=1e-12)


@pytest.mark.filterwarnings("error")
def test_complex_features_have_two_parts():
    """The imaginary one was dropped, with torch's warning."""
    torch.manual_seed(0)
    query, database = (torch.randn(n, 4, dtype=torch.complex64) for n in (12, 30))
    labels = torch.arange(30) % 3
    parts = (torch.cat([x.real, x.imag], 1) for x in (query, database))
    expected = retrieval(next(parts), labels[:12], next(parts), labels, k=5)
    assert retrieval(query, labels[:12], database, labels, k=5) == expected


def test_retrieval_does_not_depend_on_block_or_order():
    g = torch.Generator().manual_seed(0)
    q, ql = torch.randn(70, 8, generator=g), torch.randint(4, (70,), generator=g)
    d, dl = torch.randn(200, 8, generator=g), torch.randint(4, (200,), generator=g)
    whole, shuffled = retrieval(q, ql, d, dl, k=10), torch.randperm(200, generator=g)
    for other in (
        retrieval(q, ql, d, dl, k=10, block=7),
        retrieval(q.flip(0), ql.flip(0), d[shuffled], dl[shuffled], k=10),
        retrieval(q.double(), ql, d.double(), dl, k=10),
    ):
        assert (other.map_cosine, other.map_euclidean) == pytest.approx((whole.map_cosine, whole.map_euclidean))
        assert other.precision_cosine == pytest.approx(whole.precision_cosine)
    assert retrieval(q.half(), ql, d.half(), dl, k=10).map_cosine == pytest.approx(whole.map_cosine, rel=1e-2)


def test_retrieval_refuses_what_cannot_be_ranked():
    q, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match="no sample of class 2"):
        retrieval(q, labels, q, torch.tensor([0, 1, 1]), k=1)
    with pytest.raises(ConfigError, match="k is 100, but the database has 3"):
        retrieval(q, labels, q, labels)
    with pytest.raises(ConfigError, match="not vectors of the same width"):
        retrieval(q, labels, q[:, :2], labels, k=1)
    with pytest.raises(ConfigError, match="not finite"):
        retrieval(q, labels, q * torch.nan, labels, k=1)


def test_retrieval_with_a_traced_models_penultimate_vector():
    model = net().train()
    data = open_data("digits", limit=200)
    traced = trace(model.eval(), torch.randn(2, 1, 8, 8), role="teacher")
    before = state(model)
    found = evaluate_retrieval(traced, data, k=10)
    expected = retrieval(*embed(model.embedding, data.test), *embed(model.embedding, data.train_plain), k=10)
    assert found.map_cosine == pytest.approx(expected.map_cosine, rel=1e-4)
    assert found.precision_euclidean == pytest.approx(expected.precision_euclidean, rel=1e-2)
    assert same(before, state(model))


def test_inputs_that_the_model_cannot_take_are_refused_by_their_shape():
    grey = [(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(
        ConfigError, match=r"Conv2d fails on inputs of shape \(2, 1, 8, 8\): .*--size, --channels"
    ) as told:
        evaluate(nn.Conv2d(3, 4, 3), grey)
    assert "captured" not in str(told.value)


def test_of_a_captured_graph_it_is_said_that_the_fault_may_be_ours():
    graph = trace(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)).graph_module
    with pytest.raises(ConfigError, match="if the original model takes these inputs, this is a bug in indistill-fx"):
        evaluate(graph, [(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))])


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.full((4,), -100), "Of 4 samples, none has a label that counts, so nothing can be measured"),
        (torch.zeros(0, dtype=torch.long), "There are no samples, so nothing can be measured"),
    ],
)
def test_where_no_label_counts_there_is_no_measure(labels, reason):
    """Accuracy and loss were 0, and perplexity and IoU NaN."""
    with pytest.raises(ConfigError, match=reason):
        evaluate(net(), [(torch.randn(len(labels), 1, 8, 8), labels)], task="classification")


def test_inputs_of_another_dtype_than_the_weights_are_named():
    batch = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([3, 1])
    with pytest.raises(
        ConfigError, match=r"weights are torch.float32, an input is torch.float64: .*x\.to\(torch.float32\)"
    ):
        evaluate(net(), [batch])


def test_retrieval_at_any_scale_of_the_features():
    """Above 1e19, squares were infinite: distances were not numbers, and every database sample was as near as any other by cosine."""
    torch.manual_seed(0)
    query, database, labels = torch.randn(12, 8), torch.randn(30, 8), torch.arange(30) % 3
    usual = retrieval(query, labels[:12], database, labels, k=5)
    for scale in (2.0**100, 2.0**-60):
        assert retrieval(query * scale, labels[:12], database * scale, labels, k=5) == usual


def test_retrieval_leaves_out_what_has_no_class_and_reads_probabilities():
    """-100 was taken for one more class, numbers for classes, and probabilities were an error of torch."""
    torch.manual_seed(0)
    query, database, labels = torch.randn(12, 8), torch.randn(30, 8), torch.arange(30) % 3
    usual = retrieval(query[4:], labels[4:12], database[7:], labels[7:], k=5)
    some, many = labels[:12].clone(), labels.clone()
    some[:4] = many[:7] = -100
    assert retrieval(query, some, database, many, k=5) == usual
    shares = torch.eye(3)[labels]
    assert retrieval(query[4:], shares[4:12], database[7:], shares[7:], k=5) == usual
    for wrong in (labels / 2, labels[:, None].expand(30, 2)):
        with pytest.raises(ConfigError, match="one class for each sample"):
            retrieval(query, wrong[:12], database, wrong, k=5)
    with pytest.raises(ConfigError, match="no queries"):
        retrieval(query, torch.full((12,), -100), database, labels, k=5)


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ConfigError, match="There is no device 'gpu' here"):
        evaluate(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))], device="gpu")
