"""The terminal: text that is shown and never obeyed, and progress bars."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

Item = TypeVar("Item")


def followed(items: Iterable[Item], title: str, *, shown: bool) -> Iterable[Item]:
    """The items, with a bar on standard error if `shown` and it is a terminal."""
    if not shown:
        return items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


# Control characters except tab and line feed; direction marks and overrides; line separators; surrogates.
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    r"""The text with every character that a terminal obeys written out; good in JSON too.

    >>> printable("a\x1b[2Jb")
    'a\\u001b[2Jb'
    """
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    r"""The text as `printable` gives it, and on one line: a name that holds a line break forges no line of ours.

    >>> one_line("a\nerror: b")
    'a\\u000aerror: b'
    """
    return printable(text).replace("\n", "\\u000a")


def paragraph(text: str) -> str:
    r"""The text as `printable` gives it, in one paragraph: line breaks are spaces.

    >>> paragraph("torch says:\nno")
    'torch says: no'
    """
    return printable(" ".join(part for line in text.split("\n") if (part := line.strip())))


def tell(text: str) -> None:
    """A line on standard error; one that is closed, or full, costs no work."""
    try:
        click.echo(text, err=True)
    except (OSError, ValueError):
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


class SafeConsole(Console):
    """A console that takes no markup, and whose texts are one line each and hold no commands to the terminal but its own."""

    def __init__(self, **options: Any):
        super().__init__(**options, markup=False, highlight=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text as rich does, but on one line."""
        return super().render_str(one_line(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, but each text on one line and without control characters."""
        if isinstance(renderable, Text) and "\n" in renderable.plain:
            renderable = Text(one_line(renderable.plain), style=renderable.style)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
