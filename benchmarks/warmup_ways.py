"""The pairs of benchmarks/warmup.py, the ways of training a stage that ours is measured beside, and one step of either."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import indistill_fx as ifx
from examples.paper_cifar10 import Cnn32
from indistill_fx.passes.lowering.table import LOWERINGS, Lowerings
from indistill_fx.target import Kind

Build = Callable[[], tuple[nn.Module, nn.Module]]


def vision(teacher: str, student: str) -> Build:
    """Two of torchvision's classifiers, by name."""
    return lambda: (torchvision.models.get_model(teacher), torchvision.models.get_model(student))


def _vit() -> tuple[nn.Module, nn.Module]:
    teacher = torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072
    )
    student = torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768
    )
    return teacher, student


PAIRS: dict[str, tuple[Build, tuple[int, ...], int]] = {
    "paper": (lambda: (Cnn32(), Cnn32((8, 16, 32), 64)), (3, 32, 32), 128),
    "resnet50-resnet18": (vision("resnet50", "resnet18"), (3, 224, 224), 16),
    "vgg16_bn-vgg11_bn": (vision("vgg16_bn", "vgg11_bn"), (3, 224, 224), 4),
    "vit_b-vit_ti": (_vit, (3, 224, 224), 4),
}


class HookBaseline(nn.Module):
    """The plain way, as one module: batch in, loss out."""

    def __init__(self, teacher: nn.Module, student: nn.Module, pair: ifx.Pair):
        super().__init__()
        self.teacher, self.student, self.pair = teacher.eval(), student, pair
        self.register_buffer(
            "kept", torch.tensor(pair.kept, device=next(teacher.parameters()).device) if pair.kept is not None else None
        )
        self.seen: dict[str, list[Tensor]] = {}
        for role, model in (("teacher", teacher), ("student", student)):
            path, _, call = getattr(pair, role).partition("@")
            model.get_submodule(path).register_forward_hook(self._note(role))
            setattr(self, f"{role}_call", int(call or 1) - 1)

    def _note(self, role: str) -> Callable[..., None]:
        return lambda _module, _args, output: self.seen[role].append(output)

    def forward(self, x: Tensor) -> Tensor:
        """The pair's loss."""
        self.seen = {"teacher": [], "student": []}
        with torch.no_grad():
            self.teacher(x)
        self.student(x)
        wanted = self.seen["teacher"][self.teacher_call]
        if self.kept is not None:
            wanted = wanted.index_select(1 if wanted.dim() == 4 else wanted.dim() - 1, self.kept)
        return F.mse_loss(self.seen["student"][self.student_call], wanted)


class Cached(nn.Module):
    """A stage with the teacher's features given."""

    def __init__(self, stage: ifx.Stage, x: Tensor):
        super().__init__()
        self.stage = stage.without_teacher()
        with torch.no_grad():
            self.features = {tap: value.clone() for tap, value in stage.teacher(x)[0].items()}

    def forward(self, x: Tensor) -> Tensor:
        """The stage's loss."""
        return self.stage({self.stage.inputs[0]: x, "teacher_features": self.features})


class HalfTeacher(nn.Module):
    """A frozen graph under bfloat16 autocast, its weights converted once."""

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.graph = copy.deepcopy(graph).bfloat16()

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], None]:
        """The features, in float32."""
        return {tap: value.float() for tap, value in self.graph(x.bfloat16())[0].items()}, None


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """The paper's optimiser, over what can be trained."""
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Plain descent with momentum: unlike Adam it does not scale a gradient up that is rounding only."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)


def step(loss_of: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """One training step; seconds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(x)
    loss.backward()
    optimizer.step()
    return clock() - start


def each_left_out(kind: Kind) -> dict[str, Lowerings]:
    """A target's table without each of its rewrites."""
    listed = LOWERINGS[kind]
    return {f"without {key}": listed.without(key) for key in dict.fromkeys((*listed.teacher, *listed.student))}
