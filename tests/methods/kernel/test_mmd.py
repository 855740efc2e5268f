"""MMD finetuning: the statistic against closed forms, its gradient through a chain, and what parts change."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.data.toys import toy
from distmatch.diffusion.paths import noise_path
from distmatch.discrepancies.kernels import Kernel, polynomial
from distmatch.discrepancies.mmd import mmd, mmd_loss
from distmatch.losses import mmd_with_gradient
from distmatch.methods.kernel.mmd import feature_kernel, mmd_sigmas
from distmatch.methods.kernel.settings import MMDSettings
from distmatch.methods.sampler import sampler_weights
from distmatch.methods.state import DistillState
from distmatch.methods.student import Student
from distmatch.nets.build import build_net
from distmatch.nets.config import UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.packing import pack
from tests.helpers.draws import normal
from tests.helpers.small import batch, distiller, network_teacher

LINEAR = polynomial(1, gamma=1.0, offset=0.0)


def unbiased_mmd(x: Tensor, y: Tensor, kernel: Kernel, labels: Tensor | None = None) -> Tensor:
    return mmd_with_gradient(x, y, kernel, labels)[0]


def test_the_linear_statistic_is_the_distance_of_the_means_less_the_spread_within() -> None:
    x, y = normal(40, 3), 0.3 + 2 * normal(40, 3, seed=1)
    within = (x.var(0).sum() + y.var(0).sum()) / 40
    expected = (x.mean(0) - y.mean(0)).square().sum() - within
    torch.testing.assert_close(unbiased_mmd(x, y, LINEAR), expected)


@pytest.mark.parametrize("name", ["cubic", "linear", "rbf", "energy"])
def test_the_statistic_is_that_of_discrepancies_whatever_the_order(name: Any) -> None:
    kernel = feature_kernel(MMDSettings(mmd_kernel=name), True, 3)
    x, y = normal(50, 3), 0.5 * normal(50, 3, seed=1)
    value = unbiased_mmd(x, y, kernel)
    torch.testing.assert_close(value, mmd_loss(x, y, kernel))
    torch.testing.assert_close(value, unbiased_mmd(x.flip(0), y[torch.randperm(50)], kernel))
    assert unbiased_mmd(x, x, kernel) < 0  # the pairs i = i count across, and not within


@pytest.mark.statistical
def test_the_statistic_of_the_same_law_is_zero_on_average() -> None:
    kernel = polynomial(3)
    values = torch.stack(
        [unbiased_mmd(normal(16, 2, seed=2 * i), normal(16, 2, seed=2 * i + 1), kernel) for i in range(400)]
    )
    assert values.mean().abs() < 4 * values.std() / 20
    assert (values < 0).any()


def test_three_moments_are_seen_by_the_cubic_kernel_and_one_by_the_linear() -> None:
    # In one dimension (xy + 1)^3 = sum_m C(3, m) x^m y^m: with equal means only 3 (E x^2 - E y^2)^2 is left.
    values = {"cubic": [], "linear": []}
    for i in range(200):
        x, y = normal(64, 1, seed=2 * i), 1.5 * normal(64, 1, seed=2 * i + 1)
        values["cubic"].append(unbiased_mmd(x, y, polynomial(3)))
        values["linear"].append(unbiased_mmd(x, y, LINEAR))
    for name, expected in (("cubic", 3 * (1 - 1.5**2) ** 2), ("linear", 0.0)):
        found = torch.stack(values[name])
        assert (found.mean() - expected).abs() < 4 * found.std() / math.sqrt(200), name


def test_the_linear_gradient_moves_all_samples_alike() -> None:
    x, y = normal(200, 3), 1 + normal(200, 3, seed=1)
    gradient = mmd_with_gradient(x, y, LINEAR)[1]
    common = 2 / 200 * (x.mean(0) - y.mean(0))
    own = 2 / 200 * (x.mean(0) - x) / 199  # a sample is no pair with itself
    torch.testing.assert_close(gradient, common + own)


def in_plain_words(x: Tensor, y: Tensor, kernel: Kernel, labels: Tensor | None) -> Tensor:
    """The statistic as a sum over pairs of different indices, for autograd."""
    n, total = len(x), torch.zeros((), dtype=x.dtype)
    for i in range(n):
        for j in range(n):
            if i != j and (labels is None or labels[i] == labels[j]):
                pairs = kernel(x[i : i + 1], x[j : j + 1]) + kernel(y[i : i + 1], y[j : j + 1])
                total = total + pairs.squeeze() / (n * (n - 1))
            if labels is None or (i != j and labels[i] == labels[j]):
                across = n**2 if labels is None else n * (n - 1)
                total = total - 2 * kernel(x[i : i + 1], y[j : j + 1]).squeeze() / across
    return total


# Labels of about equal shares are compared group by group, very unequal ones all at once.
LABELS = {"none": None, "even": [0, 1, 2] * 4 + [0], "uneven": [0] * 5 + [1] + [0] * 5 + [2, 2]}


@pytest.mark.parametrize("given", LABELS)
@pytest.mark.parametrize("name", ["cubic", "linear", "rbf", "energy"])
def test_value_and_gradient_in_chunks_are_those_of_the_sum_over_pairs(
    name: Any, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = feature_kernel(MMDSettings(mmd_kernel=name), True, 3)
    x, y = normal(13, 3).requires_grad_(), 1 + 0.5 * normal(13, 3, seed=1)
    labels = None if LABELS[given] is None else torch.tensor(LABELS[given])
    expected = in_plain_words(x, y, kernel, labels)
    (slope,) = torch.autograd.grad(expected, x)
    monkeypatch.setattr("distmatch.losses.kernel.rows_per_chunk", lambda columns, device: 5)
    value, gradient = mmd_with_gradient(x.detach(), y, kernel, labels)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope)
    single = mmd_with_gradient(x.detach().float(), y.float(), kernel, labels)
    torch.testing.assert_close(single[0], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single[1], gradient.float(), rtol=1e-4, atol=1e-5)


def test_labels_make_it_the_distance_of_the_joint_laws() -> None:
    kernel = polynomial(3)
    same, swapped = [], []
    for i in range(300):
        gen = torch.Generator().manual_seed(i)
        labels = torch.randint(2, (24,), generator=gen)
        x, y = (2.0 * labels[:, None] - 1 + 0.5 * normal(24, 1, seed=1000 + 2 * i + k) for k in (0, 1))
        same.append(unbiased_mmd(x, y, kernel, labels))
        swapped.append(unbiased_mmd(x, -y, kernel, labels))
    same, swapped = torch.stack(same), torch.stack(swapped)
    assert same.mean().abs() < 4 * same.std() / math.sqrt(300)
    # With swapped classes the marginals agree and the joint laws do not. In each class the first moment is
    # 1 or -1, the third 1.75 or -1.75, and two samples are of the same class half of the time.
    apart = 3 * 2**2 + 3.5**2
    assert (swapped.mean() - apart / 2).abs() < 4 * swapped.std() / math.sqrt(300)


class TwoParameters(nn.Module):
    """A noise predictor eps = (a + b sigma) y: D = y - sigma eps."""

    shape, num_classes, sigma_data, sigma_min, sigma_max = (2,), 0, 0.7, 0.01, 20.0

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        a, b = self.weights
        return x - (sigma * (a + b * sigma))[:, None] * x


def chain(a: float, b: float, **settings: Any) -> tuple[Any, DistillState]:
    method = distiller(network_teacher(), method="mmd", num_steps=3, **settings)
    state = method.init(0)
    state.student.denoiser = TwoParameters(a, b)  # type: ignore[assignment]
    return method, state


def gradient_of(a: float, b: float, **settings: Any) -> tuple[Tensor, Tensor]:
    method, state = chain(a, b, **settings)
    real = batch(0)
    info = method.term.backward(state, Batch(real.x.double(), real.conditioning))
    return info["loss"], state.student.denoiser.weights.grad  # type: ignore[union-attr,return-value]


@pytest.mark.parametrize("kernel", ["cubic", "rbf", "energy"])
def test_the_gradient_through_the_chain_is_that_of_finite_differences(kernel: str) -> None:
    step = 1e-6
    _, gradient = gradient_of(0.3, 0.05, mmd_kernel=kernel)
    for index, shift in enumerate([(step, 0.0), (0.0, step)]):
        up, _ = gradient_of(0.3 + shift[0], 0.05 + shift[1], mmd_kernel=kernel)
        down, _ = gradient_of(0.3 - shift[0], 0.05 - shift[1], mmd_kernel=kernel)
        torch.testing.assert_close((up - down) / (2 * step), gradient[index], rtol=1e-6, atol=1e-9)


def test_checkpoints_and_parts_change_nothing() -> None:
    _, whole = gradient_of(0.3, 0.05)
    _, again = gradient_of(0.3, 0.05, mmd_checkpoint=True)
    assert torch.equal(whole, again)
    for parts in (2, 5):
        _, parted = gradient_of(0.3, 0.05, accumulate=parts)
        torch.testing.assert_close(parted, whole, rtol=1e-12, atol=0)


def images(classes: int = 3) -> EDMDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(UNetConfig(width=8, multipliers=(1, 2), blocks=1), (1, 8, 8), classes)
    return EDMDenoiser(net, shape=(1, 8, 8), num_classes=classes).eval().requires_grad_(False)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_on_features_of_the_teacher_parts_change_nothing_but_rounding(checkpointed: bool) -> None:
    found = []
    for parts in (1, 3):
        method = distiller(images(), method="mmd", num_steps=2, accumulate=parts, mmd_checkpoint=checkpointed)
        assert method.notes() == {"mmd_features": "teacher", "mmd_kernel": "polynomial"}
        state = method.init(0)
        method.term.backward(state, batch(0, classes=3, shape=(1, 8, 8)))
        found.append(torch.cat([p.grad.flatten() for p in state.student.denoiser.parameters()]))  # type: ignore[union-attr]
        assert set(state.memory) == {"feature_mean", "feature_spread"}
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))
    assert all(p.grad is None for p in method.context.teacher.parameters())


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit() -> None:
    whole = distiller(images(), method="mmd", num_steps=2).init(0)
    kept: dict[str, Any] = {}
    for step in range(4):
        distiller(images(), method="mmd", num_steps=2).step(whole, batch(step, classes=3, shape=(1, 8, 8)))
        if step == 1:
            kept = copy.deepcopy(whole.state_dict())
    method = distiller(images(), method="mmd", num_steps=2)
    again = method.init(7)
    again.load_state_dict(kept)
    for step in (2, 3):
        method.step(again, batch(step, classes=3, shape=(1, 8, 8)))
    mine, theirs = pack(whole.state_dict())[0], pack(again.state_dict())[0]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_it_brings_a_student_close_to_the_data() -> None:
    ring = toy("ring8")
    real = ring.sample(6000, seed=0)
    method = distiller(ring, method="mmd", fit_steps=100, total_steps=150, lr=1e-3)
    state = method.init(0, lambda n: (real[:n], None))
    before = mmd(method.result(state, {}).sample(2000), real[4000:], "energy").value
    for step in range(150):
        chosen = torch.randint(4000, (128,), generator=torch.Generator().manual_seed(step))
        method.step(state, Batch(real[chosen]))
    after = mmd(method.result(state, {}).sample(2000), real[4000:], "energy").value
    assert after < 0.1 * before


def test_levels_of_the_chain() -> None:
    time = noise_path("vp")
    first = float(time.t_of_rho(20.0))
    uniform, quadratic = (mmd_sigmas(4, 20.0, 0.5, s) for s in ("uniform", "quadratic"))
    for levels, power in ((uniform, 1), (quadratic, 2)):
        shares = [float(time.t_of_rho(level)) / first for level in levels]
        assert shares == pytest.approx([1, 0.75**power, 0.5**power, 0.25**power], abs=1e-5)
    assert mmd_sigmas(1, 2.5, 0.5, "quadratic") == (2.5,)


@pytest.mark.parametrize("chain", ["stochastic", "ddim", "posterior"])
def test_every_chain_leaves_noise_of_the_next_level(chain: Any) -> None:
    kept, fresh = sampler_weights(chain, 2.0, 0.5)
    assert (2.0 * kept) ** 2 + fresh**2 == pytest.approx(0.25)


def test_two_steps_of_ddim_are_one_where_the_prediction_stays() -> None:
    x, x0 = normal(5, 2), normal(5, 2, seed=1)

    def step(x: Tensor, now: float, after: float) -> Tensor:
        kept, _ = sampler_weights("ddim", now, after)
        return x0 + kept * (x - x0)

    torch.testing.assert_close(step(step(x, 4.0, 1.5), 1.5, 0.2), step(x, 4.0, 0.2))


def test_a_chain_of_ddim_takes_one_noise() -> None:
    network = network_teacher()
    student = Student(network, (2.0, 0.5, 0.1), sampler="ddim")
    first, others = torch.randn(8, 2), [torch.randn(8, 2) for _ in range(4)]
    assert torch.equal(student([first, *others[:2]]), student([first, *others[2:]]))
    # It is what the samplers of this package call Euler.
    from distmatch.diffusion.solvers import solve

    expected = solve(network, 2.0 * first, [2.0, 0.5, 0.1, 0.0], "euler").y
    torch.testing.assert_close(student([first, *others[:2]]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mmd", "imm"])
def test_a_teacher_of_other_noise_is_refused(name: str) -> None:
    teacher = network_teacher()
    teacher.pfgm_dims = 8.0
    with pytest.raises(UserError, match=r"from Gaussian noise|with Gaussian noise"):
        distiller(teacher, method=name)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="has no features"):
        distiller(toy("ring8"), method="mmd", mmd_features="teacher")
    with pytest.raises(UserError, match="--mmd-bandwidth must be positive"):
        distiller(network_teacher(), method="mmd", mmd_bandwidth=0.0)
