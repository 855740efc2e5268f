"""The fake score and the discriminator, trained by the method's own steps, learn what is known exactly."""

from __future__ import annotations

import pytest
import torch

from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import UNCONDITIONAL
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.methods.matching import fake_score
from distmatch.methods.matching.networks import predictions
from tests.helpers.small import distiller

REAL = GaussianMixture([1.0], [[0.6]], [0.36], sigma_max=2.0)


@pytest.mark.parametrize(
    ("features", "steps", "lr"), [pytest.param("own", 125, 4e-3, marks=pytest.mark.slow), ("fake", 250, 2e-3)]
)
def test_critic_and_discriminator_learn_the_exact_score_and_ratio(
    features: str, steps: int, lr: float
) -> None:
    # An untrained network returns 0, so the student is x0 = c_skip s z, c_skip = sigma_data^2 / (s^2 +
    # sigma_data^2), with s its first level: exactly N(0, spread^2). It never moves: the warm-up never ends.
    settings = {
        "warmup_steps": 10**6,
        "lr_fake_score": lr,
        "lr_discriminator": lr,
        "ratio_features": features,
    }
    method = distiller(REAL, "js", noise_low=0.1, beta1=0.9, total_steps=steps, lr_decay="cosine", **settings)
    state = method.init(0)
    level = state.student.sigmas[0]
    spread = REAL.sigma_data**2 * level / (level**2 + REAL.sigma_data**2)
    student = GaussianMixture([1.0], [[0.0]], [spread**2])
    drawn = torch.Generator().manual_seed(0)
    for _ in range(steps):
        method.step(state, Batch(REAL.sample(512, generator=drawn), None))
    assert state.updates == 0
    x0 = torch.cat([REAL.sample(2000, generator=drawn), student.sample(2000, generator=drawn)])
    for sigma in (0.15, 0.4, 1.2):
        x, levels = x0 + sigma * torch.randn(x0.shape, generator=drawn), torch.full((4000,), sigma)
        with torch.no_grad():
            _, fake, logit = predictions(method.compared, state, x, levels, UNCONDITIONAL)
        exact = REAL.log_prob(x, sigma) - student.log_prob(x, sigma)
        usual = exact.abs() < 4  # where both have samples to learn from
        error = (logit - exact)[usual].square().mean().sqrt() / exact[usual].std()
        miss = (fake - student(x, levels))[x.abs()[:, 0] < 2 * (spread**2 + sigma**2) ** 0.5]
        # Seeds 0 to 2: at most 0.16 (own) and 0.26 (fake) of the ratio's spread, and at most 0.034;
        # untrained: 1, and above 0.25.
        assert error < 0.3, (sigma, float(error))
        assert miss.square().mean().sqrt() < 0.05, sigma


def test_r1_compares_real_samples_with_slightly_noisier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    method = distiller(REAL, "js", r1=0.5, warmup_steps=10)
    state = method.init(0)
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    passes: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]] = []
    state.discriminator.register_forward_hook(lambda _, args, out: passes.append((args, out)))  # type: ignore[union-attr]

    def spy(clean: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
        seen["compared"] = clean, perturbed
        return (clean - perturbed).square().mean()

    monkeypatch.setattr(fake_score, "approximate_r1", spy)
    real = REAL.sample(4000, seed=0)
    for _ in range(2):  # after the first step the logits are no longer all zero
        method.step(state, Batch(real, None))
    ((noised, sigma, *_), on_real), ((perturbed, *_), on_perturbed) = passes[-2:]
    assert torch.equal(seen["compared"][0], on_real)
    assert torch.equal(seen["compared"][1], on_perturbed)
    for noise, share in ((noised - real, 1.0), (perturbed - noised, 0.1)):
        unit = noise[:, 0] / (share * sigma)
        assert float(unit.std()) == pytest.approx(1, abs=5 / 8000**0.5)
