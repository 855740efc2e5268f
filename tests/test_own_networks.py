"""Networks from elsewhere, handed to distmatch as they are: used rightly, or refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import has_features
from distmatch.diffusion.guidance import Guided
from distmatch.interop.saved import save_denoiser
from distmatch.nets.edm import EDMDenoiser
from distmatch.ratio.discriminator import build_discriminator, choose_source
from tests.helpers.small import network_teacher

QUICK: dict[str, Any] = {"steps": 1, "data": "digits", "batch": 4, "critic_steps": 1}


class Conv(nn.Module):
    """A network of somebody: 77 parameters, two arguments, no features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class OfKDiffusion(nn.Module):
    """What k-diffusion's ``Denoiser`` looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.inner_model, self.sigma_data = Conv(), 0.5

    def forward(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return self.inner_model(x, sigma)


class OfEDM(nn.Module):
    """What ``EDMPrecond`` of EDM's code looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.img_resolution, self.img_channels, self.label_dim = Conv(), 8, 1, 0
        self.sigma_min, self.sigma_max, self.sigma_data = 0.002, 80.0, 0.5

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **_: Any) -> Tensor:
        return self.model(x, sigma)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (OfKDiffusion(), ("k-diffusion", '"edm", "x0"')),
        (OfEDM(), ("EDM's code", "class_labels", '"edm", "x0"')),
        (Conv(), ("does not say what it predicts", "as_denoiser")),
        (lambda x, t: x, ("does not say what it predicts", "as_denoiser")),
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


def test_the_lines_that_are_proposed_work() -> None:
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 60.0])
    for model in (OfKDiffusion(), OfEDM()):
        teacher = dm.as_denoiser(model, "edm", "x0", shape=(1, 8, 8))
        torch.testing.assert_close(teacher(x, sigma), model(x, sigma))


def test_a_student_of_another_network_is_made_only_when_it_is_asked_for(tmp_path: Path) -> None:
    teacher = dm.as_denoiser(Conv(), shape=(1, 8, 8))
    with pytest.raises(UserError, match=r"another kind.*Conv of 77 parameters.*net="):
        dm.distill(teacher, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()
    student = dm.distill(teacher, net="mlp", width=8, depth=1, fit_steps=1, method="dmd2", **QUICK)
    assert type(student.denoiser.net).__name__ == "MLP"


@pytest.mark.filterwarnings("ignore:ratio normalisation")
def test_a_preconditioned_network_of_ones_own_is_trained_but_not_saved(tmp_path: Path) -> None:
    """The student is a copy of it; no file could say how to build it again."""
    net = Conv()
    teacher = EDMDenoiser(net, shape=(1, 8, 8), num_classes=0)
    with pytest.raises(UserError, match="cannot be saved"):
        dm.distill(teacher, out=tmp_path / "run", **QUICK)
    with pytest.raises(UserError, match="cannot be saved"):
        save_denoiser(tmp_path / "run", teacher)
    with pytest.raises(UserError, match="cannot be saved"):
        save_denoiser(tmp_path / "run", dm.as_denoiser(net, shape=(1, 8, 8)))
    assert not (tmp_path / "run").exists()
    # It lends no features, so its discriminator looks at the samples.
    student = dm.distill(teacher, **QUICK)
    assert isinstance(student.denoiser.net, Conv)
    assert student.denoiser.net is not net


def test_features_are_asked_for_only_where_the_network_has_them() -> None:
    ours = network_teacher()
    own = EDMDenoiser(Conv(), shape=(1, 8, 8), num_classes=0)
    exact = dm.GaussianMixture([1.0], [[0.0, 0.0]], [1.0], [0])
    for denoiser, lends in ((ours, True), (own, False), (exact, False), (Guided(exact, 2.0), False)):
        assert has_features(denoiser) is lends
        assert choose_source("auto", denoiser) == ("teacher" if lends else "own")
    for source in ("teacher", "fake"):
        with pytest.raises(UserError, match="--ratio-features own"):
            build_discriminator(choose_source(source, own), own, 0)
