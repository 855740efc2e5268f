"""DisBack: recorded copies lead from the untrained student's score to the teacher's, served in that order."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.guidance import Guided
from distmatch.losses import score_difference
from distmatch.methods.matching.backtrack import Path as CopyPath
from distmatch.methods.state import DistillState
from distmatch.nets.edm import EDMDenoiser
from distmatch.training.checkpoint import load_checkpoint, save_checkpoint
from distmatch.training.packing import pack
from tests.helpers.small import batch, distiller, network_teacher

SHORT = {"backtrack": 3, "backtrack_degrade_steps": 4, "backtrack_interval": 2}


def advance(method: Any, state: DistillState, steps: int, classes: int = 0) -> None:
    for _ in range(steps):
        method.step(state, batch(state.step, classes))


def assert_equal(one: DistillState, two: DistillState) -> None:
    (mine, shape), (theirs, other) = pack(one.state_dict()), pack(two.state_dict())
    assert shape == other
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("classes", [0, 3])
def test_without_copies_it_is_the_base_method_to_the_bit(classes: int) -> None:
    one, two = (
        distiller(network_teacher(classes), method=name, **extra)
        for name, extra in (("disback", {"backtrack": 0}), ("dmd2", {}))
    )
    first, second = one.init(0), two.init(0)
    advance(one, first, 9, classes)
    advance(two, second, 9, classes)
    assert first.updates == 4
    assert_equal(first, second)


@pytest.mark.parametrize("name", ["dmd2", "sid", "uni-instruct"])
def test_copies_that_equal_the_teacher_change_nothing_but_the_wait(name: str) -> None:
    teacher = network_teacher()
    settings: dict[str, Any] = {"ratio_features": "own"} if name != "sid" else {}
    path, base = (
        distiller(teacher, method=name, **settings, **extra) for extra in (SHORT, {"warmup_steps": 12})
    )
    one, two = path.init(0), base.init(0)
    advance(path, one, 12)
    advance(base, two, 12)
    for recorded in one.extra.values():
        recorded.load_state_dict(teacher.state_dict())
    advance(path, one, 8)
    advance(base, two, 8)
    assert one.updates == two.updates == 4
    assert one.extra.keys() == {"target_1", "target_2"}
    one.extra.clear()
    assert_equal(one, two)


def test_copies_are_recorded_on_the_way_and_served_backwards() -> None:
    teacher = network_teacher()
    before = copy.deepcopy(teacher.state_dict())
    method = distiller(teacher, method="disback", **SHORT)
    state, seen = method.init(0), []
    start = copy.deepcopy(state.student.state_dict())
    for step in range(12):
        advance(method, state, 1)
        if step in (3, 7):
            seen.append(copy.deepcopy(state.fake_score.state_dict()))
    assert all(torch.equal(v, state.student.state_dict()[k]) for k, v in start.items())
    served = []
    for _ in range(12):
        served.append(method.base.compared.target_of(state))
        advance(method, state, 1)
    # Two updates each (one in two steps), the copy nearest to the student first, the teacher in the end.
    near, middle = state.extra["target_2"], state.extra["target_1"]
    assert [id(s) for s in served] == [id(x) for x in [near] * 4 + [middle] * 4 + [teacher] * 4]
    for index, kept in enumerate(seen, 1):
        found = state.extra[f"target_{index}"].state_dict()
        assert all(torch.equal(found[k], v) for k, v in kept.items())
        assert not all(torch.equal(found[k], v) for k, v in before.items())
    assert all(torch.equal(teacher.state_dict()[k], v) for k, v in before.items())
    assert not any(p.requires_grad for net in state.extra.values() for p in net.parameters())
    assert method.notes()["recording_steps"] == 12
    assert method.notes()["teacher_from_update"] == 4


@pytest.mark.parametrize("at", [6, 17])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path, at: int) -> None:
    def method() -> Any:
        return distiller(network_teacher(), method="disback", gan_weight=0.1, **SHORT)

    whole = method().init(0)
    advance(method(), whole, at)  # while recording, or on the way back
    save_checkpoint(tmp_path, whole.step, whole.state_dict())
    advance(method(), whole, 10)
    again = method().init(7)
    again.load_state_dict(load_checkpoint(tmp_path)[1])
    advance(method(), again, 10)
    assert_equal(again, whole)


def test_all_targets_are_guided_or_none() -> None:
    for scale in (1.0, 2.5):
        method = distiller(network_teacher(3), method="disback", guidance=scale, **SHORT)
        state = method.init(0)
        for updates in (0, 2, 4):
            state.updates = updates
            target = method.base.compared.target_of(state)
            assert isinstance(target, Guided) == (scale != 1)
            assert not isinstance(target, Guided) or target.scale == scale
        advance(method, state, 3, classes=3)


@pytest.mark.parametrize(
    ("name", "which"), [("f-distill", "kl"), ("diff-instruct", None), ("sid", None), ("uni-instruct", "js")]
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_goes_with_every_fake_score(name: str, which: str | None, accumulate: int) -> None:
    method = distiller(network_teacher(), which, name, accumulate=accumulate, **SHORT)
    state = method.init(0)
    advance(method, state, 20)
    assert state.updates == 4
    assert all(p.isfinite().all() for p in state.student.parameters())


def test_lengths_of_its_own_fit_the_run_and_too_short_a_run_is_refused() -> None:
    assert distiller(network_teacher(), method="disback", total_steps=3000).path == CopyPath(5, 40, 50)
    path = distiller(network_teacher(), method="disback", total_steps=100).path
    assert path == CopyPath(5, 2, 3)  # a tenth of the steps; a third of 45 updates
    with pytest.raises(UserError, match="would end before") as refusal:
        distiller(network_teacher(), method="disback", total_steps=40, backtrack_interval=10)
    assert "more than 80 steps" not in str(refusal.value)
    assert "--backtrack-interval" in str(refusal.value)


# ------------------------------------------------------------------ Gaussians, where all is known


class GaussianNet(nn.Module):
    """The network for which an EDMDenoiser is the exact denoiser of N(mean, exp(2 log_std))."""

    def __init__(self, mean: float, std: float, sigma_data: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())
        self.sigma_data = sigma_data

    has_features = True

    def forward(
        self, inputs: Tensor, c_noise: Tensor, labels: Any = None, *, return_features: Any = False
    ) -> Any:
        if return_features == "only":
            return [inputs]
        sigma = (4 * c_noise).exp()[:, None]
        total = sigma**2 + self.sigma_data**2
        x, variance = inputs * total.sqrt(), (2 * self.log_std).exp()
        denoised = self.mean + variance / (variance + sigma**2) * (x - self.mean)
        out = (denoised - self.sigma_data**2 / total * x) * total.sqrt() / (sigma * self.sigma_data)
        return (out, [inputs]) if return_features else out


def gaussian(mean: float, std: float) -> EDMDenoiser:
    net = GaussianNet(mean, std, 1.0)
    return EDMDenoiser(net, shape=(1,), num_classes=0, sigma_data=1.0, sigma_max=10.0).requires_grad_(False)


def moments(denoiser: Any) -> tuple[float, float]:
    return float(denoiser.net.mean), float(denoiser.net.log_std.exp())


def test_on_gaussians_the_copies_lead_from_the_student_s_score_to_the_teacher_s() -> None:
    teacher = gaussian(1.5, 0.5)
    settings = {"student_sigma": 1.0, "noise_low": 0.2, "lr_fake_score": 0.01, "noise_high": 5.0}
    method = distiller(
        teacher, method="diff-instruct", total_steps=1000, backtrack=5, backtrack_degrade_steps=36, **settings
    )
    state = method.init(0)
    for _ in range(180):
        method.step(state, Batch(torch.empty(256, 1), None))
    # The untrained student maps z to the teacher's denoised z: N(m (1 - k), k^2) with k = 0.25 / 1.25.
    at_start = (1.5 * 0.8, 0.2)
    recorded = [teacher, *(state.extra[f"target_{i}"] for i in range(1, 5)), state.fake_score]
    # The fake score's steps of 0.01 leave the last copy within a few hundredths of the truth.
    assert moments(recorded[-1]) == pytest.approx(at_start, abs=0.03)

    def kl(q: tuple[float, float]) -> float:
        gap = (q[1] ** 2 + (q[0] - 1.5) ** 2) / (2 * 0.25)
        return gap - 0.5 + float(torch.tensor(0.5 / q[1]).log())

    distances = [kl(moments(net)) for net in recorded]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert all(a < b for a, b in itertools.pairwise(distances)), distances

    # The gradient against the copies, at the untrained student with its exact score.
    own = gaussian(*at_start)
    g = torch.Generator().manual_seed(0)
    x0 = at_start[0] + at_start[1] * torch.randn(20_000, 1, generator=g)
    sigma = method.base.noise.sample(20_000, g)
    x = x0 + sigma[:, None] * torch.randn(x0.shape, generator=g)
    sizes = [
        float(score_difference(net(x, sigma), own(x, sigma), x0, sigma, scaling="score").square().mean())
        for net in recorded
    ]
    assert sizes[-1] < 0.02 * sizes[0]
    assert all(a > b for a, b in itertools.pairwise(sizes)), sizes
