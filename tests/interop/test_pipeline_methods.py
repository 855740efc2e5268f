"""Methods on pipelines: all of them train, and gradients are those of raw calls of diffusers."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import distmatch as dm
from distmatch.data.batches import Pool
from distmatch.diffusion.conditioning import Conditioning
from distmatch.interop.pipelines import load_pipeline
from distmatch.methods.matching.generator import generator_gradient
from distmatch.methods.matching.pairs import make_pairs
from distmatch.methods.table import METHODS
from distmatch.training.given_data import check_pipeline_data
from distmatch.training.options import DistillOptions
from tests.helpers.pipeline_training import NAMED, PIPELINES, PROMPTS, STEPS, batch, trained
from tests.helpers.pipelines import SIZE, save

ENCODED = "encoder_hidden_states"
PHI = 3.0  # the guidance scale
WEIGHTS = {
    "reverse_kl": lambda r: r**0,
    "kl": lambda r: r,
    "js": lambda r: r / (2 * (1 + r)),
    "jeffreys": lambda r: r + 1,
    "hellinger": lambda r: r**0.5 / 2,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "softened_kl": lambda r: r**2 / (1 + r),
    "pearson": lambda r: 2 * r**2,
    "neyman": lambda r: 2 / r,
    "le_cam": lambda r: 8 * r**2 / (1 + r) ** 3,
    "alpha:0.5": lambda r: r**0.5,
}
"""h(r) = r^2 f''(r) up to a constant, which the normalization by its mean removes."""


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")

    @cache
    def made(name: str) -> Any:
        return load_pipeline(save(name, folder), check=False, **SIZE[name])

    return made


SD, SD3 = "stable-diffusion", "stable-diffusion-3"
ALONE = {"diff-instruct", "dmd", "sid", "sim", "moment-matching"}
OTHERS = [
    *[
        (SD3, method, "lora", 2)
        for method in ("diff-instruct", "sim", "uni-instruct", "moment-matching", "scm")
    ],
    (SD3, "dmd", "lora", 1),
    (SD, "dmd", "full", 1),
    (SD3, "scm", "lora", 2),
    ("wan", "scm", "lora", 4),
]


def crossed() -> list[tuple[str, str, str, int]]:
    """Each named method with 1, 2 and 4 steps, each time on another pipeline; benchmarks/ has all of them."""
    return [
        (PIPELINES[(i + j) % 3], method, ("lora", "full")[(i // 2 + j) % 2], steps)
        for i, method in enumerate(NAMED)
        for j, steps in enumerate(STEPS)
    ]


@pytest.mark.parametrize(("name", "method", "train", "steps"), [*crossed(), *OTHERS])
def test_a_method_trains_a_student_of_a_pipeline(teacher_of, name, method, train, steps):
    pytest.importorskip("peft")
    built, _ = trained(teacher_of(name), method, train, steps)
    if method in ("f-distill", "dmd2", "uni-instruct"):
        assert built.compared.source == "teacher"


@pytest.mark.parametrize(("name", "train"), [(SD3, "full"), (SD3, "lora"), ("wan", "lora")])
def test_disback_follows_recorded_copies_back_to_the_teacher(teacher_of, name, train):
    """The copies predict what the fake score did when they were recorded; a checkpoint holds them."""
    pytest.importorskip("peft")
    teacher, n = teacher_of(name), 3
    options: Any = {"train": train, **({"lora_rank": 2} if train == "lora" else {}), "guidance": PHI}
    options |= {"backtrack": n, "backtrack_degrade_steps": 2, "backtrack_interval": 1, "fake_score_steps": 1}
    built: Any = dm.methods.build(teacher, "disback", total_steps=20, num_steps=2, **options)
    state, given = built.init(0), batch(teacher, 9)
    sigma, told = torch.tensor([0.5, 2.0]), given.conditioning
    recorded = {}

    @torch.no_grad()
    def predicted(network: Any) -> Tensor:
        return network(given.x, sigma, told)

    for step in range(1, 2 * n + 1):
        info = built.step(state, batch(teacher, step))
        assert "grad_norm_student" not in info
        if step % 2 == 0:
            recorded[step // 2] = predicted(state.fake_score)
    restored = built.init(1)
    restored.load_state_dict(copy.deepcopy(state.state_dict()))
    for owner in (state, restored):
        targets = []
        for owner.updates in range(n):
            targets.append(predicted(built.base.target(owner)))
        owner.updates = 0
        for k, target in zip((2, 1), targets, strict=False):
            own = state.extra[f"target_{k}"]
            assert (predicted(own) - recorded[k]).abs().max() < 1e-5
            with torch.no_grad():
                null = own(given.x, sigma)
            guided = null + PHI * (recorded[k] - null)  # by the copy's own predictions
            assert (target - guided).abs().max() < 1e-4
        with torch.no_grad():
            null, main = teacher(given.x, sigma), teacher(given.x, sigma, told)
        assert (targets[2] - null - PHI * (main - null)).abs().max() < 1e-4
    assert (recorded[1] - recorded[2]).abs().max() > 1e-4
    for step in range(3):
        assert float(built.step(state, batch(teacher, step))["grad_norm_student"]) > 0
    assert state.updates == 3


def test_disback_says_how_many_steps_are_enough(teacher_of):
    for every in (1, 2, 5):
        with pytest.raises(dm.UserError, match="drawn to the teacher itself") as error:
            dm.methods.build(teacher_of(SD3), "disback", total_steps=6, fake_score_steps=every)
        steps = int(str(error.value).split("Expected: ")[1].split()[0])
        dm.methods.build(teacher_of(SD3), "disback", total_steps=steps, fake_score_steps=every)
        with pytest.raises(dm.UserError, match=f"Expected: {steps} steps"):
            dm.methods.build(teacher_of(SD3), "disback", total_steps=steps - 1, fake_score_steps=every)


def raw(name: str, network: Any, x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
    """A call of the network of diffusers itself: the flow of SD3, eps of SD1.5."""
    if name == SD3:
        return network(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=told["encoder_hidden_states"],
            pooled_projections=told["pooled_projections"],
            return_dict=False,
        )[0]
    return network(x, t.long(), encoder_hidden_states=told["encoder_hidden_states"], return_dict=False)[0]


class Raw:
    """x_t and x0 of a pipeline, with the formulas of its scheduler."""

    def __init__(self, name: str, teacher: Any, t: Tensor) -> None:
        self.name, self.t = name, t
        if name == SD3:
            self.alpha, self.sigma = 1 - t, t  # scale_noise of FlowMatchEulerDiscreteScheduler
        else:
            squares = teacher.pipeline.tracer.pipeline.scheduler.alphas_cumprod[t.long()]
            self.alpha, self.sigma = squares.sqrt(), (1 - squares).sqrt()

    def noised(self, x0: Tensor, noise: Tensor) -> Tensor:
        return over(self.alpha, x0) * x0 + over(self.sigma, x0) * noise

    def clean(self, x: Tensor, output: Tensor) -> Tensor:
        if self.name == SD3:
            return x - over(self.sigma, x) * output
        return (x - over(self.sigma, x) * output) / over(self.alpha, x)


def over(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("name", [SD3, SD])
def test_the_gradient_of_f_distill_is_that_of_raw_calls_of_diffusers(teacher_of, name):
    """Guidance on the raw outputs, h(r) by hand, the adversarial term through hooks on the raw blocks."""
    teacher, n = teacher_of(name), 4
    told = teacher.pipeline.encode([*PROMPTS, "a house", "a small tree"])
    null = teacher.pipeline.encode([""] * n)
    gen = torch.Generator().manual_seed(4)
    x0, noise = (torch.randn(n, *teacher.shape, generator=gen) for _ in range(2))
    t = torch.tensor([0.15, 0.4, 0.7, 0.95] if name == SD3 else [80.0, 300.0, 600.0, 950.0])
    for index, (divergence, weight) in enumerate(WEIGHTS.items() if name == SD3 else [("js", WEIGHTS["js"])]):
        built: Any = dm.methods.build(
            teacher, "f-distill", divergence=divergence, total_steps=10, guidance=PHI, gan_weight=0.1
        )
        state = built.init(0)
        with torch.no_grad():
            for network in (state.fake_score, state.discriminator):
                for parameter in network.parameters():
                    parameter.add_(0.03 * torch.randn(parameter.shape, generator=gen))
        normalizer = copy.deepcopy(state.normalizer)
        formulas = Raw(name, teacher, t)
        level = formulas.sigma / formulas.alpha
        found = generator_gradient(built.compared, state, x0, level, noise, told).gradient

        base, fake = teacher.net.module, state.fake_score.net.module
        leaf = x0.clone().requires_grad_()
        x = formulas.noised(leaf, noise)
        seen: list[Any] = []

        def note(_module: Any, _inputs: Any, out: Any, seen: list[Any] = seen) -> None:
            image = out[1] if name == SD3 else out[0] if isinstance(out, tuple) else out
            seen.append(image.transpose(1, 2).reshape(n, -1, 4, 4) if image.ndim == 3 else image)

        hooks = [
            base.get_submodule(block).register_forward_hook(note) for block in built.teacher.net.features
        ]
        main = raw(name, base, x, t, told)
        for hook in hooks:
            hook.remove()
        logit = state.discriminator(seen, level, told)
        (adversary,) = torch.autograd.grad(0.1 * F.softplus(-logit).mean(), leaf)
        with torch.no_grad():
            none = raw(name, base, x, t, null)
            p = formulas.clean(x, none + PHI * (main - none))
            q = formulas.clean(x, raw(name, fake, x, t, told))
            share = built.noise.cdf(level)
            ratio = normalizer.update(logit.detach(), share, lambda log_r, h=weight: h(log_r.exp()))
            h = over((weight(ratio.log_r.exp()) / ratio.scale).float(), x0)
            gap = (x0 - p).abs().flatten(1).mean(1)
            score = h * (q - p) / over(gap, x0) / x0.numel() / 2  # the derivative by x0 / 2
        wanted = score + adversary
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max(), divergence
        assert logit.detach().abs().max() > 1e-3
        if index:
            continue
        # The student, from noise to the gradients of its weights, with a raw call at the pipeline's start.
        z, student = torch.randn(n, *teacher.shape, generator=gen), state.student
        parameters, begun = list(student.parameters()), student.start(z)
        ours = torch.autograd.grad(student.call(begun, 0, told), parameters, wanted)
        top = Raw(name, teacher, torch.full((n,), 1.0 if name == SD3 else 999.0))
        noised = over(top.sigma, z) * z  # of a flow the noise itself
        output = raw(name, student.denoiser.net.module, noised, top.t, told)
        theirs = torch.autograd.grad(top.clean(noised, output), parameters, wanted)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-4 * max(float(b.abs().max()), 1e-4)


@pytest.mark.slow
def test_pairs_of_dmd_are_samples_of_the_pipeline_under_their_prompts(teacher_of):
    """Against plain calls of diffusers from the same noise, in many small steps."""
    teacher: Any = teacher_of(SD3)
    told, pipe = teacher.pipeline.encode(PROMPTS), teacher.pipeline.tracer.pipeline
    pool = Pool(2, told.index)
    made = make_pairs(teacher, 4, steps=60, seed=5, device="cpu", batch=3, pool=pool)
    chosen = (made.conditioning(torch.arange(4))[ENCODED][:, None] - told[ENCODED][None]).abs()
    prompts = [PROMPTS[i] for i in chosen.flatten(2).amax(2).argmin(1)]
    assert set(prompts) == set(PROMPTS)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 250, "guidance_scale": 1.0, "output_type": "latent", **SIZE[SD3]}
    theirs = pipe(prompts, latents=made.noise, **options)[0]
    others = pipe(prompts[::-1], latents=made.noise, **options)[0]
    gap = (made.samples - theirs).square().mean()
    assert gap < 1e-3 * theirs.square().mean()
    assert gap < 0.1 * (others - theirs).square().mean()


def test_the_methods_that_are_refused_early_are_those_that_need_images(teacher_of):
    for method in METHODS.keys() - {"mmd", "dpm-ot", "imm", "ctm", "mean-flow"}:
        for change in ({}, {"gan_weight": 0.0}):
            if change.keys() - METHODS[method].options():
                continue
            built = dm.methods.build(teacher_of(SD3), method, total_steps=1000, **change)
            options = DistillOptions.of(method)
            options = replace(options, settings=replace(options.settings, **change))
            with pytest.raises(dm.UserError) if built.needs_data else nullcontext():
                check_pipeline_data(options, METHODS[method], METHODS[method].default_divergence)


def test_methods_that_do_not_run_on_pipelines_say_so(teacher_of):
    teacher = teacher_of(SD3)
    refused = {m: "class labels only" for m in ("mmd", "dpm-ot")}
    refused |= dict.fromkeys(("imm", "ctm", "mean-flow"), "no input for a second noise level")
    for method, reason in refused.items():
        with pytest.raises(dm.UserError, match=reason) as error:
            dm.methods.build(teacher, method, total_steps=10)
        alone, also = str(error.value).split("with prompts alone use ")[1].split("; with images")
        assert set(alone.split(", ")) == ALONE
        assert not any(name in also for name in refused)
