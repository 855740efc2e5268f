"""What all pages share: one file each, filled in from a template, without any outside address."""

from __future__ import annotations

import base64
import math
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from distmatch.report.table import digits, error_digits, show_sigmas


def page(template: str, refresh: float, **values: Any) -> str:
    """A page as HTML text.

    Names of files that are not UTF-8, and what others wrote into a log, may hold half a surrogate pair, which
    no file can: the page has U+FFFD in its place.

    Args:
        template: Name of a file in the same folder.
        refresh: Seconds after which a browser loads it again, in whole ones; 0: it does not.
        values: What it is filled in with.
    """
    environment = Environment(
        loader=PackageLoader("distmatch.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "digits": digits,
        "error_digits": error_digits,
        "sigmas": show_sigmas,
        "finite": math.isfinite,
        "duration": duration,
        "base64": lambda data: base64.b64encode(data).decode("ascii"),
    }
    return re.sub(
        "[\ud800-\udfff]",
        "\ufffd",
        environment.get_template(template).render(refresh=math.ceil(refresh), **values),
    )


def flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested tables and lists of tables as ``a.b`` and text; empty parts are omitted."""
    items: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            items += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            tables = {str(i): v for i, v in enumerate(value) if isinstance(v, dict)}
            rest = [str(v) for v in value if not isinstance(v, dict)]
            items += flat(tables, f"{prefix}{key}.") + ([(f"{prefix}{key}", ", ".join(rest))] if rest else [])
        elif value is not None and value != "":
            items.append((f"{prefix}{key}", str(value)))
    return items


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
