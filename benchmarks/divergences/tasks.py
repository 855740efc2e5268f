"""What is distilled: data with modes that can be counted, their teacher, and a judge of the modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from plan import Size
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.seeds import generator
from distmatch.data import from_arrays, load_data, toy
from distmatch.data.dataset import Dataset
from distmatch.data.tails import long_tailed
from distmatch.interop.saved import load_denoiser

SIZE = 20_000  # samples of the mixture
SMOOTH = 0.1  # standard deviation of the Gaussians around the digits of an exact teacher
LATENTS = 24
CELLS = 100

Judge = Callable[[Tensor], NDArray[np.int64]]


@dataclass(frozen=True)
class Task:
    """One set-up of teacher and data.

    Attributes:
        name: What it is called.
        data: Samples in model space, (N, *shape).
        teacher: The teacher that students match.
        network: What student and fake score of the teacher's size start from.
        judge: The mode of each sample.
        modes: How many there are.
        truth: Their shares in the data, (modes,).
        right: The judge's accuracy on samples that it was not fitted to; 1 where modes are its own cells.
        labels: Classes of ``data`` for a conditional teacher; None for an unconditional one.
    """

    name: str
    data: Tensor
    teacher: Any
    network: Any
    judge: Judge
    modes: int
    truth: NDArray[np.float64]
    right: float
    labels: Tensor | None = None


class Stacked:
    """The exact teacher of stacked digits: independent mixtures of Gaussians in its channels."""

    has_features = False
    sigma_min, sigma_max = 0.002, 80.0
    num_classes = 0

    def __init__(self, digits: Tensor, sigma_data: float) -> None:
        self.centers = digits.flatten(1)
        self.shape = (3, *digits.shape[1:])
        self.sigma_data = sigma_data

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: object = None) -> Tensor:
        """The posterior mean, from K weights for every channel."""
        rows = x.reshape(-1, self.centers.shape[1])
        variance = (sigma.reshape(-1, 1) ** 2).repeat_interleave(3, 0)
        whole = variance + SMOOTH**2
        square = self.centers.square().sum(1)
        weights = torch.softmax((rows @ self.centers.T - square / 2) / whole, dim=1)
        mean = weights @ self.centers
        return ((SMOOTH**2 * rows + variance * mean) / whole).reshape(x.shape)

    def sample(self, n: int) -> Tensor:
        """Draws of the mixture."""
        gen = generator(5, "stacked/teacher")
        rows = torch.randint(len(self.centers), (n, 3), generator=gen)
        x = self.centers[rows].reshape(n, *self.shape)
        return x + SMOOTH * torch.randn(x.shape, generator=gen)


def _labels(data: Dataset) -> Tensor:
    if data.labels is None:
        raise RuntimeError(f"{data.name} has no classes")
    return data.labels


def _shares(found: NDArray[np.int64], modes: int) -> NDArray[np.float64]:
    counts = np.bincount(found, minlength=modes)
    return counts / counts.sum()


@cache
def _digit_judge() -> tuple[SVC, float]:
    """A support vector machine on scaled digits, of every second one, and its accuracy on the others."""
    found = load_digits()
    x, y = found.data / 8 - 1, found.target
    right = float(SVC(C=10).fit(x[::2], y[::2]).score(x[1::2], y[1::2]))
    return SVC(C=10).fit(x, y), right


def _trained(data: Dataset, folder: Path, name: str, size: Size) -> Any:
    """A teacher of the library's own, trained once and kept."""
    folder = folder / f"{name}-{size.width}x{size.depth}"
    if not (folder / "model").exists():
        settings = {"batch": 128, "lr_decay": "cosine", "net": "mlp", "keep": 1}
        dm.train(data, steps=6000, out=folder, quiet=True, width=size.width, depth=size.depth, **settings)
    return load_denoiser(folder / "model")[0]


def digits(folder: Path, size: Size, *, tail: bool = True, labels: bool = False) -> Task:
    """8x8 digits, with class shares down to 1 : 100."""
    data = load_data("digits:long-tail" if tail else "digits")
    found = data if labels else data.without_labels()
    name = f"digits{'-tail' if tail else ''}{'-classes' if labels else ''}"
    teacher = _trained(found, folder, name, size)
    svm, right = _digit_judge()

    def judge(x: Tensor) -> NDArray[np.int64]:
        return svm.predict(x.flatten(1).clamp(-1, 1).numpy()).astype(np.int64)

    x = data.batch(torch.arange(len(data)))[0]
    truth = _shares(_labels(data).numpy(), 10)
    return Task(name, x, teacher, teacher, judge, 10, truth, right, data.labels if labels else None)


