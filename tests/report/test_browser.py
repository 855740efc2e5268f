"""The page in a real browser: it fits phones and desks, in light and dark, and its text can be read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from distmatch.report import build_report
from tests.helpers.report_runs import make_run, make_vectors

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--virtual-time-budget=3000", "--dump-dom"),
]

# Measures the page and tells its parent. Luminance and contrast as WCAG 2.1 defines them.
MEASURE = """<script>
const rgb = c => c.match(/[\\d.]+/g).map(Number);
const light = c => rgb(c).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05); };
const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  const v = rgb(c); if (v.length < 4 || v[3] > 0) return c; } return "rgb(255,255,255)"; };
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  let worst = 99, culprit = "", smallest = 99;
  for (const e of document.body.querySelectorAll("*")) {
    if (e.tagName === "SCRIPT" || e.tagName === "title") continue;
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const ratio = contrast(svg ? style.fill : style.color, ground(e));
    if (ratio < worst) { worst = ratio; culprit = e.outerHTML.slice(0, 120); }
    smallest = Math.min(smallest, parseFloat(style.fontSize) * (svg ? e.getScreenCTM().a : 1));
  }
  parent.postMessage(JSON.stringify({width: innerWidth, content: document.documentElement.scrollWidth,
    worst, culprit, smallest, ground: light(ground(document.body)),
    broken: [...document.images].filter(i => !i.naturalWidth).length}), "*");
});
</script>"""

# A browser window cannot be as narrow as a telephone, a frame can.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark">
<script>addEventListener("message", e => document.title = e.data);</script>
<iframe src="{page}" style="width:{width}px;height:{height}px;border:0"></iframe>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    long = make_run(root / "run-with-a-name-that-is-far-too-long-to-fit-on-one-line-of-a-telephone")
    found = {}
    for name, folder in (("images", long), ("vectors", make_vectors(root / "vectors"))):
        page = build_report(folder).read_text()
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # it forbids our script
        found[name] = root / f"{name}.html"
        found[name].write_text(page.replace("</body>", MEASURE + "</body>"))
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("name", "width", "height", "dark"),
    [
        ("images", 380, 800, False),
        ("images", 380, 800, True),
        ("images", 1280, 900, False),
        ("images", 1280, 900, True),
        ("vectors", 380, 800, True),
    ],
)
def test_page_fits_and_can_be_read(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int, height: int, dark: bool
) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=pages[name].as_uri(), width=width, height=height))
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(BROWSER), *OPTIONS, theme, f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, flags=re.S)
    assert title is not None, done.stdout[:500]
    seen = json.loads(html.unescape(title.group(1)))
    assert seen["width"] == width
    assert seen["content"] <= width, "the page scrolls sideways"
    assert (seen["ground"] < 0.2) == dark
    assert seen["worst"] >= 4.5, seen["culprit"]  # WCAG 2.1 AA for text
    assert seen["smallest"] >= 9, "text too small to read"  # CSS pixels
    assert seen["broken"] == 0
