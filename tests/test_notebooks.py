"""The notebooks run from top to bottom, with fewer steps, and are stored with what they show."""

import json
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SMALLER = {
    "modes": {"STEPS": 20, "NETWORK_STEPS": 6},
    "digits": {"TEACHER_STEPS": 5, "STUDENT_STEPS": 5, "BLOCK": 60, "FEATURES": "pixels"},
    "captions": {"TEACHER_STEPS": 3, "STUDENT_STEPS": 3, "JUDGE_STEPS": 5, "ASKED": 20},
}
FILES = sorted((DOCS / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.skipif(not FILES, reason="a source archive has no notebooks")


def cells(file: Path) -> list[dict]:
    return [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(file.read_text())
    runpy.run_path(str(DOCS / "make_notebooks.py"))["run"](notebook, file.name, **SMALLER[file.stem])
    kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in notebook["cells"]]
    stored = [
        [output["output_type"] for output in cell.get("outputs", [])]
        for cell in json.loads(file.read_text())["cells"]
    ]
    assert kinds == stored


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_stored_notebook_is_small_and_was_run_in_order(file: Path) -> None:
    assert file.stat().st_size < 300 * 1024
    assert [cell["execution_count"] for cell in cells(file)] == list(range(1, len(cells(file)) + 1))
