"""Superpositions of models against exact mixtures. Everything is float64; seeds are fixed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.composition.models import over_models
from distmatch.diffusion.composition.superdiff import equal_density_move, superpose
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import EulerMaruyama, grid, solve

WHOLE = GaussianMixture(
    [0.15, 0.25, 0.4, 0.2],
    [[-1.5, 0.5], [-1.0, -1.0], [1.0, 0.0], [1.5, 1.2]],
    [0.05, 0.1, 0.08, 0.15],
    sigma_max=40.0,
)
LEFT = GaussianMixture([0.375, 0.625], WHOLE.means[:2], [0.05, 0.1], sigma_max=40.0)
RIGHT = GaussianMixture([2 / 3, 1 / 3], WHOLE.means[2:], [0.08, 0.15], sigma_max=40.0)
HALVES = [LEFT, RIGHT]
LOG_WEIGHTS = [math.log(0.4), math.log(0.6)]
EXACT_PRIORS = [lambda y, c, q=q: q.log_prob(y, 40.0) for q in HALVES]


def noise_for(n: int, dim: int = 2, seed: int = 0) -> SampleNoise:
    return SampleNoise(seed, torch.arange(n), (dim,))


def start(n: int, sigma: float = 40.0, dim: int = 2, seed: int = 1) -> Tensor:
    return sigma * noise_for(n, dim, seed).normal(0)


def test_the_score_of_a_mixture_from_log_densities_is_exact() -> None:
    y = 3 * noise_for(200).normal(0)
    for sigma in (0.1, 1.0, 10.0):
        log_q = torch.stack([q.log_prob(y, sigma) for q in HALVES])
        kappa = (log_q + torch.tensor(LOG_WEIGHTS, dtype=torch.float64)[:, None]).softmax(0)
        mixed = over_models(kappa, torch.stack([q.score(y, sigma) for q in HALVES]))
        torch.testing.assert_close(mixed, WHOLE.score(y, sigma), rtol=1e-10, atol=1e-10)


def gap_to_the_whole(steps: int, n: int = 300) -> float:
    """Mean distance between the samples of OR and those of the whole mixture's own SDE, noise shared."""
    levels = grid("log", steps, 0.05, 40.0, to_zero=False)
    y = start(n)
    both = superpose(HALVES, y, levels, noise_for(n), "or", log_weights=LOG_WEIGHTS, prior=EXACT_PRIORS)
    alone = solve(WHOLE, y, levels, "reverse-diffusion", noise=noise_for(n))
    return float((both.y - alone.y).norm(dim=1).mean())


@pytest.mark.slow
def test_or_of_two_halves_follows_the_sde_of_the_whole() -> None:
    """Same noise, same steps: what is left is the error of the log-densities, of order 1/2 in the step.

    A factor 16 in steps shrinks it by about 4; 2.2 leaves room for 300 samples.
    """
    coarse, fine = gap_to_the_whole(60), gap_to_the_whole(960)
    assert fine < 0.12
    assert coarse / fine > 2.2


@pytest.mark.statistical
def test_or_of_two_halves_samples_the_whole() -> None:
    n = 2000
    levels = grid("log", 250, 0.02, 40.0)
    both = superpose(HALVES, start(n), levels, noise_for(n), log_weights=LOG_WEIGHTS, prior="moments")
    share = float((both.y[:, 0] > 0).double().mean())
    assert abs(share - 0.6) < 4 * math.sqrt(0.24 / n) + 0.01  # four standard errors, and the steps' bias
    assert both.calls == 2 * (250 + 4)  # each step, and the moments at the start
    inside = WHOLE.log_prob(both.y, 0.02).mean()
    truth = WHOLE.log_prob(WHOLE.sample(20000, seed=3).double(), 0.02).mean()
    assert abs(float(inside - truth)) < 0.1


def test_a_temperature_sharpens_and_weights_choose() -> None:
    n, levels = 400, grid("log", 100, 0.05, 40.0)
    only = superpose(HALVES, start(n), levels, noise_for(n), log_weights=[0.0, -1e4])
    alone = solve(LEFT, start(n), levels, "reverse-diffusion", noise=noise_for(n))
    torch.testing.assert_close(only.y, alone.y, rtol=1e-9, atol=1e-9)
    wide = superpose([LEFT, LEFT], start(n), levels, noise_for(n), temperature=5.0)
    torch.testing.assert_close(wide.y, alone.y, rtol=1e-9, atol=1e-9)


def three_scores(m: int = 3, dim: int = 5) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(4)
    draw = torch.randn(m + 1, 50, dim, generator=gen, dtype=torch.float64)
    return draw[:m], draw[m]


