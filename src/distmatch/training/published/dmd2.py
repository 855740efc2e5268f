"""DMD2 and DisBack, which builds on its code."""

from __future__ import annotations

from distmatch.training.published.preset import IMAGENET64, Preset, Value, adam
from distmatch.training.published.units import karras_level

_TEXT = "no text encoder: prompts are given as embeddings"
_LATENTS = "noise levels are uniform in the scheduler's timesteps; here in sigma^(1/7)"


def _shared(
    lr: float, script: str, trainer: str, *, gpus: int, each: int, every: int, count: int
) -> dict[str, Value]:
    return {
        **adam(lr, 0.9, 0.999, script, trainer),
        "weight_decay": Value(0.01, "AdamW, 0.01", trainer),
        "lr_rampup": Value(500 // gpus, f"500, counted over {gpus} processes", trainer),
        "grad_clip": Value(10.0, "max_grad_norm 10", trainer),
        "fake_score_steps": Value(every, f"dfake_gen_update_ratio {every}", script),
        "order": Value("same-batch", "the fake score is updated at every step", trainer),
        "ema_half_life": Value(0.0, "no EMA", trainer),
        "batch": Value(gpus * each, f"{each} on each of {gpus}", script),
        "steps": Value(count, f"{count // 1000}k", "README.md next to it"),
    }


def _adversary(lr: float, weight: float, script: str) -> dict[str, Value]:
    return {
        "lr_discriminator": Value(lr, f"guidance_lr {lr:g}", script),
        "gan_weight": Value(weight, f"gen_cls_loss_weight {weight:g}", script),
        "joint_weight": Value(1e-2, "weight of the classifier's loss 1e-2", script),
        "ratio_features": Value("fake", "of the fake score, which is trained by it", script),
    }


def _dmd2() -> list[Preset]:
    source = "tianweiy/DMD2, experiments and main; Yin et al. 2024, arXiv 2405.14867"
    imagenet = "imagenet_gan_classifier_genloss3e-3_diffusion1000_lr2e-6_scratch.sh"
    stable = "laion6.25_sd_baseline_8node_guidance1.75_lr1e-5_seed10_dfake10_from_scratch.sh"
    xl = "sdxl_cond999_8node_lr5e-7_denoising4step_(...)_backsim_scratch.sh"
    edm, sd = "train_edm.py", "train_sd.py"
    return [
        Preset(
            name="paper:dmd2-imagenet64",
            method="dmd2",
            title="EDM's ADM on ImageNet-64, in one stage",
            shape=IMAGENET64,
            source=source,
            settings={
                **_shared(2e-6, imagenet, edm, gpus=7, each=40, every=5, count=200_000),
                **_adversary(2e-6, 3e-3, imagenet),
                "student_sigma": Value(0.0, "conditioning_sigma 80, sigma_max", edm),
                "noise_low": Value(karras_level(20 / 999), "step 20 of 0 .. 999 of EDM's grid", edm),
                "noise_high": Value(karras_level(980 / 999), "step 980 of 0 .. 999 of EDM's grid", edm),
                "precision": Value("bf16", "bfloat16", "README.md next to it"),
            },
            differs=(
                "this is the run with FID 1.51; that with 1.28 first takes 410,000 steps without the "
                "adversarial term",
                "fake score and discriminator are trained at all 1000 noise levels; here at those of "
                "the score difference",
            ),
        ),
        Preset(
            name="paper:dmd2-sd15",
            method="dmd2",
            title="Stable Diffusion 1.5, text to image, first stage",
            text=True,
            shape=(4, 64, 64),
            source=source,
            settings={
                **_shared(1e-5, stable, sd, gpus=64, each=32, every=10, count=39_000),
                "gan_weight": Value(0.0, "no adversarial term", stable),
                "guidance": Value(1.75, "real_guidance_scale 1.75", stable),
                "student_sigma": Value(0.0, "conditioning_timestep 999, sigma_max", sd),
            },
            differs=(_TEXT, _LATENTS, "2,000 steps at 5e-7 with the adversarial term follow"),
        ),
        Preset(
            name="paper:dmd2-sdxl",
            method="dmd2",
            title="SDXL, text to image, 4 steps",
            text=True,
            shape=(4, 128, 128),
            source=source,
            settings={
                **_shared(5e-7, xl, sd, gpus=64, each=2, every=5, count=19_000),
                **_adversary(5e-7, 5e-3, xl),
                "guidance": Value(8.0, "real_guidance_scale 8", xl),
                "num_steps": Value(4, "num_denoising_step 4, with backward simulation", xl),
                "student_sigma": Value(0.0, "conditioning_timestep 999, sigma_max", sd),
            },
            differs=(_TEXT, _LATENTS),
        ),
    ]


def _disback() -> Preset:
    script = "sdxl_cond399_8node_lr5e-7_1step_(...)_noinit_noode.sh"
    return Preset(
        name="paper:disback-sdxl",
        method="disback",
        title="SDXL, text to image",
        text=True,
        shape=(4, 128, 128),
        source="SYZhang0805/DisBack, experiments/sdxl; Zhang et al. 2024, arXiv 2408.15991",
        settings={
            "lr": Value(5e-7, "generator_lr 5e-7", script),
            "lr_fake_score": Value(5e-7, "guidance_lr 5e-7", script),
            **_adversary(5e-7, 5e-3, script),
            "fake_score_steps": Value(5, "dfake_gen_update_ratio 5", script),
            "guidance": Value(8.0, "real_guidance_scale 8", script),
            "grad_clip": Value(10.0, "max_grad_norm 10", script),
            "backtrack_degrade_steps": Value(100, "log_iters 100, one copy each", f"degradation_{script}"),
            "backtrack_interval": Value(200, "interval 1000, a fifth of them the student's", script),
            "batch": Value(1, "1", script),
            "steps": Value(116_001, "train_iters 116001", script),
        },
        differs=(
            _TEXT,
            _LATENTS,
            "the student is initialized with DMD2's at timestep 399; here with the teacher",
            "the script does not state the number of copies",
        ),
    )


PRESETS = (*_dmd2(), _disback())
