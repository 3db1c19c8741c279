"""Networks inside a sum, necks and pyramids in either mode, blocks of several dilations: what is found, and what goes with what."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill_fx.errors import MatchError
from indistill_fx.passes.align import align
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pairing.match import match
from indistill_fx.passes.structure.stages import stages
from indistill_fx.traced import TracedModel
from tests.nets import images, unsettle


def conv(cin: int, cout: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(cout), nn.ReLU()
    )


def exits(model: TracedModel) -> list[str]:
    return [model.tap_name(stage.exit.output) for stage in stages(model)]


class Denoiser(nn.Module):
    """The noise is learned and taken off: x - net(x)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, 3, 3, 1, 1)
        self.body = nn.ModuleList(conv(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x).relu()
        for layer in self.body:
            y = layer(y)
        return x - self.leave(y)


class Restorer(nn.Module):
    """Residual blocks inside one long sum, then upsampling."""

    def __init__(self, blocks: int, width: int):
        super().__init__()
        self.head, self.tail = (nn.Conv2d(cin, width, 3, 1, 1) for cin in (3, width))
        self.body = nn.ModuleList(
            nn.Sequential(conv(width, width), nn.Conv2d(width, width, 3, 1, 1)) for _ in range(blocks)
        )
        self.marks = nn.ModuleList(nn.Identity() for _ in range(blocks))
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2))
        self.out = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.head(x)
        for block, mark in zip(self.body, self.marks, strict=True):
            x = mark(x + block(x))
        return self.out(self.up(self.tail(x) + first))


def test_a_network_inside_one_difference_shows_its_blocks() -> None:
    plan = align(Denoiser(8, 10), Denoiser(4, 5), example_inputs=images())
    assert [(pair.teacher, pair.student) for pair in plan.pairs][-2:] == [("body.7", "body.3"), ("body.9", "body.4")]


def test_residual_blocks_inside_one_long_sum_are_spread_by_themselves() -> None:
    models = trace(Restorer(8, 8), images()), trace(Restorer(4, 4), images(), role="student")
    found = [
        tuple(models[k].node(tap).name for k, tap in enumerate((pair.teacher, pair.student)))
        for pair in match(*models).value
    ]
    nodes = [[f"add_{k}" if k else "add" for k in some] for some in ((1, 3, 5, 7, 8), (0, 1, 2, 3, 4))]
    up = [model.node("up.0").name for model in models]
    assert found == [*zip(*nodes, strict=True), tuple(up)]


class Detector(nn.Module):
    """A pyramid's levels: as maps in train mode, flattened and joined in eval mode."""

    def __init__(self, width: int, *, upwards: bool = True):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.upwards = upwards
        self.stem = conv(3, width)
        self.down = nn.ModuleList(conv(widths[max(k - 1, 0)], cout, 2) for k, cout in enumerate(widths))
        self.inner = nn.ModuleList(nn.Conv2d(cin, width, 1) for cin in widths)
        self.outer = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in widths)
        self.head = nn.Conv2d(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x, levels = self.stem(x), []
        for stage in self.down:
            x = stage(x)
            levels.append(x)
        tops = [self.inner[2](levels[2])]
        for k in (1, 0):
            tops.append(self.inner[k](levels[k]) + F.interpolate(tops[-1], scale_factor=2.0))
        order = (2, 1, 0) if self.upwards else (0, 1, 2)
        maps = [self.head(self.outer[k](tops[2 - k]).relu()) for k in order]
        if self.training:
            return maps
        return torch.cat([one.flatten(2).permute(0, 2, 1) for one in maps], 1)


@pytest.mark.parametrize("training", [True, False])
def test_a_neck_is_found_in_either_mode(training: bool) -> None:
    module = unsettle(Detector(8)).train(training)
    model = trace(module, images(size=32), role="student" if training else "teacher")
    outputs = [stage for stage in stages(model) if stage.is_output]
    assert sorted(model.facts[stage.exit.output].space for stage in outputs) == [(4, 4), (8, 8), (16, 16)]


def test_levels_of_pyramids_go_together_by_their_stride() -> None:
    models = Detector(8), Detector(4, upwards=False)
    plan = align(*models, example_inputs=images(size=32))
    sizes = [(pair.teacher_shape[2:], pair.student_shape[2:]) for pair in plan.pairs]
    assert all(one == other for one, other in sizes)
    assert sorted(one for one, _ in sizes if one[0] <= 16)[:2] == [(4, 4), (4, 4)]
    reversed_plan = align(models[1], models[0], example_inputs=images(size=32))
    assert all(pair.teacher_shape[2:] == pair.student_shape[2:] for pair in reversed_plan.pairs)


class Dilated(nn.Module):
    """Convolutions of several dilations over a squeezed map; norm and activation end the block."""

    def __init__(self, cin: int, cout: int, stride: int = 1):
        super().__init__()
        self.reduce = nn.Conv2d(cin, cout // 4, 3, stride, 1, bias=False)
        self.parts = nn.ModuleList(nn.Conv2d(cout // 4, cout // 4, 3, 1, d, d, bias=False) for d in (1, 2, 4, 8))
        self.norm, self.act, self.adds = nn.BatchNorm2d(cout), nn.PReLU(cout), cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        y = torch.cat([part(y) for part in self.parts], 1)
        return self.act(self.norm(x + y if self.adds else y))  # type: ignore[no-any-return]


def test_a_block_of_several_dilations_is_not_cut_and_ends_with_its_norm_and_activation() -> None:
    layers = [conv(3, 8, 2), Dilated(8, 16, 2), Dilated(16, 32, 2), Dilated(32, 32), Dilated(32, 32)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
    assert exits(trace(unsettle(nn.Sequential(*layers, *head)), images(size=32))) == ["1", "4"]


def test_identities_do_not_name_a_blocks_end() -> None:
    class Padded(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.padding, self.conv = nn.Identity(), nn.Conv2d(width, width, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(self.padding(x)).relu()

    blocks = [nn.Sequential(conv(cin, cout, 2), Padded(cout), Padded(cout)) for cin, cout in ((3, 8), (8, 16))]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    assert exits(trace(unsettle(model), images())) == ["0", "1"]
    plan = align(model, copy.deepcopy(model), example_inputs=images())
    assert not [pair for pair in plan.pairs if "padding" in pair.teacher + pair.student]


class OfLists(nn.Module):
    """Takes a list of two pictures."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = conv(3, width, 2), conv(width, 2 * width, 2)
        self.fc = nn.Linear(2 * width, 3)

    def forward(self, views: list[Tensor]) -> Tensor:
        return self.fc(self.two(self.one(views[0]) + self.one(views[1])).mean((2, 3)))  # type: ignore[no-any-return]


def test_models_of_lists_of_tensors_are_paired() -> None:
    plan = align(OfLists(8), OfLists(4), example_inputs=([images(), images(seed=1)],))
    assert [(pair.teacher_shape, pair.student_shape) for pair in plan.pairs] == [
        ((2, 8, 8, 8), (2, 4, 8, 8)),
        ((2, 16, 4, 4), (2, 8, 4, 4)),
    ]
    assert [len(pair.kept) for pair in plan.pairs] == [4, 8]


def test_the_message_for_no_pairs_is_true() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    with pytest.raises(
        MatchError, match=r"No stages were found in the teacher and in the student, so nothing"
    ) as error:
        align(flat, copy.deepcopy(flat), example_inputs=images())
    assert "--pair TEACHER_LAYER=STUDENT_LAYER" in str(error.value)
