"""Training from observations alone, through a known forward model: y = A x + noise, A known for each item.

No loss in the space of the observations has the denoiser of whole samples as its minimum, since the noised
sample that this takes as its input is never seen whole. The data are therefore completed, by expectation
maximization (Rozet et al. 2024, "Learning diffusion priors from observations by expectation maximization"):
every so many steps each observation becomes a draw from the posterior p(x | y) under the model as it is, and
between them the model is trained on these with the ordinary loss. The likelihood of the observations rises in
each round; where they determine the distribution of x, that distribution is where it ends.

Draws are those of :class:`~distmatch.diffusion.control.inverse.LinearPosterior`, which compares A D(x) with
y and spreads the difference over x by the covariance of the completions before. That is exact where the model
is Gaussian, as the first one is, which is fitted to the observations without a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.ranks import ALONE, Ranks
from distmatch.base.seeds import generator
from distmatch.data import Dataset
from distmatch.diffusion.conditioning import Conditioning, for_model
from distmatch.diffusion.control.inverse import LinearPosterior, Spread, corrected
from distmatch.diffusion.control.linear import LinearMap, blur_matrix, blurring, masked
from distmatch.diffusion.denoiser import Denoiser
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import default_grid, solve
from distmatch.training.observe_options import ObserveSettings, forward_model

SEEN = "seen"
"""The condition of given data that says what is seen of each sample."""
LEVELS = 20
"""Noise levels of a draw from the posterior."""
MOST_NUMBERS = 4096
"""Numbers in a sample whose covariance is still a matrix of bearable size."""
_FIT, _ROUNDS, _GRADIENTS = 4096, 20, 32  # items, rounds and conjugate gradients of the first Gaussian
_LEAST = 1e-3  # gain of the finest detail below which float32 observations do not hold it


@dataclass(frozen=True, eq=False)
class Observations:
    """What is known of each item: y = A x + noise.

    Attributes:
        values: y in model space, (N, *shape), 0 where hidden.
        seen: Where y is seen, (N, *shape) boolean; None where A is a blur.
        width: That of the blur in pixels.
        noise: Standard deviation of the noise in y.
        conditioning: What the items are conditioned on, by their numbers (B,).
        seed: Seed of the draws.
    """

    values: Tensor
    seen: Tensor | None
    width: float
    noise: float
    conditioning: Callable[[Tensor], Conditioning]
    seed: int

    @property
    def warnings(self) -> list[str]:
        """What the observations leave open."""
        apart = 0 if self.seen is None else never_together(self.seen)
        if not apart:
            return []
        return [
            f"{apart} pairs of places are never seen together: how their values depend on each other is "
            "left to the network"
        ]

    def operator(self, items: Tensor) -> LinearMap:
        """A for the items (B,)."""
        if self.seen is None:
            return blurring(self.width, tuple(self.values.shape[1:]))
        return masked(self.seen[items])

    def mean(self) -> Tensor:
        """The mean of what is seen at each place, (*shape) float32; a blur keeps it but for edges."""
        if self.seen is None:
            return self.values.mean(0)
        return self.values.sum(0) / self.seen.sum(0)

    def std(self) -> float:
        """The standard deviation of what is seen about its common mean, without that of the noise."""
        seen = self.values if self.seen is None else self.values[self.seen]
        return max(float(seen.double().var(correction=0)) - self.noise**2, 0.0) ** 0.5 or 1.0


def complete(
    model: Denoiser,
    observations: Observations,
    before: Tensor | None,
    turn: int,
    *,
    rows: int = 256,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> Tensor:
    """One draw from p(x | y) for each item, (N, *shape) float32.

    It is the same for all ``rows`` and ranks but for rounding.

    Args:
        model: The model of x.
        observations: The y.
        before: The draws before, whose covariance the posterior has; None draws from a Gaussian fitted to y.
        turn: Number of the completion, from 0; each has other random numbers.
        rows: Items at a time.
        device: Where the model is.
        ranks: The processes among which the items are shared out.
    """
    n, shape = len(observations.values), tuple(observations.values.shape[1:])
    if before is None:
        mean, covariance = fit_gaussian(observations, device)
        ranks.broadcast((mean, covariance))
    else:
        mean, covariance = _moments(before.to(device), observations)
    spread = Spread(covariance)
    share = -(-n // ranks.size)
    # All ranks complete as many, the last ones some items twice: gathering needs equal numbers.
    own = torch.arange(ranks.index * share, (ranks.index + 1) * share).clamp_max(n - 1)
    levels = default_grid(model, LEVELS)
    done = []
    for items in own.split(rows):
        if before is None:
            done.append(_gaussian_draw(observations, items, mean, spread, turn).float())
            continue
        value = observations.values[items].to(device)
        posterior = LinearPosterior(
            model, observations.operator(items), value, observations.noise, covariance=spread
        )
        start = SampleNoise(observations.seed, items, shape, device).normal(turn + 1)
        given = for_model(model, observations.conditioning(items)).to(device) or None
        y = (float(levels[0]) * start).to(value)
        done.append(solve(posterior, y, levels, "dpmpp-2m", conditioning=given).y)
    return ranks.gather(torch.cat(done))[:n]


def fit_gaussian(observations: Observations, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean (*shape) and covariance (D, D) of the Gaussian under which the y are most likely, about, float64.

    By expectation maximization on a part of the items, with a draw of each instead of its expectations.
    """
    items = torch.arange(min(len(observations.values), _FIT))
    mean = observations.mean().to(device, torch.float64)
    covariance = observations.std() ** 2 * torch.eye(mean.numel(), dtype=mean.dtype, device=device)
    for turn in range(_ROUNDS):
        drawn = _gaussian_draw(observations, items, mean, Spread(covariance), -1 - turn)
        mean, covariance = _moments(drawn, observations)
    return mean, covariance


