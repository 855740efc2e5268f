"""Divergences of samples to a reference: what `distmatch evaluate A B --divergences` loads and prints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from distmatch.base.errors import UserError
from distmatch.base.seeds import stream_seed
from distmatch.cli.output import warn_of_shares
from distmatch.cli.table import in_columns
from distmatch.data import TOY_NAMES, Dataset, load_data, toy, toy_dataset
from distmatch.data.classes import matched, names_of
from distmatch.data.columns import Column
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.divergences.estimators import LowerBound
from distmatch.metrics import Comparison, Measured, compare_datasets
from distmatch.metrics.names import checked_names
from distmatch.metrics.spaces import resolve_features
from distmatch.training.devices import pick_device


def between(
    a: str,
    b: str,
    which: str,
    features: str,
    n: int | None,
    seed: int,
    device: str,
    weights: str = "",
) -> Comparison:
    """Compares two sets of samples by name or path.

    Args:
        a: The reference, which plays p.
        b: The samples, which play q.
        which: Names with commas, or ``all``.
        features: ``auto``, ``pixels``, ``classifier`` or a pretrained network.
        n: Most samples of each.
        seed: Of everything that is drawn, the samples of a toy included.
        device: ``auto`` or the name of one.
        weights: The file of the weights of the network.

    Raises:
        UserError: Something that holds no samples, or what cannot be compared.
    """
    checked_names(which)  # before anything is read
    where = pick_device(device)
    where = where if where.type == "cuda" else pick_device("cpu")  # tests sum in float64
    p = _samples(a, seed, "p")
    q = _samples(b, seed, "q", columns=p.columns)
    _compare_classes(p, q)
    mixture_p, mixture_q = (_mixture(source) for source in (a, b))
    return compare_datasets(
        p,
        q,
        which,
        features=resolve_features(features, p, weights) if weights else features,
        n=n,
        seed=seed,
        device=where,
        score_p=mixture_p.to(where).score if mixture_p is not None else None,
        score_q=mixture_q.to(where).score if mixture_q is not None else None,
        quiet=False,
    )


def _mixture(source: str) -> GaussianMixture | None:
    return toy(source) if source in TOY_NAMES else None


def _compare_classes(p: Dataset, q: Dataset) -> None:
    """Warns where two labeled sets hold the classes in other shares, or are of other classes."""
    if p.labels is None or q.labels is None:
        return
    try:
        labels = matched(q, names_of(p), p.num_classes, "the reference").labels
    except UserError as error:
        warnings.warn(f"shares of the classes were not compared: {error}", stacklevel=2)
        return
    if labels is not None:
        warn_of_shares(labels, p.labels, names_of(p))


def _samples(source: str, seed: int, side: str, *, columns: Sequence[Column] = ()) -> Dataset:
    if source in TOY_NAMES:  # fresh ones: the other set may be drawn from the same toy under the same seed
        return toy_dataset(source, seed=stream_seed(seed, f"evaluate/toy/{side}"))
    return load_data(source, columns=columns)


def divergence_table(a: str, b: str, found: Comparison) -> str:
    """A plain-text table: a row for each divergence, value ± standard error, warnings below.

    Args:
        a: What plays p.
        b: What plays q.
        found: What was measured between them.
    """
    rows = [["", "value", "at most", "p-value", "n", "how"]]
    remarks: list[str] = []
    for name, row in found.measured.items():
        value = _value(row)
        if row.estimate.warning is not None:
            remarks.append(f"[{len(remarks) + 1}] {name}: {row.estimate.warning}")
            value += f" [{len(remarks)}]"
        largest = f"{row.largest:.3g}" if math.isfinite(row.largest) else ""
        chance = f"{row.test.p_value:.2g}" if row.test is not None else ""
        rows.append([name, value, largest, chance, str(row.estimate.n), f"{row.estimator}; {row.meaning}"])
    lines = [f"p (the reference) = {a}, q (the samples) = {b}", *in_columns(rows), *remarks]
    if any(isinstance(row.estimate, LowerBound) for row in found.measured.values()):
        lines.append(">= marks a lower bound, up to its error: the divergence may be far above it")
    tests = [row.test for row in found.measured.values() if row.test is not None]
    if tests:
        most = max(test.n for test in tests)
        lines.append(
            f"p-values of equal p and q, from {tests[0].resamples} resamples of at most {most} samples a set"
        )
    if found.features:
        lines.append(f"features: {found.features}")
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"not computed: {name} {why}" for name, why in found.not_computed.items()]
    return "\n".join(lines)


def _value(row: Measured) -> str:
    estimate = row.estimate
    error = f" ± {estimate.stderr:.2g}" if math.isfinite(estimate.stderr) else ""
    return f"{'>= ' if isinstance(estimate, LowerBound) else ''}{estimate.value:.4g}{error}"
