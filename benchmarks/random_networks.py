"""Random networks from a seed: what people write, put together as nobody would.

A network is a stem, two or three stages of random blocks, and a head. Blocks are residual, concatenating, grouped,
depthwise, shared, in place, gated, attending (three spellings), channels last, reshaping, shuffling, splitting,
upsampling, functional, recurrent, deformed; they read sizes from tensors, hand on lists of parts, ask for the mode, put the length first,
write slices, look for maxima, compute over channels, take them by places, step cells, or have weight norms, spectral norms and masks.
Batch norms and layer scales hold random values, so that no check passes on zeros and ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from later_blocks import LAST_BLOCKS, LATER_BLOCKS, LATER_USES, add_parts
from random_blocks import MORE_BLOCKS, MORE_USES
from torch import Tensor, nn
from torchvision.ops import DeformConv2d


@dataclass(frozen=True)
class Recipe:
    """What a network is made of; two networks of one family share the kinds and differ in width and depth."""

    seed: int
    stem: str
    head: str
    widths: tuple[int, ...]
    downs: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    size: tuple[int, int] = (16, 16)
    control: bool = field(default=False)
    inner: str = field(default="")


class Block(nn.Module):
    """A map of some width in, one of the same width and size out."""

    def __init__(self, kind: str, width: int, dice: random.Random):
        super().__init__()
        self.kind, w = kind, width
        self.heads = dice.choice((1, 2))
        self.groups = dice.choice([n for n in (1, 2, 4) if w % n == 0])
        hidden = dice.choice((w, 2 * w, w + 2 * self.groups))
        hidden -= hidden % self.groups
        self.conv = nn.Conv2d(
            w, w, 3, padding=1, groups=self.groups if "grouped" in kind else 1, bias=dice.random() < 0.5
        )
        self.norm = _norm(dice.choice(("batch", "batch", "group", "instance")), w)
        self.act = dice.choice((nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish))()
        self.inplace = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1)
        self.expand, self.squeeze = nn.Conv2d(w, hidden, 1), nn.Conv2d(hidden, w, 1)
        self.middle = nn.Conv2d(hidden, hidden, 3, padding=1, groups=dice.choice((hidden, self.groups)))
        self.middle_norm = _norm("batch", hidden)
        self.join = nn.Conv2d(2 * w, w, 1)
        self.lower = nn.Conv2d(w, max(w // 4, 1), 1)
        self.raise_ = nn.Conv2d(max(w // 4, 1), w, 1)
        self.layer_norm = nn.LayerNorm(w)
        self.up, self.down = nn.Linear(w, hidden), nn.Linear(hidden, w)
        self.qkv, self.proj = nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.attention = nn.MultiheadAttention(w, self.heads, batch_first=True)
        self.scale = nn.Parameter(torch.rand(w, 1, 1) + 0.5)
        self.weight = nn.Parameter(torch.randn(w, w, 3, 3) / (3 * w**0.5))
        self.deconv = nn.ConvTranspose2d(w, w, 2, stride=2)
        self.factor = nn.Parameter(torch.rand(w) + 0.5)
        self.offset, self.deform = nn.Conv2d(w, 18, 3, padding=1), DeformConv2d(w, w, 3, padding=1)
        self.gru, self.lstm = nn.GRU(w, hidden, batch_first=True), nn.LSTM(w, hidden)
        half = w // 2
        self.part = nn.Conv2d(half, half, 3, padding=1)
        self.wide = nn.Conv2d(w, w - half, 5, padding=2)
        self.narrow = nn.Conv2d(w, half, 1)
        add_parts(self, kind, w)
        used = set(_USES[kind].split())
        for name in [name for name, _ in self.named_children() if name not in used]:
            delattr(self, name)
        for name in [name for name, _ in self.named_parameters(recurse=False) if name not in used]:
            delattr(self, name)
        if kind == "weight norm":
            nn.utils.parametrizations.weight_norm(self.conv)
        elif kind == "spectral norm":
            nn.utils.parametrizations.spectral_norm(self.conv)
        elif kind == "pruned":
            nn.utils.prune.ln_structured(self.conv, "weight", 0.5, n=1, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """What the kind says."""
        return BLOCKS[self.kind](self, x)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "group":
        norm: nn.Module = nn.GroupNorm(2 if width % 2 == 0 else 1, width)
    elif kind == "instance":
        norm = nn.InstanceNorm2d(width, affine=True)
    else:
        norm = nn.BatchNorm2d(width)
    return norm


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map_like(tokens: Tensor, x: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(x.shape)


def _residual(b: Block, x: Tensor) -> Tensor:
    return b.act(x + b.norm(b.conv(x)))


def _bottleneck(b: Block, x: Tensor) -> Tensor:
    y = b.inplace(b.middle_norm(b.middle(b.inplace(b.expand(x)))))
    y = b.squeeze(y)
    y += x
    return b.inplace(y)


def _gated(b: Block, x: Tensor) -> Tensor:
    y = b.act(b.middle_norm(b.middle(b.expand(x))))
    y = b.squeeze(y)
    gate = torch.sigmoid(b.raise_(F.relu(b.lower(F.adaptive_avg_pool2d(y, 1)))))
    return x + y * gate


def _dense(b: Block, x: Tensor) -> Tensor:
    return b.join(torch.cat([x, b.act(b.norm(b.conv(x)))], 1))


def _inception(b: Block, x: Tensor) -> Tensor:
    return b.act(torch.cat((b.wide(x), b.narrow(F.max_pool2d(x, 3, 1, 1))), dim=1))


def _split(b: Block, x: Tensor) -> Tensor:
    half = b.part.in_channels
    left, right = x[:, :half], x[:, half:]
    return torch.cat([right, b.part(left) + left], 1)


def _shuffle(b: Block, x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    y = b.conv(x).view(n, b.groups, c // b.groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
    return b.act(y)


def _shared(b: Block, x: Tensor) -> Tensor:
    y = b.act(b.conv(x))
    return b.conv(y) + y


def _in_place(b: Block, x: Tensor) -> Tensor:
    y = b.norm(b.conv(x))
    z = F.relu_(y.clone())
    y.mul_(0.5).add_(z)
    z[:, :1] = y[:, -1:]
    return b.inplace(y) + z


def _manual_attention(b: Block, x: Tensor) -> Tensor:
    tokens = b.layer_norm(_tokens(x))
    n, length, c = tokens.shape
    q, k, v = b.qkv(tokens).reshape(n, length, 3, b.heads, c // b.heads).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) * (c // b.heads) ** -0.5).softmax(dim=-1)
    return x + _map_like(b.proj((weights @ v).transpose(1, 2).reshape(n, length, c)), x)


def _fused_attention(b: Block, x: Tensor) -> Tensor:
    tokens = b.layer_norm(_tokens(x))
    n, length = tokens.shape[:2]
    q, k, v = (part.view(n, length, b.heads, -1).transpose(1, 2) for part in b.qkv(tokens).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v)
    return x + _map_like(b.proj(y.transpose(1, 2).flatten(2)), x)


def _module_attention(b: Block, x: Tensor) -> Tensor:
    tokens = b.layer_norm(_tokens(x))
    return x + _map_like(b.attention(tokens, tokens, tokens, need_weights=False)[0], x)


def _convnext(b: Block, x: Tensor) -> Tensor:
    y = b.layer_norm(b.conv(x).permute(0, 2, 3, 1))
    y = b.down(b.act(b.up(y))).permute(0, 3, 1, 2)
    return x + b.scale * y


def _mlp(b: Block, x: Tensor) -> Tensor:
    tokens = _tokens(x)
    tokens = tokens + b.drop(b.down(b.act(b.up(b.layer_norm(tokens)))))
    return _map_like(tokens, x)


def _hourglass(b: Block, x: Tensor) -> Tensor:
    return x + b.deconv(F.avg_pool2d(b.conv(x), 2))


def _functional(b: Block, x: Tensor) -> Tensor:
    return F.leaky_relu(F.conv2d(x, b.weight, padding=1) * b.scale, 0.1) + x


def _odd_view(b: Block, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = b.conv(x).reshape(n, c, h * w).unflatten(2, (h, w))
    return torch.stack([x, y], 0).sum(0)


def _einsum(b: Block, x: Tensor) -> Tensor:
    return b.act(torch.einsum("nchw,dc->ndhw", x, b.proj.weight)) + x


def _dead(b: Block, x: Tensor) -> Tensor:
    _ = b.narrow(x).mean()
    return b.act(b.conv(x))


def _swapped(b: Block, x: Tensor) -> Tensor:
    y = torch.flip(b.conv(x), [3]).roll(1, 2)
    return torch.maximum(x, y) - y.mean((2, 3), keepdim=True)


def _computed_sizes(b: Block, x: Tensor) -> Tensor:
    y = b.conv(x)
    n, c = y.size(0), y.shape[1]
    y = torch.cat([y.narrow(1, c // 2, c - c // 2), y[:, : y.size(1) // 2]], y.dim() - 3)
    y = F.group_norm(y, y.shape[1] // 2 if c % 2 == 0 else 1)
    return b.act(y).view(n, c, -1).reshape(x.shape[0], x.shape[1], *x.shape[-2:]) + x


def _parts_reversed(b: Block, x: Tensor) -> Tensor:
    return b.act(torch.cat(b.conv(x).split(x.shape[1] // 2, dim=1)[::-1], 1)) + x


def _parts_stacked(b: Block, x: Tensor) -> Tensor:
    y = torch.stack(b.conv(x).chunk(2, 1)).amax(0)
    return x + torch.cat([y, *b.conv(x).chunk(2, 1)[1:]], 1)


def _stochastic_depth(b: Block, x: Tensor) -> Tensor:
    y = b.act(b.conv(x))
    if not b.training:
        return x + y
    mask = y.new_empty((y.shape[0],) + (1,) * (y.ndim - 1)).bernoulli_(0.8)
    return x + y * mask.div_(0.8)


def _functional_dropout(b: Block, x: Tensor) -> Tensor:
    y = F.dropout(b.conv(x), 0.2, b.training)
    return x + F.dropout(b.act(y), p=0.1 if b.training else 0.0)


def _norm_by_hand(b: Block, x: Tensor) -> Tensor:
    y = b.conv(x)
    mean = y.mean((0, 2, 3), keepdim=True) if b.training else 0.1 * b.scale
    return b.act((y - mean) * b.scale) + x


def _length_first(b: Block, x: Tensor) -> Tensor:
    tokens = b.layer_norm(x.flatten(2).permute(2, 0, 1))  # (length, batch, channels)
    tokens = tokens + b.down(b.act(b.up(tokens)))
    return tokens.permute(1, 2, 0).reshape(x.shape)


def _written_slice(b: Block, x: Tensor) -> Tensor:
    y, fold = b.conv(x), x.shape[1] // 4
    out = torch.zeros_like(y)
    out[:, :, :-1] = y[:, :, 1:]
    out[:, :fold] = y[:, :fold]
    return x + out


def _inner_difference(b: Block, x: Tensor) -> Tensor:
    return x - b.squeeze(b.act(b.middle_norm(b.expand(x))))


def _across(b: Block, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = b.layer_norm(x.flatten(2).transpose(1, 2))
    q, k, v = b.qkv(y).transpose(1, 2).reshape(n, 3, 2, c // 2, h * w).unbind(1)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    mixed = (scores.softmax(-1) @ v).reshape(n, c, h * w)
    return x + b.proj(mixed.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def _shared_keys(b: Block, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = b.layer_norm(x.flatten(2).transpose(1, 2))
    q, k, v = b.qkv(y).chunk(3, -1)
    q = q.unflatten(-1, (2, c // 2)).transpose(1, 2)
    k, v = k[..., : c // 2].unsqueeze(1), v[..., c // 2 :].unsqueeze(1)
    mixed = F.scaled_dot_product_attention(q, k.expand(n, 2, h * w, c // 2), v.expand(n, 2, h * w, c // 2))
    return x + b.proj(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


def _per_sample(b: Block, x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    kernel = F.adaptive_avg_pool2d(b.conv(x), 3)
    whole = F.pad(x, (1, 1, 1, 1)).reshape(1, n * c, x.size(2) + 2, x.size(3) + 2)
    out = F.conv2d(whole, kernel.reshape(n * c, 1, 3, 3), groups=n * c)
    return x + b.act(out.view(n, c, out.size(2), out.size(3)))


BLOCKS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "residual": _residual,
    "grouped residual": _residual,
    "bottleneck": _bottleneck,
    "gated": _gated,
    "dense": _dense,
    "inception": _inception,
    "split": _split,
    "grouped shuffle": _shuffle,
    "shared": _shared,
    "in place": _in_place,
    "manual attention": _manual_attention,
    "fused attention": _fused_attention,
    "module attention": _module_attention,
    "convnext": _convnext,
    "mlp": _mlp,
    "hourglass": _hourglass,
    "functional": _functional,
    "odd view": _odd_view,
    "einsum": _einsum,
    "dead": _dead,
    "swapped": _swapped,
    "computed sizes": _computed_sizes,
    "parts reversed": _parts_reversed,
    "parts stacked": _parts_stacked,
    "stochastic depth": _stochastic_depth,
    "functional dropout": _functional_dropout,
    "norm by hand": _norm_by_hand,
    "length first": _length_first,
    "written slice": _written_slice,
    "inner difference": _inner_difference,
    "across": _across,
    "shared keys": _shared_keys,
    "per sample": _per_sample,
    "weight norm": _residual,
    "spectral norm": _residual,
    "pruned": _residual,
    **MORE_BLOCKS,
    **LATER_BLOCKS,
}
_USES = {
    "residual": "conv norm act",
    "grouped residual": "conv norm act",
    "bottleneck": "expand middle middle_norm squeeze inplace",
    "gated": "expand middle middle_norm squeeze act lower raise_",
    "dense": "conv norm act join",
    "inception": "wide narrow act",
    "split": "part",
    "grouped shuffle": "conv act",
    "shared": "conv act",
    "in place": "conv norm inplace",
    "manual attention": "layer_norm qkv proj",
    "fused attention": "layer_norm qkv proj",
    "module attention": "layer_norm attention",
    "convnext": "conv layer_norm up down act scale",
    "mlp": "layer_norm up down act drop",
    "hourglass": "conv deconv",
    "functional": "weight scale",
    "odd view": "conv",
    "einsum": "proj act",
    "dead": "narrow conv act",
    "swapped": "conv",
    "computed sizes": "conv act",
    "parts reversed": "conv act",
    "parts stacked": "conv",
    "stochastic depth": "conv act",
    "functional dropout": "conv act",
    "norm by hand": "conv act scale",
    "length first": "layer_norm up down act",
    "written slice": "conv",
    "inner difference": "expand middle_norm squeeze act",
    "across": "layer_norm qkv proj",
    "shared keys": "layer_norm qkv proj",
    "per sample": "conv act",
    "weight norm": "conv norm act",
    "spectral norm": "conv norm act",
    "pruned": "conv norm act",
    **MORE_USES,
    **LATER_USES,
}


class Down(nn.Module):
    """Half the size, another width."""

    def __init__(self, kind: str, before: int, after: int):
        super().__init__()
        self.kind = kind
        if kind == "stride":
            self.conv: nn.Module = nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after))
        elif kind == "merge":
            self.conv = nn.Linear(4 * before, after)
        else:
            self.conv = nn.Conv2d(4 * before if kind == "unshuffle" else before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """By stride, pooling, pixel unshuffle, or patch merging."""
        if self.kind == "pool":
            x = F.max_pool2d(x, 2)
        elif self.kind == "unshuffle":
            x = F.pixel_unshuffle(x, 2)
        elif self.kind == "merge":
            x = x.permute(0, 2, 3, 1)
            corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            return self.conv(torch.cat(corners, -1)).permute(0, 3, 1, 2).contiguous()  # type: ignore[no-any-return]
        return self.conv(x)  # type: ignore[no-any-return]


class Net(nn.Module):
    """A network of a recipe."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        dice = random.Random(recipe.seed)
        self.recipe, widths = recipe, recipe.widths
        side = 2 if recipe.stem == "patch" else 3
        self.stem = nn.Conv2d(3, widths[0], side, 2 if side == 2 else 1, 0 if side == 2 else 1)
        self.stem_norm = nn.BatchNorm2d(widths[0]) if recipe.stem == "norm" else nn.Identity()
        self.stages = nn.ModuleList()
        for k, kinds in enumerate(recipe.blocks):
            parts: list[nn.Module] = [Down(recipe.downs[k], widths[max(k - 1, 0)], widths[k])]
            parts += [Block(kind, widths[k], dice) for kind in kinds]
            self.stages.append(nn.Sequential(*parts))
        self.shortcut = nn.Conv2d(widths[0], widths[0], 2, 2) if recipe.inner else nn.Identity()
        self.norm = nn.LayerNorm(widths[-1]) if recipe.head == "tokens" else nn.Identity()
        self.head = nn.Linear(widths[-1] * (2 if recipe.head == "both" else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem_norm(self.stem(x))
        if self.recipe.control and x.shape[2] > 4:
            x = F.relu(x)
        whole = x
        for k, stage in enumerate(self.stages):
            x = stage(x)
            if k == 0 and self.recipe.inner:  # the blocks stand inside one long sum
                x = x + self.shortcut(whole) if self.recipe.inner == "sum" else self.shortcut(whole) - x
        if self.recipe.head == "tokens":
            x = self.norm(x.flatten(2).transpose(1, 2)).mean(1)
        elif self.recipe.head == "both":
            x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        else:
            x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.head(x)  # type: ignore[no-any-return]


def recipes(seed: int, case: int) -> tuple[Recipe, Recipe]:
    """A teacher's and a student's recipe: one family, or two that have nothing in common but the task."""
    dice = random.Random(f"{seed}:{case}")
    later = LATER_BLOCKS.keys() if seed < 10 else set()
    later |= MORE_BLOCKS.keys() if seed < 2 else set()
    later |= LAST_BLOCKS if seed < 20 else set()
    kinds = sorted(BLOCKS.keys() - later)  # the networks of earlier seeds stay as they were
    count = dice.choice((2, 2, 3))
    related = dice.random() < 0.6
    first = _recipe(dice, kinds, count, widths=(8, 12, 16), most=3)
    second = _recipe(dice, kinds, count, widths=(4, 6, 8), most=1, like=first if related else None)
    return first, second


def _recipe(
    dice: random.Random,
    kinds: list[str],
    count: int,
    *,
    widths: tuple[int, ...],
    most: int,
    like: Recipe | None = None,
) -> Recipe:
    blocks = tuple(tuple(dice.choice(kinds) for _ in range(dice.randint(1, most))) for _ in range(count))
    if like is not None:
        blocks = tuple(stage[:most] for stage in like.blocks)
    return Recipe(
        seed=dice.randrange(1 << 30),
        stem=like.stem if like else dice.choice(("norm", "plain", "patch" if count == 2 else "plain")),
        head=dice.choice(("pool", "tokens", "both")),
        widths=tuple(sorted(dice.choice(widths) for _ in range(count))),
        downs=like.downs if like else tuple(dice.choice(("stride", "pool", "unshuffle", "merge")) for _ in range(count)),
        blocks=blocks,
        control=dice.random() < 0.2,
        inner=dice.choice(("", "", "", "sum", "difference")),
    )  # fmt: skip


def build(recipe: Recipe, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network, every norm with random statistics and every scale away from one."""
    torch.manual_seed(recipe.seed)
    net = Net(recipe).to(dtype)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)  # type: ignore[operator, union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return net
