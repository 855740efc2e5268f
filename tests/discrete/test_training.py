"""Training of token networks reaches known answers, resumes exactly, and its models are saved and used."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.discrete import (
    Alphabet,
    ConditionalTraining,
    EnergyTraining,
    JointTable,
    MarginalTraining,
    TokenNet,
    TokenNetConfig,
    TokenTrainingConfig,
    continue_text,
    exact_bound,
    exact_log_prob,
    fill_text,
    inequality_violation,
    load_discrete,
    save_discrete,
    text_crops,
)
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.reference.discrete_models import L, Uniform, V, brute_force_marginal, table

NET = TokenNetConfig(vocabulary=V, length=L, width=32, depth=1, heads=2)
BITS = TokenNetConfig(vocabulary=2, length=L, width=32, depth=1, heads=2)
QUICK = TokenTrainingConfig(lr=1e-2, lr_rampup=10, ema_decay=0.97, chains=128)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(training, steps, batch=None, seed=0):
    state = training.init(seed)
    for step in range(steps):
        info = training.step(state, batch(step)) if batch else training.step(state)
    return training.result(state), info


@torch.no_grad()
def test_conditionals_learn_a_known_law():
    model = table(vocabulary=2)
    with torch.enable_grad():
        net, _ = fit(ConditionalTraining(BITS, 100, QUICK), 100, lambda i: model.sample(256, rng(i)))
    p = model.log_p.exp()
    kl = float((p * (model.log_p - exact_log_prob(net, model.states))).sum())
    slack = float((p * (exact_bound(net, model.states) + model.log_p)).sum())
    start = float((p * (model.log_p + L * math.log(2))).sum())  # of the uniform law, where training starts
    assert start > 1
    assert 0 <= kl <= slack < 0.06


@pytest.mark.parametrize("loss", ["t-dse", "t-dce", "k-dce", "ao-arm"])
def test_every_loss_descends(loss):
    model = table()
    config = TokenTrainingConfig(loss=loss, lr=1e-2, lr_rampup=5, ema_decay=0.9)
    net, _ = fit(ConditionalTraining(NET, 40, config), 40, lambda i: model.sample(64, rng(i)))
    with torch.no_grad():
        bound = model.log_p.exp() @ exact_bound(net, model.states).double()
    assert float(bound) < L * math.log(V) - 0.3


@pytest.mark.slow
@torch.no_grad()
def test_marginals_learn_from_conditionals_in_the_second_stage():
    model = table(vocabulary=2)
    training = MarginalTraining(BITS, 150, QUICK, conditionals=model)
    with torch.enable_grad():
        net, info = fit(training, 150, lambda i: model.sample(128, rng(i)))
    assert float(info["loss"]) < 0.05
    p = model.log_p.exp()
    assert float(p @ (net.log_marginal(model.states) - model.log_p).abs()) < 0.1
    for tokens in ([0, 2, 1, 2], [2, 1, 2, 2]):
        x = torch.tensor(tokens)
        assert float(brute_force_marginal(net, x)) == pytest.approx(float(net.log_marginal(x[None])), abs=0.1)
    assert float(p @ inequality_violation(net, model.states).double()) < 0


@pytest.mark.slow
@torch.no_grad()
def test_an_energy_is_normalized_without_data():
    # A ring of four spins with couplings and fields: 16 states, so Z is known.
    states = torch.tensor(list(itertools.product((0, 1), repeat=4)))
    field = torch.tensor([0.5, -0.3, 0.2, 0.4])

    def log_f(x):
        spin = 2.0 * x - 1
        return 0.4 * (spin * spin.roll(1, 1)).sum(1) + spin @ field

    config = dataclasses.replace(QUICK, block=2)
    with torch.enable_grad():
        nets, info = fit(EnergyTraining(BITS, 200, config, log_f=log_f), 200)
    log_z = float(log_f(states).logsumexp(0))
    truth = log_f(states) - log_z
    learned = nets["marginals"].log_marginal(states)
    assert float(truth.exp() @ (learned - truth).abs()) < 0.08
    assert -float(info["gap"]) == pytest.approx(log_z, abs=0.05)
    assert float(info["gap_std"]) < 0.15
    sampled = exact_log_prob(nets["conditionals"], states)
    assert 0 <= float(truth.exp() @ (truth - sampled)) < 0.02


@pytest.mark.parametrize("kind", ["conditionals", "marginals", "energy"])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(kind):
    model = table()

    def training():
        if kind == "conditionals":
            return ConditionalTraining(NET, 8, QUICK)
        if kind == "marginals":
            return MarginalTraining(NET, 8, QUICK, conditionals=model)
        return EnergyTraining(NET, 8, QUICK, log_f=lambda x: -x.float().sum(1))

    def step(state, i):
        return run.step(state) if kind == "energy" else run.step(state, model.sample(16, rng(i)))

    run = training()
    whole = run.init(3)
    for i in range(4):
        step(whole, i)
    tree = copy.deepcopy(whole.state_dict())
    for i in range(4, 8):
        step(whole, i)
    run = training()
    other = run.init(99)
    other.load_state_dict(tree)
    assert other.step == 4
    for i in range(4, 8):
        step(other, i)
    for a, b in zip(whole.modules().values(), other.modules().values(), strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        )
    assert torch.equal(whole.memory["chains"], other.memory["chains"])


def test_a_state_of_another_network_is_refused():
    state = ConditionalTraining(NET, 8).init(0)
    other = ConditionalTraining(BITS, 8).init(0)
    with pytest.raises(UserError, match="architecture"):
        state.load_state_dict(other.state_dict())


def test_models_are_saved_and_read_again(tmp_path):
    for name, training in (
        ("conditionals", ConditionalTraining(NET, 2, QUICK)),
        ("marginals", MarginalTraining(NET, 2, QUICK, conditionals=table())),
    ):
        net, _ = fit(training, 2, lambda i: table().sample(16, rng(i)))
        save_discrete(tmp_path / name, net, {"alphabet": "abc"})
        save_discrete(tmp_path / name, net, {"alphabet": "abcd"})
        again, extra = load_discrete(tmp_path / name)
        assert extra == {"alphabet": "abcd"}
        x = table().states
        assert_same_but_for_rounding(net(x), again(x))
        assert not again.training


def test_damaged_or_foreign_models_are_refused(tmp_path):
    place = tmp_path / "m"
    save_discrete(place, TokenNet(NET))
    config = json.loads((place / "config.json").read_text())
    for change, message in (
        ({"kind": "joint"}, "cannot|can be built"),
        ({"net": {"vocabulary": 3}}, "can be built"),
        ({"net": {**config["net"], "width": 16}}, "architecture"),
        ({"format": "distmatch-model"}, "format"),
        ({"version": 2}, "version"),
    ):
        (place / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_discrete(place)
    with pytest.raises(UserError, match="missing"):
        load_discrete(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a model folder"):
        save_discrete(tmp_path / "full", TokenNet(NET))


def test_alphabets_go_there_and_back():
    alphabet = Alphabet.of("to be, or not")
    assert alphabet.characters == " ,benort"
    assert alphabet.decode(alphabet.encode("not to be")) == "not to be"
    assert alphabet.decode(torch.tensor([len(alphabet), 2]), hidden="?") == "?b"
    with pytest.raises(UserError, match="'q'"):
        alphabet.encode("question")
    with pytest.raises(UserError, match="each character once"):
        Alphabet("aa")


def test_crops_are_windows_and_depend_on_the_step_alone():
    corpus = torch.arange(50)
    crops = text_crops(corpus, 8, 400, seed=0, step=3)
    assert torch.equal(crops, text_crops(corpus, 8, 400, seed=0, step=3))
    assert not torch.equal(crops, text_crops(corpus, 8, 400, seed=0, step=4))
    assert bool((crops.diff(dim=1) == 1).all())
    assert crops.min() == 0
    assert crops.max() == 49
    with pytest.raises(UserError, match="shorter than a window"):
        text_crops(corpus, 51, 1, seed=0, step=0)


class Alternating:
    """The letter after a is b, after b is c, after c is a; known from either neighbor."""

    vocabulary, length = 3, 8

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, 3)
        for shift in range(1, tokens.shape[1]):
            for sign in (1, -1):
                seen = tokens.roll(sign * shift, 1)
                inside = torch.arange(8) - sign * shift
                known = (seen < 3) & (inside >= 0) & (inside < 8)
                symbol = (seen + sign * shift) % 3
                logits += 100.0 * known[..., None] * torch.nn.functional.one_hot(symbol, 3)
        return logits


def test_text_is_continued_over_several_windows():
    alphabet = Alphabet("abc")
    assert continue_text(Alternating(), alphabet, "bc", 30, seed=0) == ("bca" * 11)[:32]
    assert continue_text(Alternating(), alphabet, "abc" * 5, 4, seed=1, sampler="forward") == ("abc" * 7)[:19]
    drawn = {continue_text(Alternating(), alphabet, "", 20, seed=s) for s in range(20)}
    assert drawn == {("abc" * 8)[k : k + 20] for k in range(3)}


def test_text_is_filled_in():
    alphabet = Alphabet("abc")
    assert fill_text(Alternating(), alphabet, "__c__", seed=0) == "abcab"
    for mistake, message in (
        (lambda: fill_text(Alternating(), alphabet, "a?", seed=0), "not in the alphabet"),
        (lambda: fill_text(Alternating(), alphabet, "_" * 9, seed=0), "from 0 to 8"),
        (lambda: fill_text(Alternating(), alphabet, "a_", seed=0, hidden="a"), "outside the alphabet"),
        (lambda: continue_text(Uniform(4, 8), alphabet, "a", 3, seed=0), "differ"),
        (lambda: continue_text(Alternating(), alphabet, "a", 0, seed=0), "positive"),
    ):
        with pytest.raises(UserError, match=message):
            mistake()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dce"}, "k-dce"),
        ({"lr": 0.0}, "^lr must be positive"),
        ({"lr_decay": "linear"}, "cosine"),
        ({"on_policy": 1.5}, "^on_policy must be in"),
        ({"chains": 1}, "chains"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TokenTrainingConfig(**settings)


def test_networks_of_different_sizes_are_refused():
    with pytest.raises(UserError, match="vocabularies and lengths"):
        MarginalTraining(NET, 5, conditionals=JointTable(torch.zeros(2, 2)))
