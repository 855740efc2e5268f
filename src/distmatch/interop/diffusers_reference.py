"""What diffusers itself says a teacher predicts: its network and the algebra of its schedulers."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.diffusion.denoiser import expand
from distmatch.interop.conversion import Points
from distmatch.interop.diffusers_net import DiffusersNet
from distmatch.interop.diffusers_schedule import EDM, FLOW, ends_in_noise
from distmatch.interop.optional import import_diffusers

# Options of the sampler: its steps and its clipping. They do not affect the network.
_SAMPLING = {
    "clip_sample": False,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "final_sigmas_type": "zero",
    "set_alpha_to_one": True,
    "skip_prk_steps": True,
    "predict_x0": True,
}


def own_plan(scheduler: Any) -> Any:
    """A scheduler like this one, of its own class and config, that takes every step and clips nothing."""
    changed = {name: value for name, value in _SAMPLING.items() if name in scheduler.config}
    if "dpmsolver" in str(scheduler.config.get("algorithm_type")):
        changed["algorithm_type"] = "dpmsolver++"
    return type(scheduler).from_config(scheduler.config, **changed)


class _Question:
    """One noised sample at one step of a scheduler, in the scheduler's own terms.

    Args:
        plan: The scheduler.
        index: The step.
        clean: A clean sample, (1, *shape).
        noise: Unit noise like it.
    """

    def __init__(self, plan: Any, index: int, clean: Tensor, noise: Tensor) -> None:
        self.plan = copy.deepcopy(plan)  # a step leaves traces in it
        self.index, self.time = index, plan.timesteps[index]
        if not hasattr(plan, "sigmas"):
            kept = float(plan.alphas_cumprod[int(self.time)])
            self.level = ((1 - kept) / kept) ** 0.5
            self.inputs = self.noised = plan.add_noise(clean, noise, self.time.reshape(1))
            return
        self.level = float(plan.sigmas[index])
        self.plan._step_index = index
        if hasattr(plan, "convert_model_output"):
            self.scales = plan._sigma_to_alpha_sigma_t(plan.sigmas[index])
            self.inputs = self.noised = self.scales[0] * clean + self.scales[1] * noise
        else:
            self.noised = clean + plan.sigmas[index].to(clean) * noise
            self.inputs = self.plan.scale_model_input(self.noised, self.time)

    def x0(self, value: Tensor) -> Tensor:
        """The clean sample that the scheduler takes from what the network returned."""
        plan = self.plan
        if hasattr(plan, "convert_model_output"):
            found = plan.convert_model_output(value, sample=self.noised)
            if plan.config.get("algorithm_type") != "deis":
                return found
            return (self.noised - self.scales[1] * found) / self.scales[0]  # this one returns the noise
        if hasattr(plan, "_get_prev_sample"):  # PNDM: a step to sigma 0
            return plan._get_prev_sample(self.noised, int(self.time), -1, value)
        time = self.time if hasattr(plan, "sigmas") else int(self.time)
        return plan.step(value, time, self.noised).pred_original_sample


@dataclass(frozen=True)
class DiffusersReference:
    """A network of diffusers with its scheduler, asked in their own way.

    Attributes:
        net: The network; only ``net.model`` is called.
        scheduler: Its scheduler.
        shape: Shape of one sample.
        num_classes: Number of classes; 0 when it takes no labels.
    """

    net: DiffusersNet
    scheduler: Any
    shape: tuple[int, ...]
    num_classes: int = 0

    def __call__(self, count: int, gen: torch.Generator) -> Points:
        """Random points, and what diffusers predicts there."""
        dtype = next(self.net.parameters()).dtype
        device = next(self.net.parameters()).device
        clean, noise = (torch.randn(count, *self.shape, generator=gen).to(device, dtype) for _ in range(2))
        labels = None
        if self.num_classes:
            labels = torch.randint(self.num_classes, (count,), generator=gen).to(device)
        name = type(self.scheduler).__name__
        way = self._edm if name in EDM else self._flow if name in FLOW else self._discrete
        try:
            sigma, x0 = way(clean, noise, labels, gen)
        except NotImplementedError as error:
            raise UserError(
                "diffusers itself does not support this scheduler with the network's prediction type",
                got=f"{name}: {error}",
                fix="save the pipeline with DDIMScheduler or DDPMScheduler of the same options",
            ) from error
        sigma = sigma.to(device)
        return Points(clean + expand(sigma, clean).to(dtype) * noise, sigma, labels, x0)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        named = {"class_labels": labels} if self.net.takes_labels else {}
        return self.net.model(x, t.to(x.device), **named).sample[:, : self.shape[0]]

    def _discrete(
        self, clean: Tensor, noise: Tensor, labels: Tensor | None, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        plan = own_plan(self.scheduler)
        with warnings.catch_warnings():  # of numpy, about how diffusers uses it
            warnings.simplefilter("ignore", DeprecationWarning)
            plan.set_timesteps(int(plan.config.num_train_timesteps))
        times = plan.timesteps.tolist()
        # Between two times a second-order scheduler has noise levels for internal use.
        usable = [i for i in range(0, len(times), 2 if hasattr(plan, "sigmas_interpol") else 1)]
        if ends_in_noise(plan):
            usable = [i for i in usable if times[i] < times[0]]
        chosen = torch.randint(len(usable), (len(clean),), generator=gen)
        chosen[0], chosen[-1] = 0, len(usable) - 1
        indices = [usable[int(index)] for index in chosen]
        asked = [_Question(plan, i, clean[k : k + 1], noise[k : k + 1]) for k, i in enumerate(indices)]
        received = torch.tensor([times[i] for i in indices], dtype=plan.timesteps.dtype)
        value = self._predict(torch.cat([question.inputs for question in asked]), received, labels)
        with torch.random.fork_rng(devices=[clean.device] if clean.is_cuda else []):  # some draw noise
            x0 = [question.x0(value[k : k + 1]) for k, question in enumerate(asked)]
        return torch.tensor([question.level for question in asked], dtype=torch.float64), torch.cat(x0)

    def _edm(
        self, clean: Tensor, noise: Tensor, labels: Tensor | None, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        config = self.scheduler.config
        share = torch.rand(len(clean), generator=gen, dtype=torch.float64)
        sigma = config.sigma_min * (config.sigma_max / config.sigma_min) ** share
        level = expand(sigma, clean).to(clean)
        y = clean + level * noise
        inputs = self.scheduler.precondition_inputs(y, level)
        value = self._predict(inputs, self.scheduler.precondition_noise(sigma).to(clean), labels)
        return sigma, self.scheduler.precondition_outputs(y, value, level)

    def _flow(
        self, clean: Tensor, noise: Tensor, labels: Tensor | None, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        flow = import_diffusers().FlowMatchEulerDiscreteScheduler
        plain = flow.from_config(self.scheduler.config, shift=1.0, use_dynamic_shifting=False)
        # The last time, pure noise, is left out: there the image does not depend on the input.
        t = plain.timesteps[torch.randint(1, len(plain.timesteps), (len(clean),), generator=gen)]
        noised = plain.scale_noise(clean, t, noise)
        value = self._predict(noised, t.to(clean.dtype), labels)
        x0 = []
        for i, time in enumerate(t.tolist()):
            # One step of the scheduler from this time straight to the data.
            plain.set_timesteps(sigmas=[time / plain.config.num_train_timesteps])
            x0.append(plain.step(value[i : i + 1], plain.timesteps[0], noised[i : i + 1]).prev_sample)
        level = t.double() / plain.config.num_train_timesteps
        return level / (1 - level), torch.cat(x0)
