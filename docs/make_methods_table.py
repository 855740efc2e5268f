"""Writes the table of methods in docs/methods.md from the methods themselves.

python docs/make_methods_table.py
"""

from __future__ import annotations

from pathlib import Path

from distmatch.methods.table import METHODS

PAGE = Path(__file__).parent / "methods.md"
OPENED, CLOSED = "<!-- methods -->", "<!-- /methods -->"
FAMILIES = {
    "matching": "Two networks: a student, and a fake score that tracks it",
    "consistency": "One network, trained to agree with itself along the teacher's paths",
    "kernel": "Samples compared with samples, by kernels",
    "transport": "A map from noise to stored points of the teacher's own paths",
}


def table() -> str:
    """The section's text."""
    lines: list[str] = []
    for family, title in FAMILIES.items():
        lines += ["", f"**{title}**", ""]
        lines += [
            "| `--method` | what it does | source | data | fake score | ratio | adversary | through teacher "
            "| forward mode |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for m in METHODS.values():
            if m.family != family:
                continue
            flags = (m.has_fake_score, m.weighted, m.adversarial, m.teacher_gradient, m.forward_mode)
            marks = " | ".join("yes" if flag else "" for flag in flags)
            lines.append(f"| `{m.name}` | {m.summary} | {m.citation} | {m.data} | {marks} |")
        lines += ["", "Limits:", ""]
        lines += [f"- `{m.name}`: {m.limits}." for m in METHODS.values() if m.family == family]
    return "\n".join(lines).strip()


def page(text: str) -> str:
    """The page with the section put in."""
    head, _, rest = text.partition(OPENED)
    _, _, tail = rest.partition(CLOSED)
    return f"{head}{OPENED}\n\n{table()}\n\n{CLOSED}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
