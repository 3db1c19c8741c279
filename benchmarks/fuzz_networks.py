"""Random networks through the whole compiler: every number that comes out is compared with one got another way.

    python benchmarks/fuzz_networks.py [--cases 2000] [--minutes 10] [--seed 0] [--export-every 40] [--json FILE --resume]
    python benchmarks/fuzz_networks.py --case 137 [--seed 0]      one case again, with its traceback

A case is a teacher and a student (`random_networks.py`) in float64. What is checked, in the order of the way:

  trace    the graph computes what the module does at a batch size it was not traced with; the module is as it was
  taps     `instrument` delivers what a forward hook sees, also where a later operation writes in place
  align    the plan survives its file and fits its models; pairs do not cross
  narrow   every narrowed feature is the whole one at the kept channels, of the plan's pairs and of channels at random
  shrink   the sliced network is the original whose readers ignore what was removed
  source   the shrunk network and the student as source code compute what the graphs do, to the bit: outputs and gradients, both modes;
           not of networks that recompute weights, which `compress` writes out first
  cut      a graph that ends at a tap delivers the same feature
  stage    loss and gradients of every warm-up stage are those of both whole networks with the features picked by hand
  export   (of some) onnxruntime computes what the trained student does; `export_onnx` itself compares at three sizes

A refusal of ours (`IndistillError`) is counted by its kind and reason; anything else that is raised, a wrong number, or
a case of more than 60 s of the processor is a fault. With --json and --resume it goes on where the file ends.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from random_networks import BLOCKS, Recipe, build, recipes
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import IndistillError
from indistill_fx.graph.computed_weights import is_computed, left_behind
from indistill_fx.graph.edit import copy_graph
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.traced import NodeFacts, TracedModel
from tests.numerics.masked_reference import run_masked

LIMIT_SECONDS = 60
"""Of the processor: the machine may have other work."""
STEPS = ("trace", "taps", "align", "narrow", "shrink", "source", "cut", "stage", "export")


class WrongError(Exception):
    """A number is not what it should be."""


def same(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Equal up to the round-off of float64; a tolerance relative to the largest value."""
    if got.shape != wanted.shape:
        raise WrongError(f"{what}: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}")
    if wanted.numel() == 0:
        return
    largest = float(wanted.abs().max())
    worst = float((got - wanted).abs().max())
    if not worst <= tolerance * max(largest, 1e-3):
        raise WrongError(f"{what}: off by {worst:.3g} of {largest:.3g}")


