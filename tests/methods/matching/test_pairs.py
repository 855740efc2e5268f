"""DMD's regression on pairs of noise and teacher sample."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.seeds import initial_noise
from distmatch.data.batches import Pool
from distmatch.diffusion.conditioning import Conditioning, FieldSpec
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.solvers import Solution, sample_teacher, solve
from distmatch.losses import pair_regression_loss
from distmatch.methods.matching import pairs
from distmatch.methods.matching.pairs import PairRegression, make_pairs
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import PAIR, batch, distiller, network_teacher


def regression(method: Any) -> PairRegression:
    """The one further term of a method."""
    (term,) = method.terms
    assert isinstance(term, PairRegression)
    return term


def step_of(method: Any, classes: int = 2, n: int = 32) -> Any:
    """A state after one step."""
    state = method.init(0)
    method.step(state, batch(0, classes, n))
    return state


def gradients(method: Any, n: int = 32) -> list[torch.Tensor]:
    """What the regression alone adds to the student's gradients at the start."""
    state = method.init(0)
    regression(method).backward(state, batch(0, 2, n))
    return [p.grad for p in state.student.denoiser.parameters() if p.grad is not None]


def test_pairs_lie_on_the_flow_of_the_teacher() -> None:
    """Gaussian data: y = m + s (x_T - m) / sqrt(s^2 + sigma_max^2) in each dimension, from x_T = sigma_max z.

    200 Heun steps are within 2e-3 of the exact flow; the last step from sigma_min adds 1e-5.
    """
    teacher = GaussianMixture([1.0], [[0.7, -0.3]], [0.5], sigma_max=20.0)
    made = make_pairs(teacher, 500, steps=200, seed=3, device="cpu", batch=128)
    mean = torch.tensor([0.7, -0.3])
    exact = mean + math.sqrt(0.5 / (0.5 + 400)) * (20.0 * made.noise - mean)
    torch.testing.assert_close(made.samples, exact, atol=2e-3, rtol=0)
    assert not made.conditioning(torch.arange(500))


def test_pairs_depend_on_the_seed_and_nothing_else() -> None:
    made = make_pairs(PAIR, 60, steps=5, seed=3, device="cpu", batch=17)
    again = make_pairs(PAIR, 60, steps=5, seed=3, device="cpu")
    assert_same_but_for_rounding(made.samples, again.samples)  # in parts of 17
    assert torch.equal(made.noise, initial_noise(60, (2,), 3))
    conditioning = made.conditioning(torch.arange(60))
    assert set(conditioning["label"].tolist()) == {0, 1}
    alone = sample_teacher(PAIR, 60, steps=5, conditioning=conditioning, seed=3)
    assert_same_but_for_rounding(made.samples, alone)
    other = make_pairs(PAIR, 60, steps=5, seed=4, device="cpu")
    assert not torch.equal(other.noise, made.noise)


def test_the_losses() -> None:
    x = torch.tensor([[3.0, -4.0], [0.1, 0.1]], dtype=torch.float64)
    y = torch.zeros_like(x)
    torch.testing.assert_close(
        pair_regression_loss(x, y, kind="squared", c=1.0), torch.tensor([12.5, 0.01]).double()
    )
    expected = torch.tensor([math.sqrt(12.5 + 0.04) - 0.2, math.sqrt(0.01 + 0.04) - 0.2]).double()
    torch.testing.assert_close(pair_regression_loss(x, y, kind="huber", c=0.2), expected)


