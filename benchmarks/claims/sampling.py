"""What is claimed of solvers, noise and paths, held against exact teachers."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from claim import Claim, Measured
from laws import EIGHT, F64, average, energy, karras, mixture, normal
from torch import Tensor

from distmatch.base.seeds import generator
from distmatch.diffusion.guidance import guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.paths import OnPath, noise_path
from distmatch.diffusion.paths.kinetic import kinetic_path, losses_of_teacher
from distmatch.diffusion.pfgm import StudentTTeacher, start_noise
from distmatch.diffusion.solvers import grid, solve
from distmatch.discrete import JointTable, discrete_loss, exact_bound, sample_tokens


def endpoint_errors(solvers: dict[str, tuple[str, Tensor]], seed: int) -> dict[str, float]:
    """Root mean square distance to where the exact ODE leads, in standard deviations of the data."""
    teacher, y = mixture(seed), 80 * normal(seed, 500)
    exact = solve(teacher, y, grid("karras", 256, 0.002, 80.0), "heun").y
    return {
        name: float((solve(teacher, y, levels, solver).y - exact).square().mean().sqrt()) / teacher.sigma_data
        for name, (solver, levels) in solvers.items()
    }


def deis() -> Measured:
    solvers = {
        "DEIS, 10 calls": ("deis:3", karras(10)),
        "Heun, 11 calls": ("heun", karras(6)),
        "Heun, 35 calls": ("heun", karras(18)),
    }
    found = [endpoint_errors(solvers, seed) for seed in EIGHT]
    differences = [row["DEIS, 10 calls"] - row["Heun, 35 calls"] for row in found]
    figures = {name: average([row[name] for row in found]) for name in solvers}
    note = (
        "Measured afterwards: 12 calls have an error of 0.059, 20 calls one of 0.022, less than "
        "Heun's with 35; order 2 has 0.128 at ten calls. Without a history the first steps are "
        "of lower orders, which is probably what ten calls cannot make up for."
    )
    return Measured(
        differences=differences, unit="standard deviations", figures=figures, alike=0.05, note=note
    )


def unipc() -> Measured:
    solvers = {"UniPC": ("unipc:2", karras(8)), "DPM-Solver++(2M)": ("dpmpp-2m", karras(8))}
    found = [endpoint_errors(solvers, seed) for seed in EIGHT]
    differences = [math.log2(row["DPM-Solver++(2M)"] / row["UniPC"]) for row in found]
    figures = {name: average([row[name] for row in found]) for name in solvers}
    note = (
        "Its corrector pays from about twelve calls on: a tenth less error then, at 20 calls half of it "
        "(three mixtures). On levels even in log sigma the two are alike at eight calls."
    )
    return Measured(differences=differences, unit="log2 of the ratio of errors", figures=figures, note=note)


def ghvb() -> Measured:
    """Excess over the largest value of the exact guided samples: what is seen as blobs in images."""
    found = []
    for seed in EIGHT:
        teacher = guided(mixture(seed, classes=2), 8.0)
        y, labels = 80 * normal(seed, 500), torch.arange(500) % 2
        exact = solve(teacher, y, karras(256), "heun", conditioning=labels).y
        most = exact.abs().amax()
        row = {
            name: float(
                (solve(teacher, y, karras(8), name, conditioning=labels).y.abs().amax(1) - most)
                .clamp(min=0)
                .mean()
            )
            for name in ("ipndm:2", "ghvb:1.8")
        }
        found.append(row)
    differences = [row["ipndm:2"] - row["ghvb:1.8"] for row in found]
    figures = {f"excess of {name}": average([row[name] for row in found]) for name in found[0]}
    return Measured(differences=differences, unit="excess over the largest value", figures=figures)


def contraction() -> Measured:
    """Starts that lack the data's part: the SDE forgets them, the ODE carries them along."""
    found = []
    for seed in EIGHT:
        teacher, n = mixture(seed), 2000
        levels, start = grid("log", 150, 0.02, 2.0), 2.0 * normal(seed, n)
        noise = SampleNoise(seed, torch.arange(n), (4,))
        x = teacher.sample(n, seed=100 + seed).double()
        ode = solve(teacher, start, levels, "heun").y
        sde = solve(teacher, start, levels, "ddim:1", noise=noise).y
        found.append((energy(ode, x), energy(sde, x)))
    return Measured(
        differences=[ode - sde for ode, sde in found],
        unit="energy distance",
        figures={"ODE": average([a for a, _ in found]), "SDE": average([b for _, b in found])},
    )


