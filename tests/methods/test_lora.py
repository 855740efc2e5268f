"""Networks with adapters on one base, in every method: what learns, what is shared, what is kept."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.interop.lora import adaptable, adapters_of, chosen_layers, merged, network_in
from distmatch.methods import initialization
from distmatch.methods.state import DistillState
from distmatch.methods.table import METHODS
from distmatch.nets.shared import fingerprint, own_state
from distmatch.training.packing import pack
from tests.helpers.image_teachers import EDM, SMALL_NETS, image_teacher, images
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import PAIR, distiller, network_teacher

TRAINED = [name for name in METHODS if name != "dpm-ot"]  # which trains no network
OPTIONS: dict[str, dict[str, Any]] = {
    "ctm": {"gan_weight": 0.1, "gan_after": 0.0},
    "disback": {"backtrack": 2, "backtrack_degrade_steps": 1, "backtrack_interval": 1},
    "mmd": {"mmd_features": "teacher", "num_steps": 2},
    "dmd": {"pairs": 16, "pair_steps": 2},
}


def trained(method: Any, state: DistillState, teacher: Any, steps: int) -> None:
    for step in range(state.step, state.step + steps):
        method.step(state, images(step, teacher))


CASES = [
    *((name, "mlp") for name in TRAINED),
    *(("f-distill", name) for name in (*SMALL_NETS, *EDM, "own", "edm's code", "diffusers")),
    ("ctm", "unet"),
    ("mean-flow", "dit"),
    ("scm", "unet"),
]


@pytest.mark.parametrize(("name", "net"), CASES)
def test_adapters_alone_are_trained_shared_and_resumed(name: str, net: str) -> None:
    teacher = network_teacher(2) if net == "mlp" else image_teacher(net)
    before, base = fingerprint(teacher), {id(p) for p in teacher.parameters()}
    method = distiller(teacher, method=name, train="lora", lora_rank=2, **OPTIONS.get(name, {}))
    state = method.init(0)
    first = {key: {k: v.clone() for k, v in own_state(m).items()} for key, m in state.modules().items()}
    trained(method, state, teacher, 4 if net == "mlp" else 2)

    # What learns: no parameter of the base, and of the student nothing but adapters and a second level.
    learning = {id(p): p for o in state.optimizers.values() for g in o.param_groups for p in g["params"]}
    assert not base & learning.keys()
    own = {n for n, p in state.student.denoiser.named_parameters() if id(p) not in base}
    assert {n for n, p in state.student.denoiser.named_parameters() if id(p) in learning} == own
    assert all("lora_" in n or "to_level" in n for n in own)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert fingerprint(teacher) == before == fingerprint(state.student.denoiser) == state.base
    # Every role has adapters of its own, which moved, and all of the base's parameters.
    rest = {"ratio", "uncertainty"}
    for key, module in state.modules().items():
        if key not in rest:
            assert base <= {id(p) for p in module.parameters()}
            assert not any(
                n.replace(".base_layer.", ".") in dict(teacher.named_parameters()) for n in own_state(module)
            )
            moved = any(not torch.equal(v, first[key][k]) for k, v in own_state(module).items())
            assert moved or key.startswith("target_")
    roles = [m for key, m in state.modules().items() if key not in rest]
    places = [p.data_ptr() for m in roles for p in m.parameters() if id(p) not in base]
    assert len(places) == len(set(places))

    # A checkpoint goes on to the bit.
    again = distiller(teacher, method=name, train="lora", lora_rank=2, **OPTIONS.get(name, {}))
    resumed = again.init(0)
    for module in resumed.modules().values():
        for value in own_state(module).values():
            value.fill_(7)
    resumed.load_state_dict(copy.deepcopy(state.state_dict()))
    trained(method, state, teacher, 1)
    trained(again, resumed, teacher, 1)
    found, _ = pack(resumed.state_dict())
    expected, _ = pack(state.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def identity_adapters(*args: Any, **kwargs: Any) -> Any:
    """Adapters whose first factor is the identity, with zeros below it, and does not learn."""
    made = REAL(*args, **kwargs)
    for layer in adapters_of(made).values():
        weight = layer.lora_A["default"].weight
        flat = torch.eye(len(weight), weight[0].numel())
        layer.lora_A["default"].weight = nn.Parameter(flat.view_as(weight), requires_grad=False)
    return made


REAL = initialization.with_adapters


def quiet_adam(state: DistillState, learning: Any) -> None:
    """Restricts optimizers to some parameters, and takes out what makes rounding visible.

    Adam divides by the root of the mean square of a gradient, so that one which is nothing but rounding moves
    a weight by a whole learning rate. A large epsilon makes steps a smooth function of the gradient.
    """
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group["eps"] = 1e-5
            group["params"] = [p for p in group["params"] if learning(p)]


@pytest.mark.parametrize(
    ("name", "net"), [*((name, "mlp") for name in TRAINED), ("f-distill", "unet"), ("ctm", "unet")]
)
def test_adapters_of_full_rank_are_full_training(
    name: str, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With A the identity, W + B A has the gradient of W in B, so that Adam's steps are those of W.

    For convolutions A is the identity on the numbers of a patch, and the same holds. Norms, biases and
    embeddings, which have no adapters, are kept from learning in full training too.
    """
    teacher = network_teacher(2) if net == "mlp" else image_teacher(net)
    layers = adaptable(network_in(teacher))
    rank = max(layer.weight[0].numel() for layer in layers.values())  # type: ignore[operator, union-attr]
    options = {**OPTIONS.get(name, {}), "weight_decay": 0.0}
    whole = distiller(teacher, method=name, **options)
    full = whole.init(0)
    free = {"net." + layer + ".weight" for layer in layers}
    for module in full.modules().values():
        networks = {n for n, _ in module.named_parameters()} & free
        for n, p in module.named_parameters():
            p.requires_grad_(p.requires_grad and (not networks or n in free or "to_level" in n))
    quiet_adam(full, lambda p: p.requires_grad)

    monkeypatch.setattr(initialization, "with_adapters", identity_adapters)
    low = distiller(teacher, method=name, train="lora", lora_rank=rank, **options)
    state = low.init(0)
    quiet_adam(state, lambda p: p.requires_grad)
    for step in range(4 if net == "mlp" else 2):
        info = whole.step(full, images(step, teacher))
        other = low.step(state, images(step, teacher))
        torch.testing.assert_close(other, info, rtol=2e-3, atol=2e-5, equal_nan=True)
    moved = worst = 0.0
    start_of = dict(teacher.named_parameters())
    for key in ("student", "average", "fake", "target"):
        if key not in full.modules():
            continue
        plain = dict(merged(state.modules()[key]).named_parameters())
        for n, p in full.modules()[key].named_parameters():
            if n in free:
                moved = max(moved, float((p - start_of[n]).detach().abs().max()))
                worst = max(worst, float((plain[n] - p).detach().abs().max()))
    # The weights round to 1e-7 each; imm's gradients, of near particles, round more.
    assert worst < 0.02 * moved