@pytest.mark.parametrize(("kind", "weight"), [("squared", 0.25), ("huber", 2.0)])
def test_the_gradient_is_that_of_the_weighted_mean_loss(kind: Any, weight: float) -> None:
    """Against autograd on the loss written out, with the noise scaled to the student's own first level."""
    method = distiller(network_teacher(2), method="dmd", pair_loss=kind, pair_weight=weight, pairs=40)
    given = gradients(method)
    term = regression(method)
    made = term.pairs()
    state = method.init(0)
    chosen = torch.cdist(_drawn(term, state), made.noise).argmin(1)
    level = torch.full((32,), method.config.student_sigma * 0.7)
    prediction = state.student.denoiser(
        level[:, None] * made.noise[chosen], level, made.conditioning(chosen)["label"]
    )
    square = ((prediction - made.samples[chosen]) / 1.4).square().mean(1)  # as of data of 1/2
    c = 0.1 * 0.5  # pair_c in units of the teacher's sigma_data
    loss = square if kind == "squared" else (square + c**2).sqrt() - c
    expected = torch.autograd.grad(
        weight * loss.mean(), list(state.student.denoiser.parameters()), allow_unused=True
    )
    for a, b in zip(given, [g for g in expected if g is not None], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def _drawn(term: PairRegression, state: Any) -> torch.Tensor:
    """The noise of the pairs that the regression uses at a state, as the student is given it."""
    seen: list[torch.Tensor] = []
    handle = state.student.denoiser.register_forward_hook(lambda _m, given, _out: seen.append(given[0]))
    term.backward(state, batch(0, 2))
    handle.remove()
    (x,) = seen
    return x.detach() / state.student.sigmas[0]


def test_a_student_that_is_the_map_is_left_alone() -> None:
    method = distiller(network_teacher(2), method="dmd", pairs=32)
    term = regression(method)
    state = method.init(0)
    made = term.pairs()
    own = state.student.denoiser(
        state.student.sigmas[0] * made.noise,
        torch.full((32,), state.student.sigmas[0]),
        made.conditioning(torch.arange(32)),
    )
    made.samples.copy_(own.detach())
    info = term.backward(state, batch(0, 2))
    assert float(info["loss_pairs"]) < 1e-10
    assert all(
        p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in state.student.denoiser.parameters()
    )


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    whole = gradients(distiller(network_teacher(2), method="dmd", pairs=40))
    parts = gradients(distiller(network_teacher(2), method="dmd", pairs=40, accumulate=3))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_run_that_was_stopped_goes_on_to_the_bit() -> None:
    straight = distiller(network_teacher(2), method="dmd", pairs=40)
    state = straight.init(0)
    for step in range(3):
        straight.step(state, batch(step, 2))
    saved = copy.deepcopy(state.state_dict())
    for step in range(3, 5):
        straight.step(state, batch(step, 2))
    second = distiller(network_teacher(2), method="dmd", pairs=40)
    resumed = second.init(0)
    resumed.load_state_dict(saved)
    for step in range(3, 5):
        second.step(resumed, batch(step, 2))
    for a, b in zip(state.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dmd_is_diff_instruct_at_one_critic_step_where_the_weight_vanishes() -> None:
    plain = step_of(distiller(network_teacher(2), method="diff-instruct", fake_score_steps=1))
    tiny = step_of(
        distiller(network_teacher(2), method="dmd", fake_score_steps=1, pair_weight=1e-30, pairs=8)
    )
    for a, b in zip(plain.student.parameters(), tiny.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pairs_are_those_of_the_guided_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(teacher: Any, start: torch.Tensor, levels: Any, **more: Any) -> Solution:
        found = solve(teacher, start, levels, **more)
        calls.append(found.calls * len(start))
        return found

    monkeypatch.setattr(pairs, "solve", counted)
    method = distiller(PAIR, method="dmd", guidance=2.0, pairs=40, pair_steps=6, fit_steps=1)
    term = regression(method)
    term.prepare(method.init(0), 0)
    made = term.pairs()
    told = made.conditioning(torch.arange(40))
    guided = sample_teacher(Guided(PAIR, 2.0), 40, steps=6, conditioning=told, seed=term._seed)
    torch.testing.assert_close(made.samples, guided)
    assert term.config.pair_calls == sum(calls)


@pytest.mark.statistical
def test_the_regression_brings_a_lost_mode_back() -> None:
    """A score difference between two distant modes pulls nothing across; the pairs do.

    Modes at -3 and 3, and a fresh network: after 150 steps of the regression alone half of the noise goes
    left. 0.5 is exact; the bound is 5 standard errors of 2000 samples.
    """
    teacher = GaussianMixture([0.5, 0.5], [[-3.0], [3.0]], [0.01, 0.01], sigma_max=20.0)
    method = distiller(teacher, method="dmd", pairs=500, fit_steps=1, student_sigma=0.0)
    state = method.init(0)
    term = regression(method)
    optimizer = torch.optim.Adam(state.student.denoiser.parameters(), 1e-2)
    for step in range(150):
        state.step = step
        optimizer.zero_grad()
        term.backward(state, batch(step, 0, 128, (1,)))
        optimizer.step()
    x = state.student.sample(2000, seed=9)
    assert float((x < 0).double().mean()) == pytest.approx(0.5, abs=0.056)


def test_pairs_under_prompts_have_a_row_of_the_pool_and_a_scale_each() -> None:
    """Rows are drawn once: the network sees the field of its row at every call, and its scale."""
    seen: list[torch.Tensor] = []

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, *, text: Any, guidance: Any) -> torch.Tensor:
            seen.append(torch.stack([text, guidance], 1))
            return x / (1 + t[:, None])

    spec = {"text": FieldSpec(), "guidance": FieldSpec()}
    teacher = dm.as_denoiser(Net(), "edm", "x0", shape=(2,), conditioning=spec, sigma_data=1.0)
    rows = Conditioning({"text": torch.arange(5.0), "guidance": torch.zeros(5)})
    pool = Pool(5, rows.index)
    common: Any = {"steps": 2, "seed": 1, "device": "cpu", "pool": pool, "guidance_range": (2.0, 6.0)}
    made = make_pairs(teacher, 40, batch=40, **common)
    told = made.conditioning(torch.arange(40))
    for given in seen:
        assert torch.equal(given, torch.stack([told["text"], told["guidance"]], 1))
    assert set(told["text"].tolist()) == set(range(5))
    assert told["guidance"].min() >= 2
    assert told["guidance"].max() <= 6
    assert len(told["guidance"].unique()) == 40
    assert_same_but_for_rounding(make_pairs(teacher, 40, batch=7, **common).samples, made.samples)
    with pytest.raises(UserError, match="need the prompts"):
        make_pairs(teacher, 4, steps=2, seed=0, device="cpu")


def test_several_calls_are_refused() -> None:
    with pytest.raises(UserError, match="one noise to one sample"):
        distiller(network_teacher(2), method="dmd", num_steps=3)


@pytest.mark.parametrize("name", ["pairs", "pair_steps", "pair_weight", "pair_c"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(UserError, match=name.replace("_", "-")):
        distiller(network_teacher(2), method="dmd", **{name: 0})
