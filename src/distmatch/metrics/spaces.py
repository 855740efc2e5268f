"""Feature spaces by the names that users give them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.interop.image_encoders import NAMES, image_encoder
from distmatch.metrics.features import Features, classifier_features, pixels
from distmatch.metrics.pretrained import check_images, encoder_features
from distmatch.metrics.reference import Reference

FeatureChoice = str | Features | Callable[[Tensor], Tensor]
_FEW = 32


def resolve_features(features: FeatureChoice, dataset: Reference | None) -> Features:
    """The features for a user's option.

    Args:
        features: ``"classifier"``, ``"pixels"``, ``"auto"``, a pretrained network such as
            ``"efficientnet-lite0"``, ready features, or a function from samples to (N, D). Automatic is the
            classifier where the reference has labels of at least two classes, and pixels without labels and
            for vectors of up to 32 numbers, where plain distances mean something.
        dataset: The reference; None for plain tensors, which have no labels.

    Raises:
        UserError: An unknown name, a classifier without labels, or a pretrained network for samples that are
            no images or without its package.
    """
    if isinstance(features, Features):
        return features
    if callable(features):
        return Features(getattr(features, "__name__", type(features).__name__), features)
    check_name("feature space", features, ("auto", "classifier", "pixels", *NAMES))
    if features in NAMES:
        if dataset is not None:
            check_images(dataset.shape)
        return encoder_features(image_encoder(features))
    if features == "auto":
        labeled = dataset is not None and dataset.num_classes > 1
        features = "classifier" if labeled and not _few_numbers(dataset) else "pixels"
    if features == "pixels":
        return pixels()
    if dataset is None:
        raise UserError(
            "classifier features need a labeled reference",
            got="a plain tensor",
            expected="a data set with labels",
            fix="use features='pixels', or make one with distmatch.data.from_arrays(x, labels)",
        )
    return classifier_features(dataset)


def _few_numbers(dataset: Reference | None) -> bool:
    return dataset is not None and len(dataset.shape) == 1 and dataset.shape[0] <= _FEW
