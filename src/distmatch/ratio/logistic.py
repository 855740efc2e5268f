"""The ratio as the logit of a classifier between two samples.

The Bayes-optimal logit of "came from p" is log r + log(n_p / n_q), so log r is the logit less the log prior.
A logistic regression on linear or quadratic features comes first, solved to its optimum; a network then
learns what it leaves over, and is stopped, or not used at all, by its loss on held-out samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distmatch.base import seeds
from distmatch.base.checks import check_count, check_name
from distmatch.base.errors import UserError
from distmatch.ratio.calibration import CALIBRATIONS, calibrate
from distmatch.ratio.samples import CHUNK, Fitted, LogRatio, in_chunks, split

MODELS = ("mlp", "quadratic", "linear")
_ALL_PAIRS = 16  # up to this many columns all products are features, beyond it only squares
_MOST_COLUMNS = 2048  # the regression solves a dense system of twice this size
_PRIOR_VARIANCE = 100.0  # of a regression weight: keeps it finite on separable samples, invisible otherwise
_CALIBRATION_SHARE = 0.2
_WIDTH = 64
_BATCH = 512
_CHECK_EVERY = 20
_PATIENCE = 8  # checks without progress before the network stops
_SEPARATED = 0.99


@dataclass(frozen=True)
class ClassifierSettings:
    """How the classifier is fitted.

    Attributes:
        model: One of :data:`MODELS`; ``mlp`` is the quadratic regression plus a network.
        calibration: One of :data:`distmatch.ratio.calibration.CALIBRATIONS`. A fifth of the samples is set
            aside for it; early stopping leaves so little to correct that the default is ``none``.
        steps: Optimizer steps of the network, at most.
    """

    model: str = "mlp"
    calibration: str = "none"
    steps: int = 1000

    def __post_init__(self) -> None:
        check_name("classifier model", self.model, MODELS)
        check_name("calibration", self.calibration, CALIBRATIONS)
        check_count("steps", self.steps, 0)


def fit_classifier(p: Tensor, q: Tensor, settings: ClassifierSettings, seed: int) -> Fitted:
    """Fits and calibrates a classifier.

    Args:
        p: Samples of p, (n, d) float64, standardized.
        q: Samples of q, (m, d), likewise.
        settings: The settings.
        seed: Seed of the calibration split, the network and its batches.
    """
    stream = seeds.generator(seed, "ratio/calibration")
    parts_p = parts_q = split(len(p), _CALIBRATION_SHARE, stream, p.device)
    if len(q) != len(p):  # rows that are pairs, as the waypoints of a chain are, stay together
        parts_q = split(len(q), _CALIBRATION_SHARE, stream, q.device)
    train_p, held_p, train_q, held_q = p[parts_p[0]], p[parts_p[1]], q[parts_q[0]], q[parts_q[1]]
    calibration = settings.calibration
    if settings.model != "mlp" and calibration == "none":
        train_p, train_q = p, q  # nothing is held out that needs to be
    raw = fit_regression(train_p, train_q, "linear" if settings.model == "linear" else "quadratic")
    chosen: dict[str, float | int | str] = {"model": settings.model, "calibration": calibration}
    if settings.model == "mlp":
        raw, chosen["steps"] = _with_network(raw, train_p, train_q, held_p, held_q, settings.steps, seed)
    with torch.no_grad():
        on_p, on_q = in_chunks(raw, held_p), in_chunks(raw, held_q)
    calibrated, parameters = calibrate(calibration, on_p, on_q)
    accuracy = balanced_accuracy(on_p, on_q)
    chosen |= parameters
    chosen["accuracy"] = accuracy
    warnings = []
    if accuracy > _SEPARATED:
        warnings.append(
            f"the classifier separates the samples in {accuracy:.1%} of cases: they hardly overlap, and "
            "log-ratios far beyond the log of the sample size are extrapolated; try method='telescoping'"
        )
    return Fitted(lambda x: calibrated(raw(x)), chosen, tuple(warnings))


def balanced_accuracy(on_p: Tensor, on_q: Tensor) -> float:
    """How often the sign of log r is right, both samples counting half."""
    return 0.5 * ((on_p > 0).double().mean() + (on_q < 0).double().mean()).item()


def fit_regression(p: Tensor, q: Tensor, kind: str) -> LogRatio:
    """The log-ratio of a logistic regression, at its optimum.

    Args:
        p: Samples of p, (n, d) float64.
        q: Samples of q, (m, d) float64.
        kind: ``linear``, or ``quadratic``: products of two columns too (squares only beyond 16 columns).

    Returns:
        A function with exact gradients. Two Gaussians have a quadratic log-ratio, with equal covariances a
        linear one.

    Raises:
        UserError: There are too many columns to solve for.
    """
    d = p.shape[1]
    if d > _MOST_COLUMNS:
        raise UserError(
            "too many numbers per sample for a density ratio",
            got=d,
            expected=f"at most {_MOST_COLUMNS}",
            fix="use the ratio of features instead, for example of a network's hidden layer",
        )
    expand = _expansion(d, kind)
    mean, scale = _moments(lambda x: expand(x), p, q)

    def features(x: Tensor) -> Tensor:
        ones = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
        return torch.cat([ones, (expand(x) - mean) / scale], 1)

    weights = _newton(features, p, q)
    weights[0] -= math.log(len(p) / len(q))
    return lambda x: features(x) @ weights


def _expansion(d: int, kind: str) -> Callable[[Tensor], Tensor]:
    if kind == "linear":
        return lambda x: x
    if d > _ALL_PAIRS:
        return lambda x: torch.cat([x, x.square()], 1)
    rows, columns = torch.triu_indices(d, d)
    return lambda x: torch.cat([x, x[:, rows] * x[:, columns]], 1)


def _moments(expand: Callable[[Tensor], Tensor], p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over both samples."""
    both = torch.cat([p, q])
    mean = torch.stack([expand(part).sum(0) for part in both.split(CHUNK)]).sum(0) / len(both)
    squares = torch.stack([(expand(part) - mean).square().sum(0) for part in both.split(CHUNK)]).sum(0)
    scale = (squares / len(both)).sqrt()
    return mean, torch.where(scale > 0, scale, torch.ones_like(scale))


