"""`dm.fit`: trainings of a program's own have the loop of the verbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distmatch as dm
from distmatch.base.errors import DivergedError, UserError
from distmatch.discrete import (
    ConditionalTraining,
    EnergyTraining,
    TokenNetConfig,
    TokenTrainingConfig,
    load_discrete,
    save_discrete,
)
from distmatch.nets.config import MLPConfig
from tests.helpers.small import PAIR, batch, network_teacher
from tests.reference.discrete_models import L, V, table

NET = TokenNetConfig(vocabulary=V, length=L, width=8, depth=1, heads=2)


def sequences(step: int) -> Tensor:
    return table().sample(8, torch.Generator().manual_seed(step))


def tokens() -> ConditionalTraining:
    return ConditionalTraining(NET, 6)


def student() -> Any:
    return dm.methods.build(network_teacher(), "f-distill", total_steps=6, fake_score_steps=2)


CASES: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {
    "tokens": (tokens, sequences),
    "energy": (lambda: EnergyTraining(NET, 6, log_f=lambda x: -x.float().sum(1)), lambda step: None),
    "student": (student, batch),
}


def weights(model: Any) -> list[Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize("kind", CASES)
def test_an_interrupted_training_ends_as_the_loop_by_hand(kind: str, tmp_path: Path) -> None:
    make, batches = CASES[kind]
    training = make()
    state = training.init(3)
    for step in range(6):
        training.step(state, batches(step))

    def interrupted(step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return batches(step)

    run: dict[str, Any] = {"steps": 6, "seed": 3, "out": tmp_path / "run", "quiet": True}
    run |= {"checkpoint_every": 2, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        dm.fit(make(), interrupted, **run)
    assert not (tmp_path / "run/model").exists()
    model = dm.fit(make(), batches, **run, resume=True)
    for ours, theirs in zip(weights(model), weights(training.result(state)), strict=True):
        assert torch.equal(ours, theirs)
    events = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resume"] == [4]
    assert [e["step"] for e in events if e["event"] == "train"] == [1, 2, 3, 4, 5, 5, 6]
    assert all("loss" in e or "loss_fake" in e for e in events if e["event"] == "train")


def test_the_result_is_saved_where_it_is_asked_for(tmp_path: Path) -> None:
    model = dm.fit(tokens(), sequences, steps=2, out=tmp_path / "run", save=save_discrete, quiet=True)
    again, _ = load_discrete(tmp_path / "run/model")
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again), strict=True))
    in_memory = dm.fit(tokens(), sequences, steps=2, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(in_memory), strict=True))


def test_a_state_that_was_made_with_more_than_a_seed_is_where_it_begins(tmp_path: Path) -> None:
    real = PAIR.sample(64, seed=0)

    def state_of(method: Any) -> Any:
        return method.init(3, draw=lambda n: (real[torch.arange(n) % 64], torch.zeros(n, dtype=torch.int64)))

    def batches(step: int) -> Any:
        return batch(step, classes=2)

    def make() -> Any:
        net = MLPConfig(width=8, depth=1)
        return dm.methods.build(PAIR, "dmd2", total_steps=4, net=net, fit_steps=3)

    method = make()
    fitted = dm.fit(method, batches, steps=4, state=state_of(method), quiet=True)
    by_hand, method = make(), make()
    state = state_of(by_hand)
    for step in range(4):
        by_hand.step(state, batches(step))
    for ours, theirs in zip(weights(fitted), weights(by_hand.result(state)), strict=True):
        assert torch.equal(ours, theirs)
    unfitted = dm.fit(method, batches, steps=4, seed=3, quiet=True)
    assert any(not torch.equal(a, b) for a, b in zip(weights(fitted), weights(unfitted), strict=True))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    dm.fit(tokens(), sequences, steps=2, out=out, quiet=True)
    for change, message in (
        ({"steps": 2}, "is not empty"),
        ({"steps": 1, "resume": True}, "cannot become shorter"),
        ({"steps": 2, "seed": 1, "resume": True}, "--seed"),
        ({"steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            dm.fit(tokens(), sequences, out=out, quiet=True, **change)
    with pytest.raises(UserError, match="a run of another kind"):
        dm.fit(student(), batch, steps=2, out=out, quiet=True, resume=True)


def test_numbers_gone_bad_end_a_training(tmp_path: Path) -> None:
    training = EnergyTraining(
        NET, 6, TokenTrainingConfig(chains=8), log_f=lambda x: x.float().sum(1) * float("nan")
    )
    with pytest.raises(DivergedError, match=r"gap, .* became nan by step 2"):
        dm.fit(training, lambda step: None, steps=6, out=tmp_path / "run", log_every=2, quiet=True)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
