"""What an evaluation depends on besides the samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.metrics.reference import Reference
from distmatch.metrics.spaces import FeatureChoice, resolve_features

GROUPS = 10
K_PRECISION = 3
K_COVERAGE = 5
MOST_IN_BLOCK = 5000
_LEAST = 2 * (K_COVERAGE + 1)


@dataclass(frozen=True)
class EvaluationSettings:
    """What a value depends on besides the samples; two values compare only where all of this agrees.

    Attributes:
        features: Name of the feature space.
        n: Samples per block; a model and the reference give two blocks each.
        seed: Chooses the blocks.
        groups: Jackknife groups per block.
        k_precision: Neighbors for precision and recall.
        k_coverage: Neighbors for density and coverage.
    """

    features: str
    n: int
    seed: int
    groups: int = GROUPS
    k_precision: int = K_PRECISION
    k_coverage: int = K_COVERAGE

    def to_dict(self) -> dict[str, str | int]:
        """The JSON form."""
        return asdict(self)


def plan(
    reference: Reference | Tensor,
    samples: int | None = None,
    *,
    features: FeatureChoice = "auto",
    n: int | None = None,
    seed: int = 0,
) -> EvaluationSettings:
    """The settings an evaluation will use: to log, and to give every model and the floor the same ``n``.

    Args:
        reference: The reference set.
        samples: Number of generated samples, the least over the models to compare; None for the floor alone.
        features: As in :func:`distmatch.metrics.evaluate`. A name may mean to train the classifier first;
            where no cache can be written, resolve it once with :func:`distmatch.metrics.resolve_features`.
        n: Upper bound for the block size; 5000 by default.
        seed: Chooses the blocks.

    Returns:
        The settings, with block size ``min(len(reference) // 2, samples // 2, n)``.

    Raises:
        UserError: Fewer than 12 samples per block.
    """
    limits = [(len(reference) // 2, "use a larger reference"), (MOST_IN_BLOCK if n is None else n, "raise n")]
    if samples is not None:
        limits.append((samples // 2, "generate more samples"))
    least, fix = min(limits, key=lambda limit: limit[0])
    if least < _LEAST:
        raise UserError(
            "too few samples to evaluate",
            got=f"blocks of {least}",
            expected=f"blocks of at least {_LEAST}, so {2 * _LEAST} samples in each set",
            fix=fix,
        )
    name = resolve_features(features, None if isinstance(reference, Tensor) else reference).name
    return EvaluationSettings(name, least, seed)
