"""The Fokker-Planck residual as a term of a teacher's loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.geometry.fokker_planck import fokker_planck_loss, score_residual
from distmatch.diffusion.mixture import GaussianMixture
from tests.helpers.small import network_teacher

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.2], [0.8, 0.0]], [0.05, 0.1])


def _points(n: int, low: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    sigma = low + torch.rand(n, generator=gen, dtype=torch.float64)
    y = MIXTURE.sample(n, seed=0).double() + sigma[:, None] * torch.randn(n, 2, generator=gen).double()
    probes = torch.where(torch.randn(2, n, 2, generator=gen) >= 0, 1.0, -1.0).double()
    return y, sigma, probes


def test_it_is_the_exact_square_on_average_over_probes_and_zero_for_a_true_score() -> None:
    y, sigma, _ = _points(64)

    class Wrong:
        shape, num_classes, sigma_data, sigma_min, sigma_max = (2,), 0, 1.0, 0.01, 10.0

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, conditioning: Any = None) -> torch.Tensor:
            return MIXTURE(x, sigma) + 0.1 * torch.sin(3 * x) * sigma[:, None]

    # In the plane two signs are all there are, up to their common sign, which does not matter.
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()[:, None].expand(-1, len(y), -1)
    for denoiser in (Wrong(), MIXTURE):
        pairs = [torch.stack([signs[a], signs[b]]) for a in (0, 1) for b in (0, 1)]
        mean = torch.stack([fokker_planck_loss(denoiser, y, sigma, p).detach() for p in pairs]).mean(0)
        exact = sigma[:, None] ** 2 * score_residual(denoiser, y, sigma).residual[0]
        assert torch.allclose(mean, exact.square().mean(-1), rtol=1e-9, atol=1e-12)
        assert (float(mean.mean()) > 1e-4) == isinstance(denoiser, Wrong)


def test_its_gradient_is_that_of_finite_differences() -> None:
    teacher = network_teacher().double()
    y, sigma, probes = _points(16)
    # Below the normalization of the block, whose third derivative is torch's only by parts.
    weight = next(p for name, p in teacher.named_parameters() if name.endswith("trunk.first.weight"))
    weight.requires_grad_(True)
    fokker_planck_loss(teacher, y, sigma, probes).mean().backward()
    assert weight.grad is not None
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
        values.append(float(fokker_planck_loss(teacher, y, sigma, probes).detach().mean()))
        with torch.no_grad():
            weight -= step * direction
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(float((weight.grad * direction).sum()), rel=1e-5)
    assert abs(slope) > 1e-8


def test_a_teacher_learns_from_loss_and_residual_together(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "width": 8,
        "depth": 1,
        "batch": 16,
        "quiet": True,
        "lr_rampup": 0,
        "log_every": 1,
    }
    plain = dm.train("skewed2", steps=1, **small)
    folder = tmp_path / "run"
    with_it = dm.train("skewed2", steps=1, fokker_planck=1e4, grad_clip=0.0, out=folder, **small)
    (row,) = (r for r in map(json.loads, (folder / "log.jsonl").open()) if r["event"] == "train")
    # The loss is computed before the step, from the same batch and noise.
    assert row["loss"] > 0
    assert row["fokker_planck"] != 0
    pairs = zip(plain.parameters(), with_it.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_network_learns_to_have_none() -> None:
    network = network_teacher()
    y, sigma, probes = (v.float() for v in _points(128))
    for p in network.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    found = []
    for _ in range(30):
        loss = fokker_planck_loss(network, y, sigma, probes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        exact = score_residual(network, y, sigma).residual[0]
        found.append(float((sigma[:, None] ** 2 * exact).square().mean()))
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize(
    "settings", [{"pfgm_dims": 64.0}, {"dropout": 0.1, "net": "mlp"}, {"compile": True}], ids=str
)
def test_what_cannot_be_differentiated_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fokker-planck"):
        dm.train("ring8", steps=2, batch=8, fokker_planck=1.0, quiet=True, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
