"""Reading the event log: torn lines, resumed runs, curves and averages over noise levels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from distmatch.base.errors import UserError
from distmatch.report import curves, read_log
from distmatch.report.figures import plane, smooth
from distmatch.report.log import scalar_keys, wall_seconds
from distmatch.report.training import bin_levels, period_means


def train(step: int, **values: object) -> dict[str, object]:
    return {"event": "train", "step": step, "time": float(step), **values}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_torn_lines_are_skipped_wherever_they_are(tmp_path: Path) -> None:
    torn = '{"event": "train", "step": 2, "los'
    path = write(
        tmp_path / "log.jsonl", train(1, loss=1.0), torn, "", "[1]", '{"step": 3}', train(4, loss=4.0)
    )
    with path.open("ab") as file:
        file.write(b'{"event": "train", "step": 5, "name": "\xc3')  # cut inside a UTF-8 character
    assert [e["step"] for e in read_log(path)] == [1, 4]


def test_missing_log_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log\.jsonl"):
        read_log(tmp_path / "log.jsonl")


def test_resume_voids_later_training_only(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.jsonl",
        *[train(s, run=1) for s in (10, 20, 30, 40)],
        {"event": "warning", "step": 35, "message": "kept"},
        {"event": "resume", "step": 20},
        *[train(s, run=2) for s in (30, 40, 50)],
        {"event": "resume", "step": 40},
        train(50, run=3),
    )
    events = read_log(path)
    assert [(e["step"], e["run"]) for e in events if e["event"] == "train"] == [
        (10, 1), (20, 1), (30, 2), (40, 2), (50, 3),
    ]  # fmt: skip
    assert sum(e["event"] == "warning" for e in events) == 1


def test_curves_of_numbers_and_lists() -> None:
    events = [
        train(1, a=1.5, bins=[1, 2, 3]),
        train(2, a=None, bins=[1, None]),
        train(3, bins=[3, 4]),
        train(4, a="text"),
        {"event": "evaluate", "step": 4, "a": 9},
    ]
    steps, values = curves(events, "a")
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(values, [1.5, math.nan])
    steps, values = curves(events, "bins")
    np.testing.assert_array_equal(steps, [2, 3])
    np.testing.assert_array_equal(values, [[1, math.nan], [3, 4]])
    steps, values = curves(events, "nothing")
    assert steps.shape == values.shape == (0,)
    assert scalar_keys(events) == ["a"]


def test_pauses_do_not_count_as_training_time() -> None:
    events = [
        {"event": "start", "time": 100.0},
        {"event": "train", "time": 110.0},
        {"event": "resume", "time": 5000.0},
        {"event": "train"},
        {"event": "train", "time": 5001.0},
        {"event": "end", "time": 5004.0},
        {"event": "evaluate", "time": 9000.0},
    ]
    assert wall_seconds(events) == pytest.approx(10 + 3)


def test_smooth_is_the_mean_of_the_known_neighbors() -> None:
    values = np.random.default_rng(0).standard_normal(50)
    values[[3, 4, 5, 20]] = np.nan
    brute = [np.nanmean(values[max(0, i - 3) : i + 4]) for i in range(50)]
    np.testing.assert_allclose(
        smooth(values, 6), brute, rtol=0, atol=1e-12
    )  # sums of 50 numbers of order one
    np.testing.assert_array_equal(smooth(np.array([1.0, np.nan, 3.0]), 1), [1.0, np.nan, 3.0])


def test_period_means_cover_the_log_once_and_skip_what_is_unknown() -> None:
    steps, values = np.arange(10.0), np.arange(20.0).reshape(10, 2)
    values[0:2, 1] = values[6:8, 1] = np.nan
    means, names = period_means(steps, values)
    np.testing.assert_allclose(means[:, 0], [2, 8, 13, 17])
    np.testing.assert_allclose(means[:, 1], [5, 9, np.nan, 18])
    assert names == ["steps 0 to 2", "steps 3 to 5", "steps 6 to 7", "steps 8 to 9"]


@pytest.mark.parametrize(
    ("bins", "expected", "is_sigma"),
    [
        ([0.1, 1.0, 10.0], [0.1, 1, 10], True),  # centers
        ([0.1, 1.0, 10.0, 1000.0], [10**-0.5, 10**0.5, 100], True),  # edges: geometric middle
        ([0, 1.0, 10.0, None], [10**-0.5, 10**0.5, 10**1.5], True),  # open outer bins
        ([3, 2, 1], [1, 2, 3], False),
        (None, [1, 2, 3], False),
        ("text", [1, 2, 3], False),
    ],
)
def test_noise_levels_of_the_bins(bins: object, expected: list[float], is_sigma: bool) -> None:
    levels, known = bin_levels(bins, 3)
    np.testing.assert_allclose(levels, expected, rtol=1e-12)
    assert known is is_sigma


def test_plane_is_the_principal_plane() -> None:
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 5)) @ rng.standard_normal((5, 5)) + 3
    origin, axes = plane(x)
    theirs = PCA(2).fit(x)
    np.testing.assert_allclose(origin, theirs.mean_, atol=1e-10)
    np.testing.assert_allclose(np.abs(theirs.components_ @ axes), np.eye(2), atol=1e-8)  # signs are free
    origin, axes = plane(x[:, :2])
    np.testing.assert_array_equal((x[:, :2] - origin) @ axes, x[:, :2])
