"""The nearest points, by tree and by all distances, against a sort of all of them."""

import pytest
import torch

from distmatch.base.neighbors import nearest
from tests.helpers.draws import normal


@pytest.mark.parametrize("d", [1, 3, 12])
@pytest.mark.parametrize("tree", [True, False])
def test_the_nearest_come_first_and_what_is_left_out_does_not_come(
    d: int, tree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmatch.base.neighbors._TREE_DIMENSIONS", 20 if tree else 0)
    monkeypatch.setattr("distmatch.base.neighbors._PAIRS", 70)  # a row at a time
    x, points = normal(40, d).requires_grad_(), normal(60, d, seed=1)
    expected, order = (x.detach()[:, None] - points).square().sum(2).sqrt().sort(dim=1)
    distances, indices = nearest(x, points, 5)
    assert torch.equal(indices, order[:, :5])
    torch.testing.assert_close(distances, expected[:, :5])
    distances, indices = nearest(x, points, 5, without=order[:, 1])
    assert torch.equal(indices, order[:, [0, 2, 3, 4, 5]])
    torch.testing.assert_close(distances, expected[:, [0, 2, 3, 4, 5]])
    far = nearest(x, points, 5, without=order[:, -1])  # one that would not have come
    assert torch.equal(far[1], order[:, :5])


@pytest.mark.parametrize("d", [2, 12])
def test_copies_of_a_point_are_not_the_point(d: int) -> None:
    points = normal(30, d)
    points[10:14] = points[3]
    distances, indices = nearest(points, points, 4, without=torch.arange(30))
    assert not bool((indices == torch.arange(30)[:, None]).any())
    assert float(distances[3].abs().max()) == 0  # the four copies
    assert set(indices[3].tolist()) == {10, 11, 12, 13}


def test_equal_points_far_from_the_origin_are_at_distance_zero() -> None:
    points = 1e8 + normal(20, 12)
    assert float(nearest(points, points.clone(), 1)[0].max()) == 0
