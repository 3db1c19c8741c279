"""A console that shows names from anywhere, and obeys none of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from indistill_fx.printable import printable


class SafeConsole(Console):
    """A console that takes no markup, and whose texts hold no commands to the terminal but its own."""

    def __init__(self, **options: Any):
        super().__init__(**options, markup=False, highlight=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, each text made printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
