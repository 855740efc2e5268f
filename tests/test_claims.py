"""docs/claims.md: its verdicts are those of an independent t-test, its words those that were measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

FOLDER = Path(__file__).parents[1] / "benchmarks" / "claims"
RESULTS = sorted((FOLDER / "results").glob("*.json"))


@pytest.fixture(scope="module")
def run() -> Iterator[ModuleType]:
    """The program that measures, with the modules of its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import run

        yield run
    for name, module in list(sys.modules.items()):  # "run" and "page" may be others' names
        if Path(getattr(module, "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture(scope="module")
def claim(run: ModuleType) -> ModuleType:
    import claim

    return claim


def test_what_was_measured_is_what_is_written(run: ModuleType) -> None:
    """A claim or a test that was reworded afterwards has to be measured again."""
    known = {each.name: each for each in run.CLAIMS}
    assert len(known) == len(run.CLAIMS)
    assert len(RESULTS) >= 20
    for path in RESULTS:
        row = json.loads(path.read_text())
        assert path.stem == row["name"]
        for word in ("system", "source", "says", "test"):
            assert row[word] == getattr(known[row["name"]], word), f"{path.stem}: {word}"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_verdicts_are_those_of_a_t_test(claim: ModuleType, path: Path) -> None:
    row = json.loads(path.read_text())
    fields = ("differences", "unit", "figures", "alike", "note")
    found = claim.Measured(**{name: row[name] for name in fields})
    values, bound = np.asarray(row["differences"], dtype=np.float64), row["alike"]
    assert len(values) >= 3

    def surely(greater_than: float, values: np.ndarray = values) -> bool:
        return bool(stats.ttest_1samp(values, greater_than, alternative="greater").pvalue < 0.025)

    if bound is None:
        expected = "holds" if surely(0) else "does not hold" if surely(0, -values) else "cannot be told"
    elif surely(-bound) and surely(-bound, -values):
        expected = "holds"
    else:
        outside = surely(bound) or surely(bound, -values)
        expected = "does not hold" if outside else "cannot be told"
    assert claim.verdict(found) == expected


def test_the_page_is_what_the_results_say(run: ModuleType) -> None:
    import page

    text = (FOLDER.parents[1] / "docs" / "claims.md").read_text()
    assert page.written(text) == text