def _gaussian_draw(
    observations: Observations, items: Tensor, mean: Tensor, spread: Spread, turn: int
) -> Tensor:
    """Draws from p(x | y) under a Gaussian, (B, *shape) float64; negative turns are those of its fit."""
    shape, step = tuple(mean.shape), 2**20 - turn if turn < 0 else turn + 1
    normals = SampleNoise(observations.seed, items, shape, mean.device)
    x = mean + spread.root(normals.normal(step))
    value = observations.values[items].to(mean) + observations.noise * normals.normal(step, 1)
    noise = torch.full((len(items),), observations.noise, dtype=mean.dtype, device=mean.device)
    return corrected(x, value, observations.operator(items), spread.of, noise, _GRADIENTS)


def _moments(x: Tensor, observations: Observations) -> tuple[Tensor, Tensor]:
    """Mean and covariance of samples, in float64, with something left in each direction."""
    flat = x.flatten(1).double()
    least = 1e-4 * observations.std() ** 2 * torch.eye(flat.shape[1], dtype=flat.dtype, device=x.device)
    return x.double().mean(0), torch.cov(flat.T, correction=0) + least


def observe(data: Dataset, settings: ObserveSettings, seed: int) -> tuple[Dataset, Observations]:
    """Observations of data, and a data set that holds nothing else, with 0 for what is hidden.

    Args:
        data: The data; with ``observe_given`` they are the observations.
        settings: The forward model and its noise.
        seed: Draws masks and noise, once.

    Raises:
        UserError: They do not determine the distribution of the data, or do not fit the forward model.
    """
    found = forward_model(settings.observe)
    if found is None:  # settings check their values, so nothing that was parsed comes here
        raise UserError("no forward model was named", got=repr(settings.observe))
    kind, number = found
    if math.prod(data.shape) > MOST_NUMBERS:
        raise UserError(
            "samples of this size cannot be completed: their covariance is a matrix",
            got=f"{math.prod(data.shape)} numbers in a sample",
            expected=f"at most {MOST_NUMBERS}",
            fix="train on smaller images, or on latents",
        )
    data, given = _taken(data) if settings.observe_given and kind == "mask" else (data, None)
    n, shape = len(data), data.shape
    if kind == "blur":
        _check_blur(data, number)
    elif given is not None:
        check_seen(given)
    seen = given
    if kind == "mask" and not settings.observe_given:
        # One number a pixel: the channels of an image are hidden together.
        places = (1, *shape[1:]) if len(shape) >= 3 else shape
        drawn = torch.rand((n, *places), generator=generator(seed, "what is seen"))
        seen = (drawn >= number).expand(n, *shape)
        check_seen(seen)
    values = torch.empty(n, *shape)
    raw = torch.empty(n, *shape, dtype=torch.float64 if data.scaling.precise else torch.float32)
    known = Observations(values, seen, number, settings.observe_noise, data.conditioning, seed)
    for items in torch.arange(n).split(4096):
        x = data.batch(items)[0].cpu()
        if settings.observe_given:
            y = x if seen is None else x * seen[items]
        else:
            eps = SampleNoise(seed, items, shape).normal(0).to(x) if settings.observe_noise else 0.0
            clear = known.operator(items).apply(x)
            y = clear + settings.observe_noise * (eps if seen is None else eps * seen[items])
        values[items], raw[items] = y, data.scaling.to_raw(y)
    return replace(data, raw=raw, recorded=None), known


