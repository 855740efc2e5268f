"""Likelihoods and the Ito density estimator against closed forms. Seeds are fixed; float64 throughout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.diffusion.geometry.jacobian import denoise_with_trace, denoiser_jacobian, draw_probes
from distmatch.diffusion.likelihood import class_log_likelihoods, dequantize, log_likelihood
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.priors import gaussian_prior, moment_prior


def random_mixture(dim: int, classes: list[int] | None = None, seed: int = 0) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    roots = 0.3 * torch.randn(3, dim, dim, generator=g, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.05 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture([0.2, 0.5, 0.3], torch.randn(3, dim, generator=g).double(), covariances, classes)


def noised(teacher: GaussianMixture, n: int, sigma: float) -> Tensor:
    g = torch.Generator().manual_seed(1)
    clean = teacher.sample(n).double()
    return clean + sigma * torch.randn(clean.shape, generator=g, dtype=torch.float64)


class UniformCube:
    """The exact denoiser of the uniform law on [-1, 1]^d: means of truncated normals."""

    num_classes, sigma_data, sigma_min, sigma_max = 0, 1 / math.sqrt(3), 0.01, 80.0

    def __init__(self, dim: int) -> None:
        self.shape = (dim,)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        level = expand(sigma, x)
        low, high = (-1 - x) / level, (1 - x) / level
        normal = torch.distributions.Normal(torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype))
        # Differences of tails on the side where both are small keep their digits.
        mirror = low > 0
        a, b = torch.where(mirror, -high, low), torch.where(mirror, -low, high)
        mass = torch.special.ndtr(b) - torch.special.ndtr(a)
        return x + level * (normal.log_prob(low).exp() - normal.log_prob(high).exp()) / mass

    def log_prob(self, x: Tensor, sigma: float) -> Tensor:
        mass = torch.special.ndtr((1 - x) / sigma) - torch.special.ndtr((-1 - x) / sigma)
        return (mass / 2).log().sum(1)


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_the_exact_trace_and_jacobian_are_those_of_the_posterior_covariance(dim: int) -> None:
    teacher = random_mixture(dim)
    y = noised(teacher, 20, 0.5)
    sigma = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    expected = teacher.posterior_covariance(y, sigma) / sigma[:, None, None] ** 2
    denoised, trace = denoise_with_trace(teacher, y, sigma, chunk=3)
    assert not trace.requires_grad
    torch.testing.assert_close(denoised, teacher(y, sigma), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace[:, 0], expected.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-9, atol=1e-9)
    jacobian = denoiser_jacobian(teacher, y, sigma, chunk=3)[1]
    torch.testing.assert_close(jacobian, expected, rtol=1e-9, atol=1e-9)


def test_jacobian_rows_are_outputs_and_columns_inputs() -> None:
    matrix = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64)

    def linear(x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        return x @ matrix.T

    jacobian = denoiser_jacobian(linear, torch.zeros(1, 2, dtype=torch.float64), torch.ones(1))[1]  # type: ignore[arg-type]
    torch.testing.assert_close(jacobian[0], matrix)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_are_unbiased_with_the_stated_variance(kind: str) -> None:
    teacher = random_mixture(4)
    y, sigma = noised(teacher, 1, 0.5), torch.full((1,), 0.5, dtype=torch.float64)
    jacobian = denoiser_jacobian(teacher, y, sigma)[1][0]
    probes = draw_probes(kind, 40_000, 1, (4,), seed=0, like=y)
    values = denoise_with_trace(teacher, y, sigma, probes=probes, chunk=40_000)[1][0]
    off = jacobian - torch.diag(jacobian.diagonal()) if kind == "rademacher" else jacobian
    variance = 2 * float(off.square().sum())
    assert abs(float(values.mean() - jacobian.trace())) < 4 * math.sqrt(variance / 40_000)
    # The variance of a variance is (kurtosis - 1) / n; a kurtosis of up to 12 gives 1.7 %: four of them.
    assert float(values.var()) == pytest.approx(variance, rel=0.07)


def test_probes_of_a_sample_do_not_depend_on_its_batch() -> None:
    like = torch.zeros(1)
    whole = draw_probes("gaussian", 3, 150, (2, 5), seed=4, like=like)
    part = draw_probes("gaussian", 3, 90, (2, 5), seed=4, first=60, like=like)
    torch.testing.assert_close(whole[:, 60:], part, rtol=0, atol=0)
    assert set(draw_probes("rademacher", 2, 5, (3,), seed=0, like=like).unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("solver", ["rk4:192", "rk5:80", "dop853:1e-9", "rk45:1e-8"])
@pytest.mark.parametrize("dim", [2, 8])
def test_log_likelihood_is_the_closed_form_on_a_mixture(dim: int, solver: str) -> None:
    teacher = random_mixture(dim)
    x = noised(teacher, 16, 0.02)
    exact = log_likelihood(
        teacher,
        x,
        sigma=0.02,
        solver=solver,
        prior=lambda y, _: teacher.log_prob(y, 80.0),
    )
    assert float((exact.log_prob - teacher.log_prob(x, 0.02)).abs().max()) < 1e-5
    assert float(exact.prior_gap.max()) < 1e-8
    assert exact.stderr.count_nonzero() == 0
    assert exact.vjps == dim * exact.calls


def test_latents_lie_where_the_flow_leads_and_map_the_density() -> None:
    teacher = GaussianMixture([1.0], [[0.4, -1.0]], [[0.3, 0.05]])
    x = noised(teacher, 8, 0.1)
    result = log_likelihood(teacher, x, sigma=0.1, solver="rk5:128")
    scale = (
        (teacher.covariances[0].diagonal() + 80.0**2) / (teacher.covariances[0].diagonal() + 0.01)
    ).sqrt()
    expected = teacher.means[0] + scale * (x - teacher.means[0])
    torch.testing.assert_close(result.latents, expected, rtol=1e-8, atol=1e-8)


def test_standard_normal_data_do_not_move_and_cost_no_accuracy() -> None:
    teacher = GaussianMixture([1.0], [[0.0, 0.0, 0.0]], [1.0])
    x = noised(teacher, 10, 0.5)
    result = log_likelihood(teacher, x, sigma=0.5, solver="rk4:1")
    torch.testing.assert_close(result.log_prob, teacher.log_prob(x, 0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_default_prior_states_its_error_and_moments_shrink_it() -> None:
    teacher = random_mixture(4)
    x = noised(teacher, 8, 0.05)
    truth = teacher.log_prob(x, 0.05)
    errors = {}
    for prior in ("sampler", "data", "moments"):
        result = log_likelihood(teacher, x, sigma=0.05, solver="rk5:64", prior=prior)
        error = (result.log_prob - truth).abs()
        # r = log(law / prior) is within a constant a polynomial of degree 1 to 3, so |y . grad r| bounds it.
        assert float(error.mean()) < 1.1 * float(result.prior_gap.mean()) + 1e-4
        errors[prior] = float(error.max())
    assert errors["moments"] < 1e-4 < errors["data"] < 0.1
    far = log_likelihood(teacher, x, sigma=0.05, sigma_max=8000.0, solver="rk5:128", prior="moments")
    assert float((far.log_prob - truth).abs().max()) < 1e-5


def test_moments_are_exact_for_gaussian_data_whatever_the_class() -> None:
    roots = torch.tensor([[[1.0, 0.0], [0.5, 0.3]], [[0.2, 0.0], [-0.4, 0.7]]], dtype=torch.float64)
    teacher = GaussianMixture([0.4, 0.6], [[2.0, 0.0], [-1.0, 1.0]], roots @ roots.mT, [0, 1])
    y = 10 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12) % 2
    value = moment_prior(teacher, 10.0)(y, labels)
    # The fixed point is off by the sixth power of spread / sigma = 0.15.
    torch.testing.assert_close(value, teacher.log_prob(y, 10.0, labels), rtol=0, atol=1e-4)


def test_the_sampler_prior_gives_the_density_of_the_generator() -> None:
    teacher = GaussianMixture([1.0], [[0.0]], [0.25], sigma_max=1.0)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    result = log_likelihood(teacher, x, sigma=0.05, solver="rk5:64", prior="sampler")
    # The flow scales by sqrt((0.25 + 0.05^2) / (0.25 + 1)), so N(0, 1) becomes a normal of that variance.
    truth = gaussian_prior((0.25 + 0.05**2) / 1.25)(x)
    torch.testing.assert_close(result.log_prob, truth, rtol=0, atol=1e-9)


@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_likelihoods_agree_within_their_standard_errors(kind: str) -> None:
    teacher = random_mixture(3)
    x = noised(teacher, 2, 0.1)
    result = log_likelihood(
        teacher,
        x,
        sigma=0.1,
        sigma_max=5.0,
        trace=f"{kind}:4096",
        solver="rk5:12",
        chunk=4096,
        prior=lambda y, _: teacher.log_prob(y, 5.0),
    )
    error = (result.log_prob - teacher.log_prob(x, 0.1)).abs()
    assert bool((result.stderr > 1e-3).all())
    assert bool((error < 4 * result.stderr + 1e-4).all())
    assert result.vjps == 4096 * 72


def test_batches_change_nothing_but_the_work() -> None:
    teacher = random_mixture(2)
    x = noised(teacher, 10, 0.1)
    options = {"sigma": 0.1, "solver": "rk5:16", "trace": "rademacher:2", "seed": 3}
    whole = log_likelihood(teacher, x, **options)  # type: ignore[arg-type]
    parts = log_likelihood(teacher, x, batch=3, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(whole.log_prob, parts.log_prob, rtol=1e-12, atol=1e-12)
    assert math.isnan(float(log_likelihood(teacher, x, sigma=0.1, trace="rademacher").stderr[0]))


def test_an_outlier_in_a_large_batch_is_integrated_as_well_as_alone() -> None:
    teacher = GaussianMixture([0.5, 0.5], [[-3.0], [3.0]], [1e-4, 1e-4])
    x = torch.cat([torch.full((255, 1), 3.0), torch.tensor([[0.02]])]).double()
    errors = []
    for part in (x[-1:], x):
        result = log_likelihood(
            teacher, part, sigma=0.5, solver="rk45:1e-4", prior=lambda y, _: teacher.log_prob(y, 80.0)
        )
        errors.append(abs(float(result.log_prob[-1] - teacher.log_prob(x, 0.5)[-1])))
    alone, together = errors
    assert 0 < together < 1.5 * alone < 0.02


def test_class_likelihoods_are_conditional_and_classify() -> None:
    teacher = random_mixture(2, [0, 1, 1])
    x = noised(teacher, 12, 0.1)
    table = class_log_likelihoods(teacher, x, sigma=0.1, prior="moments", solver="rk5:48")
    for c in range(2):
        truth = teacher.log_prob(x, 0.1, torch.full((12,), c))
        assert float((table[:, c] - truth).abs().max()) < 1e-3  # the prior's error, third cumulant over 80^3
    with pytest.raises(UserError, match="no classes"):
        class_log_likelihoods(random_mixture(2), x)


def test_uniform_bytes_cost_eight_bits() -> None:
    cube = UniformCube(3)
    levels = torch.randint(10, 246, (24, 3), generator=torch.Generator().manual_seed(0))
    x = (dequantize(levels) + 0.5) / 128 - 1  # bytes 0..255 fill [-1, 1]: 128 raw units in one of the model
    ideal = log_likelihood(cube, x, sigma=0.01, solver="rk5:128", prior="moments")
    torch.testing.assert_close(ideal.log_prob, cube.log_prob(x, 0.01), rtol=0, atol=1e-4)
    bits = ideal.bits_per_dim(128.0)
    assert bits.value == pytest.approx(8, abs=1e-4)
    raw = ideal.bits_per_dim(127.5)
    assert raw.value == pytest.approx(bits.value + math.log2(127.5 / 128), abs=1e-9)
    columns = ideal.bits_per_dim([128.0, 64.0, 256.0])
    assert columns.value == pytest.approx(bits.value, abs=1e-9)


def test_dequantized_integers_stay_in_their_cell() -> None:
    levels = torch.arange(256).repeat(50).to(torch.uint8)
    noise = dequantize(levels, seed=1) - levels.double()
    assert float(noise.min()) >= -0.5
    assert float(noise.max()) < 0.5
    assert abs(float(noise.mean())) < 4 / math.sqrt(12 * len(levels))
    with pytest.raises(UserError, match="integers"):
        dequantize(levels.float())


def test_float32_networks_keep_their_dtype() -> None:
    teacher = random_mixture(2)
    x = noised(teacher, 6, 0.1)
    seen = set()

    class Spy:
        shape, num_classes, sigma_data, sigma_min, sigma_max = (2,), 0, teacher.sigma_data, 0.002, 80.0

        def __call__(self, y: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
            seen.update({y.dtype, sigma.dtype})
            return teacher(y, sigma, conditioning)

    for solver in ("rk5:64", "dop853:1e-5"):
        single = log_likelihood(Spy(), x.float(), sigma=0.1, solver=solver, prior="moments")
        assert single.log_prob.dtype == torch.float64
        assert float((single.log_prob - teacher.log_prob(x, 0.1)).abs().max()) < 2e-3
    assert seen == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": "hutchinson"}, "unknown trace"),
        ({"trace": "exact:3"}, "no probes"),
        ({"trace": "rademacher:0"}, "positive whole"),
        ({"solver": "euler"}, "unknown solver"),
        ({"solver": "rk5:x"}, "number of steps"),
        ({"solver": "dop853:2"}, "between 0 and 1"),
        ({"prior": "uniform"}, "unknown prior"),
        ({"sigma": 90.0}, "0 < sigma"),
        ({"conditioning": torch.zeros(3, dtype=torch.int64)}, "one condition"),
    ],
)
def test_mistakes_are_explained(options: dict[str, object], message: str) -> None:
    teacher = random_mixture(2)
    with pytest.raises(UserError, match=message):
        log_likelihood(teacher, torch.zeros(2, 2, dtype=torch.float64), **options)  # type: ignore[arg-type]


def test_models_that_cannot_be_differentiated_are_refused() -> None:
    class Frozen(GaussianMixture):
        @torch.no_grad()
        def forward(self, x: Tensor, sigma: Tensor | float, conditioning: Tensor | None = None) -> Tensor:
            return super().forward(x, sigma, conditioning)

    x = torch.zeros(1, 2, dtype=torch.float64)
    teacher = Frozen([1.0], [[0.0, 0.0]], [1.0])
    with pytest.raises(UserError, match="differentiated"):
        log_likelihood(teacher, x)
    noisy = random_mixture(2)
    noisy.add_module("drop", nn.Dropout(0.1))
    with pytest.raises(UserError, match="eval"):
        log_likelihood(noisy, x)
    log_likelihood(noisy.eval(), x, solver="rk4:1")
    with pytest.raises(UserError, match="samples of this model"):
        log_likelihood(noisy, torch.zeros(1, 3))
    with pytest.raises(UserError, match="samples are not finite"):
        log_likelihood(noisy, torch.full_like(x, math.nan))
    with pytest.raises(UserError, match="batch must be"):
        log_likelihood(noisy, x, batch=0)
    twisted = random_mixture(2)
    twisted.gaussian_kernel = False  # type: ignore[assignment]
    with pytest.raises(UserError, match="not Gaussian"):
        log_likelihood(twisted, x)
    result = log_likelihood(twisted, x, solver="rk4:1", prior=gaussian_prior(6400.0))
    assert math.isnan(float(result.prior_gap[0]))


def test_the_mixture_is_a_denoiser_here_too() -> None:
    assert isinstance(UniformCube(2), Denoiser)
