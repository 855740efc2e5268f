"""The transformer with text: what counts as text and what does not; models saved with their words."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import Conditioning, cat, null_conditioning
from distmatch.diffusion.prompts import encode_prompts, prompt_encoder_of
from distmatch.nets.build import build_net
from distmatch.nets.config import DiTConfig, MLPConfig, UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.saved import load_model, save_model
from distmatch.nets.text import CrossAttention, TextEmbedding, TextInput
from distmatch.nets.words import WordEncoder

SHAPE = (3, 4, 8)
WORDS = WordEncoder(("a", "red", "blue", "one", "two", ",", "then"), 6)
CONFIG = DiTConfig(patch=2, width=16, depth=2, heads=2)
TEXTS = [TextInput(6, tokens=8), TextInput(6, size=5)]


def randomized(text: TextInput, dtype: torch.dtype = torch.float64) -> EDMDenoiser:
    torch.manual_seed(0)
    net = build_net(CONFIG, SHAPE, 0, text)
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)
    denoiser = EDMDenoiser(net, shape=SHAPE, num_classes=0).to(dtype).eval()
    denoiser.prompt_encoder = WORDS if text.tokens else None
    return denoiser


@pytest.fixture(scope="module", params=TEXTS, ids=["tokens", "hidden"])
def model(request) -> EDMDenoiser:
    return randomized(request.param)


def inputs(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *SHAPE, generator=g, dtype=torch.float64), torch.rand(n, generator=g).double() + 0.1


def prompts(model: EDMDenoiser, n: int = 3) -> Conditioning:
    """Different prompts of 2, 3, ... tokens."""
    g = torch.Generator().manual_seed(2)
    there = torch.arange(6)[None] < torch.arange(2, 2 + n)[:, None]
    if "tokens" in model.conditioning_spec:
        return Conditioning({"tokens": torch.randint(1, 8, (n, 6), generator=g) * there})
    hidden = torch.randn(n, 6, 5, generator=g, dtype=torch.float64)
    return Conditioning({"hidden_states": hidden, "mask": there.long()})


def test_rows_of_a_batch_are_independent(model):
    x, sigma = inputs(3)
    given, order = prompts(model), torch.tensor([2, 0, 1])
    whole = model(x, sigma, given)
    assert torch.allclose(model(x[order], sigma[order], given.index(order)), whole[order], atol=1e-12)
    assert not torch.allclose(model(x, sigma, given.index(order)), whole, atol=1e-3)


def test_no_condition_is_the_empty_prompt(model):
    x, sigma = inputs(3)
    null = null_conditioning(model, 3)
    assert torch.equal(model(x, sigma), model(x, sigma, null))
    mixed = cat([prompts(model, 2), null.index(slice(0, 1))])
    assert torch.allclose(model(x, sigma, mixed)[2:], model(x[2:], sigma[2:]), atol=1e-12)
    if "tokens" in model.conditioning_spec:
        assert torch.equal(encode_prompts(model, [""])["tokens"], null["tokens"][:1])


def test_the_order_of_words_counts(model):
    x, sigma = inputs(1)
    given = prompts(model, 1)
    turned = Conditioning({k: torch.cat([v[:, :2].flip(1), v[:, 2:]], 1) for k, v in given.items()})
    assert not torch.allclose(model(x, sigma, given), model(x, sigma, turned), atol=1e-3)


def test_what_is_masked_counts_for_nothing():
    model = randomized(TEXTS[1])
    x, sigma = inputs(3)
    given = prompts(model)
    hidden = torch.where(given["mask"][..., None] > 0, given["hidden_states"], 1e3)
    other = Conditioning({"hidden_states": hidden, "mask": given["mask"]})
    assert torch.equal(model(x, sigma, other), model(x, sigma, given))


def test_cross_attention_is_softmax_over_the_text():
    torch.manual_seed(0)
    layer = CrossAttention(8, 2).double()
    nn.init.normal_(layer.out.weight)
    tokens, states = torch.randn(2, 5, 8).double(), torch.randn(2, 3, 8).double()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    query, (key, value) = layer.query(tokens), layer.key_value(states).chunk(2, 2)
    expected = torch.zeros(2, 5, 8, dtype=torch.float64)
    for row in range(2):
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            scores = query[row, :, part] @ key[row][mask[row]][:, part].T / 2
            expected[row, :, part] = scores.softmax(1) @ value[row][mask[row]][:, part]
    assert torch.allclose(layer(tokens, states, mask), layer.out(expected), atol=1e-12)


def test_gradients_reach_every_weight_and_hidden_states(model):
    x, sigma = inputs(3)
    given = prompts(model)
    if "hidden_states" in given:
        given["hidden_states"].requires_grad_(True)
    model.zero_grad()
    model(x, sigma, given).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name  # noqa: PT018
    if "hidden_states" in given:
        grad = given["hidden_states"].grad.abs().sum(2)
        assert torch.equal(grad > 0, given["mask"] > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_saved_with_text_and_words(model, tmp_path, dtype):
    model = copy.deepcopy(model).to(dtype)
    assert copy.deepcopy(model).prompt_encoder is model.prompt_encoder
    save_model(tmp_path / "m", model, {"kind": "teacher"})
    again, extra = load_model(tmp_path / "m")
    assert extra == {"kind": "teacher"}
    assert again.conditioning_spec == model.conditioning_spec
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["version"] == 3
    if model.prompt_encoder is not None:
        assert prompt_encoder_of(dm.guidance.Guided(again, 2.0)).fingerprint == WORDS.fingerprint


def test_wrong_text_is_an_error(model):
    x, sigma = inputs(2)
    with pytest.raises(UserError, match="takes another conditioning"):
        model(x, sigma, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError, match="one condition for each sample"):
        model(x, sigma, prompts(model, 3))
    if "tokens" in model.conditioning_spec:
        with pytest.raises(UserError, match="these tokens are not those of the model"):
            model(x, sigma, Conditioning({"tokens": torch.full((2, 6), 8)}))
        with pytest.raises(UserError, match="does not match this model"):
            model(x, sigma, Conditioning({"tokens": torch.ones(2, 5, dtype=torch.int64)}))


def test_networks_that_take_no_text_refuse_it():
    for config in (MLPConfig(width=8, depth=1), UNetConfig(width=4, multipliers=(1, 2), blocks=1)):
        with pytest.raises(UserError, match="takes no text"):
            build_net(config, SHAPE, 0, TEXTS[0])
    for wrong in ({"length": 0, "tokens": 3}, {"length": 3}, {"length": 3, "tokens": 3, "size": 3}):
        with pytest.raises(UserError, match="either tokens or size"):
            TextInput(**wrong)


def test_the_encoding_of_the_empty_prompt_is_part_of_the_model():
    text = TextEmbedding(TEXTS[1], 16)
    row = Conditioning({"hidden_states": torch.randn(1, 6, 5), "mask": torch.tensor([[1, 1, 0, 0, 0, 0]])})
    text.set_null(row)
    again = TextEmbedding(TEXTS[1], 16)
    again.load_state_dict(text.state_dict())
    null = again.null_conditioning(2)
    assert torch.equal(null["hidden_states"][1], row["hidden_states"][0])
    assert torch.equal(null["mask"][1], row["mask"][0])
