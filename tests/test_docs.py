"""Every Python snippet of README and docs runs."""

import re
from pathlib import Path
from unittest import mock

import pytest

from distmatch.cli.doctor import DoctorOptions
from distmatch.cli.evaluate_options import EvaluateOptions
from distmatch.cli.export import ExportOptions
from distmatch.cli.help import flags_of
from distmatch.cli.parse import Place
from distmatch.cli.report import ReportOptions
from distmatch.cli.sample import SampleOptions
from distmatch.methods.table import METHODS
from distmatch.report.training import _TITLES, _WATCHED
from distmatch.training.options import DistillOptions, TrainOptions

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


LONG = ("losses.md", "consistency.md", "likelihood.md")  # their snippets train or integrate for seconds
PYTHON = [p for p in PAGES if SNIPPET.search(p.read_text())]


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name in LONG)) for p in PYTHON],
    ids=[p.name for p in PYTHON],
)
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
            if target.startswith("notebooks/") and not (ROOT / "docs/notebooks").exists():
                continue  # a source archive leaves them out
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is missing"


def test_options_of_the_pages_on_problems_exist():
    classes = (
        DoctorOptions,
        EvaluateOptions,
        ExportOptions,
        Place,
        ReportOptions,
        SampleOptions,
        TrainOptions,
    )
    known = {flag for kind in classes for flag in flags_of(kind)}
    for method in METHODS:
        known |= set(flags_of(DistillOptions, DistillOptions.of(method)))
    for page in ("troubleshooting.md", "watch.md"):
        named = set(re.findall(r"--[a-z][a-z0-9-]+", (ROOT / "docs" / page).read_text()))
        assert len(named) > 5
        assert named <= known, f"{page} names {', '.join(sorted(named - known))}"


def test_problems_are_looked_for_in_charts_that_there_are():
    titles = {title for title, _ in (*_TITLES.values(), *_WATCHED.values())} | {"During training"}
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = set(re.findall(r'"([A-Z][^"]+)"', text))
    assert quoted
    assert all(any(title.startswith(name) for title in titles) for name in quoted), quoted - titles
