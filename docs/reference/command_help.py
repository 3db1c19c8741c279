"""A hook of mkdocs: `<!-- help -->` in a page becomes the help of every command, as the shell prints it."""

from __future__ import annotations

from typing import Any

import click


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the help."""
    if "<!-- help -->" not in markdown:
        return markdown
    from indistill_fx.cli import app

    parts = [_section("indistill-fx", app, None)]
    top = click.Context(app, info_name="indistill-fx", terminal_width=80, max_content_width=80)
    for name in app.list_commands(top):
        command = app.get_command(top, name)
        assert command is not None
        parts.append(_section(f"indistill-fx {name}", command, top))
    return markdown.replace("<!-- help -->", "\n\n".join(parts))


def _section(title: str, command: click.Command, parent: click.Context | None) -> str:
    name = title.split()[-1]
    context = click.Context(command, parent, name, terminal_width=80, max_content_width=80)
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```"
