"""Stages whose teacher is an ONNX file, beside the same stages with the module that the file came from; and real files from PyPI.

    python benchmarks/onnx_teachers.py [--models resnet18 …] [--files DIR]

Every torchvision model (random weights, batch norms with statistics of their own) is exported, loaded as a spec and aligned with a student,
and its stages' losses on one batch are compared. Exporters fold norms into weights, by which channels are ranked, so both plans get the
channels that the module's has. DIR is a folder of ONNX files, such as the unpacked wheels of silero-vad and rapidocr. Writes
results/onnx_teachers.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import torchvision
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.errors import IndistillError
from indistill_fx.loading.load import load_source

HOME = Path(__file__).parent
MODELS = "resnet18 mobilenet_v2 squeezenet1_1 shufflenet_v2_x0_5 efficientnet_b0 convnext_tiny vit_b_32".split()
Make = Callable[[], nn.Module]


class Backbone(nn.Module):
    """A detector's backbone with its pyramid; what comes out is named."""

    def __init__(self, name: str):
        super().__init__()
        self.body = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps of the pyramid, the finest first."""
        return {f"p{level}": value for level, value in enumerate(self.body(x).values())}


def narrow_vit(num_classes: int) -> nn.Module:
    """A student for a ViT."""
    return torchvision.models.VisionTransformer(224, 32, 6, 6, 192, 384, num_classes=num_classes)


def settled(make: Make) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
        if isinstance(part, nn.Linear) and not part.weight.any():  # ViT's head begins at zero
            nn.init.normal_(part.weight, std=0.02)
    return model.eval()


def stages_of(teacher: nn.Module, student: nn.Module, plan: Any, x: Tensor, detector: bool) -> list[tuple[str, float]]:
    traced = (
        ifx.trace(teacher, x, role="teacher", logits="p0" if detector else None),
        ifx.trace(student, x, role="student", logits="p0" if detector else None),
    )
    main = None if detector else "kd"
    stages = ifx.compile_stages(*traced, plan, curriculum=Curriculum(lengths=1), main=main)
    batch = (x, torch.arange(len(x)) % 10)
    return [(stage.name, stage.eval()(batch).item()) for stage in stages]


def measured(
    name: str, teacher: Make, student: Make, size: int, folder: Path, *, detector: bool = False
) -> dict[str, Any]:
    """One model: how far its ONNX file's stages are from its own."""
    module, x = settled(teacher), torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    path = folder / f"{name}.onnx"
    ifx.export_onnx(module, path, x[:2])
    begun = time.perf_counter()
    source = load_source(f"{path}?input=3x{size}x{size}")
    seconds = time.perf_counter() - begun
    logits = "p0" if detector else None
    traced = {
        "module": ifx.trace(module, x, role="teacher", logits=logits),
        "onnx": ifx.trace(source.module, x, role="teacher", logits=logits),
    }
    pupil = ifx.trace(settled(student).train(), x, role="student", logits=logits)
    plans = {key: ifx.align(one, pupil) for key, one in traced.items()}
    kept = {pair.student: pair for pair in plans["module"].pairs}
    own = [
        pair.model_copy(update={"kept": kept[pair.student].kept})
        for pair in plans["onnx"].pairs
        if pair.student in kept and pair.teacher_shape == kept[pair.student].teacher_shape
    ]
    plans["onnx"] = plans["onnx"].model_copy(update={"pairs": tuple(own), "embedding": None})
    same = [kept[pair.student] for pair in own]
    plans["module"] = plans["module"].model_copy(update={"pairs": tuple(same), "embedding": None})
    losses = {
        key: stages_of(one, settled(student).train(), plans[key], x, detector)
        for key, one in (("module", module), ("onnx", source.module))
    }
    apart = {
        stage: abs(value - other) / abs(other)
        for (stage, value), (_, other) in zip(losses["onnx"], losses["module"], strict=True)
    }
    return {
        "operators": len(onnx.load(path).graph.node),
        "seconds to load": round(seconds, 2),
        "pairs of the module": len(kept),
        "same pairs": len(own),
        "loss of each stage": dict(losses["onnx"]),
        "largest relative difference": max(apart.values()),
        "notes": [note for note in source.notes if "converted" in note],
    }


def real(path: Path) -> dict[str, str]:
    """What becomes of a file of somebody else."""
    found = {}
    for way, spec in (("converted", str(path)), ("black box", f"onnxruntime:{path}")):
        try:
            source = load_source(spec)
            found[way] = "; ".join(source.notes)
        except IndistillError as error:
            found[way] = f"refused: {error}"
        found[way] = found[way].replace(str(path.parent) + "/", "")
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--files", type=Path, help="a folder of ONNX files")
    parser.add_argument("--json", type=Path, default=HOME / "results" / "onnx_teachers.json")
    arguments = parser.parse_args()
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            transformer = name.startswith("vit")
            teacher = partial(torchvision.models.get_model, name, num_classes=10)
            student = partial(narrow_vit if transformer else torchvision.models.mobilenet_v3_small, num_classes=10)
            size = 224 if transformer else 96
            models[name] = measured(name, teacher, student, size, Path(folder))
            print(name, models[name], flush=True)
        name = "resnet34 with a feature pyramid"
        models[name] = measured(
            "pyramid", lambda: Backbone("resnet34"), lambda: Backbone("resnet18"), 96, Path(folder), detector=True
        )
        print(name, models[name], flush=True)
    files = {path.name: real(path) for path in sorted(arguments.files.rglob("*.onnx"))} if arguments.files else {}
    for name, told in files.items():
        print(name, told)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
    arguments.json.write_text(
        json.dumps({**about, "models": models, "files": files}, indent=2, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    main()
