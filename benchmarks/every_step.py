"""One model of somebody else's through trace, shrink, student.py and ONNX, and the table of many (hugging_face.py, libraries.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from page import put_between
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import indistill_fx as ifx
from indistill_fx.compression.basis import in_both_modes
from indistill_fx.compression.write_source import source_of
from indistill_fx.graph.caches import no_generation_cache

Example = Mapping[str, Tensor] | Sequence[Tensor]


def without_neutral_values(model: nn.Module) -> nn.Module:
    """The model in eval mode; biases, norms' weights and batch norms' statistics are random, so that none hides an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def every_step(model: nn.Module, example: Example, other: Example) -> dict[str, Any]:
    """What became of each step; the first that fails ends it, with the reason.

    Args:
        model: in eval mode.
        example: its inputs, by name or in order; a batch of two.
        other: inputs with other data, another batch.
    """
    began, found = time.perf_counter(), dict[str, Any]()
    try:
        traced = ifx.trace(model, example)
        found |= {"method": traced.report.method, "leaves": list(traced.report.leaves)}
        with no_generation_cache(model):
            wanted = _call(model, other)
        got = _call_graph(traced.graph_module, other, example)
        found["off"] = max(
            float((a - b).abs().max() / (a.abs().max() + 1e-9)) for a, b in zip(wanted, got, strict=True)
        )
        small = ifx.shrink(in_both_modes(traced), ratio=0.5)
        found["macs"] = round(small.report.macs[1] / small.report.macs[0], 3)
        found["frozen"] = [entry.reason for entry in small.report.frozen if entry.reason != "an output of the network"]
        written = source_of(small.value)
        student = written.build().eval()
        sides = _call_graph(small.value.graph_module.eval(), example, example), _call(student, example)
        found["source"] = all(torch.equal(a, b) for a, b in zip(*sides, strict=True))
        found["lines"] = len(written.text.splitlines())
        with TemporaryDirectory() as folder:
            found["onnx"] = ifx.export_onnx(model, f"{folder}/m.onnx", example, batch_sizes=(1, 3)).max_abs
    except ifx.IndistillError as error:
        found["error"] = str(error)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _call(module: nn.Module, given: Example) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(module(**given) if isinstance(given, Mapping) else module(*given))


def _call_graph(graph: nn.Module, given: Example, example: Example) -> list[Tensor]:
    """A graph's outputs; it takes the inputs in the order of the forward's arguments."""
    if not isinstance(given, Mapping):
        return _call(graph, given)
    names = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]  # type: ignore[union-attr, operator]
    return _call(graph, [given[name] for name in (names if set(names) == set(example) else example)])


def write_table(file: str, record: Mapping[str, Any], first: str, *, marks: tuple[str, str], into: str | None) -> None:
    """The results as Markdown: printed, or in their place in a page.

    Args:
        file: where the record lies, for the last line.
        record: `models` (by name, what `every_step` found), `date` and `versions`.
        first: the sentence before it says how many went all the way.
        marks: of the place's beginning and end.
        into: the page.
    """
    models: Mapping[str, dict[str, Any]] = record["models"]
    done = {name: row for name, row in models.items() if "error" not in row and not row.get("leaves")}
    lines = [
        first,
        f"{len(done)} go all the way: halved, written as `student.py` ({sum(row['source'] for row in done.values())} equal to the bit) "
        "and exported to ONNX.",
        "",
        "| model | multiply-accumulates of the halved one | lines of student.py | not whole, or not finished |",
        "|---|---|---|---|",
    ]
    for name, row in models.items():
        share = f"{row['macs']:.0%}" if "macs" in row else ""
        whole = row.get("leaves", [])
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        why = f"{', '.join(whole[:3])}{more} stay{'s' if len(whole) == 1 else ''} one node. " if whole else ""
        reason = row.get("error", "").split(". ")[0].replace("|", "\\|")
        lines.append(f"| {name} | {share} | {row.get('lines', '')} | {why}{reason} |")
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    lines += ["", f"({Path(file).name}, {record['date']}; {versions})"]
    text = "\n".join(lines)
    if into is None:
        print(text)
        return
    put_between(Path(into), *marks, text)
