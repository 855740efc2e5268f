"""Puts a measured table into its place in a page: between ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations

from pathlib import Path


def with_section(text: str, name: str, content: str) -> str:
    """The text with this content in its section."""
    head, opened, rest = text.partition(f"<!-- {name} -->\n")
    _, closed, tail = rest.partition(f"<!-- /{name} -->")
    if not (opened and closed):
        raise SystemExit(f"the page has no section {name}")
    return f"{head}{opened}\n{content.strip()}\n\n{closed}{tail}"


def replace_section(page: Path, name: str, content: str) -> None:
    page.write_text(with_section(page.read_text(), name, content))
