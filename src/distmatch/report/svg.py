"""Turns a matplotlib figure into SVG for the inside of a page: its fonts and colors, no outside address."""

from __future__ import annotations

import hashlib
import io
import re
from html import escape

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

# Matplotlib wants colors it can parse; these stand for CSS variables, so one drawing fits light and dark.
INK, MUTED, RULE, ACCENT, SOFT = "#010101", "#010102", "#010103", "#010104", "#010105"
TIMES = ("#010111", "#010112", "#010113", "#010114")
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", SOFT: "accent-soft"} | {
    color: f"time-{i}" for i, color in enumerate(TIMES, start=1)
}


def to_png(figure: Figure) -> bytes:
    """A figure as a picture that stands alone."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def to_svg(figure: Figure, alt: str) -> Markup:
    """Renders a figure for the page.

    Args:
        figure: SampleResult in the colors of this module.
        alt: What the picture shows, for those who do not see it.

    Returns:
        An ``<svg>`` element that scales to the width it is given.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "distmatch"}):
        no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    salt = "f" + hashlib.sha256((alt + text).encode(errors="surrogatepass")).hexdigest()[:8]
    view = re.search(r'viewBox="([^"]+)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.S)
    body = body.replace("xlink:href", "href")  # in HTML the plain name is enough, and needs no namespace
    body = re.sub(r"font(-family)?: [^;\"]*;?", _font, body)
    body = _private_ids(body, salt)
    for color, name in _VARIABLES.items():
        body = body.replace(color, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    title = escape(alt)
    head = f'<svg viewBox="{view.group(1) if view else "0 0 1 1"}" role="img" aria-label="{title}">'
    return Markup(f"{head}<title>{title}</title>{body.strip()}</svg>")


def _font(match: re.Match[str]) -> str:
    """Drops the font family (the page has its own) and keeps the size."""
    size = re.search(r"[\d.]+px", match.group(0))
    return f"font-size: {size.group(0)};" if size else ""


def _private_ids(body: str, salt: str) -> str:
    """Removes the ids that nothing refers to and makes the others differ from those of other figures."""
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{salt}-{m.group(1)}"' if m.group(1) in used else "", body
    )
    return re.sub(r'(href="|url\()#', rf"\g<1>#{salt}-", body)
