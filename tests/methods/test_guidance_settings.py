"""Guidance of the teacher in every method: interval, rescaling, negative prompt, and scales as an input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import Conditioning, FieldSpec
from distmatch.diffusion.guidance import CallCounter, Guided
from distmatch.diffusion.paths import condot, discrete_path

METHODS = ("f-distill", "dmd2", "diff-instruct", "sid", "sim", "uni-instruct", "moment-matching", "disback")
CONSISTENCY = ("consistency", "scm", "rcm")
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
NULL = Conditioning({"text": torch.tensor([[0.0, 0.3]])})


class Net(nn.Module):
    """A smooth function of sample, time and conditions."""

    def __init__(self, conditions: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(4 + conditions, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, guidance: Tensor | None = None) -> Tensor:
        given = [text] if guidance is None else [text, guidance[:, None]]
        return self.layers(torch.cat([x, (t / 1000)[:, None], *given], 1))


class Encoder:
    """Numbers of the letters of prompts."""

    fingerprint = "letters"

    def encode(self, prompts: Any) -> Conditioning:
        return Conditioning({"text": torch.tensor([[len(p) / 10, float(p.count("a"))] for p in prompts])})


def teacher(prediction: str = "flow", scale: bool = False) -> Any:
    path = condot() if prediction == "flow" else discrete_path(ALPHAS)
    spec = {"text": FieldSpec((2,))} | ({"guidance": FieldSpec(())} if scale else {})
    null = Conditioning({**NULL, "guidance": torch.tensor([1.5])}) if scale else NULL
    options: Any = {"shape": (3,), "sigma_data": 1.0, "conditioning": spec, "null": null, "shift": 1.0}
    options |= {"time": 1000.0} if prediction == "flow" else {}
    made: Any = dm.as_denoiser(Net(2 + scale), path, prediction, **options)
    made.prompt_encoder = Encoder()
    return made


def batch(n: int = 6, **more: Tensor) -> Batch:
    gen = torch.Generator().manual_seed(1)
    text = torch.randn(n, 2, generator=gen)
    return Batch(torch.randn(n, 3, generator=gen), Conditioning({"text": text, **more}))


@pytest.mark.parametrize("prediction", ["flow", "eps", "v"])
def test_rescaling_is_that_of_diffusers(prediction):
    """On what the network predicts, as in diffusers' pipelines with ``guidance_rescale``."""
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    own, told = teacher(prediction).double(), Conditioning({"text": batch().conditioning["text"].double()})
    y, sigma = 3 * batch().x.double(), torch.linspace(0.2, 9.0, 6, dtype=torch.float64)
    t = own.path.t_of_rho(sigma)
    alpha, noise = own.path.alpha(t)[:, None], own.path.sigma(t)[:, None]
    x, time = alpha * y, 1000 * t if prediction == "flow" else t
    with torch.no_grad():
        main, none = own.net(x, time, told["text"]), own.net(x, time, NULL["text"].double().expand(6, 2))
        raw = pipelines.rescale_noise_cfg(none + 4.0 * (main - none), main, guidance_rescale=0.7)
        found = Guided(own, 4.0, rescale=0.7)(y, sigma, told)
        plain = Guided(own, 4.0)(y, sigma, told)
    wanted = {"flow": x - noise * raw, "eps": (x - noise * raw) / alpha, "v": alpha * x - noise * raw}
    torch.testing.assert_close(found, wanted[prediction], rtol=1e-6, atol=1e-6)
    assert (found - plain).abs().max() > 0.1


def test_a_rescaling_outside_of_the_unit_interval_is_refused():
    with pytest.raises(UserError, match="must be in"):
        Guided(teacher(), 2.0, rescale=1.5)
    with pytest.raises(UserError, match="scale 1"):
        dm.guidance.guided(teacher(), 1.0, rescale=0.5)


def by_hand(own: Any, x: Tensor, sigma: Tensor, told: Conditioning, away: Tensor) -> Tensor:
    """Scale 3 where 0.5 < sigma <= 4; phi = 0.4 on the flow v = (x_t - D) / t."""
    main, other = own(x, sigma, told), own(x, sigma, Conditioning({"text": away.expand(len(x), -1)}))
    strong = other + 3.0 * (main - other)
    t = (sigma / (1 + sigma))[:, None]
    noised = (1 - t) * x
    v_main, v_strong = (noised - main) / t, (noised - strong) / t
    factor = 0.6 + 0.4 * v_main.std(1, keepdim=True) / v_strong.std(1, keepdim=True)
    inside = ((sigma > 0.5) & (sigma <= 4.0))[:, None]
    return torch.where(inside, noised - t * factor * v_strong, main)


