"""The Jacobian J = dD/dy of a denoiser and its trace: exact by one VJP a coordinate, or by random probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError, unknown_name
from distmatch.base.seeds import stream_seed
from distmatch.diffusion.conditioning import ConditioningLike
from distmatch.diffusion.denoiser import Denoiser, expand
from distmatch.diffusion.noise_streams import SampleNoise

TRACES = ("exact", "rademacher", "gaussian")


def parse_trace(trace: str) -> tuple[str, int]:
    """Reads ``"exact"``, ``"rademacher:8"`` or ``"gaussian:8"`` as a kind and a number of probes (0: exact).

    Without a number there is one probe, which has no standard error.

    Raises:
        UserError: An unknown kind, or not a positive whole number of probes.
    """
    kind, _, count = trace.partition(":")
    if kind not in TRACES:
        raise unknown_name("trace estimator", trace, TRACES)
    if kind == "exact":
        if count:
            raise UserError("the exact trace takes no probes", got=trace, fix='write trace="exact"')
        return kind, 0
    if count and (not count.isdecimal() or int(count) < 1):
        raise UserError("a trace needs a positive whole number of probes", got=trace, expected=f"{kind}:8")
    return kind, int(count or 1)


def draw_probes(
    kind: str, count: int, n: int, shape: tuple[int, ...], *, seed: int, first: int = 0, like: Tensor
) -> Tensor:
    """Directions with E[e e^T] = I: signs ("rademacher") or normals ("gaussian").

    Those of a sample depend on the seed and the sample's index alone, not on the batch it is in.

    Args:
        kind: ``"rademacher"`` or ``"gaussian"``.
        count: Probes for each sample, M.
        n: Samples, B.
        shape: Shape of one sample.
        seed: Seed of the probes.
        first: Index of the first sample.
        like: Gives device and dtype.

    Returns:
        (M, B, *shape).
    """
    indices = torch.arange(first, first + n)
    noise = SampleNoise(stream_seed(seed, "probes"), indices, (count, *shape), like.device)
    normal = noise.normal(0).transpose(0, 1)
    signs = torch.where(normal >= 0, 1.0, -1.0) if kind == "rademacher" else normal
    return signs.to(like.dtype)


def trace_probes(trace: str, x: Tensor, *, seed: int, first: int = 0) -> Tensor | None:
    """The probes (M, B, *shape) that a trace estimator asks for at samples ``x``; none for the exact trace.

    Args:
        trace: ``"exact"``, ``"rademacher:8"`` or ``"gaussian:8"``.
        x: (B, *shape).
        seed: Seed of the probes.
        first: Index of the first sample.

    Raises:
        UserError: As :func:`parse_trace`.
    """
    kind, count = parse_trace(trace)
    if count == 0:
        return None
    return draw_probes(kind, count, len(x), tuple(x.shape[1:]), seed=seed, first=first, like=x)


def basis_of(x: Tensor) -> Tensor:
    """The unit vectors of the space of one sample, the same for all samples, (D, B, *shape)."""
    eye = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    return eye.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)


def refuse_random_layers(denoiser: object) -> None:
    """Refuses a denoiser whose answer changes from call to call or with the batch.

    Raises:
        UserError: It holds dropout or batch normalization in training mode.
    """
    layer: object | None = denoiser
    while layer is not None:
        for part in layer.modules() if isinstance(layer, nn.Module) else ():
            dropout = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0
            if part.training and (dropout or isinstance(part, nn.modules.batchnorm._BatchNorm)):
                raise UserError(
                    "a derivative needs a denoiser that is a fixed function",
                    got=f"a {type(part).__name__} layer in training mode",
                    fix="call .eval() on the model",
                )
        layer = getattr(layer, "inner", None)


def denoise_for_gradient(
    denoiser: Denoiser, y: Tensor, sigma: Tensor, conditioning: ConditioningLike
) -> tuple[Tensor, Tensor]:
    """D(y, sigma) with its graph, and the leaf ``y`` that the graph starts from.

    Raises:
        UserError: The result does not depend on ``y`` in a way that torch can differentiate.
    """
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        out = connected(
            denoiser(leaf, sigma, conditioning), leaf, lambda moved: denoiser(moved, sigma, conditioning)
        )
    return out, leaf


def connected(
    out: Tensor, leaf: Tensor, again: Callable[[Tensor], Tensor], what: str = "this denoiser"
) -> Tensor:
    """``out`` with a graph that holds ``leaf``: itself, or with ``0 leaf`` added where it is a constant.

    A function that does not depend on its input has no graph, and neither has one that hides it
    (``torch.no_grad``, ``.detach()``, numpy). The derivative of the first is 0; the second is refused. They
    are distinguished by a call at another point.

    Args:
        out: The function's value at ``leaf``, (B, ...).
        leaf: Its input, (B, ...), which requires a gradient.
        again: The function, for that call.
        what: What the function is, for the message.

    Raises:
        UserError: The value changes with the input and has no graph.
    """
    if holds(out, leaf):
        return out
    with torch.no_grad():
        # No multiple of the input, and in its range where all are positive, as times are.
        size = leaf.detach().abs().amax()
        moved = 0.7 * leaf.detach() + torch.where(size > 0, 0.1 * size, 1)
        same = bool((again(moved) == out).all())
    if not same:
        raise UserError(
            f"{what} cannot be differentiated with respect to its input",
            fix="remove torch.no_grad(), .detach() and the like from its call",
        )
    return out + expand((0 * leaf).reshape(len(leaf), -1).sum(1), out)


def holds(out: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of ``out`` leads back to ``leaf``."""
    if out is leaf:
        return True
    start, goal = out.grad_fn, torch.autograd.graph.get_gradient_edge(leaf).node
    waiting, seen = [start], {start, None}
    while waiting:
        node = waiting.pop()
        if node is goal:
            return True
        new = [following for following, _ in node.next_functions if following not in seen] if node else []
        seen.update(new)
        waiting.extend(reversed(new))  # the first first: skip c_skip x before the network
    return False


