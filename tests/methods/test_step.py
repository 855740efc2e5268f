"""What a step of distillation does: special cases, gradients, who learns when, guidance, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from distmatch.diffusion.conditioning import as_conditioning
from distmatch.diffusion.denoiser import expand
from distmatch.divergences import NAMES
from distmatch.losses import adversarial_generator_loss, score_difference
from distmatch.methods.matching.loop import Matching
from distmatch.methods.matching.networks import predictions
from distmatch.methods.state import DistillState
from distmatch.ratio.normalizer import RatioNormalizer
from tests.helpers.small import PAIR, batch, distiller, network_teacher


def weights(state: DistillState) -> dict[str, list[Tensor]]:
    """A copy of every parameter by network."""
    return {name: [p.detach().clone() for p in net.parameters()] for name, net in state.modules().items()}


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(method: Matching, steps: int, seed: int = 0) -> DistillState:
    state = method.init(seed)
    for step in range(steps):
        method.step(state, batch(step, method.teacher.num_classes))
    return state


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("features", ["teacher", "own", "fake"])
def test_f_distill_with_reverse_kl_is_dmd2_to_the_bit(features: str, classes: int) -> None:
    teacher = network_teacher(classes)
    one = run(distiller(teacher, "reverse_kl", gan_weight=0.1, ratio_features=features), 9)
    two = run(distiller(teacher, method="dmd2", gan_weight=0.1, ratio_features=features), 9)
    assert one.updates == 4
    for name, parameters in weights(one).items():
        assert same(parameters, weights(two)[name]), name


@pytest.mark.parametrize("order", ["same-batch", "alternate"])
def test_f_distill_with_reverse_kl_and_no_adversary_is_diff_instruct_to_the_bit(order: str) -> None:
    teacher = network_teacher()
    one = run(distiller(teacher, "reverse_kl", gan_weight=0.0, r1=1.0, order=order), 9)
    two = run(distiller(teacher, method="diff-instruct", order=order), 9)
    assert one.discriminator is not None  # it learns, and changes nothing else
    assert two.discriminator is None
    assert one.updates == 4
    for name, parameters in weights(two).items():
        assert same(parameters, weights(one)[name]), name
    assert not same(weights(one)["student"], list(teacher.parameters()))


def test_an_ignorant_discriminator_makes_all_divergences_equal() -> None:
    teacher = network_teacher()
    results = {}
    for name in [n for n in NAMES if n != "tv"]:
        method = distiller(teacher, name, gan_weight=0.0, lr=1e-2)
        state = method.init(0)
        ignorant = copy.deepcopy(state.discriminator.state_dict())  # type: ignore[union-attr]
        for step in range(2):  # the fake score learns in the first step, the student moves in the second
            method.step(state, batch(step))
            state.discriminator.load_state_dict(ignorant)  # type: ignore[union-attr]
        results[name] = torch.cat([p.flatten() for p in weights(state)["student"]])
    start = torch.cat([p.flatten() for p in teacher.parameters()])
    assert (results["reverse_kl"] - start).abs().max() > 1e-3
    for result in results.values():
        # h / mean(h) may miss 1 by one rounding (6e-8), which Adam's first step divides out again.
        torch.testing.assert_close(result, results["reverse_kl"], rtol=1e-6, atol=1e-8)


def test_divergences_differ_once_the_discriminator_knows_something() -> None:
    teacher = network_teacher()
    ends = {
        n: weights(run(distiller(teacher, n, gan_weight=0.0), 12))["student"] for n in ("kl", "js", "neyman")
    }
    assert not same(ends["kl"], ends["js"])
    assert not same(ends["kl"], ends["neyman"])


@pytest.mark.parametrize("scaling", ["dmd2", "score"])
def test_a_critic_equal_to_the_teacher_is_a_fixed_point(scaling: str) -> None:
    method = distiller(network_teacher(), "js", gan_weight=0.0, fake_score_steps=1, scaling=scaling)
    state = method.init(0)  # student and fake score start as copies of the teacher
    before = weights(state)["student"]
    info = method.step(state, batch(0))
    assert float(info["grad_dm"]) == 0
    assert float(info["loss_student"]) == 0
    assert same(weights(state)["student"], before)
    assert not same(weights(state)["fake"], before)  # the student is not the teacher: its fake score moves on


def student_step(
    method: Matching, state: DistillState, labels: Tensor | None, n: int = 32
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One student step; its samples, the gradient that reached them, and a recomputation of that gradient."""
    told = as_conditioning(labels)
    x, call = method._simulate(state, n, told)
    x0 = method._call(state, x, call, told, True)
    x0.retain_grad()
    again = torch.Generator()
    again.set_state(state.generator.get_state())
    with torch.no_grad():
        sigma = method.noise.sample(n, again)
        clean = x0.detach()
        x = clean + expand(sigma, clean) * torch.randn(clean.shape, generator=again)
        teacher, logit = method.teacher(x, sigma, labels), None
        fake = state.fake_score(x, sigma, labels)
    parts = {"teacher": teacher, "fake": fake, "sigma": sigma, "x": x}
    normalizer = RatioNormalizer(state.normalizer.config)
    if state.discriminator is not None:
        leaf = x.clone().requires_grad_()
        if method.compared.source == "own":
            logit = state.discriminator(leaf, sigma, labels)
        else:
            lender = method.teacher if method.compared.source == "teacher" else state.fake_score
            logit = state.discriminator(lender(leaf, sigma, labels, return_features=True)[1], sigma, labels)
        weigh = method.context.divergence.weight
        parts["weight"] = normalizer.update(logit, method.noise.cdf(sigma), weigh).weight
        adversarial = method.config.gan_weight * adversarial_generator_loss(logit).mean()
        (parts["adversarial"],) = torch.autograd.grad(adversarial, leaf)
    method._backward(state, x0, x, call, labels, method._gradient(state, x0.detach(), x, call, told).gradient)
    return x0, x0.grad, parts  # type: ignore[return-value]


