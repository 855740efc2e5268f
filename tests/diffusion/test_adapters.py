"""Networks as denoisers and denoisers on paths, against the exact teacher. Seeds are fixed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.denoiser import Denoiser, expand, has_features, has_score, require_score
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.own_network import as_denoiser
from distmatch.diffusion.paths import (
    NoisePath,
    betas,
    condot,
    discrete_path,
    noise_path,
    path_of,
    trigflow,
    vp,
)
from distmatch.diffusion.paths.on_path import OnPath
from distmatch.diffusion.predictions import PREDICTIONS

NAMES = ["vp", "sub-vp", "ve", "edm", "cosine", "condot", "trigflow"]
DISCRETE = discrete_path((1 - betas("linear")).cumprod(0))
PATHS = [*map(noise_path, NAMES), DISCRETE, path_of(lambda t: (1 - t) ** 2, lambda t: 1 - (1 - t) ** 2)]
EXACT = 1e12  # a limit beyond which the mean of the data is exact to rounding


def mixture(classes: list[int] | None = None) -> GaussianMixture:
    return GaussianMixture(
        [0.3, 0.7], [[-1.0, 0.5], [0.8, 0.0]], [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0], [0, 0.4]]], classes
    )


def network(path: NoisePath, prediction: str, teacher: Denoiser | None = None) -> Callable[..., Tensor]:
    """The perfect network for the mixture: what would be learned with this prediction on this path."""
    on = OnPath(teacher or mixture(), path, sigma_limit=EXACT)
    return lambda x, t, labels=None: on.predict(prediction, x, t, labels)


def points(n: int = 64) -> Tensor:
    return 1.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_any_network_on_any_path_is_the_same_denoiser(path: NoisePath, prediction: str) -> None:
    denoiser = as_denoiser(network(path, prediction), path, prediction, shape=(2,), sigma_data=1.0)
    sigma = torch.logspace(math.log10(denoiser.sigma_min), 1.5, 64, dtype=torch.float64)
    y = points() * expand((1 + sigma**2).sqrt(), points())
    # Predictions of the noise know x0 to sigma roundings of y: 30 * 30 * 1e-16, and some.
    torch.testing.assert_close(denoiser(y, sigma), mixture()(y, sigma), rtol=0, atol=1e-12)
    assert isinstance(denoiser, Denoiser)
    assert not has_features(denoiser)


def ddim(model: OnPath, x: Tensor, times: Tensor) -> Tensor:
    """DDIM written in x_t, as each path's own literature has it."""
    for now, after in pairwise(times):
        eps = model.predict("eps", x, now)
        clean = model.predict("x0", x, now)
        x = model.path.alpha(after) * clean + model.path.sigma(after) * eps
    return x


def test_samples_do_not_depend_on_the_path() -> None:
    """One teacher, trained on the VP path to predict noise, sampled on all paths at the same ratios."""
    teacher = as_denoiser(network(vp(), "eps"), vp(), "eps", shape=(2,), sigma_data=1.0)
    rho = torch.logspace(math.log10(60), math.log10(0.01), 25, dtype=torch.float64)
    start = 60 * points()
    samples = {}
    for path in PATHS:
        model = OnPath(teacher, path)
        x, _ = model.from_frame(start, 60.0)
        times = path.t_of_rho(rho)
        x = ddim(model, x, times)
        samples[path.name], level = model.to_frame(x, times[-1])
        torch.testing.assert_close(level, torch.full_like(level, 0.01), rtol=1e-12, atol=0)
    for sample in samples.values():
        torch.testing.assert_close(sample, samples["edm"], rtol=0, atol=1e-10)
    assert (samples["edm"] - start).abs().max() > 10


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_velocity_and_score_on_a_path_are_those_of_the_mixture(path: NoisePath) -> None:
    model = OnPath(mixture(), path, sigma_limit=EXACT)
    share = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    t = path.t_min + (path.t_max - path.t_min) * share
    c = path.coefficients(t)
    x = points() * expand((c.alpha**2 + c.sigma**2).sqrt(), points())
    y, rho = x / expand(c.alpha, x), path.rho(t)
    score = mixture().score(y, rho) / expand(c.alpha, x)
    # The score is a difference over sigma^2: its rounding grows with 1 / sigma^2.
    torch.testing.assert_close(model.score(x, t), score, rtol=1e-9, atol=1e-9)
    flow = expand(path.f(t), x) * x - 0.5 * expand(path.g2(t), x) * score
    torch.testing.assert_close(model.velocity(x, t), flow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [condot(t_max=1.0), trigflow(rho_max=math.inf)], ids=lambda p: p.name)
