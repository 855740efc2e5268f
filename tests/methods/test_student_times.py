"""Students of teachers with a sampler of their own: shifted flows, discrete times, the top of the range."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.ranks import ALONE
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.guidance import CallCounter
from distmatch.diffusion.noise import Karras
from distmatch.diffusion.paths import condot, discrete_path
from distmatch.diffusion.solvers import default_grid, grid
from distmatch.interop import load_denoiser, save_denoiser
from distmatch.methods.consistency.direct import training_levels

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


class Net(nn.Module):
    """A smooth function of sample and time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, (t / 1000)[:, None]], 1))


def flow(shift: float | None = 3.0) -> Any:
    path = condot(t_min=1e-3, t_max=1 - 1e-6)
    options: Any = {"time": 1000.0, "sigma_max": path.rho_max, "shift": shift}
    return dm.as_denoiser(Net(), path, "flow", shape=(3,), sigma_data=1.0, **options)


def eps() -> Any:
    return dm.as_denoiser(Net(), discrete_path(ALPHAS), "eps", shape=(3,), sigma_data=1.0, shift=1.0)


def sigmas_of(teacher: Any, method: str = "diff-instruct", **settings: Any) -> tuple[float, ...]:
    return dm.methods.build(teacher, method, total_steps=10, **settings).init(0).student.sigmas


@pytest.mark.parametrize("method", ["f-distill", "sid", "consistency", "scm", "rcm"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_a_flow_s_steps_are_even_before_the_shift(method, steps):
    u = 1 - torch.arange(steps, dtype=torch.float64) / steps
    t = 3 * u / (1 + 2 * u)
    found = torch.tensor(sigmas_of(flow(), method, num_steps=steps), dtype=torch.float64)
    assert abs(found[0] / (found[0] + 1) - 1) < 2e-6
    torch.testing.assert_close((found / (1 + found))[1:], t[1:], rtol=1e-12, atol=0)


def test_steps_of_discrete_times_are_those_of_dmd2():
    path = discrete_path(ALPHAS)
    for steps, times in ((1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249]), (3, [999, 666, 332])):
        wanted = ((1 - ALPHAS) / ALPHAS).sqrt()[times].tolist()
        assert sigmas_of(eps(), num_steps=steps) == pytest.approx(wanted, rel=1e-12)
    wanted = path.rho(torch.tensor([999.0, 749.0])).tolist()
    assert sigmas_of(eps(), student_times=(999, 749)) == pytest.approx(wanted)


def test_a_lower_start_is_kept_and_steps_fall_from_it():
    first, second = sigmas_of(flow(), num_steps=2, student_sigma=9.0)
    assert first == 9.0
    u = 0.75 / 2  # rho = s u / (1 - u): 9 = 3 * 0.75 / 0.25
    assert second == pytest.approx(3 * u / (1 - u))


def test_times_can_be_listed():
    assert sigmas_of(flow(), student_times=(1.0, 0.75, 0.25)) == pytest.approx((1 / 1e-6 - 1, 3.0, 1 / 3))
    plain = dm.as_denoiser(Net(), "edm", "x0", shape=(3,), sigma_data=0.5)
    assert sigmas_of(plain, student_times=(20.0, 0.5)) == (20.0, 0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student_times": (0.5, 0.75)}, "decreasing"),
        ({"student_times": (1.5, 0.75)}, "from 1 down"),
        ({"student_times": (1.0, 0.0)}, "all above"),
        ({"student_times": (1.0, float("nan"))}, "decreasing"),
        ({"student_times": (1.0, 0.5), "num_steps": 3}, "does nothing with --student-times"),
        ({"student_times": (1.0, 0.5), "student_sigma": 2.0}, "does nothing with --student-times"),
        ({"num_steps": 9000}, "do not fit"),
    ],
)
def test_times_that_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        dm.methods.build(flow(), "diff-instruct", total_steps=10, **settings)


def test_a_one_step_method_refuses_several_times():
    with pytest.raises(UserError, match="pairs assign one noise"):
        dm.methods.build(flow(), "dmd", total_steps=10, student_times=(1.0, 0.5))


def test_teachers_without_a_shift_keep_their_steps():
    assert sigmas_of(flow(None))[0] == 5.0
    assert default_grid(flow(None), 5).equal(grid("karras", 5, flow().sigma_min, flow().sigma_max))


