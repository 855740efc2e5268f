"""Under bfloat16 autocast networks alone compute in it: all that is kept, logged or compared is float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distmatch.methods.construct import build
from distmatch.nets.shared import own_state
from distmatch.ratio.normalizer import RatioNormalizer
from tests.helpers.small import batch, network_teacher

PRECISE = (torch.float32, torch.float64)
LORA = {"train": "lora", "lora_rank": 2, "base_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("f-distill", {"num_steps": 2, "gan_weight": 0.1}),
        ("f-distill", LORA),
        ("dmd2", {"accumulate": 2}),
        ("uni-instruct", {}),
        ("consistency", {}),
    ],
)
def test_weights_moments_averages_ratios_and_losses_are_precise(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios: list[Tensor] = []
    update: Any = RatioNormalizer.update

    def watched(self: RatioNormalizer, logit: Tensor, *others: Any) -> Any:
        found = update(self, logit, *others)
        ratios.extend((logit, found.log_r, found.weight, found.scale))
        return found

    monkeypatch.setattr(RatioNormalizer, "update", watched)
    teacher = network_teacher(2)
    method: Any = build(teacher, name, total_steps=100, precision="bf16", **settings)
    state = method.init(0)
    inner: set[torch.dtype] = set()
    network: Any = state.student.denoiser.net
    network.register_forward_hook(lambda _m, _i, output: inner.add(output.dtype))
    logged: list[Tensor] = []
    for step in range(6):
        logged += method.step(state, batch(step, 2)).values()
    assert inner == {torch.bfloat16}  # autocast was at work

    moments = [v for o in state.optimizers.values() for s in o.state.values() for v in s.values()]
    kept = [*moments, *state.ema.rest_dict().values(), *ratios]
    kept += [v for m in state.modules().values() for v in own_state(m).values()]
    if state.normalizer is not None:
        kept += [v for v in state.normalizer.state_dict().values() if isinstance(v, Tensor)]
    assert moments
    assert bool(ratios) == (name in ("f-distill", "uni-instruct"))
    for value in (*kept, *logged):
        assert not value.is_floating_point() or value.dtype in PRECISE
    base = {p.dtype for p in method.context.teacher.parameters()}
    assert base == ({torch.bfloat16} if settings is LORA else {torch.float32})


@pytest.mark.parametrize("frozen", [False, True])
def test_optimizers_are_fused_and_averages_one_call_for_all_weights(frozen: bool) -> None:
    method: Any = build(network_teacher(), "f-distill", total_steps=100, **(LORA if frozen else {}))
    state = method.init(0)
    for step in range(method.config.fake_score_steps):
        method.step(state, batch(step))
    assert all(group["fused"] for o in state.optimizers.values() for group in o.param_groups)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        state.ema.update(state.student.denoiser, 0.9)
    counts = {event.key: event.count for event in seen.key_averages()}
    assert sum(n for key, n in counts.items() if "_foreach_" in key) == sum(
        n for key, n in counts.items() if key == "aten::_foreach_lerp_"
    )
    assert counts["aten::_foreach_lerp_"] == 1
