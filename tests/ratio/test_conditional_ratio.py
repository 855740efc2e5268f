"""Ratios of distributions given a prompt, and discriminators at chosen depths of a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import Conditioning, FieldSpec
from distmatch.diffusion.hooked import blocks_of, names_at_depths, of_samples
from distmatch.nets.conditions import PooledConditions
from distmatch.nets.head import RatioHead, RatioNet

SPEC = {"text": FieldSpec((-1, 4)), "text_mask": FieldSpec((-1,), torch.int64)}
VAR = 1.25  # of the samples with noise of level 1/2


def prompts(sign: Tensor, gen: torch.Generator) -> Conditioning:
    """Five tokens, the sign in the first number of those that the mask shows, and anything behind them."""
    text = torch.randn(len(sign), 5, 4, generator=gen)
    mask = (torch.arange(5) < torch.randint(1, 6, (len(sign), 1), generator=gen)).long()
    text[..., 0] = torch.where(mask > 0, sign[:, None], 30 * text[..., 0])
    return Conditioning({"text": text, "text_mask": mask})


def trained(head: nn.Module, call: Any, spec: bool) -> tuple[Tensor, Tensor]:
    """Logits and the true ratio 2 c x / VAR, where p = N(c, 1) and q = N(-c, 1); seed 0, 300 steps of 128."""
    gen, told = torch.Generator().manual_seed(0), Conditioning()
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for step in range(301):
        sign = torch.randint(0, 2, (128,), generator=gen) * 2.0 - 1
        told = prompts(sign, gen) if spec else Conditioning()
        eps = VAR**0.5 * torch.randn(2, 128, 1, generator=gen)
        real, fake = sign[:, None] + eps[0], eps[1] - sign[:, None]
        if step == 300:
            return call(head, real, told).detach(), 2 * sign * real[:, 0] / VAR
        loss = F.softplus(-call(head, real, told)).mean() + F.softplus(call(head, fake, told)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError


def on_samples(head: nn.Module, x: Tensor, told: Conditioning) -> Tensor:
    return head(x, torch.full((len(x),), 0.5), told)


def on_features(head: nn.Module, x: Tensor, told: Conditioning) -> Tensor:
    return head([torch.cat([x, x**2], 1)], torch.full((len(x),), 0.5), told)


@pytest.mark.statistical
@pytest.mark.parametrize("kind", [pytest.param("own", marks=pytest.mark.slow), "features"])
def test_the_best_logit_depends_on_the_prompt_where_the_marginal_ratio_is_one(kind):
    call = on_samples if kind == "own" else on_features

    def made(spec: Any) -> nn.Module:
        torch.manual_seed(0)
        net = RatioNet((1,), 0, width=32, depth=1, sigma_data=1.0, conditions=spec)
        return net if kind == "own" else RatioHead([(2,)], 0, width=32, conditions=spec)

    logit, truth = trained(made(SPEC), call, True)
    assert (logit - truth).abs().mean() < 0.35
    assert torch.corrcoef(torch.stack([logit, truth]))[0, 1] > 0.95
    if kind == "own":
        blind, _ = trained(made(None), call, False)
        assert blind.abs().mean() < 0.3  # of the marginals, which are equal


def test_pooling_is_the_mean_over_what_the_mask_shows():
    spec = {**SPEC, "label": FieldSpec((), torch.int64, 3), "words": FieldSpec((6,), torch.int64)}
    spec |= {
        "scale": FieldSpec(()),
        "listed": FieldSpec((-1, 3)),
        "listed.length": FieldSpec((), torch.int64),
    }
    pool = PooledConditions(spec, 8)
    assert pool.sizes == {"text": 4, "words": 8, "scale": 1, "listed": 3}
    gen = torch.Generator().manual_seed(2)
    told = {**prompts(torch.ones(3), gen), "words": torch.randint(0, 9, (3, 6), generator=gen)}
    told |= {"scale": torch.tensor([1.0, 2.0, 3.0]), "listed": torch.randn(3, 4, 3, generator=gen)}
    told |= {"listed.length": torch.tensor([1, 3, 4]), "label": torch.tensor([0, 1, 2])}
    found = torch.cat([pool._pooled(name, told) for name in pool.sizes], 1)
    for row in range(3):
        shown = int(told["text_mask"][row].sum())
        parts = [told["text"][row, :shown].mean(0), pool.tokens["words"].weight[told["words"][row]].mean(0)]
        parts += [told["scale"][row, None], told["listed"][row, : told["listed.length"][row]].mean(0)]
        torch.testing.assert_close(found[row], torch.cat(parts))
    out = pool(told, 3)
    for name, change in {
        "text": told["text"] + 1,
        "words": told["words"] + 1,
        "scale": told["scale"] * 2,
    }.items():
        assert (pool({**told, name: change}, 3) - out).abs().max() > 1e-4
    hidden = {**told, "text": torch.where(told["text_mask"][..., None] > 0, told["text"], 7.0)}
    torch.testing.assert_close(pool(hidden, 3), out)
    assert pool({}, 3).shape == (3, 8)


def test_heads_for_labels_alone_are_what_they_were():
    for spec in (None, {}, {"label": FieldSpec((), torch.int64, 3)}):
        torch.manual_seed(1)
        head = RatioHead([(4,), (4, 8, 8)], 3, width=8, conditions=spec)
        assert head.pooled is None
        assert "pooled" not in " ".join(head.state_dict())


class Blocks(nn.Module):
    """A transformer in outline: a block returns the states of text and of samples, as in diffusers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.text_blocks = nn.ModuleList([nn.Linear(6, 6)])  # never called
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x.flatten(2).transpose(1, 2)) + t[:, None, None] / 10
        text = h.new_ones(len(x), 3, 6)
        for block in self.blocks:
            text, h = block(text, h)
        return self.last(h).transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, text: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return text + 1, h + self.inner[0](h).tanh() + text.mean(1, keepdim=True)