def test_samplers_take_the_same_steps_through_wrappers():
    counter = CallCounter(flow())
    found = default_grid(counter, 4)
    torch.testing.assert_close(found[1:], torch.tensor([9.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    x = dm.solvers.sample_teacher(counter, 2, steps=4, solver="euler")
    assert counter.calls == 4
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("method", ["f-distill", "moment-matching", "rcm"])
def test_levels_of_the_comparison_are_uniform_before_the_shift(method):
    """u in [u_low, u_high] and rho = s u / (1 - u), so that rho / (rho + s) = u."""
    built = dm.methods.build(flow(), method, total_steps=10, noise_low=0.06, noise_high=12.0)
    share = torch.linspace(0, 1, 11, dtype=torch.float64)
    low, high = 0.06 / 3.06, 12 / 15
    u = low + (high - low) * share
    wanted = 3 * u / (1 - u)
    for distribution in (built.noise, built.fake_score_noise):
        torch.testing.assert_close(distribution.quantile(share), wanted)
        torch.testing.assert_close(distribution.cdf(wanted), share)
    drawn = built.noise.sample(20000, torch.Generator().manual_seed(0)).double()
    bound = 1.95 / 20000**0.5  # of Kolmogorov and Smirnov, one in a thousand
    assert stats.kstest(((drawn / (drawn + 3) - low) / (high - low)).numpy(), "uniform").statistic < bound


def test_levels_of_discrete_times_are_uniform_in_them():
    built = dm.methods.build(eps(), "sid", total_steps=10, noise_low=0.05)
    path, share = discrete_path(ALPHAS), torch.linspace(0, 1, 9, dtype=torch.float64)
    first = path.t_of_rho(0.05)
    wanted = path.rho(first + (999 - first) * share)
    torch.testing.assert_close(built.noise.quantile(share), wanted)


@pytest.mark.parametrize("method", ["consistency", "scm", "rcm"])
def test_consistency_learns_at_levels_that_are_uniform_before_the_shift(method):
    teacher = flow()
    context = dm.methods.build(teacher, method, total_steps=10, student_sigma=9.0).context
    drawing = SimpleNamespace(generator=torch.Generator().manual_seed(1), ranks=ALONE)
    drawn = training_levels(context, context.settings)(20000, drawing).double()
    low, high = (level / (level + 3) for level in (teacher.sigma_min, 9.0))
    statistic = stats.kstest(((drawn / (drawn + 3) - low) / (high - low)).numpy(), "uniform").statistic
    assert statistic < 1.95 / 20000**0.5


def test_distributions_that_are_chosen():
    karras = dm.methods.build(flow(), "sid", total_steps=10, noise_distribution="karras", noise_rho=3.0)
    assert karras.noise == Karras(0.04, flow().sigma_max, 3.0)
    assert dm.methods.build(flow(None), "sid", total_steps=10).noise == Karras(0.04, flow().sigma_max)
    plain = dm.methods.build(flow(None), "sid", total_steps=10, noise_distribution="uniform", noise_high=3.0)
    times = torch.tensor([0.04 / 1.04, 0.75], dtype=torch.float64)
    middle = times.mean()
    assert float(plain.noise.quantile(torch.tensor(0.5, dtype=torch.float64))) == pytest.approx(
        float(middle / (1 - middle))
    )


@pytest.mark.parametrize(
    ("teacher", "settings", "words"),
    [
        (flow, {"noise_rho": 3.0}, "--noise-rho does nothing"),
        (flow, {"noise_rho": 3.0, "noise_distribution": "uniform"}, "--noise-rho does nothing"),
        (
            lambda: dm.load_teacher("ring8"),
            {"noise_distribution": "uniform"},
            "need a teacher with a noise path",
        ),
    ],
)
def test_distributions_that_are_refused(teacher, settings, words):
    with pytest.raises(UserError, match=words):
        dm.methods.build(teacher(), "sid", total_steps=10, **settings)


@pytest.mark.parametrize(("shift", "words"), [(0.0, "positive"), (float("inf"), "positive")])
def test_a_shift_that_is_none(shift, words):
    with pytest.raises(UserError, match=words):
        flow(shift)
    with pytest.raises(UserError, match="between 0 and 1"):
        dm.as_denoiser(Net(), "edm", "x0", shape=(3,), shift=2.0)


def test_the_shift_is_saved_with_a_network(tmp_path):
    save_denoiser(tmp_path, flow(), {"kind": "teacher"})
    assert load_denoiser(tmp_path, Net)[0].shift == 3.0


def test_the_top_of_a_flow_is_as_exact_as_the_rest():
    """At rho = 1e6, y = x0 + rho eps has lost x0 in float32; the network sees alpha y, which has not."""
    teacher, rho = flow(), torch.tensor([flow().sigma_max, 1e3, 3.0])
    wide = copy.deepcopy(teacher).double()
    x0, noise = torch.randn(3, 3), torch.randn(3, 3)
    slope = torch.randn(3, 3)

    def both(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        leaf = x0.clone().to(dtype).detach().requires_grad_()
        y = leaf + rho.to(dtype)[:, None] * noise.to(dtype)
        out = model(y, rho.to(dtype))
        model.zero_grad()
        (out * slope.to(dtype)).sum().backward()
        weights = torch.cat([p.grad.flatten() for p in model.parameters()])
        return out.detach(), leaf.grad, weights

    for single, double in zip(both(teacher, torch.float32), both(wide, torch.float64), strict=True):
        scale = double.abs().amax(-1, keepdim=True)
        assert bool(((single.double() - double).abs() <= 2e-5 * scale).all())
    # x_t = alpha y is what a pipeline starts from: unit noise.
    start = dm.Student(teacher, (teacher.sigma_max,)).start(noise) * (1 / (1 + teacher.sigma_max))
    assert (start - noise).abs().max() < 1e-5


@pytest.mark.parametrize(
    "method", ["f-distill", "dmd2", "sid", "sida", "sim", "uni-instruct", "consistency", "rcm"]
)
def test_gradients_at_the_top_are_finite_and_move_the_student(method):
    teacher = flow()
    own = {"ratio_features": "own"} if method == "sida" else {}
    built = dm.methods.build(teacher, method, total_steps=20, num_steps=2, **own)
    state = built.init(0)
    before = [p.clone() for p in state.student.parameters()]
    for _ in range(6):
        info = built.step(state, Batch(torch.randn(8, 3), Conditioning()))
    assert all(bool(torch.as_tensor(v).isfinite().all()) for v in info.values())
    after = list(state.student.parameters())
    assert any((p - q).abs().max() > 0 for p, q in zip(before, after, strict=True))
    assert all(bool(p.isfinite().all()) for p in after)
