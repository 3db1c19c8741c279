"""The main path: which tensors hold all the information, which of them end blocks and stages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pairing.match import match
from indistill_fx.passes.structure.dominators import information_flow
from indistill_fx.passes.structure.stages import main_path, stages
from indistill_fx.traced import TracedModel


def conv(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(cin, cout, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(cout), nn.ReLU())


def head(cin: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 5)]


class Residual(nn.Module):
    """A residual block around any branch."""

    def __init__(self, branch: nn.Module, after: nn.Module | None = None):
        super().__init__()
        self.branch, self.after = branch, after or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.branch(x))


def traced(*layers: nn.Module, size: int = 32) -> TracedModel:
    return trace(nn.Sequential(*layers), torch.randn(2, 3, size, size))


def exits(model: TracedModel) -> list[str]:
    return [model.tap_name(stage.exit.output) for stage in stages(model)]


def test_every_path_goes_through_the_main_path() -> None:
    model = traced(conv(3, 8), Residual(conv(8, 8)), conv(8, 16, stride=2), Residual(conv(16, 16)), *head(16))
    names = [node.tap for node in main_path(model)]
    assert names == [":input", "0.0", "0.1", "0", "1:add", "1", "2.0", "2.1", "2", "3:add", "3", "4", "5", "6"]
    assert not any(name.startswith(("1.branch", "3.branch")) for name in names)


def test_depth_grows_to_one_and_levels_count_halvings() -> None:
    model = traced(conv(3, 8), Residual(conv(8, 8)), conv(8, 16, stride=2), Residual(conv(16, 16)), *head(16))
    nodes = main_path(model)
    depths = [node.depth for node in nodes]
    assert depths == sorted(depths)
    assert depths[0] == 0
    assert depths[-1] == 1
    assert {node.tap: node.level for node in nodes}["1"] == 0
    assert {node.tap: node.level for node in nodes}["3"] == 1
    assert {node.tap: node.level for node in nodes}["6"] is None


def test_exits_are_marked_and_stages_numbered() -> None:
    model = traced(
        conv(3, 8), Residual(conv(8, 8)), Residual(conv(8, 8)), conv(8, 16, stride=2), Residual(conv(16, 16)), *head(16)
    )
    nodes = {node.tap: node for node in main_path(model)}
    assert [tap for tap, node in nodes.items() if node.is_stage_exit] == ["2", "4"]
    assert [tap for tap, node in nodes.items() if node.is_block_exit and not node.is_stage_exit] == ["0", "1", "3"]
    assert [nodes[tap].stage for tap in ("0", "2", "3", "4", "7")] == [0, 0, 1, 1, None]


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (torchvision.models.resnet18, {}, ["layer1", "layer2", "layer3", "layer4"]),
        (torchvision.models.densenet121, {}, [f"features.denseblock{k}" for k in (1, 2, 3, 4)]),
        (torchvision.models.mobilenet_v2, {}, [f"features.{k}" for k in (3, 6, 13, 17)]),
        (torchvision.models.googlenet, {"init_weights": False}, ["conv3", "inception3b", "inception4e", "inception5b"]),
    ],
)
def test_zoo_models_have_the_stages_that_people_name(
    make: Callable[..., nn.Module], options: dict[str, bool], expected: list[str]
) -> None:
    assert exits(trace(make(weights=None, **options), torch.randn(1, 3, 64, 64))) == expected


def test_a_shape_or_a_mask_is_no_path_of_information() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.one, self.two, self.out = (
                nn.Embedding(9, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 3),
            )

        def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
            mask = (ids == 0)[:, :, None]
            x = self.embed(ids)
            x = x + self.one(x).masked_fill(mask, 0.0) * keep[:, :, None]
            x = x + self.two(x).masked_fill(mask, 0.0).reshape(x.size(0), x.size(1), -1) * keep[:, :, None]
            return self.out(x[:, 0])

    model = trace(Masked(), (torch.randint(1, 9, (2, 6)), torch.ones(2, 6)))
    flow = information_flow(model)
    assert flow.main_path[0] == "ids"
    assert [name for name in flow.main_path if name.startswith("add")] == ["add", "add_1"]


def test_the_activation_after_a_sum_belongs_to_the_block_and_the_norm_before_the_next_does_not() -> None:
    after = traced(conv(3, 8), Residual(conv(8, 8)), Residual(conv(8, 8)), *head(8))
    branch = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    before = traced(
        conv(3, 8), *(Residual(branch, nn.Identity()) for _ in range(2)), nn.BatchNorm2d(8), nn.ReLU(), *head(8)
    )
    assert exits(after) == ["2"]
    (stage,) = stages(before)
    assert stage.exit.output == stage.exit.start
    assert before.tap_name(stage.exit.output) == "2:add"
    assert before.tap_name(stage.exit.pre_activation) == "3"


def test_three_kinds_of_tap_of_a_residual_block() -> None:
    model = traced(conv(3, 8), Residual(conv(8, 8)), *head(8))
    (stage,) = stages(model)
    block = stage.exit
    assert [model.tap_name(name) for name in (block.output, block.pre_activation, block.last_conv)] == [
        "1",
        "1:add",
        "1.branch.0",
    ]


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_block_ends_after_its_mlp_and_after_the_norm_only_if_it_norms_sums(norm_first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 8, 8)
            layers = (
                nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True, norm_first=norm_first) for _ in range(3)
            )
            self.blocks, self.norm, self.head = nn.ModuleList(layers), nn.LayerNorm(16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    model = trace(Encoder(), torch.randn(2, 3, 32, 32), role="student")
    (stage,) = stages(model)
    assert [model.aliases[block.output][0] for block in stage.blocks] == ["blocks.0", "blocks.1", "blocks.2"]


def test_pooling_closes_a_block_only_where_every_block_has_it() -> None:
    def chain(*pools: bool) -> TracedModel:
        layers: list[nn.Module] = []
        for k, pool in enumerate(pools):
            layers += [conv(8 if k else 3, 8), *([nn.MaxPool2d(2)] if pool else [])]
        return traced(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))

    assert exits(chain(True, True, True)) == ["1", "3", "5"]
    assert exits(chain(True, True, False)) == ["0", "2", "4"]


def test_a_last_run_of_twice_the_units_is_two_stages() -> None:
    layers = [conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 8), conv(8, 8), nn.MaxPool2d(2)]
    model = traced(*layers, *(conv(8, 8) for _ in range(4)), *head(8))
    assert exits(model) == ["1", "4", "7", "9"]
    assert exits(traced(*layers, *(conv(8, 8) for _ in range(3)), *head(8))) == ["1", "4", "8"]


def test_a_separable_block_ends_with_its_pointwise_convolution_and_the_head_is_no_block() -> None:
    def bottleneck(cin: int, cout: int, stride: int) -> nn.Sequential:
        project = nn.Sequential(nn.Conv2d(32, cout, 1, bias=False), nn.BatchNorm2d(cout))
        return nn.Sequential(conv(cin, 32, 1), conv(32, 32, 3, stride, groups=32), project)

    model = traced(
        conv(3, 8, stride=2),
        bottleneck(8, 8, 1),
        Residual(bottleneck(8, 8, 1), nn.Identity()),
        bottleneck(8, 16, 2),
        conv(16, 64, 1),
        *head(64),
    )
    assert exits(model) == ["2:add", "3"]


def test_where_width_and_dilation_change_a_stage_ends() -> None:
    def net(dilation: int) -> TracedModel:
        wide = [Residual(conv(16, 16, dilation=dilation)) for _ in range(2)]
        return traced(conv(3, 8), Residual(conv(8, 8)), Residual(conv(8, 8)), conv(8, 16), *wide, *head(16))

    assert exits(net(2)) == ["2", "5"]
    assert exits(net(1)) == ["5"]


def test_a_pointwise_unit_that_fuses_a_concatenation_ends_the_block_and_a_squeeze_does_not() -> None:
    class Joined(nn.Module):
        def __init__(self, fused: int):
            super().__init__()
            self.one, self.two, self.fuse = conv(8, 8), conv(8, 16), conv(24, fused, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fuse(torch.cat([self.one(x), self.two(x)], 1))

    assert exits(traced(conv(3, 8), Joined(8), conv(8, 8, stride=2), Residual(conv(8, 8)), *head(8))) == ["1", "3"]
    assert exits(traced(conv(3, 8), Joined(3), conv(3, 8, stride=2), Residual(conv(8, 8)), *head(8))) == ["1:cat", "3"]


def test_a_norm_written_out_is_a_norm() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)

    branch = nn.Sequential(Written(), nn.Conv2d(8, 8, 3, padding=1))
    layers = [Residual(branch, nn.Identity()), Residual(branch, nn.Identity()), Written(), nn.Conv2d(8, 8, 2, 2)]
    assert exits(traced(conv(3, 8), *layers, Residual(branch, nn.Identity()), *head(8))) == ["2:add", "5:add"]


def test_pooling_is_work_enough_for_a_token_mixer() -> None:
    mixer, mlp = nn.AvgPool2d(3, 1, 1), nn.Sequential(conv(8, 16, 1), nn.Conv2d(16, 8, 1))
    blocks = [Residual(part, nn.Identity()) for _ in range(3) for part in (mixer, mlp)]
    (stage,) = stages(traced(conv(3, 8, stride=2), *blocks, *head(8)))
    assert [block.start for block in stage.blocks] == ["add_1", "add_3", "add_5"]


class Pyramid(nn.Module):
    """Three levels down, and back up with lateral sums."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 16, 32]
        self.stem = conv(3, 8)
        self.down = nn.ModuleList(
            nn.Sequential(conv(widths[max(k - 1, 0)], width, stride=2), Residual(conv(width, width)))
            for k, width in enumerate(widths)
        )
        self.inner = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in widths)
        self.outer = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, levels = self.stem(x), []
        for stage in self.down:
            x = stage(x)
            levels.append(x)
        top = self.inner[2](levels[2])
        found = {"2": self.outer[2](top)}
        for k in (1, 0):
            top = self.inner[k](levels[k]) + F.interpolate(top, scale_factor=2.0)
            found[str(k)] = self.outer[k](top)
        found["pool"] = F.max_pool2d(found["2"], 1, 2)
        return found


