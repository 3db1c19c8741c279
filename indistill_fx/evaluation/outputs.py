"""What a model returns for a batch, and which part of it holds the logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from indistill_fx.errors import ConfigError
from indistill_fx.graph.main_output import as_key, main_output
from indistill_fx.passes.capture.equivalence import other_dtype
from indistill_fx.system.call import Call
from indistill_fx.system.shortage import is_out_of_memory


def select_logits(outputs: Any, logits: str | int | None = None) -> Tensor:
    """The logits in a model's output.

    Args:
        outputs: a tensor, or a dict, tuple or object with attributes.
        logits: the key or place, also as a text of digits; None: the entry called `logits` or `out`. Not read where the output is one
            tensor, so that it may serve for a teacher and a student of which only one returns several.

    Returns:
        (batch, …): what it means is the task's.

    Raises:
        ConfigError: there is no such entry, or it is not a tensor.
    """
    value = main_output(outputs)
    if logits is not None and not isinstance(outputs, Tensor):
        key = as_key(logits, outputs)
        try:
            value = outputs[key]
        except (KeyError, IndexError, TypeError):
            value = getattr(outputs, str(key), None)
    if isinstance(value, Tensor) and value.ndim:
        return value
    raise ConfigError(
        f"The model gives {_shown(outputs)}, "
        + ("not logits." if logits is None else f"in which {logits!r} is not the logits."),
        where="logits",
        got=type(value).__name__,
        expected="a tensor (batch, …)",
        hint=_DETECTOR if is_of_samples(outputs) else "Say which entry holds the logits: logits=KEY (--logits KEY).",
    )


_DETECTOR = (
    "It is a detector, whose boxes no task of ours measures: use your own metric, such as torchmetrics' MeanAveragePrecision. "
    "What can be trained, compressed and exported here is what returns tensors for the whole batch: its backbone, by a function in a file "
    "that returns model.backbone. The detector's own loss can be the main loss of a distillation: examples/detection.py."
)


def is_of_samples(outputs: Any) -> bool:
    """Whether a model returns a dict for each sample, as detectors do."""
    return isinstance(outputs, list | tuple) and bool(outputs) and all(isinstance(entry, Mapping) for entry in outputs)


def _shown(outputs: Any) -> str:
    """What kind of thing a model returns."""
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}"
    if isinstance(outputs, Mapping):
        return f"a dict of {', '.join(map(str, outputs))}"
    if is_of_samples(outputs):
        return f"a dict of {', '.join(map(str, outputs[0]))} for each sample"
    if isinstance(outputs, list | tuple) and not hasattr(outputs, "_fields"):
        shapes = (
            "x".join(map(str, entry.shape)) if isinstance(entry, Tensor) else type(entry).__name__ for entry in outputs
        )
        return f"a {type(outputs).__name__} of {', '.join(shapes)}"
    return f"a {type(outputs).__name__}"


_MADE_FOR_OTHERS = "If it was made for other images, convert these (--size, --channels), or use another data set."
_FIXED = re.compile(r"shape\[0\] to be equal to (\d+)")
_OPEN = "torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))"
_CAPTURED = " It is a captured graph: if the original model takes these inputs, this is a bug in indistill-fx; please report it."


def outputs_of(module: nn.Module | Callable[..., Any], call: Call) -> Any:
    """The model's outputs.

    Args:
        module: the model.
        call: its inputs.

    Raises:
        ConfigError: the model fails on these inputs. If it is a captured graph, the message says that the bug may be ours.
    """
    try:
        return call(module)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        given = call.tensors
        shapes = ", ".join(str(tuple(value.shape)) for value in given)
        name = type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__qualname__", "The model")
        if isinstance(module, fx.GraphModule) and (fixed := _FIXED.search(str(error))) is not None:
            raise ConfigError(
                f"The exported program takes only batches of {fixed[1]}, but got one of {shapes}.",
                where="inputs",
                got=shapes,
                hint=f"Export it again with an open batch, x having at least two samples: {_OPEN}.",
            ) from error
        raise ConfigError(
            f"{name} fails on inputs of shape {shapes}: {str(error).partition(chr(10))[0].rstrip('.')}.",
            where="inputs",
            got=shapes,
            hint=(other_dtype(module, given, str(error)) if isinstance(module, nn.Module) else None)
            or _MADE_FOR_OTHERS + (_CAPTURED if isinstance(module, fx.GraphModule) else ""),
        ) from error
