"""Linear inverse problems: a denoiser for x0 given a measurement value = A x0 + N(0, noise_std^2).

With J = dD/dy, the data given y have mean D and covariance C = sigma^2 J (Tweedie). Taking them as Gaussian,

    D' = D + J^T A^T (A J A^T + noise_std^2 / sigma^2)^(-1) (value - A D)

is the posterior mean given y and the measurement; for Gaussian data it is exact (Boys et al. 2023, "Tweedie
moment projected diffusions"). ``covariance="isotropic"`` has sigma_data^2 / (sigma^2 + sigma_data^2) times
the identity for J in the inverse, which is the pseudoinverse guidance of Song et al. (2023). With a
:class:`Spread`, J is S (S + sigma^2)^-1 for the covariance S of the data: exact for Gaussian data too, and
without derivatives of the model, whose Jacobian is no covariance as long as it is still being trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_equal, check_name, check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.control.linear import LinearMap
from distmatch.diffusion.denoiser import Denoiser, expand, require_score
from distmatch.diffusion.geometry.jacobian import denoise_for_gradient, pull_back, refuse_random_layers
from distmatch.diffusion.guidance import Calls, Wrapper, cost_of


class Spread:
    """The covariance of data, which stands for that of a Gaussian at all noise levels.

    Args:
        covariance: S, (D, D) symmetric and positive semi-definite, of flattened samples.
    """

    def __init__(self, covariance: Tensor) -> None:
        values, self.vectors = torch.linalg.eigh(covariance)
        self.values = values.clamp_min(0)

    def of(self, v: Tensor, level: Tensor | None = None) -> Tensor:
        """S v of each sample, or S (S + level^2)^-1 v, (B, *shape) in the dtype of S; ``level`` is (B,)."""
        gain = (
            self.values
            if level is None
            else self.values / (self.values + level.to(self.values)[:, None] ** 2)
        )
        return (v.flatten(1).to(self.values) @ self.vectors * gain @ self.vectors.mT).reshape(v.shape)

    def root(self, v: Tensor) -> Tensor:
        """S^(1/2) v of each sample: unit normal v become draws of covariance S."""
        scaled = v.flatten(1).to(self.values) @ self.vectors * self.values.sqrt()
        return (scaled @ self.vectors.mT).reshape(v.shape)


class LinearPosterior(Wrapper):
    """The denoiser of samples that agree with a linear measurement. It goes with any solver.

    Args:
        inner: The model, differentiable with respect to its input.
        operator: A.
        value: What was measured, (*out_shape), or (B, *out_shape) for the B samples of each call.
        noise_std: Standard deviation of the measurement's noise; 0 is an exact measurement.
        covariance: ``"tweedie"`` uses the model's own Jacobian, by conjugate gradients with one VJP an
            iteration; ``"isotropic"`` a multiple of the identity, with one VJP in all; a :class:`Spread` the
            covariance of the data, without any.
        iterations: Conjugate-gradient iterations; M measurements need at most M. By default M, but at most
            32.

    Attributes:
        diffused: False: for non-Gaussian data each noise level has a different approximation, so the scores
            do not belong to one density. Where the data are Gaussian, and iterations enough, set it to True.

    Raises:
        UserError: The measurement does not fit the model, or the model has no score.
    """

    diffused = False

    def __init__(
        self,
        inner: Denoiser,
        operator: LinearMap,
        value: Tensor,
        noise_std: float = 0.0,
        *,
        covariance: Literal["tweedie", "isotropic"] | Spread = "tweedie",
        iterations: int | None = None,
    ) -> None:
        require_score(inner, "a posterior given a measurement")
        if not isinstance(covariance, Spread):
            refuse_random_layers(inner)
            check_name("covariance", covariance, ("tweedie", "isotropic"))
        super().__init__(inner)
        operator.check_value(value)
        check_equal("the shapes of a measured sample and of the model", operator.shape, tuple(inner.shape))
        check_number("the noise of a measurement", noise_std, "[0, inf)")
        check_count(
            "the number of conjugate gradients",
            1 if iterations is None else iterations,
        )
        self.operator, self.value, self.noise_std = operator, value, noise_std
        self.covariance = covariance
        self.iterations = iterations or min(math.prod(operator.out_shape), 32)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: ConditioningLike = None) -> Tensor:
        """The corrected prediction, (B, *shape)."""
        if tuple(self.value.shape) not in (self.operator.out_shape, (len(x), *self.operator.out_shape)):
            raise UserError(
                "there must be one measured value for all samples, or one for each",
                got=f"{tuple(self.value.shape)} for {len(x)} samples",
            )
        if isinstance(self.covariance, Spread):
            return self._by_spread(self.covariance, x, sigma, conditioning)
        out, leaf = denoise_for_gradient(self.inner, x, sigma, conditioning)
        clean = out.detach()
        surprise = self.value.to(clean) - self.operator.apply(clean)
        level = sigma.to(clean).reshape(-1).expand(len(x))
        relative = expand(self.noise_std**2 / level**2, surprise)
        share = expand(self.sigma_data**2 / (level**2 + self.sigma_data**2), clean)

        def seen(v: Tensor) -> Tensor:
            back = self.operator.transpose(v)
            spread = share * back if self.covariance == "isotropic" else pull_back(out, leaf, back[None])[0]
            return self.operator.apply(spread) + relative * v

        u = conjugate_gradients(seen, surprise, self.iterations)
        return clean + pull_back(out, leaf, self.operator.transpose(u)[None], keep=False)[0]

    def _by_spread(self, spread: Spread, x: Tensor, sigma: Tensor, conditioning: ConditioningLike) -> Tensor:
        clean = self.inner(x, sigma, conditioning)
        level = sigma.to(spread.values).reshape(-1).expand(len(x))
        # With J = S (S + sigma^2)^-1 for C / sigma^2, the noise of the measurement is in units of sigma.
        noise = self.noise_std / level
        value = self.value.to(clean).expand(len(x), *self.operator.out_shape)
        return corrected(
            clean, value, self.operator, lambda v: spread.of(v, level), noise, self.iterations
        ).to(clean)

    def cost(self, sigma: Tensor, conditioning: ConditioningLike = None) -> Calls:
        """One call of the model, and a backward pass for each iteration and the correction."""
        passes = 1 + (self.iterations if self.covariance == "tweedie" else 0)
        passes = 0 if isinstance(self.covariance, Spread) else passes
        return cost_of(self.inner, sigma, conditioning) + Calls(backward=passes)


def corrected(
    x: Tensor,
    value: Tensor,
    operator: LinearMap,
    spread: Callable[[Tensor], Tensor],
    noise: Tensor,
    iterations: int,
) -> Tensor:
    """X + S A^T (A S A^T + noise^2)^(-1) (value - A x): the mean of N(x, S) given a measurement of it.

    With draws of N(m, S) for ``x``, and noise added to ``value``, it is a draw of the posterior (Matheron).

    Args:
        x: (B, *shape).
        value: (B, *out_shape).
        operator: A.
        spread: S v, (B, *shape), in the dtype to work in.
        noise: Standard deviation of the measurement's noise, (B,).
        iterations: Conjugate-gradient iterations.
    """
    surprise = value - operator.apply(x)
    relative = expand(noise.to(surprise) ** 2, surprise)

    def seen(v: Tensor) -> Tensor:
        return operator.apply(spread(operator.transpose(v))) + relative * v

    u = conjugate_gradients(seen, surprise.to(spread(torch.zeros_like(x))), iterations)
    return x + spread(operator.transpose(u))


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """Solves matrix u = right for each sample, (B, ...), the matrix symmetric and positive semi-definite.

    A sample that has converged to rounding, or reaches a direction without curvature, keeps its solution. The
    number of iterations is fixed, so that nothing waits for the device.
    """
    u = torch.zeros_like(right)
    rest, direction = right, right
    size = _dot(rest, rest)
    least = torch.finfo(right.dtype).eps ** 2 * size
    for _ in range(iterations):
        image = matrix(direction)
        curvature = _dot(direction, image)
        going = (size > least) & (curvature > 0)
        step = torch.where(going, size / torch.where(going, curvature, 1), 0)
        u = u + step * direction
        rest = rest - step * image
        smaller = _dot(rest, rest)
        direction = rest + torch.where(going, smaller / torch.where(going, size, 1), 0) * direction
        size = torch.where(going, smaller, 0)
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of samples, (B, 1, ...)."""
    return expand((a * b).flatten(1).sum(1), a)