@pytest.mark.parametrize("method", [*METHODS, *CONSISTENCY])
@pytest.mark.parametrize("prompt", ["", "a banana"])
def test_every_method_is_guided_as_asked(method, prompt):
    own = teacher()
    options: Any = {"guidance": 3.0, "guidance_interval": (0.5, 4.0), "guidance_rescale": 0.4}
    built: Any = dm.methods.build(own, method, total_steps=40, negative_prompt=prompt, **options)
    base = getattr(built, "base", built)
    terms = [t._guided for t in (*getattr(base, "terms", ()), getattr(base, "term", None)) if t is not None]
    terms += [base.compared.guided] if hasattr(base, "compared") else []
    if method == "moment-matching":
        terms.append(base.objective.teacher)
    away = Encoder().encode([prompt])["text"] if prompt else NULL["text"]
    x, sigma, told = 2 * batch().x, torch.linspace(0.2, 6.0, 6), batch().conditioning
    assert len(terms) == (2 if method in ("rcm", "moment-matching") else 1)
    with torch.no_grad():
        wanted = by_hand(own, x, sigma, told, away)
        for guided in terms:
            torch.testing.assert_close(guided(x, sigma, told), wanted, rtol=1e-4, atol=1e-5)
        assert (wanted - own(x, sigma, told)).abs().max() > 0.05


@pytest.mark.parametrize("method", ["f-distill", "sid", "consistency", "scm", "rcm"])
def test_training_draws_the_scale_that_networks_receive(method, monkeypatch):
    own, seen = teacher(scale=True), []
    built = dm.methods.build(own, method, total_steps=20, guidance_range=(2.0, 6.0), num_steps=2)
    call = Net.forward

    def forward(self: Any, x: Tensor, t: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        seen.append((id(self), guidance.detach()))
        return call(self, x, t, text, guidance)

    state = built.init(0)
    given = batch(8, guidance=torch.full((8,), 1.5))
    with monkeypatch.context() as patch:
        patch.setattr(Net, "forward", forward)
        for _ in range(5):
            built.step(state, given)
    first = seen[0][1]
    assert first.unique().numel() == 8
    assert bool(((first >= 2) & (first <= 6)).all())
    drawn = torch.stack([value[-8:] for _, value in seen if len(value) >= 8])
    assert len(drawn.unique(dim=0)) == 5  # one draw a step, for teacher, student and fake score
    assert len({network for network, _ in seen}) == (2 if method in CONSISTENCY[:2] else 3)
    student = built.result(state)
    told = batch(8).conditioning
    low, high = (
        student.sample(8, conditioning=Conditioning({**told, "guidance": torch.full((8,), w)}))
        for w in (2.0, 6.0)
    )
    assert (low - high).abs().max() > 1e-3


def test_scales_are_drawn_again_on_resuming():
    built: Any = dm.methods.build(teacher(scale=True), "sid", total_steps=20, guidance_range=(2.0, 6.0))
    given, drawn = batch(4, guidance=torch.ones(4)), []
    for seed in (0, 0, 1):
        state = built.init(seed)
        state.step = 7
        drawn.append(built.context.taken(state, given).conditioning["guidance"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance": 2.0, "guidance_interval": (2.0, 1.0)}, "the lower one first"),
        ({"guidance": 2.0, "guidance_interval": (2.0,)}, "takes two numbers"),
        ({"guidance_interval": (1.0, 2.0)}, "does nothing with --guidance 1"),
        ({"guidance_rescale": 0.5}, "does nothing with --guidance 1"),
        ({"negative_prompt": "a"}, "does nothing with --guidance 1"),
        ({"guidance": 2.0, "guidance_rescale": 1.5}, r"must be in \[0, 1\]"),
        ({"guidance_range": (1.0, 4.0)}, "networks that receive their guidance scale"),
    ],
)
def test_guidance_that_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        dm.methods.build(teacher(), "sid", total_steps=10, **settings)


def test_a_negative_prompt_needs_a_teacher_with_prompts():
    own = teacher()
    del own.prompt_encoder
    with pytest.raises(UserError, match="takes no prompts"):
        dm.methods.build(own, "sid", total_steps=10, guidance=2.0, negative_prompt="grey")


def test_outside_of_the_interval_nothing_is_paid():
    own = CallCounter(Guided(teacher(), 3.0, interval=(0.5, 4.0), rescale=0.3))
    own(batch().x, torch.full((6,), 9.0), batch().conditioning)
    assert own.calls == 1
