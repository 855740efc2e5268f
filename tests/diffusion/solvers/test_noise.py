"""Noise that belongs to samples, and the laws that stochastic solvers end in. Seeds are fixed."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise, philox
from distmatch.diffusion.paths import noise_path
from distmatch.diffusion.solvers import (
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    Solver,
    find_solver,
    grid,
    sample_teacher,
    solve,
)
from tests.reference.solver_cases import DETERMINISTIC, STOCHASTIC, Normal


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of the generator's authors, for philox4x32-10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = tuple(torch.tensor([word]) for word in counter)
    assert [int(word) for word in philox(words, (key[0], key[1]))] == expected


def test_the_noise_is_unit_normal_and_independent() -> None:
    noise = SampleNoise(0, torch.arange(2000), (5, 7))
    z = noise.normal(3)
    assert z.shape == (2000, 5, 7)
    assert z.dtype == torch.float64
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    several = [z, noise.normal(4), noise.normal(3, 1), SampleNoise(1, torch.arange(2000), (5, 7)).normal(3)]
    several += [SampleNoise(0, torch.arange(2000, 4000), (5, 7)).normal(3), z.roll(1, 0), z.roll(1, 2)]
    several.append(SampleNoise(0, torch.arange(2000) + 2**33, (5, 7)).normal(3))
    together = torch.stack([v.flatten() for v in several])
    off = together.corrcoef() - torch.eye(len(several))
    assert float(off.abs().max()) < 4.5 / math.sqrt(z.numel())  # 28 pairs of independent samples
    squares = (together**2).corrcoef() - torch.eye(len(several))  # normals of one pair share their radius
    assert float(squares.abs().max()) < 4.5 / math.sqrt(z.numel())


def test_the_noise_of_a_sample_knows_nothing_of_its_batch() -> None:
    whole = SampleNoise(7, torch.arange(101), (3, 5)).normal(2)
    for chosen in ([0], [100, 3, 3, 57], list(range(40, 77))):
        assert torch.equal(SampleNoise(7, chosen, (3, 5)).normal(2), whole[chosen])
    assert torch.equal(
        SampleNoise(7, [5], (3, 5)).after(1).after(3).normal(2), SampleNoise(7, [5], (3, 5)).normal(6)
    )
    assert torch.equal(
        SampleNoise(7, [5], (3, 5)).normal(2)[0, 0], SampleNoise(7, [5], (1, 5)).normal(2)[0, 0]
    )
    assert SampleNoise(0, [], (2,)).normal(0).shape == (0, 2)


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_batches_do_not_change_a_sample_in_any_bit(name: str) -> None:
    levels, n = grid("karras", 7, 0.05, 10.0), 37
    y = 10 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    indices = torch.arange(n)
    whole = solve(Normal(), y, levels, name, noise=SampleNoise(3, indices, (2,)), path="vp").y
    for part in (indices[:5], indices[5:], indices.flip(0)[::3]):
        alone = solve(Normal(), y[part], levels, name, noise=SampleNoise(3, part, (2,)), path="vp").y
        assert torch.equal(alone, whole[part])
    other = solve(Normal(), y, levels, name, noise=SampleNoise(4, indices, (2,)), path="vp").y
    assert torch.equal(other, whole) == (name in DETERMINISTIC)


def test_teacher_samples_of_a_stochastic_solver_do_not_depend_on_the_batch() -> None:
    whole = sample_teacher(Normal(), 50, steps=6, solver="ddim:1", seed=2)
    assert torch.equal(sample_teacher(Normal(), 50, steps=6, solver="ddim:1", seed=2, batch=7), whole)
    ended = sample_teacher(Normal(), 9, solver="heun", grid=[80.0, 1.0, 0.1])
    assert ended.shape == (9, 2)


def test_ddim_with_eta_one_is_the_posterior_of_ddpm() -> None:
    teacher = GaussianMixture([0.3, 0.7], [[-1.0], [0.8]], [0.04, 0.09])
    path = noise_path("vp")
    t = torch.linspace(0.95, 0.02, 12, dtype=torch.float64)
    bar = path.alpha(t) ** 2
    noise = SampleNoise(0, torch.arange(40), (1,))
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = x / bar[0].sqrt()
    for k in range(11):
        now, after = bar[k], bar[k + 1]
        beta = 1 - now / after
        clean = teacher(x / now.sqrt(), ((1 - now) / now).sqrt())
        mean = (after.sqrt() * beta * clean + (now / after).sqrt() * (1 - after) * x) / (1 - now)
        x = mean + (beta * (1 - after) / (1 - now)).sqrt() * noise.normal(k)
    levels = ((1 - bar) / bar).sqrt()
    ours = solve(teacher, start, levels, "ddim:1", noise=noise).y
    torch.testing.assert_close(ours * bar[-1].sqrt(), x, rtol=1e-11, atol=1e-11)
    same = solve(teacher, start, levels, "dpmpp-sde", noise=noise).y  # order 1 is the same step
    torch.testing.assert_close(same, ours, rtol=1e-11, atol=1e-11)


class Impulses(SampleNoise):
    """Sample 0 has no noise, sample j + 1 a unit impulse as the j-th draw of the run."""

    def normal(self, step: int, draw: int = 0) -> Tensor:
        impulse = torch.zeros(len(self), 1, dtype=torch.float64)
        impulse[1 + 4 * step + draw] = 1
        return impulse


VARIANCE, MEAN = 0.3, 0.4
GAUSSIAN = GaussianMixture([1.0], [[MEAN]], [VARIANCE])


def law(solver: Solver, levels: Tensor) -> tuple[float, float]:
    """Mean and variance at the last level, without sampling error: the solver is linear on Gaussian data."""
    n = 2 + 4 * (len(levels) - 1)
    y = torch.zeros(n, 1, dtype=torch.float64)
    y[-1] = 1.0
    out = solve(GAUSSIAN, y, levels, solver, noise=Impulses(0, torch.arange(n), (1,))).y[:, 0]
    response = out[1:] - out[0]
    spread = response[:-1].square().sum() + response[-1] ** 2 * (VARIANCE + levels[0] ** 2)
    return float(out[0] + response[-1] * MEAN), float(spread)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (find_solver("ddim:0.5"), 1),
        (find_solver("ddim:1"), 1),
        (find_solver("dpmpp-sde"), 1),
        (find_solver("dpmpp-2m-sde"), 2),
        (find_solver("euler-maruyama"), 1),
        (EulerMaruyama(lambda sigma: 1 / (1 + sigma)), 1),
        (find_solver("reverse-diffusion"), 1),
        (find_solver("pc:0.1"), 0),
        (PredictorCorrector(0.1, 2, predictor=Heun()), 0),
    ],
)
def test_the_law_of_gaussian_data_is_reached_as_steps_grow(solver: Solver, order: int) -> None:
    end, wrong = 0.02, []
    for n in (200, 400):
        levels = grid("karras", n, end, 20.0, to_zero=False)
        mean, variance = law(solver, levels)
        wrong.append(abs(variance - VARIANCE - end**2))
        assert abs(mean - MEAN) < 0.02
        assert wrong[-1] < 0.05 * VARIANCE
    if order:
        assert abs(math.log2(wrong[0] / wrong[1]) - order) < 0.15, wrong
    else:  # the corrector adds an error of its own, which falls with the level and not with the steps
        assert wrong[1] < 0.01 * VARIANCE


def test_churn_reaches_the_law_with_second_order_and_less_noise_than_it_needs_does_not() -> None:
    wrong = []
    for n in (100, 200, 400):
        levels = grid("karras", n, 0.02, 20.0, to_zero=False)
        wrong.append(abs(law(Heun(s_churn=30.0, s_max=10.0), levels)[1] - VARIANCE - 0.02**2))
    assert wrong[0] > wrong[1] > wrong[2]
    assert wrong[2] < 1e-3 * VARIANCE
    levels = grid("karras", 400, 0.02, 20.0, to_zero=False)
    assert abs(law(Heun(30.0, s_max=10.0, s_noise=0.9), levels)[1] - VARIANCE) > 20 * wrong[2]


def test_a_churned_step_is_algorithm_2_of_edm() -> None:
    levels, noise = [5.0, 2.0, 0.5, 0.0], SampleNoise(1, torch.arange(20), (1,))
    y = 5 * torch.randn(20, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = y
    for k, (now, after) in enumerate(pairwise(levels)):
        gamma = min(0.9 / 3, math.sqrt(2) - 1) if 0.6 <= now <= 4 else 0
        raised = now + gamma * now
        x = x + math.sqrt(raised**2 - now**2) * 1.1 * noise.normal(k)
        d = (x - GAUSSIAN(x, raised)) / raised
        ahead = x + (after - raised) * d
        if after > 0:
            d = (d + (ahead - GAUSSIAN(ahead, after)) / after) / 2
            ahead = x + (after - raised) * d
        x = ahead
    ours = solve(GAUSSIAN, y, levels, Heun(0.9, 0.6, 4.0, 1.1), noise=noise).y
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_have_the_moments_of_correlated_gaussian_data(name: str) -> None:
    mean, covariance = torch.tensor([0.5, -1.0]).double(), torch.tensor([[0.3, 0.15], [0.15, 0.2]]).double()
    teacher, n = GaussianMixture([1.0], mean[None], covariance[None]), 2000
    levels = grid("karras", 250, 0.02, 20.0)
    start = torch.linalg.cholesky(covariance + 400 * torch.eye(2).double())
    noise = SampleNoise(11, torch.arange(n), (2,))
    y = mean + SampleNoise(12, torch.arange(n), (2,)).normal(0) @ start.T
    x = solve(teacher, y, levels, name, noise=noise).y
    # Four standard errors, and 2 % for the length of the steps: the exact laws above fall with them.
    assert bool(((x.mean(0) - mean).abs() < 4 * (covariance.diag() / n).sqrt() + 0.01).all())
    diagonal = covariance.diag()
    error = ((diagonal[:, None] * diagonal + covariance**2) / n).sqrt()
    assert bool(((x.T.cov() - covariance).abs() < 4 * error + 0.02 * diagonal.max()).all())


def test_the_batch_norm_of_the_corrector_is_that_of_song() -> None:
    noise = SampleNoise(1, torch.arange(200), (40,))
    teacher = GaussianMixture([1.0], torch.zeros(1, 40), [0.5])
    y = 3 * SampleNoise(2, torch.arange(200), (40,)).normal(0)
    z, s = noise.normal(0, 1), teacher.score(y, 3.0)
    e = 2 * (0.16 * z.norm(dim=1).mean() / s.norm(dim=1).mean()) ** 2
    corrected = y + e * s + (2 * e).sqrt() * z
    expected = teacher(corrected, 3.0)
    ours = solve(teacher, y, [3.0, 0.0], PredictorCorrector(norm="batch"), noise=noise)
    torch.testing.assert_close(ours.y, expected, rtol=1e-11, atol=1e-11)
    level = solve(teacher, y, [3.0, 0.0], PredictorCorrector(), noise=noise).y
    # On data much narrower than the noise the two lengths are the same.
    assert float((level - expected).norm() / expected.norm()) < 0.02
    assert ours.calls == 2


def test_mistakes_are_answered_with_a_message() -> None:
    with pytest.raises(UserError, match="one whole number"):
        SampleNoise(0, torch.zeros(3), (2,))
    with pytest.raises(UserError, match="one whole number"):
        SampleNoise(0, torch.zeros(3, 1, dtype=torch.int64), (2,))
    with pytest.raises(UserError, match="no noise is stored"):
        SampleNoise(0, [1], (2,)).normal(-1)
    assert np.isfinite(SampleNoise(0, [1], (2,)).normal(0).numpy()).all()
