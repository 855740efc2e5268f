"""Several denoisers that are used together, seen as scores of one frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from distmatch.base.checks import check_equal
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import (
    Conditioning,
    ConditioningLike,
    as_conditioning,
    check_conditioning,
    spec_of,
)
from distmatch.diffusion.denoiser import Denoiser, levels_like, require_diffused, require_score
from distmatch.diffusion.geometry.jacobian import denoise_for_gradient, pull_back
from distmatch.diffusion.guidance import CallCounter
from distmatch.diffusion.latents import require_same_samples
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers.grids import checked_levels
from distmatch.diffusion.solvers.solve import check_start

Conditions = Sequence[ConditioningLike] | None


class Models:
    """Denoisers of one shape, each with its own condition.

    Args:
        denoisers: One or more; one denoiser may occur several times, with several conditionings.
        conditions: One for each denoiser; None is no condition for any.
        purpose: What they are for, for messages.

    Raises:
        UserError: Shapes or autoencoders differ, a model has no score or is guided, or conditions do not fit.
    """

    def __init__(self, denoisers: Sequence[Denoiser], conditions: Conditions, purpose: str) -> None:
        if len(denoisers) == 0:
            raise UserError(f"{purpose} needs at least one model", got="none")
        for denoiser in denoisers:
            require_score(denoiser, purpose)
            require_diffused(denoiser, purpose)
        require_same_samples(denoisers, purpose)
        given = [None] * len(denoisers) if conditions is None else list(conditions)
        self.conditions = [as_conditioning(one) for one in given]
        check_equal("the numbers of models and of their conditions", len(denoisers), len(self.conditions))
        for denoiser, one in zip(denoisers, self.conditions, strict=True):
            if one and not spec_of(denoiser):
                raise UserError(
                    "an unconditional model received a conditioning", fix="give None in its place"
                )
        self.shape = tuple(denoisers[0].shape)
        self.purpose = purpose
        self._counters = [d if isinstance(d, CallCounter) else CallCounter(d) for d in denoisers]
        self._before = [c.calls for c in self._counters]

    def __len__(self) -> int:
        return len(self._counters)

    @property
    def denoisers(self) -> list[Denoiser]:
        """The denoisers, counted."""
        return list(self._counters)

    @property
    def calls(self) -> int:
        """Network calls for each sample so far, of all models together."""
        return sum(c.calls - before for c, before in zip(self._counters, self._before, strict=True))

    def levels(self, grid: Tensor | Sequence[float], *, to_zero: bool) -> tuple[float, ...]:
        """The levels of a grid as numbers.

        Args:
            grid: Strictly decreasing.
            to_zero: Whether the last one may be 0.

        Raises:
            UserError: The grid is not valid, or exceeds the noise levels that all models support.
        """
        levels = checked_levels(grid, stochastic=True)
        if levels[-1] == 0 and not to_zero:
            raise UserError(
                f"{self.purpose} must end above sigma 0, where its target has a density",
                got=levels[-1],
                fix="end at the sigma_min of the models: to_zero=False in grid()",
            )
        positive = [v for v in levels if v > 0]
        low = max(c.sigma_min for c in self._counters)
        high = min(c.sigma_max for c in self._counters)
        if positive[0] > high * 1.001 or positive[-1] < low * 0.999:
            raise UserError(
                "the grid exceeds the noise levels that all models support",
                got=f"levels from {positive[0]:g} to {positive[-1]:g}",
                expected=f"between {low:g} and {high:g}",
            )
        return levels

    def check_batch(self, y: Tensor, noise: SampleNoise) -> None:
        """Refuses a start, noise or conditions that are not for one batch of these models.

        Raises:
            UserError: With what does not fit.
        """
        check_start(y, self.shape)
        noise.check(y)
        for conditioning, denoiser in zip(self.conditions, self._counters, strict=True):
            check_conditioning(conditioning, len(y), spec_of(denoiser))

    def scores(self, y: Tensor, level: float, dtype: torch.dtype) -> Tensor:
        """Scores of all models, (M, B, *shape) float64.

        Args:
            y: State, (B, *shape) float64.
            level: Its noise level.
            dtype: In which the models are called.
        """
        sigma = levels_like(y, level, dtype)
        clean = [c(y.to(dtype), sigma, labels).double() for c, labels in self._pairs()]
        return (torch.stack(clean) - y) / level**2

    def scores_and_curvature(
        self, y: Tensor, level: float, dtype: torch.dtype
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The scores, and a function from axes (K, B, *shape) to sum_k e_k^T H_i e_k, (M, B) float64.

        H_i is the Hessian of log q_i. The function costs K VJPs of each model.
        """
        sigma = levels_like(y, level, dtype)
        passes = [denoise_for_gradient(c, y.to(dtype), sigma, labels) for c, labels in self._pairs()]
        clean = torch.stack([out.detach().double() for out, _ in passes])

        def curvature(axes: Tensor) -> Tensor:
            total = torch.zeros(len(self), len(y), dtype=torch.float64, device=y.device)
            for i, (out, leaf) in enumerate(passes):
                for axis in axes:
                    pulled = pull_back(out, leaf, axis[None].to(dtype))[0].double()
                    total[i] += ((pulled - axis) * axis).flatten(1).sum(1)
            return total / level**2

        return (clean - y) / level**2, curvature

    def _pairs(self) -> Iterator[tuple[CallCounter, Conditioning]]:
        return zip(self._counters, self.conditions, strict=True)


def over_models(weights: Tensor, values: Tensor) -> Tensor:
    """The sum over models of ``weights`` (M, B) times ``values`` (M, B, *shape), (B, *shape)."""
    return torch.einsum("mb,mb...->b...", weights, values)
