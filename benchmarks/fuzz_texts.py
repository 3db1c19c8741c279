"""Damage plan files, spec strings and command lines at random: each must be taken or refused with a clear error.

    python benchmarks/fuzz_texts.py [--count 3000] [--seed 0] [--minutes 10] [--json FILE]

In one process, without a model: what is read here is read before any model is. A refusal is an `IndistillError`, for a
command line exit code 2 (or 0 for `--help`); anything else that is raised, exit code 1, or more than 60 s is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from indistill_fx.cli import run
from indistill_fx.cli.training import Numbers
from indistill_fx.errors import IndistillError
from indistill_fx.loading.inputs import parse_input
from indistill_fx.loading.spec import parse_spec
from indistill_fx.plan import AlignmentPlan, ModelStamp, Pair
from indistill_fx.runs.directory import STUDENT
from indistill_fx.runs.load import is_run, load_run
from indistill_fx.runs.signature import sign
from indistill_fx.system.terminal import printable

LIMIT_SECONDS = 60  # what is called a hang; imports are within it
ODD = (
    "\x00", "\x1b[2J", "\ud800", "\u202e", "\n", "'", '"', "@", "?", "&", "=", ":", "[", "{", "-", "--", "1e999", "9" * 5000, "null",
    "..",
)  # fmt: skip
SPECS = (
    "model.pt", "torchvision:resnet18?num_classes=10@w.pt", "timm:resnet10t", "models.py:make?width=16&depth=2", "pkg.models:make",
    "runs/first", "torchvision:resnet18", "a@b@c", "C:\\model.pt",
)  # fmt: skip
COMMANDS = (
    "align torchvision:nope torchvision:nope --pairs 3 --input 3x32x32", "inspect nope.pt --json", "prune nope.pt --ratio 0.5 -o out.pt2",
    "distill nope.pt nope.pt --data digits -o run --warmup 1,2", "train nope.pt --data digits -o run --epochs 1",
    "evaluate nope.pt --data digits -k 5", "export nope.pt -o x.onnx --int8", "report nope -o x.html", "bench nope.onnx --batch 1",
    "check nope.onnx --against nope.pt", "--help", "--version", "align --help",
)  # fmt: skip


def mutate(text: str, dice: random.Random) -> str:
    """Insert, repeat, delete, exchange, or cut off."""
    for _ in range(dice.choice((1, 1, 2, 4))):
        a, b = sorted(dice.randrange(len(text) + 1) for _ in range(2))
        how = dice.randrange(5)
        middle = ("", text[a:b] * 2, dice.choice(ODD), chr(dice.randrange(0x3000)), text[a:b][::-1])[how]
        text = text[:a] + middle + (text[a:] if how in (2, 3) else text[b:])
    return text


def mutate_tree(value: Any, dice: random.Random) -> Any:
    """One place in a JSON value replaced by something that does not belong there."""
    if isinstance(value, (dict, list)) and value and dice.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = dice.choice(keys)
        changed = dict(value) if isinstance(value, dict) else list(value)
        if dice.random() < 0.1:
            del changed[key]
        else:
            changed[key] = mutate_tree(value[key], dice)
        return changed
    odd = (
        None, -1, 0, 1.5, 10**12, float("nan"), "", "x" * 5000, [], {}, [[]], {"a": 1}, True, [value] * 3, ODD[dice.randrange(4)],
    )  # fmt: skip
    return dice.choice(odd)


def sample_plan() -> dict[str, Any]:
    shapes: dict[str, Any] = {"teacher_shape": (1, 8, 4, 4), "student_shape": (1, 4, 4, 4)}
    pairs = [Pair(teacher=f"layer{k}", student=f"s.{k}", kept=(0, 2, 3, 5), **shapes) for k in range(3)]
    stamp = ModelStamp(name="Net", fingerprint="0123456789abcdef")
    plan = AlignmentPlan(teacher=stamp, student=stamp, pairs=tuple(pairs), embedding=pairs[0], unmatched=("stage 4",))
    found: dict[str, Any] = json.loads(plan.model_dump_json())
    return found


def plan_case(dice: random.Random, folder: Path) -> str:
    path = folder / "plan.json"
    text = json.dumps(mutate_tree(sample_plan(), dice), indent=dice.choice((None, 2)))
    if dice.random() < 0.5:
        text = mutate(text, dice)
    path.write_text(text, encoding="utf-8", errors=dice.choice(("surrogatepass", "replace")))
    plan = AlignmentPlan.load(path)
    plan.save(path)
    if AlignmentPlan.load(path) != plan:
        raise AssertionError("a plan that was read is written as another")
    return "taken"


def spec_case(dice: random.Random, folder: Path) -> str:
    text = mutate(dice.choice(SPECS), dice)
    parse_spec(text)
    return "taken"


def option_case(dice: random.Random, folder: Path) -> str:
    with contextlib.suppress(IndistillError):
        parse_input(mutate("3x32x32", dice))
    Numbers(dice.choice((int, float))).convert(mutate("3,4,5", dice), None, None)
    return "taken"


def run_case(dice: random.Random, folder: Path) -> str:
    """A finished run whose run.json is anybody's; whatever model it names, only the one that was signed may be made."""
    spec = f"{folder}/net.py:make"
    if not (folder / STUDENT).exists():
        (folder / "net.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Linear(2, 2)\n")
        save_file(torch.nn.Linear(2, 2).state_dict(), folder / STUDENT)
    named = dice.choice((spec, spec, *SPECS))
    told = {
        "status": "done",
        "about": {"model": named, "input_size": [1, 8, 8], "seal": sign(parse_spec(spec)), "classes": ["a", "b"]},
        "resumed": 1,
    }
    text = json.dumps(mutate_tree(told, dice))
    (folder / "run.json").write_text(mutate(text, dice) if dice.random() < 0.5 else text, "utf-8", "replace")
    assert is_run(str(folder))
    if not isinstance(load_run(folder).module, torch.nn.Linear):
        raise TypeError("another model was made than the one that was sealed")
    return "taken"


