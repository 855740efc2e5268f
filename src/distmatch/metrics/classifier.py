"""The small classifier whose inner layer gives the features, trained once per data set and cached."""

from __future__ import annotations

import contextlib
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmatch.base import seeds
from distmatch.base.checks import check_count
from distmatch.base.errors import UserError
from distmatch.base.files import atomic_json, cache_folder, load_into, load_tensors, read_json, save_tensors
from distmatch.base.progress import progress
from distmatch.metrics.reference import Reference, stratified_order
from distmatch.nets.layers import channels_and_sides, channels_first, convolution

RECIPE = 2  # raise it when the network or its training changes: it is part of the cache key
_BATCH = 128
_STEPS = (500, 2000)  # at least, at most; four epochs between
# Noise on the inputs prevents the network from distinguishing training samples from new ones.
_IMAGE_NOISE = 0.25  # in model space
_VECTOR_NOISE = 0.1  # of the standard deviation of a column


class Classifier(nn.Module):
    """Body, standardized penultimate features, linear head.

    Args:
        shape: Shape of one sample.
        num_classes: Number of labels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        tiny = len(shape) == 1 or size <= 256
        self.width = 32 if tiny else 64
        self.body = _mlp(size, self.width) if tiny else _conv(shape, self.width)
        self.head = nn.Linear(self.width, num_classes)
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of samples (B, *shape) in model space."""
        return self.head(self.inner(x))

    def features(self, x: Tensor) -> Tensor:
        """Features (B, width): zero mean and unit variance over the training part of the reference."""
        return (self.inner(x) - self.mean) / self.std

    def inner(self, x: Tensor) -> Tensor:
        """The penultimate layer as it is, (B, width)."""
        return self.body(channels_first(x))


def _mlp(size: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, 128),
        nn.SiLU(),
        nn.Linear(128, 64),
        nn.SiLU(),
        nn.Linear(64, width),
        nn.SiLU(),
    )


def _conv(shape: tuple[int, ...], width: int) -> nn.Sequential:
    """Stride-2 convolutions of images, video or sequences to sides of 4 or less, then one linear layer."""
    channels, sides = channels_and_sides(shape)
    conv = convolution(sides)
    layers: list[nn.Module] = []
    out = 16
    while max(sides) > 4:
        layers += [conv(channels, out, 3, stride=2, padding=1), nn.SiLU()]
        channels, out = out, min(2 * out, 64)
        sides = tuple((side + 1) // 2 for side in sides)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * math.prod(sides), width), nn.SiLU())


def _train(reference: Reference, labels: Tensor) -> tuple[Classifier, int, int]:
    """Trains on nine tenths; returns the net, the right answers on the held-out tenth, and its size."""
    order = stratified_order(labels, len(labels), seeds.generator(0, "classifier/split"))
    held = max(1, len(order) // 10)
    test, train = order[:held], order[held:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.stream_seed(0, "classifier/init"))
        net = Classifier(tuple(reference.shape), reference.num_classes)
    steps = max(_STEPS[0], min(_STEPS[1], 4 * len(train) // _BATCH))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    stream = seeds.generator(0, "classifier/batches")
    first, _ = _batch(reference, train[:10_000])
    scale = _VECTOR_NOISE * first.std(0) if first.ndim < 4 else torch.tensor(_IMAGE_NOISE)
    with progress(steps, desc="feature network", delay=5.0) as bar:
        for _ in range(steps):
            x, y = _batch(reference, train[torch.randint(len(train), (_BATCH,), generator=stream)])
            noise = scale * torch.randn(x.shape, generator=stream)
            loss = nn.functional.cross_entropy(net(x + noise), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1, loss=loss.detach())
    net.eval().requires_grad_(False)
    inner = torch.cat([net.inner(part) for part in first.split(1024)])
    net.mean.copy_(inner.mean(0))
    net.std.copy_(inner.std(0).clamp(min=1e-3))
    right = 0
    for part in test.split(1024):
        x, y = _batch(reference, part)
        right += int((net(x).argmax(1) == y).sum())
    return net, right, held


def _batch(reference: Reference, indices: Tensor) -> tuple[Tensor, Tensor]:
    x, y = reference.batch(indices)
    if y is None:
        raise UserError(
            "the reference has labels but its batches have none", fix="return labels from batch()"
        )
    return x.detach().float().cpu(), y.cpu()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load(stem: Path, reference: Reference) -> tuple[Classifier, int, int]:
    """Reads a cached classifier.

    Raises:
        UserError, OSError, KeyError, TypeError, ValueError: It is absent or not whole.
    """
    facts: dict[str, Any] = read_json(stem.with_suffix(".json"))
    weights = stem.with_suffix(".safetensors")
    if facts["sha256"] != _sha256(weights):
        raise ValueError("the two cached files do not match")
    net = Classifier(tuple(reference.shape), reference.num_classes)
    load_into(net, load_tensors(weights), str(weights))
    net.eval().requires_grad_(False)
    return net, int(facts["right"]), int(facts["held_out"])


def load_or_train(reference: Reference, cache: Path | None = None) -> tuple[Classifier, int, int]:
    """The classifier of a labeled reference, from the cache if it is there and whole.

    A cache that cannot be read or written costs time, never the result.

    Args:
        reference: Labeled samples; generated samples are never used for training.
        cache: Folder; by default :func:`cache_folder`.

    Returns:
        The network in evaluation mode on the CPU, the right answers and the size of the held-out tenth.

    Raises:
        UserError: The reference has no labels or too few samples.
    """
    labels = reference.labels
    if labels is None or reference.num_classes < 2:
        raise UserError(
            "classifier features need a labeled reference",
            got="a reference without labels" if labels is None else f"{reference.num_classes} class",
            expected="labels of at least two classes",
            fix="use features='pixels', or give the reference labels",
        )
    check_count("the number of samples for a classifier", len(labels), 20, fix="use features='pixels'")
    key = hashlib.sha256(f"{RECIPE}/{reference.content_hash}".encode()).hexdigest()[:24]
    stem = (cache or cache_folder()) / f"classifier-{key}"
    with contextlib.suppress(UserError, OSError, KeyError, TypeError, ValueError):
        return _load(stem, reference)
    with torch.enable_grad():
        net, right, held = _train(reference, labels.cpu())
    with contextlib.suppress(UserError, OSError):
        weights = stem.with_suffix(".safetensors")
        save_tensors(weights, net.state_dict())
        atomic_json(stem.with_suffix(".json"), {"sha256": _sha256(weights), "right": right, "held_out": held})
    return net, right, held
