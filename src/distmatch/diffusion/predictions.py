"""What a network may predict, and how one prediction becomes another.

With ``x = alpha x0 + sigma eps`` and primes for time derivatives:

    score = -eps / sigma        v = alpha eps - sigma x0        flow = alpha' x0 + sigma' eps

All conversions are affine in x, so an error in one prediction is a known multiple of the error in x0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distmatch.base.checks import check_name
from distmatch.diffusion.denoiser import expand

PREDICTIONS = ("x0", "eps", "v", "flow", "score")


@dataclass(frozen=True)
class Coefficients:
    """A noise path at some times: one number per sample, float64.

    Attributes:
        alpha: Factor of the clean sample, (B,).
        sigma: Factor of the unit noise, (B,).
        d_alpha: Time derivative of ``alpha``, (B,).
        d_sigma: Time derivative of ``sigma``, (B,).
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        """``alpha sigma' - alpha' sigma = alpha^2 d(sigma / alpha)/dt``: positive while the noise grows."""
        return self.alpha * self.d_sigma - self.d_alpha * self.sigma

    @property
    def power(self) -> Tensor:
        """``alpha^2 + sigma^2``; 1 on a variance-preserving path."""
        return self.alpha**2 + self.sigma**2

    def over(self, x: Tensor) -> Coefficients:
        """The same, on the device and in the dtype of ``x`` (B, ...), shaped to broadcast over it."""
        alpha, sigma, d_alpha, d_sigma = (
            expand(c.to(x), x) for c in (self.alpha, self.sigma, self.d_alpha, self.d_sigma)
        )
        return Coefficients(alpha, sigma, d_alpha, d_sigma)


def check_prediction(name: str) -> None:
    """Refuses a name that is not in :data:`PREDICTIONS`.

    Raises:
        UserError: It is not.
    """
    check_name("prediction", name, PREDICTIONS)


def convert(value: Tensor, source: str, target: str, x: Tensor, coefficients: Coefficients) -> Tensor:
    """Turns a prediction of one kind into another.

    Only what the target needs is computed. So x0, v and flow turn into x0, eps, v, flow and score at pure
    noise too, where alpha = 0; eps and the score contain no information on x0 there, and the conversion
    divides by zero. At sigma = 0 the same holds for x0, which contains no information on the noise.

    Args:
        value: The prediction, (B, ...).
        source: What it is, one of :data:`PREDICTIONS`.
        target: What is wanted, one of :data:`PREDICTIONS`.
        x: The noised sample ``alpha x0 + sigma eps``, (B, ...).
        coefficients: The path at the times of the samples, (B,) each.

    Returns:
        The prediction of the target, (B, ...).

    Raises:
        UserError: An unknown prediction.
    """
    check_prediction(source)
    check_prediction(target)
    if source == target:
        return value
    c = coefficients.over(value)
    if target == "x0":
        return _clean(value, source, x, c)
    if target == "eps":
        return _noise(value, source, x, c)
    if target == "score":
        return -_noise(value, source, x, c) / c.sigma
    clean, noise = _clean(value, source, x, c), _noise(value, source, x, c)
    if target == "v":
        return c.alpha * noise - c.sigma * clean
    return c.d_alpha * clean + c.d_sigma * noise


def _clean(value: Tensor, source: str, x: Tensor, c: Coefficients) -> Tensor:
    if source == "x0":
        return value
    if source == "eps":
        return (x - c.sigma * value) / c.alpha
    if source == "score":
        return (x + c.sigma**2 * value) / c.alpha
    if source == "v":
        return (c.alpha * x - c.sigma * value) / c.power
    return (c.d_sigma * x - c.sigma * value) / c.wronskian


def _noise(value: Tensor, source: str, x: Tensor, c: Coefficients) -> Tensor:
    if source == "eps":
        return value
    if source == "x0":
        return (x - c.alpha * value) / c.sigma
    if source == "score":
        return -c.sigma * value
    if source == "v":
        return (c.sigma * x + c.alpha * value) / c.power
    return (c.alpha * value - c.d_alpha * x) / c.wronskian


def loss_weight(prediction: str, coefficients: Coefficients) -> Tensor:
    """The weight w with ``|prediction error|^2 = w |x0 error|^2``, (B,).

    A unit-weight loss on a target is the x0 loss with this weight: ``(alpha / sigma)^2`` for eps,
    ``(alpha / sigma^2)^2`` for the score, ``(alpha^2 + sigma^2)^2 / sigma^2`` for v and
    ``(alpha sigma' - alpha' sigma)^2 / sigma^2`` for the flow.

    Args:
        prediction: One of :data:`PREDICTIONS`.
        coefficients: The path at the times of the samples, (B,) each.

    Raises:
        UserError: An unknown prediction.
    """
    check_prediction(prediction)
    c = coefficients
    if prediction == "x0":
        return c.sigma.new_ones(c.sigma.shape)
    if prediction == "eps":
        return (c.alpha / c.sigma) ** 2
    if prediction == "score":
        return (c.alpha / c.sigma**2) ** 2
    if prediction == "v":
        return (c.power / c.sigma) ** 2
    return (c.wronskian / c.sigma) ** 2
