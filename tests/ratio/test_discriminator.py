"""The ratio normalizer and the discriminator: what they recover, and that they never cancel the weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import as_conditioning
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import Karras
from distmatch.divergences import NAMES, divergence
from distmatch.nets.head import RatioHead, RatioNet
from distmatch.ratio.discriminator import build_discriminator, choose_source, denoise_with_logit
from distmatch.ratio.normalizer import (
    NormalizerConfig,
    RatioNormalizer,
    effective_sample_size,
)
from tests.helpers.small import network_teacher

WEIGHTED = [*(name for name in NAMES if name not in ("tv", "reverse_kl")), "alpha:0.5"]
EVEN = divergence("reverse_kl").weight  # one for every ratio
SHIFT = 0.6  # p = N(SHIFT, 1), q = N(0, 1): log p/q = SHIFT x - SHIFT^2 / 2


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_ratio(n: int, g: torch.Generator) -> Tensor:
    """Exact log p/q at samples of q."""
    return SHIFT * torch.randn(n, generator=g) - SHIFT**2 / 2


@pytest.mark.statistical
@pytest.mark.parametrize("memory", [0.0, 0.95])
def test_bin_means_are_the_true_ones_and_the_exact_ratio_comes_back(memory: float) -> None:
    normalizer = RatioNormalizer(NormalizerConfig(memory=memory))
    offset = torch.linspace(-1.5, 1.5, 10)  # a discriminator that is off by a constant at each noise level
    g, n = gen(), 40_000
    for _ in range(30):
        quantile = torch.rand(n, generator=g)
        exact = log_ratio(n, g)
        result = normalizer.update(exact + offset[(quantile * 10).long()], quantile, EVEN)
    # E_q[r] = 1, so the mean of bin b is exp(offset_b); Var_q[r] = exp(SHIFT^2) - 1 = 0.43. Each bin holds
    # n / 10 samples without memory and 20 times as many with it; five standard errors.
    share = n / 10 * (1 if memory == 0 else (1 + memory) / (1 - memory) / 2)
    error = 5 * math.sqrt((math.exp(SHIFT**2) - 1) / share)
    means = normalizer.bin_means()[0]
    assert ((means / offset.double().exp() - 1).abs() < error).all()
    assert int(result.pooled) == 0
    inside = exact.abs() < 2.9
    assert ((result.log_r - exact)[inside].abs() < 1.1 * error).all()
    assert float(result.log_r.exp().mean()) == pytest.approx(1, abs=error)
    assert not result.log_r.requires_grad


@pytest.mark.parametrize("memory", [0.0, NormalizerConfig().memory])
@pytest.mark.parametrize("batch", [4, 8, 64])
@pytest.mark.parametrize("name", WEIGHTED)
def test_the_weight_is_never_cancelled(name: str, batch: int, memory: float) -> None:
    normalizer = RatioNormalizer(NormalizerConfig(memory=memory))
    weigh, g = divergence(name).weight, gen()
    for _ in range(40):
        raw, quantile = log_ratio(batch, g), torch.rand(batch, generator=g)
        result = normalizer.update(raw, quantile, weigh)
        log_r, weight = result.log_r, result.weight
        torch.testing.assert_close(weight * result.scale.float(), weigh(log_r))
        # Samples of one bin keep the differences of their log ratios, whatever the bin is divided by.
        index = normalizer.bin_of(quantile)
        same = index[:, None] == index
        same &= (log_r.abs() < 3)[:, None] & (log_r.abs() < 3)
        difference = (log_r[:, None] - log_r) - (raw[:, None] - raw)
        assert difference[same].abs().max() < 1e-5
        assert weight.max() - weight.min() > (0.003 if name == "le_cam" else 0.02)
    # Le Cam's weight has its maximum near r = 2, so it is the flattest over these ratios.


def test_thin_bins_are_pooled_and_all_too_thin_are_left_alone() -> None:
    normalizer = RatioNormalizer(NormalizerConfig(bins=2, memory=0.0, min_count=10))
    raw = torch.cat([torch.full((9,), math.log(2.0)), torch.full((30,), math.log(4.0))])
    quantile = torch.cat([torch.full((9,), 0.1), torch.full((30,), 0.9)])
    result = normalizer.update(raw, quantile, EVEN)
    pooled = (9 * 2 + 30 * 4) / 39
    assert int(result.pooled) == 1
    torch.testing.assert_close(result.log_r[:9], torch.full((9,), math.log(2 / pooled)))
    torch.testing.assert_close(result.log_r[9:], torch.zeros(30))
    result = normalizer.update(raw[5:14], quantile[5:14], EVEN)  # nine in all
    assert int(result.pooled) == 2
    assert torch.equal(result.log_r, raw[5:14])


@pytest.mark.slow
def test_small_batches_are_remembered_for_as_long_as_bins_need() -> None:
    assert NormalizerConfig().kept(1000) == 0.95
    for batch in (2, 8, 30):
        normalizer = RatioNormalizer(NormalizerConfig())
        index = torch.arange(10).repeat(batch).reshape(-1, batch)  # every bin in turn
        for step in range(12_000 // batch):
            normalizer.update(torch.zeros(batch), (index[step % 10] + 0.5) / 10, EVEN)
        assert normalizer.count.min() > 1.8 * 64, batch  # 2 min_count in the long run
        assert normalizer.thin_message(batch, 12_000 // batch) is None
    assert NormalizerConfig(memory=0.0).kept(2) == 0  # asked for, so it stays


def test_the_warning_names_what_happens_to_thin_bins() -> None:
    default = RatioNormalizer(NormalizerConfig())
    assert default.thin_message(8, 100) is None
    assert "pooled over all bins together" in str(default.thin_message(8, 60))
    assert "not normalized" in str(default.thin_message(3, 10))
    alone = RatioNormalizer(NormalizerConfig(memory=0.0))
    assert "2.0 samples" in str(alone.thin_message(20, 1000))
    assert "own batch" in str(alone.thin_message(20, 1000))
    assert alone.thin_message(2048, 1000) is None


def test_bins_are_equally_filled_under_the_noise_distribution() -> None:
    noise, n = Karras(0.02, 80.0, 7.0), 50_000
    normalizer = RatioNormalizer(NormalizerConfig(memory=0.0))
    sigma = noise.sample(n, gen())
    normalizer.update(torch.zeros(n), noise.cdf(sigma), EVEN)
    assert ((normalizer.count - n / 10).abs() < 5 * math.sqrt(n * 0.1 * 0.9)).all()
    assert (
        sigma[normalizer.bin_of(noise.cdf(sigma)) == 0].max()
        < sigma[normalizer.bin_of(noise.cdf(sigma)) == 1].min()
    )
    assert normalizer.bin_of(torch.tensor([0.0, 0.0999, 0.1001, 0.999, 1.0])).tolist() == [0, 0, 1, 9, 9]


def test_clipping_counts_exactly_what_it_clips() -> None:
    normalizer = RatioNormalizer(NormalizerConfig(clip=3.0))
    raw = torch.tensor([-50.0, -3.5, -3.0, -1.0, 0.0, 2.0, 3.0, 3.1])
    result = normalizer.update(raw, torch.rand(8, generator=gen()), EVEN)
    assert float(result.clip_fraction) == 3 / 8
    assert torch.equal(result.log_r, raw.clamp(-3, 3))
    assert result.log_r.exp().max() <= math.exp(3.0) * (1 + 1e-6)


def test_one_wild_sample_does_not_rule_a_bin() -> None:
    normalizer = RatioNormalizer(NormalizerConfig(bins=1, memory=0.0))
    raw = torch.zeros(100)
    raw[0] = 500.0
    result = normalizer.update(raw, torch.zeros(100), EVEN)
    assert result.log_r.isfinite().all()
    assert normalizer.bin_means()[0].item() == pytest.approx((99 + math.exp(10)) / 100, rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, 7, 64, 1000])
def test_weights_of_reverse_kl_stay_exactly_one(size: int) -> None:
    normalizer, g = RatioNormalizer(NormalizerConfig()), gen()
    for _ in range(70):
        weight = normalizer.update(3 * torch.randn(size, generator=g), torch.rand(size, generator=g), EVEN)
        assert torch.equal(weight.weight, torch.ones(size))


@pytest.mark.statistical
@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("name", ["kl", "js", "hellinger"])
def test_small_batches_use_the_weight_that_is_true(name: str, batch: int) -> None:
    """The slope of the weight used on h(r) / E_q[h(r)], exact ratio; by its own batch alone 0.4 to 0.9.

    Seed 0, 24,000 samples after 6,400 of warm-up. The slope is E[1/mean] of means over 64 samples, so
    it may lie a little above one; below it, 0.95 is the bar. Its own standard error is below 0.005.
    """
    normalizer, g, weigh = RatioNormalizer(NormalizerConfig()), gen(), divergence(name).weight
    expected = weigh(log_ratio(400_000, gen(1))).mean()
    used, true = [], []
    for step in range(30_400 // batch):
        raw = log_ratio(batch, g)
        weight = normalizer.update(raw, torch.rand(batch, generator=g), weigh).weight
        if step >= 6400 // batch:
            used.append(weight)
            true.append(weigh(raw) / expected)
    covariance = torch.cov(torch.stack([torch.cat(true), torch.cat(used)]))
    assert 0.95 < float(covariance[0, 1] / covariance[0, 0]) < 1.05


def test_the_weight_does_not_depend_on_its_own_batch() -> None:
    """After warm-up a sample's weight is the same whatever else is in its batch."""
    weigh = divergence("kl").weight
    normalizer, g = RatioNormalizer(NormalizerConfig()), gen()
    for _ in range(100):
        normalizer.update(log_ratio(32, g), torch.rand(32, generator=g), weigh)
    before = {name: total.clone() for name, total in normalizer.state_dict().items()}
    raw, quantile = log_ratio(8, g), torch.rand(8, generator=g)
    whole = normalizer.update(raw, quantile, weigh).weight
    normalizer.load_state_dict(before)
    other = raw.clone()
    other[1:] = 2.5
    torch.testing.assert_close(normalizer.update(other, quantile, weigh).weight[0], whole[0])


