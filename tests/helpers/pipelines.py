"""Tiny pipelines of diffusers with random weights, saved as diffusers saves them: nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch

from tests.helpers import more_pipelines
from tests.helpers.pipeline_parts import SIDE, autoencoder, clip, diffusers, t5, tokenizer, unet


def stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip(width=8),
        text_encoder_2=clip(projection=True, width=8, act="gelu"),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(projection=True, width=8),
        text_encoder_2=clip(projection=True, width=8, act="gelu"),
        text_encoder_3=t5(32),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(),
    )


def flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=autoencoder(
            shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False
        ),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=tokenizer(),
    )


def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=SIDE // 2,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=32,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_schedule="linear", beta_start=1e-4, beta_end=0.02
        ),
        vae=autoencoder(),
        text_encoder=t5(32),
        tokenizer=tokenizer(),
    )


def wan() -> Any:
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=64,
            ffn_dim=24,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        text_encoder=t5(32, "UMT5"),
        tokenizer=tokenizer(),
    )


BUILDERS = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
    "pixart-sigma": pixart_sigma,
    "wan": wan,
    **more_pipelines.BUILDERS,
}
SIZE: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"height": SIDE, "width": SIDE},
    "stable-diffusion-xl": {"height": SIDE, "width": SIDE},
    "stable-diffusion-3": {"height": SIDE, "width": SIDE, "max_sequence_length": 12},
    "flux": {"height": SIDE, "width": SIDE, "max_sequence_length": 12},
    "pixart-sigma": {"height": SIDE, "width": SIDE, "max_sequence_length": 12},
    "wan": {"height": SIDE, "width": SIDE, "num_frames": 5, "max_sequence_length": 12},
    **more_pipelines.SIZE,
}


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """A pipeline of random weights in a folder. No layer starts at zero, which would hide what it does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = BUILDERS[name]()
        for part in ("unet", "transformer"):
            network = getattr(pipeline, part, None)
            for parameter in network.parameters() if network is not None else ():
                if parameter.ndim < 2 or not parameter.abs().sum():
                    torch.nn.init.normal_(parameter, mean=float(parameter.ndim < 2) * 0.5, std=0.2)
    pipeline.save_pretrained(folder / name)
    return folder / name
