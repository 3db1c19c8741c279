"""Which layers are paired, how many, why, and what is said where none can be."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torchvision
from torch import Tensor, nn

from indistill_fx.errors import ConfigError, MatchError
from indistill_fx.passes.align import align
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pairing.match import match
from indistill_fx.plan import Pair
from indistill_fx.traced import TracedModel
from tests.nets import Cnn32, Residual, TinyTransformer, images, seeded
from tests.passes.test_main_path import Pyramid


@cache
def residual(width: int = 8, blocks: int = 2, size: int = 16) -> TracedModel:
    return trace(seeded(Residual, width, blocks), images(size=size))


@cache
def transformer(width: int, depth: int) -> TracedModel:
    return trace(seeded(TinyTransformer, width, depth), images())


def names(pairs: tuple[Pair, ...]) -> list[tuple[str, str]]:
    return [(pair.teacher, pair.student) for pair in pairs]


def both(*taps: str) -> list[tuple[str, str]]:
    return [(tap, tap) for tap in taps]


class Text(nn.Module):
    """Ids to classes by attention."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        layers = [nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True) for _ in range(depth)]
        self.embed, self.layers, self.head = nn.Embedding(20, width), nn.ModuleList(layers), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x, padding = self.embed(ids), ids == 0
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.head(x[:, 0])


@cache
def text(width: int, depth: int) -> TracedModel:
    return trace(Text(width, depth), torch.randint(1, 20, (2, 6)))


def mlp(*widths: int) -> TracedModel:
    layers = [part for a, b in zip((10, *widths), widths, strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return trace(nn.Sequential(*layers, nn.Linear(widths[-1], 3)), torch.randn(2, 10))


def test_resnet50_to_resnet18_pairs_the_four_stages() -> None:
    x = torch.randn(1, 3, 64, 64)
    teacher = trace(torchvision.models.resnet50(weights=None), x)
    student = trace(torchvision.models.resnet18(weights=None), x, role="student")
    found = match(teacher, student)
    assert names(found.value) == both("layer1", "layer2", "layer3", "layer4")
    assert [(pair.teacher_shape[1], pair.student_shape[1]) for pair in found.value] == [
        (256, 64),
        (512, 128),
        (1024, 256),
        (2048, 512),
    ]
    assert all(pair.adapter == "none" and pair.kept is None and pair.score > 0.9 for pair in found.value)
    assert found.report.unmatched == ()
    assert found.report.embedding is not None
    assert found.report.embedding.teacher_shape == (1, 2048)


def test_the_papers_networks_are_paired_after_the_pooling() -> None:
    x = images(size=32)
    teacher, student = trace(seeded(Cnn32), x), trace(seeded(Cnn32, (8, 16, 32), 64), x, role="student")
    found = match(teacher, student)
    assert names(found.value) == both("pool", "pool@2", "pool@3")
    assert [pair.teacher_shape[1:] for pair in found.value] == [(16, 15, 15), (32, 6, 6), (64, 2, 2)]
    assert found.report.embedding is not None
    assert (found.report.embedding.teacher_shape, found.report.embedding.student_shape) == ((2, 128), (2, 64))


def test_the_same_question_has_the_same_answer() -> None:
    assert match(residual(), residual(4, 1)) == match(residual(), residual(4, 1))


def test_a_network_goes_with_itself() -> None:
    for model in (residual(), transformer(16, 4), text(16, 3), mlp(8, 6)):
        for every_block in (False, True):
            found = match(model, model, every_block=every_block)
            assert all(pair.teacher == pair.student and pair.score == 1 for pair in found.value)
            assert found.report.unmatched == ()


def test_wider_and_deeper_students_are_paired_like_any() -> None:
    assert names(match(residual(4, 1), residual(8, 3)).value) == both("layer1", "layer2", "layer3")


def test_inputs_of_different_size_are_pooled() -> None:
    found = match(residual(size=32), residual(4, 1, size=16))
    assert names(found.value) == both("layer1", "layer2", "layer3")
    assert {pair.adapter for pair in found.value} == {"pool"}


def test_a_student_of_one_stage_goes_with_the_last() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    found = match(residual(), trace(Flat(), images()))
    assert names(found.value) == [("layer3", ":relu")]
    assert [line.split(":")[0] for line in found.report.unmatched] == [
        "teacher `layer1` (8x16x16)",
        "teacher `layer2` (16x8x8)",
    ]


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [(12, 6, [1, 3, 5, 7, 9, 11]), (12, 4, [2, 5, 8, 11]), (6, 6, [0, 1, 2, 3, 4, 5]), (5, 2, [2, 4])],
)
def test_blocks_of_even_networks_are_spaced_uniformly(teacher: int, student: int, expected: list[int]) -> None:
    found = match(text(16, teacher), text(8, student))
    assert names(found.value) == [(f"layers.{k}", f"layers.{n}") for n, k in enumerate(expected)]


def test_a_shallower_teacher_is_spread_over_the_student() -> None:
    assert names(match(text(16, 2), text(8, 6)).value) == [("layers.0", "layers.2"), ("layers.1", "layers.5")]


def test_every_block_pairs_within_stages() -> None:
    assert names(match(residual(8, 4), residual(4, 2), every_block=True).value) == [
        (f"layer{k}.{a}", f"layer{k}.{b}") for k in (1, 2, 3) for a, b in ((1, 0), (3, 1))
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, both("layer3")),
        (2, both("layer2", "layer3")),
        (3, both("layer1", "layer2", "layer3")),
        (4, both("layer1.0", "layer1", "layer2", "layer3")),
        (6, both(*(f"layer{k}.{n}" for k in (1, 2, 3) for n in (0, 1)))),
    ],
)
def test_as_many_pairs_as_are_asked_for(count: int, expected: list[tuple[str, str]]) -> None:
    found = match(residual(8, 2), residual(4, 2), pairs=count)
    assert names(found.value) == expected
    assert len(found.report.unmatched) == 2 * max(0, 3 - count)


