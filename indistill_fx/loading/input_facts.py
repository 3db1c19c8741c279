"""What is known of a model's input: by its library (torchvision, timm, transformers), or by what a package has published.

What a model *can* be fed with is one thing, and what its weights *want* another: a library's usual figures say nothing of weights that came
from elsewhere. So the two are kept apart, and nothing is wanted that is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import nn

from indistill_fx.graph.module_state import evaluating
from indistill_fx.loading.spec import LARGEST_IN_A_FILE, is_input_size
from indistill_fx.system.call import Call

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

_TF_LITE: Normalisation = ((127 / 255,) * 3, (128 / 255,) * 3)


@dataclass(frozen=True, slots=True)
class InputFacts:
    """What is known of a model's input.

    Attributes:
        size: a shape of one sample that it can be fed with.
        normalisation: mean and deviation per channel that its library uses for it.
        wanted_size: height and width that it wants, because its weights were made for them or because it takes no others.
        wanted_normalisation: that of its weights.
        classes: names of its outputs.
    """

    size: tuple[int, ...] | None = None
    normalisation: Normalisation | None = None
    wanted_size: tuple[int, int] | None = None
    wanted_normalisation: Normalisation | None = None
    classes: tuple[str, ...] = ()


_KNOWN: WeakKeyDictionary[nn.Module, InputFacts] = WeakKeyDictionary()
"""Of models that were loaded here, which do not carry what their source knows."""


def remember(module: nn.Module, facts: InputFacts) -> None:
    """Keep what a model's source knows of its input, for as long as the model lives."""
    _KNOWN[module] = facts


def facts_of(module: nn.Module) -> InputFacts:
    """What is known of a model's input: by the source it was loaded from, else by the model itself."""
    known = _KNOWN.get(module)
    return known if known is not None else describe_module(module)


def describe_torchvision(name: str, arguments: Mapping[str, Any], module: nn.Module) -> InputFacts:
    """What torchvision's weight metadata say. Nothing is downloaded.

    Args:
        name: of the model.
        arguments: with which it was built; weights of torchvision among them are its own.
        module: the model.
    """
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(name)
        preset = weights.DEFAULT.transforms()
    except (ValueError, AttributeError):
        return InputFacts()
    named = "DEFAULT" if arguments.get("pretrained") else str(arguments.get("weights") or "").rpartition(".")[2]
    preset_weights = weights[named] if named else None
    preset = preset_weights.transforms() if preset_weights is not None else preset
    mean, deviation = getattr(preset, "mean", None), getattr(preset, "std", None)
    normalisation = (tuple(mean), tuple(deviation)) if mean and deviation else None
    if "Video" in type(preset).__name__:
        return InputFacts(None, normalisation)  # the preset does not state the number of frames
    edges = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None)
    # The default weights of some ViTs need larger images than the default model takes.
    only = getattr(module, "image_size", None)
    edge = only or (edges[0] if edges else None)
    if not isinstance(edge, int):
        return InputFacts(None, normalisation)
    classes = tuple(preset_weights.meta.get("categories", ())) if preset_weights is not None else ()
    return InputFacts(
        (3, edge, edge),
        normalisation,
        wanted_size=(edge, edge) if only or preset_weights is not None else None,
        wanted_normalisation=normalisation if preset_weights is not None else None,
        classes=classes if len(classes) == arguments.get("num_classes", len(classes)) else (),
    )


def describe_module(module: nn.Module, *, pretrained: bool = False) -> InputFacts:
    """What a model itself says of its input, or the package that its class is from.

    Of timm's models that is their `pretrained_cfg`, of transformers' models for images their `config`.

    Args:
        module: any model.
        pretrained: whether it has the weights that its library has for it.
    """
    # Its weights were trained in TensorFlow Lite.
    if type(module).__module__.partition(".")[0] == "efficientnet_lite_pytorch":
        edge = getattr(module, "input_image_size", None)
        size = (edge, edge) if isinstance(edge, int) else None
        return InputFacts((3, *size) if size else None, _TF_LITE, size, _TF_LITE)
    held = getattr(module, "config", None)
    if getattr(module, "main_input_name", None) == "pixel_values" and held is not None and hasattr(held, "to_dict"):
        return describe_configuration(held.to_dict(), {}, pretrained=pretrained)
    return _by_pretrained_cfg(module, pretrained)


