"""PFGM++: its noise against Student's t, the exact teacher of points, the limit D to infinity, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.seeds import initial_noise
from distmatch.data.batches import Batch
from distmatch.diffusion.denoiser import has_score
from distmatch.diffusion.guidance import CallCounter
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.pfgm import StudentTTeacher, pfgm_dims, start_noise, student_t
from distmatch.diffusion.solvers import sample_teacher
from distmatch.nets.config import MLPConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.objective import denoiser_loss
from distmatch.training.options import TeacherConfig
from distmatch.training.sampling import Sampling
from distmatch.training.teacher import TeacherTraining
from tests.helpers.draws import normal
from tests.helpers.small import distiller, network_teacher

POINTS = torch.tensor([[-1.0, 0.2], [0.5, 0.8], [0.9, -0.7]], dtype=torch.float64)


class Quiet:
    """A wrapper that says nothing of the noise of what it wraps."""

    def __init__(self, inner: object) -> None:
        self.inner = inner


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dims", [3.0, 10.0, 128.0])
def test_the_noise_is_a_multivariate_student_t(dims: float) -> None:
    n = student_t(normal(40000, 6), dims, gen(1))
    # |n|^2 / N ~ F(N, D), one coordinate ~ t(D): Kolmogorov-Smirnov, p above 1% for these seeds.
    assert stats.kstest((n.square().sum(1) / 6).numpy(), stats.f(6, dims).cdf).pvalue > 0.01
    assert stats.kstest(n[:, 0].numpy(), stats.t(dims).cdf).pvalue > 0.01
    # One chi2 a sample, not one a coordinate: squares of two coordinates are correlated.
    squares = n[:, :2].square().log()
    assert float(torch.corrcoef(squares.T)[0, 1]) > 0.5 / dims
    if dims > 4:
        fourth = 3 * dims**2 / ((dims - 2) * (dims - 4)) if dims > 4 else math.inf
        error = math.sqrt(fourth / n.numel()) * math.sqrt(6)
        assert abs(float(n.square().mean()) - dims / (dims - 2)) < 4 * error


def test_the_noise_is_that_of_the_beta_form() -> None:
    # Xu et al.: radius r sqrt(B / (1 - B)), B ~ Beta(N/2, D/2), r = sigma sqrt(D), in a random direction.
    beta = torch.from_numpy(stats.beta(3, 5).rvs(40000, random_state=0))
    radius = math.sqrt(10) * (beta / (1 - beta)).sqrt()
    ours = student_t(normal(40000, 6), 10.0, gen(1)).norm(dim=1)
    assert stats.ks_2samp(ours.numpy(), radius.numpy()).pvalue > 0.01


def test_many_dimensions_are_gaussian() -> None:
    noise = student_t(normal(20000, 2), 1e6, gen(1))
    assert stats.kstest(noise[:, 0].numpy(), stats.norm.cdf).pvalue > 0.01
    exact = GaussianMixture([1 / 3] * 3, POINTS, [0.0] * 3)
    teacher = StudentTTeacher(POINTS, 1e6)
    x, sigma = 1.5 * normal(200, 2), torch.logspace(-1, 1, 200, dtype=torch.float64)
    torch.testing.assert_close(teacher(x, sigma), exact(x, sigma), rtol=0, atol=1e-3)
    torch.testing.assert_close(teacher.log_prob(x, sigma), exact.log_prob(x, sigma), rtol=1e-3, atol=1e-3)


def test_the_density_of_points_is_a_mixture_of_student_t() -> None:
    teacher = StudentTTeacher(POINTS, 5.0)
    x = normal(50, 2)
    kernels = [stats.multivariate_t(loc=y.numpy(), shape=0.49, df=5).pdf(x.numpy()) for y in POINTS]
    expected = torch.from_numpy(sum(kernels) / 3).log()
    torch.testing.assert_close(teacher.log_prob(x, 0.7), expected, rtol=0, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(teacher.log_prob(leaf, 0.7).sum(), leaf)
    torch.testing.assert_close(teacher.score(x, 0.7), slope, rtol=0, atol=1e-12)
    # Which is not what a teacher with Gaussian noise would have.
    naive = (teacher(x, 0.7) - x) / 0.49
    assert float((naive - slope).abs().max()) > 0.1


def test_the_jacobian_is_not_the_posterior_covariance() -> None:
    x = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    found = {}
    for dims in (4.0, 1e7):
        teacher = StudentTTeacher(POINTS, dims)
        jacobian = torch.autograd.functional.jacobian(lambda v, t=teacher: t(v, 0.6)[0], x)[:, 0]
        share = teacher._log_kernels(x, 0.6)[0].softmax(1)[0]
        centered = POINTS - share @ POINTS
        covariance = (share[:, None] * centered).T @ centered / 0.36
        cosine = (jacobian * covariance).sum() / (jacobian.norm() * covariance.norm())
        found[dims] = (float(cosine), float((jacobian - jacobian.T).abs().max()))
    assert found[1e7] == pytest.approx((1.0, 0.0), abs=1e-5)
    assert found[4.0][0] < 0.995
    assert found[4.0][1] > 1e-3


def test_the_loss_is_smallest_at_the_exact_teacher() -> None:
    teacher = StudentTTeacher(POINTS, 4.0)
    x0 = POINTS[torch.randint(3, (60000,), generator=gen(2))]
    noise = student_t(normal(60000, 2), 4.0, gen(1))
    sigma = torch.full((60000,), 0.7, dtype=torch.float64)
    weight = torch.ones_like(sigma)

    def loss(denoiser: object) -> Tensor:
        return denoiser_loss(denoiser, x0, sigma, noise, weight)  # type: ignore[arg-type]

    gaussian = GaussianMixture([1 / 3] * 3, POINTS, [0.0] * 3)
    for other in (StudentTTeacher(POINTS, 40.0), gaussian):
        gain = loss(other) - loss(teacher)
        assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(60000)


@pytest.mark.parametrize("dims", [2.0, 8.0, 2048.0])
def test_the_flow_from_the_prior_finds_both_points(dims: float) -> None:
    teacher = StudentTTeacher(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), dims, sigma_max=40.0)
    x = sample_teacher(CallCounter(teacher), 1000, steps=24, seed=1)
    distance = (x[:, :1].abs() - 1).square() + x[:, 1:].square()
    assert float(distance.max()) < 1e-3
    assert abs(int((x[:, 0] > 0).sum()) - 500) < 4 * math.sqrt(250)


def test_the_start_of_a_sample_does_not_depend_on_the_batch() -> None:
    teacher = StudentTTeacher(POINTS, 3.0)
    many, few = (start_noise(teacher, initial_noise(n, (2,), 7), 7) for n in (500, 20))
    assert torch.equal(many[:20], few)
    assert not torch.equal(few, initial_noise(20, (2,), 7))
    plain = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
    assert torch.equal(start_noise(plain, initial_noise(20, (2,), 7), 7), initial_noise(20, (2,), 7))
    assert pfgm_dims(CallCounter(teacher)) == 3.0
    with pytest.raises(UserError, match="the solver ddim:1, which adds Gaussian noise"):
        Sampling(solver="ddim:1").check(teacher)


def test_training_draws_this_noise_and_the_teacher_says_so() -> None:
    config = TeacherConfig(lr=3e-3, lr_rampup=20, ema_half_life=20.0, pfgm_dims=3.0)
    training = TeacherTraining(config, MLPConfig(width=32, depth=2), (2,), 0, 0.75, 300, torch.device("cpu"))
    state = training.init(0)
    seen: list[Tensor] = []
    state.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    training.step(state, Batch(torch.zeros(4096, 2)))
    before = torch.Generator().manual_seed(training.init(0).generator.initial_seed())
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(4096, generator=before))
    ratio = (seen[0] / sigma[:, None]).square().sum(1) / 2
    assert stats.kstest(ratio.numpy(), stats.f(2, 3).cdf).pvalue > 0.01
    assert not has_score(state.denoiser)
    assert not has_score(state.ema.module)


def test_what_needs_a_score_is_refused() -> None:
    plain = network_teacher()
    ends = {"sigma_data": 0.7, "sigma_max": 20.0}
    teacher = EDMDenoiser(plain.net, shape=(2,), num_classes=0, pfgm_dims=128.0, **ends)
    assert has_score(plain)
    assert not has_score(CallCounter(teacher))
    assert not has_score(Quiet(teacher))  # type: ignore[arg-type]
    assert has_score(Quiet(plain))  # type: ignore[arg-type]
    assert pfgm_dims(Quiet(teacher)) == 128.0  # type: ignore[arg-type]
    for model in (teacher, StudentTTeacher(POINTS, 8.0)):
        with pytest.raises(UserError, match="score difference needs the score"):
            distiller(model)
        with pytest.raises(UserError, match="adds Gaussian noise"):
            sample_teacher(model, 4, solver="ddim:1.0")
    for dims in (0.0, -1.0, math.inf):
        with pytest.raises(UserError, match="extra dimensions"):
            StudentTTeacher(POINTS, dims)
    with pytest.raises(UserError, match="extra dimensions"):
        EDMDenoiser(plain.net, shape=(2,), num_classes=0, pfgm_dims=math.inf)
