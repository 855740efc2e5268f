"""Scaling and Dataset: the way to the model and back loses nothing, and mistakes are named."""

import json

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data import Dataset, Scaling, from_arrays, load_data

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(40, 7, 9), (40, 7, 9, 3), (40, 9, 7, 1), (2, 1, 1, 3), (40, 8, 8)])
def test_uint8_images_come_back_bit_for_bit(shape):
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    images.flat[:2] = (0, 255)
    data = from_arrays(images)
    x, _ = data.batch(torch.arange(len(data)))
    assert x.dtype == torch.float32
    assert float(x.min()) == -1
    assert float(x.max()) == 1
    back = data.scaling.export(x)
    grey = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, grey)


def test_every_byte_value_survives_and_follows_the_formula():
    raw = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    scaling = Scaling.fit_images(raw)
    x = scaling.to_model(raw)
    # One rounding of float32 apart from the same formula in float64.
    np.testing.assert_allclose(x.flatten().numpy(), np.arange(256) / 127.5 - 1, atol=1.2e-7, rtol=0)
    np.testing.assert_array_equal(scaling.export(x).flatten(), np.arange(256))
    np.testing.assert_allclose(scaling.to_raw(x).flatten().numpy(), np.arange(256), atol=2e-5, rtol=0)


def test_channels_first_and_last_are_the_same_data():
    last = RNG.integers(0, 256, (5, 7, 9, 3), dtype=np.uint8)
    a, b = from_arrays(last), from_arrays(np.ascontiguousarray(last.transpose(0, 3, 1, 2)))
    assert a.shape == b.shape == (3, 7, 9)
    assert a.content_hash == b.content_hash


def test_digits_go_to_bytes_on_export():
    data = load_data("digits")
    assert (len(data), data.shape, data.num_classes, data.kind) == (1797, (1, 8, 8), 10, "image")
    x, labels = data.batch(torch.arange(len(data)))
    torch.testing.assert_close(x, data.raw.float() / 8 - 1, rtol=0, atol=0)
    assert torch.equal(data.scaling.to_raw(x), data.raw.float())
    written = data.scaling.export(x)
    np.testing.assert_array_equal(written, np.rint(data.raw[:, 0].numpy() * (255 / 16)).astype(np.uint8))
    # Read back as a file, the written digits are the same in the model's range up to half a grey level.
    again, _ = from_arrays(written, labels).batch(torch.arange(len(data)))
    assert float((again - x).abs().max()) <= 0.5 / 127.5 + 1e-6


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0, 1, "[0, 1]"), (-1, 1, "[-1, 1]"), (0, 255, "[0, 255]")]
)
def test_float_ranges_are_recognized(low, high, word):
    images = np.linspace(low, high, 4 * 5 * 6).reshape(4, 5, 6)
    data = from_arrays(images)
    assert word in data.scaling.rule
    x, _ = data.batch(torch.arange(4))
    np.testing.assert_allclose(x.flatten().numpy(), np.linspace(-1, 1, 120), atol=3e-7, rtol=0)
    assert data.scaling.export(x).tolist() == np.rint(np.linspace(0, 255, 120)).reshape(4, 5, 6).tolist()


@pytest.mark.parametrize(
    ("images", "word"),
    [
        (np.linspace(0, 1.5, 60).reshape(3, 4, 5), "divide them"),
        (np.linspace(-3, 3, 60).reshape(3, 4, 5), "scale or clip"),
        (np.linspace(0, 16, 60).reshape(3, 4, 5), "divide them"),
        (np.linspace(0, 16, 60).reshape(3, 4, 5).astype(np.uint8), "divide them"),
        (np.linspace(0, 300, 60).reshape(3, 4, 5).astype(np.int64), "0..255"),
    ],
)
def test_unclear_ranges_are_refused(images, word):
    with pytest.raises(UserError, match=word):
        from_arrays(images)


def test_vector_columns_span_the_range_and_come_back():
    columns = [
        RNG.normal(3, 100, 50),
        np.full(50, 7.5),
        1e6 + RNG.integers(0, 3, 50),
        RNG.normal(0, 1e-6, 50),
        RNG.choice([3.0e38, -3.0e38], 50),
    ]
    values = np.stack(columns, 1)
    data = from_arrays(values)
    x, _ = data.batch(torch.arange(50))
    assert data.kind == "vector"
    assert data.shape == (5,)
    moving = x[:, [0, 2, 3, 4]]
    assert float(moving.abs().max()) == 1
    assert bool(torch.isfinite(x).all())
    # The center is rounded to float32, so an end may miss 1 by the resolution of the data, never exceed it.
    assert float(moving.amax(0).min()) > 1 - 1e-5
    assert float(moving.amin(0).max()) < -1 + 1e-5
    assert bool((x[:, 1] == 0).all())
    back = data.scaling.export(x)
    assert back.dtype == np.float32
    assert back.shape == (50, 5)
    # Two roundings of float32, relative to the largest value of the column.
    assert (np.abs(back - values) <= 3e-7 * np.abs(values).max(0)).all()


