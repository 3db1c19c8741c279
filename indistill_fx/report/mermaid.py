"""The alignment as Mermaid text, for Markdown."""

from __future__ import annotations

from indistill_fx.report.alignment_view import Alignment, Column
from indistill_fx.report.svg import legible, shorten

_PLAIN = frozenset(" .,:+-_/")


def alignment_mermaid(alignment: Alignment) -> str:
    """A flowchart: the paired layers of both models in order, and the pairs between them.

    Args:
        alignment: see `alignment_view.see`.

    Returns:
        The text between ```` ```mermaid ```` and ```` ``` ````.
    """
    lines = ["flowchart LR"]
    for column in (alignment.teacher, alignment.student):
        lines += [f'  subgraph {column.role}["{column.role}: {quote(column.name)}"]', "    direction TB"]
        rows = {row.pair: f"{_node(column, row.pair)}" for row in column.rows if row.pair}
        lines += [
            f'    {_node(column, row.pair)}["{quote(row.tap)}<br>{quote(row.shape)}"]'
            for row in column.rows
            if row.pair
        ]
        lines += [f"    {' --> '.join(rows.values())}"] if len(rows) > 1 else []
        lines += ["  end"]
    for match in alignment.drawn:
        kept = f", {len(match.pair.kept)} channels" if match.pair.kept is not None else ""
        label = f"{match.pair.score:.2f}{kept}" if match is not alignment.embedding else "penultimate"
        link = "<==>" if match is not alignment.embedding else "<-.->"
        lines.append(f'  {_node(alignment.teacher, match.key)} {link}|"{label}"| {_node(alignment.student, match.key)}')
    return "\n".join(lines) + "\n"


def _node(column: Column, pair: str) -> str:
    return f"{column.role[0]}_{pair}"


def quote(text: str) -> str:
    """A name that Mermaid shows as it is: all but letters, digits and a few signs as character codes.

    >>> quote('layer3 "x"<b>')
    'layer3 #34;x#34;#60;b#62;'
    """
    short = shorten(legible(text), 60)
    return "".join(
        sign if sign in _PLAIN or (sign.isascii() and sign.isalnum()) else f"#{ord(sign)};" for sign in short
    )
