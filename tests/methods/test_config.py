"""What a user may ask of a distillation, what it comes to, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.divergences import divergence
from distmatch.methods.table import METHODS, resolve_method
from tests.helpers.small import PAIR, distiller, network_teacher


def test_an_exact_teacher_starts_from_a_fitted_network() -> None:
    method = distiller(PAIR, "js", fit_steps=150)
    drawn, x0 = torch.Generator().manual_seed(0), PAIR.sample(2000, seed=5)
    blank = method.init(0)
    fitted = method.init(0, lambda n: (x0[torch.randint(2000, (n,), generator=drawn)], None))
    for sigma in (1.0, 4.0):
        x = x0 + sigma * torch.randn(2000, 2, generator=drawn)
        level = torch.full((2000,), sigma)
        with torch.no_grad():
            errors = [
                float((s.fake_score(x, level) - PAIR(x, level)).square().mean()) for s in (blank, fitted)
            ]
        assert errors[1] < 0.5 * errors[0], (sigma, errors)  # measured 0.4 and 0.2


def test_presets_and_refusals() -> None:
    assert resolve_method("f-distill", None) == (METHODS["f-distill"], "js")
    assert resolve_method("F_Distill", "kl")[1] == "kl"
    assert resolve_method("dmd2", None) == (METHODS["dmd2"], "reverse_kl")
    assert resolve_method("dmd2", "rkl")[1] == "reverse_kl"
    with pytest.raises(UserError, match="did you mean f-distill"):
        resolve_method("f-distil", None)
    with pytest.raises(UserError, match="dmd2 minimizes reverse KL"):
        resolve_method("dmd2", "js")
    with pytest.raises(UserError, match="no second derivative"):
        distiller(network_teacher(), "tv")
    with pytest.raises(UserError, match="cannot use features"):
        distiller(PAIR, "js", ratio_features="teacher")
    with pytest.raises(UserError, match="conditional teacher"):
        distiller(network_teacher(), "js", guidance=2.0)
    with pytest.raises(UserError, match="between two noise levels"):
        distiller(network_teacher(), "js", noise_low=30.0)
    heavy_tailed = copy.copy(network_teacher())
    heavy_tailed.pfgm_dims = 128.0
    with pytest.raises(UserError, match="needs the score"):
        distiller(heavy_tailed, "js")
    assert not distiller(network_teacher(), method="diff-instruct").needs_ratio
    assert distiller(network_teacher(), divergence("js")).needs_ratio


WRONG = [{"num_steps": 0}, {"lr": 0.0}, {"fake_score_steps": 0}, {"gan_weight": -1.0}, {"grad_clip": -1.0}]


@pytest.mark.parametrize("wrong", [*WRONG, {"order": "alternate", "fake_score_steps": 1}], ids=str)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--"):
        METHODS["f-distill"].settings(**wrong)  # type: ignore[arg-type]


def test_a_default_start_goes_no_higher_than_the_teacher_and_a_chosen_one_is_refused() -> None:
    low = copy.copy(network_teacher())
    low.sigma_max = 1.5
    assert distiller(low, "js").init(0).student.sigmas == (1.5,)
    assert distiller(low, method="scm").init(0).student.sigmas == (1.5,)
    assert distiller(low, "js", student_sigma=2.0).init(0).student.sigmas == (1.4,)
    with pytest.raises(UserError, match="the student must start at a noise level of the teacher"):
        distiller(low, "js", student_sigma=3.0)
