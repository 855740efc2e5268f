"""Losses that compare samples with samples by a kernel: MMD finetuning, inductive moment matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import expand
from distmatch.discrepancies.chunks import rows_per_chunk
from distmatch.discrepancies.kernels import Kernel

Profile = Callable[[Tensor], Tensor]
"""A kernel as a function of the square distance."""


def mmd_with_gradient(
    x: Tensor, y: Tensor, kernel: Kernel, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The unbiased MMD^2 of two samples of the same number, and its gradient at the first, in one pass.

    With labels it is that of the joint distributions of sample and label under the product kernel
    k(x, x') [label = label'], both samples having the same labels. Sample i of one then shares its label with
    sample i of the other, and those pairs are also excluded across the samples.

    Distances lose digits where samples are close, so those are in float64; inner products do not, and are in
    float32 for samples in it. Rows are taken in chunks, whose gradient is complete when they are left: the
    kernel is symmetric, so a pair within ``x`` counts twice in that of its row. On a CPU pairs of different
    labels, which do not count, are not computed.

    The loss of MMD finetuning (Aiello et al. 2023, arXiv 2301.07969): ``x.backward(gradient)`` takes it to
    the generator. It couples all samples of a batch, so it is not a mean over samples.

    Args:
        x: Generated samples or features of them, (n, d), n >= 2; detached here.
        y: Real ones, (n, d).
        kernel: Of the samples.
        labels: (n,), or None.

    Returns:
        The value () in float64, negative at times, and the gradient (n, d) as ``x``.
    """
    n = len(x)
    exact = torch.promote_types(x.dtype, torch.float32) if kernel.of_products else torch.float64
    rows, there = _groups(labels, n, x.device)
    scaled = [kernel.scaled(sample.detach().to(exact))[rows] for sample in (x, y)]
    pool = torch.cat(scaled, 1)
    own = None if labels is None else labels[rows]
    apart = n * (n - 1)
    across = -2 / (n**2 if labels is None else apart)
    gradient = torch.empty_like(x)
    value = torch.zeros((), dtype=torch.float64, device=x.device)
    step = rows_per_chunk(2 * rows.numel(), x.device)
    for low in range(0, rows.shape[1], step):
        chunk = slice(low, low + step)
        pairs = there[:, chunk, None] & there[:, None]
        if own is not None:
            pairs &= own[:, chunk, None] == own[:, None]
        others = pairs & (rows[:, chunk, None] != rows[:, None])
        counted = torch.cat([others * (2 / apart), (pairs if own is None else others) * across], 2).to(exact)
        with torch.enable_grad():
            some = x.detach()[rows[:, chunk]].requires_grad_()
            values = kernel.of_scaled(kernel.scaled(some.to(exact)), pool)
            (found,) = torch.autograd.grad(values, some, counted)
        gradient[rows[:, chunk][there[:, chunk]]] = found[there[:, chunk]]
        terms = (values.detach() * counted).unflatten(2, (2, -1)).sum((0, 1, 3), dtype=torch.float64)
        real = kernel.of_scaled(scaled[1][:, chunk], scaled[1]) * others
        value += terms[0] / 2 + terms[1] + real.sum(dtype=torch.float64) / apart
    return value, gradient