def _taken(data: Dataset) -> tuple[Dataset, Tensor]:
    """Given data without the condition that says what is seen, and what that is, (N, *shape) boolean."""
    others = dict(data.conditions)
    mask = others.pop(SEEN, None)
    wanted = (len(data), *data.shape)
    fits = mask is not None and mask.ndim == len(wanted) and bool(((mask == 0) | (mask == 1)).all())
    if mask is None or not fits or any(a not in (1, b) for a, b in zip(mask.shape, wanted, strict=True)):
        raise UserError(
            "it is not known what is seen of each sample",
            got="no condition_seen" if mask is None else f"condition_seen of shape {tuple(mask.shape)}",
            expected=f"1 where a sample is seen and 0 where it is hidden, of shape {wanted}",
            fix="np.savez(path, x=..., condition_seen=...), with 1 for an axis on which it does not depend",
        )
    return replace(data, conditions=Conditioning(others)), (mask == 1).expand(wanted)


def check_seen(seen: Tensor) -> None:
    """Refuses masks, (N, *shape) boolean, under which the distribution of the samples cannot be known.

    Raises:
        UserError: A place is hidden in all of them.
    """
    never = (~seen.any(0)).nonzero()
    if len(never):
        raise UserError(
            "a place that is never seen cannot be learned: all values there fit the observations as well",
            got=f"{len(never)} of {seen[0].numel()} places hidden in all {len(seen)} samples, "
            f"the first at {tuple(never[0].tolist())}",
            expected="masks that differ from sample to sample and show each place in some",
            fix="use another share or more samples; crop what is never seen",
        )


def never_together(seen: Tensor) -> int:
    """The number of pairs of places that no sample shows together; not counted, 0, beyond 2,048 places."""
    flat = seen.flatten(1).float()
    return 0 if flat.shape[1] > 2048 else int((flat.T @ flat == 0).sum()) // 2


def _check_blur(data: Dataset, width: float) -> None:
    """Refuses a blur of what are no images, or one that leaves nothing of their finest detail."""
    if data.scaling.kind != "image":
        raise UserError(
            "--observe blur is for images and video",
            got=f"{data.name}, which contains {data.kind}s",
            fix="use --observe mask",
        )
    gains = [float(torch.linalg.svdvals(blur_matrix(width, n))[-1]) for n in data.shape[-2:]]
    if gains[0] * gains[1] < _LEAST:
        raise UserError(
            "this blur removes the finest detail, and observations without it cannot teach it",
            got=f"a width of {width:g} pixels, which leaves {gains[0] * gains[1]:.1g} of it",
            expected=f"at least {_LEAST:g}",
            fix="use a narrower blur, or make the images smaller",
        )
