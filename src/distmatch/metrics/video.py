"""What the metrics of whole clips leave open: whether single frames look right, and how much they move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.metrics.features import flattened
from distmatch.metrics.frechet import frechet_replicates
from distmatch.metrics.resampling import jackknife_stderr
from distmatch.metrics.settings import GROUPS


def single_frames(x: Tensor) -> Tensor:
    """One frame of each clip (N, C, T, H, W), number i modulo T of clip i: as many images as clips."""
    clips = torch.arange(len(x), device=x.device)
    return x[clips, :, clips % x.shape[2]]


def motion(x: Tensor) -> Tensor:
    """The mean change of a value between adjacent frames of clips (N, C, T, H, W) in model space, (N,).

    It is a share of the range of the values, [-1, 1], to which they are clipped as where they are shown. A
    still has 0.
    """
    return (x.clamp(-1, 1).diff(dim=2).double().abs() / 2).flatten(1).mean(1)


def video_estimates(x: Tensor, blocks: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Estimate]:
    """``frame_fd`` and ``motion`` of clips; nothing for samples of another kind.

    Args:
        x: All samples measured, (M, C, T, H, W), M at least 2.
        blocks: Pairs of generated and real samples.

    Returns:
        ``frame_fd``, the Frechet distance between the pixels of single frames, the mean over the pairs, and
        ``motion``, the mean of :func:`motion`, with ``n`` the samples of a block and of all.
    """
    if x.ndim != 5:
        return {}
    frames = [[flattened(single_frames(side)) for side in pair] for pair in blocks]
    found = [frechet_replicates(generated, real, GROUPS) for generated, real in frames]
    value = float(torch.stack([replicates[0] for replicates in found]).mean())
    errors = torch.stack([jackknife_stderr(replicates) for replicates in found])
    moved = motion(x)
    return {
        "frame_fd": Estimate(value, float(errors.square().sum().sqrt()) / len(found), len(x) // 2),
        "motion": Estimate(float(moved.mean()), float(moved.std()) / len(x) ** 0.5, len(x)),
    }
