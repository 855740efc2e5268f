"""`distmatch report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.parse import parse

HELP = Help(
    """Write report.html, one self-contained page, from the files of a run folder.

example: distmatch report runs/demo"""
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `distmatch report`."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    seed: int = 0
    """Accepted by every command; a report draws no random numbers."""
    json: bool = False
    """Print one JSON object on stdout."""


def run(argv: list[str]) -> None:
    """Parses, builds the page, prints its path."""
    options = parse(ReportOptions, argv, verb="report", said=HELP)
    from distmatch.report import build_report

    path = build_report(options.run)
    if options.json:
        print_json({"report": str(path)})
    else:
        print(f"report in {path}")