def test_blocks_are_the_outermost_lists_that_are_called():
    net = Blocks(5)
    assert blocks_of(net, lambda: net(torch.ones(2, 4, 4, 4), torch.ones(2))) == [
        f"blocks.{i}" for i in range(5)
    ]
    names = [f"b{i}" for i in range(24)]
    assert names_at_depths(names, (0.5, 0.75, 0.99)) == ("b11", "b17", "b23")
    assert names_at_depths(names[:1], (0.5, 0.75, 0.99)) == ("b0",)
    assert names_at_depths(names[:2], (0.01, 0.5, 0.51)) == ("b0", "b1")


def test_the_states_of_samples_are_told_from_those_of_text():
    x, image, text = torch.ones(2, 4, 8, 8), torch.ones(2, 16, 6), torch.ones(2, 5, 6)
    for output in ((text, image), (image, text), {"a": text, "b": image}, [image, None]):
        assert of_samples(output, x) is image
    assert of_samples((text, text + 1), x) is not None
    packed = torch.ones(2, 16, 8)
    assert of_samples((text, image), packed) is image


@pytest.mark.parametrize("source", ["auto", "teacher", "fake"])
def test_the_discriminator_sees_blocks_at_the_chosen_depths(source):
    teacher = dm.as_denoiser(Blocks(5), "vp", "eps", shape=(4, 4, 4), sigma_data=1.0)
    method: Any = dm.methods.build(
        teacher, "dmd2", total_steps=10, ratio_depths=(0.5, 0.99), ratio_features=source
    )
    state = method.init(0)
    assert state.fake_score.net.features == method.teacher.net.features == ("blocks.2", "blocks.4")
    assert method.compared.source == ("fake" if source == "fake" else "teacher")
    x, sigma = torch.randn(2, 4, 4, 4), torch.ones(2)
    _, features = method.teacher(x, sigma, return_features=True)
    seen: list[Tensor] = []
    hook = method.teacher.net.module.blocks[2].register_forward_hook(lambda _m, _i, out: seen.append(out[1]))
    teacher_x0 = method.teacher(x, sigma)
    hook.remove()
    torch.testing.assert_close(features[0], seen[0].transpose(1, 2).reshape(2, 6, 4, 4))
    torch.testing.assert_close(teacher_x0, teacher(x, sigma))
    assert not teacher.has_features  # the user's own is left as it is


@pytest.mark.parametrize(
    ("teacher", "settings", "words"),
    [
        (lambda: dm.load_teacher("ring8"), {"ratio_depths": (0.5,)}, "no blocks at chosen depths"),
        (lambda: outline(nn.Linear(1, 1)), {"ratio_depths": (0.5,)}, "no list of blocks"),
        (lambda: outline(Blocks(2)), {"ratio_depths": (0.0, 0.5)}, "shares of the blocks"),
        (
            lambda: outline(Blocks(2)),
            {"ratio_depths": (0.5,), "ratio_features": "own"},
            "does nothing with --ratio-features own",
        ),
    ],
)
def test_depths_that_are_refused(teacher, settings, words):
    with pytest.raises(UserError, match=words):
        dm.methods.build(teacher(), "dmd2", total_steps=10, **settings)


def outline(net: nn.Module) -> Any:
    def call(net: nn.Module, x: Tensor, t: Tensor, _conditions: Any) -> Tensor:
        return net(x, t) if isinstance(net, Blocks) else net(x[..., :1]).expand(x.shape)

    return dm.as_denoiser(net, "vp", "eps", shape=(4, 4, 4), sigma_data=1.0, call=call)