def test_more_pairs_than_there_are_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"7 pairs are more than the 6 blocks.* Ask for 6 at most"):
        match(residual(8, 2), residual(4, 2), pairs=7)
    with pytest.raises(ConfigError, match="pairs is 0, so there would be none"):
        match(residual(), residual(), pairs=0)


def test_taps_before_the_activation_and_at_the_last_convolution() -> None:
    early = match(residual(), residual(4, 1), taps="pre-activation").value
    assert names(early) == [(f"layer{k}.1:add", f"layer{k}.0:add") for k in (1, 2, 3)]
    late = match(residual(), residual(4, 1), taps="last-conv").value
    assert names(late) == [(f"layer{k}.1.conv2", f"layer{k}.0.conv2") for k in (1, 2, 3)]
    with pytest.raises(ConfigError, match="Choose from: block, pre-activation, last-conv"):
        match(residual(), residual(), taps="hidden")  # type: ignore[arg-type]


def test_fixed_pairs_stay_and_nothing_crosses_them() -> None:
    found = match(residual(8, 2), residual(4, 1), fixed=[("layer2.0", "layer2")])
    assert names(found.value) == [("layer1", "layer1"), ("layer2.0", "layer2"), ("layer3", "layer3")]
    assert "fixed" in found.value[1].reason
    shifted = match(residual(8, 2), residual(4, 1), fixed=[("layer1", "layer2")])
    assert names(shifted.value) == [("layer1", "layer2"), ("layer3", "layer3")]
    assert len(match(residual(8, 2), residual(4, 1), fixed=[("layer1", "layer2")], pairs=1).value) == 1


def test_fixed_pairs_that_cross_or_are_no_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match="`layer1` ↔ `layer2` and `layer2` ↔ `layer1` cross"):
        match(residual(), residual(4, 1), fixed=[("layer1", "layer2"), ("layer2", "layer1")])
    with pytest.raises(ConfigError, match=r"`fc` \(vector 5\) cannot be compared"):
        match(residual(), residual(4, 1), fixed=[("layer1", "fc")])
    with pytest.raises(ConfigError, match=r"no layer named `layr1`. Nearest: layer1"):
        match(residual(), residual(4, 1), fixed=[("layr1", "layer1")])


