"""The nearest of a set of points."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

_TREE_DIMENSIONS = 8  # beyond it a tree is no faster than all distances
_PAIRS = 2**22  # distances computed at once


def nearest(x: Tensor, points: Tensor, k: int, *, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest points of each row, by a tree on a CPU in few dimensions, else by all distances.

    Args:
        x: (N, D) floating point.
        points: (M, D), with M at least ``k``, or more than ``k`` if one is excluded.
        k: How many.
        without: For each row the number of a point that does not count, (N,), as its own where the rows are
            among the points.

    Returns:
        Distances (N, k), ascending, and the numbers of the points. The order of equal distances is not fixed.
    """
    x, points, count = x.detach(), points.detach(), k if without is None else k + 1
    if x.device.type == "cpu" and x.shape[1] <= _TREE_DIMENSIONS:
        found = cKDTree(points.numpy()).query(x.numpy(), k=np.arange(1, count + 1))
        distances, indices = (torch.from_numpy(a) for a in found)
    else:
        parts = [
            # Differences, not products: the rounding of |x|^2 would exceed the distances of near neighbors.
            torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist").topk(count, largest=False)
            for part in x.split(max(1, _PAIRS // len(points)))
        ]
        distances, indices = (torch.cat([p[i] for p in parts]) for i in (0, 1))
    if without is None:
        return distances, indices
    # Among copies of a point the point itself need not come first; if it is not found, the last one goes.
    gone = indices == without[:, None]
    gone[:, -1] |= ~gone.any(1)
    return distances[~gone].reshape(len(x), k), indices[~gone].reshape(len(x), k)