def _newton(features: Callable[[Tensor], Tensor], p: Tensor, q: Tensor) -> Tensor:
    """Weights of the regression; its loss is convex, so Newton's method with step halving finds them."""
    parts = [(part, 1.0) for part in p.split(CHUNK)] + [(part, 0.0) for part in q.split(CHUNK)]
    n = len(p) + len(q)
    width = features(p[:1]).shape[1]
    ridge = torch.full((width,), 1.0 / (_PRIOR_VARIANCE * n), dtype=p.dtype, device=p.device)
    ridge[0] = 0.0  # the offset is free
    w = torch.zeros(width, dtype=p.dtype, device=p.device)
    w[0] = math.log(len(p) / len(q))

    def loss(w: Tensor) -> Tensor:
        sums = [nn.functional.softplus((1 - 2 * label) * (features(x) @ w)).sum() for x, label in parts]
        return torch.stack(sums).sum() / n + 0.5 * (ridge * w.square()).sum()

    value = loss(w)
    for _ in range(100):
        gradient, hessian = ridge * w, torch.diag(ridge + 1e-12)
        for x, label in parts:
            phi = features(x)
            chance = torch.sigmoid(phi @ w)
            gradient = gradient + phi.T @ (chance - label) / n
            hessian = hessian + (phi * (chance * (1 - chance))[:, None]).T @ phi / n
        step = torch.linalg.solve(hessian, gradient)
        shrink = 1.0
        while shrink > 1e-8 and (lower := loss(w - shrink * step)) > value:
            shrink /= 2
        w, value = w - shrink * step, lower
        if (gradient @ step).abs() < 1e-15:
            break
    return w


def _network(d: int) -> nn.Sequential:
    """A smooth function of d numbers that starts at zero."""
    net = nn.Sequential(
        nn.Linear(d, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, 1)
    )
    nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(net[-1].bias)  # type: ignore[arg-type]
    return net


def _with_network(
    raw: LogRatio, p: Tensor, q: Tensor, held_p: Tensor, held_q: Tensor, steps: int, seed: int
) -> tuple[LogRatio, int]:
    """Adds a network to ``raw``; returns the sum and the step with the least held-out loss."""
    prior = math.log(len(p) / len(q))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.stream_seed(seed, "ratio/network"))
        net = _network(p.shape[1])
    net.to(p.device)  # float32: the regression below it holds the part that needs more digits
    with torch.no_grad():
        x, base = torch.cat([p, q]).float(), in_chunks(raw, torch.cat([p, q])).float() + prior
        held, held_base = torch.cat([held_p, held_q]).float(), in_chunks(raw, torch.cat([held_p, held_q]))
    label = torch.cat([torch.ones(len(p)), torch.zeros(len(q))]).to(p.device)
    held_label = torch.cat([torch.ones(len(held_p)), torch.zeros(len(held_q))]).to(p.device)
    held_base = held_base.float() + prior
    loss = nn.functional.binary_cross_entropy_with_logits
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    stream = seeds.generator(seed, "ratio/batches")
    best, best_step, best_net = math.inf, 0, copy.deepcopy(net)
    with torch.enable_grad():
        for step in range(steps + 1):
            if step % _CHECK_EVERY == 0 or step == steps:
                with torch.no_grad():
                    value = loss(held_base + in_chunks(net, held)[:, 0], held_label).item()
                if value < best:
                    best, best_step, best_net = value, step, copy.deepcopy(net)
                elif step - best_step >= _PATIENCE * _CHECK_EVERY:
                    break
            index = torch.randint(len(x), (min(_BATCH, len(x)),), generator=stream).to(p.device)
            optimizer.zero_grad(set_to_none=True)
            loss(base[index] + net(x[index])[:, 0], label[index]).backward()
            optimizer.step()
    final = best_net.double().requires_grad_(False)
    return (lambda z: raw(z) + final(z)[:, 0]), best_step
