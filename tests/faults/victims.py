"""What children of the fault tests do until something happens to them. Each function is named by a test."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from indistill_fx import cli
from indistill_fx.errors import ConfigError
from indistill_fx.runs import directory as record
from indistill_fx.system import files, tensor_files
from indistill_fx.system.signals import Interrupted
from indistill_fx.training import loop
from tests.faults.harness import run


def _dying(function: Any, at: int, number: int = signal.SIGKILL, before: bool = True) -> Any:
    """The function, in or after whose call number `at` this process gets a signal."""
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and before:
            os.kill(os.getpid(), number)
        result = function(*args, **kwargs)
        if calls[0] == at and not before:
            os.kill(os.getpid(), number)
        return result

    return call


def killed_in_saving(place: str, name: str, before: bool) -> None:
    home = tensor_files if name == "save_file" else os
    setattr(home, name, _dying(getattr(home, name), 8, before=before))
    run(Path(place))


def killed_with_half_a_draft(place: str) -> None:
    whole, calls = tensor_files.save_file, [0]

    def torn(tensors: Any, path: Path, **options: Any) -> None:
        whole(tensors, path, **options)
        calls[0] += 1
        if calls[0] == 6:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    tensor_files.save_file = torn  # type: ignore[assignment]
    run(Path(place))


def killed_in_a_line(place: str) -> None:
    def torn(self: record.RunDirectory, entry: Any) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "ep')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    record.RunDirectory.log = torn  # type: ignore[method-assign]
    run(Path(place))


def signalled(place: str, number: int) -> None:
    torch.optim.Adam.step = _dying(torch.optim.Adam.step, 7, number)  # type: ignore[method-assign]
    try:
        run(Path(place), checkpoint_every_steps=None)
    except Interrupted as stopped:
        os._exit(40 if stopped.number == number else 4)


def ended_while_writing(place: str, number: int, moment: str) -> None:
    """A command that writes two files, which gets a signal while they are written, or while the first gets its name."""
    target, rename = Path(place) / "two.onnx", _dying(os.replace, 1, number, before=False)

    def command(*_: Any, **__: Any) -> None:
        with files.staged(target) as draft:
            draft.write_text("new")
            draft.with_name("two.onnx.data").write_text("new")
            if moment == "writing":
                os.kill(os.getpid(), number)
            else:
                os.replace = rename

    cli.app.main = command  # type: ignore[method-assign, assignment]
    os._exit(cli.run(["export"]))


def waiting(place: str, pipe: str) -> None:
    """Says through the pipe that it is training, and stays there."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        Path(pipe).write_text("training")
        signal.pause()

    torch.optim.Adam.step = slow  # type: ignore[method-assign]
    run(Path(place))


def gone_after_eight_steps(place: str) -> None:
    original = loop.TrainingLoop._after_step

    def step(self: loop.TrainingLoop, *args: Any) -> None:
        if self.state.all_steps == 8:
            os._exit(5)
        original(self, *args)

    loop.TrainingLoop._after_step = step  # type: ignore[method-assign]
    run(Path(place))


def reads_a_run(place: str) -> None:
    from indistill_fx.report import run_page
    from indistill_fx.runs.load import load_run

    run_page(place)
    try:
        load_run(place)
    except ConfigError:
        os._exit(6)


def reads_an_image(path: str) -> None:
    from indistill_fx.data.pictures import read_picture

    try:
        read_picture(path)
    except ConfigError:
        os._exit(6)
