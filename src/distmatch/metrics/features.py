"""The spaces the metrics are taken in: flattened samples, or the inner layer of a classifier."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distmatch.base.checks import check_finite
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.metrics.classifier import Classifier, load_or_train
from distmatch.metrics.modes import smoothed_share
from distmatch.metrics.reference import Reference
from distmatch.nets.layers import channels_first

BATCH = 1024
"""Samples at a time."""
_MOST_PIXELS = 1024


@dataclass(frozen=True)
class Features:
    """A feature space.

    Attributes:
        name: Goes into the log; values in different spaces cannot be compared.
        function: Maps samples (B, *shape) in model space to float32 features (B, D).
        classify: Maps samples to logits (B, num_classes), where there is a classifier.
        heldout_accuracy: Of that classifier, on reference samples it was not trained on.
        fingerprint: Of a network, '' without one. Values compare only where it is the same.
        about: What it is and what the errors leave out, for the reader of a table; '' for no more than the
            name.
        published: What exactly these features are called where their values can be compared with published
            ones, see :mod:`distmatch.base.metric_names`.
        also: Further feature spaces to measure in.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None
    heldout_accuracy: Estimate | None = None
    fingerprint: str = ""
    about: str = ""
    published: str = ""
    also: tuple[Features, ...] = ()

    @property
    def label(self) -> str:
        """What stands beside each number: the name, or that under which it is published, and fingerprint."""
        return f"{self.published or self.name} {self.fingerprint}".strip()

    @property
    def description(self) -> str:
        """A descriptive name, with the limits of the errors in this space."""
        return "; ".join([self.about or self.name, *(own.description for own in self.also)])

    def __call__(self, x: Tensor) -> Tensor:
        """Features of all samples, in batches and without gradients.

        Args:
            x: (N, *shape) in model space.

        Returns:
            Float32 (N, D) on the device of ``x``.

        Raises:
            UserError: The function gives another shape, or values that are not finite.
        """
        with torch.no_grad():
            values = torch.cat([self.function(part) for part in x.split(BATCH)]).detach().to(x.device).float()
        if values.ndim != 2 or values.shape[0] != x.shape[0]:
            raise UserError(
                f"the features {self.name} have the wrong shape",
                got=tuple(values.shape),
                expected=f"({x.shape[0]}, D)",
                fix="return one flat feature vector per sample",
            )
        check_finite(f"the features {self.name}", values, fix="check the feature function on these samples")
        return values

    def predict(self, x: Tensor) -> Tensor:
        """The most likely labels, int64 (N,), on the device of ``x``.

        Raises:
            UserError: These features have no classifier.
        """
        if self.classify is None:
            raise UserError(f"the features {self.name} have no classifier", fix="use features='classifier'")
        with torch.no_grad():
            return torch.cat([self.classify(part).argmax(1) for part in x.split(BATCH)]).to(x.device)


def flattened(x: Tensor) -> Tensor:
    """Samples (N, *shape) as vectors of some 1024 numbers at most, where they are not vectors already.

    Larger ones are halved by averaging, images in height and width, video then in time, sequences along their
    length: beyond that the Frechet distance takes minutes without more information.
    """
    x = channels_first(x)
    while x[0].numel() > _MOST_PIXELS and (window := _halving(x.shape[2:])):
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(window) - 1]
        x = pool(x, window)
    return x.flatten(1).float()


def _halving(sides: Sequence[int]) -> tuple[int, ...]:
    """By how much each side of a map is to be divided; () where nothing can be halved."""
    if len(sides) == 3 and min(sides[1:]) == 1:
        return (2, 1, 1) if sides[0] > 1 else ()
    return () if not sides or min(sides[-2:]) == 1 else (1, 2, 2)[-len(sides) :]


def pixels() -> Features:
    """The samples themselves, as :func:`flattened` makes vectors of them."""
    return Features("pixels", flattened, about="pixels, the samples themselves")


def _on_device_of(x: Tensor, nets: dict[torch.device, Classifier]) -> Classifier:
    if x.device not in nets:
        nets[x.device] = copy.deepcopy(nets[torch.device("cpu")]).to(x.device)
    return nets[x.device]


def classifier_features(dataset: Reference, cache: Path | None = None) -> Features:
    """The penultimate layer of a small classifier of the labels of the reference.

    It has 32 numbers for vectors and tiny samples (an MLP) and 64 for larger images, video and sequences (a
    small convolutional net, over all of their axes), each of unit variance over the reference. A tenth of the
    reference is held out for the accuracy. The result is cached by the content of the data set; generated
    samples are never used for training.

    Args:
        dataset: The labeled reference.
        cache: Folder of cached classifiers; by default ``$DISTMATCH_CACHE``, ``$XDG_CACHE_HOME/distmatch`` or
            ``~/.cache/distmatch``.

    Returns:
        The features, with ``classify`` and ``heldout_accuracy``.

    Raises:
        UserError: The reference has no labels or too few samples.
    """
    net, right, held = load_or_train(dataset, cache)
    nets, fingerprint = {torch.device("cpu"): net}, _fingerprint(net)
    return Features(
        "classifier",
        lambda x: _on_device_of(x, nets).features(x.float()),
        lambda x: _on_device_of(x, nets)(x.float()),
        replace(smoothed_share(right, held), features=f"classifier {fingerprint}"),
        fingerprint,
        f"classifier {fingerprint}, trained on the labels of the real data. The errors do not include the "
        f"choice of this classifier: another one gives other values, so compare only values with the same "
        f"fingerprint",
    )


def _fingerprint(net: Classifier) -> str:
    """Eight hexadecimal digits of a classifier: of means and spreads of its features, to about a tenth.

    The last bits of the weights depend on processor and threads and move no metric visibly. Another training,
    by other random numbers or of another recipe, has features with other means and spreads.
    """
    mean, std = net.mean.double().cpu(), net.std.double().cpu()
    coarse = torch.cat([10 * std.log(), 10 * mean / std]).round().long()
    return hashlib.sha256(str(coarse.tolist()).encode()).hexdigest()[:8]
