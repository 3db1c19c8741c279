r"""Text for people: names from model files, plans and runs are shown, and never obeyed.

A terminal takes control characters for commands: to colour, to erase, to retitle its window, in some to answer as if the
user typed. Characters that reverse the direction of writing make a name look like another. All are shown as `\u001b`.
"""

from __future__ import annotations

import re

# Controls but tab and line feed; marks and overrides of direction; separators of lines; halves of characters.
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    r"""The text with every character that a terminal obeys written out; good in JSON too.

    >>> printable("a\x1b[2Jb")
    'a\\u001b[2Jb'
    """
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
