"""What a model file may name: the allow-list of the restricted loader.

A pickle can do nothing but combine the objects it names, so everything hangs on which names are answered and what each
may be used for. The uses:

  module    an `nn.Module` class of torch.nn, torchvision or timm: made empty and filled, never called while loading
  plain     a listed class that only holds numbers
  call      a listed function that rebuilds a tensor or a container; `pickle_make.py` checks the arguments of every call
  function  a listed pure tensor function, held as an attribute (an activation), never called while loading
  enum      an enumeration of an allowed package
  constant  a dtype, layout, memory format or quantisation scheme of torch
  graph     torch.fx's maker of graph modules, which would run source from the file: never called; `graph_code.py` reads that source
  storage, type   what tensors are made of
  trusted   anything of a package the user trusts
  missing   a class of an allowed package that the installed version does not have
  foreign   everything else: never made

Only the allowed packages are ever imported; a name from the file is not enough to make Python import a module.
"""

from __future__ import annotations

import _compat_pickle
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import nn

from indistill_fx.errors import ConfigError

Use = Literal[
    "module",
    "plain",
    "call",
    "function",
    "enum",
    "constant",
    "graph",
    "storage",
    "type",
    "trusted",
    "missing",
    "foreign",
]

# Audited: no constructor, `__setstate__` or `forward` of these packages' modules opens, fetches, imports or evaluates
# anything (benchmarks/fuzz_loading.py --audit repeats the search).
MODULE_PACKAGES = (
    *("torch.nn", "torch.ao.nn", "torch.ao.quantization.stubs", "torch.optim.swa_utils", "torchvision", "timm"),
)

_PLAIN = frozenset(
    (
        *(
            f"torchvision.models.detection._utils.{name}"
            for name in ("BalancedPositiveNegativeSampler", "BoxCoder", "BoxLinearCoder", "Matcher", "SSDMatcher")
        ),
        "timm.models._features.FeatureInfo",
    )
)

CALLS = frozenset(
    (
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._tensor._rebuild_from_type_v2",
        "torch.serialization._get_layout",
        "torch.Size",
        "torch.ScriptObject",
        "torch.device",
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "builtins.frozenset",
        "builtins.complex",
        "builtins.getattr",
        "functools.partial",
        "_codecs.encode",
    )
)

_ACTIVATIONS = ("relu", "relu_", "sigmoid", "tanh", "selu", "celu", "softmax", "log_softmax")
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "torch": _ACTIVATIONS,
    "torch._C._nn": ("gelu", "silu", "mish", "softplus", "log_sigmoid", "hardsigmoid", "hardswish", "leaky_relu"),
    "torch.nn.functional": (
        *_ACTIVATIONS,
        *("relu6", "gelu", "silu", "mish", "elu", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh", "softplus"),
    ),
    "timm.layers.activations": (
        *("swish", "mish", "sigmoid", "tanh", "hard_swish", "hard_sigmoid", "hard_mish"),
        *("gelu", "gelu_tanh", "quick_gelu"),
    ),
    "torchvision.ops.boxes": ("box_iou",),
    "torchvision.models.optical_flow.raft": ("_pass_through_h",),
}

# What the graph of a pickled graph module may use beside the operators that a saved program may call (`operators.py`): functions and
# methods that only compute tensors and sizes from their arguments.
_COMPUTES = tuple(
    "reshape narrow cumprod cummax cummin hsplit vsplit dsplit tensor_split logcumsumexp masked_select unique addmv addbmm allclose dist "
    "numel is_floating_point".split()
)
GRAPH_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "builtins": ("len",),
    "torch": (*_COMPUTES, "_assert", "stack", "real", "imag", "complex", "polar"),
    "torch.functional": _COMPUTES,
    "torch.nn.functional": tuple(
        "interpolate pad unfold fold grid_sample affine_grid softmin multi_head_attention_forward dropout1d dropout2d dropout3d upsample "
        "upsample_bilinear upsample_nearest lp_pool1d lp_pool2d lp_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices fractional_max_pool2d "
        "fractional_max_pool3d max_unpool1d conv_tbc gumbel_softmax local_response_norm logsigmoid normalize softsign tanhshrink "
        "cross_entropy".split()
    ),
    # all functions that torchvision marks with fx.wrap
    "torchvision.ops.stochastic_depth": ("stochastic_depth",),
    "torchvision.ops.drop_block": ("drop_block2d", "drop_block3d"),
    **{f"torchvision.ops.{name}": (name,) for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")},
    "torchvision.ops.poolers": ("_filter_input", "_multiscale_roi_align", "_setup_scales"),
    "torchvision.models.swin_transformer": tuple(
        "shifted_window_attention _patch_merging_pad _get_relative_position_bias".split()
    ),
    "torchvision.models.video.swin_transformer": tuple(
        "shifted_window_attention_3d _compute_pad_size_3d _compute_attention_mask_3d _get_window_and_shift_size "
        "_get_relative_position_bias".split()
    ),
    "torchvision.models.video.mvit": ("_unsqueeze", "_squeeze", "_add_rel_pos", "_add_shortcut"),
}
GRAPH_METHODS = frozenset(
    (*_COMPUTES, *"size dim ndimension nelement float half double bfloat16 int long bool byte short char type".split())
) | {"contiguous", "is_contiguous", "cpu", "tolist"}
GRAPH_ATTRIBUTES = frozenset("shape ndim dtype device layout T mT H mH real imag requires_grad".split())

