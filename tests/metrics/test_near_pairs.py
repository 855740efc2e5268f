"""Nearest-neighbor metrics by products in float32 are those in float64, whatever the samples are like."""

import pytest
import torch

from distmatch.metrics import near_pairs
from distmatch.metrics.prdc import prdc_replicates

N, D = 210, 40


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DECAY = torch.arange(1, D + 1) ** -0.7
ATOMS = 500 * normal(10, D)
OF_ATOM, DRAWN = torch.arange(N) % 10, torch.randint(N, (N,), generator=torch.Generator().manual_seed(5))
SETS = {
    "one cloud": (normal(N, D) * DECAY, normal(N - 30, D, seed=1) * DECAY * 1.05),
    # distances within a cluster are far below the rounding of products
    "clusters": (ATOMS[OF_ATOM] + 0.01 * normal(N, D), ATOMS[OF_ATOM] + 0.01 * normal(N, D, seed=1)),
    "copies": ((normal(N, D) * DECAY)[torch.arange(N) // 3], (normal(N, D) * DECAY)[DRAWN]),
    # the lower bound of a distance is below the radius -1 of samples that a half leaves out
    "near copies": (300 * normal(N, D), 300 * normal(N, D).roll(N // 2, 0) + 1e-3 * normal(N, D, seed=1)),
    "few atoms": (ATOMS[OF_ATOM], ATOMS[torch.arange(N) % 9]),
    "equal distances": ((2 * normal(N, D) * DECAY).round(), (2 * normal(N, D, seed=1) * DECAY).round()),
    "collapsed": (normal(N, D) * DECAY, DECAY * 0.2 + 1e-3 * normal(N, D, seed=1)),
    "float64": (normal(N, D).double() * DECAY + 1e4, normal(N, D, seed=1).double() * DECAY + 1e4),
}


def counted(monkeypatch):
    """Rows that were computed in float64 as a whole, one number in a list."""
    rows, whole = [0], near_pairs.in_float64

    def count(a, of_a, b):
        found = whole(a, of_a, b)
        rows[0] += len(found)
        return found

    monkeypatch.setattr(near_pairs, "in_float64", count)
    return rows


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("kind", SETS)
def test_replicates_are_the_same_as_in_float64(kind, halves, monkeypatch):
    rows = counted(monkeypatch)
    monkeypatch.setattr(near_pairs, "_ROWS", 64)
    expected = prdc_replicates(*SETS[kind], halves=halves)
    assert rows[0] >= 2 * N
    rows[0] = 0
    monkeypatch.setattr(near_pairs, "_WIDE", 8)
    if halves:  # of so few samples too many pairs are unsure
        monkeypatch.setattr(near_pairs, "_UNSURE", 1.0)
    torch.testing.assert_close(prdc_replicates(*SETS[kind], halves=halves), expected, rtol=0, atol=0)
    if kind == "one cloud":
        assert rows[0] < N / 20


def test_only_pairs_near_a_radius_are_computed_one_by_one(monkeypatch):
    pairs, one_by_one = [0], near_pairs._one_by_one

    def count(a, i, b, j):
        pairs[0] += len(i)
        return one_by_one(a, i, b, j)

    monkeypatch.setattr(near_pairs, "_one_by_one", count)
    monkeypatch.setattr(near_pairs, "_WIDE", 8)
    prdc_replicates(*SETS["one cloud"])
    assert 6 * 2 * N <= pairs[0] < 10 * 2 * N  # the six nearest of each sample, and few others


def test_with_less_than_full_precision_of_products_all_is_in_float64(monkeypatch):
    monkeypatch.setattr(near_pairs, "_WIDE", 8)
    x = normal(20, D)
    assert near_pairs.points(x, x.mean(0)).fast
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert not near_pairs.points(x, x.mean(0)).fast
