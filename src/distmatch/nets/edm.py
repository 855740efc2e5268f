"""EDM preconditioning (Karras et al. 2022, table 1): a network becomes a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base.checks import check_number
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import (
    Conditioning,
    ConditioningLike,
    ConditioningSpec,
    as_conditioning,
    check_conditioning,
    label_spec,
    null_labels,
)
from distmatch.diffusion.denoiser import (
    Output,
    ReturnFeatures,
    asked,
    check_inputs,
    expand,
    has_features,
    on_prediction,
)
from distmatch.diffusion.prompts import PromptEncoder
from distmatch.diffusion.solvers.sampling import SamplingMixin
from distmatch.nets.layers import at_least_float32, noise_coordinate
from distmatch.nets.text import TextEmbedding


class EDMDenoiser(SamplingMixin, nn.Module):
    """``D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)`` around a network F.

    With ``v = sigma^2 + sigma_data^2``: ``c_skip = sigma_data^2 / v``,
    ``c_out = sigma sigma_data / sqrt(v)``, ``c_in = 1 / sqrt(v)``,
    ``c_noise = ln(sigma / noise_unit) / 4``. The network then sees inputs and targets of unit variance
    at every noise level.

    Args:
        net: A network ``net(x, c_noise, labels)``.
        shape: Shape of one sample.
        num_classes: Number of classes; 0 when unconditional.
        sigma_data: Standard deviation of the data.
        sigma_min: Smallest noise level it is meant for.
        sigma_max: Largest noise level; sampling starts there.
        pfgm_dims: Extra dimensions D of the Student-t noise that it was trained with (PFGM++); 0 is
            Gaussian noise.
        noise_unit: Unit of the network's noise levels. Published networks have 1; with twice
            ``sigma_data`` the denoiser of scaled data is the scaled denoiser, with the same weights.

    Attributes:
        jumps: Whether the network takes ``target_sigma``; :func:`distmatch.nets.jump.as_jump` adds it.
        prompt_encoder: Of a network that takes text, what makes its conditioning of prompts.

    Raises:
        UserError: Not ``0 < sigma_min < sigma_max``, ``sigma_data`` or ``noise_unit`` is not positive, or
            ``pfgm_dims`` is negative.
    """

    prompt_encoder: PromptEncoder | None = None

    def __init__(
        self,
        net: nn.Module,
        *,
        shape: Sequence[int],
        num_classes: int,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        pfgm_dims: float = 0.0,
        noise_unit: float = 1.0,
    ) -> None:
        super().__init__()
        if not (0 < sigma_min < sigma_max < float("inf") and 0 < sigma_data < float("inf")):
            raise UserError(
                "the noise levels of a denoiser are not valid",
                got=f"sigma_min={sigma_min}, sigma_max={sigma_max}, sigma_data={sigma_data}",
                expected="0 < sigma_min < sigma_max and sigma_data > 0, all finite",
                fix="the usual values are 0.002, 80 and the standard deviation of the data",
            )
        self.net = net
        self.shape = tuple(shape)
        self.num_classes = num_classes
        self.sigma_data = float(sigma_data)
        self.sigma_min = float(sigma_min)
        self.sigma_max = float(sigma_max)
        check_number("the number of extra dimensions of PFGM++", pfgm_dims, "[0, inf)")
        self.pfgm_dims = float(pfgm_dims)
        check_number("the unit of noise levels", noise_unit, "(0, inf)")
        self.noise_unit = float(noise_unit)
        self.jumps = False

    @property
    def gaussian_kernel(self) -> bool:
        """Whether it was trained with Gaussian noise, so that ``(D - x) / sigma^2`` is a score."""
        return self.pfgm_dims == 0

    @property
    def text(self) -> TextEmbedding | None:
        """The part of the network that embeds text; None where it takes none."""
        found = getattr(self.net, "text", None)
        return found if isinstance(found, TextEmbedding) else None

    @property
    def conditioning_spec(self) -> ConditioningSpec:
        """The fields that it takes: those of its text, or class labels."""
        return label_spec(self.num_classes) if self.text is None else self.text.text.spec

    def null_conditioning(self, n: int) -> Conditioning:
        """The empty prompt or the null label, for ``n`` samples."""
        if self.text is None:
            return null_labels(self.conditioning_spec, n)
        return self.text.null_conditioning(n)

    @property
    def has_features(self) -> bool:
        """Whether the network has features to return."""
        return has_features(self.net)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: ConditioningLike = None,
        *,
        return_features: ReturnFeatures = False,
        target_sigma: Tensor | None = None,
    ) -> Output:
        """Denoises ``x`` (B, *shape) at levels ``sigma`` (B,).

        Args:
            x: Noised samples.
            sigma: Their levels.
            conditioning: Their labels (B,) int64, -1 for none; or their text.
            return_features: Also return the features of the network, in its own dtype, or ``"only"`` them, by
                a pass that stops at the last of them where the network can.
            target_sigma: Of a network of two levels, the level to jump to, (B,) in [0, sigma]; None is 0, the
                data.

        Returns:
            (B, *shape) in float32, or float64 for a float64 ``x``, whatever the dtype inside the network;
            with features the pair of it and a list, (B, C) or (B, C, H, W) each.
        """
        inputs, c_noise, c_skip, c_out = self._preconditioned(x, sigma, target_sigma)
        given = as_conditioning(conditioning)
        text: dict[str, Any] = {}
        if self.text is not None and given:
            if not torch.compiler.is_compiling():  # lengths are numbers there, and would fix the batch
                check_conditioning(given, len(x), self.conditioning_spec)
            text = {"text": dict(given)}
        output = self.net(inputs, c_noise, given.label, **text, **asked(return_features))
        return on_prediction(output, return_features, lambda out: c_skip * x + c_out * out.to(inputs.dtype))

    def _preconditioned(
        self, x: Tensor, sigma: Tensor, to: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_inputs(x, sigma, self.shape)
        dtype = at_least_float32(x)
        # One noise level for the whole batch is accepted too.
        sigma = sigma.to(dtype).reshape(-1).expand(x.shape[0])
        level = expand(sigma, x)
        variance = level**2 + self.sigma_data**2
        c_skip, c_out = self._scales(level, variance)
        return x.to(dtype) * variance.rsqrt(), self._coordinates(sigma, to), c_skip, c_out

    def _coordinates(self, sigma: Tensor, to: Tensor | None) -> Tensor:
        """The network's noise-level input: (B,), or (B, 2) when it jumps."""
        if not self.jumps:
            if to is not None:
                raise UserError(
                    "this network takes one noise level and cannot jump to another",
                    fix="convert it with distmatch.nets.jump.as_jump",
                )
            return noise_coordinate(sigma, self.noise_unit)
        to = torch.zeros_like(sigma) if to is None else to.to(sigma.dtype).reshape(-1).expand(sigma.shape)
        # Smooth in the noise level, and finite at 0: below sigma_min the input is nearly constant.
        levels = (sigma, (to**2 + self.sigma_min**2).sqrt())
        return torch.stack([noise_coordinate(level, self.noise_unit) for level in levels], 1)

    def _scales(self, level: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out at ``level``, with ``variance = level^2 + sigma_data^2``, all (B, 1, ...)."""
        return self.sigma_data**2 / variance, level * self.sigma_data * variance.rsqrt()


def feature_shapes(denoiser: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes, without batch, of the features of ``denoiser`` for samples like ``x`` (B, *shape).

    It runs the denoiser once on one sample, without gradient and without dropout.
    """
    was_training = denoiser.training
    denoiser.eval()
    with torch.no_grad():
        features = denoiser(x[:1], torch.ones(1, device=x.device), return_features="only")
    denoiser.train(was_training)
    return [tuple(feature.shape[1:]) for feature in features]
