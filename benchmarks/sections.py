"""Puts a measured table into its place in a page: between ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations

from pathlib import Path


def replace_section(page: Path, name: str, content: str) -> None:
    text = page.read_text()
    head, opened, rest = text.partition(f"<!-- {name} -->\n")
    _, closed, tail = rest.partition(f"<!-- /{name} -->")
    if not (opened and closed):
        raise SystemExit(f"{page} has no section {name}")
    page.write_text(f"{head}{opened}\n{content.strip()}\n\n{closed}{tail}")
