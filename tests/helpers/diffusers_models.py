"""Tiny random networks of diffusers, built in code: no test reads the network."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
SMALL |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8}
SMALL |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def unet(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.UNet2DModel(**{**SMALL, **options}).eval()


def dit(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=4, sample_size=8, **options
        )
        # Some layers start at zero, which would hide the classes.
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def vae(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            **options,
        ).eval()


SCHEDULES = {
    "ddpm eps": ("DDPMScheduler", {}),
    "ddpm v cosine": (
        "DDPMScheduler",
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    ),
    "ddim sample": ("DDIMScheduler", {"prediction_type": "sample", "beta_schedule": "scaled_linear"}),
    "ddim zero snr": ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "pndm": ("PNDMScheduler", {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}),
    "dpm-solver": ("DPMSolverMultistepScheduler", {}),
    "euler v": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "euler continuous": (
        "EulerDiscreteScheduler",
        {"prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.002}
        | {"sigma_max": 700.0},
    ),
    "euler sample": ("EulerDiscreteScheduler", {"prediction_type": "sample", "use_karras_sigmas": True}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun v": ("HeunDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "lms": ("LMSDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {"num_train_timesteps": 100, "beta_end": 0.2}),
    "kdpm2 ancestral v": (
        "KDPM2AncestralDiscreteScheduler",
        {"prediction_type": "v_prediction", "num_train_timesteps": 100, "beta_end": 0.2},
    ),
    "ddpm sigmoid": ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    "dpm-solver single": ("DPMSolverSinglestepScheduler", {"prediction_type": "v_prediction"}),
    "unipc zero snr v": (
        "UniPCMultistepScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
    "deis": ("DEISMultistepScheduler", {}),
    "edm euler": ("EDMEulerScheduler", {}),
    "edm euler v": ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0}),
    "edm dpm": ("EDMDPMSolverMultistepScheduler", {"sigma_min": 0.01, "sigma_max": 40.0}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "num_train_timesteps": 500}),
}


def schedule(name, **more):
    kind, options = SCHEDULES[name]
    return getattr(diffusers, kind)(**{**options, **more})
