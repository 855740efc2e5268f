"""Students of pipelines to export, and how far a plain call of the exported pipeline is from them."""

from __future__ import annotations

import copy

import torch

import distmatch as dm
from distmatch.interop.lora import NAME, adapters_of, with_adapters
from tests.helpers.pipelines import SIZE, save

FAMILIES = ("stable-diffusion", "stable-diffusion-3", "flux", "qwen-image", "wan")
PROMPT = "a small red cat in the house"
# What turns guidance off: the scale is an input of Flux, and QwenImage calls that of two passes "true".
OFF = {"flux": {"guidance_scale": 3.5}, "qwen-image": {"true_cfg_scale": 1.0}}
NOISE = torch.Generator().manual_seed(5)


def moved(teacher, lora: bool):
    """A student's network: the teacher with other weights, in full or by adapters on all layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if not lora:
            network = copy.deepcopy(teacher)
            for parameter in network.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            return network
        network = with_adapters(teacher, rank=2, alpha=6.0)
        for layer in adapters_of(network).values():
            torch.nn.init.normal_(layer.lora_B[NAME].weight, std=0.05)
        return network


def even_sigmas(teacher, n: int) -> tuple[float, ...]:
    """The steps of the teacher's sampler: even in time, t = s u / (1 + (s - 1) u) for a flow of shift s."""
    if teacher.pipeline.schedule.family == "flow":
        s, shares = teacher.pipeline.shift, [1 - i / n for i in range(1, n)]
        return (teacher.path.rho_max, *(s * u / (1 - u) for u in shares))
    rates = teacher.pipeline.tracer.pipeline.scheduler.alphas_cumprod.double()
    chosen = rates[[round(1000 * (1 - i / n)) - 1 for i in range(n)]]
    return tuple((1 / chosen - 1).sqrt().tolist())


def student_of(teacher, n: int, *, sampler: str = "ddim", lora: bool = False) -> dm.Student:
    info = {"method": "sid", "guidance": 4.5}
    return dm.Student(moved(teacher, lora), even_sigmas(teacher, n), info, sampler=sampler)


@torch.no_grad()
def gaps(pipe, student, teacher, name: str) -> tuple[float, float]:
    """The differences of a plain call and the student from the same noise, in latents and in pixels."""
    z = torch.randn(1, *student.shape, generator=torch.Generator().manual_seed(5))
    n = len(student.sigmas)
    x = student([z] * n, teacher.pipeline.encode([PROMPT]))
    off = OFF.get(name, {"guidance_scale": 1.0})
    options = {**SIZE[name], **off, "num_inference_steps": n, "latents": z}
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(PROMPT, output_type="latent", **options)[0]
    pixels = 2 * pipe(PROMPT, output_type="pt", **options)[0] - 1
    theirs = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels
    difference = (theirs - teacher.decoder.decode(x)).abs().max().item()
    return ((latents - x).abs().max() / x.abs().max().clamp_min(1)).item(), difference


def pipelines(place):
    """Saved pipelines and their teachers by family, each made once."""
    known = {}

    def find(name):
        if name not in known:
            folder = save(name, place)
            known[name] = (folder, dm.load_teacher(folder, **SIZE[name]))
        return known[name]

    return find
