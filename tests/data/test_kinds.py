"""Sequences and video: how arrays are read as such, scaled, written and read again; the moving digits."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data import Scaling, from_arrays, load_data
from distmatch.training.evaluation import npz_bytes

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(30, 3, 5, 7, 1), (30, 3, 5, 7, 3), (30, 4, 4, 4, 3)])
def test_uint8_video_comes_back_bit_for_bit(shape: tuple[int, ...], tmp_path: Path) -> None:
    video = RNG.integers(0, 256, shape, dtype=np.uint8)
    video.flat[:2] = (0, 255)
    data = from_arrays(video)
    assert (data.kind, data.shape) == ("video", (shape[-1], *shape[1:4]))
    first = from_arrays(np.moveaxis(video, -1, 1))
    assert first.content_hash == data.content_hash
    x, _ = data.batch(torch.arange(30))
    np.testing.assert_allclose(x.numpy(), np.moveaxis(video, -1, 1) / 127.5 - 1, atol=1.2e-7, rtol=0)
    written = data.scaling.export(x)
    np.testing.assert_array_equal(written, video)
    (tmp_path / "v.npz").write_bytes(npz_bytes(written, None))
    assert load_data(tmp_path / "v.npz").content_hash == data.content_hash
    mirrored, _ = data.batch(torch.arange(2), flip=torch.tensor([True, False]))
    assert torch.equal(mirrored, torch.stack([x[0].flip(-1), x[1]]))


def test_grey_video_and_sequences_say_what_they_are(tmp_path: Path) -> None:
    x = RNG.random((20, 6, 8, 3)).astype(np.float32)
    assert from_arrays(x).shape == (3, 6, 8)
    assert from_arrays(x, kind="video").shape == (1, 6, 8, 3)
    walks = RNG.random((20, 6, 8)).astype(np.float32)
    assert from_arrays(walks).shape == (1, 6, 8)
    assert from_arrays(walks, kind="sequence").shape == (6, 8)
    assert from_arrays(walks[..., 0], kind="sequence").shape == (6, 1)
    np.savez(tmp_path / "w.npz", x=walks, kind="sequence")
    assert load_data(tmp_path / "w.npz").shape == (6, 8)
    np.savez(
        tmp_path / "kinds.npz", x=walks, kind=np.arange(20)
    )  # a column of somebody's, which says nothing
    assert load_data(tmp_path / "kinds.npz").kind == "image"


def test_sequences_are_scaled_by_channel_and_come_back(tmp_path: Path) -> None:
    """Each channel from its smallest to its largest value; one of large values in float64."""
    x = RNG.standard_normal((50, 9, 3)) * (1.0, 20.0, 1e-3) + (0.0, -5.0, 1e6)
    data = from_arrays(x, kind="sequence")
    got, _ = data.batch(torch.arange(50))
    low, high = x.min((0, 1)), x.max((0, 1))
    np.testing.assert_allclose(got.numpy(), 2 * (x - low) / (high - low) - 1, atol=2e-6)
    assert data.scaling.precise
    back = data.scaling.export(got)
    np.testing.assert_allclose(back, x, rtol=0, atol=2e-6 * (high - low).max())
    (tmp_path / "s.npz").write_bytes(npz_bytes(back, None))
    again = load_data(tmp_path / "s.npz")
    assert (again.kind, again.shape) == ("sequence", (9, 3))
    assert Scaling.from_dict(data.scaling.to_dict()) == data.scaling
    x[:, :, 1] = 4.0
    constant = from_arrays(x, kind="sequence")
    assert constant.constant_columns() == ["column 2"]
    assert constant.scaling.export(got)[..., 1].tolist() == np.full((50, 9), 4.0).tolist()


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (np.zeros((4, 3)), "video", "wrong number of axes for videos"),
        (np.zeros((4, 3, 2, 2)), "sequence", "(N, L, D)"),
        (np.zeros((4, 3, 2, 2, 2, 2)), None, "(N, C, T, H, W)"),
        (np.zeros((4, 3)), "clip", "vector, sequence, image, video"),
        (RNG.random((4, 5, 6, 7, 8)), None, "not videos of 1 or 3 channels"),
        (RNG.random((4, 5, 6, 7)), None, 'kind="video"'),
        (100 * RNG.standard_normal((9, 5, 2)), None, 'kind="sequence"'),
        (RNG.integers(0, 999, (4, 5, 6, 7, 3)), None, "videos of whole numbers must lie in 0..255"),
    ],
)
def test_mistakes_name_the_axes(x: np.ndarray, kind: str | None, words: str) -> None:
    with pytest.raises(UserError) as caught:
        from_arrays(x, kind=kind)
    assert words in str(caught.value)


def test_a_wrong_word_in_a_file_and_mirrored_sequences_are_refused(tmp_path: Path) -> None:
    walks = RNG.random((20, 6, 8))
    np.savez(tmp_path / "w.npz", x=walks, kind="sequences")
    with pytest.raises(UserError, match="did you mean sequence"):
        load_data(tmp_path / "w.npz")
    data = from_arrays(walks, kind="sequence")
    with pytest.raises(UserError, match="sequences"):
        data.batch(torch.arange(2), flip=torch.ones(2, dtype=torch.bool))
    with pytest.raises(UserError, match="--flip mirrors images"):
        dm.train(data, steps=1, batch=4, flip=True, quiet=True)


def test_a_model_of_sequences_reads_plain_arrays_as_such() -> None:
    walks = RNG.standard_normal((40, 6, 2)).astype(np.float32)
    teacher = dm.train(from_arrays(walks, kind="sequence"), steps=1, batch=8, quiet=True)
    student = dm.distill(teacher, walks, steps=1, batch=8, quiet=True, fake_score_steps=1)
    assert student.shape == (6, 2)
    assert student.export(student.sample(3)).shape == (3, 6, 2)
    assert dm.evaluate(student, walks, n=16)["fd"].value > 0


def test_moving_digits_move_by_one_pixel_a_frame() -> None:
    data, still = load_data("moving-digits"), load_data("digits")
    assert (len(data), data.shape, data.num_classes, data.kind) == (1797, (1, 8, 8, 8), 40, "video")
    assert data.class_names[13] == "3 left"
    assert data.labels is not None
    assert still.labels is not None
    assert torch.equal(data.labels // 4, still.labels)
    moves = {"right": (0, -1), "left": (0, 1), "down": (-1, 0), "up": (1, 0)}  # where a pixel was, per frame
    for sample in range(20):
        name = data.class_names[data.labels[sample]].split()[1]
        down, right = moves.pop(name, (0, 0))
        for t, row, column in itertools.product(*3 * [range(8 if down or right else 0)]):
            before = still.raw[sample, 0, (row + down * t) % 8, (column + right * t) % 8]
            assert data.raw[sample, 0, t, row, column] == before
    assert not moves  # all four were seen


def test_stacked_digits_are_digits_in_every_channel() -> None:
    data, single = load_data("stacked-digits"), load_data("digits")
    assert (len(data), data.shape, data.num_classes) == (20_000, (3, 8, 8), 0)
    known = {image.numpy().tobytes() for image in single.raw[:, 0]}
    assert all(channel.numpy().tobytes() in known for channel in data.raw[:200].flatten(0, 1))
    first = torch.tensor(
        [image.numpy().tobytes() == single.raw[0].numpy().tobytes() for image in data.raw[:, 0]]
    )
    # 20,000 draws of 1,797: 11.1 of each, 6 standard deviations of a Poisson number
    assert abs(int(first.sum()) - 11.1) < 20


def test_a_long_tail_falls_geometrically_and_shows_images_of_its_class() -> None:
    data, whole = load_data("digits:long-tail"), load_data("digits")
    assert data.labels is not None
    assert whole.labels is not None
    counts = torch.bincount(data.labels).double()
    assert abs(len(data) - len(whole)) <= 5  # the counts are rounded
    assert torch.allclose(counts[:-1] / counts[1:], torch.tensor(100.0 ** (1 / 9)).double(), rtol=0.05)
    classes = {image.numpy().tobytes(): int(k) for image, k in zip(whole.raw, whole.labels, strict=True)}
    found = [classes[image.numpy().tobytes()] for image in data.raw]
    assert found == data.labels.tolist()
