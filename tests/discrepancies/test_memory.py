"""The backward pass of every loss keeps samples, never a block of the matrix of pairs."""

import pytest
import torch

from distmatch.discrepancies import (
    cauchy_schwarz_loss,
    chunks,
    distance_covariance_loss,
    energy_distance_loss,
    joint_distance_covariance_loss,
    kernel_stein_loss,
    mmd_loss,
)

LOSSES = {
    "mmd": mmd_loss,
    "mmd_biased": lambda x, y: mmd_loss(x, y, "imq", estimator="biased"),
    "energy": energy_distance_loss,
    "cauchy_schwarz": cauchy_schwarz_loss,
    "distance_covariance": distance_covariance_loss,
    "joint": lambda x, y: joint_distance_covariance_loss([x, y, x * y]),
    "stein": lambda x, y: kernel_stein_loss(x, y),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_block_is_kept_for_the_backward_pass(name, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_ELEMENTS", 300 * 50)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 3, generator=g, requires_grad=True) for _ in range(2))
    kept = []

    def note(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = LOSSES[name](x, y)
    # A block has 15,000 entries; what is kept is of the size of the samples (900), three variables at most.
    assert max(kept) <= 3 * 900
    loss.backward()
    assert torch.isfinite(x.grad).all()
    assert float(x.grad.abs().max()) > 0