def _groups(labels: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows that are compared with one another, (G, m), and which of them do more than fill a group up.

    Those of each label, if that makes the pairs fewer; else all, in one group. On an accelerator, reading the
    group sizes would synchronize.
    """
    every = torch.arange(n, device=device)
    if labels is not None and device.type == "cpu":
        order = labels.argsort(stable=True)
        counts = labels[order].unique_consecutive(return_counts=True)[1]
        longest = int(counts.max())
        if len(counts) * longest**2 < n**2:
            place = torch.arange(longest)
            start = counts.cumsum(0) - counts
            rows = order[(start[:, None] + place).clamp_max(n - 1)]
            return rows, place < counts[:, None]
    return every[None], torch.ones(1, n, dtype=torch.bool, device=device)


def imm_loss(
    jump: Tensor,
    target: Tensor,
    sigma: Tensor,
    to: Tensor,
    sigma_data: float,
    labels: Tensor | None = None,
    *,
    kernel: Literal["laplace", "quadratic"] = "laplace",
) -> Tensor:
    """The MMD^2 between jumps t -> s and jumps r -> s of the same particles.

    Inductive moment matching (arXiv 2503.07565). Groups of M samples, the particles, share the levels
    s <= r < t. In this frame the paper's interpolant of DDIM is the jump
    ``(s / t) x_t + (1 - s / t) D(x_t, t, s)``. Times :func:`imm_weight` and averaged it is the loss.

    Args:
        jump: Jumps from t, (G, M, d), with gradient.
        target: Jumps of the same particles from r, (G, M, d), detached.
        sigma: t, (G,).
        to: s, (G,), below t.
        sigma_data: Standard deviation of the data.
        labels: Classes (G, M): only particles of the same class are compared. None compares all.
        kernel: ``laplace`` is exp(-d), with d in units of c_out and per dimension, as published;
            ``quadratic`` is -d^2 / 2, which with one particle is consistency training.

    Returns:
        (G,).
    """
    same = None if labels is None else labels[:, :, None] == labels[:, None]
    if kernel == "quadratic":
        return group_mmd(jump, target, quadratic_profile, same)
    length = expand(imm_output_scale(sigma, to, sigma_data) * jump.shape[-1], jump)
    return group_mmd(jump / length, target / length, laplace_profile, same)


def imm_weight(time: Tensor, offset: float = 4.0) -> Tensor:
    """The weight of a group at time tau of the straight path, where sigma / sigma_data = tau / (1 - tau).

    Half of sigmoid(b - lambda) times -dlambda/dtau = 2 / (tau (1 - tau)), the fall of the log signal-to-noise
    ratio lambda = 2 log((1 - tau) / tau), times (1 - tau) / ((1 - tau)^2 + tau^2) (arXiv 2503.07565).

    Args:
        time: tau in (0, 1), (G,).
        offset: b.

    Returns:
        (G,).
    """
    log_snr = 2 * torch.log((1 - time) / time)
    fall = 1 / (time * (1 - time))
    return torch.sigmoid(offset - log_snr) * fall * (1 - time) / ((1 - time) ** 2 + time**2)


def imm_lower_level(t: Tensor, s: Tensor, low: float, high: float, halvings: int) -> Tensor:
    """The level r in [s, t] from which the target jumps: 2^-halvings of the range of levels below t.

    Args:
        t: Levels of the particles (G,).
        s: Levels that they jump to (G,).
        low: Smallest level of all.
        high: Largest level of all.
        halvings: k; 12 in the paper.
    """
    return torch.maximum(s, t - (high - low) * 0.5**halvings)


def imm_output_scale(t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """How far a unit of the network's output moves a jump from level t to s; the kernel's unit of length.

    With D = c_skip x + c_out F it is (1 - s / t) c_out(t) = (t - s) sigma_data / sqrt(t^2 + sigma_data^2).
    """
    return (t - s) * sigma_data * (t**2 + sigma_data**2).rsqrt()


def laplace_profile(squares: Tensor) -> Tensor:
    """The kernel exp(-d) of square distances d^2, its gradient finite where they are 0."""
    return (-squares.clamp_min(1e-16).sqrt()).exp()


def quadratic_profile(squares: Tensor) -> Tensor:
    """The kernel -d^2 / 2, whose MMD^2 is the square distance of the means."""
    return -squares / 2


def group_mmd(x: Tensor, y: Tensor, profile: Profile, same: Tensor | None = None) -> Tensor:
    """The biased MMD^2 of groups of particles: all pairs, those of a particle with itself included.

    Of a group with several labels it is the mean of the MMD^2 of each label, by their shares of the group, so
    that every particle counts as much as any other, whatever the labels of its neighbors.

    Args:
        x: Groups (G, M, d).
        y: Groups (G, M, d).
        profile: The kernel.
        same: Which pairs count, (G, M, M), those of equal labels; None is all.

    Returns:
        (G,).
    """

    def mean(a: Tensor, b: Tensor) -> Tensor:
        # By differences, not by inner products: x and y lie close to each other.
        values = profile((a[:, :, None] - b[:, None]).square().sum(-1))
        return (values.mean(2) if same is None else (values * same).sum(2) / same.sum(2)).mean(1)

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)
