"""The trainable side of retrieval: any network, conditioned on the set of a query's neighbors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.control.retrieval import Neighbors, check_neighbors
from distmatch.diffusion.denoiser import Output, ReturnFeatures, asked, has_features, on_prediction


class SetEmbedding(nn.Module):
    """A vector for a set of embeddings: mean of a network over the elements, then a network of the mean.

    It does not depend on the order or the number of the elements (Zaheer et al. 2017, "Deep sets"). The empty
    set has a separate learned vector.

    Args:
        inputs: Length E of an element's embedding.
        width: Hidden width.
        outputs: Length of the vector.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.member = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.whole = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs))
        self.empty = nn.Parameter(torch.zeros(outputs))

    def forward(self, members: Tensor, present: Tensor | None = None) -> Tensor:
        """Maps sets (B, k, E) to vectors (B, outputs); ``present`` (B, k) marks the elements."""
        hidden = self.member(members)
        if present is None:
            return self.whole(hidden.mean(1))
        count = present.sum(1, keepdim=True)
        mean = (hidden * present[..., None]).sum(1) / count.clamp_min(1)
        return torch.where(count > 0, self.whole(mean), self.empty)


class NeighborConditioned(nn.Module):
    """A network ``net(x, c_noise, labels)`` whose labels are numbers of queries, conditioned on their sets.

    The vector of the set joins the sample as further channels, constant over the picture (further numbers,
    for vectors); of what the inner network returns, these channels are dropped. So any network does, built
    for the wider samples and no classes. Training drops labels to -1, the empty set, as it does for classes;
    with a row's own number as its label, and neighbors found without the row itself, a data set trains it.

    The network uses only the embeddings of a store, so that a trained one can use another store, of another
    size, with one call (:meth:`use_store`): other styles or newer data without training (Blattmann et al.
    2022, section 4).

    Args:
        net: A network on samples of shape (C + outputs, ...), unconditional.
        sets: What embeds a set, with ``outputs`` numbers.
        embeddings: Embeddings of the store, (N, E).
        neighbors: Rows of ``embeddings`` for each query, (Q, k) int64.

    Raises:
        UserError: Embeddings of another length than ``sets`` takes, or neighbors that are no rows of them.
    """

    embeddings: Tensor
    neighbors: Tensor

    def __init__(self, net: nn.Module, sets: SetEmbedding, embeddings: Tensor, neighbors: Tensor) -> None:
        super().__init__()
        self.net, self.sets = net, sets
        self._check(embeddings, neighbors)
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("neighbors", neighbors)

    def _check(self, embeddings: Tensor, neighbors: Tensor) -> None:
        width = self.sets.inputs
        if embeddings.ndim != 2 or embeddings.shape[1] != width or not embeddings.is_floating_point():
            raise UserError(
                "these embeddings are not compatible with the network",
                got=f"{tuple(embeddings.shape)}, {embeddings.dtype}",
                expected=f"(N, {width}), floating point",
                fix="embed the store with the model that the network was trained with",
            )
        check_neighbors(neighbors, len(embeddings))

    def use_neighbors(self, found: Neighbors) -> None:
        """Takes other queries of the same store.

        Args:
            found: What a search in a store of these embeddings returned.

        Raises:
            UserError: It was found in another store, or is bare row numbers, which do not say in which.
        """
        if not isinstance(found, Neighbors):
            raise UserError(
                "row indices do not identify their store",
                got=type(found).__name__,
                expected="Neighbors, as NeighborStore.search returns",
                fix="pass the result of the search, or both parts: use_store(embeddings, neighbors)",
            )
        theirs, ours = found.embeddings, self.embeddings
        if theirs is not ours and not (theirs.shape == ours.shape and torch.equal(theirs.to(ours), ours)):
            raise UserError(
                "these neighbors are rows of another store than the network's",
                got=f"rows of a store of {len(theirs)} embeddings",
                expected=f"rows of the {len(ours)} embeddings of this network",
                fix="exchange the store too: use_store(embeddings, neighbors)",
            )
        self.use_store(ours, found.indices)

    def use_store(self, embeddings: Tensor, neighbors: Tensor) -> None:
        """Exchanges the store, and with it the queries; the network stays as it was trained.

        Args:
            embeddings: Embeddings of the new store, (N, E), made as those of training were.
            neighbors: Rows of these ``embeddings`` for each query, (Q, k) int64.

        Raises:
            UserError: Embeddings of another length, or neighbors that are no rows of them; nothing has
                changed then.
        """
        self._check(embeddings, neighbors)
        self.embeddings = embeddings.to(self.embeddings)
        self.neighbors = neighbors.to(self.embeddings.device)

    @property
    def has_features(self) -> bool:
        """Whether the inner network has features."""
        return has_features(self.net)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        *,
        return_features: ReturnFeatures = False,
    ) -> Output:
        """Maps ``x`` (B, *shape), ``c_noise`` (B,) and numbers of queries (B,) to (B, *shape).

        Features are those of the inner network.
        """
        output = self.net(self._widened(x, labels), c_noise, None, **asked(return_features))
        return on_prediction(output, return_features, lambda out: out[:, : x.shape[1]])

    def _widened(self, x: Tensor, labels: Tensor | None) -> Tensor:
        numbers = torch.full((len(x),), -1, device=x.device) if labels is None else labels
        members = self.embeddings[self.neighbors[numbers.clamp_min(0)]]
        present = (numbers >= 0)[:, None].expand(-1, members.shape[1])
        vector = self.sets(members.to(self.sets.empty.dtype), present).to(x.dtype)
        extra = vector.reshape(*vector.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return torch.cat([x, extra], dim=1)
