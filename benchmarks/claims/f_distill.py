"""What is claimed of divergences: f-distill's orderings, and methods of other divergences."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from claim import Claim, Measured
from numpy.typing import NDArray
from students import LEARN, SEEDS, Run, mean, side_by_side

from distmatch.base.seeds import generator
from distmatch.data import toy
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences import divergence
from distmatch.losses import score_difference
from distmatch.metrics.modes import mode_counts

sys.path.append(str(Path(__file__).parents[1]))
import mode_coverage

BENCHMARKS = Path(__file__).parents[1]
Reals = NDArray[np.float64]
PAPER = "Xu et al. 2025, arXiv 2502.15681"

# f of r = p/q as in the paper's table 1, in the scale of distmatch (divergences.md).
F: dict[str, Callable[[Reals], Reals]] = {
    "reverse_kl": lambda r: -np.log(r),
    "softened_reverse_kl": lambda r: (r + 1) * np.log(0.5 + 0.5 / r),
    "js": lambda r: 0.5 * (r * np.log(r) - (r + 1) * np.log((r + 1) / 2)),
    "hellinger": lambda r: (1 - np.sqrt(r)) ** 2,
    "kl": lambda r: r * np.log(r),
    "jeffreys": lambda r: (r - 1) * np.log(r),
}


def _normal(x: Reals, mean_: float, variance: float) -> Reals:
    return np.exp(-0.5 * (x - mean_) ** 2 / variance) / math.sqrt(2 * math.pi * variance)


def gradient() -> Measured:
    """The gradient that is assembled from scores and weights, against differences of the divergence."""
    x = np.linspace(-14, 14, 20_001)
    step, dx = 1e-4, float(x[1] - x[0])
    worst = []
    for seed in range(8):
        gen = np.random.default_rng(seed)
        share, sigma = gen.uniform(0.2, 0.8), gen.uniform(0.3, 1.5)
        centers, variances = gen.normal(0, 1, 2), gen.uniform(0.3, 1.5, 2)
        at = np.array([gen.normal(0, 0.5), gen.uniform(0.6, 1.4)])
        p = sum(
            w * _normal(x, float(m), float(v) + sigma**2)
            for w, m, v in zip((share, 1 - share), centers, variances, strict=True)
        )

        def value(f: Callable[[Reals], Reals], theta: Reals, p: Reals = p, sigma: float = sigma) -> float:
            q = _normal(x, float(theta[0]), float(theta[1]) ** 2 + sigma**2)
            return float((q * f(p / q)).sum() * dx)

        z, mass = np.polynomial.hermite_e.hermegauss(100)
        pairs = torch.cartesian_prod(torch.from_numpy(z), torch.from_numpy(z))
        weights = torch.from_numpy(np.outer(mass, mass).ravel() / (2 * math.pi))
        theta = torch.tensor(at, requires_grad=True)
        x0 = (theta[0] + theta[1] * pairs[:, :1]).double()
        noised, level = (x0 + sigma * pairs[:, 1:]).detach(), torch.full((len(pairs),), sigma).double()
        teacher = GaussianMixture([share, 1 - share], centers[:, None].tolist(), variances.tolist())
        student = GaussianMixture([1.0], [[float(at[0])]], [float(at[1]) ** 2])
        log_r = teacher.log_prob(noised, level) - student.log_prob(noised, level)
        errors = []
        for name, f in F.items():
            h = divergence(name).weight(log_r)
            g = score_difference(
                teacher(noised, level), student(noised, level), x0, level, h, scaling="score"
            )
            (ours,) = torch.autograd.grad(x0, theta, g * weights[:, None], retain_graph=True)
            shifts = np.eye(2) * step
            true = np.array([(value(f, at + s) - value(f, at - s)) / (2 * step) for s in shifts])
            errors.append(float(np.linalg.norm(ours.numpy() - true) / np.linalg.norm(true)))
        worst.append(max(errors))
    return Measured(differences=worst, unit="relative error", figures={"largest": max(worst)}, alike=1e-5)


def variance() -> Measured:
    """Var h / (E h)^2 under q = N(0, 1), of p = N(d, 1)."""
    high, low = ("kl", "jeffreys"), ("js", "hellinger", "softened_reverse_kl")
    found: dict[str, list[float]] = {f"{name}, d = {d}": [] for d in (1, 2) for name in (*high, *low)}
    differences = []
    for block in range(10):
        x = torch.randn(100_000, generator=generator(block, "claims/variance"), dtype=torch.float64)
        for d in (1, 2):
            for name in (*high, *low):
                h = divergence(name).weight(d * x - d * d / 2)
                found[f"{name}, d = {d}"].append(float(h.var() / h.mean() ** 2))
        at_one = {name: found[f"{name}, d = 1"][-1] for name in (*high, *low)}
        differences.append(min(at_one[name] for name in high) - max(at_one[name] for name in low))
    figures = {name: mean(values) for name, values in found.items()}
    return Measured(differences=differences, unit="Var h / (E h)²", figures=figures)


def covers_exact() -> Measured:
    """The KL of mode shares of too small students, ratio and scores exact."""
    names = ("reverse_kl", "js", "kl")
    found: dict[str, list[float]] = {name: [] for name in names}
    rare: dict[str, list[float]] = {name: [] for name in names}
    teacher, options = toy("skewed2"), mode_coverage.Options(steps=1000)
    for name in names:
        for seed in range(10, 10 + SEEDS):
            x = mode_coverage.train(teacher, divergence(name), mode_coverage.CASES["skewed2"], seed, options)
            report = mode_counts(x, teacher)
            found[name].append(report.kl.value)
            rare[name].append(float(report.histogram[1]))
    least = [min(r - j, j - k) for r, j, k in zip(found["reverse_kl"], found["js"], found["kl"], strict=True)]
    figures = {f"KL of {name}": mean(values) for name, values in found.items()}
    figures |= {f"rare mode's share by {name}": mean(values) for name, values in rare.items()}
    return Measured(
        differences=least, unit="KL of the mode shares", figures={**figures, "its true share": 0.15}
    )


def covers_tail() -> Measured:
    """The KL of class shares in the runs of the study of divergences."""
    path = BENCHMARKS / "divergences" / "results" / "digits-tail--width-31.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    last = [row for row in rows if row["step"] == row["steps"]]

    def of(name: str, key: str) -> list[float]:
        own = sorted((row for row in last if row["divergence"] == name), key=lambda row: row["seed"])
        return [float(row[key]) for row in own]

    differences = [a - b for a, b in zip(of("reverse_kl", "kl"), of("kl", "kl"), strict=True)]
    figures = {
        f"{said} of {name}": mean(of(name, key))
        for name in ("reverse_kl", "js", "kl")
        for key, said in (("kl", "KL"), ("modes", "classes kept"), ("recall", "recall"))
    }
    note = (
        "These students draw about one image of each class (recall is zero under all divergences); what the "
        "divergence decides is which classes are drawn."
    )
    return Measured(differences=differences, unit="KL of the class shares", figures=figures, note=note)


# ------------------------------------------------------------------------- students of 8x8 digits

STEPS = 1000
RATIO_ALONE = {**LEARN, "gan_weight": 0.0}
REVERSE = Run(on="digits", method="diff-instruct", steps=STEPS, settings=LEARN)
"""Reverse KL without adversarial term: weights are one, so that no ratio is needed."""
FORWARD = Run(on="digits", method="f-distill:kl", steps=STEPS, settings=RATIO_ALONE)
ADVERSARIAL = Run(on="digits", method="dmd2", steps=STEPS, settings=LEARN)
UNI = Run(on="digits", method="uni-instruct:kl", steps=STEPS, settings=RATIO_ALONE)


UNTRAINED_RATIO = (
    "After 500 updates students are far from their teacher, which has recall 0.81 at 40 calls. The "
    "discriminator's loss is still that of chance, on average over noise levels, so that the weights of "
    "forward KL are probably mostly noise. With an exact ratio, and in 8,000 steps with a learned one, "
    "forward KL is ahead (the two claims above)."
)


def covers_learned() -> Measured:
    return replace(side_by_side(FORWARD, REVERSE, "recall"), note=UNTRAINED_RATIO)


def no_gan() -> Measured:
    return replace(side_by_side(FORWARD, REVERSE, "fd"), note="As for the recall.")


def adversarial() -> Measured:
    note = (
        "In the first 300 steps the adversarial gradient grows from nothing to 4 % of the norm of the score "
        "difference: at the published weight a run of this length is too short to see its effect."
    )
    return replace(side_by_side(ADVERSARIAL, REVERSE, "fd"), note=note)


def uni_instruct() -> Measured:
    return side_by_side(UNI, FORWARD, "fd")


DIGITS = (
    "8x8 digits without labels; teacher and students are MLPs of two blocks of 96, students one-step copies "
    f"of the teacher, {STEPS:,} steps of 128, a student's update in two, learning rates 2e-3 and 4e-3 (fake "
    "score); five seeds, paired. 1,797 samples against the digits, pixel by pixel."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="f-distill-gradient",
        system="f-distill",
        source=f"{PAPER}, theorem 1",
        says="The score difference weighted by h(r) = r² f''(r) is the gradient of the f-divergence.",
        test="Eight random mixtures of two Gaussians as teachers of x0 = m + s z, noised, in float64: the "
        "gradient of `score_difference` by Gauss-Hermite quadrature against central differences of the "
        "integral of q f(p/q) on a grid. The difference is the largest of six divergences.",
        measure=gradient,
    ),
    Claim(
        name="f-distill-variance",
        system="f-distill",
        source=f"{PAPER}, table 1 and figure 4a",
        says="The weight h has a high variance for forward KL and Jeffreys, a low one for JS, Hellinger and "
        "softened reverse KL.",
        test="The library's weights at 100,000 draws of q = N(0, 1) with p = N(d, 1), ten blocks; the "
        "difference is the smaller of the first two less the largest of the other three, at d = 1.",
        measure=variance,
    ),
    Claim(
        name="f-distill-covers-exact",
        system="f-distill",
        source=f"{PAPER}, figure 8",
        says="Of a skewed target, forward KL keeps more of the rare mode than JS, and JS more than reverse "
        "KL.",
        test="`skewed2`, a wide mode of weight 0.85 and a narrow one of 0.15; students are too small for it "
        "(two Gaussians of equal weight), scores and ratio exact, noise below the distance of the modes "
        "(`mode_coverage.py`, 1,000 steps), five seeds. The difference is the smaller of the two steps.",
        measure=covers_exact,
    ),
    Claim(
        name="f-distill-covers-tail",
        system="f-distill",
        source=f"{PAPER}, figures 2 and 8",
        says="Forward KL keeps more of rare classes than reverse KL, with a learned ratio.",
        test="The runs of [the study of divergences](when-it-matters.md), whose predictions were written "
        "before: digits with class shares from 100 to 1, students of 30 % of the teacher's parameters, 8,000 "
        "steps, no adversarial term; five seeds, paired.",
        measure=covers_tail,
    ),
    Claim(
        name="f-distill-recall",
        system="f-distill",
        source=f"{PAPER}, tables 2 and 3 (recall 0.60 to 0.62 on CIFAR-10)",
        says="Forward KL has a higher recall than reverse KL.",
        test=f"{DIGITS} No adversarial term.",
        measure=covers_learned,
    ),
    Claim(
        name="f-distill-no-gan",
        system="f-distill",
        source=f"{PAPER}, ablation of the adversarial term (CIFAR-10: 4.07 to 3.76)",
        says="Without the adversarial term, forward KL has the better FID than reverse KL.",
        test=f"{DIGITS} No adversarial term.",
        measure=no_gan,
    ),
    Claim(
        name="f-distill-gan",
        system="f-distill, DMD2",
        source=f"{PAPER}, the same ablation (4.07 to 2.13); Yin et al. 2024, arXiv 2405.14867",
        says="The adversarial term improves the FID of reverse KL.",
        test=f"{DIGITS} `dmd2` with its default weight of 0.001 against `diff-instruct`.",
        measure=adversarial,
    ),
    Claim(
        name="uni-instruct",
        system="Uni-Instruct",
        source="Wang et al. 2025, arXiv 2505.20755 (CIFAR-10: 1.38 against 1.92)",
        says="Uni-Instruct with forward KL has a better FID than f-distill with it.",
        test=f"{DIGITS} No adversarial term in either, equal numbers of steps.",
        measure=uni_instruct,
    ),
)