def test_the_projected_step_is_that_of_the_weights_kappa() -> None:
    """The paper's form: dy = h (kappa s_1 + (1 - kappa) s_2) + sqrt(h) z, kappa depending on z."""
    scores, z = three_scores(2)
    for h in (1e-4, 0.1, 30.0):
        difference = scores[0] - scores[1]
        kappa = 0.5 - math.sqrt(h) * (difference * z).sum(1) / (h * difference.square().sum(1))
        theirs = h * over_models(torch.stack([kappa, 1 - kappa]), scores) + math.sqrt(h) * z
        torch.testing.assert_close(equal_density_move(scores, z, h), theirs, rtol=1e-12, atol=1e-12 * (1 + h))


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_move_changes_all_log_densities_alike(m: int) -> None:
    scores, z = three_scores(m)
    h = 0.3
    move = equal_density_move(scores, z, h)
    change = (scores * move).sum(-1) - 0.5 * h * scores.square().sum(-1)
    assert float((change - change[0]).abs().max()) < 1e-11


def test_a_model_can_be_made_to_gain_more_up_to_a_unit_of_noise() -> None:
    scores, z = three_scores(3)
    h, extra = 0.3, 0.01 * randn_like_rows(3)
    base = equal_density_move(scores, z, h)
    move = equal_density_move(scores, z, h, extra=extra)
    change = (scores * move).sum(-1) - 0.5 * h * scores.square().sum(-1) - h * extra
    assert float((change - change[0]).abs().max()) < 1e-11
    far = equal_density_move(scores, z, h, extra=1e9 * extra)
    length = (far - base).norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, math.sqrt(h)))


