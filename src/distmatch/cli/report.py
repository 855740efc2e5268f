"""`distmatch report`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from distmatch.base.rules import Rule, check_rules
from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.parse import parse

HELP = Help(
    """Write report.html, one self-contained page, from the files of a run folder.

example: distmatch report runs/demo
         distmatch report runs/demo --watch"""
)
_SECONDS = "5"
_POSITIVE = Rule("must be positive", lambda value: value is None or 0 < value < math.inf)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `distmatch report`."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    watch: Annotated[float | None, _POSITIVE, tyro.conf.arg(metavar="[SECONDS]")] = None
    """Write the page again whenever the files of the run change, until the run ends or Ctrl-C; a browser
    that shows it loads it again. Seconds between looks at the files (5)."""
    seed: int = 0
    """Accepted by every command; a report draws no random numbers."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        check_rules(self)


def run(argv: list[str]) -> None:
    """Parses, builds the page, prints its path."""
    options = parse(ReportOptions, _with_seconds(argv), verb="report", said=HELP)
    from distmatch.report import build_report, follow_report

    if options.watch is None:
        path = build_report(options.run)
    else:
        path = follow_report(options.run, options.watch, tell=lambda text: print(text, file=sys.stderr))
    if options.json:
        print_json({"report": str(path)})
    else:
        print(f"report in {path}")


def _with_seconds(argv: Sequence[str]) -> list[str]:
    """`--watch` without a number means every five seconds; what follows it is then the run."""
    result: list[str] = []
    for i, argument in enumerate(argv):
        result.append(argument)
        if argument == "--watch" and not _is_number(argv[i + 1 : i + 2]):
            result.append(_SECONDS)
    return result


def _is_number(following: Sequence[str]) -> bool:
    try:
        return bool(following) and float(following[0]) is not None
    except ValueError:
        return False
