"""Training from observations alone, against closed forms for Gaussian data. Seeds are fixed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks
from distmatch.cli.main import main
from distmatch.data import Dataset, from_arrays, load_data
from distmatch.diffusion.conditioning import UNCONDITIONAL, Conditioning
from distmatch.diffusion.control.inverse import LinearPosterior, Spread, corrected
from distmatch.diffusion.control.linear import LinearMap, blurring, masked
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.training.observations import Observations, complete, observe
from distmatch.training.options import NetOptions, RunOptions, TeacherConfig, TrainOptions
from distmatch.training.prepare_teacher import prepare_training
from distmatch.training.runs import Job

DIM, N = 6, 2000
INDEX = torch.arange(DIM)
COVARIANCE = 0.5 * 0.8 ** (INDEX[:, None] - INDEX).abs().double()
MODEL = GaussianMixture([1.0], [[0.3] * DIM], COVARIANCE[None])


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_seen(x: Tensor, noise: float = 0.0) -> Observations:
    seen = torch.rand(x.shape, generator=gen(1)) < 0.5
    y = x + noise * torch.randn(x.shape, generator=gen(2))
    return Observations((y * seen).float(), seen, 0.0, noise, lambda items: UNCONDITIONAL, 0)


def matrix_of(operator: LinearMap, row: int, n: int) -> Tensor:
    """A of one sample of n in a call, (M, D), by its columns."""
    eye = torch.eye(math.prod(operator.shape), dtype=torch.float64)
    return torch.stack(
        [operator.apply(e.expand(n, -1).reshape(n, *operator.shape))[row].flatten() for e in eye], 1
    )


def operators() -> Iterable[tuple[LinearMap, tuple[int, ...], float]]:
    yield masked(torch.rand(3, DIM, generator=gen()) < 0.5), (DIM,), 0.3
    yield masked(torch.rand(3, 1, 2, 3, generator=gen()) < 0.5), (1, 2, 3), 0.0
    yield blurring(0.6, (1, 2, 3)), (1, 2, 3), 0.2
    yield blurring(0.6, (1, 2, 3)), (1, 2, 3), 0.0


@pytest.mark.parametrize("case", range(4))
def test_the_posterior_given_measurement_and_noised_sample_is_that_of_a_dense_solve(case: int) -> None:
    operator, shape, noise = list(operators())[case]
    sigma, spread = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64), Spread(COVARIANCE)
    x, value = (torch.randn(3, *shape, generator=gen(s), dtype=torch.float64) for s in (3, 4))
    value = operator.apply(value)

    class Shaped:
        num_classes, sigma_data, sigma_min, sigma_max = 0, 0.7, 0.002, 80.0

        def __call__(self, x: Tensor, sigma: Tensor, conditioning: Any = None) -> Tensor:
            return MODEL(x.flatten(1), sigma).reshape(x.shape)

    model: Any = Shaped()
    model.shape = shape
    found = LinearPosterior(model, operator, value, noise, covariance=spread)(x, sigma).flatten(1)
    drawn = corrected(x, value, operator, spread.of, torch.full((3,), noise), DIM).flatten(1)
    mean = torch.full((DIM,), 0.3, dtype=torch.float64)
    eye = torch.eye(DIM, dtype=torch.float64)
    for i, level in enumerate(sigma):
        a = matrix_of(operator, i, 3)
        # Both as Gaussian conditioning: rows of all that is measured, and the covariance of its noise.
        for first, rows, extra, expected in (
            (
                mean,
                torch.cat([eye, a]),
                torch.cat([level.expand(DIM) ** 2, torch.full((len(a),), noise**2)]),
                found,
            ),
            (x[i].flatten(), a, torch.full((len(a),), noise**2), drawn),
        ):
            measured = (
                torch.cat([x[i].flatten(), value[i].flatten()]) if len(rows) > len(a) else value[i].flatten()
            )
            inner = torch.linalg.pinv(rows @ COVARIANCE @ rows.mT + extra.diag().double(), rtol=1e-12)
            exact = first + COVARIANCE @ rows.mT @ inner @ (measured - rows @ first)
            torch.testing.assert_close(expected[i], exact, rtol=0, atol=1e-7)


def test_a_blur_is_a_weighted_mean_of_pixels() -> None:
    x = torch.randn(2, 1, 4, 5, generator=gen(), dtype=torch.float64)
    blur = blurring(0.8, (1, 4, 5))
    weight = np.exp(-0.5 * (np.arange(-4, 5) / 0.8) ** 2)
    row, column = 1, 4
    w = np.outer(weight[4 - row : 8 - row], weight[4 - column : 9 - column])
    expected = (x[:, 0].numpy() * w / w.sum()).sum((1, 2))
    np.testing.assert_allclose(blur.apply(x)[:, 0, row, column].numpy(), expected, rtol=1e-12)
    a = matrix_of(blur, 0, 1)
    back = blur.transpose(x).flatten(1)
    torch.testing.assert_close(back, x.flatten(1) @ a)


def covers(x: Tensor) -> bool:
    """Whether the covariance is right to 4 standard errors of that of N / 4 samples, which see a pair."""
    return bool(((torch.cov(x.double().mT) - COVARIANCE).abs() < 4 * 0.5 * math.sqrt(2 / (N / 4))).all())


@pytest.mark.statistical
def test_completions_have_the_distribution_of_the_data() -> None:
    x = MODEL.sample(N, seed=0)
    for noise in (0.0, 0.3):
        known = half_seen(x, noise)
        first = complete(MODEL, known, None, 0)
        assert covers(first), noise
        again = complete(MODEL, known, first, 1, rows=N)
        assert covers(again), noise
        assert not torch.equal(first, again)
        if not noise:  # the hidden are drawn: off by twice the variance that is left to them
            hidden, left = ~known.seen, 0.0  # type: ignore[operator]
            torch.testing.assert_close(again[~hidden], x[~hidden].float(), rtol=0, atol=1e-3)
            for mask, count in zip(*hidden.unique(dim=0, return_counts=True), strict=True):
                free, tied = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
                part = COVARIANCE[free][:, tied]
                known_part = part @ torch.linalg.pinv(COVARIANCE[tied][:, tied])
                left += int(count) * float(COVARIANCE[free, free].sum() - (known_part * part).sum())
            error = float((again - x)[hidden].square().sum())
            assert error == pytest.approx(2 * left, rel=0.08)
    assert not covers(half_seen(x).values)


@dataclass(frozen=True)
class Half(Ranks):
    """One of two ranks that gathers its own rows alone."""

    def gather(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        pass


def test_neither_batches_nor_ranks_change_completions() -> None:
    x = MODEL.sample(41, seed=0)
    known = half_seen(x, 0.1)
    for before in (None, x.float()):
        whole = complete(MODEL, known, before, 1, rows=41)
        torch.testing.assert_close(complete(MODEL, known, before, 1, rows=7), whole, rtol=0, atol=1e-4)
        both = torch.cat([complete(MODEL, known, before, 1, ranks=Half(i, 2)) for i in (0, 1)])
        assert len(both) == 42
        torch.testing.assert_close(both[:41], whole, rtol=0, atol=1e-4)


def job_on(data: Dataset, steps: int, seed: int = 0, **settings: Any) -> Job:
    run = RunOptions(steps=steps, batch=64, seed=seed, device="cpu")
    config = TeacherConfig(**{"lr": 3e-3, "lr_rampup": 20, "ema_half_life": 20.0, **settings})
    return prepare_training(TrainOptions(run=run, net=NetOptions(width=32, depth=2), teacher=config), data)


def go(job: Job, steps: int) -> Any:
    while job.state.step < steps:
        job.step(job.state, job.batches(job.state.step))
    return job.result()


def pictures() -> Dataset:
    x = torch.rand(64, 1, 4, 4, generator=gen()) * 2 - 1
    return from_arrays(x.numpy(), name="pictures")


def test_what_is_hidden_changes_nothing_to_the_bit() -> None:
    data = pictures()
    settings = {"observe": "mask:0.5", "observe_noise": 0.1, "observe_every": 2}
    _, known = observe(data, TeacherConfig(**settings), 0)
    other = torch.where(known.seen, data.raw, -data.raw)  # type: ignore[arg-type]
    first, second = (job_on(replace(data, raw=raw), 4, **settings) for raw in (data.raw, other))
    assert torch.equal(first.data.raw, second.data.raw)  # type: ignore[union-attr]
    go(first, 3)
    go(second, 3)
    for a, b in zip(first.state.tensors(), second.state.tensors(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_is_the_same_to_the_bit() -> None:
    settings = {"observe": "blur:0.5", "observe_noise": 0.1, "observe_every": 3}
    whole, part, again = (job_on(pictures(), 8, **settings) for _ in range(3))
    for stop in (4, 6):  # in the middle of a turn, and right before completions are made
        go(part, stop)
        again.state.load_state_dict(copy.deepcopy(part.state.state_dict()))
        go(again, 8)
        go(whole, 8)
        for a, b in zip(whole.state.tensors(), again.state.tensors(), strict=True):
            assert torch.equal(a, b)


def test_a_step_is_that_of_each_completed_item() -> None:
    job = job_on(pictures(), 4, observe="mask:0.5", label_dropout=0.0)
    go(job, 1)
    batch = job.batches(1)
    job.state.optimizers["denoiser"].step = lambda *a, **k: None  # type: ignore[method-assign, assignment]
    before = job.state.generator.get_state()
    seen: list[Tensor] = []
    job.state.denoiser.register_forward_hook(lambda module, inputs, out: seen.extend((*inputs[:2], out)))
    loss = float(job.step(job.state, batch)["loss"])
    job.state.generator.set_state(before)
    noisy, sigma, out = seen[:3]
    completed, total = job.state.memory["completed"], 0.0
    sd = job.state.denoiser.sigma_data
    for i, item in enumerate(batch.items.tolist()):
        s = float(sigma[i])
        error = out[i].detach().double() - completed[item]
        total += (s**2 + sd**2) / (s * sd) ** 2 * float(error.square().mean()) / len(batch.items)
        # What was added to the completed item is noise: independent of it and of standard deviation sigma.
        assert abs(float(((noisy[i] - completed[item]) / s).square().mean()) - 1) < 5 * math.sqrt(2 / 16)
    assert loss == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
@pytest.mark.statistical
def test_a_teacher_of_half_seen_pairs_is_near_the_closed_form() -> None:
    # Pairs of correlation 0.9 of which each number is hidden half of the time: the teacher against the exact
    # denoiser, and one that takes what is hidden for 0.
    exact = GaussianMixture([1.0], [[0.0, 0.0]], [[[0.3, 0.27], [0.27, 0.3]]])
    x = exact.sample(2000, seed=5)
    data = Dataset(x.float(), None, (), "pairs", from_arrays(x.numpy()).scaling.identity(2))
    sigma = torch.logspace(-1, 0.5, 1024)
    y = exact.sample(1024, seed=1) + sigma[:, None] * torch.randn(1024, 2, generator=gen(7))

    def off(model: Any) -> float:
        with torch.no_grad():
            return float(((model(y, sigma) - exact(y, sigma)) / sigma[:, None]).square().mean())

    learned = off(go(job_on(data, 200, observe="mask:0.5", observe_every=100), 200))
    shown, _ = observe(data, TeacherConfig(observe="mask:0.5"), 0)
    naive = off(go(job_on(shown, 200), 200))
    assert learned < 0.02
    assert naive > 5 * learned


def test_given_observations_are_taken_as_they_are(tmp_path: Path) -> None:
    seen = torch.rand(64, 1, 4, 4, generator=gen(3)) < 0.7
    data = pictures()
    np.savez(tmp_path / "x.npz", x=data.raw.numpy(), condition_seen=seen.numpy())
    line = f"train --data {tmp_path}/x.npz --observe mask:0.5 --observe-given --steps 2 --batch 16 --net mlp"
    assert main([*line.split(), "--width", "8", "--depth", "1", "--out", str(tmp_path / "run")]) == 0
    # Nor does a student compare with them as if they were samples.
    start = f"distill --teacher {tmp_path}/run --steps 5 --dry-run --out {tmp_path}/student --method"
    assert main([*start.split(), "dmd2"]) == 2
    assert main([*start.split(), "diff-instruct"]) == 0
    assert main([*start.split(), "dmd2", "--data", f"{tmp_path}/x.npz"]) == 0
    config = TeacherConfig(observe="mask:0.5", observe_given=True)
    shown, known = observe(load_data(tmp_path / "x.npz"), config, 0)
    assert torch.equal(known.values, data.batch(torch.arange(64))[0] * seen)
    assert not shown.conditions


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--observe mask:1.5", "--observe must be"),
        ("--observe blur:-1", "--observe must be"),
        ("--observe fog", "--observe must be"),
        ("--observe mask:0.5 --observe-noise -1", "--observe-noise must not be negative"),
        ("--observe-noise 0.1", "goes with --observe"),
        ("--observe mask:0.99999", "never seen"),
        ("--observe blur:3", "finest detail"),
        ("--observe mask:0.5 --observe-given", "what is seen"),
        ("--observe mask:0.5 --flip", "--flip"),
        ("--observe mask:0.5 --path kinetic-optimal", "kinetic-optimal"),
        ("--observe mask:0.5 --ambient-noise 0.1", "--ambient-noise"),
        ("--observe mask:0.5 --watch-every 5 --keep-best fd", "--keep-best"),
        ("--data skewed2 --observe blur:0.5", "images"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options.split(), "--steps", "2", "--out", str(tmp_path / "run")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_masks_that_do_not_match_are_refused_and_lonely_places_are_told() -> None:
    data = pictures()
    config = TeacherConfig(observe="mask:0.5", observe_given=True)
    for shape in ((64, 1, 4, 3), (64, 16), (64, 1, 1, 4)):
        mask = torch.ones(shape, dtype=torch.int64)
        given = replace(data, conditions=Conditioning({"seen": mask}))
        if shape == (64, 1, 1, 4):
            assert observe(given, config, 0)[1].warnings == []
        else:
            with pytest.raises(UserError, match="what is seen of each sample"):
                observe(given, config, 0)
    left = torch.zeros(64, 1, 4, 4)
    left[:32, ..., :2], left[32:, ..., 2:] = 1, 1  # the left half of some, the right half of others
    given = replace(data, conditions=Conditioning({"seen": left}))
    assert "64 pairs" in observe(given, config, 0)[1].warnings[0]
