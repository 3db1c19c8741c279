"""Save a graph as a `torch.export` archive (.pt2): weights and program in one file that needs none of our code."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.errors import ExportError
from indistill_fx.graph.edit import batch_size
from indistill_fx.graph.module_state import mode
from indistill_fx.system.files import staged


def save_program(module: nn.Module, example_inputs: tuple[Any, ...], path: str | os.PathLike[str]) -> Path:
    """Export a module in eval mode with an open batch size, and write it at once or not at all.

    Args:
        module: what to save; its training flags are put back.
        example_inputs: one forward call's arguments, batch first.
        path: the .pt2 file.

    Returns:
        The path.

    Raises:
        ConfigError: the file cannot be written.
        ExportError: torch.export cannot capture the module.
    """
    target = Path(path)
    size = batch_size(example_inputs)
    pairs = tuple(
        torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value for value in example_inputs
    )
    batch = torch.export.Dim("batch")
    shapes = tuple(
        {0: batch} if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else None
        for value in example_inputs
    )
    with staged(target) as draft:
        with mode(module, training=False):
            try:
                program = torch.export.export(module, pairs, dynamic_shapes=shapes)
            except Exception as error:  # the captured code may raise anything
                raise ExportError(
                    f"torch.export cannot capture the model: {type(error).__name__}: {str(error).splitlines()[0]}",
                    where=str(target),
                    hint="Save the weights alone, and load them with the model's code: file.py:make@weights.safetensors.",
                ) from error
        content = io.BytesIO()  # torch.export.save into a file ends the process if the disk is full
        torch.export.save(program, content)
        draft.write_bytes(content.getbuffer())
    return target
