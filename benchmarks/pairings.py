"""Pairings beside the ones the alignment was developed on: what people pair in networks of other kinds.

The networks are torchvision's and timm's, or written out here from their published architecture; each truth says which rule fixes it.
The pairs were written down before the alignment had been run on them. `benchmarks/alignment.py cases` scores them along with the others;
they need the scorer and the small networks of the folder given by --cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torchvision
from alignment_dev import (
    CifarMobileNetV2,
    CifarVGG,
    WideResNet,
    both,
    cifar_resnet,
    cifar_resnet50,
    cifar_shuffle_v1,
    pairs,
    vision,
)
from alignment_score import Case
from pairing_nets import (
    LAYERS,
    Bert,
    CifarShuffleV2,
    CifarStem,
    Edsr,
    MainOutput,
    MobileNetV1,
    Psp,
    TextCnn,
    UNet,
    densenet_head_replaced,
    inception_head_replaced,
    resnet50_head_replaced,
    retina,
)
from torch import nn

INDEX = "feature lists paired by index, as RepDistiller's and mdistiller's loops do"
ENDS = "rule: last block output at each stride from 4 on"
UNIFORM = "rule: evenly spaced blocks, ending with the last (DistilBERT, TinyBERT, TextBrewer)"
SMALL, MIDDLE, LARGE = (2, 3, 32, 32), (2, 3, 128, 128), (2, 3, 224, 224)
VGG4 = ["pool1:in", "pool2:in", "block4:in", "pool4:in"]
MOBILE = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return make


def video(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models.video, name)(weights=None)


def ends(*places: str | Sequence[str]) -> list[list[str]]:
    """Per stage, the places that are as good as one another."""
    return [[place] if isinstance(place, str) else list(place) for place in places]


def cross(teacher: list[list[str]], student: list[list[str]]) -> list[Any]:
    """Per stage, every good place of the one with every good place of the other."""
    return [[(t, s) for t in ts for s in ss] for ts, ss in zip(teacher, student, strict=True)]


def indexed(prefix: str, numbers: Sequence[int], suffix: str = "") -> list[str]:
    return [f"{prefix}{n}{suffix}" for n in numbers]


RESNET = ends(*LAYERS)
MOBILE_V2 = ends("features.3", "features.6", "features.13", ["features.17", "features.18"])
VGG11_BN = ends(*[[f"features.{k}", f"features.{k + 1}"] for k in (6, 13, 20, 27)])
VGG16_BN = ends(*[[f"features.{k}", f"features.{k + 1}"] for k in (12, 22, 32, 42)])
EFFICIENT = ends("features.2", "features.3", "features.5", ["features.7", "features.8"])
SWIN = ends("features.1", "features.3", "features.5", "features.7")
SHUFFLE = ends("stage2", "stage3", ["stage4", "conv5"])
V3_LARGE = ends("features.3", "features.6", "features.12", ["features.15", "features.16"])
GOOGLENET = ends("inception3b", "inception4e", "inception5b")
DENSE = ends(
    *[[f"features.{end}" for end in (f"denseblock{i}", f"transition{i}.conv", f"transition{i}")] for i in (1, 2, 3)]
)
DENSE = [*DENSE, ["features.denseblock4", "features.norm5"]]


def case(name: str, kind: str, source: str, teacher: Any, student: Any, shape: Any, truth: Any, **more: Any) -> Case:
    return Case(f"own_{name}", kind, source, teacher, student, shape, truth, **more)


def uniform(count: int, teacher: int, student: int, prefix: str) -> list[tuple[str, str]]:
    t, s = ([(k + 1) * n // count - 1 for k in range(count)] for n in (teacher, student))
    return pairs(indexed(prefix, t), indexed(prefix, s))


def pairs_of(teacher: Sequence[int], student: int) -> list[tuple[str, str]]:
    """Where even spacing falls between two blocks, both are as good."""
    return [(f"blocks.{t}", f"blocks.{student}") for t in teacher]


TOKENS = (2, 16)
CASES = [
    # by index, CIFAR
    case(
        "resnet110__resnet32",
        "stage",
        INDEX,
        lambda: cifar_resnet(110),
        lambda: cifar_resnet(32),
        SMALL,
        both(*LAYERS[:3]),
    ),
    case(
        "resnet32x4__resnet8x4",
        "stage",
        INDEX,
        lambda: cifar_resnet(32, 32, 64),
        lambda: cifar_resnet(8, 32, 64),
        SMALL,
        both(*LAYERS[:3]),
    ),
    case(
        "wrn_40_2__wrn_40_1",
        "stage",
        INDEX,
        lambda: WideResNet(40, 2),
        lambda: WideResNet(40, 1),
        SMALL,
        both("block1", "block2", "block3"),
    ),
    case("vgg13__MobileNetV2", "stage", INDEX, lambda: CifarVGG(2), CifarMobileNetV2, SMALL, pairs(VGG4, MOBILE)),
    case("ResNet50__vgg8", "stage", INDEX, cifar_resnet50, lambda: CifarVGG(1), SMALL, pairs(LAYERS, VGG4)),
    case(
        "wrn_40_2__ShuffleV1",
        "stage",
        INDEX,
        lambda: WideResNet(40, 2),
        cifar_shuffle_v1,
        SMALL,
        pairs(["block1", "block2", "block3"], LAYERS[:3]),
    ),
    case(
        "resnet32x4__ShuffleV2",
        "stage",
        INDEX,
        lambda: cifar_resnet(32, 32, 64),
        CifarShuffleV2,
        SMALL,
        both(*LAYERS[:3]),
    ),
    case(
        "ResNet50__ShuffleV2",
        "stage",
        "rule: by resolution (3 of the teacher's 4 stages are met)",
        cifar_resnet50,
        CifarShuffleV2,
        SMALL,
        pairs(LAYERS[1:], LAYERS[:3]),
    ),
    case(
        "cifar_resnet34__resnet18",
        "stage",
        INDEX,
        lambda: CifarStem("resnet34"),
        lambda: CifarStem("resnet18"),
        SMALL,
        both(*[f"net.{n}" for n in LAYERS]),
    ),
    case(
        "cifar_resnet34__MobileNetV2",
        "stage",
        INDEX,
        lambda: CifarStem("resnet34"),
        CifarMobileNetV2,
        SMALL,
        pairs([f"net.{n}" for n in LAYERS], MOBILE),
    ),
    case(
        "wrn_40_4__wrn_16_4_ofd",
        "pre_activation",
        "OFD: the norm's output before the next stage's first activation",
        lambda: WideResNet(40, 4),
        lambda: WideResNet(16, 4),
        SMALL,
        pairs(["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"], ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
    ),
    # ImageNet
    case(
        "resnet50__MobileNetV1",
        "stage",
        ENDS,
        vision("resnet50"),
        MobileNetV1,
        MIDDLE,
        pairs(LAYERS, ["model.3", "model.5", "model.11", "model.13"]),
    ),
    case(
        "resnet50__mobilenet_v2",
        "stage",
        ENDS,
        vision("resnet50"),
        vision("mobilenet_v2"),
        MIDDLE,
        cross(RESNET, MOBILE_V2),
    ),
    case(
        "resnet101__mobilenet_v3_large",
        "stage",
        ENDS,
        vision("resnet101"),
        vision("mobilenet_v3_large"),
        MIDDLE,
        cross(RESNET, V3_LARGE),
    ),
    case(
        "vgg16_bn__vgg11_bn",
        "stage",
        "rule: last activation before each pooling, or the pooling",
        vision("vgg16_bn"),
        vision("vgg11_bn"),
        MIDDLE,
        cross(VGG16_BN, VGG11_BN),
    ),
    case(
        "vgg16_bn__resnet18",
        "stage",
        "rule: by resolution",
        vision("vgg16_bn"),
        vision("resnet18"),
        MIDDLE,
        cross(VGG16_BN, RESNET),
    ),
    case(
        "resnet34__vgg11_bn",
        "stage",
        "rule: by resolution",
        vision("resnet34"),
        vision("vgg11_bn"),
        MIDDLE,
        cross(RESNET, VGG11_BN),
    ),
    case(
        "resnet34__efficientnet_b0",
        "stage",
        ENDS,
        vision("resnet34"),
        vision("efficientnet_b0"),
        MIDDLE,
        cross(RESNET, EFFICIENT),
    ),
    case(
        "efficientnet_b2__b0",
        "stage",
        ENDS,
        vision("efficientnet_b2"),
        vision("efficientnet_b0"),
        MIDDLE,
        cross(EFFICIENT, EFFICIENT),
    ),
    case(
        "densenet201__mobilenet_v2",
        "stage",
        ENDS,
        vision("densenet201"),
        vision("mobilenet_v2"),
        MIDDLE,
        cross(DENSE, MOBILE_V2),
    ),
    case(
        "resnet50__densenet121", "stage", ENDS, vision("resnet50"), vision("densenet121"), MIDDLE, cross(RESNET, DENSE)
    ),
    case(
        "resnet50__shufflenet_v2",
        "stage",
        ENDS,
        vision("resnet50"),
        vision("shufflenet_v2_x1_0"),
        MIDDLE,
        cross(RESNET[1:], SHUFFLE),
    ),
    case(
        "googlenet__shufflenet_v2",
        "stage",
        ENDS,
        vision("googlenet", init_weights=False),
        vision("shufflenet_v2_x0_5"),
        MIDDLE,
        cross(GOOGLENET, SHUFFLE),
    ),
    case(
        "googlenet__resnet18",
        "stage",
        ENDS,
        vision("googlenet", init_weights=False),
        vision("resnet18"),
        MIDDLE,
        cross(GOOGLENET, RESNET[1:]),
    ),
    case(
        "wide_resnet50__mnasnet",
        "stage",
        ENDS,
        vision("wide_resnet50_2"),
        vision("mnasnet0_5"),
        MIDDLE,
        pairs(LAYERS, ["layers.8", "layers.9", "layers.11", "layers.13"]),
    ),
    case(
        "resnext101__regnet_x_400mf",
        "stage",
        ENDS,
        vision("resnext50_32x4d"),
        vision("regnet_x_400mf"),
        MIDDLE,
        pairs(LAYERS, indexed("trunk_output.block", (1, 2, 3, 4))),
    ),
    case(
        "convnext_small__tiny",
        "stage",
        ENDS,
        vision("convnext_small"),
        vision("convnext_tiny"),
        MIDDLE,
        both("features.1", "features.3", "features.5", "features.7"),
    ),
    case(
        "convnext_tiny__resnet18",
        "stage",
        ENDS,
        vision("convnext_tiny"),
        vision("resnet18"),
        MIDDLE,
        cross(SWIN, RESNET),
    ),
    case("swin_t__resnet18", "stage", ENDS, vision("swin_t"), vision("resnet18"), LARGE, cross(SWIN, RESNET)),
    case("resnet50__swin_t", "stage", ENDS, vision("resnet50"), vision("swin_t"), LARGE, cross(RESNET, SWIN)),
    case(
        "maxvit_t__efficientnet_b0",
        "stage",
        ENDS,
        vision("maxvit_t"),
        vision("efficientnet_b0"),
        LARGE,
        cross(ends(*indexed("blocks.", (0, 1, 2, 3))), EFFICIENT),
    ),
    case(
        "td_ghnd_resnet50",
        "head_replaced",
        "torchdistill's GHND on ResNet-50, cut at layer1",
        vision("resnet50"),
        resnet50_head_replaced,
        LARGE,
        pairs(LAYERS, ["bottleneck_layer", *LAYERS[1:]]),
    ),
    case(
        "td_ghnd_densenet169",
        "head_replaced",
        "torchdistill's GHND on DenseNet-169",
        vision("densenet169"),
        densenet_head_replaced,
        LARGE,
        [
            [("features.transition2", "bottleneck_layer"), ("features.denseblock2", "bottleneck_layer")],
            [("features.denseblock3", "denseblock3"), ("features.transition3", "transition3")],
            [("features.denseblock4", "denseblock4"), ("features.norm5", "norm5")],
        ],
    ),
    case(
        "td_ghnd_inception_v3",
        "head_replaced",
        "torchdistill's GHND on Inception, cut before Mixed_5b",
        vision("inception_v3", init_weights=False, aux_logits=False),
        inception_head_replaced,
        (2, 3, 299, 299),
        [("maxpool2", "bottleneck_layer"), *both("Mixed_5d", "Mixed_6e", "Mixed_7c")],
    ),
    # detection, segmentation, video, signals
    case(
        "retina_resnet101__resnet50",
        "fpn",
        "MMRazor's FPN configs for RetinaNet (neck.fpn_convs)",
        retina("resnet101"),
        retina("resnet50"),
        MIDDLE,
        both(*indexed("fpn.layer_blocks.", (0, 1, 2)), "fpn.extra_blocks.p6", "fpn.extra_blocks.p7"),
    ),
    case(
        "retina_resnet50__resnet18_trunk",
        "stage",
        "torchdistill's detection configs (backbone.body)",
        retina("resnet50"),
        retina("resnet18"),
        MIDDLE,
        both(*[f"body.{n}" for n in LAYERS]),
    ),
    case(
        "deeplab_resnet101__resnet50",
        "stage",
        "structured KD: trunk stages and the map before the classifier",
        lambda: MainOutput("deeplabv3_resnet101"),
        lambda: MainOutput("deeplabv3_resnet50"),
        MIDDLE,
        [
            *both(*[f"backbone.{n}" for n in LAYERS]),
            [("classifier.3", "classifier.3"), ("classifier.0", "classifier.0")],
        ],
    ),
    case(
        "deeplab_resnet50__mobilenet",
        "stage",
        ENDS + ", strides replaced by dilation",
        lambda: MainOutput("deeplabv3_resnet50"),
        lambda: MainOutput("deeplabv3_mobilenet_v3_large"),
        MIDDLE,
        [
            ("backbone.layer1", "backbone.3"),
            ("backbone.layer2", "backbone.6"),
            [("backbone.layer4", "backbone.15"), ("backbone.layer4", "backbone.16")],
            [("classifier.3", "classifier.3"), ("classifier.0", "classifier.0")],
        ],
    ),
    case(
        "pspnet_resnet50__resnet18",
        "stage",
        "CWD and IFVD: trunk stages, and the map before the classifier",
        lambda: Psp("resnet50"),
        lambda: Psp("resnet18"),
        MIDDLE,
        [*both(*LAYERS), ("bottleneck", "bottleneck")],
    ),
    case(
        "pspnet_resnet101__resnet50",
        "stage",
        "CWD and IFVD: trunk stages, and the map before the classifier",
        lambda: Psp("resnet101"),
        lambda: Psp("resnet50", width_per_group=32),
        MIDDLE,
        [*both(*LAYERS), ("bottleneck", "bottleneck")],
    ),
    case(
        "unet__small_unet",
        "stage",
        "rule: every level on the way down and up",
        lambda: UNet(16, 3),
        lambda: UNet(8, 2),
        (2, 3, 64, 64),
        both("down.0", "down.1", "down.2", "down.3", "fuse.0", "fuse.1", "fuse.2"),
    ),
    case(
        "edsr16__edsr4",
        "blocks",
        UNIFORM + ", at one resolution",
        lambda: Edsr(16, 16),
        lambda: Edsr(4, 8),
        (2, 3, 24, 24),
        pairs(indexed("marks.", (3, 7, 11, 15)), indexed("marks.", (0, 1, 2, 3))),
    ),
    case("r2plus1d__r3d", "stage", ENDS, video("r2plus1d_18"), video("r3d_18"), (2, 3, 8, 48, 48), both(*LAYERS)),
    case(
        "signal_cnn",
        "stage",
        "rule: one per stage",
        lambda: TextCnn(16, 3),
        lambda: TextCnn(8, 1),
        (2, 3, 1024),
        both("stages.0", "stages.1", "stages.2"),
    ),
    # tokens
    case(
        "bert12__bert6",
        "tokens",
        UNIFORM,
        lambda: Bert(12, 32),
        lambda: Bert(6, 16),
        TOKENS,
        uniform(6, 12, 6, "layer."),
        vocabulary=100,
    ),
    case(
        "bert12__bert4",
        "tokens",
        UNIFORM,
        lambda: Bert(12, 32),
        lambda: Bert(4, 16),
        TOKENS,
        uniform(4, 12, 4, "layer."),
        vocabulary=100,
    ),
    case(
        "bert12__bert3",
        "tokens",
        UNIFORM,
        lambda: Bert(12, 32),
        lambda: Bert(3, 32),
        TOKENS,
        uniform(3, 12, 3, "layer."),
        vocabulary=100,
    ),
    case(
        "gpt12__gpt6",
        "tokens",
        UNIFORM,
        lambda: Bert(12, 32, True),
        lambda: Bert(6, 16, True),
        TOKENS,
        uniform(6, 12, 6, "layer."),
        vocabulary=100,
    ),
    case(
        "bert6_embedded__bert3",
        "tokens",
        "TinyBERT and TextBrewer: the embeddings too",
        lambda: Bert(6, 32),
        lambda: Bert(3, 16),
        TOKENS,
        [("embedded", "embedded"), *uniform(3, 6, 3, "layer.")],
        vocabulary=100,
    ),
    case(
        "deit_small__deit_tiny",
        "tokens",
        UNIFORM,
        timm_model("deit_small_patch16_224", img_size=64),
        timm_model("deit_tiny_patch16_224", img_size=64),
        (2, 3, 64, 64),
        both(*indexed("blocks.", range(12))),
        needs="timm",
    ),
    case(
        "vit24__vit12",
        "tokens",
        UNIFORM,
        timm_model("vit_tiny_patch16_224", img_size=64, depth=24),
        timm_model("vit_tiny_patch16_224", img_size=64, embed_dim=96),
        (2, 3, 64, 64),
        uniform(12, 24, 12, "blocks."),
        needs="timm",
    ),
    case(
        "mixer_b16__s16",
        "tokens",
        UNIFORM,
        timm_model("mixer_b16_224", img_size=64),
        timm_model("mixer_s16_224", img_size=64),
        (2, 3, 64, 64),
        [pairs_of(t, k) for k, t in enumerate(((0, 1), (2,), (3, 4), (5,), (6, 7), (8,), (9, 10), (11,)))],
        needs="timm",
    ),
    case(
        "cait_s24__xxs",
        "tokens",
        UNIFORM,
        timm_model("cait_xxs36_224", img_size=64),
        timm_model("cait_xxs24_224", img_size=64),
        (2, 3, 64, 64),
        [*uniform(12, 36, 24, "blocks.")],
        needs="timm",
    ),
    case(
        "pvt_v2_b2__b0",
        "stage",
        ENDS,
        timm_model("pvt_v2_b2"),
        timm_model("pvt_v2_b0"),
        MIDDLE,
        both(*indexed("stages.", range(4))),
        needs="timm",
    ),
    case(
        "resnet50__pvt_v2_b0",
        "stage",
        ENDS,
        vision("resnet50"),
        timm_model("pvt_v2_b0"),
        MIDDLE,
        pairs(LAYERS, indexed("stages.", range(4))),
        needs="timm",
    ),
    case(
        "poolformer_s24__s12",
        "stage",
        ENDS,
        timm_model("poolformer_s24"),
        timm_model("poolformer_s12"),
        MIDDLE,
        both(*indexed("stages.", range(4))),
        needs="timm",
    ),
    case(
        "levit_192__128s",
        "stage",
        ENDS,
        timm_model("levit_192"),
        timm_model("levit_128s"),
        LARGE,
        both(*indexed("stages.", range(3))),
        needs="timm",
    ),
    case(
        "repvgg_b0__a0",
        "stage",
        ENDS,
        timm_model("repvgg_b0"),
        timm_model("repvgg_a0"),
        MIDDLE,
        both(*indexed("stages.", range(4))),
        needs="timm",
    ),
    case(
        "resnet50__repghost",
        "stage",
        ENDS,
        vision("resnet50"),
        timm_model("ghostnet_100"),
        MIDDLE,
        pairs(LAYERS, ["blocks.2", "blocks.4", "blocks.6", "blocks.8"]),
        needs="timm",
    ),
    case(
        "cspdarknet53__darknet17",
        "stage",
        ENDS,
        timm_model("cspdarknet53"),
        timm_model("darknet17"),
        MIDDLE,
        both(*indexed("stages.", range(1, 5))),
        needs="timm",
    ),
    case(
        "nfnet_f0__resnet26",
        "stage",
        ENDS,
        timm_model("nf_resnet50"),
        timm_model("resnet26"),
        MIDDLE,
        pairs(indexed("stages.", range(4)), LAYERS),
        needs="timm",
    ),
    case(
        "mobilevit_s__xxs",
        "stage",
        ENDS,
        timm_model("mobilevit_s"),
        timm_model("mobilevit_xxs"),
        (2, 3, 256, 256),
        both(*indexed("stages.", range(1, 5))),
        needs="timm",
    ),
    case(
        "edgenext__resnet18",
        "stage",
        ENDS,
        timm_model("edgenext_small"),
        vision("resnet18"),
        MIDDLE,
        pairs(indexed("stages.", range(4)), LAYERS),
        needs="timm",
    ),
    case(
        "xcit_24__12",
        "tokens",
        UNIFORM,
        timm_model("xcit_nano_12_p16_224", depth=8),
        timm_model("xcit_nano_12_p16_224", depth=4),
        (2, 3, 64, 64),
        uniform(4, 8, 4, "blocks."),
        needs="timm",
    ),
    case(
        "hrnet_w32__w18",
        "stage",
        "rule: one per stage's high-resolution branch",
        timm_model("hrnet_w18_small_v2"),
        timm_model("hrnet_w18_small"),
        MIDDLE,
        [[("layer1", "layer1")]],
        needs="timm",
    ),
]
