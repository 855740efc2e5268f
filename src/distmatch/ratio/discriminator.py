"""Where log r comes from: a discriminator between noised real and noised student samples.

At the optimum of the logistic loss its logit is log p_t/q_t, so r = exp(logit) (f-distill, section 1.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import Conditioning, example_conditioning, spec_of
from distmatch.diffusion.denoiser import Denoiser, FeatureDenoiser, has_features
from distmatch.nets.head import RatioHead, RatioNet

Source = Literal["teacher", "fake", "own"]


def choose_source(wanted: str, teacher: Denoiser) -> Source:
    """Resolves ``auto``: teacher features where the teacher has them, else a separate network.

    Raises:
        UserError: Teacher features were requested and the teacher has none.
    """
    if wanted == "auto":
        return "teacher" if has_features(teacher) else "own"
    if wanted == "teacher" and not has_features(teacher):
        raise UserError(
            "the discriminator cannot use features of this teacher",
            got=type(teacher).__name__,
            expected="a teacher whose has_features is True, and which takes return_features",
            fix="use --ratio-features own, or fake",
        )
    return wanted  # type: ignore[return-value]


def build_discriminator(source: Source, features_from: Denoiser, num_classes: int) -> nn.Module:
    """A discriminator for ``source``: a head on features of ``features_from``, or a net on the samples.

    Args:
        source: What it sees.
        features_from: The denoiser whose features it will see; for ``own``, one with the data's shape.
        num_classes: Number of classes of its labels; 0 for none.
    """
    if source == "own":
        sigma_data, spec = features_from.sigma_data, spec_of(features_from)
        return RatioNet(features_from.shape, num_classes, sigma_data=sigma_data, conditions=spec)
    if not has_features(features_from):
        raise UserError(
            "this denoiser has no features for the discriminator",
            got=f"a {type(features_from).__name__} whose network has none",
            fix="use --ratio-features own",
        )
    with torch.no_grad():
        probe = torch.zeros(2, *features_from.shape, device=_device(features_from))
        conditioning = example_conditioning(features_from, 2, probe.device)
        level = torch.ones(2, device=probe.device)
        features = features_from(probe, level, conditioning, return_features="only")
    shapes = [tuple(f.shape[1:]) for f in features]
    unit = 2 * features_from.sigma_data
    return RatioHead(shapes, num_classes, noise_unit=unit, conditions=spec_of(features_from))


def denoise_with_logit(
    denoiser: Denoiser,
    discriminator: nn.Module,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
) -> tuple[Tensor, Tensor]:
    """One pass of a denoiser with features: its prediction and the discriminator's logit (B,)."""
    prediction, features = _required(denoiser)(x, sigma, conditioning, return_features=True)
    return prediction, discriminator(features, sigma, conditioning)


def logits_of(
    source: Source,
    features_from: Denoiser,
    discriminator: nn.Module,
    kinds: Sequence[Tensor],
    sigma: Tensor,
    conditioning: Conditioning,
    *,
    grad: bool,
) -> list[Tensor]:
    """The discriminator's logits of samples of several kinds, if the prediction is not used.

    One pass of the denoiser, which ends at the last feature, serves all kinds. The discriminator sees one
    after the other: what real and generated samples share (a bias, say) then cancels to the bit in its
    gradients. Of a sum over all of them rounding would be left, which Adam makes as large as any other
    gradient.

    Args:
        source: What the discriminator sees.
        features_from: The denoiser whose features it sees; unused for ``own``.
        discriminator: From :func:`build_discriminator`.
        kinds: Noised samples (B, *shape) each, such as generated and real ones.
        sigma: Their levels (B,), the same for all kinds.
        conditioning: What they are conditioned on.
        grad: Whether a gradient goes through the features; the discriminator's own needs none of them.

    Returns:
        (B,) for each kind.
    """
    if source == "own":
        return [discriminator(x, sigma, conditioning) for x in kinds]
    count = len(kinds)
    whole = kinds[0] if count == 1 else torch.cat(list(kinds))
    cond = conditioning.repeat(count)
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
        levels = sigma.repeat(count)
        features = _required(features_from)(whole, levels, cond, return_features="only")
    parts = zip(*(feature.chunk(count) for feature in features), strict=True)
    return [discriminator(list(part), sigma, conditioning) for part in parts]


def _required(denoiser: Denoiser) -> FeatureDenoiser:
    if not has_features(denoiser):
        raise TypeError("the discriminator was built for a denoiser with features")
    return denoiser


def _device(denoiser: Denoiser) -> torch.device:
    if isinstance(denoiser, nn.Module):
        for tensor in denoiser.parameters():
            return tensor.device
    inner = getattr(denoiser, "inner", None)
    return _device(inner) if inner is not None else torch.device("cpu")
