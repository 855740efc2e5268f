"""When does the divergence matter? f-distill by six divergences on real data whose modes can be counted.

    python benchmarks/divergences/study.py   # hours of one core; can be stopped and continued, block by block
    python benchmarks/divergences/page.py    # writes docs/when-it-matters.md from what is done

``plan.py`` has the runs, and the predictions that were written down before the first of them. The loop is
that of ``distmatch distill --method f-distill`` with K = 5, on stacks of networks (``stack.py``); losses,
ratio normalizer, networks and discriminators are the library's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from plan import Block, Setting, Size, blocks
from stack import Stack
from tasks import Stacked, Task, digits, fashion, grid, stacked
from torch import Tensor

from distmatch.base.seeds import generator
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise import Karras
from distmatch.diffusion.solvers import grid as levels_of
from distmatch.diffusion.solvers import solve
from distmatch.divergences import Divergence, divergence
from distmatch.losses import (
    adversarial_discriminator_loss,
    adversarial_generator_loss,
    denoising_loss,
    edm_weight,
    score_difference,
)
from distmatch.methods.initialization import fit_to_teacher
from distmatch.metrics.frechet import frechet_distance
from distmatch.metrics.prdc import prdc
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.ema import ema_decay
from distmatch.ratio.discriminator import build_discriminator
from distmatch.ratio.normalizer import NormalizerConfig, RatioNormalizer

RESULTS = Path(__file__).parent / "results"  # of the blocks that are done; move those of --out there
BATCH, EVERY, SEEDS, SAMPLES = 128, 5, 5, 4000


def task_of(name: str, folder: Path, size: Size) -> Task:
    if name == "stacked":
        return stacked(folder, size)
    if name == "grid25":
        return grid(folder, size)
    if name.startswith("fashion"):
        return fashion(folder, size, tail=name.endswith("tail"))
    return digits(folder, size, tail="tail" in name, labels="classes" in name)


# ------------------------------------------------------------------------------------------------ one block


def start_of(task: Task, setting: Setting, folder: Path) -> EDMDenoiser:
    """The network that all students of a block start from: the trained one, or a smaller one fitted to it."""
    own: EDMDenoiser = task.network
    width = setting.width or setting.teacher.width
    if width == setting.teacher.width and setting.start == "trained":
        return own
    config = MLPConfig(width=width, depth=setting.teacher.depth)
    torch.manual_seed(1)
    net = build_net(config, task.data.shape[1:], own.num_classes)
    fresh = EDMDenoiser(
        net,
        shape=own.shape,
        num_classes=own.num_classes,
        sigma_data=own.sigma_data,
        noise_unit=2 * own.sigma_data,
    )
    if setting.start == "untrained":
        return fresh.eval()
    kept = folder / f"{task.name}-{width}x{setting.teacher.depth}.pt"
    if kept.exists():
        fresh.load_state_dict(torch.load(kept, weights_only=True))
        return fresh.eval()
    gen = generator(1, "fit/rows")

    def draw(n: int) -> tuple[Tensor, Tensor | None]:
        rows = torch.randint(len(task.data), (n,), generator=gen)
        return task.data[rows], None if task.labels is None else task.labels[rows]

    fit_to_teacher(fresh, task.teacher, draw, Karras(0.04 * own.sigma_data, 80.0), 3000, 1)
    torch.save(fresh.state_dict(), kept)
    return fresh.eval()


def reference(task: Task, guidance: float, n: int) -> Tensor:
    """Samples of the teacher: draws of an exact one, else by 32 steps of Heun."""
    if isinstance(task.teacher, (GaussianMixture, Stacked)):
        return task.teacher.sample(n)
    gen = generator(9, "study/reference")
    y = 80.0 * torch.randn(n, *task.data.shape[1:], generator=gen)
    labels = None
    if task.labels is not None:
        labels = task.labels[torch.randint(len(task.labels), (n,), generator=gen)]
    teacher = task.teacher if guidance == 1 else Guided(task.teacher, guidance)
    with torch.no_grad():
        parts = [
            solve(
                teacher,
                y[i : i + 2000],
                levels_of("karras", 32, 0.002, 80.0),
                conditioning=None if labels is None else labels[i : i + 2000],
            ).y
            for i in range(0, n, 2000)
        ]
    return torch.cat(parts)


def measures(task: Task, x: Tensor, real: Tensor, shares: np.ndarray[Any, Any]) -> dict[str, float]:
    """Of samples against as many of the teacher, whose mode shares are known from many more."""
    counts = np.bincount(task.judge(x), minlength=task.modes)
    q = (counts + 0.5) / (counts.sum() + 0.5 * task.modes)
    order = np.argsort(shares)
    rare = order[: max(1, 3 * task.modes // 10)]
    found = prdc(real.flatten(1)[:2000], x.flatten(1)[:2000])
    return {
        "modes": float(
            (counts >= 0.25 * shares * counts.sum()).sum() if task.modes < 1000 else (counts > 0).sum()
        ),
        "kl": float((shares * np.log(shares / q)).sum()),
        "reverse_kl": float((q * np.log(q / shares)).sum()),
        "rare": float(q[rare].sum() / shares[rare].sum()),
        "fd": frechet_distance(real.flatten(1), x.flatten(1)),
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
    }


def carry_out(block: Block, folder: Path, report: Any) -> Iterator[dict[str, Any]]:
    """Trains a block; yields a row for each run at a quarter, half and the whole of its length."""
    task, own = task_of(block.task, folder, block.setting.teacher), block.setting
    runs = [
        (name, weight, seed)
        for name in block.divergences
        for weight in block.adversarial
        for seed in range(SEEDS)
    ]
    measures_of: list[Divergence] = [divergence(name) for name, _, _ in runs]
    weights = torch.tensor([weight for _, weight, _ in runs])
    rows, shape, classes = len(runs), task.data.shape[1:], task.labels
    unit = 2 * task.network.sigma_data
    first = own.student_sigma * task.network.sigma_data or 80.0
    noise = Karras(0.04 * task.network.sigma_data, own.noise_high * task.network.sigma_data or 80.0)
    guided = task.teacher if own.guidance == 1 else Guided(task.teacher, own.guidance)
    begin = start_of(task, own, folder)
    student, fake = Stack([begin] * rows, own.teacher.lr), Stack([task.network] * rows, 2 * own.teacher.lr)
    heads = []
    for _, _, seed in runs:
        torch.manual_seed(100 + seed)
        heads.append(build_discriminator("teacher", task.network, task.network.num_classes))
    judge = Stack(heads, 1e-3)
    normalizers = [RatioNormalizer(NormalizerConfig(clip=own.clip)) for _ in runs]
    # Runs of one seed see the same noise and data under every divergence, so that differences are paired.
    gens = [generator(seed, "study") for seed in range(SEEDS)]
    seeds = torch.tensor([seed for _, _, seed in runs])

    def normal() -> Tensor:
        return torch.stack([torch.randn(BATCH, *shape, generator=g) for g in gens])[seeds]

    def levels() -> Tensor:
        return torch.stack([noise.sample(BATCH, g) for g in gens])[seeds]

    def drawn() -> tuple[Tensor, Tensor | None]:
        chosen = torch.stack([torch.randint(len(task.data), (BATCH,), generator=g) for g in gens])[seeds]
        return task.data[chosen], None if classes is None else classes[chosen]

    def wide(values: Tensor) -> Tensor:
        return values.reshape(*values.shape, *[1] * len(shape))

    def given(labels: Tensor | None) -> tuple[Tensor, ...]:
        return () if labels is None else (labels,)

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.flatten(0, 1)

    def logits(x: Tensor, sigma: Tensor, labels: Tensor | None, grad: bool = False) -> Tensor:
        with torch.set_grad_enabled(grad):
            seen = task.network(flat(x), flat(sigma), flat(labels), return_features="only")
        return judge([f.unflatten(0, (rows, BATCH)) for f in seen], sigma, *given(labels))

    def samples(n: int) -> Tensor:
        gen = generator(7, "study/samples")
        z = torch.randn(n, *shape, generator=gen)
        labels = None if classes is None else classes[torch.randint(len(classes), (n,), generator=gen)]
        parts = []
        with torch.no_grad():
            for i in range(0, n, 500):
                part = z[i : i + 500].expand(rows, -1, *shape)
                some = () if labels is None else (labels[i : i + 500].expand(rows, -1),)
                parts.append(student(first * part, torch.full(part.shape[:2], first), *some, averaged=True))
        return torch.cat(parts, dim=1)

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        """Log p/q of noised samples in the plane; q from many samples of the student, without its own."""
        gen = generator(student.steps, "study/exact")
        z = torch.randn(rows, 4096, *shape, generator=gen)
        with torch.no_grad():
            other = student(first * z, torch.full(z.shape[:2], first))
        square = torch.cdist(x, other).square() / (2 * sigma.square()[..., None])
        log_q = torch.logsumexp(-square, dim=-1) - math.log(4096) - (2 * math.pi * sigma.square()).log()
        log_p = task.teacher.log_prob(x.flatten(0, 1).double(), sigma.flatten().double()).unflatten(
            0, (rows, BATCH)
        )
        return (log_p - log_q).float()

    many = reference(task, own.guidance, 20_000)
    shares = np.bincount(task.judge(many), minlength=task.modes) + 0.5
    shares, real = shares / shares.sum(), many[:SAMPLES]
    floor = measures(task, many[SAMPLES : 2 * SAMPLES], real, shares)
    yield {"task": block.task, "block": block.name, "floor": floor, "judge": task.right}
    marks = {own.steps // 4, own.steps // 2, own.steps}
    for step in range(own.steps):
        turn = (step + 1) % EVERY == 0
        x_real, labels = drawn()
        z = normal()
        with torch.set_grad_enabled(turn):
            x0 = student(first * z, torch.full((rows, BATCH), first), *given(labels))
        if turn:
            sigma, eps = levels(), normal()
            leaf = x0.detach().requires_grad_(bool((weights > 0).any()))
            x = leaf + wide(sigma) * eps
            with torch.no_grad():
                p = guided(flat(x), flat(sigma), flat(labels))
                q = fake(x, sigma, *given(labels))
            raw = logits(x, sigma, labels, grad=leaf.requires_grad)
            log_r = exact(x.detach(), sigma) if own.ratio == "exact" else raw.detach()
            h = torch.stack(
                [
                    n.update(log_r[r], noise.cdf(sigma[r]), measures_of[r].weight).weight
                    for r, n in enumerate(normalizers)
                ]
            )
            slope = score_difference(p, q.flatten(0, 1), x0.flatten(0, 1), sigma.flatten(), h.flatten())
            slope = slope.unflatten(0, (rows, BATCH)) / (x0[0].numel() * unit)
            if leaf.requires_grad:
                loss = (weights[:, None] * adversarial_generator_loss(raw)).mean(1).sum()
                slope = slope + torch.autograd.grad(loss, leaf)[0]
            gradients = torch.autograd.grad(x0, list(student.parameters.values()), slope, allow_unused=True)
            student.step(filled(student, gradients), ema_decay(student.steps + 1, half_life=200.0))
        x0, sigma, eps = x0.detach(), levels(), normal()
        x = x0 + wide(sigma) * eps
        prediction = fake(x, sigma, *given(labels))
        weight = edm_weight(sigma.flatten(), task.network.sigma_data)
        loss = denoising_loss(prediction.flatten(0, 1), x0.flatten(0, 1), weight).sum() / BATCH
        fake.step(filled(fake, torch.autograd.grad(loss, list(fake.parameters.values()), allow_unused=True)))
        on_real = logits(x_real + wide(sigma) * normal(), sigma, labels)
        on_fake = logits(x, sigma, labels)
        loss = sum(
            adversarial_discriminator_loss(real=a, fake=b) for a, b in zip(on_real, on_fake, strict=True)
        )
        judge.step(
            filled(judge, torch.autograd.grad(loss, list(judge.parameters.values()), allow_unused=True))
        )
        if step + 1 in marks:
            for (name, weight_, seed), x in zip(runs, samples(SAMPLES), strict=True):
                yield {
                    "task": block.task,
                    "block": block.name,
                    "divergence": name,
                    "adversarial": weight_,
                    "seed": seed,
                    "step": step + 1,
                    "steps": own.steps,
                    **measures(task, x, real, shares),
                }
        report(step + 1, own.steps)


def filled(stack: Stack, gradients: Any) -> list[Tensor]:
    """Zeros for parameters that a pass does not use, such as the label table of an unconditional network."""
    pairs = zip(stack.parameters.values(), gradients, strict=True)
    return [torch.zeros_like(p) if g is None else g for p, g in pairs]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Trains the blocks that are not done yet."""

    out: Path = Path("build/divergences")
    only: tuple[str, ...] = ()
    """Blocks as task/name; all without."""
    threads: int = 1
    steps: int = 0
    """Steps in place of those of the blocks, for a trial."""


def run(o: Run) -> None:
    torch.set_num_threads(o.threads)
    o.out.mkdir(parents=True, exist_ok=True)
    for block in blocks():
        name = f"{block.task}/{block.name}"
        done = o.out / f"{name.replace('/', '--').replace(',', '').replace(' ', '-')}.jsonl"
        claim = done.with_suffix(".begun")
        if done.exists() or (RESULTS / done.name).exists() or (o.only and name not in o.only):
            continue
        if claim.exists():
            print(f"{name}: another process trains it; if none does, remove {claim}", flush=True)
            continue
        claim.touch()
        if o.steps:
            block = replace(block, setting=replace(block.setting, steps=o.steps))
        began = time.monotonic()

        def report(step: int, steps: int, name: str = name, began: float = began) -> None:
            if step % max(1, steps // 20) == 0:
                passed = time.monotonic() - began
                print(
                    f"{name}: {step} of {steps}, {passed:.0f} s, {passed / step * (steps - step):.0f} s left",
                    flush=True,
                )

        part = done.with_suffix(".part")
        try:
            with part.open("w") as file:
                for row in carry_out(block, o.out, report):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
            part.rename(done)
        finally:
            claim.unlink()


if __name__ == "__main__":
    run(tyro.cli(Run))
