"""Writes the tables of presets in docs/presets.md from the presets themselves.

python docs/make_presets_table.py
"""

from __future__ import annotations

from pathlib import Path

from distmatch.training.presets import PRESETS
from distmatch.training.published.preset import Preset

PAGE = Path(__file__).parent / "presets.md"
OPENED, CLOSED = "<!-- presets -->", "<!-- /presets -->"


def table(preset: Preset) -> str:
    """The section of one preset."""
    lines = [f"### `{preset.name}`", "", f"`--method {preset.method}`. {preset.title}. {preset.source}.", ""]
    lines += ["| option | value | as published | where |", "|---|---|---|---|"]
    for name, setting in preset.settings.items():
        value = f"{setting.value:g}" if isinstance(setting.value, float) else str(setting.value)
        flag = "--" + name.replace("_", "-")
        lines.append(f"| `{flag}` | {value} | {setting.published} | {setting.place} |")
    lines += ["", "Differences:", ""]
    lines += [f"- {text}." for text in preset.differs]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the tables put in."""
    head, _, rest = text.partition(OPENED)
    _, _, tail = rest.partition(CLOSED)
    body = "\n\n".join(table(preset) for preset in PRESETS.values())
    return f"{head}{OPENED}\n\n{body}\n\n{CLOSED}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