def describe_configuration(
    model: Mapping[str, Any], preprocessing: Mapping[str, Any], *, pretrained: bool
) -> InputFacts:
    """What the configuration of a model of transformers, and that of its images, say of its input.

    Args:
        model: what is in config.json.
        preprocessing: what is in preprocessor_config.json; empty if there is none.
        pretrained: whether the model has the weights that came with it.
    """
    classes = _labels_in(model)
    channels = model.get("num_channels", 3)
    mean, deviation = (_per_channel(preprocessing.get(name), channels) for name in ("image_mean", "image_std"))
    if not preprocessing.get("do_normalize", True):
        mean, deviation = _per_channel(0.0, channels), _per_channel(1.0, channels)
    factor = preprocessing.get("rescale_factor", 1 / 255)
    normalisation: Normalisation | None = None
    if _are_numbers(mean) and _are_numbers(deviation) and _are_numbers([factor]) and factor and all(deviation):
        scale = 255 * float(factor)  # data are divided by 255
        normalisation = tuple(m / scale for m in mean), tuple(d / scale for d in deviation)
    only = _edges(model.get("image_size"))
    edges = only or _edges(preprocessing.get("crop_size")) or _edges(preprocessing.get("size"))
    if edges is None or not _is_shape([channels, *edges]):
        return InputFacts(classes=classes)
    known = InputFacts((channels, *edges), normalisation, classes=classes)
    wanted = edges if only or pretrained else None
    return replace(known, wanted_size=wanted, wanted_normalisation=normalisation if pretrained else None)


def _per_channel(value: Any, channels: Any) -> list[float] | None:
    """A number for every channel; one number, or equal ones, stand for any number of channels. None if it says nothing of so many."""
    numbers = [value] if isinstance(value, (int, float)) else value
    if not _are_numbers(numbers) or not _is_shape([channels]):
        return None
    return (
        [float(k) for k in numbers]
        if len(numbers) == channels
        else [float(numbers[0])] * channels
        if len({*numbers}) == 1
        else None
    )


def _edges(value: Any) -> tuple[int, int] | None:
    """Height and width, in one of the forms that transformers writes them in."""
    if isinstance(value, Mapping):
        value = [value.get("height", value.get("shortest_edge")), value.get("width", value.get("shortest_edge"))]
    edges = [value, value] if isinstance(value, int) else value
    return (edges[0], edges[1]) if isinstance(edges, (list, tuple)) and len(edges) == 2 and _is_shape(edges) else None


def _labels_in(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes, if they are not the ones that transformers makes up."""
    held = model.get("id2label")
    if not isinstance(held, Mapping):
        return ()
    names = [held.get(str(number), held.get(number)) for number in range(len(held))]  # JSON's keys are text
    told = [name for name in names if isinstance(name, str) and not re.fullmatch(r"LABEL_\d+", name)]
    return tuple(told) if len(told) == len(names) else ()


def picture_channels(module: nn.Module) -> Literal[1, 3] | None:
    """Channels of the images that a model takes, by its first convolution; None where that is neither grey nor RGB."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else None
    return 1 if channels == 1 else 3 if channels == 3 else None


def other_channels(module: nn.Module, call: Call) -> Literal[1, 3] | None:
    """Channels that a model takes instead of those of an image that it fails on; None where it takes it, or nothing is known.

    Args:
        module: any model.
        call: inputs as the batch has them.
    """
    pictures = [value for value in call.tensors if value.is_floating_point() and value.ndim == 4]
    wanted = picture_channels(module)
    if len(pictures) != 1 or wanted is None or {wanted, pictures[0].shape[1]} != {1, 3}:
        return None
    weight = next(module.parameters(), torch.zeros(()))
    with evaluating(module), torch.no_grad():
        try:
            call.to(weight.device).changed(
                lambda value: value.to(weight.dtype) if value.is_floating_point() else value
            )(module)
        except Exception:  # any model may raise anything
            return wanted
    return None


def _by_pretrained_cfg(module: nn.Module, pretrained: bool) -> InputFacts:
    config = getattr(module, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not _is_shape(size):
        return InputFacts()
    channels, *edges = size
    only = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if _is_shape(only):
        edges = list(only)
    first = config.get("first_conv")
    if isinstance(first, str) and first in dict(module.named_modules()):
        channels = getattr(module.get_submodule(first), "in_channels", channels)
    mean, deviation = config.get("mean"), config.get("std")
    normalisation = (tuple(mean), tuple(deviation)) if _are_numbers(mean) and _are_numbers(deviation) else None
    if not is_input_size([channels, *edges], most=LARGEST_IN_A_FILE):
        return InputFacts()
    fixed = pretrained or _is_shape(only)
    wanted = (edges[0], edges[1]) if fixed and len(edges) == 2 else None
    names = config.get("label_names")
    classes = tuple(names) if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) else ()
    classes = classes if len(classes) == getattr(module, "num_classes", None) else ()
    return InputFacts((channels, *edges), normalisation, wanted, normalisation, classes)


def _are_numbers(value: Any) -> TypeGuard[Sequence[float]]:
    return (
        isinstance(value, (tuple, list))
        and bool(value)
        and all(isinstance(item, (int, float)) and math.isfinite(item) for item in value)
    )


def _is_shape(value: Any) -> TypeGuard[Sequence[int]]:
    return is_input_size(value, most=LARGEST_IN_A_FILE)
