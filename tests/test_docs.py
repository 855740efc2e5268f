"""Every Python snippet of README and docs runs."""

import re
from pathlib import Path
from unittest import mock

import pytest

from distmatch.methods.table import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if SNIPPET.search(p.read_text())], ids=lambda p: p.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": page.stem}
    with mock.patch.dict(METHODS):  # to which a page adds one
        for number, code in enumerate(SNIPPET.findall(page.read_text()), 1):
            exec(compile(code, f"{page.name}, snippet {number}", "exec"), names)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is missing"
