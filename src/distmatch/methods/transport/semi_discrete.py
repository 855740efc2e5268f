r"""The optimal map from Gaussian noise to finitely many points: Brenier's potential and its cells.

The potential u(z) = max_i (<z, y_i> + h_i) has the gradient T(z) = y_i in the cell W_i, where i is largest.
The heights h that give cell i the noise measure nu_i minimize the convex E(h) = E_z[u(z)] - sum_i nu_i h_i,
whose gradient is mu(W_i) - nu_i. T is then the map of least square distance (semi-discrete optimal transport;
Li et al. 2023, arXiv 2307.11308). Measures are estimated by draws of the noise, in chunks.

T jumps from point to point at the borders of the cells. Where two neighbors are much alike, a mixture of
them is a plausible point too, and T may be smoothed there; where they are of different modes, a mixture is of
none. They are distinguished by the angle between the normals (y_i, -1) and (y_j, -1) of the two planes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.files import load_into
from distmatch.discrepancies.chunks import rows_per_chunk


def cell_values(z: Tensor, points: Tensor, heights: Tensor) -> Tensor:
    """The planes <z, y_i> + h_i at each z: (B, N) for z (B, d), points (N, d) and heights (N,)."""
    return torch.addmm(heights, z, points.mT)


def cell_shares(z: Tensor, points: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the draws in each cell, (N,), and the mean of the potential, ().

    Args:
        z: Draws of the source (M, d).
        points: (N, d).
        heights: (N,).
    """
    counts = torch.zeros(len(points), dtype=z.dtype, device=z.device)
    total = z.new_zeros(())
    for part in z.split(rows_per_chunk(len(points), z.device)):
        value, cell = cell_values(part, points, heights).max(1)
        counts.index_add_(0, cell, torch.ones_like(value))
        total += value.sum()
    return counts / len(z), total / len(z)


@dataclass(frozen=True)
class Seams:
    """The nearest borders of draws of the noise, and the angles there.

    Attributes:
        first: The cell of each draw, (B,).
        second: The neighbor across its nearest border, (B,).
        distance: Distance of the draw to the plane between the two, (B,).
        angle: Angle between the lifted normals of the two, in radians, (B,).
    """

    first: Tensor
    second: Tensor
    distance: Tensor
    angle: Tensor


def nearest_seams(z: Tensor, points: Tensor, heights: Tensor) -> Seams:
    """The two largest planes at each z, and how far their border is."""
    values, cells = cell_values(z, points, heights).topk(2, dim=1)
    y, other = points[cells[:, 0]], points[cells[:, 1]]
    gap = (y - other).norm(dim=1).clamp_min(torch.finfo(z.dtype).tiny)
    cosine = ((y * other).sum(1) + 1) * ((y.square().sum(1) + 1) * (other.square().sum(1) + 1)).rsqrt()
    return Seams(cells[:, 0], cells[:, 1], (values[:, 0] - values[:, 1]) / gap, cosine.clamp(-1, 1).acos())


