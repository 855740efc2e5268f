"""What is claimed of other methods of distillation, and of what helps them."""

from __future__ import annotations

import math
from dataclasses import replace

from claim import Claim, Measured
from f_distill import ADVERSARIAL, DIGITS, REVERSE, STEPS
from students import LEARN, SEEDS, Run, gains, mean, side_by_side, teacher_at

# ------------------------------------------------------------------------- students of 8x8 digits

SID = {
    alpha: Run(on="digits", method="sid", steps=STEPS, settings={**LEARN, "sid_alpha": alpha})
    for alpha in (0.5, 1.2)
}
SCALES = {
    every: replace(REVERSE, steps=500 * every, settings={**LEARN, "fake_score_steps": every})
    for every in (1, 5)
}
RCM = Run(on="digits", method="rcm", steps=STEPS // 2, settings={"dmd_weight": 1.0})
MMD = Run(on="digits", method="mmd", steps=400, settings={"num_steps": 5})


def sid() -> Measured:
    return side_by_side(SID[1.2], REVERSE, "fd")


def sid_alpha() -> Measured:
    return side_by_side(SID[1.2], SID[0.5], "fd", names=("alpha 1.2", "alpha 0.5"))


def two_time_scales() -> Measured:
    found = side_by_side(SCALES[5], SCALES[1], "fd", names=("five steps for an update", "one"))
    return replace(found, figures={**found.figures, "fd of two": mean(REVERSE.last("fd"))})


def moving_average() -> Measured:
    with_it, without = REVERSE.last("fd"), [row["raw"]["fd"] for row in REVERSE.rows()]
    figures = {"fd with": mean(with_it), "fd without": mean(without)}
    return Measured(differences=gains(with_it, without, "fd"), unit="log fd", figures=figures)


def rcm_recall() -> Measured:
    note = (
        "The runs are too short for rCM: with its rates of 2e-4 it is far from converged, and DMD2 learns "
        "ten times as fast. In longer runs with classes its recall is still below that of DMD2, 0.68 against "
        "0.80 ([two seeds](consistency.md#effect-and-cost-of-the-score-difference-of-rcm)); on `grid25` it "
        "covers modes better ([methods](methods.md))."
    )
    return replace(side_by_side(RCM, ADVERSARIAL, "recall"), note=note)


def mmd() -> Measured:
    tuned, before = MMD.last("fd"), teacher_at("digits", 5)
    figures = {
        "fd at 5 calls": mean(tuned),
        "fd of the teacher at 5 calls": before["fd"],
        "fd of the teacher at 40 calls": teacher_at("digits", 40)["fd"],
        "recall at 5 calls": mean(MMD.last("recall")),
        "recall of the teacher at 5 calls": before["recall"],
    }
    return Measured(differences=gains(tuned, [before["fd"]] * SEEDS, "fd"), unit="log fd", figures=figures)


# ------------------------------------------------------------------------------------- DisBack

MARKS = (100, 200, 400, 700)


FIVE = {"backtrack": 5}
FINE = {"backtrack": 5, "backtrack_degrade_steps": 2, "backtrack_interval": 10}
FAR_AWAY = Run(on="grid25", method="diff-instruct", steps=STEPS, marks=MARKS, start="far")


def _converges(base: Run, path: dict[str, int], measure: str, note: str = "") -> Measured:
    """The mean over the run of the log of a measure, without copies less with them."""

    def curve(run: Run) -> list[float]:
        return [
            mean([math.log(row[str(mark)][measure]) for mark in (*MARKS, run.steps)]) for row in run.rows()
        ]

    runs = {
        "no copies": base,
        "five copies": replace(base, settings={**base.settings, **path}),
    }
    curves = {name: curve(run) for name, run in runs.items()}
    differences = [a - b for a, b in zip(curves["no copies"], curves["five copies"], strict=True)]
    figures = {
        f"{measure} with {name} after {mark} steps": mean([row[str(mark)][measure] for row in run.rows()])
        for name, run in runs.items()
        for mark in (200, 400, base.steps)
    }
    unit = f"log {measure}, mean over the run"
    return Measured(differences=differences, unit=unit, figures=figures, note=note)


def disback_copy() -> Measured:
    return _converges(replace(REVERSE, marks=MARKS), FIVE, "fd")


def disback_far() -> Measured:
    note = (
        "Copies are 20 steps apart (a tenth of the run in all), and from 40 steps on they predict the "
        "samples of the untrained student itself: until the teacher becomes the target, after 396 steps, "
        "most targets hold the student where it is. Without copies it is near the data after 100 steps, "
        "since at high noise the teacher points there from afar. The start was chosen in trials of one other "
        "seed."
    )
    return _converges(replace(FAR_AWAY, settings={**LEARN, "noise_high": 1.0}), FIVE, "energy", note)


def disback_fine() -> Measured:
    note = (
        "Recording takes 10 steps and the path 80. Such copies differ little from the teacher, and the fake "
        "score has learned 10 steps before the student moves, which may be the larger part of the gain. Two "
        "steps were chosen in trials of one other seed, after the result of `disback-far`."
    )
    return _converges(replace(FAR_AWAY, settings={**LEARN, "noise_high": 1.0}), FINE, "energy", note)


def disback_low() -> Measured:
    return _converges(replace(FAR_AWAY, settings={**LEARN, "noise_high": 0.3}), FINE, "energy")


# -------------------------------------------------------------------------- students in the plane

EACH = {**LEARN, "fake_score_steps": 1}
PAIRS = Run(on="grid25", method="dmd", steps=800, settings=EACH)
NO_PAIRS = Run(on="grid25", method="diff-instruct", steps=800, settings=EACH)
RCM_PLANE = Run(on="grid25", method="rcm", steps=500, settings={"dmd_weight": 1.0})
DMD2_PLANE = Run(on="grid25", method="dmd2", steps=1000, settings=LEARN)
CM = Run(on="grid25", method="consistency", steps=600, calls=(1, 2))
CTM = Run(on="grid25", method="ctm", steps=600)
FROM_DATA = {"consistency_from": "data"}
MEAN_FLOW = Run(on="grid25", method="mean-flow", steps=1000, settings=FROM_DATA)
CT = Run(on="grid25", method="consistency", steps=1000, settings=FROM_DATA)
IMM = {m: Run(on="grid25", method="imm", steps=1000, settings={"imm_particles": m}) for m in (1, 4)}


def dmd_pairs() -> Measured:
    return side_by_side(PAIRS, NO_PAIRS, "kl")


def rcm_modes() -> Measured:
    return side_by_side(RCM_PLANE, DMD2_PLANE, "kl")


def two_calls() -> Measured:
    rows = CM.rows()
    one, two = ([row[f"calls {calls}"] for row in rows] for calls in (1, 2))
    differences = gains([v["energy"] for v in two], [v["energy"] for v in one], "energy")
    figures = {
        f"{key} at {calls}": mean([v[key] for v in values])
        for calls, values in (("one call", one), ("two calls", two))
        for key in ("energy", "kl", "high_quality")
    }
    return Measured(differences=differences, unit="log energy", figures=figures)


def ctm() -> Measured:
    return side_by_side(CTM, CM, "energy")


def mean_flow() -> Measured:
    return side_by_side(MEAN_FLOW, CT, "energy")


def imm_particles() -> Measured:
    return side_by_side(IMM[4], IMM[1], "energy", names=("4 particles", "1 particle"))


PLANE = (
    "`grid25`, 25 narrow modes in the plane; teacher and students are MLPs of two blocks of 64, one-step "
    "copies of the teacher, batches of 128; five seeds, paired. 10,000 samples against the mixture: the KL "
    "of the mode shares, the energy distance, and the share within three standard deviations of a mode."
)
FAST = "Learning rates 2e-3 and 4e-3 (fake score)."
DISBACK = "Zhang et al. 2024, arXiv 2408.15991 (curves of convergence)"
PATH = (
    "`diff-instruct` with `--backtrack 5` against without, the steps that record copies counted: the log of "
    "the measure, mean over five marks from 100 to 1,000 steps."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="sid",
        system="SiD",
        source="Zhou et al. 2024, arXiv 2404.04057 (CIFAR-10: 1.92 against 4.53)",
        says="Without data, SiD has a better FID than Diff-Instruct.",
        test=f"{DIGITS} Equal numbers of steps, alpha 1.2.",
        measure=sid,
    ),
    Claim(
        name="sid-alpha",
        system="SiD",
        source="Zhou et al. 2024, arXiv 2404.04057, the ablation of alpha",
        says="Alpha 1.2 has a better FID than 0.5, the exact gradient for a perfect fake score.",
        test=f"{DIGITS}",
        measure=sid_alpha,
    ),
    Claim(
        name="dmd2-two-time-scales",
        system="DMD2",
        source="Yin et al. 2024, arXiv 2405.14867",
        says="Five updates of the fake score for each of the student's give a better FID than one.",
        test=f"{DIGITS} Here `diff-instruct` with 500 updates of the student, in 2,500 steps and in 500, "
        "fake score and student on the same samples.",
        measure=two_time_scales,
    ),
    Claim(
        name="moving-average",
        system="all",
        source="Song and Ermon 2020, arXiv 2006.09011, of score networks; SiD and Diff-Instruct sample with "
        "it",
        says="The moving average of a student's weights has a better FID than the weights themselves.",
        test=f"{DIGITS} `diff-instruct`, at the end of the run; the half-life is 200 updates.",
        measure=moving_average,
    ),
    Claim(
        name="rcm-recall",
        system="rCM",
        source="Zheng et al. 2025, arXiv 2510.08431 (as good as DMD2, more diverse)",
        says="rCM has a higher recall than DMD2.",
        test=f"{DIGITS} rCM with its default learning rates and half of the steps, since one takes three "
        "times as long, and weight 1 of the score difference, about the published balance on so few elements "
        "([why](consistency.md#effect-and-cost-of-the-score-difference-of-rcm)).",
        measure=rcm_recall,
    ),
    Claim(
        name="mmd-finetuning",
        system="MMD-DDM",
        source="Aiello et al. 2023, arXiv 2301.07969 (CIFAR-10, CelebA, LSUN)",
        says="Fine-tuning by the MMD gives 5 steps of DDIM a better FID.",
        test=f"{DIGITS} Here 400 steps, five calls, default settings; features are the teacher's "
        "activations, the measure is of pixels. Against the teacher at five calls, from the same "
        "noise level.",
        measure=mmd,
    ),
    Claim(
        name="disback-copy",
        system="DisBack",
        source=DISBACK,
        says="A student that starts as a copy of the teacher converges faster along degraded copies.",
        test=f"{DIGITS} {PATH}",
        measure=disback_copy,
    ),
    Claim(
        name="disback-far",
        system="DisBack",
        source=DISBACK,
        says="A student that starts where the teacher was not trained converges faster along degraded "
        "copies.",
        test=f"{PLANE} {FAST} Here the students have random weights, fitted to a narrow Gaussian four "
        "standard deviations of the data away in each coordinate, and noise reaches up to one. An update in "
        f"two steps. {PATH}",
        measure=disback_far,
    ),
    Claim(
        name="disback-fine-path",
        system="DisBack",
        source=DISBACK,
        says="The same, of copies that are less degraded.",
        test="As `disback-far`, but copies two steps apart, each the target of ten updates.",
        measure=disback_fine,
    ),
    Claim(
        name="disback-low-noise",
        system="DisBack",
        source=DISBACK,
        says="The same where only low noise is compared, so that the teacher is asked far from its data.",
        test="As `disback-fine-path`, but noise reaches up to 0.3 standard deviations of the data.",
        measure=disback_low,
    ),
    Claim(
        name="dmd-pairs",
        system="DMD",
        source="Yin et al. 2023, arXiv 2311.18828 (the regression preserves modes)",
        says="Regression on pairs of noise and teacher sample gives mode shares nearer to the truth.",
        test=f"{PLANE} {FAST} `dmd` against `diff-instruct`, 800 steps, a student's update in each.",
        measure=dmd_pairs,
    ),
    Claim(
        name="rcm-modes",
        system="rCM",
        source="Zheng et al. 2025, arXiv 2510.08431",
        says="rCM covers modes better than DMD2.",
        test=f"{PLANE} 1,000 steps of DMD2, an update in two, {FAST.lower()[:-1]}; 500 of rCM with default "
        "learning rates and weight 1 of the score difference.",
        measure=rcm_modes,
    ),
    Claim(
        name="consistency-two-calls",
        system="consistency models",
        source="Song et al. 2023, arXiv 2303.01469 (CIFAR-10: 3.55 to 2.93)",
        says="Two calls of a consistency model give better samples than one.",
        test=f"{PLANE} `consistency`, 600 steps, default settings; each student with one call and with two.",
        measure=two_calls,
    ),
    Claim(
        name="ctm",
        system="CTM",
        source="Kim et al. 2024, arXiv 2310.02279 (CIFAR-10, one call: 1.73 with classes; 3.55 of "
        "consistency distillation without)",
        says="At one call CTM has better samples than consistency distillation.",
        test=f"{PLANE} 600 steps of each, default settings; CTM with its adversarial term, as in the paper.",
        measure=ctm,
    ),
    Claim(
        name="mean-flow",
        system="MeanFlow",
        source="Geng et al. 2025, arXiv 2505.13447 (ImageNet-256, one call: 3.43)",
        says="From data alone, MeanFlow has better samples at one call than consistency training.",
        test=f"{PLANE} 1,000 steps of each from data, default settings.",
        measure=mean_flow,
    ),
    Claim(
        name="imm-particles",
        system="IMM",
        source="Zhou et al. 2025, arXiv 2503.07565 (training is unstable with too few particles)",
        says="Four particles give better samples than one, which is consistency training.",
        test=f"{PLANE} 1,000 steps of each, default settings.",
        measure=imm_particles,
    ),
)
