"""SVG, element by element. Every text is escaped, and every colour is literal, so that any program can read the file."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from indistill_fx.system.terminal import printable

_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_TURNING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, 'DejaVu Sans Mono', monospace"


def legible(text: str) -> str:
    """The text without characters that neither XML nor a screen can show; marks of direction are written out, as on the terminal."""
    return _TURNING.sub(lambda found: printable(found[0]), _ILLEGAL.sub("\ufffd", text))


def shorten(text: str, length: int) -> str:
    """A text of at most `length` characters; its middle is left out.

    >>> shorten("backbone.layer3.35", 11)
    'backb…r3.35'
    """
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


class Drawing:
    """One SVG picture.

    Args:
        width: in pixels.
        height: in pixels.
        title: what it shows, for people who do not see it.
        background: colour; None: transparent.
    """

    def __init__(self, width: float, height: float, *, title: str, background: str | None = None):
        self.root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {number(width)} {number(height)}",
                "width": number(width),
                "height": number(height),
                "role": "img",
                "font-family": SANS,
            },
        )
        self.add("title", text=title)
        if background is not None:
            self.add("rect", width=width, height=height, style=f"fill:{background}")

    def add(
        self, tag: str, *, text: str | None = None, hint: str | None = None, **attributes: str | float
    ) -> ElementTree.Element:
        """Add an element. Underscores in attribute names become hyphens; `hint` is its tooltip."""
        plain = {
            key.rstrip("_").replace("_", "-"): legible(value) if isinstance(value, str) else number(value)
            for key, value in attributes.items()
        }
        element = ElementTree.SubElement(self.root, tag, plain)
        if text is not None:
            element.text = legible(text)
        if hint is not None:
            ElementTree.SubElement(element, "title").text = legible(hint)
        return element

    def write(
        self,
        x: float,
        y: float,
        text: str,
        *,
        colour: str,
        size: float = 12,
        anchor: str = "start",
        mono: bool = False,
        bold: bool = False,
        hint: str | None = None,
    ) -> None:
        """Add a line of text; `y` is its base line."""
        more = {"font_family": MONO} if mono else {}
        weight = {"font_weight": "600"} if bold else {}
        style = f"fill:{colour}"
        self.add(
            "text", text=text, x=x, y=y, font_size=size, text_anchor=anchor, style=style, hint=hint, **more, **weight
        )

    def __str__(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode")


def number(value: float) -> str:
    """At most two decimals.

    >>> number(3.0), number(2.346)
    ('3', '2.35')
    """
    return f"{value:.2f}".rstrip("0").rstrip(".")