# The storage classes in files from torch.save, and their dtypes.
STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt32Storage": torch.qint32,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "UntypedStorage": torch.uint8,
}

_TYPES = frozenset(("torch.Tensor", "torch.nn.parameter.Parameter", "torch._C._VariableFunctionsClass"))


@dataclass(frozen=True, slots=True)
class Named:
    """A global named by a pickle: its dotted path, what it may be used for, and what it stands for."""

    path: str
    use: Use
    value: Any = None


def resolve(module: str, name: str, trust: Sequence[str]) -> Named:
    """Decide what a pickle's global `module` `name` may be used for.

    Args:
        module: the module part as the file gives it.
        name: the name in that module.
        trust: packages the user trusts.

    Returns:
        The global and its use; `foreign` when it is on no list.
    """
    if (module, name) in _compat_pickle.NAME_MAPPING:  # pickle protocol 2 writes Python 2's names
        module, name = _compat_pickle.NAME_MAPPING[module, name]
    module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    path = f"{module}.{name}"
    if path in CALLS:
        return Named(path, "call")
    if module in ("torch", "torch.storage") and name in STORAGES:
        return Named(path, "storage", name)
    if path == "torch.fx.graph_module.reduce_graph_module":
        return Named(path, "graph")
    if path in _TYPES:
        return Named(path, "type")
    if name in FUNCTIONS.get(module, ()):
        found = look_up(module, name)
        return Named(path, "function" if callable(found) else "missing", found)
    if module == "torch" and (constant := constant_of_torch(path)) is not None:
        return Named(path, "constant", constant)
    if _within(module, trust):
        return Named(path, "trusted", _import_trusted(module, name))
    if path in _PLAIN or _within(module, MODULE_PACKAGES):
        return _resolve_class(module, name)
    return Named(path, "foreign")


def _resolve_class(module: str, name: str) -> Named:
    path, found = f"{module}.{name}", look_up(module, name)
    if found is None:
        return Named(path, "missing")
    if path in _PLAIN:
        return Named(path, "plain", found)
    # The defining module decides: a package may import others' classes (torch.fx.GraphModule runs its own source).
    if isinstance(found, type) and _within(found.__module__, MODULE_PACKAGES):
        if issubclass(found, nn.Module):
            return Named(path, "module", found)
        if issubclass(found, Enum):
            return Named(path, "enum", found)
    return Named(path, "foreign")


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _import_trusted(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(
            f"The trusted {module}.{name} cannot be imported: {type(error).__name__}: {error}.",
            where=f"{module}.{name}",
            got=str(error),
            hint="Install it, or put it into the working directory, in the version that the file was saved with.",
        ) from error


def look_up(module: str, name: str) -> Any:
    """What a module of an allowed package has by that name; None if it has nothing."""
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        return vars(importlib.import_module(module)).get(name)
    except Exception:  # a name that cannot be imported does not exist
        return None


def constant_of_torch(path: str) -> Any:
    """The dtype, layout, memory format or quantisation scheme by a dotted path; None if it is none."""
    module, _, name = path.rpartition(".")
    found = vars(torch).get(name) if module == "torch" else None
    return found if isinstance(found, (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)) else None
