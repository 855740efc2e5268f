"""The order of batches: each epoch a permutation, and nothing but the step decides."""

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data import load_data
from distmatch.data.batches import Batches
from distmatch.data.order import BatchOrder


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (5, 12), (3, 100), (1, 3), (64, 1)])
def test_every_epoch_is_a_permutation(n, batch):
    order = BatchOrder(n, batch, seed=3)
    steps = -(-4 * n // batch)
    stream = torch.cat([order.indices(s) for s in range(steps)])
    assert stream.dtype == torch.int64
    for epoch in stream[: 4 * n].split(n):
        assert sorted(epoch.tolist()) == list(range(n))


def test_a_fresh_order_agrees_at_any_step():
    walked = BatchOrder(50, 8, seed=1)
    batches = [walked.indices(s) for s in range(40)]
    for step in (39, 0, 17, 6, 7):  # out of order, across epochs, and again from the same object
        assert torch.equal(BatchOrder(50, 8, seed=1).indices(step), batches[step])
        assert torch.equal(walked.indices(step), batches[step])


def test_epochs_and_seeds_differ():
    a, b = BatchOrder(100, 100, seed=0), BatchOrder(100, 100, seed=1)
    assert not torch.equal(a.indices(0), a.indices(1))
    assert not torch.equal(a.indices(0), b.indices(0))
    # Were the key seed + epoch, one run would repeat another an epoch later.
    assert not torch.equal(a.indices(1), b.indices(0))
    assert not torch.equal(BatchOrder(100, 100, seed=-1).indices(0), a.indices(0))


@pytest.mark.statistical
def test_permutations_are_uniform():
    """The 6 orders of 3 samples come equally often (chi-square, 5 degrees of freedom: above 30.9 by 1e-5)."""
    rows = BatchOrder(3, 3 * 6000, seed=0).indices(0).reshape(6000, 3)
    counts = (rows[:, 0] * 3 + rows[:, 1]).bincount(minlength=9)
    observed = counts[[1, 2, 3, 5, 6, 7]].double()
    assert int(observed.sum()) == 6000
    assert float(((observed - 1000) ** 2 / 1000).sum()) < 30.9


def test_the_order_of_a_seed_never_changes():
    """A run must resume on the same data after an upgrade: the numbers of today are those of tomorrow."""
    assert BatchOrder(8, 8, seed=0).indices(0).tolist() == [3, 0, 6, 5, 4, 7, 2, 1]


def test_memory_stays_at_what_a_batch_touches():
    order = BatchOrder(10, 4, seed=0)
    for step in range(30):
        order.indices(step)
        assert len(order._epochs) <= 2


def test_batches_are_a_function_of_the_step():
    data = load_data("digits")
    walked, fresh = (Batches(data, 64, seed=5, flip=True) for _ in range(2))
    batches = [walked(s) for s in range(30)]
    for step in (29, 3):
        assert torch.equal(fresh(step).x, batches[step].x)
        assert torch.equal(fresh(step).conditioning["label"], batches[step].conditioning["label"])
    plain = [Batches(data, 64, seed=5)(s).x for s in range(30)]
    flipped = torch.cat([(b.x != p).any((1, 2, 3)) for b, p in zip(batches, plain, strict=True)])
    # Half are mirrored (no digit is its own mirror image to the grey level): 1920 draws, 5 deviations.
    assert abs(float(flipped.double().mean()) - 0.5) < 5 * 0.5 / 1920**0.5


@pytest.mark.parametrize(("n", "batch"), [(0, 4), (4, 0), (4, -1)])
def test_empty_batches_are_refused(n, batch):
    with pytest.raises(UserError, match="at least one"):
        BatchOrder(n, batch, 0)


def test_negative_steps_are_refused():
    with pytest.raises(UserError, match="number of a step"):
        BatchOrder(4, 2, 0).indices(-1)