def test_calls_that_are_computed_again_have_the_gradient_of_those_that_are_kept() -> None:
    """Nothing in a network with adapters is switched between a pass and its repetition."""
    found = []
    for again in (False, True):
        teacher = network_teacher(2)
        method = distiller(teacher, method="mmd", train="lora", num_steps=2, mmd_checkpoint=again)
        state = method.init(0)
        trained(method, state, teacher, 3)
        found.append(own_state(state.student.denoiser))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6)


def test_merged_networks_are_full_ones_with_the_same_output() -> None:
    for name in ("mlp", *SMALL_NETS, *EDM, "own", "diffusers"):
        teacher = network_teacher(2) if name == "mlp" else image_teacher(name)
        method = distiller(teacher, method="diff-instruct", train="lora", lora_rank=2, lora_alpha=3.0)
        state = method.init(0)
        trained(method, state, teacher, 3)
        plain = merged(state.student.denoiser)
        assert plain.state_dict().keys() == teacher.state_dict().keys()
        assert type(plain) is type(teacher)
        x = torch.randn(5, *teacher.shape)
        labels = torch.arange(5) % 2 if teacher.num_classes else None
        changed = state.student.denoiser(x, torch.full((5,), 0.7), labels)
        assert_same_but_for_rounding(plain(x, torch.full((5,), 0.7), labels), changed)
        assert not torch.allclose(changed, teacher(x, torch.full((5,), 0.7), labels), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 4}, "--lora-rank does nothing with --train full"),
        ({"base_dtype": "bfloat16"}, "--base-dtype does nothing"),
        ({"train": "lora", "lora_rank": 0}, "--lora-rank must be at least 1"),
        ({"train": "lora", "lora_targets": ("to_q",)}, "to_q fits no layer"),
        ({"train": "lora", "lora_targets": ("(",)}, "regular expressions"),
        ({"train": "half"}, "must be one of full, lora"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_training(settings: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        distiller(network_teacher(), method="dmd2", **settings)


def test_a_teacher_without_a_network_and_a_missing_package_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match="adapts the network of the teacher"):
        distiller(PAIR, method="dmd2", train="lora")
    with pytest.raises(UserError, match="train"):
        dm.methods.build(network_teacher(), "dpm-ot", total_steps=4, train="lora")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install distmatch\[lora\]"):
        distiller(network_teacher(), method="dmd2", train="lora")


def test_a_teacher_with_adapters_is_refused_before_training() -> None:
    teacher = network_teacher()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["mix"]), teacher.net)
    with pytest.raises(UserError, match="has adapters already"):
        distiller(teacher, method="dmd2", train="lora")


