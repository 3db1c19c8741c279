"""Random numbers that a forward uses outside tensors: a graph would repeat the first draw.

Rules, in order:
  1. Memory that an operation with a random result has written holds drawn numbers, and so does all that is computed from it.
  2. A draw that stays in tensors is a node, which draws anew each time the graph runs. Once code takes it out of a tensor (`item`, `if`,
     `tolist`, a size), what it does with it is the same at every run of the graph; so that code must run itself.
  3. What Python's and numpy's generators draw is outside tensors from the first. Where a capture leaves another state in one of them,
     code is recorded once more, and the states are compared after each line of it, so that the line is known. A state that
     changes once, and not again at the same place, is not that line's doing (another thread's, say): a line counts once two recordings
     have found it.
"""

from __future__ import annotations

import linecache
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from indistill_fx import errors
from indistill_fx.graph.caches import Reach, generators_of, reach_of
from indistill_fx.system.random_state import seed_torch, set_state_of, state_of

_UNTAGGED = frozenset({"random", "random_", "binomial", "_sample_dirichlet"})
"""Operations that draw, and of which torch does not say so."""
_LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, np.__file__, errors.__file__))
_PACKAGES, _STDLIB = sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]


class TensorDraws(TorchDispatchMode):
    """Follows drawn numbers through all that is computed inside it: rule 1.

    Args:
        drawing: called before each draw.

    Attributes:
        taken: how many times a number was taken out of a tensor that holds drawn ones.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else the first operation inside it imports torch's compiler
        return False

    def __init__(self, drawing: Callable[[], None] = lambda: None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawing, self.taken = drawing, 0
        self._drawn: set[StorageWeakRef] = set()
        self._of_drawn_size: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch calls this instead of each of its operations."""
        kwargs = kwargs or {}
        draws = _draws(func, args, kwargs)
        if draws:
            self.drawing()
        with torch._C.DisableTorchFunction():  # what no function mode has seen from outside, none shall see from here
            result = func(*args, **kwargs)
        if not draws and not self._drawn:
            return result
        given = _storages((args, kwargs))
        if draws or not self._drawn.isdisjoint(given):
            self._drawn |= _storages(result)
            self.taken += any(isinstance(leaf, (bool, int, float, complex)) for leaf in tree_leaves(result))
            if not self._drawn.isdisjoint(_storages(_sizing(func, args))) or not self._of_drawn_size.isdisjoint(given):
                self._of_drawn_size |= _storages(result)
        return result

    def holds(self, value: Any) -> bool:
        """Whether a tensor in it holds drawn numbers."""
        return bool(self._drawn) and not self._drawn.isdisjoint(_storages(value))

    def sized(self, value: Any) -> bool:
        """Whether the size of a tensor in it was drawn."""
        return bool(self._of_drawn_size) and not self._of_drawn_size.isdisjoint(_storages(value))

    def size_taken(self, value: Any) -> None:
        """Note that the sizes of the tensors in it were drawn."""
        self._of_drawn_size |= _storages(value)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation draws. Attention, layers and dropout that may drop, but not in this call, do not."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return _name(func) in _UNTAGGED
    expected = func._schema.arguments
    given = {argument.name: argument.default_value for argument in expected}
    given |= dict(zip((argument.name for argument in expected), args, strict=False)) | kwargs
    trains = given.get("train", given.get("training"))
    dropped = given.get("dropout_p", given.get("dropout", given.get("p") if "train" in given else None))
    return trains is not False and dropped != 0


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func)).partition(".")[0]


def _sizing(func: Any, args: Any) -> list[Any]:
    """The tensors whose values decide the result's size: of a mask, what says yes or no, and not what it chooses from."""
    if torch.Tag.dynamic_output_shape not in getattr(func, "tags", ()):
        return []
    if _name(func) not in ("index", "masked_select"):
        return tree_leaves(args)
    return [leaf for leaf in tree_leaves(args[1:]) if leaf is not None and leaf.dtype in (torch.bool, torch.uint8)]


def _storages(value: Any) -> set[StorageWeakRef]:
    with torch._C.DisableTorchFunction():
        return {
            StorageWeakRef(leaf.untyped_storage())
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor) and torch._C._has_storage(leaf)
        }


