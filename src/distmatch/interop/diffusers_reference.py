"""What diffusers itself says a teacher predicts: its network and the algebra of its schedulers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distmatch.diffusion.denoiser import expand
from distmatch.interop.conversion import Points
from distmatch.interop.diffusers_net import DiffusersNet
from distmatch.interop.diffusers_schedule import EDM, FLOW, ends_in_noise
from distmatch.interop.optional import import_diffusers


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
        sigma, x0 = way(clean, noise, labels, gen)
        sigma = sigma.to(device)
        return Points(clean + expand(sigma, clean).to(dtype) * noise, sigma, labels, x0)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        named = {"class_labels": labels} if self.net.takes_labels else {}
        return self.net.model(x, t.to(x.device), **named).sample[:, : self.shape[0]]

    def _discrete(
        self, clean: Tensor, noise: Tensor, labels: Tensor | None, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        # All discrete schedulers share levels and predictions with DDIM, which says what it takes x0 for.
        ddim = import_diffusers().DDIMScheduler.from_config(
            self.scheduler.config, clip_sample=False, thresholding=False
        )
        squares = ddim.alphas_cumprod
        steps = len(squares) - int(ends_in_noise(ddim))
        t = torch.randint(steps, (len(clean),), generator=gen)
        t[0], t[-1] = 0, steps - 1
        noised = ddim.add_noise(clean, noise, t)
        value = self._predict(noised, t, labels)
        ddim.set_timesteps(len(squares))
        x0 = torch.cat(
            [
                ddim.step(value[i : i + 1], int(t[i]), noised[i : i + 1]).pred_original_sample
                for i in range(len(t))
            ]
        )
        kept = squares[t].double()
        return ((1 - kept) / kept).sqrt(), x0

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