class BrenierMap(nn.Module):
    """The map from noise to a bank of latents, one for each class.

    Inside, the latents are centered and divided by their root mean square, which changes no cell and gives
    the heights a unit; they start where the cells are those of the nearest latent, so that none is empty.

    Args:
        targets: The latents (G, N, *shape), G the number of classes or 1.

    Attributes:
        heights: The heights (G, N), in units of the latents' spread.
        largest_angle: Above this angle of a seam, in radians, its two latents are never mixed, (G,).
        width: Half-width of the seam in which latents are mixed, in standard deviations of the noise, ().
    """

    targets: Tensor
    largest_angle: Tensor
    width: Tensor

    def __init__(self, targets: Tensor) -> None:
        super().__init__()
        self.register_buffer("targets", targets)
        self.register_buffer("largest_angle", torch.zeros(len(targets)))
        self.register_buffer("width", torch.zeros(()))
        self.heights = nn.Parameter(torch.zeros(targets.shape[:2]))
        self.restart()

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> BrenierMap:
        """The map of a saved ``state_dict``, which does not learn.

        Raises:
            UserError: It is not that of a map.
        """
        if "targets" not in tensors:
            raise UserError("the tensors of this model are not a bank of latents", got=", ".join(tensors))
        transport = cls(tensors["targets"])
        load_into(transport, tensors, "the map of this model")
        return transport.requires_grad_(False)

    @torch.no_grad()
    def restart(self) -> None:
        """Heights at which each cell is that of the nearest latent, noise and latents having unit spread."""
        for group in range(len(self.targets)):
            self.heights[group] = -0.5 * self.points(group).square().sum(1)
        self.recenter()

    @torch.no_grad()
    def recenter(self) -> None:
        """Shifts the heights to mean zero, which changes nothing else."""
        self.heights.sub_(self.heights.mean(1, keepdim=True))

    def points(self, group: int) -> Tensor:
        """The latents of a class as the solver sees them, (N, d)."""
        flat = self.targets[group].flatten(1)
        centered = flat - flat.mean(0)
        return centered / centered.square().mean().sqrt().clamp_min(1e-12)

    def descend(self, z: Tensor) -> Tensor:
        """Puts the gradient of the energy into that of the heights.

        Args:
            z: Draws of the noise (G, M, d).

        Returns:
            The energy, its mean over the classes, ().
        """
        gradient, energies = torch.empty_like(self.heights), []
        with torch.no_grad():
            for group in range(len(self.heights)):
                shares, potential = cell_shares(z[group], self.points(group), self.heights[group])
                gradient[group] = shares - 1 / self.heights.shape[1]
                energies.append(potential - self.heights[group].mean())
        self.heights.grad = gradient
        return torch.stack(energies).mean()

    @torch.no_grad()
    def find_angles(self, z: Tensor, width: float, share: float) -> Tensor:
        """Decides which seams may be smoothed.

        Args:
            z: Draws of the noise (G, M, d), whose nearest seams are looked at.
            width: Half-width of the smoothing, in standard deviations of the noise.
            share: Seams with an angle above this share of the range of angles found are never smoothed.

        Returns:
            The share of the draws whose nearest seam is not, ().
        """
        rejected = []
        for group in range(len(self.heights)):
            points, heights = self.points(group), self.heights[group]
            parts = z[group].split(rows_per_chunk(len(points), z.device))
            angles = torch.cat([nearest_seams(part, points, heights).angle for part in parts])
            low, high = angles.min(), angles.max()
            self.largest_angle[group] = low + share * (high - low)
            rejected.append((angles > self.largest_angle[group]).to(z.dtype).mean())
        self.width.fill_(width)
        return torch.stack(rejected).mean()

    def forward(self, z: Tensor, labels: Tensor | None, sigma: float, fresh: Tensor) -> Tensor:
        """Maps noise to latents.

        Args:
            z: Noise (B, *shape).
            labels: Classes (B,), where there is a map for each; None for a single map.
            sigma: Noise level of the latents.
            fresh: More noise (B, *shape): mixing two latents averages their noise too, and what is missing is
                put back.

        Returns:
            (B, *shape).
        """
        flat, out = z.flatten(1), torch.empty_like(z)
        for group in range(len(self.heights)):
            points = self.points(group)
            chosen = (
                torch.arange(len(z), device=z.device) if labels is None else (labels == group).nonzero()[:, 0]
            )
            for rows in chosen.split(rows_per_chunk(len(points), z.device)):
                out[rows] = self._mapped(group, points, flat[rows], fresh[rows], sigma)
        return out

    def _mapped(self, group: int, points: Tensor, z: Tensor, fresh: Tensor, sigma: float) -> Tensor:
        targets, heights = self.targets[group], self.heights[group]
        if len(targets) < 2 or not bool(self.width > 0):
            return targets[cell_values(z, points, heights).argmax(1)]
        seams = nearest_seams(z, points, heights)
        alike = seams.angle <= self.largest_angle[group]
        # A half on the border from both sides, so that the map is continuous there; 0 from the width on.
        weight = 0.5 * (1 - seams.distance / self.width).clamp_min(0) * alike
        weight = weight.reshape(-1, *([1] * (targets.ndim - 1)))
        mixed = torch.lerp(targets[seams.first], targets[seams.second], weight)
        lost = (1 - weight**2 - (1 - weight) ** 2).clamp_min(0).sqrt()
        return mixed + sigma * lost * fresh
