"""DPM-OT: the semi-discrete map against closed forms and assignments, its seams, and its student."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.data.toys import toy
from distmatch.discrepancies.mmd import mmd
from distmatch.methods.student import Student
from distmatch.methods.transport import semi_discrete
from distmatch.methods.transport.semi_discrete import (
    BrenierMap,
    cell_shares,
    cell_values,
    nearest_seams,
)
from distmatch.training.options import DistillOptions, RunOptions
from distmatch.training.packing import pack
from distmatch.training.prepare import prepare_distillation
from distmatch.training.sampling import draw_student
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import batch, distiller, network_teacher


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solved(targets: Tensor, draws: Tensor, steps: int = 400, lr: float = 0.05) -> BrenierMap:
    """The map of latents (G, N, d) for noise that is these draws (G, M, d), by Adam with a falling rate."""
    transport = BrenierMap(targets)
    adam = torch.optim.Adam([transport.heights], lr)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        transport.descend(draws)
        adam.step()
        transport.recenter()
    return transport


def test_the_border_of_two_cells_is_at_the_quantile() -> None:
    # With heights such that cell 1 has the share nu_1, the border (h_1 - h_2) / (y_2 - y_1) = Phi^-1(nu_1).
    z = normal(200_000, 1)
    points = torch.tensor([[-1.0], [2.0]])
    for share in (0.2, 0.5, 0.9):
        border = float(norm.ppf(share))
        shares, _ = cell_shares(z, points, torch.tensor([3.0 * border, 0.0]))
        assert abs(float(shares[0]) - share) < 5 * math.sqrt(share * (1 - share) / 200_000)
    # Solved for equal shares the border is at 0, wherever the two points are.
    transport = solved(torch.tensor([[[-1.0], [5.0]]]), normal(1, 20_000, 1))
    inside = transport.points(0)
    border = (transport.heights[0, 0] - transport.heights[0, 1]) / (inside[1] - inside[0])
    assert abs(float(border.detach())) < 0.03


def test_symmetric_latents_have_equal_heights_and_cells() -> None:
    angle = torch.arange(6) * (2 * math.pi / 6)
    transport = solved(torch.stack([angle.cos(), angle.sin()], 1)[None], normal(1, 20_000, 2), lr=0.01)
    assert float(transport.heights.detach().abs().max()) < 0.03
    transport.descend(normal(1, 60_000, 2, seed=1))
    assert float(transport.heights.grad.abs().max()) < 5 * math.sqrt(1 / 6 / 20_000) + 0.002  # type: ignore[union-attr]


def test_equal_atoms_are_assigned_at_least_cost() -> None:
    z, targets = normal(1, 40, 2), 0.5 + 2 * normal(1, 40, 2, seed=1)
    transport = solved(targets, z, steps=3000, lr=0.02)
    points = transport.points(0)
    products = (z[0] @ points.T).double()
    rows, columns = linear_sum_assignment(products.numpy(), maximize=True)
    best = float(products[rows, columns].mean())
    # By duality the least energy is the largest mean product of any assignment.
    assert float(transport.descend(z)) == pytest.approx(best, abs=3e-3)
    assert float(transport.descend(z)) >= best - 1e-5
    cells = cell_values(z[0], points, transport.heights[0]).argmax(1)
    assert float((cells == torch.from_numpy(columns)).float().mean()) > 0.9


def test_the_energy_is_convex_and_does_not_see_a_shift() -> None:
    z, targets = normal(1, 500, 3), normal(1, 20, 3, seed=1)
    transport = BrenierMap(targets)

    def energy(heights: Tensor) -> float:
        transport.heights.data.copy_(heights)
        return float(transport.descend(z))

    for seed in range(10):
        one, two = normal(1, 20, seed=10 + seed), normal(1, 20, seed=30 + seed)
        assert energy((one + two) / 2) <= (energy(one) + energy(two)) / 2 + 1e-6
        assert energy(one + 3.0) == pytest.approx(energy(one), abs=1e-5)
    # Its slope is measure less share: central differences over a step that few draws notice.
    heights, step = normal(1, 20, seed=5), 1e-3
    energy(heights)
    slope = transport.heights.grad.clone()  # type: ignore[union-attr]
    for i in range(20):
        shift = torch.zeros(1, 20)
        shift[0, i] = step
        change = (energy(heights + shift) - energy(heights - shift)) / (2 * step)
        assert change == pytest.approx(float(slope[0, i]), abs=4e-3)


def test_the_map_is_monotone_and_in_the_bank() -> None:
    transport = solved(normal(1, 30, 3, seed=1), normal(1, 2000, 3), steps=50)
    z = normal(400, 3, seed=2)
    mapped = transport(z, None, 0.5, normal(400, 3, seed=3)).detach()
    products = ((z[:, None] - z) * (mapped[:, None] - mapped)).sum(-1)
    assert float(products.min()) > -1e-4
    assert bool((mapped[:, None] == transport.targets[0]).all(2).any(1).all())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, targets = normal(2, 333, 3), normal(2, 20, 3, seed=1)
    transport = BrenierMap(targets)
    labels = torch.arange(333) % 2
    whole = transport.descend(z), transport.heights.grad, transport(z[0], labels, 0.1, z[1])
    monkeypatch.setattr(semi_discrete, "rows_per_chunk", lambda *_: 7)
    parted = transport.descend(z), transport.heights.grad, transport(z[0], labels, 0.1, z[1])
    for one, two in zip(whole, parted, strict=True):
        torch.testing.assert_close(one, two)


def test_each_class_has_its_own_map() -> None:
    transport = BrenierMap(torch.stack([normal(10, 2), 100 + normal(10, 2, seed=1)]))
    labels = torch.tensor([0, 1, 1, 0])
    mapped = transport(normal(4, 2), labels, 0.1, normal(4, 2)).detach()
    assert torch.equal(mapped[:, 0] > 50, labels == 1)


def test_angles_are_those_of_the_lifted_normals() -> None:
    # (0, -1) and (1, -1) are 45 degrees apart; at heights 0 and -1/2 their planes meet at z = 1/2.
    seams = nearest_seams(torch.tensor([[0.2]]), torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -0.5]))
    assert float(seams.angle) == pytest.approx(math.pi / 4)
    assert float(seams.distance) == pytest.approx(0.3)
    assert (int(seams.first), int(seams.second)) == (0, 1)


def two_modes() -> BrenierMap:
    """Two clusters far apart, solved: seams within a cluster have small angles, those between large ones."""
    targets = torch.cat([0.3 * normal(20, 2) - 3.0, 0.3 * normal(20, 2, seed=1) + 3.0])[None]
    return solved(targets, normal(1, 20_000, 2, seed=2), steps=200)


def test_no_mixture_across_modes_and_none_at_all_without_a_seam() -> None:
    transport = two_modes()
    z, fresh = normal(5000, 2, seed=3), torch.zeros(5000, 2)
    plain = transport(z, None, 0.0, fresh).detach()
    seams = nearest_seams(z, transport.points(0), transport.heights[0].detach())
    across = (seams.first < 20) != (seams.second < 20)
    rejected = float(transport.find_angles(normal(1, 20_000, 2, seed=4), 0.2, 0.7))
    assert bool((seams.angle[across] > transport.largest_angle[0]).all())
    assert rejected == pytest.approx(
        float((seams.angle > transport.largest_angle[0]).float().mean()), abs=0.03
    )
    mixed = transport(z, None, 0.0, fresh).detach()
    assert torch.equal(mixed[across], plain[across])  # a single latent, and the same
    moved = (mixed != plain).any(1)
    assert float(moved.float().mean()) > 0.1
    inside = seams.distance < 0.2
    assert bool((moved <= (inside & ~across)).all())
    # Nothing lies between the modes, where the mean of two latents of different modes would.
    assert float(mixed.sum(1).abs().min()) > 3


def test_smoothing_is_continuous_at_a_seam_and_keeps_the_noise() -> None:
    transport = BrenierMap(torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]]))
    transport.find_angles(normal(1, 100, 2), 0.5, 1.0)
    z = torch.stack([torch.linspace(-1, 1, 401), torch.zeros(401)], 1)
    path = transport(z, None, 0.0, torch.zeros(401, 2)).detach()[:, 0]
    assert float(path.diff().abs().max()) < 0.02
    assert (float(path[0]), float(path[-1])) == (-1.0, 1.0)
    torch.testing.assert_close(path[200], torch.tensor(0.0), rtol=0, atol=0.01)
    # Latents of noise level 2 that carry nothing but noise: a mixture of two of them does so, too.
    sigma, noise = 2.0, normal(200_000, 2)
    weight = 0.3
    lost = math.sqrt(1 - weight**2 - (1 - weight) ** 2)
    mixture = (1 - weight) * sigma * noise[:, 0] + weight * sigma * noise[:, 1]
    total = mixture + sigma * lost * normal(200_000, seed=1)
    assert float(total.std()) == pytest.approx(sigma, rel=0.01)
    at = torch.tensor([[-0.2, 0.0]])  # 0.2 from the seam of half-width 0.5: weight (1 - 0.4) / 2 = 0.3
    base, kicked = (transport(at, None, sigma, torch.full((1, 2), v)).detach() for v in (0.0, 1.0))
    assert float((kicked - base)[0, 0]) == pytest.approx(sigma * lost, rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit() -> None:
    def method() -> Any:
        return distiller(network_teacher(2), method="dpm-ot", bank=16, total_steps=8, bank_steps=3)

    whole, again = method().init(0), method().init(7)
    for step in range(6):
        if step == 3:
            again.load_state_dict(copy.deepcopy(whole.state_dict()))
        for state in (whole, again)[: 1 + (step >= 3)]:
            method().step(state, batch(step, classes=2))
    mine, theirs = pack(whole.state_dict())[0], pack(again.state_dict())[0]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def trained(**settings: Any) -> tuple[Any, Any]:
    ring = toy("ring8")
    real = ring.sample(4000, seed=0)
    own = {"bank": 128, "fit_steps": 500, "total_steps": 80, "num_steps": 4, **settings}
    method = distiller(ring, method="dpm-ot", **own)
    state = method.init(0, lambda n: (real[:n], None))
    for step in range(80):
        method.step(state, batch(step))
    return method, state


@pytest.mark.slow
def test_it_samples_the_data_and_evens_the_cells(tmp_path: Path) -> None:
    method, state = trained()
    transport = state.ema.module
    draws = normal(1, 50_000, 2)
    transport.descend(draws)
    after = float(transport.heights.grad.abs().sum() / 2)
    started = BrenierMap(transport.targets)
    started.descend(draws)
    before = float(started.heights.grad.abs().sum() / 2)  # type: ignore[union-attr]
    assert after < 0.4 * before  # share of the noise in the wrong cell
    student = method.result(state, {"method": "dpm-ot"})
    assert student.transport is not None
    x, real = student.sample(2000), toy("ring8").sample(4000, seed=9)
    assert mmd(x, real, "energy").value < 0.03
    assert draw_student(student, 300, None, 0, batch=100).nfe == student.nfe == 4
    assert len(x.unique(dim=0)) == 2000  # the calls after the map draw noise: not 128 samples
    # It comes back whole from its folder, and from a run's.
    student.save_pretrained(tmp_path / "student")
    again = Student.from_pretrained(tmp_path / "student")
    assert again.transport is not None
    assert_same_but_for_rounding(again.sample(50, seed=3), student.sample(50, seed=3))
    assert again.info["method"] == "dpm-ot"
    assert 0 <= again.info["rejected_seams"] <= 1
    torch.testing.assert_close(student.sample(50, seed=3, batch=7), student.sample(50, seed=3))


def test_the_calls_after_the_map_draw_from_the_posterior() -> None:
    network, transport = network_teacher(), BrenierMap(normal(1, 5, 2))
    student = Student(network, (1.0, 0.4), None, "posterior", transport=transport)
    noise = [normal(8, 2, seed=i) for i in range(3)]
    assert student.draws == len(noise)
    x = transport(noise[0], None, 1.0, noise[2])
    x0 = network(x, torch.full((8,), 1.0))
    x = x0 + 0.4**2 * (x - x0) + 0.4 * math.sqrt(1 - 0.4**2) * noise[1]
    torch.testing.assert_close(student(noise), network(x, torch.full((8,), 0.4)))


def test_asking_for_the_result_changes_nothing() -> None:
    method = distiller(network_teacher(), method="dpm-ot", bank=8, blend=0.3, bank_steps=2)
    state = method.init(0)
    method.step(state, batch(0))
    before = pack(copy.deepcopy(state.state_dict()))[0]
    one, two = (method.result(state, {}).sample(20) for _ in range(2))
    after = pack(state.state_dict())[0]
    assert torch.equal(one, two)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_bank_is_the_teachers_and_not_that_of_its_evaluation() -> None:
    ring = toy("ring8")
    method = distiller(ring, method="dpm-ot", bank=2000, student_sigma=0.5 / ring.sigma_data)
    bank = method.bank(method.init(0))[0]
    real = ring.sample(2000, seed=1) + 0.5 * normal(2000, 2)
    assert mmd(bank, real, "energy").value < 5e-3
    other = method.bank(method.init(1))[0]
    assert not torch.equal(bank, other)


def test_draws_double_over_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    method = distiller(
        network_teacher(), method="dpm-ot", bank=4, cell_draws=2, doublings=2, total_steps=6, bank_steps=2
    )
    state, seen = method.init(0), []
    descend = BrenierMap.descend
    monkeypatch.setattr(BrenierMap, "descend", lambda self, z: seen.append(z.shape[1]) or descend(self, z))
    for step in range(7):
        method.step(state, batch(step))
    assert seen == [8, 8, 16, 16, 32, 32, 32]


def test_what_cannot_be_is_refused() -> None:
    for level in (20.0 / 0.7, 0.0):  # 0 is sigma_max
        with pytest.raises(UserError, match="within the teacher's range"):
            distiller(network_teacher(), method="dpm-ot", student_sigma=level)
    method = distiller(network_teacher(2), method="dpm-ot", bank=4, bank_steps=2)
    state = method.init(0)
    method.step(state, batch(0, classes=2))
    with pytest.raises(UserError, match="none without a class"):
        method.result(state, {}).sample(3, conditioning=torch.tensor([0, 1, -1]))
    with pytest.raises(UserError, match="not a bank of latents"):
        BrenierMap.restored({"other": torch.zeros(1)})
    with pytest.raises(UserError, match="--bank must be at least 1"):
        distiller(network_teacher(), method="dpm-ot", bank=0)


def test_a_batch_that_does_nothing_is_said_to() -> None:
    for size, said in ((RunOptions().batch, 0), (32, 1)):
        options = DistillOptions.of("dpm-ot", run=RunOptions(batch=size, steps=2))
        job = prepare_distillation(
            replace(options, settings=replace(options.settings, fit_steps=1)), toy("ring8")
        )
        assert len([text for text in job.warnings if "--batch does nothing" in text]) == said