@pytest.mark.parametrize("gan_weight", [0.0, 0.3])
@pytest.mark.parametrize("features", ["teacher", "fake", "own"])
def test_the_samples_receive_exactly_the_weighted_score_difference(features: str, gan_weight: float) -> None:
    teacher = network_teacher(3).requires_grad_(True)  # even a teacher that forgot to freeze gets nothing
    method = distiller(teacher, "kl", ratio_features=features, gan_weight=gan_weight, lr_discriminator=0.05)
    state = run(method, 6)
    state.normalizer = RatioNormalizer(state.normalizer.config)
    x0, received, parts = student_step(method, state, torch.arange(32) % 3)
    g = score_difference(parts["teacher"], parts["fake"], x0, parts["sigma"], parts["weight"])
    g = g / (2 * teacher.sigma_data)  # in the length in which the data have a standard deviation of 1/2
    assert parts["weight"].std() > 0.02
    if gan_weight > 0:
        assert parts["adversarial"].abs().max() > 1e-6
    # Samples in another unit, and a teacher's pass that is part of a graph: both differ by roundings.
    torch.testing.assert_close(received, g / g.numel() + parts["adversarial"], rtol=1e-4, atol=1e-8)
    for net in (teacher, state.fake_score, state.discriminator):
        assert all(p.grad is None for p in net.parameters())  # type: ignore[union-attr]


def test_without_a_ratio_the_samples_receive_the_plain_score_difference() -> None:
    method = distiller(network_teacher(), method="diff-instruct", scaling="score")
    state = run(method, 5)
    x0, received, parts = student_step(method, state, None)
    g = (parts["fake"] - parts["teacher"]) / expand(parts["sigma"], x0) ** 2
    torch.testing.assert_close(received, g / g.numel())


def test_the_critic_never_reaches_the_student_and_frozen_features_stay_frozen() -> None:
    teacher = network_teacher().requires_grad_(True)
    for features in ("teacher", "fake", "own"):
        method = distiller(teacher, "js", ratio_features=features, r1=0.5)
        state = method.init(0)
        fake = state.fake_score.net.trunk.first.weight
        method.step(state, batch(0))  # fake_score_steps is 2: the first step is the fake score's alone
        assert all(p.grad is None for p in state.student.parameters())
        assert all(p.grad is None for p in teacher.parameters())
        assert not torch.equal(fake, teacher.net.trunk.first.weight)


ORDERS = {
    # fake_score_steps 3: the student moves at steps 2, 5, 8 (counted from 0), not before the warm-up is over.
    ("same-batch", 0): ({2, 5, 8}, set(range(9))),
    ("alternate", 0): ({2, 5, 8}, {0, 1, 3, 4, 6, 7}),
    ("same-batch", 4): ({5, 8}, set(range(9))),
    ("alternate", 4): ({5, 8}, {0, 1, 2, 3, 4, 6, 7}),
}


