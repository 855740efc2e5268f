"""Warnings of the watch for collapse: when they come, and what they advise."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import distmatch as dm
from distmatch.methods.table import METHODS
from distmatch.training.watch_warnings import BOUNDS, watch_warnings
from tests.helpers.small import PAIR
from tests.helpers.watching import SMALL, events, ignore_noise, run_watched, watched


def test_a_healthy_run_is_not_warned_of():
    job, watch = watched(steps=200, fit_steps=100)
    watch.begin(None)
    assert run_watched(job, watch, 200) == []


def test_a_collapse_is_warned_of_once(monkeypatch):
    job, watch = watched(steps=60, fit_steps=100)
    watch.begin(None)
    assert run_watched(job, watch, 10) == []
    ignore_noise(monkeypatch)
    (message,) = [m for m in run_watched(job, watch, 20) if "same sample for every seed" in m]
    assert message.startswith("at step 20")  # the second measurement in succession
    for option in ("--lr", "--fake-score-steps", "--keep-best energy"):
        assert option in message
    for option in ("--divergence", "--gan-weight", "--guidance"):  # it has none, none, and is 1
        assert option not in message


def test_a_learning_rate_that_is_far_too_high_is_warned_of(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dm.distill(
            PAIR, out=tmp_path / "run", steps=40, watch_every=10, lr=0.3, **{**SMALL, "fit_steps": 100}
        )
    seen = [str(w.message) for w in caught if "at step" in str(w.message)]
    assert any("leads away from its teacher" in message for message in seen)
    assert seen == [e["message"] for e in events(tmp_path / "run", "warning") if "at step" in e["message"]]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("diversity", {"diversity": 0.9}, {"diversity": 0.4}),
        ("solid", {"solid": 0.1, "teacher_solid": 0.1}, {"solid": 0.4, "teacher_solid": 0.1}),
        (
            "saturation",
            {"saturation": 0.3, "teacher_saturation": 0.3},
            {"saturation": 0.6, "teacher_saturation": 0.3},
        ),
        ("vendi", {"vendi": 0.9}, {"vendi": 0.3}),
        ("energy", {"energy": 0.1}, {"energy": 1.5}),
        ("motion", {"motion": 0.9}, {"motion": 0.2}),
        ("fake_score_lag", {"fake_score_lag": 1.1}, {"fake_score_lag": 2.5}),
    ],
)
def test_bounds_are_for_what_became_worse(kind, good, bad):
    method = METHODS["f-distill"]
    settings = method.settings()
    best = {kind: good[kind]}

    def kinds(values: dict[str, float], best: dict[str, float], late: bool) -> list[str]:
        return [found for found, _ in watch_warnings(values, best, method, settings, late=late)]

    assert kinds(bad, best, late=False) == [kind]
    assert kinds(bad, {}, late=False) == kinds(bad, {kind: bad[kind]}, late=False) == []  # so from the start
    assert kinds(good, best, late=True) == []
    always = [] if kind in ("diversity", "vendi", "energy") else [kind]  # which may be on their way
    assert kinds(bad, {kind: bad[kind]}, late=True) == always
    assert kinds({**bad, kind: float("nan")}, best, late=True) == []


def test_a_student_without_any_diversity_is_warned_of_late():
    method = METHODS["f-distill"]
    late = list(watch_warnings({"diversity": 0.05}, {}, method, method.settings(), late=True))
    assert [kind for kind, _ in late] == ["diversity"]
    assert "--divergence js or kl" in late[0][1]
    assert not list(watch_warnings({"diversity": 0.05}, {}, method, method.settings(), late=False))


def test_what_helps_depends_on_the_options():
    method = METHODS["f-distill"]

    def text(kept: bool, **settings: Any) -> str:
        found = watch_warnings(
            {"diversity": 0.01}, {}, method, method.settings(**settings), late=True, kept=kept
        )
        return next(found)[1]

    assert "--guidance" in text(kept=True, guidance=2.0)
    assert "--guidance" not in text(kept=True)
    assert "--keep-best" in text(kept=False)
    assert "--keep-best" not in text(kept=True)


def test_only_settings_of_the_method_are_advised():
    for name, method in METHODS.items():
        settings = method.settings()
        values = {"diversity": 0.01, "motion": 0.0, "fake_score_lag": 9.0, "energy": 9.0, "vendi": 0.1}
        values |= {"solid": 1.0, "teacher_solid": 0.0, "saturation": 1.0, "teacher_saturation": 0.0}
        found = dict(watch_warnings(values, {"energy": 1.0, "vendi": 1.0}, method, settings, late=True))
        assert set(found) == {bound.kind for bound in BOUNDS}
        for message in found.values():
            flags = {word.strip(";,.") for word in message.split() if word.startswith("--")}
            names = {flag[2:].replace("-", "_") for flag in flags} - {"keep_best", "divergence"}
            assert all(hasattr(settings, option) for option in names), (name, names)
            assert ("--divergence" in flags) <= (method.divergences == "any")