def pfgm() -> Measured:
    """Noise of 0.2 of the level after every step; what it adds to the distance from the data."""
    found, levels = [], karras(30)
    for seed in EIGHT:
        points = mixture(seed, dim=16).sample(200, seed=seed).double()
        row = {}
        for name, dims in (("D = 4", 4.0), ("Gaussian (D = 1e6)", 1e6)):
            teacher = StudentTTeacher(points, dims)
            start = 80 * start_noise(teacher, normal(seed, 400, 16), seed)
            gen = generator(seed, "claims/injected")

            def disturb(step: int, y: Tensor, gen: torch.Generator = gen) -> Tensor:
                level = float(levels[step + 1])
                return y + 0.2 * level * torch.randn(y.shape, generator=gen, dtype=F64)

            clean = solve(teacher, start, levels, "heun").y
            noisy = solve(teacher, start, levels, "heun", on_step=disturb).y
            row[name] = energy(noisy, points) - energy(clean, points)
        found.append(row)
    differences = [row["Gaussian (D = 1e6)"] - row["D = 4"] for row in found]
    figures = {f"added by errors, {name}": average([row[name] for row in found]) for name in found[0]}
    return Measured(differences=differences, unit="energy distance", figures=figures)


def kinetic() -> Measured:
    """Four Euler steps, even in the time of each path, on two narrow modes; W1 to as many true samples."""
    found = []
    for seed in EIGHT:
        place = 0.9 + 0.1 * float(torch.rand(1, generator=generator(seed, "claims/place")))
        teacher = GaussianMixture([0.5, 0.5], [[-place], [place]], [0.02, 0.02])
        n = 4000
        x0 = teacher.sample(n, seed=seed).double()
        losses = losses_of_teacher(teacher, x0[:2000], sigma_data=1.0)
        row = {}
        for name, path in (("straight", noise_path("condot")), ("kinetic", kinetic_path(losses, 1.0))):
            flow, t = OnPath(teacher, path), float(path.t_of_rho(80.0))
            times = torch.linspace(t, 0, 5, dtype=F64)
            x = normal(seed, n, 1)
            for now, after in pairwise(times):
                x = x + (after - now) * flow.velocity(x, now.expand(n))
            row[name] = float((x.flatten().sort().values - x0.flatten().sort().values).abs().mean())
        found.append(row)
    differences = [row["straight"] - row["kinetic"] for row in found]
    return Measured(
        differences=differences,
        unit="W1",
        figures={name: average([row[name] for row in found]) for name in found[0]},
    )


LOSSES = ("lambda-dce", "k-dce", "t-dce", "t-dse")


def radd_losses() -> Measured:
    found = []
    for seed in range(10):
        gen = generator(seed, "claims/discrete")
        law = JointTable(torch.randn(3, 3, 3, 3, generator=gen, dtype=F64))
        x = law.sample(400_000, gen)
        exact = float(exact_bound(law, x).mean())
        found.append(
            {
                name: float(discrete_loss(law, x, name, generator=gen, cutoff=0.0).mean()) / exact - 1
                for name in LOSSES
            }
        )
    return Measured(
        differences=[row["lambda-dce"] - row["t-dse"] for row in found],
        unit="of the bound",
        figures={f"{name} less the exact bound": average([row[name] for row in found]) for name in LOSSES},
        alike=0.01,
    )