def test_columns_at_the_resolution_of_float32_stay_in_range():
    """2^24 and the next float32: their middle is no float32, and must not be where the range is centered."""
    data = from_arrays(np.array([[2.0**24], [2.0**24 + 2]]))
    x, _ = data.batch(torch.tensor([0, 1]))
    assert float(x.abs().max()) <= 1
    assert torch.equal(data.scaling.to_raw(x), data.raw)


def test_scaling_survives_json():
    for data in (load_data("digits"), from_arrays(RNG.normal(0.1, 1, (9, 4)))):
        saved = json.loads(json.dumps(data.scaling.to_dict()))
        assert Scaling.from_dict(saved) == data.scaling


@pytest.mark.parametrize(
    "broken",
    [{}, {"half": [0.0]}, {"half": [1.0, 2.0]}, {"centre": None}, {"centre": ["a"]}, {"kind": "sound"}],
)
def test_a_broken_scaling_is_refused(broken):
    values = {**Scaling.for_images(0, 255, "").to_dict(), **broken} if broken else {}
    with pytest.raises(UserError, match="scaling"):
        Scaling.from_dict(values)


def test_export_clips_images_and_refuses_nan():
    scaling = Scaling.for_images(0, 1, "")
    assert scaling.export(torch.tensor([[[[-3.0, 9.0, 0.0]]]])).tolist() == [[[0, 255, 128]]]
    with pytest.raises(UserError, match="1 of 2"):
        scaling.export(torch.tensor([[[[0.0, float("nan")]]]]))


def test_vectors_of_another_length_are_refused():
    with pytest.raises(UserError, match="another length"):
        Scaling.identity(2).export(torch.zeros(4, 3))


def test_flip_mirrors_only_what_is_asked():
    data = from_arrays(RNG.integers(0, 256, (6, 3, 5, 3), dtype=np.uint8), [0, 1, 2, 0, 1, 2])
    indices = torch.tensor([4, 0, 4, 2])
    plain, labels = data.batch(indices)
    assert torch.equal(plain, data.scaling.to_model(data.raw[[4, 0, 4, 2]]))
    mirrored, _ = data.batch(indices, flip=torch.tensor([True, False, False, True]))
    assert labels is not None
    assert labels.tolist() == [1, 0, 1, 2]
    assert torch.equal(mirrored[1:3], plain[1:3])
    for row in (0, 3):
        np.testing.assert_array_equal(mirrored[row].numpy(), plain[row].numpy()[:, :, ::-1])
    with pytest.raises(UserError, match="only images"):
        load_data("ring8").batch(indices, flip=torch.zeros(4, dtype=torch.bool))


def test_std_is_that_of_the_scaled_data(monkeypatch):
    monkeypatch.setattr("distmatch.data.dataset._CHUNK", 100)  # several chunks, the last one short
    data = load_data("digits")
    scaled = data.raw.numpy().astype(np.float64) / 8 - 1
    assert data.std() == pytest.approx(scaled.std(), rel=1e-12)


def test_hash_sees_one_pixel_one_label_and_the_shape():
    images = RNG.integers(0, 256, (6, 4, 6), dtype=np.uint8)
    images.flat[0] = 7
    labels = np.arange(6)
    first = from_arrays(images, labels, name="a")
    other = images.copy()
    other[5, 3, 5] ^= 1
    hashes = {
        first.content_hash,
        from_arrays(other, labels).content_hash,
        from_arrays(images, labels[::-1].copy()).content_hash,
        from_arrays(images).content_hash,
        from_arrays(images.reshape(6, 6, 4), labels).content_hash,
    }
    assert len(hashes) == 5
    assert from_arrays(images.copy(), labels.tolist(), name="b").content_hash == first.content_hash
    assert len(first.content_hash) == 64


def test_subset_keeps_scaling_and_classes():
    data = load_data("digits")
    part = data.subset(torch.tensor([3, 1]))
    assert part.scaling == data.scaling
    assert part.num_classes == 10
    assert torch.equal(part.raw, data.raw[[3, 1]])
    bare = Dataset(data.raw, data.labels, (), "bare", data.scaling).subset(torch.tensor([0, 1]))
    assert bare.num_classes == 10
    assert data.without_labels().num_classes == 0


def test_a_dataset_that_does_not_fit_together_is_refused():
    scaling = Scaling.for_images(0, 1, "")
    with pytest.raises(UserError, match="do not match their scaling"):
        Dataset(torch.zeros(3, 2), None, (), "d", scaling)
    with pytest.raises(UserError, match="labels do not match"):
        Dataset(torch.zeros(3, 1, 2, 2), torch.zeros(3), (), "d", scaling)


def test_arrays_are_copied_and_any_number_type_is_taken():
    floats = RNG.random((4, 3)).astype(np.float32)
    data = from_arrays(floats)
    before = data.raw.clone()
    floats[:] = 0
    assert torch.equal(data.raw, before)
    big_endian = before.numpy().astype(">f8")
    assert torch.equal(from_arrays(big_endian).raw, before)
    assert from_arrays(before.to(torch.bfloat16)).raw.dtype == torch.float32
    masks = from_arrays(RNG.random((9, 4, 4)) > 0.5)
    assert set(masks.batch(torch.arange(9))[0].unique().tolist()) == {-1.0, 1.0}