def test_a_pyramids_outputs_are_stages_of_their_own() -> None:
    model = trace(Pyramid(), torch.randn(2, 3, 32, 32))
    found = stages(model)
    assert [(model.tap_name(stage.exit.output), stage.is_output) for stage in found] == [
        ("down.0", False),
        ("down.1", False),
        ("down.2", False),
        ("outer.2", True),
        ("outer.1", True),
        ("outer.0", True),
    ]


def test_further_outputs_behind_a_pyramids_last_one_are_no_stages_of_the_main_path() -> None:
    class Retina(Pyramid):
        def __init__(self) -> None:
            super().__init__()
            self.p6, self.p7 = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = super().forward(x)
            del found["pool"]
            found["6"] = self.p6(found["2"])
            return {**found, "7": self.p7(found["6"].relu())}

    found = stages(model := trace(Retina(), torch.randn(2, 3, 64, 64)))
    on_path, outputs = ([s for s in found if s.is_output is which] for which in (False, True))
    assert [model.tap_name(stage.exit.output) for stage in on_path] == ["down.0", "down.1", "down.2"]
    assert {model.tap_name(stage.exit.output) for stage in outputs} == {"outer.0", "outer.1", "outer.2", "p6", "p7"}


def test_an_activation_before_the_next_block_is_not_part_of_a_network_of_pre_activations() -> None:
    class Early(nn.Module):
        def __init__(self, cin: int, cout: int, stride: int):
            super().__init__()
            self.first, self.second = nn.Conv2d(cin, cout, 3, stride, 1), nn.Conv2d(cout, cout, 3, 1, 1)
            self.shortcut = nn.Conv2d(cin, cout, 1, stride) if stride > 1 else None

        def forward(self, x: Tensor) -> Tensor:
            active = F.relu(x) * 1.7
            branch = self.second(F.relu(self.first(active)))
            return branch + (x if self.shortcut is None else self.shortcut(active))

    blocks = [
        Early(8, 16, 2),
        *(Early(16, 16, 1) for _ in range(2)),
        Early(16, 32, 2),
        *(Early(32, 32, 1) for _ in range(2)),
    ]
    model = traced(conv(3, 8), *blocks, nn.ReLU(), *head(32))
    assert exits(model) == ["3", "6"]
    assert [model.tap_name(stage.exit.output) for stage in stages(traced(conv(3, 8), *blocks, *head(32)))] == ["3", "6"]


