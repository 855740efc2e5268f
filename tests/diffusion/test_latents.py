"""Which models may be put together: pixels with pixels, latents with latents of the same autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.composition.superdiff import superpose
from distmatch.diffusion.control.translate import decode, encode, translate
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.geometry.agreement import agreement
from distmatch.diffusion.guidance import CallCounter, GradientFree, Guided
from distmatch.diffusion.guidance.reflection import solve_reflected
from distmatch.diffusion.latents import Decoder, require_same_samples
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.interop import VAEDecoder
from tests.helpers.diffusers_models import vae

LEVELS = [20.0, 5.0, 1.0, 0.2]
X = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4) % 2


class Doubled:
    """An autoencoder whose latents are half the images."""

    shape = (2,)

    def decode(self, z: Tensor) -> Tensor:
        return 2 * z

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x / 2


def model(decoder: Decoder | None = None) -> GaussianMixture:
    mixture = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [0.1, 0.2], [0, 1], sigma_max=20.0)
    if decoder is not None:
        mixture.decoder = decoder  # type: ignore[assignment]
    return mixture


def noise() -> SampleNoise:
    return SampleNoise(0, torch.arange(4), (2,), "cpu")


USES: dict[str, Callable[[Denoiser, Denoiser], object]] = {
    "composition": lambda a, b: superpose([a, b], 20 * X, LEVELS, noise()),
    "autoguidance": lambda a, b: Guided(a, 2.0, reference=b),
    "gradient-free": lambda a, b: GradientFree(a, lambda x: x, 2.0, reference=b),
    "reflection": lambda a, b: solve_reflected(a, b, X, LEVELS, conditioning=LABELS),
    "translation": lambda a, b: translate(a, b, X, [*LEVELS, 0.0], noise()),
    "decoding": lambda a, b: decode(b, encode(a, X, [*LEVELS, 0.0], noise())),
    "agreement": lambda a, b: agreement(a, b, X, [1.0]),
}


@pytest.mark.parametrize("use", USES)
def test_models_of_one_shape_with_other_samples_are_refused(use: str) -> None:
    shared = Doubled()
    USES[use](model(shared), CallCounter(model(shared)))  # the decoder is found through wrappers
    USES[use](model(), model())
    for a, b in ((model(shared), model()), (model(), CallCounter(model(shared)))):
        with pytest.raises(UserError, match=r"models of the same samples.*with an autoencoder for some"):
            USES[use](a, b)
    with pytest.raises(UserError, match=r"latents of different autoencoders.*one autoencoder"):
        USES[use](model(shared), model(Doubled()))


def decoder(seed: int = 0, scale: float = 0.2, **options: bool) -> VAEDecoder:
    return VAEDecoder(vae(seed), [scale], [0.0], (8, 8), **options)


def test_autoencoders_are_the_same_if_they_decode_alike() -> None:
    first = decoder()
    elsewhere = decoder()  # loaded a second time, from another folder
    elsewhere.vae.register_to_config(_name_or_path="elsewhere")
    assert first is not elsewhere
    assert first == elsewhere == copy.deepcopy(first)
    require_same_samples([model(first), model(elsewhere)], "a test")
    moved = decoder()
    with torch.no_grad():
        moved.vae.decoder.conv_out.bias[0] += 1e-3
    others = [decoder(seed=1), decoder(scale=0.3), decoder(unit_pixels=True), moved]
    others.append(VAEDecoder(vae(0), [0.2], [0.1], (8, 8)))
    others.append(VAEDecoder(vae(0, act_fn="gelu"), [0.2], [0.0], (8, 8)))  # the same weights, used otherwise
    for other in others:
        assert first != other
        with pytest.raises(UserError, match="different autoencoders"):
            require_same_samples([model(first), model(elsewhere), model(other)], "a test")
    assert first != Doubled()
