"""Are the channel axes right? One architecture is traced at two widths: where the shapes of a tensor differ, there must be its channels.

    python benchmarks/widths.py benchmarks/results/widths.json         Hugging Face's and timm's families (a quarter of an hour)
    python benchmarks/widths.py FILE --only "timm resnet18" llama

The widths are in the configuration, so nothing of this package says where they are: a check that does not share our rules. A tensor
counts as wrong if its shapes differ and its channel axis, by the graph's facts, is one of equal size. The two networks are paired as well,
and pairs that do not fit channel by channel (a projection or pooling over another axis) are listed.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hugging_face
import timm
import torch
import transformers
from torch import nn

import indistill_fx as ifx
from indistill_fx.errors import IndistillError

WIDTHS = (
    "hidden_size", "intermediate_size", "d_model", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_embd", "dim", "hidden_dim",
    "hidden_sizes", "embed_dim", "neck_hidden_sizes", "embed_dims", "embedding_size", "word_embed_proj_dim", "decoder_hidden_size",
    "conv_dim", "n_inner", "d_inner",
)  # fmt: skip
"""The entries of Hugging Face's configurations that are widths of tensors."""
TIMM: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "beit_base_patch16_224": (224, {"embed_dim": 384, "num_heads": 6}),
    "cait_xxs24_224": (224, {"embed_dim": 384, "num_heads": 8}),
    "convnext_atto": (64, {"dims": (80, 160, 320, 640)}),
    "edgenext_xx_small": (64, {"dims": (48, 96, 176, 336)}),
    "levit_128s": (224, {"embed_dim": (256, 384, 512)}),
    "pvt_v2_b0": (64, {"embed_dims": (64, 128, 320, 512)}),
    "resnet18": (64, {"channels": (32, 64, 128, 256)}),
    "swin_tiny_patch4_window7_224": (224, {"embed_dim": 48}),
    "twins_pcpvt_small": (224, {"embed_dims": (32, 64, 160, 256)}),
    "visformer_tiny": (224, {"embed_dim": 96}),
    "vit_tiny_patch16_224": (224, {"embed_dim": 384, "num_heads": 6}),
    "xcit_nano_12_p16_224": (224, {"embed_dim": 256}),
}
"""By name: the edge of the images, and the settings of the other width."""
Make = Callable[[bool], nn.Module]


def subjects() -> dict[str, tuple[Make, Any]]:
    """By name: what makes it, at the one width or the other, and its inputs."""
    found: dict[str, tuple[Make, Any]] = {}
    for name, (family, head, inputs, settings) in hugging_face.MODELS.items():
        found[name] = (_of_hugging_face(family, head, settings), inputs(2))
    for name, (edge, other) in TIMM.items():
        found[f"timm {name}"] = (_of_timm(name, other), torch.randn(2, 3, edge, edge))
    return found


def _of_hugging_face(family: str, head: str, settings: Mapping[str, Any]) -> Make:
    def doubled(value: Any) -> Any:
        return [2 * one for one in value] if isinstance(value, (list, tuple)) else 2 * value

    def make(wider: bool) -> nn.Module:
        chosen = {key: doubled(value) if wider and key in WIDTHS else value for key, value in settings.items()}
        model: nn.Module = getattr(transformers, f"{family}{head}")(getattr(transformers, f"{family}Config")(**chosen))
        return model.eval()

    return make


def _of_timm(name: str, other: Mapping[str, Any]) -> Make:
    def make(wider: bool) -> nn.Module:
        model: nn.Module = timm.create_model(name, num_classes=5, **(other if wider else {}))
        return model.eval()

    return make


def check(make: Make, inputs: Any) -> dict[str, Any]:
    """How many tensors differ between the widths, those whose channel axis is wrong, and the pairs that do not fit."""
    first, second = (ifx.trace(make(wider), inputs) for wider in (False, True))
    differ, wrong = 0, []
    for name, facts in first.facts.items():
        other = second.facts.get(name)
        if other is None or len(other.shape) != len(facts.shape) or facts.batch_axis is None:
            continue
        axes = [axis for axis, sizes in enumerate(zip(facts.shape, other.shape, strict=True)) if sizes[0] != sizes[1]]
        differ += bool(axes)
        if axes and facts.dtype.is_floating_point and facts.channel_axis is not None and facts.channel_axis not in axes:
            wrong.append(f"{name}: {facts.shape} and {other.shape}, axis {facts.channel_axis}")
    try:
        pairs = ifx.align(second, first, required=False).pairs
    except IndistillError as error:
        return {"differ": differ, "wrong": wrong, "pairs": 0, "unpaired": error.message}
    odd = [f"{pair.teacher}: {pair.adapter}" for pair in pairs if pair.adapter != "none"]
    return {"differ": differ, "wrong": wrong, "pairs": len(pairs), "odd": odd}


def main() -> None:
    """All that are not in the file yet, or some anew; it is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = json.loads(options.file.read_text()) if options.file.exists() else {}
    record["command"] = "python benchmarks/widths.py benchmarks/results/widths.json"
    record["versions"] = {name: version(name) for name in ("transformers", "timm", "torch", "indistill-fx")}
    record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    found = record.setdefault("models", {})
    for name, (make, inputs) in subjects().items():
        if name not in options.only if options.only else name in found:
            continue
        torch.manual_seed(0)
        try:
            found[name] = check(make, inputs)
        except (
            IndistillError,
            AssertionError,
            AttributeError,
            ImportError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(name, found[name], flush=True)
        options.file.write_text(json.dumps(record, indent=1) + "\n")
    rows = [row for row in found.values() if "failed" not in row]
    wrong = sum(len(row["wrong"]) for row in rows)
    print(
        f"{len(rows)} of {len(found)} models, {sum(row['differ'] for row in rows)} tensors that differ, {wrong} wrong"
    )


if __name__ == "__main__":
    main()
