"""How networks of users are called: calls that are recognized, and what is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.calls import CALLS, recognized_call
from tests.helpers.own_networks import Conv, OfEDM, OfKDiffusion, Velocity

QUICK: dict[str, Any] = {"steps": 1, "data": "digits", "batch": 4, "fake_score_steps": 1, "quiet": True}
IMAGE = (1, 8, 8)


def of_diffusers() -> Any:
    models = pytest.importorskip("tests.helpers.diffusers_models")
    unet = models.unet(in_channels=1, out_channels=1, num_class_embeds=11)
    return dm.as_denoiser(unet, "vp", "eps", shape=IMAGE, num_classes=10, null_class=10, time=999)


def test_calls_are_recognized() -> None:
    class TimeLast(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
            return x

    class Anything(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args[0]

    modules = [Conv(), OfKDiffusion(), OfEDM(), Velocity(), TimeLast(), Anything(), nn.Linear(2, 2)]
    assert [recognized_call(m) for m in modules] == [
        "plain", "keywords", "edm", "time-first", "plain", "plain", "plain",
    ]  # fmt: skip
    assert recognized_call(of_diffusers().net.module) == "diffusers"


def test_each_call_is_the_network_s_own() -> None:
    """Against the formulas, with the network called by hand."""
    x, sigma, labels = torch.randn(3, *IMAGE), torch.tensor([0.01, 1.0, 60.0]), torch.tensor([7, -1, 0])
    wide = sigma[:, None, None, None]
    rows = torch.zeros(3, 10)
    rows[0, 7] = rows[2, 0] = 1  # no class is a row of zeros
    edm = OfEDM()
    torch.testing.assert_close(dm.as_denoiser(edm)(x, sigma, labels), edm(x, sigma, rows))
    torch.testing.assert_close(dm.as_denoiser(edm)(x, sigma), edm(x, sigma))
    k = OfKDiffusion()
    teacher = dm.as_denoiser(k, shape=IMAGE, num_classes=10, null_class=10)
    told = torch.tensor([7, 10, 0])
    torch.testing.assert_close(teacher(x, sigma, labels), k(x, sigma, class_cond=told))
    velocity = Velocity()
    flow = dm.as_denoiser(velocity, "condot", "flow", shape=IMAGE, reverse_time=True)
    t = 1 / (1 + sigma)  # x_t = t x0 + (1 - t) eps, v = x0 - eps: x0 = x_t + (1 - t) v
    at = x * t[:, None, None, None]
    expected = at + (1 - t)[:, None, None, None] * velocity(t, at)
    torch.testing.assert_close(flow(x, sigma), expected, rtol=1e-4, atol=1e-5)
    unet = of_diffusers()
    alpha = (1 + wide**2).rsqrt()
    time = 999 * unet.path.t_of_rho(sigma.double()).float()
    noise = unet.net.module(alpha * x, time, class_labels=told).sample
    torch.testing.assert_close(unet(x, sigma, labels), x - wide * noise, rtol=1e-3, atol=1e-3)

    def call(net: Any, x: Tensor, sigma: Tensor, conditions: Any) -> Tensor:
        return net(x, sigma, class_cond=conditions["label"])

    own = dm.as_denoiser(k, "edm", "x0", shape=IMAGE, num_classes=10, call=call)
    torch.testing.assert_close(own(x, sigma, told % 10), k(x, sigma, class_cond=told % 10))
    assert set(CALLS) == {"plain", "time-first", "keywords", "edm", "diffusers"}


def test_arguments_that_nobody_knows_are_asked_for() -> None:
    class Needy(nn.Module):
        def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
            return x

    with pytest.raises(UserError, match=r"forward\(x, t, text, pooled\).*call=call"):
        dm.as_denoiser(Needy(), shape=IMAGE)
    with pytest.raises(UserError, match=r"shape="):
        dm.as_denoiser(Conv())
    with pytest.raises(UserError, match=r"unknown way to call a network.*keywords"):
        dm.as_denoiser(Conv(), shape=IMAGE, call="keyword")
    with pytest.raises(UserError, match=r"are for modules"):
        dm.as_denoiser(lambda x, t: x, shape=IMAGE, call="edm")
    classes = dm.as_denoiser(of_diffusers().net.module, shape=IMAGE, num_classes=11)
    with pytest.raises(UserError, match=r"set null_class"):
        classes(torch.zeros(1, *IMAGE), torch.ones(1), torch.tensor([-1]))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (OfKDiffusion(), ("k-diffusion", "dm.as_denoiser(model, shape=")),
        (OfEDM(), ("EDM's code", "dm.as_denoiser(model)")),
        (Conv(), ("unknown prediction type", "as_denoiser")),
        (lambda x, t: x, ("unknown prediction type", "as_denoiser")),
        (3, ("cannot be called",)),
    ],
    ids=["k-diffusion", "edm", "bare", "function", "number"],
)
def test_what_is_no_denoiser_is_refused_with_the_line_that_makes_it_one(
    model: Any, said: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        dm.distill(model, out=tmp_path / "run", **QUICK)
    assert all(words in str(caught.value) for words in said), caught.value
    assert not (tmp_path / "run").exists()
