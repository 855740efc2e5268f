"""Writes the table of docs/claims.md from what ``run.py`` has measured.

python benchmarks/claims/page.py
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from claim import RESULTS, Measured, interval, verdict
from run import CLAIMS

sys.path.append(str(Path(__file__).parents[1]))
from sections import with_section

PAGE = Path("docs/claims.md")


def digits(value: float, half: float) -> tuple[str, str]:
    """Both to the second digit of the error."""
    places = 3 if half == 0 else max(0, 1 - int(f"{half:e}".split("e")[1]))
    return f"{value:.{places}f}", f"{half:.{places}f}"


def told(row: dict[str, Any]) -> tuple[str, str, str]:
    """A claim's row of the table, what is said of it below, and its verdict."""
    measured = Measured(**{name: row[name] for name in Measured.__dataclass_fields__})
    mean, half = digits(*interval(measured.differences))
    bound = "" if measured.alike is None else f"; equal within {measured.alike:g}"
    found = f"{mean} ± {half} {measured.unit}{bound}"
    beside = "; ".join(f"{name} {value:.4g}" for name, value in measured.figures.items())
    paragraph = f"""\
**{row["name"]}** ({row["source"]}). {row["test"]}
Difference: {found}, {len(measured.differences)} repetitions. {beside}.
{measured.note}"""
    verdict_ = verdict(measured)
    return f"| {row['system']} | {row['says']} | {found} | {verdict_} |", paragraph.strip(), verdict_


def written(text: str) -> str:
    """The page with the table of what is measured."""
    found = [RESULTS / f"{claim.name}.json" for claim in CLAIMS]
    rows = [told(json.loads(path.read_text())) for path in found if path.exists()]
    counts = Counter(verdict_ for _, _, verdict_ in rows)
    number = f"{len(rows)}" if len(rows) == len(CLAIMS) else f"{len(rows)} of {len(CLAIMS)}"
    parts = [
        f"{number} claims are measured: {counts['holds']} hold, {counts['does not hold']} do not hold, "
        f"and of {counts['cannot be told']} it cannot be told.",
        "\n".join(
            ["| of | claim | difference | verdict |", "|---|---|---|---|", *(row for row, _, _ in rows)]
        ),
        "## The tests",
        *(paragraph for _, paragraph, _ in rows),
    ]
    return with_section(text, "claims", "\n\n".join(parts))


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
