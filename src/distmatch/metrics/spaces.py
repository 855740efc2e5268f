"""Feature spaces by the names that users give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.base.metric_names import PRETRAINED, SPACES
from distmatch.interop.image_encoders import image_encoder
from distmatch.metrics.features import Features, classifier_features, pixels
from distmatch.metrics.pretrained import check_images, encoder_features
from distmatch.metrics.reference import Reference

FeatureChoice = str | Features | Callable[[Tensor], Tensor]
_FEW = 32


def resolve_features(features: FeatureChoice, dataset: Reference | None) -> Features:
    """The features for a user's option.

    Args:
        features: ``"classifier"``, ``"pixels"``, ``"auto"``, a pretrained network such as
            ``"efficientnet-lite0"``, several of these names with commas, ready features, or a function from
            samples to (N, D). Automatic is the classifier where the reference has labels of at least two
            classes, and pixels without labels and for vectors of up to 32 numbers, where plain distances mean
            something. With several names the metrics of the first have their plain keys.
        dataset: The reference; None for plain tensors, which have no labels.

    Raises:
        UserError: An unknown name, a classifier without labels, or a pretrained network for samples that are
            no images or without its package.
    """
    if isinstance(features, Features):
        return features
    if callable(features):
        return Features(getattr(features, "__name__", type(features).__name__), features)
    names = [part.strip() for part in features.split(",")]
    for name in names:
        check_name("feature space", name, SPACES)
        if name in PRETRAINED and dataset is not None:
            check_images(dataset.shape)
    names = list(dict.fromkeys(_automatic(dataset) if name == "auto" else name for name in names))
    first, *others = [_named(name, dataset) for name in names]
    return replace(first, also=tuple(others))


def _automatic(dataset: Reference | None) -> str:
    few = dataset is not None and len(dataset.shape) == 1 and dataset.shape[0] <= _FEW
    return "classifier" if dataset is not None and dataset.num_classes > 1 and not few else "pixels"


def _named(name: str, dataset: Reference | None) -> Features:
    if name in PRETRAINED:
        return encoder_features(image_encoder(name))
    if name == "pixels":
        return pixels()
    if dataset is None:
        raise UserError(
            "classifier features need a labeled reference",
            got="a plain tensor",
            expected="a data set with labels",
            fix="use features='pixels', or make one with distmatch.data.from_arrays(x, labels)",
        )
    return classifier_features(dataset)
