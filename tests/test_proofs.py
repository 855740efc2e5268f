"""The page of what is proven names tests that there are."""

import runpy
from pathlib import Path

PROOFS = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "make_proofs.py"))


def test_the_page_is_of_its_table_and_all_its_tests_are_there() -> None:
    assert PROOFS["check"]() == []


def test_a_test_that_is_gone_is_missed() -> None:
    there, renamed = (
        "tests/test_proofs.py::test_a_test_that_is_gone_is_missed",
        "tests/test_proofs.py::test_none",
    )
    moved = "tests/nowhere.py::test_the_page_is_of_its_table_and_all_its_tests_are_there"
    assert PROOFS["missing"]([there, renamed, moved]) == [renamed, moved]
