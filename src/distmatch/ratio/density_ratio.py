"""One call for every way to fit a density ratio to two samples, and the object it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distmatch.base import seeds
from distmatch.base.checks import check_name, check_number
from distmatch.base.errors import UserError
from distmatch.base.samples import checked, checked_pair
from distmatch.ratio.diagnostics import MassTests, mass_tests
from distmatch.ratio.kliep import KliepSettings, fit_kliep
from distmatch.ratio.least_squares import LeastSquaresSettings, fit_least_squares
from distmatch.ratio.logistic import ClassifierSettings, fit_classifier
from distmatch.ratio.neighbors import fit_neighbors
from distmatch.ratio.samples import (
    LOG_LIMIT,
    SMALLEST,
    Fitted,
    LogRatio,
    Standardizer,
    in_chunks,
    split,
    standardizer,
)
from distmatch.ratio.telescoping import TelescopingSettings, fit_telescoping

METHODS = ("classifier", "ulsif", "rulsif", "kliep", "telescoping", "knn")
_RELATIVE = 0.1  # RuLSIF's default share of p in the denominator
_RELATIVE_EDGE = 1e-3  # a relative ratio nearer than this to its bound 1/a cannot be turned into p/q

_OPTIONS = {
    "classifier": ("model", "calibration", "steps"),
    "telescoping": ("bridges", "model", "calibration", "steps"),
    "ulsif": ("centers", "widths", "ridges"),
    "rulsif": ("alpha", "centers", "widths", "ridges"),
    "kliep": ("centers", "widths", "folds"),
    "knn": ("neighbors",),
}


@dataclass(frozen=True)
class DensityRatio:
    """A fitted density ratio r = p/q. Everything it returns is differentiable with respect to the points.

    Attributes:
        method: How it was fitted.
        chosen: Hyperparameters and what was measured while choosing them.
        mass: Its mass tests on the samples that were held out.
        warnings: All that may be wrong with it; empty if nothing was found.
        relative: The share a if a relative ratio p / (a p + (1 - a) q) was fitted, else 0.
    """

    method: str
    chosen: dict[str, float | int | str]
    mass: MassTests
    warnings: tuple[str, ...]
    relative: float
    _fitted: Fitted = field(repr=False)
    _standardize: Standardizer = field(repr=False)

    @property
    def reliable(self) -> bool:
        """Whether nothing was found that speaks against it."""
        return not self.warnings

    def log_ratio(self, x: Tensor) -> Tensor:
        """Log p(x)/q(x), held within [-80, 80].

        RuLSIF fits a relative ratio r_a; here it is turned back by r = (1 - a) r_a / (1 - a r_a). Where r_a
        comes within 0.1% of its bound 1/a, or exceeds it, r is held at its value there.

        Args:
            x: Points (N, *shape), floating point.

        Returns:
            (N,), of the dtype of ``x`` (float32 for half precision).

        Raises:
            UserError: The points do not have the shape of the samples, or are not finite.
        """
        return self._evaluate(x, plain_log_ratio(self._fitted))

    def ratio(self, x: Tensor) -> Tensor:
        """p(x)/q(x), the exponential of :meth:`log_ratio`, of the same shape and dtype."""
        return self.log_ratio(x).exp()

    def relative_log_ratio(self, x: Tensor) -> Tensor:
        """Log of the relative ratio p / (a p + (1 - a) q) as RuLSIF fitted it; for other methods log p/q."""
        return self._evaluate(x, self._fitted.log_r)

    def _evaluate(self, x: Tensor, function: LogRatio) -> Tensor:
        shape = self._standardize.shape
        if not isinstance(x, Tensor) or x.ndim == 0 or tuple(x.shape[1:]) != shape:
            raise UserError(
                "these points do not match the ratio",
                got=f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__,
                expected=f"(N, {', '.join(map(str, shape))})" if shape else "(N,)",
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        if len(x) == 0:
            return torch.zeros(0, dtype=dtype, device=x.device)
        checked(x, "x", least=1)
        return in_chunks(lambda part: _held(function(self._standardize(part))), x).to(dtype)


def _held(log_r: Tensor) -> Tensor:
    return log_r.clamp(-LOG_LIMIT, LOG_LIMIT)


def plain_log_ratio(fitted: Fitted) -> LogRatio:
    """Log p/q of standardized points, from a fit that may be of a relative ratio."""
    a = fitted.relative
    if a == 0.0:
        return fitted.log_r

    def converted(z: Tensor) -> Tensor:
        held = fitted.log_r(z).clamp(max=math.log1p(-_RELATIVE_EDGE) - math.log(a))
        return math.log1p(-a) + held - torch.log1p(-a * held.exp())

    return converted


def fit_ratio(
    x_p: Tensor,
    x_q: Tensor,
    method: str = "classifier",
    *,
    held_out: float = 0.2,
    seed: int = 0,
    model: str | None = None,
    calibration: str | None = None,
    steps: int | None = None,
    bridges: int | None = None,
    alpha: float | None = None,
    centers: int | None = None,
    widths: Sequence[float] | None = None,
    ridges: Sequence[float] | None = None,
    folds: int | None = None,
    neighbors: int | None = None,
) -> DensityRatio:
    """Fits r = p/q to samples of p and of q.

    * ``classifier``: the logit of a classifier, less the log prior; ``model`` (mlp, quadratic, linear),
      ``calibration`` (none, platt, temperature, isotonic), ``steps`` of the network.
    * ``telescoping``: a sequence of classifiers between waypoints, for p and q that hardly overlap;
      ``bridges`` (chosen if not given) and the options of the classifier.
    * ``ulsif``: least squares on kernels; ``centers``, and ``widths`` and ``ridges`` to choose from by
      leave-one-out.
    * ``rulsif``: the same for the relative ratio p / (alpha p + (1 - alpha) q), which is bounded; ``alpha``
      (0.1). See :meth:`DensityRatio.log_ratio` for how it becomes p/q again.
    * ``kliep``: maximum likelihood on kernels; ``centers``, ``widths`` (chosen by ``folds``-fold
      cross-validation).
    * ``knn``: nearest neighbors; ``neighbors`` (chosen if not given).

    Args:
        x_p: Samples of p, (N, *shape), floating point.
        x_q: Samples of q, (M, *shape), on the same device; N and M may differ.
        method: One of the above.
        held_out: Share of both samples that is not fitted to, but used for the mass tests.
        seed: Seed of everything random; the same seed gives the same ratio.
        model: See above, as for the others that follow.
        calibration: See above.
        steps: See above.
        bridges: See above.
        alpha: See above.
        centers: See above.
        widths: See above; in the unit of samples standardized to unit variance.
        ridges: See above.
        folds: See above.
        neighbors: See above.

    Returns:
        The ratio, with its diagnostics.

    Raises:
        UserError: The samples or a setting cannot be used, or a setting belongs to another method.
    """
    check_name("ratio method", method, METHODS)
    given = {
        "model": model,
        "calibration": calibration,
        "steps": steps,
        "bridges": bridges,
        "alpha": alpha,
        "centers": centers,
        "widths": widths,
        "ridges": ridges,
        "folds": folds,
        "neighbors": neighbors,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if foreign := [name for name in options if name not in _OPTIONS[method]]:
        raise UserError(
            f"the method {method} does not take this setting",
            got=", ".join(foreign),
            expected=f"one of {', '.join(_OPTIONS[method])}",
        )
    check_number("held_out", held_out, "(0, 0.5]")
    checked_pair(x_p, x_q, SMALLEST, ("x_p", "x_q"), vary=True)
    stream = seeds.generator(seed, "ratio/split")
    fit_p, test_p = (x_p[i] for i in split(len(x_p), held_out, stream, x_p.device))
    fit_q, test_q = (x_q[i] for i in split(len(x_q), held_out, stream, x_q.device))
    standardize, warnings = standardizer(fit_p, fit_q)
    with torch.no_grad():
        fitted = _fit(method, standardize(fit_p), standardize(fit_q), options, seed)
        log_r = plain_log_ratio(fitted)
        on_p = _held(in_chunks(lambda x: log_r(standardize(x)), test_p))
        on_q = _held(in_chunks(lambda x: log_r(standardize(x)), test_q))
    mass = mass_tests(on_p, on_q)
    found = (*warnings, *fitted.warnings, *_edge_warnings(fitted.relative, on_p), *mass.failures())
    return DensityRatio(method, fitted.chosen, mass, found, fitted.relative, fitted, standardize)


def _fit(method: str, p: Tensor, q: Tensor, options: dict[str, Any], seed: int) -> Fitted:
    if method == "classifier":
        return fit_classifier(p, q, ClassifierSettings(**options), seed)
    if method == "telescoping":
        bridges = options.pop("bridges", None)
        return fit_telescoping(p, q, TelescopingSettings(bridges, ClassifierSettings(**options)), seed)
    if method == "kliep":
        return fit_kliep(p, q, KliepSettings(**options), seed)
    if method == "knn":
        return fit_neighbors(p, q, options.get("neighbors"))
    if method == "rulsif":
        options = {"alpha": _RELATIVE, **options}
    return fit_least_squares(p, q, LeastSquaresSettings(**options), seed)


def _edge_warnings(relative: float, on_p: Tensor) -> tuple[str, ...]:
    """What held-out samples of p say about the two ends of the range."""
    found = []
    zero = (on_p <= -LOG_LIMIT).double().mean().item()
    if zero > 0:
        found.append(f"the fitted ratio vanishes at {zero:.1%} of the samples of p, where it cannot be zero")
    if relative > 0:
        top = math.log((1 - relative) / relative * (1 - _RELATIVE_EDGE) / _RELATIVE_EDGE)
        beyond = (on_p >= top - 1e-9).double().mean().item()
        if beyond > 0:
            found.append(
                f"the relative ratio reaches its bound 1/alpha at {beyond:.1%} of the samples of p: "
                "p/q is cut off there; use a smaller alpha or relative_log_ratio"
            )
    return tuple(found)
