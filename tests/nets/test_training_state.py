"""The state of every training, whole and as checkpoints of version 0.1 have it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.discrete import MarginalTraining, TokenNetConfig, TokenTrainingConfig
from distmatch.nets.config import MLPConfig
from distmatch.training.options import TeacherConfig
from distmatch.training.teacher import TeacherTraining
from tests.helpers.small import batch, distiller, network_teacher
from tests.reference.discrete_models import L, V, table


def teacher() -> tuple[Any, Any]:
    config = TeacherConfig(learned_uncertainty=True)
    net = MLPConfig(width=8, depth=1)
    method = TeacherTraining(config, net, (2,), 0, 0.7, 4, torch.device("cpu"))
    return method, lambda step: Batch(batch(step).x)


def tokens() -> tuple[Any, Any]:
    net = TokenNetConfig(vocabulary=V, length=L, width=8, depth=1, heads=2)
    method = MarginalTraining(net, 4, TokenTrainingConfig(chains=8), conditionals=table())
    return method, lambda step: table().sample(8, torch.Generator().manual_seed(step))


def student() -> tuple[Any, Any]:
    return distiller(network_teacher(), "js"), batch


TRAININGS = {"teacher": teacher, "tokens": tokens, "student": student}


def of_version_0_1(tree: dict[str, Any]) -> dict[str, Any]:
    """The same content in the form that version 0.1 gave it."""
    if "normalizer" in tree:
        other = {"optimizers": "optimisers", "normalizer": "normaliser"}
        return {other.get(name, name): value for name, value in tree.items()}
    (optimizer,) = tree["optimizers"].values()
    rest = {name: tree[name] for name in ("average_rest", "generator", "step")}
    return {**tree["modules"], **tree["memory"], **rest, "optimiser": optimizer}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("layout", [copy.deepcopy, of_version_0_1], ids=["today", "0.1"])
@pytest.mark.parametrize("kind", TRAININGS)
def test_a_state_is_restored_whole(kind: str, layout: Any) -> None:
    method, batches = TRAININGS[kind]()
    whole, other = method.init(0), method.init(1)
    for step in range(2):
        method.step(whole, batches(step))
    other.load_state_dict(layout(copy.deepcopy(whole.state_dict())))
    assert other.step == 2
    assert_same(other.state_dict(), whole.state_dict())


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_state_of_another_training_is_refused(kind: str) -> None:
    state = TRAININGS[kind]()[0].init(0)
    for other in TRAININGS.keys() - {kind}:
        with pytest.raises(UserError, match="a run of another kind"):
            state.load_state_dict(TRAININGS[other]()[0].init(0).state_dict())
