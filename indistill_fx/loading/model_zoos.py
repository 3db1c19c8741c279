"""Models by name: torchvision's and timm's constructors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from indistill_fx.errors import ConfigError, FrontendError, IndistillError, nearest

# Arguments that stop constructors from downloading a backbone, or from warning about their own defaults.
_QUIET: dict[str, Any] = {"weights_backbone": None}
_QUIET_BY_NAME: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": True},
    "inception_v3": {"init_weights": True},
}


def build_torchvision(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a torchvision model.

    Args:
        name: as in `torchvision.models.list_models()`.
        arguments: the constructor's; `weights="DEFAULT"` or `pretrained=True` downloads weights.

    Returns:
        The model, in train mode as its constructor leaves it.

    Raises:
        ConfigError: no such name or argument; says which there are.
        FrontendError: the weights cannot be downloaded.
    """
    import torchvision

    legal = torchvision.models.list_models()
    if name not in legal:
        raise _unknown("torchvision", name, legal)
    builder = torchvision.models.get_model_builder(name)
    given = dict(arguments)
    if given.pop("pretrained", False):
        given["weights"] = "DEFAULT"
    known = inspect.signature(builder).parameters
    quiet = {key: value for key, value in _QUIET.items() if key in known} | _QUIET_BY_NAME.get(name, {})
    if given.get("weights") is not None:
        quiet = {}
        weights = torchvision.models.get_model_weights(name)
        wanted = str(given["weights"]).rpartition(".")[2]
        if wanted not in weights.__members__:
            raise ConfigError(
                f"torchvision:{name} has no weights {wanted!r}.",
                where=f"torchvision:{name}?weights={wanted}",
                got=wanted,
                hint=f"Choose from: {', '.join(weights.__members__)}.",
            )
    model = _build(f"torchvision:{name}", builder, given, quiet, downloads=given.get("weights") is not None)
    # Some constructors accept and ignore any keyword.
    unknown = [key for key in given if key not in {**known, **inspect.signature(type(model).__init__).parameters}]
    if unknown:
        raise _misbuilt(f"torchvision:{name}", builder, given, quiet, f"there is no argument {unknown[0]!r}")
    return model


def build_timm(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a timm model.

    Args:
        name: as in `timm.list_models()`, a tag allowed (`resnet10t.c3_in1k`).
        arguments: those of `timm.create_model`; `pretrained=True` downloads weights.

    Returns:
        The model, in train mode as its constructor leaves it.

    Raises:
        ConfigError: timm is not installed, no such name or argument; says which there are.
        FrontendError: the weights cannot be downloaded.
    """
    try:
        import timm
    except ImportError as error:
        hint = 'Install it: pip install "indistill-fx[timm]".'
        raise ConfigError(
            f"timm:{name} needs timm, which is not installed.", where=f"timm:{name}", hint=hint
        ) from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())

    if "checkpoint_path" in arguments:  # timm's own loader would trust the file
        path = arguments["checkpoint_path"]
        hint = f"Write timm:{name}@{path}, which loads weights without running what a file holds."
        raise ConfigError(f"timm:{name} takes no checkpoint_path here.", where=f"timm:{name}", got=path, hint=hint)

    def builder(**given: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, **given)
        return model

    return _build(f"timm:{name}", builder, dict(arguments), {}, downloads=bool(arguments.get("pretrained")))


def _unknown(library: str, name: str, legal: list[str]) -> ConfigError:
    hint = nearest(name.partition(".")[0], legal) or f"{library} has {len(legal)} models."
    return ConfigError(f"{library} has no model {name!r}.", where=f"{library}:{name}", got=name, hint=hint)


def _build(
    spec: str, builder: Callable[..., nn.Module], given: dict[str, Any], quiet: dict[str, Any], *, downloads: bool
) -> nn.Module:
    try:
        return builder(**quiet | given)
    except IndistillError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".")
        if downloads and not isinstance(error, TypeError):
            raise FrontendError(
                f"{spec} could not be built with pretrained weights: {reason}.",
                where=spec,
                got=reason,
                hint=f"Without a network connection, give the weights as a file: {spec}@weights.safetensors.",
            ) from error
        raise _misbuilt(spec, builder, given, quiet, reason) from error


def _misbuilt(
    spec: str, builder: Callable[..., nn.Module], given: dict[str, Any], quiet: dict[str, Any], reason: str
) -> ConfigError:
    shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return ConfigError(
        f"{spec} cannot be built with {shown or 'its defaults'}: {reason}.",
        where=spec,
        got=given,
        hint=f"Its arguments: {', '.join(_list_arguments(builder, quiet))}.",
    )


def _list_arguments(builder: Callable[..., nn.Module], quiet: dict[str, Any]) -> list[str]:
    """The arguments with defaults of a builder, and of the model's class that it passes them to."""
    import torch

    sources: list[Callable[..., Any]] = [builder]
    try:
        with torch.device("meta"):
            sources.append(type(builder(**quiet)).__init__)
    except Exception:  # fall back to the builder's own arguments
        sources = [builder]
    found: dict[str, None] = {}
    for source in sources:
        for name, parameter in inspect.signature(source).parameters.items():
            if parameter.default is not parameter.empty:
                found[f"{name}={parameter.default!r}"] = None
    return list(found)
