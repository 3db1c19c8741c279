"""Progress bars: on a terminal, and only where asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def followed(items: Iterable[Item], title: str, *, shown: bool) -> Iterable[Item]:
    """The items, with a bar on standard error if `shown` and it is a terminal."""
    if not shown:
        return items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)
