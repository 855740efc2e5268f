"""The gallery shows what its script computes, and what the script computes is right."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest

from distmatch.divergences import divergence

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/make_divergence_pictures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_kl_fit_has_the_moments_of_the_target(script):
    mean = 0.6 * -2 + 0.4 * 2
    variance = 0.6 * (0.6**2 + 4) + 0.4 * (0.8**2 + 4) - mean**2
    found = script.fit("kl")
    # L-BFGS stops at a gradient of 1e-5, and the curvature there is about 1 / variance.
    assert (found.mean, found.width**2) == pytest.approx((mean, variance), abs=2e-4)


def test_the_reverse_kl_fit_takes_the_large_mode(script):
    found = script.fit("reverse_kl")
    assert found.mean == pytest.approx(-2, abs=0.02)
    assert found.width == pytest.approx(0.6, abs=0.02)
    # Inside its mode p = 0.6 q nearly everywhere: KL(q || p) is close to log(1 / 0.6).
    assert found.value == pytest.approx(math.log(1 / 0.6), abs=0.01)


def test_the_page_has_every_picture_and_the_table_of_the_script(script):
    page = (ROOT / "docs/divergence-gallery.md").read_text()
    for family, names in script.FAMILIES.items():
        assert f"pictures/divergence-{family}.svg" in page
        assert (ROOT / f"docs/pictures/divergence-{family}.svg").stat().st_size > 10_000
        for name in names:
            assert f"| `{name}` |" in page
    rows = dict(re.findall(r"\| `([^`]+)` \| (.+) \|", page))
    for name in ("kl", "reverse_kl", "tv", "gjs:0.9", "skew_kl:0.5"):
        found = script.fit(name)
        mean, width, value = (float(x) for x in rows[name].split("|"))
        assert (mean, width, value) == pytest.approx((found.mean, found.width, found.value), abs=0.006)


def test_one_picture_is_drawn(script, tmp_path):
    script.draw("softened", tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()
    assert not divergence("tv").differentiable  # which is why it has no descent direction