@pytest.mark.parametrize(("order", "warmup"), ORDERS)
def test_who_learns_at_which_step(order: str, warmup: int) -> None:
    method = distiller(
        network_teacher(), "js", fake_score_steps=3, order=order, warmup_steps=warmup, gan_weight=0.1
    )
    state = method.init(0)
    moved: dict[str, set[int]] = {name: set() for name in state.modules()}
    for step in range(9):
        before = weights(state)
        info = method.step(state, batch(step))
        for name, after in weights(state).items():
            if not same(before[name], after):
                moved[name].add(step)
        assert ("grad_dm" in info) == (step in ORDERS[order, warmup][0])
        assert ("loss_fake" in info) == (step in ORDERS[order, warmup][1])
    student, critic = ORDERS[order, warmup]
    assert moved == {"student": student, "average": student, "fake": critic, "ratio": critic}
    assert state.step == 9
    assert state.updates == len(student)


def test_learning_rates_follow_the_schedule() -> None:
    method = distiller(
        network_teacher(),
        "js",
        lr=1e-3,
        lr_fake_score=2e-3,
        lr_discriminator=4e-3,
        lr_rampup=4,
        lr_decay="cosine",
        total_steps=8,
    )
    state = method.init(0)
    seen = []
    for step in range(8):
        method.step(state, batch(step))
        seen.append([state.optimizers[k].param_groups[0]["lr"] for k in ("student", "fake", "ratio")])
    # ramp (step + 1) / 4 up to 1, times (1 + cos(pi step / 8)) / 2.
    cosine = [0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * s / 8)))) for s in range(8)]
    factor = [min(1, (s + 1) / 4) * c for s, c in enumerate(cosine)]
    assert [row[1] for row in seen] == pytest.approx([2e-3 * f for f in factor], rel=1e-5)
    assert [row[2] for row in seen] == pytest.approx([4e-3 * f for f in factor], rel=1e-5)
    assert [row[0] for row in seen[1::2]] == pytest.approx([1e-3 * f for f in factor[1::2]], rel=1e-5)


@pytest.mark.parametrize("features", ["own", "teacher"])
def test_the_teacher_is_guided_and_the_critic_is_not(features: str) -> None:
    teacher = PAIR if features == "own" else network_teacher(2)
    method = distiller(teacher, "js", guidance=2.5, ratio_features=features)
    state = run(method, 4)
    x, sigma, y = (
        torch.randn(16, 2, generator=torch.Generator().manual_seed(0)),
        torch.linspace(0.1, 9, 16),
        torch.arange(16) % 2,
    )
    with torch.no_grad():
        mine, fake, logit = predictions(method.compared, state, x, sigma, as_conditioning(y))
        plain, none = teacher(x, sigma, y), teacher(x, sigma, torch.full_like(y, -1))
        rounding = {"rtol": 1e-5, "atol": 1e-6}  # two batches against one of twice the size
        torch.testing.assert_close(mine, none + 2.5 * (plain - none), **rounding)
        assert (mine - plain).abs().max() > 0.01
        assert torch.equal(fake, state.fake_score(x, sigma, y))
        head = state.discriminator
        lent = (x,) if features == "own" else (teacher(x, sigma, y, return_features=True)[1],)
        torch.testing.assert_close(logit, head(*lent, sigma, y), **rounding)  # type: ignore[misc]


def test_an_unconditional_teacher_ignores_labels() -> None:
    method = distiller(network_teacher(), "js")
    one, two = method.init(0), method.init(0)
    for step in range(4):
        x = batch(step).x
        method.step(one, batch(step))
        method.step(two, type(batch(0))(x, torch.arange(len(x)) % 7))
    assert same(weights(one)["student"], weights(two)["student"])


def test_the_same_seed_gives_the_same_run_whatever_torch_was_asked_before() -> None:
    method = distiller(network_teacher(dropout=0.5), "js", gan_weight=0.1)
    torch.manual_seed(1)
    one = weights(run(method, 4))
    torch.manual_seed(2)  # dropout would draw from here; distillation has none
    two = weights(run(method, 4))
    other = weights(run(method, 4, seed=1))
    assert all(same(one[name], two[name]) for name in one)
    assert not same(one["student"], other["student"])