def slopes(value: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradients of ``value.sum()`` with respect to ``leaves``, for as often as one likes.

    A leaf that the value does not depend on has the gradient 0, also where the value has no graph at all: the
    second derivative of an affine function is such a value. Whether a function hides its graph is to be
    asked before, by :func:`connected`.
    """
    if not value.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        value.sum(), leaves, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )


def pull_back(out: Tensor, leaf: Tensor, directions: Tensor, *, keep: bool = True) -> Tensor:
    """J^T e for each direction e: ``directions`` and the result are (M, B, *shape)."""
    (rows,) = torch.autograd.grad(out, leaf, directions, retain_graph=keep, is_grads_batched=True)
    return rows.detach()


def _basis(out: Tensor, chunk: int) -> Iterator[tuple[range, Tensor]]:
    """The unit vectors in chunks: their indices and (m, B, *shape)."""
    dim = out[0].numel()
    for start in range(0, dim, chunk):
        index = range(start, min(start + chunk, dim))
        rows = torch.zeros(len(index), dim, dtype=out.dtype, device=out.device)
        rows[:, start : index.stop].fill_diagonal_(1)
        yield index, rows.reshape(-1, 1, *out.shape[1:]).expand(-1, *out.shape)


def denoise_with_trace(
    denoiser: Denoiser,
    y: Tensor,
    sigma: Tensor,
    conditioning: ConditioningLike = None,
    *,
    probes: Tensor | None = None,
    chunk: int = 16,
) -> tuple[Tensor, Tensor]:
    """D(y, sigma) and the trace of its Jacobian.

    The exact trace costs one VJP a coordinate, a probe one VJP: e^T J e has expectation tr J and, with
    S = (J + J^T) / 2, variance 2 |offdiag S|^2 (signs) or 2 |S|^2 (normals), so signs are never worse.

    Args:
        denoiser: The model.
        y: Positions, (B, *shape).
        sigma: Levels, (B,).
        conditioning: Labels (B,), -1 for none.
        probes: Directions (M, B, *shape); None takes the exact trace.
        chunk: VJPs at a time; more is faster and needs more memory.

    Returns:
        The denoised positions (B, *shape), and the trace (B, 1), or e^T J e for each probe (B, M), both
        without a graph.
    """
    out, leaf = denoise_for_gradient(denoiser, y, sigma, conditioning)
    if probes is None:
        total = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        dim = math.prod(y.shape[1:])
        for index, rows in _basis(out, chunk):
            pulled = pull_back(out, leaf, rows, keep=index.stop < dim).reshape(len(index), len(y), dim)
            total += pulled[..., index.start : index.stop].diagonal(dim1=0, dim2=2).sum(-1)
        return out.detach(), total[:, None]
    parts = [
        (pull_back(out, leaf, e, keep=True) * e).reshape(len(e), len(y), -1).sum(-1)
        for e in probes.split(chunk)
    ]
    return out.detach(), torch.cat(parts).T


def denoiser_jacobian(
    denoiser: Denoiser, y: Tensor, sigma: Tensor, conditioning: ConditioningLike = None, *, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """D(y, sigma), (B, *shape), and its whole Jacobian J[b, i, j] = dD_i/dy_j, (B, D, D), without a graph.

    Args:
        denoiser: The model.
        y: Positions, (B, *shape).
        sigma: Levels, (B,).
        conditioning: Labels (B,), -1 for none.
        chunk: Rows at a time.
    """
    out, leaf = denoise_for_gradient(denoiser, y, sigma, conditioning)
    rows = [pull_back(out, leaf, basis).flatten(2) for _, basis in _basis(out, chunk)]
    return out.detach(), torch.cat(rows).transpose(0, 1)
