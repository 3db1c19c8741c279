"""Tables in the docs that a command makes stand between two marks."""

from __future__ import annotations

from pathlib import Path


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        SystemExit: the page lacks one of them.
    """
    before, begins, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ends, after = rest.partition(end)
    if not (begins and ends):
        raise SystemExit(f"{page} lacks the mark `{end if begins else begin}`.")
    closed = text if text.endswith("\n") else f"{text}\n"
    page.write_text(f"{before}{begin}\n{closed}{end}{after}", encoding="utf-8")