def test_a_channel_shuffle_behind_a_concatenation_ends_the_block() -> None:
    class Shuffled(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.branch = conv(width // 2, width // 2)

        def forward(self, x: Tensor) -> Tensor:
            keep, change = x.chunk(2, 1)
            x = torch.cat([keep, self.branch(change)], 1)
            n, c, h, w = x.shape
            return x.view(n, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)

    model = traced(conv(3, 8), conv(8, 8, stride=2), Shuffled(8), Shuffled(8), *head(8))
    assert exits(model) == ["3"]
    assert (model.facts_of("3").kind, model.facts_of("3").channel_axis) == ("map", 1)
    assert model.facts_of("3:view").channel_axis is None


def test_windows_are_a_map_again_where_the_block_ends() -> None:
    class Windowed(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.mix, self.norm = nn.MultiheadAttention(width, 2, batch_first=True), nn.LayerNorm(width)
            self.mlp = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
            y = self.norm(x)
            x = x + self.mix(y, y, y, need_weights=False)[0]
            x = x + self.mlp(x)
            return x.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)

    model = traced(conv(3, 8), conv(8, 8, stride=2), Windowed(8), Windowed(8), *head(8))
    assert exits(model) == ["3"]
    assert model.facts_of("3").shape == (2, 8, 16, 16)


def test_the_inside_of_a_u_net_is_on_the_main_path() -> None:
    class Hourglass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = conv(3, 8), conv(8, 16), conv(16, 32)
            self.up_two, self.up_one = conv(48, 16), conv(24, 8)
            self.out = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            one = self.one(x)
            two = self.two(F.max_pool2d(one, 2))
            three = self.three(F.max_pool2d(two, 2))
            back = self.up_two(torch.cat([two, F.interpolate(three, scale_factor=2.0)], 1))
            return self.out(self.up_one(torch.cat([one, F.interpolate(back, scale_factor=2.0)], 1)))

    model = trace(Hourglass(), torch.randn(2, 3, 32, 32))
    assert exits(model) == ["one", "two", "three", "up_two", "up_one"]


class Head(nn.Module):
    """A convolution over the whole map, and one on what is left: a classifier written with convolutions."""

    def __init__(self, cin: int, side: int):
        super().__init__()
        self.whole, self.after = nn.Conv2d(cin, 12, side), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.whole(x).relu()).flatten(1)


@pytest.mark.parametrize("size", [64, 32])
def test_a_stage_may_be_left_with_one_position_and_a_summary_is_no_stage(size: int) -> None:
    model = traced(
        *(conv(a, b, stride=2) for a, b in ((3, 4), (4, 6), (6, 8), (8, 10), (10, 12))), *head(12), size=size
    )
    assert [stage.exit.output for stage in stages(model)] == ["_0_2", "_1_2", "_2_2", "_3_2", "_4_2"]
    model = traced(
        *(conv(a, b, stride=2) for a, b in ((3, 4), (4, 6), (6, 8), (8, 10))), Head(10, size // 16), size=size
    )
    assert [stage.exit.output for stage in stages(model)] == ["_0_2", "_1_2", "_2_2", "_3_2"]


def test_resnet_18_has_four_stages_on_small_images_too() -> None:
    model = trace(torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 32, 32))
    assert [model.tap_name(stage.exit.output) for stage in stages(model)] == ["layer1", "layer2", "layer3", "layer4"]


NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.max(2).values,
    "min, by place": lambda x: torch.min(x, dim=2)[0],
    "sort": lambda x: x.sort(2).values[:, :, 0],
    "topk": lambda x: x.topk(3, 2).values.mean(2),
    "median": lambda x: x.median(2).values,
    "kthvalue": lambda x: torch.kthvalue(x, 2, 2).values,
    "cummax": lambda x: x.cummax(2).values.mean(2),
}


