"""The trainable side of retrieval: any network, conditioned on the set of a query's neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError


class SetEmbedding(nn.Module):
    """A vector for a set of embeddings: mean of a network over the members, then a network of the mean.

    The order of the members does not matter, nor does their number (Zaheer et al. 2017, "Deep sets"). The
    empty set has a vector of its own, which is learned.

    Args:
        inputs: Length E of a member's embedding.
        width: Hidden width.
        outputs: Length of the vector.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.member = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.whole = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs))
        self.empty = nn.Parameter(torch.zeros(outputs))

    def forward(self, members: Tensor, present: Tensor | None = None) -> Tensor:
        """Maps sets (B, k, E) to vectors (B, outputs); ``present`` (B, k) says which members there are."""
        hidden = self.member(members)
        if present is None:
            return self.whole(hidden.mean(1))
        count = present.sum(1, keepdim=True)
        mean = (hidden * present[..., None]).sum(1) / count.clamp_min(1)
        return torch.where(count > 0, self.whole(mean), self.empty)


class NeighbourConditioned(nn.Module):
    """A network ``net(x, c_noise, labels)`` whose labels are numbers of queries, conditioned on their sets.

    The vector of the set joins the sample as further channels, constant over the picture (further numbers,
    for vectors); of what the inner network returns, these channels are dropped. So any network does, built
    for the wider samples and no classes. Training drops labels to -1, the empty set, as it does for classes;
    with a row's own number as its label, and neighbours found without the row itself, a data set trains it.

    Args:
        net: A network on samples of shape (C + outputs, ...), unconditional.
        sets: What embeds a set, with ``outputs`` numbers.
        embeddings: Embeddings of the store, (N, E).
        neighbours: Rows of ``embeddings`` for each query, (Q, k) int64.

    Raises:
        UserError: Neighbours that are no rows of the store.
    """

    embeddings: Tensor
    neighbours: Tensor

    def __init__(self, net: nn.Module, sets: SetEmbedding, embeddings: Tensor, neighbours: Tensor) -> None:
        super().__init__()
        self.net, self.sets = net, sets
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("neighbours", neighbours)
        self._check(neighbours)

    def _check(self, neighbours: Tensor) -> None:
        if neighbours.ndim != 2 or int(neighbours.min()) < 0 or int(neighbours.max()) >= len(self.embeddings):
            raise UserError(
                "neighbours must be rows of the store",
                got=tuple(neighbours.shape),
                expected=f"(Q, k) integers from 0 to {len(self.embeddings) - 1}",
            )

    def use_neighbours(self, neighbours: Tensor) -> None:
        """Takes other queries: their neighbours (Q, k) in the same store."""
        self._check(neighbours)
        self.neighbours = neighbours.to(self.embeddings.device)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps ``x`` (B, *shape), ``c_noise`` (B,) and numbers of queries (B,) to (B, *shape)."""
        return self._kept(x, self.net(self._widened(x, labels), c_noise, None))

    def with_features(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The same, with the features of the inner network."""
        out, features = self.net.with_features(self._widened(x, labels), c_noise, None)  # type: ignore[operator]
        return self._kept(x, out), features

    def _kept(self, x: Tensor, out: Tensor) -> Tensor:
        return out[:, : x.shape[1]]

    def _widened(self, x: Tensor, labels: Tensor | None) -> Tensor:
        numbers = torch.full((len(x),), -1, device=x.device) if labels is None else labels
        members = self.embeddings[self.neighbours[numbers.clamp_min(0)]]
        present = (numbers >= 0)[:, None].expand(-1, members.shape[1])
        vector = self.sets(members.to(self.sets.empty.dtype), present).to(x.dtype)
        extra = vector.reshape(*vector.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return torch.cat([x, extra], dim=1)