def test_a_text_and_an_image_have_nothing_in_common_and_both_main_paths_are_listed() -> None:
    with pytest.raises(MatchError) as error:
        match(text(8, 2), residual())
    told = str(error.value)
    assert "`layers.0` tokens 6x8" not in told
    assert "`layers.1` tokens 6x8" in told
    assert "`layer1` map 8x16x16, `layer2` map 16x8x8, `layer3` map 32x4x4" in told
    assert 'main="kd"' in told
    with pytest.raises(MatchError, match="no layers of the same kind"):
        match(mlp(8), residual())


def test_perceptrons_are_paired_by_their_hidden_layers() -> None:
    assert names(match(mlp(32, 16, 8), mlp(12, 6)).value) == [("3", "1"), ("5", "3")]


def test_a_transformer_student_takes_the_last_stage_of_a_convolutional_teacher() -> None:
    found = match(residual(), transformer(16, 2))
    (pair,) = found.value
    assert (pair.teacher, pair.student, pair.adapter) == ("layer3", "blocks.1", "tokens_to_map")


def test_outputs_of_pyramids_go_with_one_another_only() -> None:
    model = trace(Pyramid(), images(size=32))
    assert names(match(model, model).value) == both("down.0", "down.1", "down.2", "outer.2", "outer.1", "outer.0")
    lone = match(residual(size=32), model)
    assert all(pair.student.startswith("down") for pair in lone.value)
    assert [line for line in lone.report.unmatched if "`outer.2`" in line] == [
        "teacher `outer.2` (8x4x4): the teacher has no layer of that kind"
    ]


class Sum(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.conv(x))


class Dense(nn.Module):
    def __init__(self, cin: int, grow: int):
        super().__init__()
        self.conv = nn.Conv2d(cin, grow, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.relu(self.conv(x))], 1)


def dense(first: list[nn.Module], *, grow: int = 4, middle: int = 8) -> nn.Sequential:
    """First layers, a dense block behind a transition, a head; the part that may be replaced ends with the transition."""
    blocks = [Dense(middle, grow), Dense(middle + grow, grow)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(middle + 2 * grow, 3)]
    return nn.Sequential(nn.Sequential(*first), nn.Sequential(*blocks), *head)


def original() -> list[nn.Module]:
    """Stem, dense block, transition: 8 channels at a quarter of the size."""
    stem = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()]
    return [*stem, Dense(6, 5), Dense(11, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.AvgPool2d(2)]


def replaced(width: int = 8) -> list[nn.Module]:
    """A narrow auto-encoder that delivers the same."""
    down = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2, 2), nn.BatchNorm2d(2), nn.ReLU()]
    up = [nn.ConvTranspose2d(2, 10, 2, 2), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, width, 3, padding=1)]
    return [*down, *up, nn.AvgPool2d(2)]


def test_replaced_first_layers_go_with_what_they_deliver() -> None:
    x = images(size=32)
    teacher = trace(dense(original()), x)
    found = match(teacher, trace(dense(replaced()), x))
    assert names(found.value) == both("0", "1")
    assert found.value[0].reason.startswith("drop-in")
    assert (found.value[0].teacher_shape, found.value[0].student_shape) == ((2, 8, 8, 8), (2, 8, 8, 8))
    narrower = match(teacher, trace(dense(replaced(4), middle=4), x))
    assert not any("drop-in" in pair.reason for pair in narrower.value)
    itself = match(teacher, teacher)
    assert not any("drop-in" in pair.reason for pair in itself.value)


def test_different_stems_of_one_shape_are_a_pair_and_equal_ones_are_not() -> None:
    def net(*stem: nn.Module) -> TracedModel:
        blocks = [Sum(8), Sum(8)]
        return trace(
            nn.Sequential(nn.Sequential(*stem), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), x
        )

    x = images(size=32)
    plain = nn.Conv2d(3, 8, 3, 2, 1)
    deep = (nn.Conv2d(3, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 3, 1, 1))
    assert names(match(net(plain), net(*deep)).value)[0] == ("0", "0")
    assert ("0", "0") not in names(match(net(plain), net(plain)).value)
    assert ("0", "0") not in names(match(net(plain), net(*deep), pairs=1).value)