class Named(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]):
        super().__init__()
        self.way, self.fc = way, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.way(x.flatten(2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMED)
def test_the_path_goes_through_results_that_have_names(name: str) -> None:
    model = traced(conv(3, 4, stride=2), conv(4, 8, stride=2), Named(NAMED[name]), size=16)
    assert [stage.exit.output for stage in stages(model)] == ["_0_2", "_1_2"]


def causal(width: int) -> nn.Module:
    """Three residual blocks of dilated convolutions, and back to the channels of the series."""

    class Block(nn.Module):
        def __init__(self, channels: int, dilation: int) -> None:
            super().__init__()
            self.conv = nn.Conv1d(channels, width, 3, padding=dilation, dilation=dilation)
            self.norm = nn.BatchNorm1d(width)
            self.skip = nn.Conv1d(channels, width, 1) if channels != width else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)) + self.skip(x))

    return nn.Sequential(Block(3, 1), Block(width, 2), Block(width, 4), nn.Conv1d(width, 3, 1))


class Scaled(nn.Module):
    """A forecaster that normalises its series and puts their scale back (RevIN, Kim et al., ICLR 2022)."""

    def __init__(self, width: int, deviation: bool) -> None:
        super().__init__()
        self.body, self.deviation = causal(width), deviation
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        if not self.deviation:
            return self.body((x - mean).transpose(1, 2)).transpose(1, 2) + mean  # type: ignore[no-any-return]
        deviation = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
        x = (x - mean) / deviation * self.weight + self.bias
        y = self.body(x.transpose(1, 2)).transpose(1, 2)
        return (y - self.bias) / self.weight * deviation + mean  # type: ignore[no-any-return]


