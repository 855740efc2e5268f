"""Batches made ahead are those made in time."""

import threading

import numpy as np
import pytest
import torch

from distmatch.data import load_data
from distmatch.data.ahead import Ahead, ahead
from distmatch.data.batches import Batches
from distmatch.data.store.prepare import prepare


def same(one, other):
    assert torch.equal(one.x, other.x)
    assert one.conditioning.keys() == other.conditioning.keys()
    assert all(torch.equal(one.conditioning[name], other.conditioning[name]) for name in one.conditioning)


def test_batches_made_ahead_are_equal_in_any_order():
    digits = load_data("digits")
    plain, early = Batches(digits, 300, 5, flip=True), Ahead(Batches(digits, 300, 5, flip=True))
    for step in (0, 1, 2, 3, 9, 10, 4, 4, 5, 11):
        same(early(step), plain(step))


def test_the_next_batch_is_made_while_this_one_is_used():
    made = {step: threading.Event() for step in range(4)}

    def batches(step):
        if step == 3:
            raise ValueError("no such batch")
        made[step].set()
        return step

    early = Ahead(batches)
    assert early(0) == 0
    assert made[1].wait(20)
    assert not made[2].is_set()
    assert (early(1), early(2)) == (1, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such batch"):
            early(3)


def test_where_batches_are_made_ahead(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(256, dtype=np.uint8).reshape(16, 4, 4))
    prepare(tmp_path / "x.npy", tmp_path / "store")
    store, cpu = load_data(tmp_path / "store"), torch.device("cpu")
    batches = Batches(store, 4, 0)
    assert isinstance(ahead(batches, cpu, store), Ahead)
    assert ahead(batches, cpu, load_data("digits")) is batches
    assert ahead(batches, cpu, None) is batches
    assert isinstance(ahead(batches, torch.device("cuda"), None), Ahead)


def test_threads_draw_the_same_order():
    """The watch of a run draws batches while those of the next steps are made."""
    batches = Batches(load_data("digits"), 900, 1)
    expected = [batches(step).x for step in range(40)]
    wrong = []

    def draw(steps):
        wrong.extend(step for step in steps if not torch.equal(batches(step).x, expected[step]))

    threads = [threading.Thread(target=draw, args=(steps,)) for steps in (range(40), range(39, -1, -1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_batches_on_a_gpu_are_equal():
    digits = load_data("digits")
    early, plain = Ahead(Batches(digits, 64, 5, device="cuda")), Batches(digits, 64, 5)
    for step in range(20):
        same(early(step).on("cpu"), plain(step))
