"""The command line. Commands are loaded when they are called, so that `--help` does not wait for torch."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import click

from indistill_fx.errors import ConfigError, IndistillError
from indistill_fx.system.shortage import advice, refusal
from indistill_fx.system.signals import ending_in_order
from indistill_fx.system.terminal import paragraph, printable, tell
from indistill_fx.system.user_code import failed_line
from indistill_fx.version import __version__

_COMMANDS: dict[str, str] = {
    "align": "Pair the layers of a teacher and a student.",
    "inspect": "Show a model's layers: main path, stages, widths, MACs.",
    "prune": "Remove channels from a network.",
    "compress": "Make a smaller student from a teacher alone, as source code, and train it.",
    "distill": "Distil a teacher into a student: warm-up, then the main loss.",
    "train": "Train a model on labels alone.",
    "save-outputs": "Save a teacher's logits and features for a data set, to distil without the teacher.",
    "evaluate": "Measure accuracy, and optionally retrieval.",
    "export": "Export a model to ONNX and verify that the file computes the same.",
    "report": "Show a run, or several, on one page: schedule, curves, models, kept channels.",
    "bench": "Time models and ONNX files side by side.",
    "check": "Check that a deployed ONNX file still matches the model it came from.",
    "demo": "Run every step on data that ships with scikit-learn, in about a minute.",
}


class _LazyGroup(click.Group):
    """A group that knows its commands' names and help lines, and imports a command only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"indistill_fx.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def app(context: click.Context, debug: bool) -> None:
    """A compiler for knowledge distillation.

    MODEL, TEACHER and STUDENT are specs, the same everywhere:

    \b
      model.pt                      a pickled nn.Module, loaded without running code from the file
      model.pt2                     a torch.export archive
      model.onnx                    an ONNX file, converted to PyTorch's layers
      onnxruntime:model.onnx        an ONNX file run by onnxruntime (teacher only); ?taps=NAME,NAME exposes inner tensors
      saved:DIR                     outputs saved by `save-outputs` (teacher only)
      models.py:make_student        a factory or class in your own code (also pkg.models:make_student)
      torchvision:resnet18          a constructor by name; ?num_classes=10 for arguments
      timm:resnet10t                the same for timm
      FOLDER                        what save_pretrained of transformers or save_for_hf of timm wrote; ?num_hidden_layers=2
                                    changes its configuration (new weights)
      …@weights.safetensors         any of the last four with a state dict loaded (.pt too)
      …checkpoint.pt?entry=ema      the model or the weights that a checkpoint holds under this key

    DATA is digits, cifar10, cifar100, imagefolder:DIR or file.py:make_loaders.

    \b
    Start here:
      indistill-fx demo
      indistill-fx align torchvision:resnet50 torchvision:resnet18
    """
    context.obj = {"debug": debug}


def main() -> None:
    """Run the command line; exit code 0: done, 2: the input is at fault, 1: our fault."""
    _open_streams()
    # under torchrun only the first process prints; every process reports its errors
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals and pipes without our arrows
    sys.exit(run(sys.argv[1:]))


def _open_streams() -> None:
    """Open streams that the caller closed (`>&-`) on nothing: else the next file gets their number, and what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the system gives the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115 (open until the end)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _require_text(arguments)
        with ending_in_order():
            result: Any = app.main(arguments, prog_name="indistill-fx", standalone_mode=False)
    except IndistillError as error:
        _tell(error, debug=debug)
        return 2
    except click.ClickException as error:
        with StringIO() as text:
            error.show(text)
            tell(printable(text.getvalue()).rstrip("\n"))
        return 2
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        # the signal, if a run saved its state before it stopped
        number = getattr(error, "number", None) or getattr(error.__cause__, "number", None)
        tell("Stopped.")
        return 128 + (number or signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:  # anything that reaches this line is a bug of ours, or a fault of the machine
        return _failed(error, debug=debug)
    return result if isinstance(result, int) else 0


def _require_text(arguments: list[str]) -> None:
    """Refuse arguments that are no text: files of such names would be written, and could not be read again.

    Raises:
        ConfigError: bytes of an argument are not those of a text.
    """
    for argument in arguments:
        if any("\ud800" <= sign <= "\udfff" for sign in argument):
            _require_utf8_mode(argument)
            raise ConfigError(
                f"The argument {argument!r} is not text in UTF-8, and safetensors and onnxruntime open no files of such names.",
                where="arguments",
                got=argument,
                hint="Rename the file or folder, or go into the folder and name what is in it by a relative path.",
            )


def _require_utf8_mode(argument: str) -> None:
    """Refuse text in UTF-8 that Python read as another encoding.

    Raises:
        ConfigError: it is.
    """
    try:
        text = os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return
    raise ConfigError(
        f"The argument {text!r} is in UTF-8, but Python reads arguments and file names in {sys.getfilesystemencoding()}.",
        where="arguments",
        got=text,
        hint="Set PYTHONUTF8=1, or a locale of UTF-8 (LC_ALL=C.UTF-8).",
    )


def _failed(error: Exception, *, debug: bool) -> int:
    if debug:
        _trace(error)
    if hint := advice(error):
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (Python would fail once more at its end)
        tell(f"Error: {paragraph(refusal(error))}. {hint}, and run the command again.")
        return 2
    if (line := failed_line(error)) is not None:
        reason = paragraph(f"{type(error).__name__}: {error}").rstrip(": ")
        tell(f"Error: your own code failed at {line}: {reason}\nRun the same command with --debug for the traceback.")
        return 2
    tell(
        f"indistill-fx failed, and it is our fault: {type(error).__name__}: {paragraph(str(error))}\n"
        + ("Report it" if debug else "Run the same command with --debug for the traceback, and report it")
        + ", please."
    )
    return 1


def _tell(error: IndistillError, *, debug: bool) -> None:
    if debug:
        _trace(error)
    tell(f"Error: {paragraph(str(error))}")


def _trace(error: BaseException) -> None:
    import traceback

    tell(printable("".join(traceback.format_exception(error))))
