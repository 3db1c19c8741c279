r"""Networks of other libraries, small and with random weights, through trace, shrink, student.py and ONNX.

    pip install --no-deps --target libs vit-pytorch segmentation-models-pytorch monai diffusers spandrel torchaudio asteroid \
        asteroid_filterbanks open_clip_torch ultralytics pytorchcv speechbrain rtdl_revisiting_models    and what these import (einops, …)
    PYTHONPATH=.:libs python benchmarks/libraries.py run benchmarks/results/libraries.json       all (half an hour)
    PYTHONPATH=.:libs python benchmarks/libraries.py run FILE --only monai yolov8n
    python benchmarks/libraries.py table benchmarks/results/libraries.json --into docs/coverage.md

A library that cannot be imported is left out, with a line. For each model: the graph's outputs on another batch beside the module's;
`shrink` to half of every width, which compares the result with the original without these channels; `student.py` against the smaller
graph, to the bit; the whole model as ONNX with an open batch, compared by `export_onnx` at two batch sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from every_step import Example, every_step, without_neutral_values, write_table

BEGIN, END = "<!-- libraries: made by benchmarks/libraries.py table -->", "<!-- libraries: end -->"
Inputs = Callable[[int], Example]


class Entry(NamedTuple):
    """A model: where its class or factory is, what it is called with, and its inputs for a number of samples."""

    package: str
    module: str
    make: str
    inputs: Inputs
    arguments: tuple[Any, ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})


def image(side: int, channels: int = 3, axes: int = 2) -> Inputs:
    """Images, or volumes with three axes of space."""
    return lambda rows: (torch.randn(rows, channels, *[side] * axes),)


def wave(length: int) -> Inputs:
    """Sound of one channel."""
    return lambda rows: (torch.randn(rows, 1, length),)


def frames(width: int) -> Inputs:
    """Spectra of 20 frames."""
    return lambda rows: (torch.randn(rows, 20, width),)


def words(rows: int) -> Example:
    """Tokens of texts."""
    return (torch.randint(0, 50, (rows, 12)),)


def noisy(channels: int, **more: tuple[int, ...]) -> Inputs:
    """A noisy image (the latent of one), its time step, and what it is conditioned on."""
    return lambda rows: {
        "sample": torch.randn(rows, channels, 16, 16),
        "timestep": torch.randint(0, 1000, (rows,)),
        **{name: torch.randn(rows, *shape) for name, shape in more.items()},
    }


VIT = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
MEDICAL = {"in_channels": 1, "out_channels": 3}
LEVELS = {"channels": (8, 16, 32), "strides": (2, 2)}
DIFFUSION = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
WINDOWS = {
    "img_size": 16, "window_size": 4, "depths": [2], "embed_dim": 16, "num_heads": [2], "mlp_ratio": 2, "upscale": 2,
    "upsampler": "pixelshuffle",
}  # fmt: skip


def _vit(module: str, make: str, inputs: Inputs | None = None, **settings: Any) -> Entry:
    return Entry("vit-pytorch", f"vit_pytorch.{module}", make, inputs or image(64), settings=settings or VIT)


def _segmentation(make: str, encoder: str = "resnet18", **settings: Any) -> Entry:
    about = {"encoder_weights": None, "classes": 4, **settings}
    return Entry("segmentation-models-pytorch", "segmentation_models_pytorch", make, image(64), (encoder,), about)


def _medical(make: str, inputs: Inputs, **settings: Any) -> Entry:
    return Entry("monai", "monai.networks.nets", make, inputs, settings=settings)


def _diffusers(make: str, inputs: Inputs, **settings: Any) -> Entry:
    return Entry("diffusers", "diffusers", make, inputs, settings=settings)


def _restorer(module: str, make: str, inputs: Inputs | None = None, **settings: Any) -> Entry:
    return Entry("spandrel", f"spandrel.architectures.{module}", make, inputs or image(16), settings=settings)


def _cv(name: str, side: int = 32) -> Entry:
    return Entry("pytorchcv", "pytorchcv.model_provider", "get_model", image(side), (name,), {"num_classes": 10})


def _yolo(make: str, file: str) -> Entry:
    return Entry("ultralytics", "ultralytics.nn.tasks", make, image(64), (file,), {"nc": 3, "verbose": False})


def _table(make: str, inputs: Inputs | None = None, **settings: Any) -> Entry:
    rows_of_numbers = inputs or (lambda rows: (torch.randn(rows, 8),))
    return Entry("rtdl_revisiting_models", "rtdl_revisiting_models", make, rows_of_numbers, settings=settings)


MODELS: dict[str, Entry] = {
    "vit": _vit("vit", "ViT"),
    "simple vit, positions in its forward": _vit("simple_vit_with_patch_dropout", "SimpleViT"),
    "simple vit, normalised queries": _vit("simple_vit_with_qk_norm", "SimpleViT"),
    "deepvit": _vit("deepvit", "DeepViT"),
    "cait": _vit("cait", "CaiT", cls_depth=1, **VIT),
    "cct": _vit(
        "cct", "CCT", img_size=(64, 64), embedding_dim=32, n_conv_layers=2, kernel_size=7, stride=2, padding=3,
        pooling_kernel_size=3, pooling_stride=2, pooling_padding=1, num_layers=2, num_heads=4, mlp_ratio=2.0, num_classes=10,
    ),
    "levit": _vit("levit", "LeViT", image_size=64, num_classes=10, stages=3, dim=(16, 24, 32), depth=1, heads=(2, 3, 4), mlp_mult=2),
    "cvt": _vit("cvt", "CvT", num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=48, s3_depth=1, s2_depth=1),
    "nest": _vit("nest", "NesT", image_size=64, patch_size=4, dim=16, heads=2, num_hierarchies=3, block_repeats=(1, 1, 1), num_classes=10),
    "mobile vit": _vit(
        "mobile_vit", "MobileViT", image_size=(64, 64), dims=[16, 24, 32], channels=[8, 8, 16, 16, 16, 16, 24, 24, 24, 24, 48],
        num_classes=10, depths=(1, 1, 1),
    ),
    "xcit": _vit("xcit", "XCiT", cls_depth=1, local_patch_kernel_size=3, **VIT),
    "max vit": _vit("max_vit", "MaxViT", num_classes=10, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=4),
    "look vit": _vit(
        "look_vit", "LookViT", dim=32, image_size=64, num_classes=10, depth=2, patch_size=16, heads=4, mlp_factor=2, dim_head=8,
        highres_patch_size=8, highres_mlp_factor=2, cross_attn_heads=4, cross_attn_dim_head=8,
    ),
    "normalised vit": _vit("normalized_vit", "nViT"),
    "vit, volumes": _vit(
        "vit_3d", "ViT", lambda rows: (torch.randn(rows, 3, 4, 32, 32),), image_size=32, frames=4, image_patch_size=8, frame_patch_size=2,
        num_classes=10, dim=32, depth=2, heads=4, mlp_dim=64,
    ),
    "unet": _segmentation("Unet"),
    "unet++": _segmentation("UnetPlusPlus"),
    "manet": _segmentation("MAnet"),
    "linknet": _segmentation("Linknet"),
    "fpn": _segmentation("FPN"),
    "pspnet": _segmentation("PSPNet"),
    "deeplabv3+": _segmentation("DeepLabV3Plus"),
    "upernet": _segmentation("UPerNet"),
    "segformer, mit_b0": _segmentation("Segformer", "mit_b0"),
    "unet, efficientnet-b0, scse": _segmentation("Unet", "efficientnet-b0", decoder_attention_type="scse"),
    "monai unet, volumes": _medical("UNet", image(16, 1, 3), spatial_dims=3, num_res_units=2, **LEVELS, **MEDICAL),
    "monai attention unet": _medical("AttentionUnet", image(32, 1), spatial_dims=2, **LEVELS, **MEDICAL),
    "monai dynunet, volumes": _medical(
        "DynUNet", image(16, 1, 3), spatial_dims=3, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
        filters=[8, 16, 32], **MEDICAL,
    ),
    "monai segresnet, volumes": _medical(
        "SegResNet", image(16, 1, 3), spatial_dims=3, init_filters=8, norm=("GROUP", {"num_groups": 4}), **MEDICAL
    ),
    "monai swin unetr": _medical(
        "SwinUNETR", image(64, 1), feature_size=12, spatial_dims=2, depths=(2, 2, 2, 2), num_heads=(3, 6, 12, 24), **MEDICAL
    ),
    "monai unetr": _medical(
        "UNETR", image(32, 1), img_size=(32, 32), feature_size=8, hidden_size=32, mlp_dim=64, num_heads=4, spatial_dims=2, **MEDICAL
    ),
    "monai highresnet": _medical("HighResNet", image(32, 1), spatial_dims=2, **MEDICAL),
    "monai seresnet50": _medical("SEResNet50", image(32, 1), spatial_dims=2, in_channels=1, num_classes=3),
    "monai autoencoder": _medical(
        "AutoEncoder", image(32, 1), spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16), strides=(2, 2)
    ),
    "diffusion unet": _diffusers(
        "UNet2DModel", noisy(3), sample_size=16, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **DIFFUSION,
    ),
    "diffusion unet, conditioned": _diffusers(
        "UNet2DConditionModel", noisy(4, encoder_hidden_states=(7, 32)), sample_size=16, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **DIFFUSION,
    ),
    "autoencoder kl": _diffusers(
        "AutoencoderKL", lambda rows: {"sample": torch.randn(rows, 3, 32, 32)}, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=32, **DIFFUSION,
    ),
    "dit": _diffusers(
        "DiTTransformer2DModel",
        lambda rows: {
            "hidden_states": torch.randn(rows, 4, 8, 8),
            "timestep": torch.randint(0, 100, (rows,)),
            "class_labels": torch.randint(0, 10, (rows,)),
        },
        norm_type="ada_norm_zero", num_embeds_ada_norm=10, norm_num_groups=4, **DIT,
    ),
    "pixart": _diffusers(
        "PixArtTransformer2DModel",
        lambda rows: {
            "hidden_states": torch.randn(rows, 4, 8, 8),
            "encoder_hidden_states": torch.randn(rows, 5, 16),
            "timestep": torch.randint(0, 100, (rows,)),
        },
        out_channels=8, cross_attention_dim=32, caption_channels=16, use_additional_conditions=False, **DIT,
    ),
    "stable diffusion 3": _diffusers(
        "SD3Transformer2DModel",
        lambda rows: {
            "hidden_states": torch.randn(rows, 4, 8, 8),
            "encoder_hidden_states": torch.randn(rows, 5, 16),
            "pooled_projections": torch.randn(rows, 12),
            "timestep": torch.randint(0, 100, (rows,)),
        },
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8, **DIT,
    ),
    "compact vgg": _restorer("Compact.__arch.SRVGG", "SRVGGNetCompact", num_feat=16, num_conv=4, upscale=2),
    "rrdb": _restorer("ESRGAN.__arch.RRDB", "RRDBNet", in_nc=3, out_nc=3, num_filters=16, num_blocks=1, scale=2),
    "swinir": _restorer("SwinIR.__arch.SwinIR", "SwinIR", **WINDOWS),
    "swin2sr": _restorer("Swin2SR.__arch.Swin2SR", "Swin2SR", **WINDOWS),
    "nafnet": _restorer(
        "NAFNet.__arch.NAFNet_arch", "NAFNet", image(32), width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]
    ),
    "omnisr": _restorer("OmniSR.__arch.OmniSR", "OmniSR", num_feat=16, res_num=1, window_size=4, up_scale=2, block_num=1),
    "span": _restorer("SPAN.__arch.span", "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2),
    "uformer": _restorer("Uformer.__arch.Uformer", "Uformer", image(32), img_size=32, embed_dim=8, depths=[1] * 9, win_size=4),
    "wav2letter": Entry(
        "torchaudio", "torchaudio.models", "Wav2Letter", wave(4000), (), {"num_classes": 10, "input_type": "waveform"}
    ),
    "conv-tasnet": Entry("asteroid", "asteroid.models", "ConvTasNet", wave(800), (2,), {
        "n_filters": 32, "kernel_size": 16, "stride": 8, "bn_chan": 16, "hid_chan": 32, "skip_chan": 16, "n_blocks": 3, "n_repeats": 2,
    }),
    "dprnn": Entry("asteroid", "asteroid.models", "DPRNNTasNet", wave(800), (2,), {
        "n_filters": 16, "kernel_size": 16, "stride": 8, "bn_chan": 16, "hid_size": 16, "chunk_size": 10, "n_repeats": 1,
    }),
    "conformer": Entry(
        "torchaudio", "torchaudio.models", "Conformer", lambda rows: (torch.randn(rows, 20, 32), torch.tensor([20, *range(9, 8 + rows)])),
        settings={"input_dim": 32, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "depthwise_conv_kernel_size": 7},
    ),
    "ecapa-tdnn": Entry("speechbrain", "speechbrain.lobes.models.ECAPA_TDNN", "ECAPA_TDNN", frames(16), (16,), {
        "channels": [32] * 5, "kernel_sizes": [5, 3, 3, 3, 1], "dilations": [1, 2, 3, 4, 1], "attention_channels": 16, "lin_neurons": 24,
    }),
    "table, mlp": _table("MLP", d_in=8, d_out=3, n_blocks=2, d_block=32, dropout=0.1),
    "table, resnet": _table(
        "ResNet", d_in=8, d_out=3, n_blocks=2, d_block=32, d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.1
    ),
    "table, ft-transformer": _table(
        "FTTransformer", lambda rows: (torch.randn(rows, 4), torch.randint(0, 3, (rows, 2))), n_cont_features=4, cat_cardinalities=[3, 5],
        d_out=3, n_blocks=2, d_block=16, attention_n_heads=4, attention_dropout=0.1, ffn_d_hidden=None, ffn_d_hidden_multiplier=2.0,
        ffn_dropout=0.1, residual_dropout=0.0,
    ),
    "clip, both towers": Entry(
        "open_clip_torch", "open_clip", "CLIP", lambda rows: (torch.randn(rows, 3, 32, 32), torch.randint(1, 59, (rows, 10))),
        settings={
            "embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8},
            "text_cfg": {"context_length": 10, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2},
        },
    ),
    "yolov8n": _yolo("DetectionModel", "yolov8n.yaml"),
    "yolov8n, classes": _yolo("ClassificationModel", "yolov8n-cls.yaml"),
    "yolo11n, segmentation": _yolo("SegmentationModel", "yolo11n-seg.yaml"),
    **{
        f"{name}_cifar10": _cv(f"{name}_cifar10")
        for name in "seresnet20 densenet40_k12 diapreresnet20 shakeshakeresnet20_2x16d".split()
    },
    **{name: _cv(name, 64) for name in "resnetd50b regnetx002 efficientnet_b0 isqrtcovresnet18 dicenet_wd2".split()},
}  # fmt: skip
"""Name -> the library, where the class is, its inputs, and what it is made with."""


def one(entry: Entry) -> dict[str, Any]:
    """Every step of one model."""
    torch.manual_seed(0)
    make = getattr(importlib.import_module(entry.module), entry.make)
    model = without_neutral_values(make(*entry.arguments, **entry.settings))
    torch.manual_seed(1)
    return every_step(model, entry.inputs(2), entry.inputs(3))


def run(options: argparse.Namespace) -> None:
    """All models, or some, by name or library; the file is written after each."""
    warnings.simplefilter("ignore")
    path = Path(options.file)
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    versions = record.setdefault("versions", {})
    record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    models = record.setdefault("models", {})
    for name, entry in MODELS.items():
        if options.only and name not in options.only and entry.package not in options.only:
            continue
        try:
            models[name] = one(entry) | {"library": entry.package}
            versions |= {
                package: version(package) for package in ("torch", "indistill-fx", "onnxruntime", entry.package)
            }
        except (ImportError, PackageNotFoundError) as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        print(name, models[name], flush=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def table(options: argparse.Namespace) -> None:
    """The results as Markdown, in their place in a page."""
    record = json.loads(Path(options.file).read_text())
    models = {f"{row['library']}: {name.removeprefix('monai ')}": row for name, row in record["models"].items()}
    right = [row for row in models.values() if row.get("off", 1.0) < 1e-4]
    first = (
        f"Of {len(models)} models, {len(right)} are traced with the module's outputs on another batch "
        f"({sum(not row['leaves'] for row in right)} of them whole, without a part that stays one node)."
    )
    write_table(options.file, {**record, "models": models}, first, marks=(BEGIN, END), into=options.into)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("table", table)):
        command = commands.add_parser(name)
        command.set_defaults(call=function)
        command.add_argument("file")
        if name == "run":
            known = sorted({*MODELS, *(entry.package for entry in MODELS.values())})
            command.add_argument("--only", nargs="+", choices=known, metavar="MODEL_OR_LIBRARY")
        else:
            command.add_argument("--into")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