def test_effective_sample_size() -> None:
    weight = torch.rand(50, generator=gen())
    assert float(effective_sample_size(torch.ones(50))) == pytest.approx(1, rel=1e-6)
    assert float(effective_sample_size(torch.eye(50)[3])) == pytest.approx(1 / 50, rel=1e-6)
    assert float(effective_sample_size(torch.tensor([1.0, 3.0]))) == pytest.approx(16 / 20, rel=1e-6)
    torch.testing.assert_close(effective_sample_size(7 * weight), effective_sample_size(weight))
    # 1 / (1 + Var(h) / E[h]^2): for KL between Gaussians of equal variance, h = r, that is exp(-SHIFT^2).
    exact = effective_sample_size(log_ratio(400_000, gen()).exp())
    assert float(exact) == pytest.approx(math.exp(-(SHIFT**2)), abs=0.01)


@pytest.mark.parametrize(
    "constant", [pytest.param(0.0, marks=pytest.mark.slow), -1.3, pytest.param(2.0, marks=pytest.mark.slow)]
)
def test_a_constant_logit_gives_all_divergences_the_same_weights(constant: float) -> None:
    for name in [*WEIGHTED, "reverse_kl"]:
        for rounds, expected in ((1, constant), (600, 0.0)):  # thin at first, then divided by its own mean
            normalizer = RatioNormalizer(NormalizerConfig())
            for step in range(rounds):
                quantile = torch.rand(32, generator=gen(step))
                result = normalizer.update(torch.full((32,), constant), quantile, divergence(name).weight)
            torch.testing.assert_close(result.log_r, torch.full((32,), expected), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(result.weight, torch.ones(32), rtol=1e-5, atol=1e-5)


def test_bin_means_of_weights_are_relative_and_the_state_round_trips() -> None:
    first, g, weigh = RatioNormalizer(NormalizerConfig()), gen(), divergence("js").weight
    for _ in range(5):
        first.update(log_ratio(64, g), torch.rand(64, generator=g), weigh)
    means = first.bin_means()[1]
    torch.testing.assert_close((means * first.count).sum() / first.count.sum(), torch.tensor(1.0).double())
    second = RatioNormalizer(NormalizerConfig())
    assert second.bin_means()[0].isnan().all()
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    raw, quantile = log_ratio(64, g), torch.rand(64, generator=g)
    results = [normalizer.update(raw, quantile, weigh) for normalizer in (first, second)]
    assert torch.equal(results[0].weight, results[1].weight)
    assert all(torch.equal(a, b) for a, b in zip(first.bin_means(), second.bin_means(), strict=True))


def test_where_the_logit_comes_from() -> None:
    network, formula = network_teacher(classes=3), GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
    assert choose_source("auto", network) == "teacher"
    assert choose_source("auto", formula) == "own"
    assert choose_source("fake", formula) == "fake"
    assert choose_source("own", network) == "own"
    with pytest.raises(UserError, match=r"cannot use features.*--ratio-features own"):
        choose_source("teacher", formula)
    with pytest.raises(UserError, match="has no features"):
        build_discriminator("teacher", formula, 0)
    assert isinstance(build_discriminator("own", formula, 0), RatioNet)
    head = build_discriminator("teacher", network, 3)
    assert isinstance(head, RatioHead)
    x, sigma, labels = torch.randn(6, 2, generator=gen()), torch.linspace(0.1, 9, 6), torch.arange(6) % 3
    prediction, logit = denoise_with_logit(network, head, x, sigma, as_conditioning(labels))
    assert torch.equal(prediction, network(x, sigma, labels))
    assert torch.equal(logit, torch.zeros(6))  # r = 1 before any training
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1)
    features = network(x, sigma, labels, return_features=True)[1]
    assert torch.equal(
        denoise_with_logit(network, head, x, sigma, as_conditioning(labels))[1], head(features, sigma, labels)
    )


@pytest.mark.parametrize(
    "wrong", [{"bins": 0}, {"memory": 1.0}, {"memory": -0.1}, {"min_count": 1.0}, {"clip": 0.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} must be"):
        NormalizerConfig(**wrong)  # type: ignore[arg-type]