def randn_like_rows(m: int) -> Tensor:
    return torch.randn(m, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_the_mean_of_three_models_is_their_circumcenter() -> None:
    scores, _ = three_scores(3)
    center = equal_density_move(scores, torch.zeros(50, 5, dtype=torch.float64), 1.0)
    distances = (scores - center).norm(dim=-1)
    torch.testing.assert_close(distances, distances[:1].expand_as(distances), rtol=1e-10, atol=0)
    # In the affine hull: the three scores and the center span two directions and no third.
    singular = torch.linalg.svdvals(torch.stack([*(scores[1:] - scores[0]), center - scores[0]], dim=1))
    assert float((singular[:, 2] / singular[:, 0]).max()) < 1e-10
    # Equilateral: the circumcenter is the mean.
    corners = torch.eye(3, dtype=torch.float64)[:, None]
    middle = equal_density_move(corners, torch.zeros(1, 3, dtype=torch.float64), 1.0)
    torch.testing.assert_close(middle, torch.full((1, 3), 1 / 3, dtype=torch.float64))


def test_models_that_agree_leave_the_noise_whole() -> None:
    scores, z = three_scores(3)
    same = scores[:1].expand(3, -1, -1)
    torch.testing.assert_close(equal_density_move(same, z, 0.5), 0.5 * same[0] + math.sqrt(0.5) * z)
    n, levels = 50, grid("log", 30, 0.05, 40.0)
    y = start(n).float()  # float32 models that differ by rounding only
    near = GaussianMixture(LEFT.weights, LEFT.means + 1e-9, [0.05, 0.1], sigma_max=40.0)
    twice = superpose([LEFT, near], y, levels, noise_for(n), "and")
    alone = solve(LEFT, y, levels, EulerMaruyama(1.0), noise=noise_for(n))
    assert float((twice.y.std(0) / alone.y.std(0)).min()) > 0.8


def and_gaps(first: GaussianMixture, second: GaussianMixture, curvature: bool, start: Tensor) -> list[float]:
    """Median |log q_1 - log q_2| of the samples of AND for 30, 120 and 480 steps from 20 to 0.1."""
    models, gaps = [first, second], []
    prior = [lambda v, c, q=q: q.log_prob(v, 20.0) for q in models]
    for steps in (30, 120, 480):
        levels, noise = grid("log", steps, 0.1, 20.0, to_zero=False), noise_for(len(start))
        done = superpose(models, start, levels, noise, "and", prior=prior, curvature=curvature)
        assert float((done.log_q[0] - done.log_q[1]).abs().median()) < (1e-9 if curvature else 0.2)
        gap = first.log_prob(done.y, 0.1) - second.log_prob(done.y, 0.1)
        if not curvature:  # the published form keeps the difference that the start has
            gap -= first.log_prob(start, 20.0) - second.log_prob(start, 20.0)
        gaps.append(float(gap.abs().median()))
    return gaps


def gaussian(mean: list[float], variances: list[float]) -> GaussianMixture:
    return GaussianMixture([1.0], [mean], [variances], sigma_max=20.0)


@pytest.mark.slow
def test_and_keeps_the_densities_equal_and_the_published_form_does_not() -> None:
    """4 times the steps halve an error of order 1/2; without the Hessians it stays where it is."""
    first, second = gaussian([-1.0, 0.0], [0.5, 1.0]), gaussian([1.0, 0.5], [1.0, 0.3])
    y = start(200, 20.0)
    exact, published = (and_gaps(first, second, c, y) for c in (True, False))
    for coarse, fine in pairwise(exact):
        assert coarse / fine > 1.6, exact
    assert exact[-1] < 0.06
    assert published[-1] > 0.7 * published[0]
    assert published[-1] > 0.15
    # Models with the same Hessian lose nothing: there the published form converges as well.
    alike = and_gaps(gaussian([-1.0, 0.0], [0.5, 1.0]), gaussian([1.0, 0.5], [0.5, 1.0]), False, y)
    assert alike[-1] < 0.1 * published[-1]


@pytest.mark.slow
def test_and_of_three_models_in_three_dimensions() -> None:
    corners = [([-1.0, 0.0, 0.0], [0.5, 1.0, 0.7]), ([1.0, 0.5, 0.0], [1.0, 0.3, 0.5])]
    models = [gaussian(*c) for c in [*corners, ([0.0, -1.0, 1.0], [0.6, 0.6, 1.0])]]
    prior = [lambda v, c, q=q: q.log_prob(v, 20.0) for q in models]
    levels = grid("log", 400, 0.1, 20.0, to_zero=False)
    done = superpose(models, start(150, 20.0, 3), levels, noise_for(150, 3), "and", prior=prior)
    truth = torch.stack([q.log_prob(done.y, 0.1) for q in models])
    assert float((truth - truth.mean(0)).abs().median()) < 0.05


def test_a_sample_does_not_depend_on_its_batch() -> None:
    levels, y = grid("log", 20, 0.05, 40.0), start(30)
    for mode in ("or", "and"):
        whole = superpose(HALVES, y, levels, noise_for(30), mode, trajectory=True)
        part = superpose(HALVES, y[10:], levels, SampleNoise(0, torch.arange(10, 30), (2,)), mode)
        torch.testing.assert_close(whole.y[10:], part.y, rtol=1e-12, atol=1e-12)
        assert whole.trajectory is not None
        assert whole.trajectory.shape == (21, 30, 2)


def test_conditions_of_one_model_are_two_models() -> None:
    classes = GaussianMixture(
        WHOLE.weights, WHOLE.means, [0.05, 0.1, 0.08, 0.15], classes=[0, 0, 1, 1], sigma_max=40.0
    )
    n, levels = 40, grid("log", 30, 0.05, 40.0)
    labels = [torch.full((n,), c) for c in (0, 1)]
    prior = {"prior": lambda y, c: torch.zeros(len(y), dtype=torch.float64)}
    one = superpose([classes, classes], start(n), levels, noise_for(n), conditions=labels, **prior)
    two = superpose(HALVES, start(n), levels, noise_for(n), **prior)
    torch.testing.assert_close(one.y, two.y, rtol=1e-9, atol=1e-9)
    assert one.calls == 60


class Heavy(GaussianMixture):
    gaussian_kernel = False


def test_what_does_not_go_together_is_refused() -> None:
    levels, y, noise = grid("log", 5, 0.05, 40.0), start(4), noise_for(4)
    other = GaussianMixture([1.0], [[0.0, 0.0, 0.0]], [1.0])
    with pytest.raises(UserError, match="same samples"):
        superpose([LEFT, other], y, levels, noise)
    with pytest.raises(UserError, match="needs the score"):
        superpose([LEFT, Heavy([1.0], [[0.0, 0.0]], [1.0])], y, levels, noise)
    # Its densities at the levels are not one density, noised: log q would count what is not there.
    with pytest.raises(UserError, match="one density at all noise levels"):
        superpose([LEFT, Guided(LEFT, 2.0, reference=RIGHT)], y, levels, noise)
    with pytest.raises(UserError, match="at least one model"):
        superpose([], y, levels, noise)
    with pytest.raises(UserError, match="unknown superposition"):
        superpose(HALVES, y, levels, noise, "xor")
    with pytest.raises(UserError, match="one log weight"):
        superpose(HALVES, y, levels, noise, log_weights=[0.0])
    for weights in ([-math.inf, -math.inf], [0.0, math.inf]):
        with pytest.raises(UserError, match="some model must have a weight"):
            superpose(HALVES, y, levels, noise, log_weights=weights)
    with pytest.raises(UserError, match="no weights"):
        superpose(HALVES, y, levels, noise, "and", log_weights=[0.0, 0.0])
    with pytest.raises(UserError, match="unconditional model"):
        superpose(HALVES, y, levels, noise, conditions=[None, torch.zeros(4, dtype=torch.int64)])
    with pytest.raises(UserError, match="numbers of models"):
        superpose(HALVES, y, levels, noise, conditions=[None])
    with pytest.raises(UserError, match="all models support"):
        superpose(HALVES, y, grid("log", 5, 0.05, 80.0), noise)
    with pytest.raises(UserError, match="not for this batch"):
        superpose(HALVES, y, levels, noise_for(3))
    with pytest.raises(UserError, match="NaN or infinity in 1 of 4"):
        superpose([LEFT, RIGHT], y.index_fill(0, torch.tensor([2]), math.nan), levels, noise)
    with pytest.raises(UserError, match="wrong shape"):
        superpose(HALVES, y[:, :1], levels, noise)
