"""Weights that torch computes anew at every call: weight norm, spectral norm, other parametrisations, and the masks of pruning."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm

from indistill_fx.graph.caches import held_by

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates it, but models still use it
    from torch.nn.utils.weight_norm import WeightNorm

_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)


def left_behind(module: nn.Module) -> dict[int, Tensor]:
    """What a deep copy is to hold in place of weights that the last forward pass computed with gradients: their values, by identity.

    Torch refuses to copy such tensors. The copy computes them anew when it runs.
    """
    parts = list(module.modules())
    held = [value for part in parts for _, value in held_by(part) if isinstance(value, Tensor)]
    held += [buffer for part in parts for buffer in part._buffers.values() if buffer is not None]
    return {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}


def is_computed(part: nn.Module) -> bool:
    """Whether a module computes one of its own weights anew at every call."""
    return is_parametrized(part) or any(isinstance(hook, _COMPUTING) for hook in part._forward_pre_hooks.values())


def why_opaque(module: nn.Module) -> str | None:
    """Why nothing can be said of what a module computes, beyond its class; else None.

    It may have a hook, a forward that was set on this module alone, or weights that are recomputed.
    """
    if is_parametrized(module):
        return f"its {', '.join(module.parametrizations)} is recomputed at every call (a parametrisation)"  # type: ignore[arg-type]
    if "forward" in vars(module):  # Accelerate and other libraries set `forward` on the module itself
        return "its forward was replaced, and may do anything"
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    names = dict.fromkeys(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)
    return f"it has hooks ({', '.join(names)}), which may do anything" if hooks else None


def write_out_weights(module: nn.Module) -> None:
    """Replace, in place, weights that are recomputed by parameters of their present value.

    Args:
        module: a module tree that nobody else holds; its tensors, and the dictionaries of its hooks, may be shared with another.
    """
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue
        with torch.no_grad():
            if is_parametrized(part):
                _write_out_parametrised(part)
            hooks = part._forward_pre_hooks
            computing_hooks = {key: hook for key, hook in hooks.items() if isinstance(hook, _COMPUTING)}
            part._forward_pre_hooks = OrderedDict(
                (key, hook) for key, hook in hooks.items() if key not in computing_hooks
            )
            for hook in computing_hooks.values():
                _write_out_hooked(part, hook)


def _write_out_parametrised(part: nn.Module) -> None:
    lists: Any = part.parametrizations
    values = {name: (getattr(part, name).detach().clone(), _trains(lists[name])) for name in lists}
    part.__class__ = type(part).__mro__[1]
    del part._modules["parametrizations"]
    for name, (value, trains) in values.items():
        part._parameters[name] = nn.Parameter(value, requires_grad=trains)


def _write_out_hooked(part: nn.Module, hook: Any) -> None:
    name = str(hook._tensor_name) if isinstance(hook, BasePruningMethod) else str(hook.name)
    if isinstance(hook, BasePruningMethod):
        value: Tensor = hook.apply_mask(part)
    else:
        value = hook.compute_weight(part, False) if isinstance(hook, SpectralNorm) else hook.compute_weight(part)
    made_of = [key for key in part._parameters if key.startswith(f"{name}_")]
    trains = any(weight.requires_grad for key in made_of if (weight := part._parameters[key]) is not None)
    for key in made_of:
        del part._parameters[key]
    for key in [key for key in part._buffers if key.startswith(f"{name}_")]:
        del part._buffers[key]
    part.__dict__.pop(name, None)
    part._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=trains)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
