"""A pass whose prediction nobody reads: same features, same gradient, no layer behind the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmatch.diffusion.conditioning import as_conditioning
from distmatch.diffusion.control.neighbor_sets import NeighborConditioned, SetEmbedding
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.own_network import as_denoiser
from distmatch.interop.edm2_unet import EDM2UNet
from distmatch.interop.edm_config import from_arguments
from distmatch.interop.edm_unet import EDMUNet
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.split_shortcut import split_shortcuts
from distmatch.ratio.discriminator import build_discriminator, logits_of
from tests.helpers.small import batch, network_teacher
from tests.helpers.wrapping import wrap

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LEVEL = torch.tensor([-0.5, 0.3, 1.0])
LABELS = torch.tensor([1, -1, 0])
UNET = UNetConfig(width=8, multipliers=(1, 2), blocks=1)
SONG = {"img_resolution": 8, "img_channels": 3, "label_dim": 2, "channel_mult": (1, 2), "num_blocks": 1}
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}


def random(net: nn.Module) -> nn.Module:
    """A net without zeros at its ends, for which features and gradients say something."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net.eval()


def of_diffusers(kind: str) -> nn.Module:
    models = pytest.importorskip("diffusers_models")
    from distmatch.interop.diffusers_net import DiffusersNet

    options = {"in_channels": 3, "num_embeds_ada_norm": 2}
    return DiffusersNet(
        models.dit(**options) if kind == "dit" else models.unet(num_class_embeds=3), null_class=2
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: random(build_net(MLPConfig(width=16, depth=4), (3, 8, 8), 2)),
    "unet": lambda: random(build_net(UNET, (3, 8, 8), 2)),
    "split": lambda: split_shortcuts(random(build_net(UNET, (3, 8, 8), 2))),  # type: ignore[arg-type]
    "dit": lambda: random(build_net(DiTConfig(patch=2, width=16, depth=4, heads=2), (3, 8, 8), 2)),
    "song": lambda: random(EDMUNet(from_arguments("song", {**SONG, "model_channels": 8}))),
    "ncsn": lambda: random(EDMUNet(from_arguments("song", {**SONG, **NCSN, "model_channels": 8}))),
    "adm": lambda: random(EDMUNet(from_arguments("adm", {**SONG, "model_channels": 64}))),
    "edm2": lambda: random(EDM2UNet(from_arguments("edm2", {**SONG, "model_channels": 64}))),
    "unet of diffusers": lambda: of_diffusers("unet"),
    "dit of diffusers": lambda: of_diffusers("dit"),
}


@contextmanager
def watched(net: nn.Module) -> Iterator[set[str]]:
    """The names of the layers with weights that are entered while it lasts."""
    seen: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: seen.add(name))
        for name, layer in net.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", NETS)
def test_features_alone_are_those_of_the_whole_pass(name: str) -> None:
    """The same kernels on the same numbers, so the same bits, forward and backward."""
    net = NETS[name]().requires_grad_(False)
    found = []
    for pass_ in (
        lambda x: net(x, LEVEL, LABELS, return_features=True)[1],
        lambda x: net(x, LEVEL, LABELS, return_features="only"),
    ):
        leaf = X.clone().requires_grad_()
        with watched(net) as layers:
            features = pass_(leaf)
        (gradient,) = torch.autograd.grad(sum(f.square().mean() for f in features), leaf)
        found.append((features, gradient, layers))
    (whole, down, all_layers), (alone, back, first_layers) = found
    assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True))
    assert torch.equal(down, back)
    assert down.abs().sum() > 0
    assert first_layers < all_layers


def test_denoisers_and_wrappers_pass_it_on() -> None:
    net = NETS["unet"]()
    plain = EDMDenoiser(net, shape=(3, 8, 8), num_classes=2).eval()
    inner = random(build_net(UNET, (5, 8, 8), 0))
    sets = NeighborConditioned(
        inner, SetEmbedding(2, 8, 2), torch.randn(6, 2), torch.tensor([[0, 1], [2, 3]])
    )
    foreign: Any = as_denoiser(net, "vp", "eps", shape=(3, 8, 8), num_classes=2)
    sigma = LEVEL.exp()
    models: list[tuple[Any, nn.Module, Tensor]] = [
        (plain, net, sigma),
        (Guided(plain, 2.0), net, sigma),
        (foreign, net, sigma),
        (sets, sets, LEVEL),
    ]
    for model, watched_net, level in models:
        labels = torch.tensor([1, 1, 0]) if model is sets else LABELS
        whole = model(X, level, labels, return_features=True)[1]
        with watched(watched_net) as layers:
            alone = model(X, level, labels, return_features="only")
        for a, b in zip(whole, alone, strict=True):
            # Guidance makes its two passes in one batch, which kernels may round in another way.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not any(name.split(".")[-1] == "last" and "up" not in name for name in layers)


