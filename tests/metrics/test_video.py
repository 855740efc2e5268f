"""What is measured of video besides whole clips: single frames, and how much they move."""

import pytest
import torch

import distmatch as dm
from distmatch.base.seeds import generator
from distmatch.data import from_arrays, load_data
from distmatch.metrics import evaluate, frechet_distance, reference_floor
from distmatch.metrics.reference import stratified_order
from distmatch.metrics.video import motion, single_frames, video_estimates


def test_motion_in_closed_form():
    """A lit pixel of n that moves every frame: two pixels change by the whole range."""
    clip = -torch.ones(1, 1, 5, 1, 10)
    for t in range(5):
        clip[0, 0, t, 0, t] = 1
    assert motion(torch.cat([clip, clip[:, :, :1].expand_as(clip)])).tolist() == pytest.approx([0.2, 0.0])


def test_frames_are_taken_in_turn():
    x = torch.arange(5 * 3.0).reshape(5, 1, 3, 1, 1)
    assert single_frames(x).flatten().tolist() == [0, 4, 8, 9, 13]


def test_estimates_are_those_of_the_parts():
    g = torch.Generator().manual_seed(0)
    x, real = torch.randn(80, 1, 3, 2, 2, generator=g), torch.randn(80, 1, 3, 2, 2, generator=g) + 0.5
    found = evaluate(x, real, n=40, seed=1, features=lambda clips: clips.flatten(1)[:, :3])
    order = [
        stratified_order(None, 80, generator(1, f"evaluate/{who}")) for who in ("generated", "reference")
    ]
    sides = [side[rows].split(40) for side, rows in zip((x, real), order, strict=True)]
    frames = [[single_frames(side).flatten(1) for side in pair] for pair in zip(*sides, strict=True)]
    assert found["frame_fd"].value == pytest.approx(sum(frechet_distance(*pair) for pair in frames) / 2)
    assert found["frame_fd"].n == 40
    shown = x.clip(-1, 1)  # nothing beyond white and black is seen
    assert found["motion"].value == pytest.approx(
        float((shown[:, :, 1:] - shown[:, :, :-1]).abs().mean() / 2)
    )
    assert found["motion"].n == 80
    # The errors are those over repetitions: 0.5 to 2 times them, of 60 draws with one seed.
    draws = torch.randn(60, 80, 1, 3, 2, 2, generator=g)
    theirs = [single_frames(side).flatten(1) for side in real.split(40)]

    def estimates(d):
        own = [single_frames(side).flatten(1) for side in d.split(40)]
        return video_estimates(motion(d), zip(own, theirs, strict=True))

    again = [estimates(d) for d in draws]
    for key in ("frame_fd", "motion"):
        spread = float(torch.tensor([e[key].value for e in again]).std())
        error = sum(e[key].stderr for e in again) / 60
        assert 0.5 < error / spread < 2, key


def test_a_still_has_good_frames_and_no_motion():
    data = load_data("moving-digits")
    g = torch.Generator().manual_seed(0)
    clips, _ = data.batch(torch.randperm(len(data), generator=g))  # their writers come one after another

    def coarse(x):
        return x[..., ::2, ::2].flatten(1)

    real, fresh = from_arrays(clips[:1000].clamp(-1, 1), kind="video"), clips[1000:]
    floor = reference_floor(real, features=coarse, n=390)
    moving = evaluate(fresh, real, features=coarse, n=390)
    at = torch.randint(8, (len(fresh),), generator=g)
    stills = fresh[torch.arange(len(fresh)), :, at][:, :, None].expand_as(fresh)
    still = evaluate(stills, real, features=coarse, n=390)
    for found in (moving, still):
        error = found["frame_fd"].stderr + floor["frame_fd"].stderr
        assert abs(found["frame_fd"].value - floor["frame_fd"].value) < 4 * error
    assert still["motion"].value == 0
    assert abs(moving["motion"].value - floor["motion"].value) < 4 * moving["motion"].stderr
    assert still["fd"].value > 2 * moving["fd"].value


def test_images_have_neither():
    x = torch.randn(100, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not {"motion", "frame_fd"} & dm.evaluate(x[:50], x[50:], features="pixels").keys()
