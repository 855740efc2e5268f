"""Tiny pipelines whose text encoders are language models, of further video models, and of classes."""

from typing import Any

from tests.helpers.diffusers_models import dit
from tests.helpers.pipeline_parts import (
    SIDE,
    TEXT,
    autoencoder,
    decoder_only,
    diffusers,
    t5,
    tokenizer,
    transformers,
)


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def flux2() -> Any:
    return diffusers.Flux2KleinPipeline(
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
            sample_size=SIDE,
        ),
        text_encoder=decoder_only("Qwen3", model="ForCausalLM"),
        tokenizer=tokenizer(),
    )


def sana() -> Any:
    return diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=16,
            sample_size=32,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.4,
        ),
        text_encoder=decoder_only("Gemma2"),
        tokenizer=tokenizer(),
    )


def qwen_image() -> Any:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config={**text, **TEXT}, vision_config=vision)
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1] * 4,
            latents_std=[1.5] * 4,
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(),
    )


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        scheduler=flow(shift=3.0),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=decoder_only("Qwen3"),
        tokenizer=tokenizer(),
    )


def lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 16, 16),
            cap_feat_dim=16,
        ),
        scheduler=flow(shift=6.0),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=decoder_only("Gemma2"),
        tokenizer=tokenizer(),
    )


def cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        transformer=diffusers.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(16, 16),
        ),
        scheduler=flow(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
        vae=autoencoder(),
        text_encoder=decoder_only("Glm"),
        tokenizer=tokenizer(),
    )


def ltx() -> Any:
    return diffusers.LTXPipeline(
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=32,
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        text_encoder=t5(32),
        tokenizer=tokenizer(),
    )


def cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=12,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0
        ),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8),
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=2,
        ),
        text_encoder=t5(32),
        tokenizer=tokenizer(),
    )


def hunyuan_dit() -> Any:
    bert = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=24
    )
    return diffusers.HunyuanDiTPipeline(
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            hidden_size=16,
            text_len=77,
            text_len_t5=256,
        ),
        scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction", beta_end=0.018),
        vae=autoencoder(),
        text_encoder=transformers.BertModel(bert),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(16),
        tokenizer_2=tokenizer(256),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def classes() -> Any:
    return diffusers.DiTPipeline(
        transformer=dit(num_embeds_ada_norm=5, in_channels=4, out_channels=8),
        vae=autoencoder(),
        scheduler=diffusers.DDIMScheduler(),
    )


BUILDERS = {
    "flux2": flux2,
    "sana": sana,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "lumina2": lumina2,
    "cogview4": cogview4,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "hunyuan-dit": hunyuan_dit,
    "dit": classes,
}
SIZE: dict[str, dict[str, Any]] = {
    "flux2": {"height": 16, "width": 16, "max_sequence_length": 24, "text_encoder_out_layers": (0, 1, 2)},
    "sana": {"height": 32, "width": 32, "max_sequence_length": 12},
    "qwen-image": {"height": 16, "width": 16, "max_sequence_length": 64},
    "z-image": {"height": 16, "width": 16, "max_sequence_length": 32},
    "lumina2": {"height": 32, "width": 32, "max_sequence_length": 48},
    "cogview4": {"height": 16, "width": 16, "max_sequence_length": 32},
    "ltx": {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 12},
    "cogvideox": {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 12},
    "hunyuan-dit": {"height": 16, "width": 16},
    "dit": {},
}
