"""Losses that compare feature maps (batch, channels, *space): at, fitnet, vid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.losses.base import EMBEDDING, MainLoss, Outputs, require_pair, same_shape, unfit_shape

Shapes = Mapping[str, tuple[int, ...]]

_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class ATLoss(MainLoss):
    """Attention transfer: the sum of `attention_loss` over all pairs.

    Args:
        power: p.
        weight: of the sum.
        weight_labels: of the cross-entropy.
    """

    needs: frozenset[str] = frozenset({"features"})

    def __init__(self, *, power: float = 2.0, weight: float = 1000.0, weight_labels: float = 1.0):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.power = power

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        losses = [attention_loss(f, teacher.features[name], power=self.power) for name, f in student.features.items()]
        return torch.stack(losses).sum()


class MapLoss(MainLoss):
    """A loss on pairs of feature maps, with layers of its own that are made for their shapes."""

    needs: frozenset[str] = frozenset({"features"})
    needs_shapes: bool = True


class FitNetLoss(MapLoss):
    """Hint regression: mean squared error between r(f_s) and f_t at one pair.

    r: a convolution that brings the student's width and resolution to the teacher's (3x3 stride 2 if twice as large,
    4x4 transposed stride 2 if half as large, else a valid one of size 1 + s - t), batch norm, ReLU. r trains with the
    student.

    Args:
        student_shapes: pair name -> shape (batch, channels, height, width).
        teacher_shapes: the same names.
        hint: the pair compared; by default the one in the middle (RepDistiller's hint 2 of stem and three stages).
        relu: end r with a ReLU, as for a teacher's tap after one.
        weight: of the term.
        weight_labels: of the cross-entropy.

    Raises:
        ConfigError: no such pair, not maps, or a resolution the regressor cannot reach.

    Source:
        Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550; regressor and weight 100 by RepDistiller.
    """

    def __init__(
        self,
        student_shapes: Shapes,
        teacher_shapes: Shapes,
        *,
        hint: str | None = None,
        relu: bool = True,
        weight: float = 100.0,
        weight_labels: float = 1.0,
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        names = map_names(student_shapes, teacher_shapes, "fitnet")
        self.hint = names[len(names) // 2] if hint is None else hint
        require_pair(self.hint, names)
        regressor = _convolution(self.hint, student_shapes[self.hint], teacher_shapes[self.hint])
        norm = nn.BatchNorm2d(teacher_shapes[self.hint][1])
        self.regressor = nn.Sequential(regressor, norm, nn.ReLU() if relu else nn.Identity())

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        regressed = self.regressor(student.features[self.hint])
        same_shape(regressed, teacher.features[self.hint], "fitnet")
        return F.mse_loss(regressed, teacher.features[self.hint])


class VIDLoss(MapLoss):
    """Variational information: over pairs, the sum of mean(0.5 * ((m(f_s) - f_t)^2 / v + log v)).

    m: three 1x1 convolutions without bias, ReLU between, the teacher's width throughout; v = softplus(a) + 1e-5, one a
    per teacher channel. m and a train with the student. The larger map is average-pooled to the smaller.

    Args:
        student_shapes: pair name -> shape (batch, channels, height, width).
        teacher_shapes: the same names.
        initial_variance: v at the start.
        weight: of the sum.
        weight_labels: of the cross-entropy.

    Raises:
        ConfigError: there are no pairs, or they are not maps.

    Source:
        Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019,
        arXiv:1904.05835; form and weight 1 by RepDistiller.
    """

    def __init__(
        self,
        student_shapes: Shapes,
        teacher_shapes: Shapes,
        *,
        initial_variance: float = 5.0,
        weight: float = 1.0,
        weight_labels: float = 1.0,
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.names = map_names(student_shapes, teacher_shapes, "vid")
        widths = [(student_shapes[name][1], teacher_shapes[name][1]) for name in self.names]
        self.means = nn.ModuleList(_three_convolutions(s, t) for s, t in widths)
        start = math.log(math.expm1(initial_variance - 1e-5))
        self.scales = nn.ParameterList(nn.Parameter(torch.full((t,), start)) for _, t in widths)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        losses = []
        for name, mean, scale in zip(self.names, self.means, self.scales, strict=True):
            f_s, f_t = pooled_to_smaller(student.features[name], teacher.features[name])
            variance = F.softplus(scale).view(1, -1, 1, 1) + 1e-5
            losses.append((0.5 * ((mean(f_s) - f_t).square() / variance + variance.log())).mean())
        return torch.stack(losses).sum()


def attention_loss(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """mean((A(f_s) - A(f_t))^2), A(f) the flattened mean over channels of |f|^p, L2-normalised per sample.

    The larger map is average-pooled to the smaller; widths need not agree.

    Args:
        student: (batch, channels, *space).
        teacher: (batch, channels, *space).
        power: p.

    Returns:
        A scalar.

    Raises:
        ConfigError: a feature without space, whose attention would be the constant 1.

    Source:
        Zagoruyko, Komodakis, "Paying More Attention to Attention", arXiv:1612.03928; RepDistiller's form. Deviation:
        height and width are each brought to the smaller of the two (there only heights are compared).
    """
    if min(student.ndim, teacher.ndim) < 3:
        raise unfit_shape(
            "at",
            "compares attention over space, but a feature is a vector",
            student,
            "(batch, channels, *space)",
            "Pair feature maps, or use pkt or mse for vectors.",
        )
    maps = pooled_to_smaller(student, teacher)
    a_s, a_t = (F.normalize(f.abs().pow(power).mean(1).flatten(1), dim=1) for f in maps)
    return F.mse_loss(a_s, a_t)


def pooled_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps, adaptively average-pooled to the smaller size along each axis of space."""
    if a.ndim != b.ndim or a.ndim - 2 not in _POOLS:
        raise ConfigError(
            f"Features of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared.",
            where="space",
            expected="(batch, channels, *space) with 1 to 3 axes of space",
            hint="Take a loss that compares any shapes, such as pkt, or pair two maps.",
        )
    size = [min(n, m) for n, m in zip(a.shape[2:], b.shape[2:], strict=True)]
    return _pooled(a, size), _pooled(b, size)


def _pooled(f: Tensor, size: list[int]) -> Tensor:
    return f if list(f.shape[2:]) == size else _POOLS[len(size)](f, size)


def map_names(student_shapes: Shapes, teacher_shapes: Shapes, loss: str) -> list[str]:
    """The names of the pairs, shallow to deep.

    Raises:
        ConfigError: there are none, or one is not a pair of maps (batch, channels, height, width).
    """
    names = [name for name in student_shapes if name != EMBEDDING]
    bad = [n for n in names if not len(student_shapes[n]) == len(teacher_shapes.get(n, ())) == 4]
    if bad or not names:
        found = f"{bad[0]!r} is none" if bad else "there are no pairs"
        raise ConfigError(
            f"{loss} regresses maps (batch, channels, height, width), but {found}.",
            where=bad[0] if bad else loss,
            got=student_shapes.get(bad[0]) if bad else None,
            hint="Leave that pair out of the plan, or use at, pkt or kd.",
        )
    return names


def _convolution(name: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    (_, s_width, *s), (_, t_width, *t) = student, teacher
    if s == [2 * n for n in t]:
        return nn.Conv2d(s_width, t_width, 3, stride=2, padding=1)
    if t == [2 * n for n in s]:
        return nn.ConvTranspose2d(s_width, t_width, 4, stride=2, padding=1)
    if all(n >= m for n, m in zip(s, t, strict=True)):
        return nn.Conv2d(s_width, t_width, (1 + s[0] - t[0], 1 + s[1] - t[1]))
    raise ConfigError(
        f"fitnet cannot bring the student's {s[0]}x{s[1]} at {name!r} to the teacher's {t[0]}x{t[1]}.",
        where=name,
        got=tuple(s),
        expected=f"at least {t[0]}x{t[1]}, or exactly half",
        hint="Choose another pair by `hint`, or use vid or at, which pool.",
    )


def _three_convolutions(width: int, target: int) -> nn.Module:
    def convolution(n: int) -> nn.Module:
        return nn.Conv2d(n, target, 1, bias=False)

    return nn.Sequential(convolution(width), nn.ReLU(), convolution(target), nn.ReLU(), convolution(target))
