"""The site of the documentation is built without a warning, and every page can be reached."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INDEX = (ROOT / "docs/index.md").read_text()


def test_every_page_is_in_the_navigation() -> None:
    trees = "\n".join(re.findall(r"```{toctree}(.*?)```", INDEX, re.DOTALL))
    named = set(re.findall(r"^(?:.* <)?([\w./-]+)>?$", trees, re.MULTILINE))
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= named, f"not in docs/index.md: {', '.join(sorted(pages - named))}"


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    """Links, headings, formulas, docstrings and the names in them; pages are read and not written."""
    for module in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(module, reason="pip install '.[docs]'")
    strict = ["--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "-j", "2"]
    folders = ["-d", str(tmp_path / "doctrees"), "-c", "docs", ".", str(tmp_path / "site")]
    made = subprocess.run(
        [sys.executable, "-m", "sphinx", *strict, "-b", "dummy", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
