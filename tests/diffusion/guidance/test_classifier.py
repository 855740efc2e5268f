"""Guidance by classifiers, with gradients and without. Posteriors are exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import expand, is_diffused, score
from distmatch.diffusion.guidance import (
    CallCounter,
    ClassifierGuided,
    GradientFree,
    Guided,
    NoisyClassifier,
    classifier_loss,
    confusion_scale,
    fit_noisy_classifier,
)
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import LogNormal
from distmatch.diffusion.solvers import grid, sample_teacher, solve
from tests.helpers.small import network_teacher

WEIGHTS, MEANS = [0.5, 0.3, 0.2], [[-1.0, 0.2], [1.0, 0.5], [0.3, -1.2]]
TEACHER = GaussianMixture(WEIGHTS, MEANS, [0.05, 0.1, 0.2], [0, 1, 2], sigma_max=20.0)
GENERATOR = torch.Generator().manual_seed(0)
X = 2 * torch.randn(24, 2, dtype=torch.float64, generator=GENERATOR)
SIGMA = torch.linspace(0.1, 3, 24, dtype=torch.float64)
LABELS = torch.arange(24) % 3


def posterior(x: Tensor, sigma: Tensor | float, teacher: GaussianMixture = TEACHER) -> Tensor:
    """log p(class, x) of the noised mixture, (B, classes): exact logits."""
    columns = []
    for c in range(teacher.num_classes):
        share = teacher.weights[teacher.classes == c].sum().log()
        columns.append(share + teacher.log_prob(x, sigma, torch.full((len(x),), c)))
    return torch.stack(columns, dim=1)


def test_the_gradient_of_the_posterior_is_the_difference_of_the_scores() -> None:
    got = score(ClassifierGuided(TEACHER, posterior, 1.0), X, SIGMA, LABELS) - score(TEACHER, X, SIGMA)
    expected = TEACHER.score(X, SIGMA, LABELS) - TEACHER.score(X, SIGMA)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("w", [-0.5, 1.0, 3.0])
def test_with_the_exact_posterior_it_is_classifier_free_guidance(w: float) -> None:
    some = torch.where(LABELS == 1, -1, LABELS)
    expected = Guided(TEACHER, w)(X, SIGMA, some)
    with torch.no_grad():
        got = ClassifierGuided(TEACHER, posterior, w)(X, SIGMA, some)
        above = ClassifierGuided(TEACHER, posterior, w - 1, conditional=True)(X, SIGMA, some)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(above, expected, rtol=0, atol=1e-8)
    assert not got.requires_grad
    limited = {"interval": (0.5, 2.0)}
    torch.testing.assert_close(
        ClassifierGuided(TEACHER, posterior, w - 1, conditional=True, **limited)(X, SIGMA, LABELS),
        Guided(TEACHER, w, **limited)(X, SIGMA, LABELS),
        rtol=0, atol=1e-8,
    )  # fmt: skip


def test_samples_of_an_unconditional_model_are_those_of_the_class() -> None:
    plain = GaussianMixture(WEIGHTS, MEANS, [0.05, 0.1, 0.2], sigma_max=20.0)
    levels, conditioning = grid("karras", 8, 0.05, 20.0), torch.full((24,), 2)
    limited = ClassifierGuided(plain, posterior, 1.0, num_classes=3)
    assert limited.num_classes == 3
    got = solve(limited, 20 * X, levels, "heun", conditioning=conditioning)
    expected = solve(TEACHER, 20 * X, levels, "heun", conditioning=conditioning)
    torch.testing.assert_close(got.y, expected.y, rtol=0, atol=1e-8)
    assert got.calls == 15
    assert torch.equal(limited(X, SIGMA), plain(X, SIGMA))


def test_a_caller_may_differentiate_it() -> None:
    x = X.clone().requires_grad_()
    weights = torch.randn(X.shape, dtype=torch.float64, generator=GENERATOR)
    slopes = []
    for model in (Guided(TEACHER, 2.0), ClassifierGuided(TEACHER, posterior, 2.0)):
        out = model(x, SIGMA, LABELS)
        slopes.append(torch.autograd.grad((weights * out).sum(), x)[0])
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-8)


def test_a_clean_classifier_pulls_through_the_posterior_covariance() -> None:
    # sigma^2 J^T g with J = Cov[x0 | x] / sigma^2, g the classifier's gradient at the prediction.
    def clean(x: Tensor, sigma: Tensor) -> Tensor:
        return posterior(x, 0.0)

    teacher = CallCounter(TEACHER)
    guided = ClassifierGuided(teacher, clean, 0.7, on="clean")
    got = guided(X, SIGMA, LABELS)
    assert teacher.calls == 1  # the pass that is differentiated is the prediction
    main = TEACHER(X, SIGMA).requires_grad_()
    chosen = clean(main, SIGMA).log_softmax(1)[torch.arange(24), LABELS]
    (g,) = torch.autograd.grad(chosen.sum(), main)
    pulled = torch.einsum("bde,be->bd", TEACHER.posterior_covariance(X, SIGMA), g)
    torch.testing.assert_close(got, main.detach() + 0.7 * pulled, rtol=1e-8, atol=1e-8)
    assert not got.requires_grad


def test_a_target_leaves_the_condition_to_the_denoiser() -> None:
    aimed = ClassifierGuided(TEACHER, posterior, 2.0, target=1)
    slope = TEACHER.score(X, SIGMA, torch.full((24,), 1)) - TEACHER.score(X, SIGMA)
    for conditioning in (None, LABELS):
        expected = TEACHER(X, SIGMA, conditioning) + 2 * expand(SIGMA, X) ** 2 * slope
        torch.testing.assert_close(aimed(X, SIGMA, conditioning), expected, rtol=0, atol=1e-8)
    assert not is_diffused(aimed)


def test_features_are_those_of_the_main_pass() -> None:
    teacher = network_teacher(classes=3)
    x, sigma = X.float(), SIGMA.float()
    net = NoisyClassifier(3, (2,)).eval()
    for wrapper in (
        ClassifierGuided(teacher, net, 2.0),
        ClassifierGuided(teacher, net, 2.0, on="clean"),
        GradientFree(teacher, lambda x: net(x, sigma), 2.0),
    ):
        prediction, features = wrapper(x, sigma, LABELS, return_features=True)
        told = LABELS if isinstance(wrapper, GradientFree) else None
        torch.testing.assert_close(prediction, wrapper(x, sigma, LABELS))
        torch.testing.assert_close(features, teacher(x, sigma, told, return_features=True)[1])
        assert not any(f.requires_grad for f in features)


# The noisy classifier.


@pytest.mark.slow
def test_a_trained_classifier_is_the_posterior() -> None:
    # At the levels it was trained for, its probabilities are within a few percent of the exact ones.
    x0, labels = TEACHER.sample_with_components(8000, seed=1)
    net = _classifier(3, (2,), sigma_data=TEACHER.sigma_data)
    assert torch.equal(net(x0[:2], torch.ones(2)), torch.zeros(2, 3))
    levels = LogNormal(-0.7, 1.0)
    losses = fit_noisy_classifier(net, x0, labels, levels=levels, steps=700, lr=3e-3, seed=2)
    assert losses[0] > losses[-1]
    fresh, wanted = TEACHER.sample_with_components(4000, seed=3)
    sigma = levels.sample(4000, torch.Generator().manual_seed(4))
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        mine = float(classifier_loss(net, fresh, wanted, sigma, noise))
        noised = fresh + expand(sigma, fresh) * noise
        exact = posterior(noised.double(), sigma.double()).softmax(1)
        best = -float(exact[torch.arange(4000), wanted].log().mean())
        gap = (net(noised, sigma).softmax(1) - exact).abs().mean()
    assert mine - best < 0.02  # nats above the entropy that is left, of log 3 = 1.1 at the start
    assert float(gap) < 0.03
    assert not net.training


def test_a_classifier_on_features_leaves_the_teacher_alone() -> None:
    teacher = network_teacher().requires_grad_(True)
    x0, labels = TEACHER.sample_with_components(500, seed=1)
    net = _classifier(3, (2,), features=teacher)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in teacher.parameters()}
    losses = fit_noisy_classifier(net, x0, labels, steps=60, batch=64, lr=3e-3)
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in teacher.parameters())
    # The gradient of guidance comes through the teacher: it is that of finite differences.
    guided = ClassifierGuided(teacher.double(), net.double(), 1.0, conditional=False)
    with torch.no_grad():
        moved = (guided(X, SIGMA, LABELS) - teacher(X, SIGMA)) / expand(SIGMA, X) ** 2
        step = 1e-5 * torch.tensor([1.0, 0.0])
        ends = [net(X + h, SIGMA).log_softmax(1)[torch.arange(24), LABELS] for h in (step, -step)]
    torch.testing.assert_close(moved[:, 0], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-7)


def _classifier(*arguments: object, **options: object) -> NoisyClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NoisyClassifier(*arguments, width=64, **options)  # type: ignore[arg-type]


# Without gradients.


def test_the_reference_is_the_likeliest_other_class() -> None:
    def classifier(x: Tensor) -> Tensor:
        return posterior(x, 0.3)

    some = torch.where(torch.arange(24) < 4, -1, LABELS)
    got = GradientFree(TEACHER, classifier, 3.0)(X, SIGMA, some)
    for i in range(24):
        x, sigma, label = X[i : i + 1], SIGMA[i : i + 1], some[i : i + 1]
        main = TEACHER(x, sigma, label)
        if i >= 4:
            p = classifier(main)[0].softmax(0).tolist()
            asked = p[int(label)]
            other = max((c for c in range(3) if c != int(label)), key=lambda c: p[c])
            w = 1 + 2 * p[other] / (asked + p[other])
            main = main + (w - 1) * (main - TEACHER(x, sigma, torch.tensor([other])))
        torch.testing.assert_close(got[i : i + 1], main, rtol=1e-9, atol=1e-10)


def test_no_confusion_is_no_guidance_and_no_graph_is_built() -> None:
    seen: list[bool] = []
    layer = nn.Linear(2, 3).double()

    def sure(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled() or layer(x).requires_grad)
        return 1000 * nn.functional.one_hot(LABELS, 3)

    free = GradientFree(TEACHER, sure, 5.0)
    assert torch.equal(free(X, SIGMA, LABELS), TEACHER(X, SIGMA, LABELS))
    assert seen == [False]
    scales = confusion_scale(4.0)(torch.tensor([1.0, 0.4, 0.0]), torch.tensor([0.0, 0.4, 0.7]))
    assert scales.tolist() == pytest.approx([1.0, 2.5, 4.0])
    # Ones own schedule, and a weaker model as reference: at a constant w it is autoguidance by that class.
    weak = GaussianMixture(WEIGHTS, MEANS, [0.3] * 3, [0, 1, 2])
    own = GradientFree(TEACHER, lambda x: posterior(x, 0.3), lambda p, q: 1 + 0 * p + 1.0, reference=weak)
    main = TEACHER(X, SIGMA, LABELS)
    other = posterior(main, 0.3).scatter(1, LABELS[:, None], -math.inf).argmax(1)
    torch.testing.assert_close(own(X, SIGMA, LABELS), 2 * main - weak(X, SIGMA, other))


def test_accuracy_rises_with_the_scale() -> None:
    # Two overlapping classes: the guided samples are more often those that the classifier gives the class.
    pair = GaussianMixture([0.5, 0.5], [[-0.5, 0.0], [0.5, 0.0]], [0.4, 0.4], [0, 1], sigma_max=20.0)
    labels = torch.arange(2000) % 2
    accuracies = []
    for scale in (1.0, 1.5, 2.0, 4.0):
        free = GradientFree(pair, lambda x: posterior(x, 0.0, pair), scale)
        x = sample_teacher(free, 2000, steps=18, conditioning=labels, seed=0)
        accuracies.append(float((posterior(x.double(), 0.0, pair).argmax(1) == labels).double().mean()))
    expected = 0.5 * (1 + math.erf(0.5 / math.sqrt(0.4 * 2)))  # 0.785 for exact samples
    assert accuracies[0] == pytest.approx(expected, abs=0.03)
    assert all(b > a + 0.02 for a, b in pairwise(accuracies)), accuracies


class Blind(nn.Module):
    num_classes = 3

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x.detach() @ torch.ones(2, 3, dtype=x.dtype)


PLAIN = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
NET = NoisyClassifier(3, (2,), width=4)
ONE = torch.zeros(4, 2)
WRONG: dict[str, Callable[[], object]] = {
    "input of a classifier": lambda: ClassifierGuided(TEACHER, posterior, 1.0, on="nosy"),
    "number of classes is not known": lambda: ClassifierGuided(PLAIN, posterior, 1.0),
    "target": lambda: ClassifierGuided(TEACHER, posterior, 1.0, target=3),
    "have other classes": lambda: ClassifierGuided(PLAIN, NET, 1.0, conditional=True),
    "finite": lambda: ClassifierGuided(TEACHER, posterior, math.inf),
    "0 <= low": lambda: ClassifierGuided(TEACHER, posterior, 1.0, interval=(3.0, 1.0)),
    "one logit for each class": lambda: ClassifierGuided(TEACHER, lambda x, s: x, 1.0)(X, SIGMA, LABELS),
    "cannot be differentiated": lambda: ClassifierGuided(PLAIN, Blind(), 1.0)(X, SIGMA, LABELS),
    "must be a fixed": lambda: ClassifierGuided(TEACHER, nn.Sequential(nn.BatchNorm1d(2)), 1.0),
    "no features": lambda: ClassifierGuided(TEACHER, posterior, 1.0)(X, SIGMA, return_features=True),
    "number of classes": lambda: NoisyClassifier(1, (2,)),
    "one class each": lambda: fit_noisy_classifier(NET, ONE, torch.zeros(3, dtype=torch.int64)),
    "label is no class": lambda: fit_noisy_classifier(NET, ONE, torch.tensor([0, 1, -1, 2])),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named(message: str) -> None:
    with pytest.raises(UserError, match=message):
        WRONG[message]()