def command_case(dice: random.Random, folder: Path) -> str:
    words = dice.choice(COMMANDS).split()
    for _ in range(dice.choice((0, 1, 1, 2))):
        place = dice.randrange(len(words))
        words[place : place + dice.randrange(2)] = [mutate(words[place], dice)]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), contextlib.chdir(folder):
        code = run([word for word in words if word])
    shown = text.getvalue()
    if code == 1 or "Traceback" in shown:
        raise AssertionError(f"exit code {code} for {words}: {shown[-300:]}")
    if shown != printable(shown):
        raise AssertionError(f"commands to the terminal for {words}")
    return f"exit code {code}"


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "plan": plan_case,
    "spec": spec_case,
    "option": option_case,
    "run.json": run_case,
    "command line": command_case,
}


@contextlib.contextmanager
def home(folder: Path) -> Iterator[None]:
    """The key that seals runs is a new one in this folder."""
    before = os.environ.get("HOME", "")
    os.environ["HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ["HOME"] = before


def fuzz(kind: str, count: int, seed: int) -> dict[str, Any]:
    """So many cases of a kind: what came of them, and the faults."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    tally: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as name, home(Path(name)):
        for number in range(count):
            signal.alarm(LIMIT_SECONDS)
            try:
                tally[KINDS[kind](random.Random(f"{seed}:{kind}:{number}"), Path(name))] += 1
            except IndistillError:
                tally["refused"] += 1
            except Exception as error:
                tally["fault"] += 1
                faults.append(
                    {
                        "seed": seed,
                        "case": number,
                        "fault": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300],
                    }
                )
            finally:
                signal.alarm(0)
    return {"count": count, **tally, "faults": faults}


def main() -> None:
    """Run, print, write; exit code 1 for a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="cases of each kind; of command lines a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=0, help="go on with the next seeds for so long")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    faults: list[dict[str, Any]] = []
    for seed in itertools.count(options.seed):
        for kind in KINDS:
            result = fuzz(kind, options.count // (10 if kind == "command line" else 1), seed)
            found = result.pop("faults")
            kinds[kind].update(result)
            faults += [{"kind": kind} | fault for fault in found]
            print(kind, result, *found[:10], sep="\n    ", flush=True)
        if time.monotonic() >= ends:
            break
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "seeds": [options.seed, seed],
        "kinds": kinds,
        "faults": faults,
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
