"""The exact teacher: a Gaussian mixture, whose noised density, score and posterior are closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.seeds import generator as make_generator
from distmatch.diffusion.conditioning import ConditioningLike, labels_of
from distmatch.diffusion.mixture_posterior import gaussian_flow, kalman_update

ArrayLike = Tensor | Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]


class GaussianMixture(nn.Module):
    """sum_k w_k N(mean_k, C_k), noised exactly: x = x0 + sigma eps has C_k + sigma^2 I.

    It is a :class:`~distmatch.diffusion.denoiser.Denoiser`. Parameters are kept in float64; results come in
    the dtype of ``x``. Covariances are kept as eigen-decompositions, so a call costs O(B K D^2).

    Args:
        weights: (K,) non-negative, summing to one.
        means: (K, D).
        covariances: (K, D, D), or (K, D) diagonals, or (K,) variances times the identity.
        classes: Optional (K,) class of each component; conditioning on a class keeps its components.
        sigma_min: Smallest noise level samplers should go to.
        sigma_max: Largest noise level; samplers start there.

    Raises:
        UserError: Shapes disagree, weights are not a distribution, or a covariance is not positive
            semi-definite.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    classes: Tensor
    _eigenvalues: Tensor
    _eigenvectors: Tensor

    def __init__(
        self,
        weights: ArrayLike,
        means: ArrayLike,
        covariances: ArrayLike,
        classes: Sequence[int] | Tensor | None = None,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__()
        w, m, c = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covariances))
        if w.ndim != 1 or m.ndim != 2 or len(w) != len(m) or len(c) != len(w):
            raise UserError(
                "the parameters of a mixture do not match",
                got=f"weights {tuple(w.shape)}, means {tuple(m.shape)}, covariances {tuple(c.shape)}",
                expected="(K,), (K, D) and (K, D, D) or (K, D) or (K,)",
            )
        if not bool((w >= 0).all()) or abs(float(w.sum()) - 1) > 1e-6:
            raise UserError(
                "mixture weights must be non-negative and sum to one", got=[round(v, 6) for v in w.tolist()]
            )
        dim = m.shape[1]
        if c.ndim == 1:
            c = c[:, None].expand(-1, dim)
        if c.ndim == 2:
            c = torch.diag_embed(c)
        size = float(c.abs().max())  # tolerances are relative to it: data may be in any unit
        if c.shape != (len(w), dim, dim) or float((c - c.mT).abs().max()) > 1e-5 * size:
            raise UserError(
                "covariances must be symmetric, one for each component",
                got=tuple(c.shape),
                expected=(len(w), dim, dim),
            )
        values, vectors = torch.linalg.eigh(c)
        if float(values.min()) < -1e-10 * size:
            raise UserError(
                "a covariance is not positive semi-definite", got=f"eigenvalue {float(values.min()):.3g}"
            )
        labels = torch.zeros(len(w), dtype=torch.int64) if classes is None else torch.as_tensor(classes)
        if labels.shape != w.shape or labels.is_floating_point() or int(labels.min()) < 0:
            raise UserError(
                "classes must be one non-negative integer for each component", got=labels.tolist()
            )
        if classes is not None and len(labels[w > 0].unique()) != int(labels.max()) + 1:
            raise UserError(
                "a class of the mixture has no component with a positive weight",
                got=f"classes {labels.tolist()}, weights {w.tolist()}",
                expected=f"each of 0 to {int(labels.max())} at least once",
                fix="number the classes 0, 1, 2, ... without gaps",
            )
        self.register_buffer("weights", w / w.sum())
        self.register_buffer("means", m)
        self.register_buffer("covariances", c)
        self.register_buffer("classes", labels)
        self.register_buffer("_eigenvalues", values.clamp_min(0))
        self.register_buffer("_eigenvectors", vectors)
        self.shape: tuple[int, ...] = (dim,)
        self.num_classes = 0 if classes is None else int(labels.max()) + 1
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        centered = m - (w[:, None] * m).sum(0)
        total = (w * (values.clamp_min(0).sum(1) + centered.square().sum(1))).sum()
        self.sigma_data = math.sqrt(float(total) / dim)

    def _log_weights(self, conditioning: ConditioningLike, like: Tensor) -> Tensor:
        """Log component weights, (1, K) or (B, K) when conditioned, in the dtype of ``like``."""
        log_w = self.weights.log()[None]
        labels = labels_of(conditioning)
        if labels is not None:
            if int(labels.max()) >= max(self.num_classes, 1):
                raise UserError(
                    "a class this mixture does not have",
                    got=int(labels.max()),
                    expected=f"below {self.num_classes}",
                )
            keep = (labels[:, None] == self.classes[None]) | (labels[:, None] < 0)
            log_w = torch.where(keep, log_w, -math.inf).log_softmax(dim=1)
        return log_w.to(like.dtype)

    def _components(
        self, x: Tensor, sigma: Tensor | float, conditioning: ConditioningLike
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log p_k(x) + log w_k (B, K), rotated residuals (B, K, D), noised variances, eigenvectors."""
        if x.ndim != 2 or x.shape[1] != self.shape[0]:
            raise UserError("x has the wrong shape", got=tuple(x.shape), expected=f"(B, {self.shape[0]})")
        vectors = self._eigenvectors.to(x.dtype)
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        variance = self._eigenvalues.to(x.dtype)[None] + level[:, None, None] ** 2
        # The difference in float64: far from the origin the means do not fit into float32.
        residual = (x.double()[:, None, :] - self.means[None]).to(x.dtype)
        rotated = torch.einsum("kde,bkd->bke", vectors, residual)
        log_p = -0.5 * ((rotated**2 / variance) + (2 * math.pi * variance).log()).sum(-1)
        return log_p + self._log_weights(conditioning, x), rotated, variance, vectors

    def log_prob(
        self, x: Tensor, sigma: Tensor | float = 0.0, conditioning: ConditioningLike = None
    ) -> Tensor:
        """Log density in nats of the noised mixture at ``x`` (B, D); returns (B,)."""
        return torch.logsumexp(self._components(x, sigma, conditioning)[0], dim=1)

    def score(self, x: Tensor, sigma: Tensor | float = 0.0, conditioning: ConditioningLike = None) -> Tensor:
        """Gradient of :meth:`log_prob` with respect to ``x``, (B, D)."""
        log_p, rotated, variance, vectors = self._components(x, sigma, conditioning)
        pull = torch.einsum("kde,bke->bkd", vectors, rotated / variance)
        return -torch.einsum("bk,bkd->bd", log_p.softmax(1), pull)

    def _posterior(
        self, x: Tensor, sigma: Tensor | float, conditioning: ConditioningLike
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Responsibilities (B, K), posterior means of the components, and eigenvalue shrinkage, (B, K, D).

        The means are relative to :meth:`_center`, which keeps their digits in float32.
        """
        log_p, rotated, variance, vectors = self._components(x, sigma, conditioning)
        shrink = self._eigenvalues.to(x.dtype)[None] / variance
        around = (self.means - self._center()).to(x.dtype)
        means = around[None] + torch.einsum("kde,bke->bkd", vectors, shrink * rotated)
        return log_p.softmax(1), means, shrink

    def forward(self, x: Tensor, sigma: Tensor | float, conditioning: ConditioningLike = None) -> Tensor:
        """The exact denoiser E[x0 | x], (B, D)."""
        responsibility, means, _ = self._posterior(x, sigma, conditioning)
        mean = torch.einsum("bk,bkd->bd", responsibility, means)
        return (self._center() + mean.double()).to(x.dtype)

    def _center(self) -> Tensor:
        """The mean of all components, (D,)."""
        return self.weights @ self.means

    def posterior_covariance(
        self, x: Tensor, sigma: Tensor | float, conditioning: ConditioningLike = None
    ) -> Tensor:
        """Cov[x0 | x], (B, D, D); equals sigma^2 times the Jacobian of the denoiser."""
        responsibility, means, shrink = self._posterior(x, sigma, conditioning)
        vectors = self._eigenvectors.to(x.dtype)
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        within = torch.einsum("kde,bke,kfe->bkdf", vectors, shrink * level[:, None, None] ** 2, vectors)
        mean = torch.einsum("bk,bkd->bd", responsibility, means)
        centered = means - mean[:, None]
        between = torch.einsum("bk,bkd,bke->bde", responsibility, centered, centered)
        return torch.einsum("bk,bkdf->bdf", responsibility, within) + between

    def divergence_of_score(
        self, x: Tensor, sigma: Tensor | float = 0.0, conditioning: ConditioningLike = None
    ) -> Tensor:
        """The trace of the Hessian of :meth:`log_prob`, (B,), exact at every level including 0."""
        log_p, rotated, variance, vectors = self._components(x, sigma, conditioning)
        share = log_p.softmax(1)
        pull = torch.einsum("kde,bke->bkd", vectors, rotated / variance)
        mean = torch.einsum("bk,bkd->bd", share, pull)
        spread = (share * (pull - mean[:, None]).square().sum(-1)).sum(1)
        return spread - (share * variance.reciprocal().sum(-1)).sum(1)

    def condition_on(
        self, matrix: ArrayLike, value: Tensor | Sequence[float], noise: ArrayLike | float
    ) -> GaussianMixture:
        """The exact teacher of an inverse problem: x0 given ``value = matrix x0 + N(0, noise)``.

        Args:
            matrix: The linear measurement (M, D).
            value: What was measured (M,).
            noise: Covariance (M, M) of its noise, or one variance for all; 0 is an exact measurement.

        Returns:
            A mixture of the same components, classes and levels.

        Raises:
            UserError: Shapes disagree, the noise is no covariance, or an exact measurement is degenerate.
        """
        a, y, r = (torch.as_tensor(v, dtype=torch.float64).to(self.means) for v in (matrix, value, noise))
        if r.ndim == 0:
            r = r * torch.eye(len(y), dtype=r.dtype, device=r.device)
        if a.ndim != 2 or a.shape[1] != self.shape[0] or y.shape != a.shape[:1] or r.shape != 2 * y.shape:
            raise UserError(
                "the parts of a measurement do not match",
                got=f"matrix {tuple(a.shape)}, value {tuple(y.shape)}, noise {tuple(r.shape)}",
                expected=f"(M, {self.shape[0]}), (M,) and (M, M) or a number",
            )
        size = float(r.abs().max())
        skew = float((r - r.mT).abs().max()) > 1e-5 * size
        if skew or float(torch.linalg.eigvalsh(r).min()) < -1e-10 * size:
            raise UserError("the noise of a measurement must be a covariance matrix", got=r.tolist())
        w, m, c = kalman_update(self.weights.log(), self.means, self.covariances, a, y, r)
        # A class that the measurement rules out beyond float64 keeps a weight that is nothing.
        w = torch.where(self.weights > 0, w.clamp_min(1e-300), w)
        classes = self.classes if self.num_classes else None
        ends = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return GaussianMixture(w, m, c, classes, **ends).to(self.means.device)

    def exact_map(self, x: Tensor, sigma_from: Tensor | float, sigma_to: Tensor | float) -> Tensor:
        """Where the probability flow takes ``x`` (B, D), for one component: the ideal one-step generator.

        Args:
            x: Samples at level ``sigma_from``.
            sigma_from: Level of ``x``, (B,) or one for all.
            sigma_to: Level to go to, (B,) or one for all, up or down; 0 for clean samples.

        Raises:
            UserError: The mixture has several components: their flow has no closed form.
        """
        if len(self.weights) != 1:
            raise UserError(
                "only a single Gaussian has its probability flow in closed form",
                got=f"{len(self.weights)} components",
                fix="integrate the flow with a solver",
            )
        start, end = (
            torch.as_tensor(s, dtype=x.dtype, device=x.device).expand(len(x)) for s in (sigma_from, sigma_to)
        )
        mean, values, vectors = (
            v.to(x.dtype)[0] for v in (self.means, self._eigenvalues, self._eigenvectors)
        )
        return gaussian_flow(x, mean, values, vectors, start, end)

    def sample_with_components(
        self,
        n: int,
        *,
        seed: int = 0,
        conditioning: ConditioningLike = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws ``n`` clean samples (n, D) float32 and the index of each one's component (n,)."""
        device = self.means.device
        gen = make_generator(seed, "mixture", device) if generator is None else generator
        weights = self._log_weights(conditioning, self.weights).exp()
        if len(weights) == 1 < n:
            k = torch.multinomial(weights[0], n, replacement=True, generator=gen)
        else:
            k = torch.multinomial(weights, 1, generator=gen)[:, 0]
        z = torch.randn(n, self.shape[0], generator=gen, device=device, dtype=torch.float64)
        scaled = self._eigenvalues[k].sqrt() * z
        x = self.means[k] + torch.einsum("nde,ne->nd", self._eigenvectors[k], scaled)
        return x.float(), k

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        conditioning: ConditioningLike = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws ``n`` clean samples, (n, D) float32; ``conditioning`` (n,) asks for classes."""
        return self.sample_with_components(n, seed=seed, conditioning=conditioning, generator=generator)[0]
