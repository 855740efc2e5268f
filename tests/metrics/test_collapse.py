"""Signs of collapse: closed forms, and what does not change them."""

import math

import pytest
import torch

from distmatch.metrics.collapse import (
    reduced,
    saturation,
    seed_distances,
    seed_energy,
    seed_vendi,
    solid_share,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_generator_that_ignores_its_noise_has_no_diversity():
    one = normal(3, 1, 2, 4, 4).expand(3, 8, 2, 4, 4)
    center = normal(3, 2, 4, 4, seed=1)
    assert torch.equal(seed_distances(one), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(seed_vendi(one, center), torch.ones(3, dtype=torch.float64))


def test_distances_of_points_that_are_known():
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]])  # distances 5, 0, 5, over the root of 2
    assert seed_distances(x).item() == pytest.approx(10 / 3 / math.sqrt(2))


def test_vendi_counts_the_directions():
    axes = torch.eye(4).reshape(1, 4, 4) + 5.0
    assert seed_vendi(axes, torch.full((1, 4), 5.0)).item() == pytest.approx(4)
    two = torch.cat([axes[:, :2], axes[:, :2]], dim=1)
    assert seed_vendi(two, torch.full((1, 4), 5.0)).item() == pytest.approx(2)


def test_the_order_of_seeds_and_an_affine_map_change_nothing_relative_to_the_teacher():
    x, y = normal(3, 16, 5), 0.5 * normal(3, 16, 5, seed=1) + 2
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))

    def found(a, b):
        center = b.mean(1)
        return torch.tensor(
            [
                float(seed_distances(a).mean() / seed_distances(b).mean()),
                float(seed_vendi(a, center).mean() / seed_vendi(b, center).mean()),
                seed_energy(a, b),
            ]
        )

    first = found(x.double(), y.double())
    torch.testing.assert_close(found(x[:, order].double(), y.double()), first)
    torch.testing.assert_close(found(x.flip(0).double(), y.flip(0).double()), first)
    torch.testing.assert_close(found(3 * x.double() - 7, 3 * y.double() - 7), first)
    assert seed_distances(2 * x).sum() == pytest.approx(2 * seed_distances(x).sum().item())


def test_energy_of_equal_distributions_and_of_a_point_at_the_center():
    """Two sets of 64 conditions with 16 seeds each: the standard error of the mean was 0.004."""
    x, y = normal(64, 16, 32), normal(64, 16, 32, seed=1)
    assert abs(seed_energy(x, y)) < 0.02
    point = torch.zeros(4, 8, 4096)  # |Y| = sqrt(D) and |Y - Y'| = sqrt(2 D): 2 / sqrt(2) - 0 - 1
    assert seed_energy(point, normal(4, 8, 4096)) == pytest.approx(math.sqrt(2) - 1, abs=0.01)


def test_saturation_is_the_share_at_the_ends():
    x = torch.tensor([-1.2, -1.0, -0.9, 0.0, 0.99, 0.997, 1.0, 3.0]).reshape(1, 2, 2, 2)
    assert saturation(x).tolist() == [5 / 8]
    pixels = (x * 127.5 + 127.5).round().clamp(0, 255)  # as they are written
    assert ((pixels == 0) | (pixels == 255)).double().mean().item() == 5 / 8


def test_blue_and_grey_images_are_solid_and_edges_are_not():
    blue = torch.tensor([-1.0, -1.0, 0.8]).reshape(3, 1, 1).expand(3, 8, 8)
    grey = torch.zeros(3, 8, 8)
    edge = grey.clone()
    edge[2, :, 4:] = 1
    noisy = grey + 0.03 * normal(3, 8, 8)
    assert solid_share(torch.stack([blue, grey, edge, noisy])).tolist() == [1, 1, 0, 1]
    clip = torch.stack([blue, grey, edge, edge], dim=1)  # (3, 4, 8, 8): half of the frames
    assert solid_share(clip[None]).tolist() == [0.5]
    beyond = edge.clone()
    beyond[2] = 1 + normal(8, 8).abs()  # all of it is shown as white
    assert solid_share(beyond[None]).tolist() == [1]


@pytest.mark.parametrize("shape", [(2, 3, 256, 100), (2, 3, 9, 128, 128), (2, 1, 500, 3)])
def test_large_samples_are_averaged_over_areas(shape):
    x = normal(*shape)
    small = reduced(x, 1000)
    assert small.ndim == x.ndim
    assert small.shape[:2] == x.shape[:2]
    assert small[0].numel() <= 1000
    flat = torch.full(shape, 0.25)
    torch.testing.assert_close(reduced(flat, 1000), torch.full(small.shape, 0.25))
    even = normal(2, 3, 16, 32)
    torch.testing.assert_close(reduced(even, 3 * 16 * 16), even.reshape(2, 3, 16, 16, 2).mean(-1))


def test_small_samples_and_vectors_stay():
    for shape in ((2, 3, 8, 8), (2, 100_000), (2, 50, 400)):
        x = normal(*shape)
        assert reduced(x) is x