class Generators:
    """Python's and numpy's random generators, and all others that a module holds or that its code names.

    Args:
        module: whose forward will run.
        reach: what its code can reach, if that is known.

    Attributes:
        drawn: whether a forward was seen to draw from one of them.
    """

    def __init__(self, module: nn.Module, reach: Reach | None = None):
        self._generators = generators_of(module, reach or reach_of(module))
        self._first = self.states()
        self.drawn = False

    def states(self) -> list[bytes]:
        """Their states now."""
        return [state_of(generator) for generator in self._generators]

    def restart(self) -> None:
        """Seed torch, and give all others the states that they had at first."""
        seed_torch(0)
        for generator, state in zip(self._generators, self._first, strict=True):
            set_state_of(generator, state)


class Lines:
    """Finds the lines of code that draw from some generators, if a forward was seen to draw from them: rule 3.

    Args:
        generators: these.

    Attributes:
        paused: whether the code that runs may draw, because it stays one node.
        used: whether it was entered, so that draws are found once it is known that there are some.
        suspects: the places where an earlier recording has found a draw; only these are told as found.
    """

    def __init__(self, generators: Generators | None = None):
        self.generators = generators
        self.paused = self.used = self.active = False
        self.suspects: set[tuple[str, str]] = set()
        self._met: set[tuple[str, str]] = set()
        self._place: tuple[str, str] | None = None
        self._last: FrameType | None = None
        self._line = 0
        self._states: list[bytes] = []

    def __enter__(self) -> Lines:
        self.used = True
        if self.generators is not None and self.generators.drawn:
            self.active, self._place, self._last, self._states = True, None, None, self.generators.states()
            self._before = sys.gettrace()
            sys.settrace(self._after_line)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.active:
            sys.settrace(self._before)
            self.active = False

    def found(self) -> tuple[str, str] | None:
        """File and line, and the code there, of the first draw since the last call, if an earlier recording has found it, too."""
        if self.active:
            self._look()
        place, self._place = self._place, None
        return place

    def skip(self) -> None:
        """What was drawn since the generators were last looked at counts no more."""
        self._drawn()
        self._place = None

    def leaf_draws(self, path: str) -> bool:
        """Whether the module at this path, which stays one node, has drawn since the last look, now and in an earlier recording."""
        drawn, self._place = self._drawn(), None
        return drawn and self._was_met((path, ""))

    def suspect(self, path: str) -> None:
        """The module at this path is known to draw."""
        self.suspects.add((path, ""))

    def has_news(self) -> bool:
        """Whether draws were found that no recording before the last call has found; they are suspects from now on."""
        news = not self._met <= self.suspects
        self.suspects |= self._met
        return news

    def _drawn(self) -> bool:
        if not self.active or self.generators is None:
            return False
        before, self._states = self._states, self.generators.states()
        return before != self._states

    def _was_met(self, place: tuple[str, str]) -> bool:
        self._met.add(place)
        return place in self.suspects

    def _look(self) -> None:
        if self._drawn() and self._place is None and self._was_met(place := self._place_of_last()):
            self._place = place

    def _place_of_last(self) -> tuple[str, str]:
        if self._last is None:
            return "unknown place", ""
        code = self._last.f_code
        text = linecache.getline(code.co_filename, self._line, self._last.f_globals).strip()
        return f"{Path(code.co_filename).name}:{self._line}", text

    def _after_line(self, frame: FrameType, event: str, _: Any) -> Any:
        """Python calls this at each call, line and return; what was drawn since the last time was drawn by that line."""
        if self.paused or not _is_users(frame):
            return None
        self._look()
        at: FrameType | None = frame if event != "return" else frame.f_back
        while at is not None and not _is_users(at):
            at = at.f_back
        if at is not None:
            self._last, self._line = at, at.f_lineno
        return self._after_line


def _is_users(frame: FrameType) -> bool:
    """Whether neither Python's libraries, nor torch, numpy or we have written the code that runs."""
    file = frame.f_code.co_filename
    return (
        frame.f_code.co_name != "<module>"
        and not file.startswith(_LIBRARIES)
        and (file.startswith(_PACKAGES) or not file.startswith((_STDLIB, "<")))
    )
