"""Training on data that are not what they should be: frozen noise, instance noise, noise on the labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distmatch.data import from_arrays
from distmatch.data.batches import Batch, Batches
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.losses import noisy_mean
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, UNetConfig
from distmatch.nets.layers import ConditionEmbedding, Perturbation
from distmatch.training.noisy_data import with_frozen_noise
from distmatch.training.objective import denoiser_loss
from distmatch.training.options import RunOptions, TeacherConfig, TrainOptions
from distmatch.training.prepare_teacher import prepare_training
from distmatch.training.teacher import TeacherTraining

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.2], [0.6, -0.4]], [[0.04, 0.3], [0.2, 0.05]])
NET = MLPConfig(width=32, depth=2)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def training(classes: int = 0, **settings: object) -> TeacherTraining:
    config = TeacherConfig(lr=3e-3, lr_rampup=20, ema_half_life=20.0, **settings)
    return TeacherTraining(config, NET, (2,), classes, 0.6, 300, torch.device("cpu"))


# ------------------------------------------------------------------ ambient


def test_the_mean_of_the_noisy_sample_on_a_mixture() -> None:
    # p(y) is the mixture noised to s, so its own denoiser, from s to sigma, is E[y | x].
    s, x = 0.4, torch.randn(200, 2, generator=gen(), dtype=torch.float64)
    sigma = torch.linspace(0.41, 3.0, 200, dtype=torch.float64)
    level = torch.full_like(sigma, s)
    blurred = GaussianMixture(
        MIXTURE.weights, MIXTURE.means, MIXTURE.covariances + s**2 * torch.eye(2, dtype=torch.float64)
    )
    expected = blurred(x, (sigma**2 - s**2).sqrt())
    torch.testing.assert_close(noisy_mean(MIXTURE(x, sigma), x, sigma, level), expected, rtol=0, atol=1e-12)


def test_clean_samples_have_the_loss_of_edm_to_the_bit() -> None:
    state = training().init(0)
    with torch.no_grad():
        state.denoiser.net.last.weight.normal_(generator=gen(1))
    x0, noise = torch.randn(2, 512, 2, generator=gen())
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(512, generator=gen(2)))
    weight = (sigma**2 + 0.36) / (sigma * 0.6) ** 2
    ambient = denoiser_loss(state.denoiser, x0, sigma, noise, weight, data_noise=torch.zeros(512))
    assert torch.equal(ambient, denoiser_loss(state.denoiser, x0, sigma, noise, weight))


def test_noisy_samples_give_the_clean_loss_with_a_smaller_weight() -> None:
    # E|E[y|x] - y|^2 = (1 - s^2/sigma^2)^2 E|D - x0|^2 + what no D changes: compare two denoisers.
    n, s, sigma = 400000, 0.3, 0.5
    x0 = MIXTURE.sample(n, seed=1).double()
    first, second = torch.randn(2, n, 2, generator=gen(), dtype=torch.float64)
    level, weight = torch.full((n,), sigma, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    noisy = torch.full_like(level, s)

    def worse(x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return MIXTURE(x, sigma) + 0.1 * x

    gaps = []
    for start, share in ((x0 + s * first, noisy), (x0, None)):
        loss = [
            denoiser_loss(d, start, level, second, weight, data_noise=share)  # type: ignore[arg-type]
            for d in (worse, MIXTURE)
        ]
        gaps.append((loss[0] - loss[1]).double())
    ratio = float(gaps[0].mean() / gaps[1].mean())
    error = math.hypot(*(float(g.std() / g.mean()) / math.sqrt(n) for g in gaps))
    assert abs(ratio / (1 - s**2 / sigma**2) ** 2 - 1) < 4 * error
    assert error < 0.1
    # At sigma = s a sample teaches nothing.
    at = denoiser_loss(worse, x0, noisy, second, weight, data_noise=noisy)  # type: ignore[arg-type]
    assert float(at.abs().max()) < 1e-20


@pytest.mark.statistical
def test_clean_and_noisy_samples_together_recover_the_covariance() -> None:
    # A linear denoiser x -> A_sigma x fitted at one level by least squares on both kinds of samples, each
    # with its own regression, is S (S + sigma^2)^-1 of the clean data, and S follows.
    n, s, sigma = 200000, 0.5, 0.9
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    root = torch.linalg.cholesky(covariance)
    x0, first, fresh = torch.randn(3, n, 2, generator=gen(), dtype=torch.float64)
    levels = torch.where(torch.arange(n) < n // 10, 0.0, s).double()
    y = x0 @ root.T + levels[:, None] * first
    matrix = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    sigma_all, weight = torch.full((n,), sigma, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([matrix], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        denoiser = lambda x, sigma, conditioning=None: x @ matrix.T  # noqa: E731
        loss = denoiser_loss(denoiser, y, sigma_all, fresh, weight, data_noise=levels).mean()  # type: ignore[arg-type]
        loss.backward()
        return loss

    optimizer.step(closure)
    found = matrix.detach()
    eye = torch.eye(2, dtype=torch.float64)
    recovered = sigma**2 * torch.linalg.solve(eye - found, found)
    torch.testing.assert_close(recovered, covariance, rtol=0, atol=0.02)  # about 5 standard errors at n
    blurred = torch.cov(y.T)  # what treating all as clean would have found
    assert float((blurred - covariance).abs().max()) > 0.2


def test_the_noise_in_the_data_is_frozen() -> None:
    data = from_arrays(MIXTURE.sample(300, seed=3).numpy())
    noisy, levels = with_frozen_noise(data, 0.3, 0.25, seed=5)
    assert int((levels == 0).sum()) == 75
    everything = torch.arange(300)
    clean, _ = data.batch(everything)
    found, _ = noisy.batch(everything)
    assert torch.allclose(found[levels == 0], clean[levels == 0], atol=1e-6)
    spread = float((found - clean)[levels > 0].std())
    assert abs(spread - 0.3) < 4 * 0.3 / math.sqrt(2 * 450)
    batches = Batches(noisy, 300, 0, noise=levels)
    order = [batches(step) for step in (0, 1)]  # two epochs
    rows = [b.x[b.x[:, 0].argsort()] for b in order]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(order[0].noise, levels[batches._order.indices(0)])


def test_a_teacher_prepared_for_noisy_data() -> None:
    data = from_arrays(MIXTURE.sample(512, seed=3).numpy())
    run = RunOptions(steps=2, batch=64, device="cpu")
    config = TeacherConfig(ambient_noise=0.2)
    job = prepare_training(TrainOptions(run=run, teacher=config), data)
    assert job.notes["sigma_data"] == pytest.approx(data.std())
    seen: list[Tensor] = []
    job.state.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    batch = job.batches(0)
    job.step(job.state, batch)
    assert bool((seen[0] >= batch.noise).all())
    assert 0 < int((batch.noise == 0).sum()) < 64
    given = TeacherConfig(ambient_noise=0.2, ambient_given=True)
    job = prepare_training(TrainOptions(run=run, teacher=given), data)
    assert job.notes["sigma_data"] == pytest.approx(math.sqrt(data.std() ** 2 - 0.04))
    assert torch.equal(job.batches(0).noise, torch.full((64,), 0.2))
    plain = prepare_training(TrainOptions(run=run), data)
    assert plain.batches(0).noise is None
    assert torch.equal(plain.batches(0).x, job.batches(0).x)


# ------------------------------------------------------------------ instance noise


def test_instance_noise_teaches_the_blurred_data() -> None:
    # Data on a line: (z, 0), z ~ N(0, 0.6^2). With instance noise 0.3 the law is N(0, diag(.45, .09)).
    method = training(instance_noise=0.3, label_dropout=0.0)
    assert method.objective.sigma_data == pytest.approx(math.hypot(0.6, 0.3))
    state = method.init(0)
    for step in range(300):
        z = 0.6 * torch.randn(256, 1, generator=gen(step))
        method.step(state, Batch(torch.cat([z, torch.zeros_like(z)], 1), None))
    exact = GaussianMixture([1.0], [[0.0, 0.0]], [[0.45, 0.09]])
    sigma = torch.logspace(-1, 0.7, 1024)
    x = exact.sample(1024, seed=1) + sigma[:, None] * torch.randn(1024, 2, generator=gen(7))
    with torch.no_grad():
        error = (state.ema.module(x, sigma) - exact(x, sigma)).square().mean(1) / sigma**2
        sharp = GaussianMixture([1.0], [[0.0, 0.0]], [[0.36, 0.0]])
        other = (sharp(x, sigma) - exact(x, sigma)).square().mean(1) / sigma**2
    assert float(error.mean()) < 0.01 < 0.1 * float(other.mean())


# ------------------------------------------------------------------ noise on the labels (CEP)


@pytest.mark.parametrize(("kind", "share"), [("uniform", 1 / 3), ("gaussian", 1.0)])
@pytest.mark.parametrize("width", [16, 256])
def test_label_noise_has_mean_zero_and_a_norm_without_the_dimension(
    kind: str, share: float, width: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        delta = Perturbation(2.0, kind).like(torch.zeros(200000 // width, width))
    assert abs(float(delta.mean())) < 4 * 2 * math.sqrt(share / width / delta.numel())
    assert float(delta.var()) * width / (4 * share) == pytest.approx(1, abs=0.03)
    if kind == "uniform":
        assert float(delta.abs().max()) <= 2 / math.sqrt(width)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MLPConfig(width=16, depth=1), (2,)),
        (UNetConfig(width=8, multipliers=(1, 2), blocks=1), (1, 8, 8)),
        (DiTConfig(width=12, depth=1, heads=3), (1, 8, 8)),
    ],
)
def test_label_noise_is_off_at_evaluation_and_for_no_label(config: object, shape: tuple[int, ...]) -> None:
    net = build_net(config, shape, 3)  # type: ignore[arg-type]
    found = [part for part in net.modules() if isinstance(part, ConditionEmbedding)]
    assert len(found) == 1
    conditioning = found[0]
    c_noise, labels = torch.zeros(4), torch.tensor([0, 2, -1, -1])
    plain = conditioning(c_noise, labels)
    conditioning.perturbation = Perturbation(1.0)
    net.train()
    noisy = conditioning(c_noise, labels)
    assert bool(((noisy - plain)[:2].abs().amax(1) > 1e-4).all())
    assert torch.equal(noisy[2:], plain[2:])
    assert torch.equal(conditioning(c_noise, None), conditioning(c_noise, None))
    net.eval()
    assert torch.equal(conditioning(c_noise, labels), plain)


def test_label_noise_of_zero_is_no_label_noise() -> None:
    def losses(**settings: object) -> list[float]:
        method = training(classes=3, **settings)
        state = method.init(0)
        labels = torch.arange(64) % 3
        batch = Batch(torch.randn(64, 2, generator=gen()), labels)
        return [float(method.step(state, batch)["loss"]) for _ in range(8)]

    for kind in ("uniform", "gaussian"):  # so little that it is 0 in float32
        assert losses() == losses(condition_noise=1e-300, condition_noise_kind=kind)
    noisy = losses(condition_noise=1.0)
    torch.rand(3)  # the global stream does not matter
    assert noisy == losses(condition_noise=1.0)
    assert noisy != losses()
