"""Inductive moment matching: its statistic, its special case, its levels, and that it trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.data.toys import toy
from distmatch.diffusion.conditioning import Conditioning
from distmatch.discrepancies.kernels import laplace as laplace_kernel
from distmatch.discrepancies.mmd import mmd, mmd_loss
from distmatch.losses import imm_lower_level, imm_weight
from distmatch.losses.kernel import group_mmd, imm_output_scale, laplace_profile, quadratic_profile
from distmatch.methods.consistency.direct import Draws
from distmatch.methods.state import DistillState
from distmatch.training.packing import pack
from tests.helpers.draws import normal
from tests.helpers.small import batch, distiller, network_teacher


def small(classes: int = 0, **settings: Any) -> tuple[Any, DistillState]:
    method = distiller(network_teacher(classes), method="imm", **settings)
    state = method.init(0)
    jolt = torch.Generator().manual_seed(3)
    for parameter in state.student.denoiser.parameters():  # so that the level to jump to counts
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=jolt))
    return method, state


def test_the_statistic_is_the_biased_one_of_each_group() -> None:
    x, y = normal(5, 4, 3), normal(5, 4, 3, seed=1)
    found = group_mmd(x, y, laplace_profile)
    for g in range(5):
        expected = mmd_loss(x[g], y[g], laplace_kernel(1.0), estimator="biased")
        # Its kernel is floored where particles coincide: exp(-1e-8) for 1.
        torch.testing.assert_close(found[g], expected, rtol=0, atol=1e-7)
    assert (found > 0).all()
    torch.testing.assert_close(group_mmd(x, x.flip(1), laplace_profile), torch.zeros(5, dtype=torch.float64))


def test_the_quadratic_kernel_sees_the_means_alone() -> None:
    x, y = normal(5, 4, 3), normal(5, 4, 3, seed=1)
    expected = (x.mean(1) - y.mean(1)).square().sum(1)
    torch.testing.assert_close(group_mmd(x, y, quadratic_profile), expected)


def test_one_particle_and_the_quadratic_kernel_are_consistency_training() -> None:
    method, state = small(imm_particles=1)
    network: Any = state.student.denoiser
    draws = method.term.draw(state, batch(0))
    loss, _ = method.term.loss(state, draws, "quadratic")
    parameters = list(network.parameters())
    found = torch.autograd.grad(loss.sum(), parameters)
    # By hand: |f(y_t, t, s) - sg f(y_r, r, s)|^2 with the same sample and noise in both.
    x0, noise = draws["x0"][:, 0], draws["noise"][:, 0]
    ends = []
    for level in (draws["t"], draws["r"]):
        y = x0 + level[:, None] * noise
        kept = (draws["s"] / level)[:, None]
        ends.append(kept * y + (1 - kept) * network(y, level, None, target_sigma=draws["s"]))
    by_hand = imm_weight(draws["time"], 4.0) * (ends[0] - ends[1].detach()).square().sum(1)
    for mine, theirs in zip(found, torch.autograd.grad(by_hand.sum(), parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()) + 1e-12)


def test_a_consistent_network_is_a_fixed_point() -> None:
    class OfOnePoint(torch.nn.Module):
        """The denoiser of data that are one point: jumps along straight lines, which agree."""

        shape, num_classes, sigma_data, sigma_min, sigma_max = (2,), 0, 0.7, 0.002, 20.0

        def __init__(self) -> None:
            super().__init__()
            self.point = torch.nn.Parameter(torch.tensor([0.3, -0.4]))

        def forward(
            self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None, *, target_sigma: Tensor
        ) -> Tensor:
            return self.point.expand_as(x)

    method, state = small(imm_halvings=2)
    network = state.student.denoiser = OfOnePoint()  # type: ignore[assignment]
    data = Batch(network.point.detach().clone().expand(32, 2))
    loss, _ = method.term.loss(state, method.term.draw(state, data))
    assert float(loss.detach().abs().max()) < 1e-5
    network.point.data += 0.1  # and a wrong one is not
    loss, _ = method.term.loss(state, method.term.draw(state, data))
    assert float(loss.detach().mean()) > 1e-2


def test_levels_are_in_order_and_reach_from_the_data_to_the_first_level() -> None:
    method, state = small(imm_particles=2, student_sigma=0.0)
    draws = method.term.draw(state, batch(0, n=20_000))
    s, r, t = draws["s"], draws["r"], draws["t"]
    assert ((s > 0) & (s <= r) & (r < t)).all()
    assert float(t.min()) < 0.003
    assert 19 < float(t.max()) <= 20 + 1e-3
    gap = (20 - 0.002) / 2**12
    free = r > s
    torch.testing.assert_close((t - r)[free], torch.full_like(t[free], gap), rtol=0, atol=1e-5)
    assert torch.equal(
        imm_lower_level(t, s, 0.0, 20.0, 0), s
    )  # a gap of the whole range: straight to the target
    # sigma / sigma_data = tau / (1 - tau), tau uniform.
    torch.testing.assert_close(t / 0.7, draws["time"] / (1 - draws["time"]))
    assert abs(float(draws["time"].mean()) - 0.5 * (0.002 / 0.702 + 20 / 20.7)) < 0.015


def test_the_weight_falls_with_the_signal_to_noise_ratio() -> None:
    time = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    step = 1e-6

    def log_snr(u: Tensor) -> Tensor:
        return 2 * torch.log((1 - u) / u)

    fall = -(log_snr(time + step) - log_snr(time - step)) / (2 * step)
    rest = (1 - time) / ((1 - time) ** 2 + time**2)
    expected = 0.5 * torch.sigmoid(4.0 - log_snr(time)) * fall * rest
    torch.testing.assert_close(imm_weight(time, 4.0), expected, rtol=1e-7, atol=0)


def test_the_kernel_measures_in_units_of_the_networks_output() -> None:
    network, x = network_teacher().double(), normal(6, 2)
    t, s = torch.full((6,), 3.0, dtype=torch.float64), torch.full((6,), 0.4, dtype=torch.float64)
    bias = list(network.parameters())[-1]
    before = (s / t)[:, None] * x + (1 - s / t)[:, None] * network(x, t)
    bias.data += 1.0  # the last layer's: it moves F by one
    moved = (s / t)[:, None] * x + (1 - s / t)[:, None] * network(x, t) - before
    torch.testing.assert_close(moved, imm_output_scale(t, s, 0.7)[:, None].expand(6, 2), rtol=1e-6, atol=0)


def test_only_particles_of_the_same_class_are_compared() -> None:
    method, state = small(3)
    data = batch(0, classes=3, n=40)
    draws = method.term.draw(state, data)
    labels = data.conditioning["label"]
    order = labels.argsort(stable=True)
    assert torch.equal(draws["x0"].flatten(0, 1), data.x[order])
    assert torch.equal(draws.conditioning["label"].flatten(), labels[order])
    groups = draws.conditioning["label"]
    assert ((groups == groups[:, :1]).all(1).float().mean()) >= 0.8
    # A group of four classes is four groups of one, each counting for a quarter.
    four = torch.tensor([[0, 1, 2, -1]]).expand(10, 4)
    apart = Draws(draws.tensors, Conditioning({"label": four}))
    mixed, _ = method.term.loss(state, apart)
    tensors = {
        key: v.flatten(0, 1)[:, None] if v.ndim > 1 else v.repeat_interleave(4)
        for key, v in draws.tensors.items()
    }
    single = Draws(tensors, Conditioning({"label": four.flatten()[:, None]}))
    alone, _ = method.term.loss(state, single)
    torch.testing.assert_close(mixed, alone.reshape(10, 4).mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.statistical
@pytest.mark.parametrize("n", [6, 10, 30, 250])
def test_every_class_has_its_share_whatever_the_batch(n: int) -> None:
    method, state = small(10)
    counts, rounds = torch.zeros(10), 1 + 6000 // n
    for step in range(rounds):
        data = batch(step, classes=10, n=n)
        found = method.term.draw(state, data).conditioning["label"]
        assert found.shape == (n // 4, 4)
        counts += found.flatten().bincount(minlength=10)
    # Binomial, about 6000 draws of share 1/10, seeds 1000 on: within 4 standard errors.
    share = counts / counts.sum()
    assert float((share - 0.1).abs().max()) < 4 * (0.09 / float(counts.sum())) ** 0.5


def test_every_particle_counts_alike_whatever_the_labels_beside_it() -> None:
    """A group of labels 0, 0, 0, 1 is 3/4 the MMD^2 of three particles and 1/4 that of one."""
    x, y = normal(5, 4, 3), normal(5, 4, 3, seed=1)
    labels = torch.tensor([0, 0, 0, 1]).expand(5, 4)
    found = group_mmd(x, y, laplace_profile, labels[:, :, None] == labels[:, None])
    first, last = (group_mmd(x[:, p], y[:, p], laplace_profile) for p in (slice(3), slice(3, 4)))
    torch.testing.assert_close(found, 0.75 * first + 0.25 * last)


def test_parts_change_nothing_but_rounding() -> None:
    found = []
    for parts in (1, 3):
        method, state = small(3, accumulate=parts, imm_halvings=6)
        data = batch(0, classes=3)
        info = method.term.backward(state, data)
        found.append([info["loss"], *(p.grad for p in state.student.denoiser.parameters())])
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()) + 1e-12)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit() -> None:
    method = distiller(network_teacher(3), method="imm", lr_decay="cosine")
    whole, again = method.init(0), method.init(7)
    for step in range(6):
        if step == 3:
            again.load_state_dict(copy.deepcopy(whole.state_dict()))
        for state in (whole, again)[: 1 + (step >= 3)]:
            method.step(state, batch(step, classes=3))
    mine, theirs = pack(whole.state_dict())[0], pack(again.state_dict())[0]
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("calls", [1, 2])
def test_it_brings_a_student_close_to_the_data(calls: int) -> None:
    ring = toy("ring8")
    real = ring.sample(6000, seed=0)
    method = distiller(ring, method="imm", num_steps=calls, fit_steps=60, total_steps=120, lr=1e-3)
    state = method.init(0, lambda n: (real[:n], None))
    before = mmd(method.result(state, {}).sample(2000), real[4000:], "energy").value
    for step in range(120):
        chosen = torch.randint(4000, (256,), generator=torch.Generator().manual_seed(step))
        method.step(state, Batch(real[chosen]))
    after = mmd(method.result(state, {}).sample(2000), real[4000:], "energy").value
    assert after < 0.4 * before


def test_what_cannot_be_is_refused() -> None:
    method, state = small(imm_particles=64)
    with pytest.raises(UserError, match="must hold a group"):
        method.step(state, batch(0))
    with pytest.raises(UserError, match="--imm-particles"):
        small(imm_particles=0)