def test_all_predictions_are_finite_and_right_at_pure_noise(path: NoisePath) -> None:
    x = points() * path.sigma(path.t_max)
    c = path.coefficients(path.t_max)
    mean = mixture().weights @ mixture().means
    expected = {
        "x0": mean.expand(64, 2),
        "eps": x / c.sigma,
        "v": -c.sigma * mean.expand(64, 2),
        "flow": c.d_alpha * mean + c.d_sigma * x / c.sigma,
        "score": -x / c.sigma**2,
    }
    for name, value in expected.items():
        exact = OnPath(mixture(), path, sigma_limit=EXACT).predict(name, x, path.t_max)
        torch.testing.assert_close(exact, value, rtol=1e-9, atol=1e-9)
        # Asked at its largest level, 80, the teacher is wrong by variance / 80 for |x| up to 5.
        torch.testing.assert_close(
            OnPath(mixture(), path).predict(name, x, path.t_max), value, rtol=0, atol=0.1
        )


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_predictions_are_continuous_where_levels_are_limited(path: NoisePath) -> None:
    model, x = OnPath(mixture(), path, sigma_limit=2.0), points() * path.sigma(path.t_of_rho(2.0))
    below, above = (model.predict("x0", x, path.t_of_rho(2 * (1 + shift))) for shift in (-1e-9, 1e-9))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-7)
    # Beyond the limit, the noise is scaled to it.
    t = path.t_of_rho(8.0)
    there = mixture()(x * 2 / path.sigma(t), 2.0)
    torch.testing.assert_close(model.predict("x0", x, t), there, rtol=0, atol=1e-12)


def test_networks_that_count_time_in_their_own_way() -> None:
    y, sigma = points(), torch.logspace(-1, 1, 64, dtype=torch.float64)
    truth = mixture()(y, sigma)
    scaled = network(vp(), "eps")
    thousand = as_denoiser(lambda x, t: scaled(x, t / 999), "vp", shape=(2,), time=lambda t: 999 * t)
    torch.testing.assert_close(thousand(y, sigma), truth, rtol=0, atol=1e-12)
    straight = network(condot(), "flow")
    # Data at time 1 and the velocity from noise to data.
    backwards = as_denoiser(
        lambda x, t: -straight(x, 1 - t), "flow-matching", "flow", shape=(2,), reverse_time=True
    )
    torch.testing.assert_close(backwards(y, sigma), truth, rtol=0, atol=1e-12)