def stacked(folder: Path, size: Size) -> Task:
    """Three digits in the channels of one image, 1,000 modes, and the exact teacher of the single digits."""
    data = load_data("stacked-digits")
    network = _trained(data, folder, "stacked", size)
    svm, right = _digit_judge()
    single = load_data("digits")
    x = data.batch(torch.arange(len(data)))[0]
    teacher = Stacked(single.batch(torch.arange(len(single)))[0][:, 0], network.sigma_data)

    def judge(x: Tensor) -> NDArray[np.int64]:
        each = svm.predict(x.reshape(-1, 64).clamp(-1, 1).numpy()).reshape(-1, 3)
        return (each @ [100, 10, 1]).astype(np.int64)

    one = np.bincount(load_digits().target) / 1797
    truth = np.einsum("a,b,c->abc", one, one, one).ravel()
    return Task("stacked", x, teacher, network, judge, 1000, truth, right**3)


def _autoencoder(x: Tensor, folder: Path) -> nn.Module:
    """The encoder of a small autoencoder of 28x28 images, trained once and kept."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(784, 256), nn.SiLU(), nn.Linear(256, LATENTS))
    decoder = nn.Sequential(nn.Linear(LATENTS, 256), nn.SiLU(), nn.Linear(256, 784))
    both, path = nn.Sequential(encoder, decoder), folder / "autoencoder.pt"
    if path.exists():
        both.load_state_dict(torch.load(path, weights_only=True))
        return encoder
    steps, gen = 4000, generator(0, "autoencoder")
    optimizer = torch.optim.Adam(both.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (128,), generator=gen)]
        latent = encoder(batch)
        # A little noise on the latents, so that neighbors of a latent decode alike.
        loss = (decoder(latent + 0.1 * torch.randn(latent.shape, generator=gen)) - batch).square().mean()
        (loss + 1e-3 * latent.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(both.state_dict(), path)
    return encoder


def fashion(folder: Path, size: Size, *, tail: bool) -> Task:
    """Fashion-MNIST in the latents of a small autoencoder: modes are cells of k-means, or the classes."""
    data = load_data("fashion_mnist")
    images, labels = data.raw.float().flatten(1) / 127.5 - 1, _labels(data)
    encoder = _autoencoder(images, folder)
    with torch.no_grad():
        latents = torch.cat([encoder(part) for part in images.split(4096)])
    latents = (latents - latents.mean(0)) / latents.std(0) / 2
    half = len(latents) // 2
    name = f"fashion{'-tail' if tail else ''}"
    whole = from_arrays(latents, labels, name=name)
    whole = long_tailed(whole) if tail else whole
    y, found = _labels(whole), whole.without_labels()
    network = _trained(found, folder, name, size)
    x = found.batch(torch.arange(len(found)))[0]
    if tail:
        model = LogisticRegression(max_iter=300).fit(latents[:half].numpy(), labels[:half].numpy())
        right = float(model.score(latents[half:].numpy(), labels[half:].numpy()))
        truth, modes = _shares(y.numpy(), 10), 10
    else:
        model = KMeans(CELLS, n_init=1, random_state=0).fit(latents[:20_000].numpy())
        truth, modes, right = _shares(model.predict(latents.numpy()), CELLS), CELLS, 1.0

    def judge(z: Tensor) -> NDArray[np.int64]:
        return model.predict(found.scaling.to_raw(z).float().numpy()).astype(np.int64)

    return Task(name, x, network, network, judge, modes, truth, right)


def grid(folder: Path, size: Size) -> Task:
    """25 Gaussians in the plane whose weights differ by a factor of ten, and their exact teacher."""
    mixture = toy("grid25")
    x = mixture.sample(SIZE, seed=0)
    means, weights = mixture.means, mixture.weights
    network = _trained(load_data("grid25"), folder, "grid25", size)

    def judge(x: Tensor) -> NDArray[np.int64]:
        return torch.cdist(x.float(), means.float()).argmin(1).numpy()

    return Task("grid25", x, mixture, network, judge, 25, weights.double().numpy(), 1.0)