def images(recipe: Recipe, batch: int, seed: int) -> Tensor:
    """Normal noise."""
    return torch.randn(batch, 3, *recipe.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """One teacher and one student on their way; `done` says which steps were checked, `refused` which were not."""

    def __init__(self, seed: int, number: int, *, export: bool):
        self.dice, self.exports = random.Random(f"{seed}:{number}:checks"), export
        self.recipes = recipes(seed, number)
        self.done: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self.compared = 0

    def run(self) -> None:
        """All the steps; one that refuses leaves out those that need it."""
        self.modules = [build(recipe) for recipe in self.recipes]
        self.x = images(self.recipes[0], 2, 0)
        if not self._step("trace", self._trace):
            return
        self._step("taps", self._taps)
        aligned = self._step("align", self._align)
        self._step("narrow", self._narrow)
        written = [not any(map(is_computed, module.modules())) for module in self.modules]
        if self._step("shrink", self._shrink) and written[0]:
            self._step("source", lambda: self._source(self.small))
        if written[1]:
            self._step("source", lambda: self._source(self.student))
        self._step("cut", self._cut)
        if aligned:
            self._step("stage", self._stage)
        if self.exports:
            self._step("export", self._export)

    def _step(self, name: str, check: Callable[[], None]) -> bool:
        try:
            check()
        except IndistillError as error:
            self.refused.append((name, f"{type(error).__name__}: {error}"))
            return False
        except WrongError as error:
            raise WrongError(f"{name}: {error}") from error
        self.done.append(name)
        return True

    def _trace(self) -> None:
        found = []
        for module, role in zip(self.modules, ("teacher", "student"), strict=True):
            module.train(role == "student")
            before = digest(module)
            traced = ifx.trace(module, self.x, role=role)  # type: ignore[arg-type]
            if digest(module) != before:
                raise WrongError(f"tracing changed the {role}")
            x = images(self.recipes[0], 3, 1)
            with torch.no_grad():
                wanted = self._silently(module, x)
                same(self._silently(traced.graph_module, x, module), wanted, role)
            if role == "student":
                module.eval()
                with torch.no_grad():
                    wanted = self._silently(module, x)
                    same(self._silently(traced.graph_module, x, module), wanted, "student in eval mode")
                module.train()
            found.append(traced)
        self.teacher, self.student = found
        self.values = values_of(self.teacher, self.x)

    def _silently(self, function: nn.Module, x: Tensor, owner: nn.Module | None = None) -> Tensor:
        """The output, with statistics as before and dropout the same each time."""
        buffers = [(buffer, buffer.clone()) for buffer in (owner or function).buffers()]
        torch.manual_seed(7)
        result: Tensor = function(x)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return result

    def _taps(self) -> None:
        module, model = self.modules[0], self.teacher
        calls: Counter[str] = Counter()
        seen: dict[str, Tensor] = {}

        def hook(path: str) -> Callable[..., None]:
            def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
                calls[path] += 1
                if isinstance(output, Tensor):
                    seen[path] = output.clone()

            return note

        handles = [part.register_forward_hook(hook(path)) for path, part in module.named_modules() if path]
        with torch.no_grad():
            module(self.x)
        for handle in handles:
            handle.remove()
        wanted = {path: value for path, value in seen.items() if calls[path] == 1 and path in model.taps}
        if not wanted:
            raise WrongError("no module of the teacher is a tap")
        with torch.no_grad():
            features, output = ifx.instrument(model, list(wanted))(self.x)
            same(output, self._silently(module, self.x), "output")
        for path, value in wanted.items():
            same(features[path], value, path)
        self.compared += len(wanted)

    def _align(self) -> None:
        options: dict[str, Any] = self.dice.choice(
            ({}, {}, {"every_block": True}, {"taps": "pre-activation"}, {"taps": "last-conv"}, {"criterion": "l2"})
        )
        self.plan = ifx.align(self.teacher, self.student, **options)
        with tempfile.TemporaryDirectory() as folder:
            self.plan.save(Path(folder) / "plan.json")
            if ifx.AlignmentPlan.load(Path(folder) / "plan.json") != self.plan:
                raise WrongError("the plan's file is another plan")
        self.plan.check(self.teacher, self.student)

    def _narrow(self) -> None:
        wishes: list[dict[str, list[int]]] = []
        if hasattr(self, "plan"):
            wishes.append({pair.teacher: list(pair.kept) for pair in self.plan.pairs if pair.kept is not None})
        facts = self.teacher.facts
        legal = [names[0] for node, names in self.teacher.aliases.items() if _channels(facts.get(node)) > 1]
        wishes.append(
            {
                tap: self._some(_channels(self.teacher.facts_of(tap)))
                for tap in self.dice.sample(legal, min(4, len(legal)))
            }
        )
        for kept in filter(None, wishes):
            slim = ifx.narrow(self.teacher, kept=kept).value
            with torch.no_grad():
                features, output = ifx.instrument(slim, list(kept))(self.x)
                same(output, self.teacher.graph_module(self.x), "output of the narrowed teacher")
            for tap, channels in kept.items():
                axis = self.teacher.facts_of(tap).channel_axis
                whole = self.values[self.teacher.node(tap).name]
                same(features[tap], whole.index_select(axis, torch.tensor(channels)), f"{tap} at {channels}")
            self.compared += len(kept)

    def _some(self, count: int) -> list[int]:
        return sorted(self.dice.sample(range(count), self.dice.randint(1, count)))

    def _shrink(self) -> None:
        wish: dict[str, Any] = self.dice.choice(
            ({"ratio": 0.5}, {"ratio": 0.3}, {"ratio": 0.8}, {"macs": 0.5}, {"params": 0.5})
        )
        result = ifx.shrink(self.teacher, **wish)
        self.small = result.value
        before = digest(self.modules[0])
        with torch.no_grad():
            got = result.value.graph_module(self.x)
        wanted = run_masked(self.teacher, result.report, self.x)
        same(got, wanted, f"shrunk by {wish}")
        if digest(self.modules[0]) != before:
            raise WrongError("shrinking changed the teacher")
        small = result.value.graph_module.train()
        small(images(self.recipes[0], 3, 2)).sum().backward()
        self.compared += sum(len(layer.kept) < layer.of for layer in result.report.layers)

    def _source(self, model: TracedModel) -> None:
        graph, written = copy_graph(model.graph_module)[0], source_of(model).build()
        for training in (False, True):
            sides = [self._results(module, training) for module in (graph, written)]
            if len(sides[0]) != len(sides[1]) or not all(map(torch.equal, *sides)):
                raise WrongError(f"{model.role} in {'train' if training else 'eval'} mode")
            self.compared += len(sides[0])

    def _results(self, module: nn.Module, training: bool) -> list[Tensor]:
        """The output and all gradients, those of the parameters by shape and sum: source code may have other names."""
        flags = {part: part.training for part in module.modules()}
        for part in flags:
            part.training = training
        x = images(self.recipes[0], 3, 5).requires_grad_()
        parameters = list(module.parameters())
        wanted = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_()
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        torch.manual_seed(13)
        output = module(x)
        found = torch.autograd.grad(output.square().sum(), [x, *parameters], allow_unused=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
        for part, flag in flags.items():
            part.training = flag
        grads = [grad for grad in found[1:] if grad is not None]
        own = [] if found[0] is None else [found[0]]
        return [output.detach(), *own, *sorted(grads, key=lambda g: (tuple(g.shape), float(g.sum())))]

    def _cut(self) -> None:
        taps = [names[0] for names in self.teacher.aliases.values()]
        for tap in self.dice.sample(taps, min(3, len(taps))):
            with torch.no_grad():
                features, rest = cut(self.teacher, [tap]).value(self.x)
            if rest is not None:
                raise WrongError("a cut graph has an output")
            same(features[tap], self.values[self.teacher.node(tap).name], f"cut at {tap}")
            self.compared += 1

    def _stage(self) -> None:
        stages = ifx.compile_stages(self.teacher, self.student, self.plan, main="kd")
        module, x = self.modules[1], images(self.recipes[0], 3, 3)
        with torch.no_grad():
            teacher_side = values_of(self.teacher, x)
        for stage, pair in zip(stages, self.plan.pairs, strict=False):
            stage.train()
            got = self._gradients(module, lambda stage=stage: stage(x))
            wanted = self._gradients(module, lambda pair=pair: self._reference(pair, teacher_side, x))
            same(got[0], wanted[0], f"loss of {stage.name}", 1e-7)
            for name, value in wanted[1].items():
                if (value is None) != (got[1][name] is None):
                    raise WrongError(f"gradient of {name} in {stage.name} is there on one side only")
            scale = max(float(value.abs().max()) for value in wanted[1].values() if value is not None)
            for name, value in wanted[1].items():
                if value is not None and float((value - got[1][name]).abs().max()) > 1e-7 * max(scale, 1e-6):
                    raise WrongError(f"gradient of {name} in stage {stage.name}")
            self.compared += 1
        loss = stages[-1].train()((x, torch.arange(3) % 5))
        if not bool(torch.isfinite(loss)):
            raise WrongError(f"the main loss is {float(loss)}")
        loss.backward()

    def _gradients(self, module: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        module.zero_grad()
        torch.manual_seed(11)
        value = loss()
        value.backward()
        found = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        module.zero_grad()
        return value.detach(), found

    def _reference(self, pair: ifx.Pair, teacher_side: dict[str, Tensor], x: Tensor) -> Tensor:
        """The pair's loss by hand: both whole networks, then the kept channels, then one common form."""
        node, own = self.teacher.node(pair.teacher).name, self.student.node(pair.student).name
        wanted, facts = teacher_side[node], (self.teacher.facts[node], self.student.facts[own])
        if pair.kept is not None:
            wanted = wanted.index_select(facts[0].channel_axis, torch.tensor(pair.kept))
        feature = values_of(self.student, x)[own]
        sides = [_batch_first(*side) for side in ((feature, facts[1]), (wanted, facts[0]))]
        return F.mse_loss(*alike(sides[0][0], sides[1][0], sides[0][1], sides[1][1]))

    def _export(self) -> None:
        """After a few steps of training in float32, as a user would, where torch itself can train the network."""
        module = copy.deepcopy(self.modules[1], dict(left_behind(self.modules[1]))).float().train()
        optimizer = torch.optim.SGD(module.parameters(), 1e-3)
        for step in range(2):
            try:
                module(images(self.recipes[1], 4, step).float()).square().mean().backward()
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                break  # the network overwrites in place what its own gradients need
            optimizer.step()
            optimizer.zero_grad()
        module.eval()
        with tempfile.TemporaryDirectory() as folder:
            import onnxruntime

            x = images(self.recipes[1], 2, 9).float()
            report = ifx.export_onnx(module, Path(folder) / "student.onnx", x)
            session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
            (got,) = session.run(None, {report.input_names[0]: x.numpy()})
        with torch.no_grad():
            same(torch.from_numpy(got), module(x), "onnxruntime", 1e-4)
        self.compared += len(report.parity)


def _channels(facts: NodeFacts | None) -> int:
    return 0 if facts is None or facts.channel_axis is None else facts.channels


def values_of(model: TracedModel, x: Tensor) -> dict[str, Tensor]:
    """Every tensor of the whole graph."""
    return run_keeping(model.graph_module, [node.name for node in model.graph_module.graph.nodes], x)[1]


def _batch_first(value: Tensor, facts: NodeFacts) -> tuple[Tensor, NodeFacts]:
    batch, channels = facts.batch_axis or 0, facts.channel_axis or 0
    moved = [facts.shape[batch], *facts.shape[:batch], *facts.shape[batch + 1 :]]
    axis = channels + (channels < batch)
    return value.movedim(batch, 0), replace(facts, shape=tuple(moved), batch_axis=0, channel_axis=axis)


def alike(own: Tensor, other: Tensor, own_facts: NodeFacts, other_facts: NodeFacts) -> tuple[Tensor, Tensor]:
    """Two features in one form, rewritten here: channels first, tokens as a square map, the larger one pooled."""
    sides = []
    for value, facts, partner in ((own, own_facts, other_facts), (other, other_facts, own_facts)):
        first = facts.channel_axis == 1
        if not first and (facts.kind, first, facts.space) != (partner.kind, partner.channel_axis == 1, partner.space):
            value = value.movedim(facts.channel_axis or -1, 1)
            first = True
        if facts.kind == "tokens" and partner.kind == "map":
            side = int(value.shape[2] ** 0.5)
            value = value[:, :, -side * side :].reshape(*value.shape[:2], side, side)
        sides.append((value, first))
    (a, first), (b, _) = sides
    if first and a.shape[2:] != b.shape[2:]:
        smaller = [min(pair) for pair in zip(a.shape[2:], b.shape[2:], strict=True)]
        pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d}[len(smaller)]
        a, b = (value if list(value.shape[2:]) == smaller else pool(value, smaller) for value in (a, b))  # type: ignore[operator]
    axis = 1 if first else a.dim() - 1
    return a.narrow(axis, 0, min(a.shape[axis], b.shape[axis])), b


class TooLongError(BaseException):
    """The alarm: not an Exception, so that nothing on the way takes it for its own."""


def run_case(seed: int, number: int, *, export: bool) -> tuple[Case, str, float]:
    """A case, what went wrong (nothing: an empty text), and the seconds it took."""

    def ring(*_: Any) -> None:
        raise TooLongError

    case, fault, began = Case(seed, number, export=export), "", time.process_time()
    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run()
    except TooLongError:
        fault = f"more than {LIMIT_SECONDS} s"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"[:300]
        case.trace = traceback.format_exc()  # type: ignore[attr-defined]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return case, fault, time.process_time() - began


def empty(seed: int) -> dict[str, Any]:
    """A record of no cases."""
    counts: dict[str, Any] = {"cases": 0, "networks": 0, "compared": 0, "seconds": 0.0, "slowest": 0.0}
    return {"seed": seed, **counts, "checked": {}, "blocks": {}, "refused": {}, "faults": []}


def add(record: dict[str, Any], number: int, case: Case, fault: str, seconds: float) -> None:
    """One more case."""
    record["cases"], record["networks"] = record["cases"] + 1, record["networks"] + 2
    record["compared"] += case.compared
    record["seconds"] = round(record["seconds"] + seconds, 2)
    record["slowest"] = round(max(record["slowest"], seconds), 2)
    checked = Counter(record["checked"]) + Counter(case.done)
    record["checked"] = {step: checked[step] for step in STEPS}
    kinds = Counter(kind for recipe in case.recipes for stage in recipe.blocks for kind in stage)
    record["blocks"] = dict(sorted((Counter(record["blocks"]) + kinds).items()))
    for step, reason in case.refused:
        plain = f"{step}: " + re.sub(r"`[^`]*`|'[^']*'|\d[\d.,x]*", "…", reason)[:150]
        record["refused"][plain] = record["refused"].get(plain, 0) + 1
    if fault:
        record["faults"].append({"case": number, "fault": fault[:400]})


def main() -> None:
    """Run, print, write; exit code 1 for a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many in all")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-every", type=int, default=40, metavar="N", help="export every Nth student; 0: none")
    parser.add_argument("--case", type=int, help="only this one, and say all of it")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="go on where FILE ends")
    parser.add_argument(
        "--again",
        action="store_true",
        help="run the faulty cases of FILE again; those without a fault now are `mended`",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case is not None:
        case, fault, seconds = run_case(options.seed, options.case, export=True)
        print(*case.recipes, f"checked: {case.done}; refused: {case.refused}; {seconds:.1f} s", sep="\n")
        print(fault or "no fault", getattr(case, "trace", ""), sep="\n")
        sys.exit(bool(fault))
    record = empty(options.seed)
    if options.resume and options.json and options.json.exists():
        record = json.loads(options.json.read_text())
    if options.again:
        record = json.loads(options.json.read_text())
        for known in tuple(record["faults"]):
            if not (fault := run_case(record["seed"], known["case"], export=False)[1]):
                record["faults"].remove(known)
                record.setdefault("mended", []).append(known)
            print(f"case {known['case']}: {fault or 'no fault any more'}", flush=True)
        options.cases = 0
    ends = time.monotonic() + 60 * options.minutes
    while record["cases"] < options.cases and time.monotonic() < ends:
        number = record["cases"]
        export = bool(options.export_every) and number % options.export_every == 0
        case, fault, seconds = run_case(options.seed, number, export=export)
        add(record, number, case, fault, seconds)
        if fault:
            print(f"case {number}: {fault}", flush=True)
        if number % 25 == 24 and options.json:
            write(record, options.json)
    if options.json:
        write(record, options.json)
    shown = {key: value for key, value in record.items() if key not in ("blocks",)}
    print(json.dumps(shown, indent=1))
    missing = sorted(set(BLOCKS) - set(record["blocks"]))
    print(f"kinds of blocks never drawn: {', '.join(missing) or 'none'}")
    sys.exit(bool(record["faults"]))


def write(record: dict[str, Any], path: Path) -> None:
    """With versions and date."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "indistill-fx": ifx.__version__}
    path.write_text(
        json.dumps({"date": datetime.now(UTC).isoformat(timespec="seconds"), **versions, **record}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