class Recorder(nn.Module):
    """Returns half its input and keeps what it was told."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.told: tuple[Any, ...] = ()

    def forward(self, *arguments: Any) -> Tensor:
        self.told = tuple(a if a is None else a.detach() for a in arguments)
        return self.scale * arguments[0]


def test_discrete_teachers_are_told_their_own_times() -> None:
    net = Recorder()
    middle = float((DISCRETE.levels[3] * DISCRETE.levels[4]).sqrt())
    ends = [DISCRETE.rho_min / 3, DISCRETE.rho_max * 3]
    sigma = torch.tensor([float(DISCRETE.levels[7]), middle * 1.01, *ends], dtype=torch.float64)
    y = points(4)
    denoiser = as_denoiser(net, DISCRETE, "eps", shape=(2,))
    denoised = denoiser(y, sigma)
    assert net.told[1].tolist() == pytest.approx([7.0, 3.5, 0.0, 999.0], abs=0.1)
    assert net.told[1].dtype == torch.float32
    # Whatever it was told, x_t = y / sqrt(1 + sigma^2) and x0 = y - sigma eps of the level asked for.
    x = y / expand((1 + sigma**2).sqrt(), y)
    torch.testing.assert_close(net.told[0].double(), x, rtol=1e-6, atol=0)
    torch.testing.assert_close(denoised, y - expand(sigma, y) * 0.5 * x, rtol=1e-5, atol=1e-6)
    snapping = as_denoiser(net, DISCRETE, "eps", shape=(2,), levels="snap")
    torch.testing.assert_close(snapping(y, sigma), denoised)
    assert net.told[1].dtype == torch.int64
    assert net.told[1].tolist() == [7, 4, 0, 999]


@pytest.mark.parametrize("sigma", [0.0, 0.001, 1000.0])
def test_beyond_the_ends_of_a_path_the_level_is_still_the_one_asked_for(sigma: float) -> None:
    y, level = points(3), torch.full((3,), sigma, dtype=torch.float64)
    for path in (path_of(torch.ones_like, torch.exp, -3.0, 5.0), DISCRETE, vp(t_min=0.01)):
        denoiser = as_denoiser(lambda x, t: torch.ones_like(x), path, "eps", shape=(2,))
        torch.testing.assert_close(denoiser(y, level), y - sigma, rtol=1e-12, atol=1e-12)
    if sigma == 0:
        for prediction in ("v", "flow", "score"):  # the flow has infinite coefficients there
            denoiser = as_denoiser(lambda x, t: torch.ones_like(x), "vp", prediction, shape=(2,))
            torch.testing.assert_close(denoiser(y, level), y, rtol=1e-12, atol=1e-12)


def test_labels_follow_the_network() -> None:
    net = Recorder()
    y, sigma, labels = points(3), torch.ones(3), torch.tensor([2, -1, 0])
    as_denoiser(net, shape=(2,))(y, sigma, labels)
    assert len(net.told) == 2
    own = as_denoiser(net, shape=(2,), num_classes=3)
    own(y, sigma, labels)
    assert torch.equal(net.told[2], labels)
    own(y, sigma)
    assert net.told[2] is None
    foreign = as_denoiser(net, shape=(2,), num_classes=3, null_class=3)
    foreign(y, sigma, labels)
    assert net.told[2].tolist() == [2, 3, 0]
    foreign(y, sigma)
    assert net.told[2].tolist() == [3, 3, 3]
    among = as_denoiser(net, shape=(2,), num_classes=3, null_class=1)
    with pytest.raises(UserError, match="class 1 of this teacher means unconditional"):
        among(y, sigma, torch.tensor([2, 1, 0]))
    among(y, sigma, labels)
    assert net.told[2].tolist() == [2, 1, 0]
    teacher = mixture([0, 1])
    exact = as_denoiser(network(vp(), "v", teacher), "vp", "v", shape=(2,), num_classes=2)
    y, sigma, labels = points(), torch.logspace(-1, 1, 64, dtype=torch.float64), torch.arange(64) % 3 - 1
    torch.testing.assert_close(exact(y, sigma, labels), teacher(y, sigma, labels), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inside", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("outside", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_inside_and_outside_are_independent(inside: torch.dtype, outside: torch.dtype) -> None:
    net = Recorder(inside)
    denoiser = as_denoiser(net, "cosine", "v", shape=(2,))
    out = denoiser(points(5).to(outside), torch.full((5,), 0.3))
    assert out.dtype == (torch.float64 if outside == torch.float64 else torch.float32)
    assert net.told[0].dtype == inside
    assert net.told[1].dtype == (torch.float64 if inside == torch.float64 else torch.float32)


def test_features_gradients_and_copies() -> None:
    class Lending(Recorder):
        has_features = True

        def forward(self, *arguments: Any, return_features: Any = False) -> Any:
            out, features = super().forward(*arguments), [arguments[0] + 1]
            return features if return_features == "only" else (out, features) if return_features else out

    denoiser = as_denoiser(Lending(), "edm", "x0", shape=(2,))
    assert has_features(denoiser)
    y, sigma = points(4).float().requires_grad_(), torch.ones(1)  # one level for all
    clean, features = denoiser(y, sigma, return_features=True)
    torch.testing.assert_close(clean, denoiser(y, sigma))
    torch.testing.assert_close(features[0], y + 1)
    clean.sum().backward()
    torch.testing.assert_close(y.grad, torch.full_like(y, 0.5))
    assert sum(p.numel() for p in denoiser.parameters()) == 1
    twin = copy.deepcopy(denoiser)
    twin.net.scale.data.fill_(2.0)
    assert not torch.equal(twin(y, sigma), denoiser(y, sigma))


def test_levels_come_from_the_path_and_may_be_narrowed() -> None:
    def build(path: str | NoisePath, **options: Any) -> PredictionDenoiser:
        return PredictionDenoiser(Recorder(), path, "eps", shape=(2,), **options)

    assert (build("vp").sigma_min, build("vp").sigma_max) == (vp().rho_min, vp().rho_max)
    open_ends = build(path_of(lambda t: 1 - t, lambda t: t))
    assert (open_ends.sigma_min, open_ends.sigma_max) == (0.002, 1000.0)
    assert build("vp", sigma_max=80.0).sigma_max == 80
    with pytest.raises(UserError, match="does not reach its prior"):
        build("vp", sigma_max=3.0)
    with pytest.raises(UserError, match="does not reach its prior"):
        build("vp", sigma_data=20.0)
    with pytest.raises(UserError, match="noise levels outside the edm path"):
        build("edm", sigma_max=100.0)
    with pytest.raises(UserError, match="noise levels outside the edm path"):
        build("edm", sigma_min=0.001)


def test_mistakes_are_explained() -> None:
    net, y, one = Recorder(), points(3), torch.ones(3)
    with pytest.raises(UserError, match="unknown prediction"):
        as_denoiser(net, "vp", "noise", shape=(2,))
    with pytest.raises(UserError, match="unknown noise path"):
        as_denoiser(net, "vpp", shape=(2,))
    with pytest.raises(UserError, match="unknown way to treat levels"):
        as_denoiser(net, "vp", shape=(2,), levels="round")
    with pytest.raises(UserError, match="discrete noise levels"):
        as_denoiser(net, "vp", shape=(2,), levels="snap")
    for path in (DISCRETE, "edm"):
        with pytest.raises(UserError, match="reverse_time means 1 - t"):
            as_denoiser(net, path, shape=(2,), reverse_time=True)
    with pytest.raises(UserError, match=r"do not have the shape.*\(3, 2\)"):
        as_denoiser(net, shape=(5,))(y, one)
    with pytest.raises(UserError, match="also returns a variance"):
        as_denoiser(lambda x, t: torch.cat([x, x], 1), shape=(2,))(y, one)


def test_teachers_without_a_score_are_refused_where_one_is_needed() -> None:
    teacher = mixture()
    assert has_score(teacher)
    require_score(teacher, "churn")
    teacher.gaussian_kernel = False
    assert not has_score(teacher)
    with pytest.raises(UserError, match="churn needs the score"):
        require_score(teacher, "churn")
    with pytest.raises(UserError, match="a score needs the score"):
        OnPath(teacher, "vp").score(points(), 0.5)
    assert OnPath(teacher, "vp").velocity(points(), 0.5).isfinite().all()


class _TakesSigma(nn.Module):
    """A denoiser x / (1 + sigma^2), which is exact for normal data."""

    sigma_data = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, sigma: Tensor, class_cond: Tensor | None = None) -> Tensor:
        return self.scale * x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)


class _TakesSigmaAlone(_TakesSigma):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, sigma)


def test_a_module_that_receives_sigma_is_no_noise_predictor() -> None:
    """Whether it is a wrapper of k-diffusion, takes any keyword, or neither."""
    x, sigma = torch.randn(5, 3), torch.tensor([0.1, 0.5, 1.0, 5.0, 40.0])
    plain, wrapped = _TakesSigma(), _TakesSigma()
    wrapped.inner_model = nn.Linear(3, 3)
    for module in (plain, wrapped, _TakesSigmaAlone()):
        denoiser = as_denoiser(module, shape=(3,))
        assert denoiser.sigma_data == 1.0
        torch.testing.assert_close(denoiser(x, sigma), module(x, sigma))


def test_a_misspelt_option_is_named() -> None:
    with pytest.raises(UserError, match="sigma_data"):
        as_denoiser(_TakesSigma(), shape=(3,), sigmadata=1.0)