def test_measured_similarity_can_outweigh_structure() -> None:
    def similar(teacher: TracedModel, student: TracedModel, a: list[str], b: list[str]) -> list[list[float]]:
        assert (a, b) == (["layer1", "layer2", "layer3"], ["layer1", "layer2", "layer3"])
        return [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]

    found = match(residual(), residual(4, 1), similarity=similar)  # type: ignore[arg-type]
    assert names(found.value) == [("layer1", "layer2"), ("layer2", "layer3")]
    assert all("data" in pair.reason for pair in found.value)


def test_runners_up_say_why_they_lost() -> None:
    first = match(residual(), residual(4, 1)).report.explained[0]
    assert [(runner.pair.teacher, runner.pair.student) for runner in first.runners_up][:2] == [
        ("layer2", "layer1"),
        ("layer1", "layer2"),
    ]
    assert first.runners_up[0].why == "less alike in resolution, depth, order; that layer goes with `layer2` ↔ `layer2`"
    assert first.evidence.score > first.runners_up[0].evidence.score >= first.runners_up[1].evidence.score


class Parallel(nn.Module):
    """Two chains of equal work beside one another: no tensor between input and output holds everything."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)  # type: ignore[no-any-return]


def test_models_without_any_stage_are_paired_where_the_user_says() -> None:
    models, x = [Parallel(width) for width in (4, 2)], torch.randn(2, 3)
    with pytest.raises(MatchError, match="No stages were found in the teacher and in the student"):
        align(*models, example_inputs=x)
    plan = align(*models, example_inputs=x, fixed=[("one.1", "one.1"), ("two.3", "two.3")])
    assert [(pair.teacher, pair.student, len(pair.kept)) for pair in plan.pairs] == [
        ("one.1", "one.1", 2),
        ("two.3", "two.3", 2),
    ]


def test_layers_that_all_look_at_one_place_are_blocks_each() -> None:
    """Where nothing mixes positions, every layer with weights is a block: shared layers of point clouds, columns and histories."""

    def chain(width: int) -> nn.Module:
        layers = [
            nn.Sequential(nn.Conv2d(width if k else 3, width, 1), nn.BatchNorm2d(width), nn.ReLU()) for k in range(3)
        ]
        return nn.Sequential(*(layer for block in layers for layer in block), nn.Flatten(), nn.Linear(16 * width, 5))

    plan = align(chain(4), chain(2), example_inputs=torch.randn(2, 3, 4, 4), every_block=True)
    assert [(pair.teacher, pair.student) for pair in plan.pairs] == [("2", "2"), ("5", "5"), ("8", "8")]


class WideAndDeep(nn.Module):
    """Columns through a deep chain, which does nearly all work, beside a linear layer: its inside is the network."""

    def __init__(self, width: int):
        super().__init__()
        self.wide = nn.Linear(20, 1)
        self.deep = nn.Sequential(
            nn.Linear(20, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.deep(x)  # type: ignore[no-any-return]


def test_a_chain_beside_which_hardly_anything_is_done_is_paired() -> None:
    plan = align(WideAndDeep(32), WideAndDeep(16), example_inputs=torch.randn(4, 20))
    assert [(pair.teacher, pair.student, len(pair.kept)) for pair in plan.pairs] == [
        ("deep.1", "deep.1", 32),
        ("deep.3", "deep.3", 16),
    ]


class Sound(nn.Module):
    """A spectrogram in the model, brought to bands by a fixed matrix, then convolutions in one dimension."""

    window: Tensor
    bands: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.register_buffer("bands", torch.rand(9, 4))
        self.one = nn.Sequential(nn.Conv1d(4, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU())
        self.two = nn.Sequential(nn.Conv1d(width, 2 * width, 3, 2, 1), nn.BatchNorm1d(2 * width), nn.ReLU())
        self.classes = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 16, 8, window=self.window, return_complex=True).abs()
        bands = (spectrum.transpose(1, 2) @ self.bands).transpose(1, 2)
        return self.classes(self.two(self.one(bands.log1p())).mean(-1))


def test_a_spectrogram_is_no_layer_to_be_paired() -> None:
    """It has no axis of channels, which was a ValueError."""
    teacher, student = (trace(seeded(Sound, width), torch.randn(3, 64)) for width in (8, 4))
    assert names(match(teacher, student).value) == both("one", "two")