def test_targets_choose_layers_by_the_end_of_their_name() -> None:
    method = distiller(
        image_teacher("dit"), method="dmd2", train="lora", lora_targets=("qkv", r".*\.1\..*out")
    )
    chosen = adapters_of(network_in(method.init(0).student.denoiser))
    assert sorted(chosen) == ["blocks.0.attention.qkv", "blocks.1.attention.out", "blocks.1.attention.qkv"]


def test_by_default_the_repeated_blocks_of_networks_from_elsewhere_have_adapters() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        net = diffusers.SD3Transformer2DModel(num_layers=2, attention_head_dim=8, num_attention_heads=2)
    names, every = chosen_layers(net, ("auto",)), chosen_layers(net, ())
    assert every == chosen_layers(net, (".*",)) == list(adaptable(net))
    assert names == [name for name in every if name.startswith("transformer_blocks.")]
    assert {"pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out"} < set(every) - set(names)
    own = network_in(image_teacher("dit"))
    assert chosen_layers(own, ("auto",)) == list(adaptable(own))  # a small one, all of it
    flat = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    assert chosen_layers(flat, ("auto",)) == ["0", "1"]


def test_a_rank_above_the_full_rank_of_most_layers_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"--lora-rank 17 is above the full rank of \d+ of \d+ layers"):
        distiller(network_teacher(), method="dmd2", train="lora", lora_rank=17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(network_teacher(), method="dmd2", train="lora", lora_rank=8)


def test_layers_that_fused_modules_read_past_have_no_adapters() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.Linear(2, 8), layer, nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(2, 2, 3, dilation=2))
    assert list(adaptable(net)) == ["0"]


def test_a_base_in_bfloat16_has_adapters_and_outputs_in_float32() -> None:
    for name in ("mlp", *SMALL_NETS, "diffusers"):
        teacher = network_teacher(2) if name == "mlp" else image_teacher(name)
        options = {"train": "lora", "base_dtype": "bfloat16"}
        built = dm.methods.build(teacher, "ctm" if name == "mlp" else "dmd2", total_steps=5, **options)
        state = built.init(0)
        for step in range(5):
            built.step(state, images(step, teacher))
        network = state.student.denoiser
        assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
        shared = [p for p in network.parameters() if not p.requires_grad]
        assert {p.dtype for p in shared} == {torch.bfloat16}
        assert all(p.dtype == torch.float32 for p in teacher.parameters())
        assert state.student.sample(3).dtype == torch.float32
        assert {v.dtype for v in state.ema.rest.values()} == {torch.float32}
        moments = state.optimizers["student"].state.values()
        assert {m["exp_avg"].dtype for m in moments} == {torch.float32}


def test_layers_that_are_not_called_are_named() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.last(nn.functional.linear(x, self.first.weight, self.first.bias))

    teacher = dm.as_denoiser(Direct(), "vp", "eps", shape=(2,))
    with pytest.warns(UserWarning, match=r"1 of 2 layers .* not called in a trial pass \(first among"):
        distiller(teacher, method="dmd2", train="lora")


def test_a_network_that_does_not_run_in_bfloat16_is_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.cat([x, t[:, None]], 1))

    teacher = dm.as_denoiser(Mixed(), "vp", "eps", shape=(2,))
    with pytest.raises(UserError, match="does not run with weights in bfloat16"):
        dm.methods.build(teacher, "dmd2", total_steps=4, train="lora", base_dtype="bfloat16")


def test_the_base_has_the_memory_of_the_teacher_that_was_handed_in() -> None:
    teacher = network_teacher(2).requires_grad_(True)
    built: Any = dm.methods.build(teacher, "dmd2", total_steps=4, train="lora")
    state = built.init(0)
    given = {p.data_ptr() for p in teacher.parameters()}
    assert {p.data_ptr() for p in built.teacher.parameters()} == given
    assert all(p.requires_grad for p in teacher.parameters())
    assert not any(p.requires_grad for p in built.teacher.parameters())
    # One buffer as large as a network, whatever the number of roles.
    kept = {p.data_ptr(): p.nbytes for m in state.modules().values() for p in m.parameters()}
    base = sum(p.nbytes for p in teacher.parameters())
    assert sum(size for place, size in kept.items() if place in given) == base


def test_another_base_and_another_way_to_train_are_refused_on_resuming() -> None:
    teacher = network_teacher(2)
    state = distiller(teacher, method="dmd2", train="lora").init(0)
    tree = state.state_dict()
    other = network_teacher(2)
    with torch.no_grad():
        other.net.last.weight[0, 0] += 1e-6  # type: ignore[index, union-attr]
    for changed in (distiller(other, method="dmd2", train="lora"), distiller(teacher, method="dmd2")):
        with pytest.raises(UserError, match="another base"):
            changed.init(0).load_state_dict(tree)
