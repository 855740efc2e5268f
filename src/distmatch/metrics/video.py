"""What the metrics of whole clips leave open: whether single frames look right, and how much they move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distmatch.base.estimate import Estimate
from distmatch.metrics.chosen import Chosen
from distmatch.metrics.features import flattened
from distmatch.metrics.frechet import frechet_replicates
from distmatch.metrics.resampling import jackknife_stderr
from distmatch.metrics.settings import GROUPS


def single_frames(x: Tensor, numbers: Tensor | None = None) -> Tensor:
    """One frame of each clip (N, C, T, H, W), number i modulo T of clip i: as many images as clips.

    ``numbers`` (N,) are those of the clips; without, they are counted from 0.
    """
    clips = torch.arange(len(x), device=x.device)
    return x[clips, :, (clips if numbers is None else numbers.to(x.device)) % x.shape[2]]


def motion(x: Tensor) -> Tensor:
    """The mean change of a value between adjacent frames of clips (N, C, T, H, W) in model space, (N,).

    It is a share of the range of the values, [-1, 1], to which they are clipped as where they are shown. A
    still has 0.
    """
    return (x.clamp(-1, 1).diff(dim=2).double().abs() / 2).flatten(1).mean(1)


def frames_of(chosen: Chosen, size: int) -> Tensor:
    """The pixels of single frames, counted in blocks of ``size``, as the features of images (N, D)."""

    def frames(x: Tensor, first: int) -> Tensor:
        return flattened(single_frames(x, (first + torch.arange(len(x))) % size))

    return chosen.map(frames)


def video_estimates(moved: Tensor, blocks: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Estimate]:
    """``frame_fd`` and ``motion`` of clips.

    Args:
        moved: :func:`motion` of all samples measured, (M,), M at least 2.
        blocks: Pairs of generated and real features of single frames, see :func:`frames_of`.

    Returns:
        ``frame_fd``, the Frechet distance between the pixels of single frames, the mean over the pairs, and
        ``motion``, the mean of :func:`motion`, with ``n`` the samples of a block and of all.
    """
    found = [frechet_replicates(generated, real, GROUPS) for generated, real in blocks]
    value = float(torch.stack([replicates[0] for replicates in found]).mean())
    errors = torch.stack([jackknife_stderr(replicates) for replicates in found])
    return {
        "frame_fd": Estimate(value, float(errors.square().sum().sqrt()) / len(found), len(moved) // 2),
        "motion": Estimate(float(moved.mean()), float(moved.std()) / len(moved) ** 0.5, len(moved)),
    }
