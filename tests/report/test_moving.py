"""Clips as animated pictures and sequences as curves: in a file, and on the page with a still beside each."""

from __future__ import annotations

import base64
import io
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from distmatch.report import grid_png
from distmatch.report.sequences import CURVES, curve_limits
from tests.helpers.report_runs import Page, page
from tests.report.test_browser import BROWSER, OPTIONS

RNG = np.random.default_rng(0)


def frames_of(png: bytes) -> list[np.ndarray]:
    picture = Image.open(io.BytesIO(png))
    return [np.asarray(frame.convert("RGBA")) for frame in ImageSequence.Iterator(picture)]


def test_every_frame_of_a_grid_is_the_grid_of_the_frames() -> None:
    for channels in (1, 3):
        clips = RNG.integers(0, 256, (5, 6, 7, 8, channels), dtype=np.uint8)
        png = grid_png(clips, 3)
        found = frames_of(png)
        assert len(found) == 6
        for t, frame in enumerate(found):
            (still,) = frames_of(grid_png(clips[:, t], 3))
            shown = still[..., 3:] > 0  # what a gap holds nobody sees
            np.testing.assert_array_equal(frame * shown, still * shown)
        picture = Image.open(io.BytesIO(png))
        assert picture.info["loop"] == 0
        assert picture.info["duration"] == 125


def test_long_and_large_clips_are_cut_and_shrunk() -> None:
    picture = Image.open(io.BytesIO(grid_png(RNG.integers(0, 256, (1, 70, 200, 100, 3), dtype=np.uint8), 1)))
    assert getattr(picture, "n_frames", 1) == 64
    assert picture.size == (48, 96)


def test_the_page_moves_and_has_a_still(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    labels = np.repeat([0, 2], 4)
    for model in ("reference", "student"):
        x = RNG.integers(0, 256, (8, 5, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / "samples" / f"{model}.npz", x=x, labels=labels, class_names=["a", "b", "c"])
    text, parsed = page(tmp_path)
    sources = [a for tag, a in parsed.tags if tag == "source"]
    images = [a for tag, a in parsed.tags if tag == "img"]
    assert len(sources) == len(images) == 2
    for source, image in zip(sources, images, strict=True):
        assert source["media"] == "(prefers-reduced-motion: reduce)"
        still, moving = (
            frames_of(base64.b64decode(str(data).split(",")[1])) for data in (source["srcset"], image["src"])
        )
        assert (len(still), len(moving)) == (1, 5)
        shown = still[0][..., 3:] > 0
        np.testing.assert_array_equal(still[0] * shown, moving[0] * shown)
    assert "one row for each label: a, c" in str(images[0]["alt"])
    assert "Clips loop" in parsed.text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_sequences_are_curves_in_one_frame(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for model, size in (("reference", 1.0), ("student", 2.0)):
        x = size * RNG.standard_normal((30, 20, 5)).astype(np.float32)
        x[0, 0, 0] = np.nan
        np.savez(tmp_path / "samples" / f"{model}.npz", x=x, kind="sequence")
    text, parsed = page(tmp_path)
    drawings = [a for tag, a in parsed.tags if tag == "svg"]
    assert [str(a["aria-label"]) for a in drawings] == [
        f"the first {CURVES} samples, {who}, as curves" for who in ("real", "student")
    ]
    first, second = (part.split("</svg>")[0] for part in text.split("<svg")[1:3])
    assert first.count("var(--accent)") == 3 * CURVES  # three channels
    assert first.count("var(--rule)") == 0
    assert second.count("var(--rule)") == second.count("var(--accent)") == 3 * CURVES
    assert "The first 3 of 5 channels are shown." in parsed.text


def test_limits_hold_all_sets() -> None:
    narrow, wide = np.zeros((4, 5, 2)), np.ones((4, 5, 2)) * (3.0, -7.0)
    limits = curve_limits([narrow, wide])
    np.testing.assert_allclose(limits, [[-0.18, 3.18], [-7.42, 0.42]])


def test_images_keep_their_page(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    np.savez(tmp_path / "samples" / "student.npz", x=RNG.integers(0, 256, (9, 8, 8), dtype=np.uint8))
    parsed: Page = page(tmp_path)[1]
    assert not [a for tag, a in parsed.tags if tag == "source"]
    assert "Clips loop" not in parsed.text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("option", "source"), [([], "src"), (["--force-prefers-reduced-motion"], "srcset")])
def test_a_browser_that_wants_less_motion_shows_the_still(
    option: list[str], source: str, tmp_path: Path
) -> None:
    (tmp_path / "samples").mkdir()
    x = RNG.integers(0, 256, (8, 5, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "samples" / "student.npz", x=x)
    text, parsed = page(tmp_path)
    ask = '<script>addEventListener("load", () => document.title = document.images[0].currentSrc)</script>'
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it forbids our script
    (tmp_path / "asked.html").write_text(text.replace("</body>", ask + "</body>"))
    line = [str(BROWSER), *OPTIONS, *option, f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*line, (tmp_path / "asked.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    (expected,) = (a[source] for a in parsed.having(source))
    assert f"<title>{expected}</title>" in shown
