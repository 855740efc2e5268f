"""Networks inside a wrapper of ``forward``, as hooks and compilers see them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from distmatch.methods.consistency.ctm import record_of
from distmatch.methods.table import METHODS
from distmatch.nets.layers import ConditionEmbedding
from distmatch.training.devices import compile_network
from tests.helpers.small import batch, distiller, network_teacher
from tests.helpers.wrapping import wrap

STEPS = 4
TRAINED = [name for name in METHODS if name != "dpm-ot"]  # which trains a map, and calls no network
OPTIONS: dict[str, dict[str, Any]] = {
    "ctm": {"gan_weight": 0.1, "gan_after": 0.0},
    "dmd": {},
    "rcm": {"dmd_after": 0.0},
    "mmd": {"mmd_features": "teacher", "num_steps": 2},
}


def built(name: str, **options: Any) -> tuple[Any, Any]:
    method = distiller(network_teacher(2), method=name, **OPTIONS.get(name, {}), **options)
    return method, method.init(0)


@pytest.mark.parametrize(
    ("name", "train"), [*((name, "full") for name in TRAINED), ("f-distill", "lora"), ("ctm", "lora")]
)
def test_a_wrapper_sees_every_pass_and_changes_nothing(name: str, train: str) -> None:
    """Passes are counted at the one layer of each network that sees the noise level, once in a pass."""
    (method, plain), (other, state) = built(name, train=train), built(name, train=train)
    wrapped = wrap(state)
    entered = dict.fromkeys(wrapped, 0)
    for key, network in wrapped.items():
        layer = next(part for part in network.modules() if isinstance(part, ConditionEmbedding)).noise

        def entry(*_: Any, key: str = key) -> None:
            entered[key] += 1

        layer.register_forward_pre_hook(entry)
    for step in range(STEPS):
        method.step(plain, batch(step, 2))
        other.step(state, batch(step, 2))
    assert entered == {key: network.calls for key, network in wrapped.items()}
    assert min(entered.values()) > 0
    for key, network in wrapped.items():
        expected = plain.modules()[key].state_dict()
        found = network.module.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), key


@pytest.mark.parametrize("name", TRAINED)
def test_no_gradient_is_taken_with_respect_to_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But by ``backward``, whose hooks a wrapper reads."""
    method, state = built(name)
    own = {id(p) for net in state.modules().values() for p in net.parameters()}
    plain = torch.autograd.grad
    taken: list[int] = []

    def watched(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        taken.extend(id(x) for x in ([inputs] if isinstance(inputs, torch.Tensor) else inputs))
        return plain(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    for step in range(STEPS):
        method.step(state, batch(step, 2))
    assert not own & set(taken)


def test_the_gradient_of_the_last_layer_is_that_of_autograd() -> None:
    for layer, x in (
        (nn.Linear(3, 4), torch.randn(5, 3)),
        (nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 6)),
    ):
        record = record_of(layer)
        assert record_of(layer) is record
        with record.recording():
            out = 0.3 * x.mean() + 2 * layer(x)
            gradient = torch.randn_like(out)
            found = record.weight_gradient(out, gradient)
        (expected,) = torch.autograd.grad(out, layer.weight, gradient)
        torch.testing.assert_close(found, expected)
        layer(x)  # of which nothing is kept: the layer can be copied
        assert record._seen is None


@pytest.mark.slow
def test_a_compiled_network_has_that_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook is there before the graph is made, which ends at it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        method, state = built("ctm")
        if compiled:
            compile_network(state.student.denoiser.net)
        for step in range(2):
            info = method.step(state, batch(step, 2))
        found.append({key: value.detach() for key, value in info.items()})
    eager, graphs = found
    assert float(eager["weight_gan"]) > 0
    torch.testing.assert_close(graphs, eager)