def radd_cache() -> Measured:
    found = []
    length = 6
    for seed in EIGHT:
        gen = generator(seed, "claims/discrete")
        law = JointTable(torch.randn(*[2] * length, generator=gen, dtype=F64))
        row = {}
        for steps in (4, 16, 64):
            calls = sample_tokens(law, 2000, seed=seed, sampler="tweedie", steps=steps).nfe
            row[steps] = calls / (steps * (1 - (1 - 1 / steps) ** length)) - 1
        found.append(row)
    return Measured(
        differences=[average(list(row.values())) for row in found],
        unit="of N (1 - (1 - 1/N)^L)",
        figures={f"{n} steps": average([row[n] for row in found]) for n in found[0]},
        alike=0.01,
    )


CLAIMS = (
    Claim(
        name="deis-ten-calls",
        system="DEIS",
        source="Zhang and Chen 2023, arXiv 2204.13902",
        says="DEIS with ten calls is nearly as good as solvers with several times as many.",
        test="Eight random mixtures of eight Gaussians in four dimensions, exact denoisers, 500 samples: "
        "distance of the end point to that of the exact ODE (256 Heun steps), DEIS of order 3 with 10 calls "
        "less Heun with 35, both on EDM's levels, within 0.05 standard deviations of the data.",
        measure=deis,
    ),
    Claim(
        name="unipc-eight-calls",
        system="UniPC",
        source="Zhao et al. 2023, arXiv 2302.04867",
        says="At few calls UniPC is more accurate than DPM-Solver++(2M).",
        test="As for DEIS, eight calls each, UniPC of order 2.",
        measure=unipc,
    ),
    Claim(
        name="ghvb-artifacts",
        system="GHVB",
        source="Wizadwongsa et al. 2024, arXiv 2307.11118",
        says="At few steps and strong guidance generalized heavy ball diverges less than linear multistep.",
        test="Mixtures as for DEIS with two classes, guidance 8, eight steps: how far samples exceed the "
        "largest value of the exactly integrated ones, iPNDM of order 2 less GHVB 1.8.",
        measure=ghvb,
    ),
    Claim(
        name="sde-contracts",
        system="Restart, EDM",
        source="Xu et al. 2023, arXiv 2306.14878; Karras et al. 2022, arXiv 2206.00364",
        says="With many steps the SDE contracts errors made before, which the ODE carries along.",
        test="Mixtures as for DEIS; started at level 2 without the part of the data (an error), 150 levels: "
        "energy distance to 2,000 true samples, ODE (Heun) less SDE (DDIM with eta 1).",
        measure=contraction,
    ),
    Claim(
        name="pfgm-robust",
        system="PFGM++",
        source="Xu et al. 2023, arXiv 2302.04265",
        says="With few extra dimensions sampling is more robust to errors than with Gaussian noise.",
        test="200 points in 16 dimensions from eight mixtures, exact denoisers; noise of 0.2 of the level is "
        "added after each of 30 Heun steps. What this adds to the energy distance from the points, "
        "Gaussian less D = 4.",
        measure=pfgm,
    ),
    Claim(
        name="kinetic-few-steps",
        system="Kinetic optimal paths",
        source="Shaul et al. 2023, arXiv 2306.06626",
        says="A path of least kinetic energy needs fewer steps than the straight one.",
        test="Two narrow modes in one dimension, exact denoiser, four Euler steps even in the time of each "
        "path: W1 of 4,000 samples to as many true ones, straight less kinetic optimal, eight draws of the "
        "modes' distance.",
        measure=kinetic,
    ),
    Claim(
        name="radd-losses",
        system="RADD",
        source="Ou et al. 2025, arXiv 2406.03736",
        says="Score entropy in time and cross-entropy in the mask ratio are one objective.",
        test="Ten random joint laws of four symbols, exact conditionals, 400,000 sequences each: the mean of "
        "`lambda-dce` less that of `t-dse`, within 1 % of the bound.",
        measure=radd_losses,
    ),
    Claim(
        name="radd-cache",
        system="RADD",
        source="Ou et al. 2025, arXiv 2406.03736",
        says="With a cache N steps for L tokens take N (1 - (1 - 1/N)^L) evaluations on average.",
        test="Eight random joint laws of six symbols, 2,000 sequences, 4, 16 and 64 steps: the mean relative "
        "deviation of the counted evaluations, within 1 %.",
        measure=radd_cache,
    ),
)