@pytest.mark.parametrize("deviation", [False, True])
def test_forecasters_that_put_the_scale_back_have_blocks(deviation: bool) -> None:
    x = torch.randn(2, 24, 3)
    teacher = ifx.trace(Scaled(16, deviation).eval(), x)
    student = ifx.trace(Scaled(8, deviation).eval(), x, role="student")
    pairs = match(teacher, student, every_block=True).value
    assert [(pair.teacher, pair.student) for pair in pairs] == [(f"body.{k}", f"body.{k}") for k in range(3)]


def test_fourier_transforms_mix_positions() -> None:
    """FNet and global filters: the layers with weights are pointwise, and the transform between them lets positions see one another."""

    class Fourier(nn.Module):
        def __init__(self, width: int, filters: bool) -> None:
            super().__init__()
            self.filters, self.stem, self.head = filters, nn.Linear(6, width), nn.Linear(width, 5)
            self.scale = nn.ParameterList(torch.randn(7, width, 2) for _ in range(3))
            self.mlps = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
                for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for mlp, scale in zip(self.mlps, self.scale, strict=True):
                if self.filters:
                    spectrum = torch.fft.rfft(x, dim=1) * torch.view_as_complex(scale)
                    x = x + mlp(torch.fft.irfft(spectrum, n=x.shape[1], dim=1))
                else:
                    x = x + torch.fft.fftn(x, dim=(1, 2)).real
                    x = x + mlp(x)
            return self.head(x.mean(1))  # type: ignore[no-any-return]

    for filters in (False, True):
        small, large = (trace(Fourier(width, filters).eval(), torch.randn(2, 12, 6)) for width in (8, 16))
        assert len(match(large, small, every_block=True).value) == 3, filters
