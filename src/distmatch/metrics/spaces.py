"""Feature spaces by the names that users give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def resolve_features(features: FeatureChoice, dataset: Reference | None, weights: str = "") -> Features:
    """The features for a user's option.

    Args:
        features: ``"classifier"``, ``"pixels"``, ``"auto"``, a pretrained network such as
            ``"efficientnet-lite0"``, several of these names with commas, ready features, or a function from
            samples to (N, D). Automatic is the classifier where the reference has labels of at least two
            classes, and pixels without labels and for vectors of up to 32 numbers, where plain distances mean
            something. With several names the metrics of the first have their plain keys.
        dataset: The reference; None for plain tensors, which have no labels.
        weights: The file of the weights of ``"inception"``, ``"clip"`` or ``"dinov2"``; of several of them
            ``NAME=FILE`` with commas.

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
    files = _files(weights, names)
    first, *others = [_named(name, dataset, files.get(name, "")) for name in names]
    return replace(first, also=tuple(others))


def _automatic(dataset: Reference | None) -> str:
    few = dataset is not None and len(dataset.shape) == 1 and dataset.shape[0] <= _FEW
    return "classifier" if dataset is not None and dataset.num_classes > 1 and not few else "pixels"


def _files(weights: str, names: Sequence[str]) -> dict[str, str]:
    """The files of weights by the names of their networks.

    Raises:
        UserError: It is not clear which file is for which network, or one is for none.
    """
    taking = [name for name in names if name in PRETRAINED and name != "efficientnet-lite0"]
    parts = [part.strip() for part in weights.split(",") if part.strip()]
    if len(parts) == 1 and len(taking) == 1 and parts[0].partition("=")[0] not in PRETRAINED:
        return {taking[0]: parts[0]}
    found = {name: file for name, _, file in (part.partition("=") for part in parts)}
    if not all(found.values()) or set(found) - set(taking):
        raise UserError(
            "--feature-weights does not fit the features",
            got=weights,
            expected=f"NAME=FILE for {', '.join(taking)}" if taking else "none: these features need no file",
        )
    return found


def _named(name: str, dataset: Reference | None, weights: str) -> Features:
    if name in PRETRAINED:
        return encoder_features(image_encoder(name, weights))
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
