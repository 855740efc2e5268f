"""The autoencoder of diffusers as the decoder of teachers in its latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError


class VAEDecoder:
    """The autoencoder of diffusers between images in [-1, 1] and the latents that a teacher was trained on.

    ``z = (raw - shift) * scale``, channel by channel. It is frozen and no part of a denoiser's parameters: a
    copy of the denoiser shares it.

    Args:
        vae: An ``AutoencoderKL``, or a ``VQModel``, whose codes are looked up in decoding only.
        scale: Factor of raw latents, one number or one a channel.
        shift: What is taken from raw latents first, one number or one a channel.
        size: Height and width of a latent.
        unit_pixels: The autoencoder was run on images in [0, 1] (EDM2); ours are in [-1, 1] all the same.
    """

    def __init__(
        self,
        vae: Any,
        scale: Sequence[float],
        shift: Sequence[float],
        size: tuple[int, int],
        *,
        unit_pixels: bool = False,
    ) -> None:
        self.vae = vae.eval().requires_grad_(False)
        channels = int(vae.config.latent_channels)
        if len(scale) not in (1, channels) or len(shift) not in (1, channels):
            raise UserError(
                "scale and shift of latents must be one number, or one a channel",
                got=f"{len(scale)} and {len(shift)}",
                expected=f"1 or {channels}",
            )
        self.unit_pixels = unit_pixels
        self.scale, self.shift = tuple(map(float, scale)), tuple(map(float, shift))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.shape = (int(vae.config.out_channels), factor * size[0], factor * size[1])

    def to_dict(self) -> dict[str, Any]:
        """How it uses its autoencoder, as JSON."""
        pixels = "0 to 1" if self.unit_pixels else "-1 to 1"
        return {"scale": list(self.scale), "shift": list(self.shift), "pixels": pixels}

    def __eq__(self, other: object) -> bool:
        """Whether the other one has the same latents: scaling, architecture and every weight."""
        if not isinstance(other, VAEDecoder):
            return NotImplemented
        if self is other:
            return True
        if (self.to_dict(), self.shape) != (other.to_dict(), other.shape) or _built(self) != _built(other):
            return False
        mine, theirs = self.vae.state_dict(), other.vae.state_dict()
        return mine.keys() == theirs.keys() and all(
            v.dtype == theirs[k].dtype and torch.equal(v, theirs[k].to(v.device)) for k, v in mine.items()
        )

    __hash__ = None  # type: ignore[assignment]  # two with equal weights are equal, so identity is no hash

    def __deepcopy__(self, memo: dict[int, Any]) -> VAEDecoder:
        """Itself: nothing in it ever changes."""
        return self

    def decode(self, z: Tensor) -> Tensor:
        """Model-space latents (B, C, h, w) to images (B, channels, H, W); gradients pass through."""
        scale, shift = self._numbers(z)
        raw = z.float() / scale + shift
        x = self._vae(z).decode(raw.to(self.vae.dtype)).sample.float()
        return 2 * x - 1 if self.unit_pixels else x

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, channels, H, W) in [-1, 1] to model-space latents (B, C, h, w).

        Args:
            x: Images.
            noise: Unit normal noise like the latents, to draw from the encoder's Gaussian; None: its mean.
                A ``VQModel`` has no Gaussian and needs none.
        """
        scale, shift = self._numbers(x)
        x = (x + 1) / 2 if self.unit_pixels else x
        found = self._vae(x).encode(x.to(self.vae.dtype))
        if not hasattr(found, "latent_dist"):
            return (found.latents.float() - shift) * scale
        found = found.latent_dist
        raw = found.mean.float() if noise is None else found.mean.float() + found.std.float() * noise
        return (raw - shift) * scale

    def _numbers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = (
            torch.tensor(v, device=like.device)[None, :, None, None] for v in (self.scale, self.shift)
        )
        return scale, shift

    def _vae(self, like: Tensor) -> Any:
        return self.vae if self.vae.device == like.device else self.vae.to(like.device)


def _built(decoder: VAEDecoder) -> dict[str, Any]:
    """The config of an autoencoder without where it was loaded from and by which version."""
    return {name: value for name, value in dict(decoder.vae.config).items() if not name.startswith("_")}


def vae_scaling(config: Any) -> tuple[list[float], list[float]]:
    """Scale and shift of latents that the config of an autoencoder states."""
    factor = float(config.scaling_factor)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        return [factor / float(value) for value in std], [float(value) for value in mean]
    return [factor], [float(getattr(config, "shift_factor", None) or 0.0)]
