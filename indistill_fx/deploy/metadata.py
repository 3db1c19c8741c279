"""What a deployed file says about itself: which model, which weights, which run, which versions, and how to feed and read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from indistill_fx.system.terminal import one_line
from indistill_fx.version import __version__

Normalisation = tuple[Sequence[float], Sequence[float]]


def weights_digest(module: nn.Module) -> str:
    """Digest of the values of a module's parameters and floating buffers, whatever their names and order.

    So a module, and what a file or an archive makes of it, have the same; counters such as batches seen do not enter.
    """
    tensors = (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point()))
    digests = []
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        tensor_digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        tensor_digest.update(content)
        digests.append(tensor_digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def of_module(module: nn.Module) -> dict[str, str]:
    """What every exported file says: the model's class, the digest of its weights, and versions."""
    import onnx

    return {
        "model_class": one_line(type(module).__qualname__),
        "weights": weights_digest(module),
        "indistill_fx": __version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
    }


def of_source(
    *,
    model: str = "",
    run: str = "",
    classes: Sequence[str] = (),
    normalisation: Normalisation | None = None,
    task: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What the caller knows besides; what is not known is left out.

    Args:
        model: the spec it was loaded from.
        run: fingerprint of the run that trained it.
        classes: their names by label.
        normalisation: mean and standard deviation per channel of pixels scaled to 0..1.
        task: what labels mean, as plain values (`evaluation.kept_task`).
    """
    entries: Mapping[str, str] = {
        "model": model,
        "run": run,
        "classes": json.dumps(list(classes)) if classes else "",
        "mean": json.dumps(list(normalisation[0])) if normalisation else "",
        "std": json.dumps(list(normalisation[1])) if normalisation else "",
        "task": json.dumps(dict(task)) if task else "",
    }
    return {key: one_line(value) for key, value in entries.items() if value}
