"""Toy mixtures against closed forms, and the archives against the pixels they encode."""

import hashlib
import os

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data import DATA_NAMES, TOY_NAMES, load_data, toy, toy_dataset
from distmatch.data.encoded import decode_residual

N = 40_000


@pytest.mark.statistical
@pytest.mark.parametrize("name", TOY_NAMES)
def test_samples_have_the_moments_of_the_mixture(name):
    """Mean, second moments and mode shares lie within 5 standard errors of their closed forms (seed 1)."""
    mixture, data = toy(name), toy_dataset(name, N, seed=1)
    w, m, c = mixture.weights, mixture.means, mixture.covariances
    x, labels = data.batch(torch.arange(N))
    assert labels is not None
    x = x.double()
    products = torch.stack((x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]), 1)
    second = (w[:, None, None] * (c + m[:, :, None] * m[:, None, :])).sum(0)
    exact = torch.stack((*(w[:, None] * m).sum(0), second[0, 0], second[1, 1], second[0, 1]))
    error = products.std(0) / N**0.5
    assert bool(((products.mean(0) - exact).abs() < 5 * error).all())
    share = labels.bincount(minlength=len(w)) / N
    assert bool(((share - w).abs() < 5 * (w * (1 - w) / N).sqrt()).all())


@pytest.mark.statistical
@pytest.mark.parametrize("name", TOY_NAMES)
def test_samples_are_those_of_the_exact_teacher_unscaled(name):
    mixture, data = toy(name), toy_dataset(name, N, seed=0)
    x, _ = data.batch(torch.arange(N))
    assert torch.equal(x, data.raw)
    np.testing.assert_array_equal(data.scaling.export(x), data.raw.numpy())
    assert float(x.abs().max()) < 1.6
    assert torch.allclose(
        (mixture.weights[:, None] * mixture.means).sum(0), torch.zeros(2).double(), atol=1e-12
    )
    # Relative standard error of a standard deviation: below sqrt((kurtosis - 1) / 4 N) < 0.5% for these.
    assert data.std() == pytest.approx(mixture.sigma_data, rel=0.025)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_labels_name_the_mode_of_each_sample(name):
    """Standardized by the mode of its label, a sample is standard normal: squared norm 2 on average."""
    mixture, data = toy(name), toy_dataset(name, N, seed=2)
    assert data.labels is not None
    assert data.num_classes == len(mixture.weights)
    variance = mixture.covariances[data.labels][:, 0, 0]
    squared = (data.raw.double() - mixture.means[data.labels]).square().sum(1) / variance
    assert float(squared.mean()) == pytest.approx(2, abs=5 * 2 / N**0.5)  # chi-square, 2 degrees: deviation 2


def test_the_grid_is_uneven_and_the_ring_is_not():
    grid = toy("grid25").weights
    assert float(grid.max() / grid.min()) == pytest.approx(10)
    assert float(toy("ring8").weights.std()) == 0
    assert toy("grid25").sigma_data == pytest.approx(0.730, abs=5e-4)
    assert toy("ring8").sigma_data == pytest.approx((0.5 + 0.08**2) ** 0.5)
    assert toy("skewed2").sigma_data == pytest.approx(0.383, abs=5e-4)


def test_seeds_decide():
    a, b, c = (toy_dataset("ring8", 100, seed).content_hash for seed in (0, 0, 1))
    assert a == b != c


def test_toy_mistakes():
    with pytest.raises(UserError, match="ring8"):
        toy("ring9")
    with pytest.raises(UserError, match="number of samples"):
        toy_dataset("ring8", 1)


def encode(pixels):
    """The archive's code for (N, H, W, 3), pixel by pixel in plain integers."""
    red, green, blue = (pixels[..., k].astype(int) for k in range(3))
    planes = np.stack((red - green, green, blue - green))
    down = np.diff(planes, axis=2, prepend=0)
    return (np.diff(down, axis=3, prepend=0) % 256).astype(np.uint8)


def test_residuals_decode_to_the_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_residual(encode(pixels)), pixels.transpose(0, 3, 1, 2))


def test_archives_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTMATCH_DATA", str(tmp_path))
    rng = np.random.default_rng(1)
    names = np.array(list("abcdefghij"))
    pixels = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    for part, rows in (("part1", slice(0, 5)), ("part2", slice(5, 12))):
        np.savez(
            tmp_path / f"cifar10_train_{part}.npz",
            residual=encode(pixels[rows]),
            labels=labels[rows],
            class_names=names,
        )
    data = load_data("cifar10")
    np.testing.assert_array_equal(data.scaling.export(data.batch(torch.arange(12))[0]), pixels)
    assert data.labels is not None
    assert data.labels.tolist() == labels.tolist()
    assert data.class_names == tuple("abcdefghij")
    with pytest.raises(UserError, match=r"cifar10_test\.npz does not exist"):
        load_data("cifar10:test")
    np.savez(tmp_path / "fashion_mnist.npz", x_train=pixels[..., 0], class_names=names)
    with pytest.raises(UserError, match=r"not the expected archive.*y_train"):
        load_data("fashion_mnist")


@pytest.mark.parametrize("name", ["cifar10", "cifar10:test", "fashion_mnist", "fashion_mnist:test"])
def test_the_variable_is_named_when_it_is_missing(name, monkeypatch):
    monkeypatch.delenv("DISTMATCH_DATA", raising=False)
    with pytest.raises(UserError, match="export DISTMATCH_DATA="):
        load_data(name)


SHA_CIFAR = {  # of the pixels (N, 32, 32, 3) and of the labels as bytes
    "cifar10": (
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    ),
    "cifar10:test": (
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ),
}


@pytest.mark.skipif(not os.environ.get("DISTMATCH_DATA"), reason="DISTMATCH_DATA is not set")
@pytest.mark.parametrize("name", list(SHA_CIFAR))
def test_cifar10_is_bit_for_bit_cifar10(name):
    data = load_data(name)
    pixels = data.raw.permute(0, 2, 3, 1).contiguous().numpy()
    assert data.labels is not None
    found = (pixels, data.labels.to(torch.uint8).numpy())
    assert tuple(hashlib.sha256(part).hexdigest() for part in found) == SHA_CIFAR[name]
    assert data.num_classes == 10


@pytest.mark.skipif(not os.environ.get("DISTMATCH_DATA"), reason="DISTMATCH_DATA is not set")
@pytest.mark.parametrize(("name", "n"), [("fashion_mnist", 60_000), ("fashion_mnist:test", 10_000)])
def test_fashion_mnist_has_its_known_statistics(name, n):
    """Balanced classes and the published training mean 0.2860 and deviation 0.3530 (of 0..1)."""
    data = load_data(name)
    assert (len(data), data.shape) == (n, (1, 28, 28))
    assert data.labels is not None
    assert set(data.labels.bincount().tolist()) == {n // 10}
    assert data.std() / 2 == pytest.approx(0.3530, abs=1e-3)


def test_every_name_is_listed_once():
    assert len(set(DATA_NAMES)) == len(DATA_NAMES) == 18
