"""Generation given retrieved neighbors: a store with exact search, and the denoiser of a neighborhood.

Retrieval-augmented diffusion (Blattmann et al. 2022) conditions on the set of a query's neighbors.
:class:`NeighborDenoiser` is the exact teacher of that task for a kernel density: the distribution of the data
given the neighbors is the mixture of kernels at them, and without neighbors that of the whole store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_count, check_equal, check_name, check_number, check_one_each
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike, labels_of
from distmatch.diffusion.denoiser import expand


@dataclass(frozen=True)
class Neighbors:
    """What a search found, nearest first; equal distances in the order of the store.

    Attributes:
        indices: Rows of the store, (Q, k) int64.
        distances: (Q, k): Euclidean, or 1 - cosine.
        embeddings: Those of the store, (N, E), as it was given them.
    """

    indices: Tensor
    distances: Tensor
    embeddings: Tensor


class NeighborStore:
    """Embeddings to search among, exactly: every query is compared with every embedding.

    Args:
        embeddings: (N, E) floating point.
        metric: ``"euclidean"`` or ``"cosine"``.

    Raises:
        UserError: Embeddings are not rows of finite numbers.
    """

    def __init__(self, embeddings: Tensor, metric: Literal["euclidean", "cosine"] = "euclidean") -> None:
        check_name("metric", metric, ("euclidean", "cosine"))
        _check_rows(embeddings, None)
        self.metric = metric
        self.given, self.embeddings = embeddings, self._ready(embeddings)

    def __len__(self) -> int:
        return len(self.embeddings)

    def _ready(self, rows: Tensor) -> Tensor:
        if self.metric == "euclidean":
            return rows
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)

    def search(
        self, queries: Tensor, k: int, *, exclude: Tensor | None = None, chunk: int = 8192
    ) -> Neighbors:
        """The k nearest embeddings of each query.

        Args:
            queries: (Q, E).
            k: How many.
            exclude: Optional (Q,) int64: the row of the store that a query must not find, -1 for none. In
                training that is the query itself: with it among its own neighbors, a model learns to copy.
                Rows are identified by index, so an equal row elsewhere in the store is found.
            chunk: Queries and embeddings at a time; memory is chunk^2 numbers.

        Raises:
            UserError: Dimensions differ, or the store holds fewer than k.
        """
        _check_rows(queries, self.embeddings.shape[1])
        room = len(self) - (0 if exclude is None else 1)
        check_count("the number of neighbors", k, 1, room, fix="the store does not contain more")
        if exclude is not None:
            check_one_each("row to exclude", exclude, len(queries))
        parts = [
            self._nearest(
                queries[i : i + chunk], k, None if exclude is None else exclude[i : i + chunk], chunk
            )
            for i in range(0, len(queries), chunk)
        ]
        return Neighbors(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), self.given)

    def neighbors_of_rows(self, rows: Tensor, k: int, *, chunk: int = 8192) -> Neighbors:
        """The k nearest other rows of the rows with these numbers (Q,): none finds itself."""
        return self.search(self.embeddings[rows], k, exclude=rows, chunk=chunk)

    def _nearest(self, queries: Tensor, k: int, exclude: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
        wanted = self._ready(queries.to(self.embeddings))
        best = torch.empty(len(wanted), 0, dtype=wanted.dtype, device=wanted.device)
        rows = torch.empty(len(wanted), 0, dtype=torch.int64, device=wanted.device)
        for first in range(0, len(self), chunk):
            part = self.embeddings[first : first + chunk]
            if self.metric == "cosine":
                found = 1 - wanted @ part.mT
            else:  # differences, not products: near neighbors keep their digits
                found = torch.cdist(wanted, part, compute_mode="donot_use_mm_for_euclid_dist")
            numbers = torch.arange(first, first + len(part), device=found.device).expand(len(wanted), -1)
            if exclude is not None:
                found = found.masked_fill(numbers == exclude.to(found.device)[:, None], math.inf)
            best, rows = torch.cat([best, found], 1), torch.cat([rows, numbers], 1)
            # What was found before stands first, so a stable sort keeps the order of the store.
            best, order = best.sort(dim=1, stable=True)
            best, rows = best[:, :k], rows.gather(1, order[:, :k])
        return rows, best


def _check_rows(rows: Tensor, width: int | None) -> None:
    if rows.ndim != 2 or not rows.is_floating_point() or not bool(rows.isfinite().all()):
        raise UserError(
            "embeddings must be rows of finite numbers",
            got=f"{tuple(rows.shape)}, {rows.dtype}",
            expected="(N, E)",
        )
    own = rows.shape[1]
    check_equal("the lengths of the embeddings", own, width or own, fix="embed queries and store alike")


def check_neighbors(neighbors: Tensor, count: int) -> None:
    """Accepts only numbers of rows of a store of ``count`` embeddings, (Q, k).

    Raises:
        UserError: They are others, or of another shape.
    """
    whole = neighbors.ndim == 2 and not neighbors.is_floating_point() and neighbors.numel() > 0
    if not whole or int(neighbors.min()) < 0 or int(neighbors.max()) >= count:
        raise UserError(
            "neighbors must be rows of the store",
            got=f"{tuple(neighbors.shape)}, {neighbors.dtype}",
            expected=f"(Q, k) integers from 0 to {count - 1}",
        )


class NeighborDenoiser(nn.Module):
    """The exact denoiser of data near retrieved neighbors.

    Given the set of its neighbors, x0 is one of them, each as likely, plus ``bandwidth`` times normal noise.
    The condition is the number of a query; -1, the empty set, has the whole store, so that guidance works as
    with classes.

    Args:
        values: Data of the store, (N, *shape).
        neighbors: Rows of ``values`` for each query, (Q, k) int64, as a search returns.
        bandwidth: Width of the kernel; 0 gives the neighbors themselves.
        sigma_min: Smallest noise level samplers should go to.
        sigma_max: Largest noise level.

    Raises:
        UserError: Neighbors that are no rows of the store, or a negative bandwidth.
    """

    values: Tensor
    neighbors: Tensor

    def __init__(
        self,
        values: Tensor,
        neighbors: Tensor,
        bandwidth: float = 0.0,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__()
        check_neighbors(neighbors, len(values))
        check_number("the bandwidth", bandwidth, "[0, inf)")
        self.register_buffer("values", values)
        self.register_buffer("neighbors", neighbors)
        self.shape: tuple[int, ...] = tuple(values.shape[1:])
        self.num_classes = len(neighbors)
        self.bandwidth, self.sigma_min, self.sigma_max = bandwidth, sigma_min, sigma_max
        flat = values.double().flatten(1)
        variance = float((flat - flat.mean(0)).square().mean())
        self.sigma_data = math.sqrt(variance + bandwidth**2)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        """E[x0 | x, neighbors], (B, *shape); ``conditioning`` (B,) numbers of queries, -1 for none."""
        level = sigma.to(x).reshape(-1).expand(len(x))
        queries = labels_of(conditioning)
        near = self._posterior_mean(x, level, queries)
        if queries is None:
            return near
        return torch.where(expand(queries < 0, x), self._posterior_mean(x, level, None), near)

    def _posterior_mean(self, x: Tensor, level: Tensor, queries: Tensor | None) -> Tensor:
        flat = x.flatten(1)
        centers = self.values.to(x).flatten(1)
        if queries is None:
            apart = torch.cdist(flat, centers, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        else:
            centers = centers[self.neighbors[queries.clamp_min(0)]]
            apart = (flat[:, None] - centers).square().sum(2)
        variance = (level**2 + self.bandwidth**2)[:, None]
        share = (-0.5 * apart / variance).softmax(1)
        mean = share @ centers if queries is None else torch.einsum("bk,bkd->bd", share, centers)
        return (mean + self.bandwidth**2 / variance * (flat - mean)).reshape(x.shape)
