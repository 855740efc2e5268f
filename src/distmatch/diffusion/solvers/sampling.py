"""``teacher.sample(...)``: the method of denoisers that draws samples with a solver."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.latents import decode_samples
from distmatch.diffusion.solvers.run import Solver
from distmatch.diffusion.solvers.solve import sample_teacher


class SamplingMixin:
    """A denoiser with a method :meth:`sample`."""

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        conditioning: ConditioningLike = None,
        steps: int = 18,
        solver: str | Solver = "heun",
        decode: bool = True,
        **options: Any,
    ) -> Tensor:
        """Draws samples on the device of the model, by default with 18 steps of Heun's method on EDM's grid.

        Args:
            n: Number of samples.
            seed: Seed of all noise; sample i depends on the seed and i alone.
            conditioning: Class labels (n,) int64, a conditioning, or None for samples without a condition.
            steps: Steps of the default grid.
            solver: A solver or its name, such as ``"dpmpp-2m"``.
            decode: Whether the latents of a model that works on them become images.
            options: ``grid``, ``path``, ``batch`` and ``on_batch``, as for
                :func:`~distmatch.diffusion.solvers.sample_teacher`.

        Returns:
            (n, *shape) float32 on the CPU, in model space (images in [-1, 1]).

        Raises:
            UserError: What :func:`~distmatch.diffusion.solvers.sample_teacher` refuses.
        """
        denoiser: Any = self
        module = denoiser
        while not isinstance(module, nn.Module) and hasattr(module, "inner"):
            module = module.inner
        tensor = next(module.parameters(), None) if isinstance(module, nn.Module) else None
        device = "cpu" if tensor is None else tensor.device
        x = sample_teacher(
            denoiser,
            n,
            conditioning=conditioning,
            seed=seed,
            steps=steps,
            solver=solver,
            device=device,
            **options,
        )
        return decode_samples(denoiser, x, device=device) if decode else x