def test_what_real_and_generated_samples_share_cancels_to_the_bit() -> None:
    """The gradient of what the level alone decides is 0, and not rounding that Adam blows up."""
    teacher = network_teacher(2)
    torch.manual_seed(0)
    head = build_discriminator("teacher", teacher, 2)
    x, sigma, labels = torch.randn(2, 64, 2), torch.rand(64) + 0.1, torch.arange(64) % 2
    fake, real = logits_of("teacher", teacher, head, list(x), sigma, as_conditioning(labels), grad=False)
    (torch.nn.functional.softplus(fake) + torch.nn.functional.softplus(-real)).mean().backward()
    weight = head.projections[0].last.weight.grad  # type: ignore[index,union-attr]
    assert weight[:-1].abs().max() > 1e-4
    assert weight[-1].abs().max() == 0  # what it adds to the logit, whatever the features are


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import step

    return step


ADVERSARIAL = {"student forward": 4, "student backward to weights": 1, "fake backward to weights": 5}
ADVERSARIAL |= {"teacher features": 5, "ratio backward to weights": 10}
ADVERSARIAL |= {"teacher backward to input": 1, "ratio backward to input": 1, "fake forward": 1}
FISHER = {"student forward": 4, "student backward to weights": 1, "fake backward to weights": 5}
FISHER |= {"teacher backward to input": 1, "fake backward to input": 1}
CALLS: dict[str, dict[str, int]] = {
    "f-distill": ADVERSARIAL,
    "dmd2": ADVERSARIAL,
    "diff-instruct": {
        "student forward": 4,
        "student backward to weights": 1,
        "fake backward to weights": 5,
        "teacher forward": 1,
        "fake forward": 1,
    },
    # One for the score difference and one for the pairs.
    "dmd": {
        "student backward to weights": 2,
        "teacher forward": 1,
        "fake forward": 1,
        "fake backward to weights": 1,
    },
    "sid": FISHER,
    # The fake score lends the features, and learns from both losses.
    "sida": FISHER
    | {
        "fake features, backward to weights": 5,
        "ratio backward to weights and input": 10,
        "ratio backward to input": 1,
    },
    "sim": FISHER,
    "uni-instruct": FISHER
    | {"teacher features": 5, "ratio backward to weights": 10, "ratio backward to input": 1},
    "moment-matching": {
        "student forward": 4,
        "student backward to weights": 1,
        "fake backward to weights": 5,
        "teacher forward": 6,
        "fake forward": 1,
    },
    # Two slopes of Heun's step.
    "consistency": {"teacher forward": 2, "student forward": 1, "student backward to weights": 1},
    "scm": {
        "teacher forward": 1,
        "student jvp": 1,
        "student backward to weights": 1,
        "uncertainty backward to weights": 1,
    },
    "mean-flow": {"teacher forward": 1, "student jvp": 1, "student backward to weights": 1},
    "rcm": {
        "student jvp": 1,
        "student backward to weights": 2,
        "teacher forward": 2,
        "fake forward": 1,
        "fake backward to weights": 1,
    },
    "imm": {"student forward": 1, "student backward to weights": 1},
}
"""Passes in a cycle, from the algorithms of the papers: five critic steps, or one step without a critic."""


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_cycle_makes_no_call_that_nobody_reads(bench: ModuleType, name: str, wrapped: bool) -> None:
    """A wrapper of ``forward`` around the networks hears the same calls."""
    teacher = network_teacher(2, (8,))
    method, steps = bench.build(name, teacher, bench.Options(), torch.device("cpu"))
    state = method.init(0)
    if wrapped:
        wrap(state)

    def cycle() -> None:
        for _ in range(steps):
            method.step(state, batch(0, 2, 32, (8,)))

    cycle()
    with bench.recorded(bench.networks_of(teacher, state)) as calls:
        cycle()
    assert Counter(f"{call.network} {call.kind}" for call in calls) == CALLS[name]
