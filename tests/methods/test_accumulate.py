"""A batch seen in parts gives the update of the whole batch, the statistics of its ratios included."""

from __future__ import annotations

import pytest
import torch

from distmatch.methods.state import DistillState
from tests.helpers.small import PAIR, batch, distiller, network_teacher, read_by


def gradients(accumulate: int, steps: int, classes: int, **settings: object) -> tuple[DistillState, list]:
    """Runs with plain gradient descent, which shows gradients as they are; returns what was logged, too."""
    rates = read_by(settings.get("method", "f-distill"), lr=0.3, lr_fake_score=0.05, lr_discriminator=0.3)
    method = distiller(network_teacher(classes), accumulate=accumulate, grad_clip=0.0, **rates, **settings)
    state = method.init(0)
    for name, optimizer in state.optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state.optimizers[name] = torch.optim.SGD(parameters)
    infos = [method.step(state, batch(step, classes)) for step in range(steps)]
    return state, infos


CASES = [
    {"which": "kl", "ratio_features": "teacher", "gan_weight": 0.5, "r1": 0.5},
    {"which": "js", "ratio_features": "fake", "gan_weight": 0.5},
    {"which": "kl", "ratio_features": "own", "gan_weight": 0.0},
    {"method": "diff-instruct"},
    {"which": "js", "num_steps": 3, "ratio_features": "own", "gan_weight": 0.5},
    {"method": "sida", "gan_weight": 0.5},
    {"method": "sim"},
    {"method": "uni-instruct", "which": "js", "ratio_warmup": 2, "gan_weight": 0.5},
]


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_parts_of_a_batch_change_nothing(settings: dict[str, object], classes: int) -> None:
    whole, said = gradients(1, 6, classes, **settings)
    for accumulate in (2, 5):  # 32 samples do not divide by 5
        parts, told = gradients(accumulate, 6, classes, **settings)
        for name, net in whole.modules().items():
            other = dict(parts.modules()[name].named_parameters())
            for key, value in net.named_parameters():
                # float32 sums in another order; steps of a size that leaves nothing to rounding alone.
                torch.testing.assert_close(other[key], value, rtol=2e-4, atol=2e-6, msg=f"{name} {key}")
        for one, two in zip(said, told, strict=True):
            assert one.keys() == two.keys()
            for key, value in one.items():
                torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-6, equal_nan=True, msg=key)
        if whole.normalizer is not None and settings.get("which"):
            assert whole.normalizer.count.sum() > 32
            for key, value in whole.normalizer.state_dict().items():
                torch.testing.assert_close(parts.normalizer.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_networks_see_no_more_than_a_part() -> None:
    method = distiller(network_teacher(), "js", accumulate=4, gan_weight=0.1)
    state = method.init(0)
    networks = {"student": state.student.denoiser, "fake": state.fake_score, "teacher": method.teacher}
    seen: dict[str, list[int]] = {name: [] for name in networks}
    for name, net in networks.items():
        net.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(len(inputs[0])))
    for step in range(2):
        method.step(state, batch(step))
    # Features of generated and real samples are made in one pass, whose graph nobody keeps.
    assert {name: max(sizes) for name, sizes in seen.items()} == {"student": 8, "fake": 8, "teacher": 16}


def test_an_exact_teacher_takes_parts_too() -> None:
    method = distiller(PAIR, "js", accumulate=3)
    state = method.init(0)
    for step in range(2):
        info = method.step(state, batch(step, 2))
    assert torch.isfinite(info["grad_dm"])
