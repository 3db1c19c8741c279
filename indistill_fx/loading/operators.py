"""Which operators a saved program may call: those that compute tensors from tensors, check their arguments, and do nothing else."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_MORE = frozenset(
    # Composite operators that torch.export keeps whole because they have no decomposition.
    "batch_norm dropout dropout_ feature_dropout alpha_dropout feature_alpha_dropout lift_fresh lift_fresh_copy copy copy_ index_put_ to "
    "type_as unflatten chunk unsafe_chunk unfold bernoulli_ contiguous _conj conj resolve_conj resolve_neg cumsum_ bincount tril_indices "
    "triu_indices multinomial cartesian_prod combinations bilinear cosine_similarity pairwise_distance pdist cdist normalize set_grad "
    "_assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size _fft_c2c _fft_c2r _fft_r2c stft istft "
    "square flatten ravel broadcast_to expand_as view_as view_as_real view_as_complex reshape_as numpy_t mT mH t matrix_H adjoint swapaxes "
    "swapdims moveaxis movedim diff trapezoid trapz cov corrcoef cross kron outer ger inner tensordot chain_matmul linalg_multi_dot "
    "fake_quantize_per_channel_affine quantize_per_tensor dequantize embedding_renorm_ scatter_ scatter_add_ index_add_ index_copy_ "
    "index_fill_ masked_fill_ masked_scatter_ triu_ tril_ random_ uniform_ normal_ exponential_ log_normal_ cauchy_ geometric_ detach_ "
    "squeeze_ unsqueeze_ transpose_ t_ swapaxes_ zero_ float_power_ clip_ unique_dim unique_consecutive _unique2 histc searchsorted "
    "bucketize kthvalue median nanmedian mode quantile nanquantile one_hot rot90 flipud fliplr data to_dense item".split()
)
_NEVER = re.compile(
    r"print|unsafe|sparse|nested|from_file|storage|record_stream|^_test|^set_|resize|pin_memory|^_async|^_thnn|deserialize"
)
_HARMLESS = frozenset(
    ("_unsafe_view", "_unsafe_index", "_unsafe_index_put", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
)
"""Named unsafe because their results must not be written; their arguments are checked."""


def may_be_called(namespace: str, name: str, operator: Any) -> bool:
    """Whether a program from a file may call `torch.ops.<namespace>.<name>`.

    Allowed are torch's core operators, its pointwise ones, those that torch.export can write as such (its default decompositions), and the
    list above; of torchvision all. No argument may be called unsafe, and no argument names a file.

    Args:
        namespace: `aten`, `prims`, `torchvision`, or a package the user trusts.
        name: of the operator, without its overload.
        operator: the overload, or the packet of all.
    """
    schemas = [operator._schema] if hasattr(operator, "_schema") else [s for s in _schemas(operator)]
    if not schemas or any(
        fragment in argument.name for s in schemas for argument in s.arguments for fragment in ("file", "unsafe")
    ):
        return False
    if namespace != "aten":
        return True
    plain = name.rstrip("_") if not name.endswith("__") else name
    if _NEVER.search(name) and name not in _HARMLESS:
        return False
    return name in _MORE or name in _HARMLESS or name in _known() or plain in _known()


def _schemas(packet: Any) -> list[Any]:
    return (
        [getattr(packet, overload)._schema for overload in packet.overloads()] if hasattr(packet, "overloads") else []
    )


@cache
def _known() -> frozenset[str]:
    """Names of the `aten` operators that the installed torch marks as core, pointwise or decomposable."""
    import torch

    found = {str(op).split(".")[1] for op in torch.export.default_decompositions() if str(op).startswith("aten.")}
    for packet in (getattr(torch.ops.aten, name) for name in _every_name()):
        tags = {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}
        if tags & {torch.Tag.core, torch.Tag.pointwise}:
            found.add(packet.__name__)
    return frozenset(found)


def _every_name() -> list[str]:
    import torch

    schemas = torch._C._jit_get_all_schemas()
    return sorted({schema.name.partition("::")[2] for schema in schemas if schema.name.startswith("aten::")})
