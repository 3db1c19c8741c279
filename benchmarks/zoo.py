"""The models that the benchmarks run on: torchvision's classifiers and segmenters, and one small model of every timm family.

    python benchmarks/zoo.py            list them: name, source, input size

Weights are random, and no part is left trivial: parameters that start constant (zeros, ones, layer scales of 1e-6) get random values,
and batch norm statistics are calibrated on random data. Otherwise whole branches would compute nothing and checks would be vacuous.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Source = Literal["torchvision", "segmentation", "timm"]
_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True, slots=True)
class ZooModel:
    """One model of the zoo.

    Attributes:
        name: the constructor's.
        source: where it comes from.
        family: the file it is defined in.
        size: height and width of the input picture.
        options: arguments of the constructor.
    """

    name: str
    source: Source
    family: str
    size: int = 224
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Unique in the zoo."""
        return f"{self.source}:{self.name}"

    def build(self, *, seed: int = 0) -> nn.Module:
        """The model in eval mode, with random weights and settled statistics."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = self._construct()
        settle(module, self.example(4), seed=seed)
        return module.eval()

    def example(self, batch: int = 2, *, seed: int = 0) -> Tensor:
        """Random pictures."""
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))

    def _construct(self) -> nn.Module:
        if self.source == "timm":
            import timm

            return timm.create_model(self.name, **self.options)
        import torchvision

        return torchvision.models.get_model(self.name, weights=None, **self.options)


def settle(module: nn.Module, example: Tensor, *, seed: int = 0) -> None:
    """Make every parameter count: constant ones become random, and batch norm statistics those of the example."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                value = float(parameter.flatten()[0])
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(value * (0.5 + noise) if value >= 0.5 else 0.2 * noise - 0.1)
        norms = [part for part in module.modules() if isinstance(part, _NORMS) and part.track_running_stats]
        if norms:
            before = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            module.train()
            torch.manual_seed(seed)
            module(example)
            for norm, momentum in zip(norms, before, strict=True):
                norm.momentum = momentum


_TIMM: dict[str, str | tuple[str, int] | tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 224, {"depth": 4}),
    "byoanet": ("eca_botnext26ts_256", 256),
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": ("convmixer_768_32", 112),
    "convnext": "convnext_zepto_rms",
    "cpubone": "cpubone_nano",
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": ("csatv2", 256),
    "cspnet": ("cs3darknet_s", 256),
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": ("deepseek_vit_412m", 168, {"depth": 4}),
    "deit": "deit_tiny_distilled_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46_c",
    "dpn": "dpn48b",
    "edgenext": ("edgenext_xx_small", 256),
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mobilenetv2_050",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": ("fastvit_t8", 256),
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": ("gemma4_vit_167m", 192),
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": ("hieradet_small", 256),
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": ("inception_resnet_v2", 160),
    "inception_v3": ("inception_v3", 160),
    "inception_v4": ("inception_v4", 160),
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": ("maxvit_pico_rw_256", 256),
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": ("mobilenetv5_base", 256),
    "mobilevit": ("mobilevit_xxs", 256),
    "mvitv2": "mvitv2_tiny",
    "naflexvit": ("naflexvit_base_patch16_gap", 224),
    "nasnet": ("nasnetalarge", 139),
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": ("nf_regnet_b0", 192),
    "pit": "pit_ti_224",
    "pnasnet": ("pnasnet5large", 139),
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": ("qwen3_vit_88m", 192),
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2net50_14w_8s",
    "resnest": "resnest14d",
    "resnet": ("resnet10t", 176),
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 256),
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_relpos_small_patch16_rpn_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": ("legacy_xception", 160),
    "xception_aligned": ("xception41p", 160),
    "xcit": "xcit_nano_12_p16_224",
}
"""timm 1.0.31: every family (module file) -> a small model; where 224 is not its size, or not needed, another; where needed, arguments."""

_NO_INIT = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
_SIZES = {"inception_v3": 299, "regnet_y_128gf": 64, "maxvit_t": 224, "swin_t": 224, "resnet18": 224, "resnet50": 224}
_VIT_SIZE = 112  # a multiple of every patch size but 32


def zoo(source: Source | None = None) -> list[ZooModel]:
    """All models of the zoo, or those of one source, in a fixed order."""
    import torchvision

    classifiers = torchvision.models.list_models(module=torchvision.models)
    segmenters = torchvision.models.list_models(module=torchvision.models.segmentation)
    models = [_classifier(name) for name in classifiers]
    options = {"weights_backbone": None, "aux_loss": True}
    for name in segmenters:
        own = options if not name.startswith("lraspp") else {"weights_backbone": None}
        models.append(ZooModel(name, "segmentation", name.split("_")[0], 128, own))
    for family, entry in _TIMM.items():
        parts = entry if isinstance(entry, tuple) else (entry,)
        name, size, own = (*parts, *(224, {})[len(parts) - 1 :])  # type: ignore[misc]
        models.append(ZooModel(name, "timm", family, size, own))
    return [model for model in models if source in (None, model.source)]


def _classifier(name: str) -> ZooModel:
    if name.startswith("vit_"):
        size = 128 if name.endswith("32") else _VIT_SIZE
        return ZooModel(name, "torchvision", "vit", size, {"image_size": size})
    return ZooModel(name, "torchvision", name.split("_")[0], _SIZES.get(name, 128), _NO_INIT.get(name, {}))


if __name__ == "__main__":
    for model in zoo():
        print(f"{model.id:50} {model.family:28} {model.size}")
