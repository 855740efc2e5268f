"""Several processes that share each batch train what one process trains that has it alone.

The seeds are 0, and nothing is random beyond them. Weights agree to 1e-5 of their norm, as sums over samples
are taken in another order; the longer comparison is ``benchmarks/ranks.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks
from distmatch.methods.table import METHODS
from tests.helpers.processes import together
from tests.helpers.ranks import CASES, Case, train

_NORMS = ("grad", "loss", "distance", "score_gap")  # of small differences of large numbers


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _found(tmp_path_factory.mktemp("two"), 2, [Case(n, n, CASES.get(n, {}), 6) for n in METHODS])


FOUR = ("f-distill", "consistency")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Any:
    further = {name: {**CASES.get(name, {}), "train": "lora", "accumulate": 2} for name in FOUR}
    return _found(tmp_path_factory.mktemp("four"), 4, [Case(n, n, further[n], 8) for n in FOUR])


SHARED = ("f-distill", "consistency", "rcm")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = [Case(n, n, CASES.get(n, {}), 6, "fsdp2") for n in SHARED]
    return _found(tmp_path_factory.mktemp("shared"), 2, cases)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = {"train": "lora", "accumulate": 2}
    cases = [Case(n, n, {**CASES.get(n, {}), **settings}, 3, "hybrid", 2) for n in ("f-distill",)]
    return _found(tmp_path_factory.mktemp("hybrid"), 4, cases)


def _found(folder: Path, size: int, cases: list[Case]) -> dict[str, dict[str, float]]:
    together(train, [(rank, size, str(folder), cases) for rank in range(size)])
    found: dict[str, dict[str, float]] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_does(two: Any, name: str) -> None:
    _check(two[name])


@pytest.mark.parametrize("name", FOUR)
def test_four_processes_with_adapters_and_parts_do_too(four: Any, name: str) -> None:
    _check(four[name])


@pytest.mark.parametrize("name", SHARED)
def test_processes_that_share_out_the_weights_do_too(shared: Any, name: str) -> None:
    _check(shared[name])


def test_groups_that_share_out_adapters_and_base_do_too(hybrid: Any) -> None:
    _check(hybrid["f-distill"])


def _check(found: dict[str, float]) -> None:
    assert {"student", "average"} <= found.keys()
    weights = {name: value for name, value in found.items() if not name.startswith("info ")}
    assert max(weights.values()) < 1e-5, weights
    reported = {name: value for name, value in found.items() if name.startswith("info ")}
    assert max(reported.values()) < 5e-4, reported


def test_rows_of_random_numbers_are_those_of_one_process() -> None:
    whole = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    for size in (1, 2, 3, 4):
        drawn = [
            Ranks(i, size).draw(
                12 // size, lambda n: torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
            )
            for i in range(size)
        ]
        assert torch.equal(torch.cat(drawn), whole)


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    assert Ranks(1, 4).rows(12) == slice(3, 6)
    with pytest.raises(UserError, match=r"13 .*4 processes.*multiple of 4"):
        Ranks(1, 4).rows(13)
