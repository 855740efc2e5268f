"""The end of a pipeline in reverse, so that images are encoded: its autoencoder, and what is around it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.interop.pipelines.arguments import said
from distmatch.interop.pipelines.containers import replaced
from distmatch.interop.pipelines.trace import Reached

_PROBES = 2  # random samples that the form must explain
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Tail:
    """What a pipeline passes to its autoencoder for a sample z: ``u = scale * z[order] + shift``, flattened.

    Attributes:
        vae: The autoencoder.
        scale, shift: One number for each element of u, float32.
        order: Which element of z each element of u is, int64.
        latent: Shape of u without the batch.
        image: Shape of what the autoencoder returns for it, without the batch.
        sample: Shape of z without the batch.
    """

    vae: Any
    scale: Tensor
    shift: Tensor
    order: Tensor
    latent: tuple[int, ...]
    image: tuple[int, ...]
    sample: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) of what encodings depend on besides the image."""
        digest = hashlib.sha256(repr((type(self.vae).__name__, self.image, self.sample)).encode())
        weights = [self.scale, self.shift, self.order]
        for value in [*weights, *(value for _, value in sorted(self.vae.state_dict().items()))]:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images or video (B, *shape) in [-1, 1] as samples (B, *sample).

        Args:
            x: As the pipeline decodes them.
            noise: Unit normal noise like the samples, to draw from the encoder's Gaussian; None: its mean. An
                autoencoder without one needs none.
        """
        vae = self.vae if self.vae.device == x.device else self.vae.to(x.device)
        found = vae.encode(x.reshape(len(x), *self.image).to(vae.dtype))
        order = self.order.to(x.device)
        if hasattr(found, "latent_dist"):
            u = found.latent_dist.mean.float().flatten(1)
            if noise is not None:
                u = u + found.latent_dist.std.float().flatten(1) * noise.flatten(1)[:, order]
        else:
            u = (found.latents if hasattr(found, "latents") else found.latent).float().flatten(1)
        z = torch.empty_like(u)
        z[:, order] = (u - self.shift.to(x.device)) / self.scale.to(x.device)
        return z.reshape(len(x), *self.sample)


def trace_tail(
    pipeline: Any, end: Callable[[Tensor], Tensor | None], sample: tuple[int, ...], dtype: torch.dtype
) -> Tail:
    """The end of a pipeline as a scaling of permuted elements, checked with random samples.

    Args:
        pipeline: The pipeline of diffusers.
        end: Runs its end on samples (B, *sample); returns what it makes of them, in [-1, 1].
        sample: Shape of a sample.
        dtype: The dtype in which it works on samples.

    Raises:
        UserError: It has no autoencoder that encodes, or does something else with samples.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None or not (hasattr(vae, "encode") and hasattr(vae, "decode")):
        raise _unread(pipeline, f"a {type(vae).__name__} as its autoencoder")
    size, own = math.prod(sample), vae.decode

    def passed(z: Tensor) -> Tensor:
        """What the autoencoder receives for some samples; it is not run."""
        seen: list[Tensor] = []

        def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(latents.detach().float().cpu())
            raise Reached

        with replaced(vae, {"decode": decode}), suppress(Reached):
            end(z.reshape(len(z), *sample))
        if len(seen) != 1 or len(seen[0]) != len(z) or seen[0][0].numel() != size:
            got = said(seen[0]) if seen else "no call"
            raise _unread(pipeline, f"{got} for its autoencoder, from {len(z)} samples of {sample}")
        return seen[0]

    bits = max(1, (size - 1).bit_length())
    number = torch.arange(size)
    signs = torch.stack([2.0 * (number >> bit & 1) - 1 for bit in range(bits)])
    random = torch.randn(_PROBES, size, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    u = passed(torch.cat([torch.ones(1, size), -torch.ones(1, size), signs, random]))
    latent, u = tuple(u.shape[1:]), u.flatten(1)
    scale, shift = (u[0] - u[1]) / 2, (u[0] + u[1]) / 2
    order = sum(((row - shift) * scale > 0).long() << bit for bit, row in enumerate(u[2 : 2 + bits]))
    if not isinstance(order, Tensor) or bool((scale == 0).any()) or not torch.equal(order.sort()[0], number):
        raise _unread(pipeline, "elements of a sample that do not arrive, or arrive twice")
    gap = (u[-_PROBES:] - (scale * random[:, order] + shift)).abs().max().item()
    if not gap <= _CLOSE.get(dtype, 1e-5) * u[-_PROBES:].abs().max().item():
        raise _unread(pipeline, f"latents that differ by {gap:.1e} from a scaling of the sample's elements")

    images: list[Tensor] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        images.append((result[0] if isinstance(result, tuple) else result.sample).detach().float().cpu())
        return result

    with replaced(vae, {"decode": noted}):
        x = end(random[:1].reshape(1, *sample))
    if x is None or x.numel() != images[0].numel():
        raise _unread(pipeline, f"{said(images[0])} of its autoencoder, of which it returns {said(x)}")
    gap = (images[0].clamp(-1, 1).flatten() - x.float().cpu().flatten()).abs().max().item()
    if not gap <= _CLOSE.get(dtype, 1e-5):
        raise _unread(pipeline, f"images that differ by {gap:.1e} from what its autoencoder returns")
    return Tail(vae, scale, shift, order, latent, tuple(images[0].shape[1:]), sample)


def _unread(pipeline: Any, got: str) -> UserError:
    return UserError(
        f"images cannot be encoded by this {type(pipeline).__name__}: its end is more than its autoencoder "
        "and a scaling of permuted latents",
        got=got,
        fix="give latents of the teacher's own shape as data, or use a method that needs no data",
    )
