"""Consistency models, CTM, MeanFlow, rCM and MMD finetuning."""

from __future__ import annotations

import math

from distmatch.training.published.preset import CIFAR10, IMAGENET64, Preset, Value, adam, of_run
from distmatch.training.published.units import ddpm_level, half_life, log_level, rounded, steps

_HIGHEST = "80, sigma_max"


def _consistency() -> list[Preset]:
    ect, defaults, loss, loop = "run_ecm.sh", "ct_train.py", "loss.py", "ct_training_loop.py"
    launch = "scripts/launch.sh, L_CD^N on ImageNet-64"
    return [
        Preset(
            name="paper:consistency-cifar10",
            method="consistency",
            title="EDM's DDPM++ on CIFAR-10, consistency tuning on data (ECT)",
            shape=CIFAR10,
            source="locuslab/ect; Geng et al. 2024, arXiv 2406.14548",
            settings={
                "consistency_from": Value("data", "two noise levels with the same sample and noise", loss),
                "lr": Value(1e-4, "1e-4", ect),
                "beta1": Value(0.9, "0.9", defaults),
                "beta2": Value(0.999, "0.999", defaults),
                "lr_rampup": Value(0, "none", loop),
                "grad_clip": Value(0.0, "none", loop),
                "student_sigma": Value(0.0, "t_max " + _HIGHEST, loop),
                "level_distribution": Value("log-normal", "log-normal", loss),
                "level_mean": Value(log_level(-1.1), "mean -1.1", defaults),
                "level_std": Value(2.0, "std 2", defaults),
                "huber": Value(0.0, "c 0", defaults),
                "stages": Value(8, "25.6 Mimg, one per 250 times 12.8 kimg", ect),
                "ema_half_life": Value(half_life(0.9999), "decay 0.9999", defaults),
                **of_run(128, steps(25.6e6, 128), "duration 25.6 Mimg", ect),
            },
            differs=(
                "RAdam; here AdamW",
                "weight 1 / t^2 + 1 / sigma_data^2; here 1 / (t - r)",
                "dropout 0.2; here none",
            ),
        ),
        Preset(
            name="paper:consistency-imagenet64",
            method="consistency",
            title="an EDM of OpenAI on ImageNet-64, distilled (CM)",
            shape=IMAGENET64,
            source="openai/consistency_models; Song et al. 2023, arXiv 2303.01469",
            settings={
                "consistency_from": Value("teacher", "consistency_distillation", launch),
                "lr": Value(8e-6, "8e-6", launch),
                "weight_decay": Value(0.0, "0", launch),
                "student_sigma": Value(0.0, "sigma_max " + _HIGHEST, "scripts/launch.sh"),
                "level_distribution": Value("karras", "uniform on 40 noise levels", launch),
                "ema_half_life": Value(half_life(0.9999432189950708), "decay 0.9999432189950708", launch),
                **of_run(2048, 600_000, "600000", launch),
            },
            differs=(
                "40 noise levels throughout; here the distance of the pairs decreases",
                "squared distance or LPIPS; here pseudo-Huber",
                "targets from an EMA with decay 0.95; here from the student itself",
                "EMAs with decay 0.999 and 0.9999 are also kept",
                "fp16; here --precision",
            ),
        ),
    ]


def _ctm() -> Preset:
    script = "commands/CTM+DSM+GAN_command.sh"
    return Preset(
        name="paper:ctm-imagenet64",
        method="ctm",
        title="an EDM of OpenAI on ImageNet-64, second stage",
        shape=IMAGENET64,
        source="sony/ctm; Kim et al. 2024, arXiv 2310.02279",
        settings={
            "lr": Value(8e-6, "8e-6", script),
            "lr_discriminator": Value(2e-3, "d_lr 0.002", "script_util.py"),
            "weight_decay": Value(0.0, "0", "script_util.py"),
            "student_sigma": Value(0.0, "sigma_max " + _HIGHEST, "script_util.py"),
            "solver_steps": Value(20, "num_heun_step 20", script),
            "target_decay": Value(0.999, "start_ema 0.999", script),
            "gan_weight": Value(1.0, "discriminator_weight 1.0", script),
            "gan_after": Value(0.25, "10k to 50k without it, 30k or more with it", "README.md"),
            "ema_half_life": Value(half_life(0.999), "decay 0.999", "script_util.py"),
            "batch": Value(4224, "4224", script),
            "steps": Value(40_000, "10k to 50k, then 30k or more", "README.md"),
        },
        differs=(
            "the first stage has a learning rate of 4e-4 and batches of 1440",
            "the discriminator is StyleGAN-XL's and the distance LPIPS; here a discriminator head on "
            "features, and pixels",
            "with the adversarial term the student is updated at every second step",
            "EMAs with decay 0.9999 and 0.9999432 are also kept",
        ),
    )


def _mean_flow() -> Preset:
    script, parser = "scripts/cifar10_v1.sh", "train_arg_parser.py"
    return Preset(
        name="paper:mean-flow-cifar10",
        method="mean-flow",
        title="a DDPM++ on CIFAR-10, trained from scratch",
        shape=CIFAR10,
        source="Gsunshine/py-meanflow, meanflow; Geng et al. 2025, arXiv 2505.13447",
        settings={
            "consistency_from": Value("data", "there is no teacher", "models/meanflow.py"),
            "lr": Value(6e-4, "6e-4", script),
            "beta1": Value(0.9, "0.9", parser),
            "beta2": Value(0.999, "0.999", parser),
            "lr_rampup": Value(200 * 50_000 // 1024, "200 epochs of 50,000 in batches of 1024", script),
            "student_sigma": Value(0.0, "pure noise; here sigma_max", "models/meanflow.py"),
            "level_distribution": Value("log-normal", "t logit-normal", script),
            "level_mean": Value(log_level(-0.6), "P_mean_t -0.6", script),
            "level_std": Value(1.6, "P_std_t 1.6", script),
            "to_mean": Value(log_level(-4.0), "P_mean_r -4", script),
            "to_std": Value(1.6, "P_std_r 1.6", script),
            "jump_share": Value(0.75, "ratio 0.75", script),
            "adaptive_power": Value(0.75, "norm_p 0.75", script),
            "ema_half_life": Value(half_life(0.9999), "decay 0.9999", parser),
            "batch": Value(1024, "128 on each of 8", script),
            "steps": Value(800_000, "800k", "README.md"),
        },
        differs=(
            "the network is trained from scratch; here from the teacher, for which the learning rate "
            "may be too high",
            "dropout 0.2 and augmentation; here neither",
            "EMAs with decay 0.99995 and 0.9996 are also kept",
        ),
    )


def _rcm() -> Preset:
    place, model = "wan2pt1_t2v.py", "t2v_model_distill_rcm.py"
    return Preset(
        name="paper:rcm-wan1.3b",
        method="rcm",
        title="Wan 2.1 of 1.3 billion parameters, text to video at 480p",
        text=True,
        shape=(16, 20, 60, 104),
        source="NVlabs/rcm; Zheng et al. 2025, arXiv 2510.08431",
        settings={
            **adam(2e-6, 0.0, 0.999, place, place),
            "lr_fake_score": Value(4e-7, "4e-7", place),
            "weight_decay": Value(0.01, "0.01", place),
            "grad_clip": Value(0.0, "grad_clip False", place),
            "fake_score_steps": Value(5, "student_update_freq 5", place),
            "order": Value("alternate", "a step updates the student or the fake score", model),
            "num_steps": Value(4, "max_simulation_steps_fake 4", place),
            "student_sigma": Value(0.0, "pure noise; here sigma_max", model),
            "guidance": Value(6.0, "teacher_guidance 5, beyond the conditional one", model),
            "level_distribution": Value("log-normal", "log-normal", model),
            "level_mean": Value(
                rounded(-0.8 + math.log(math.sqrt(20))),
                "p_mean -0.8, times the square root of 20 frames",
                place,
            ),
            "level_std": Value(1.6, "p_std 1.6", place),
            "dmd_weight": Value(0.01, "loss_scale_dmd 1 relative to loss_scale 100", place),
            "dmd_after": Value(0.01, "tangent_warmup 1000 of 100000 steps", place),
            "tangent_warmup": Value(0.01, "tangent_warmup 1000 of 100000 steps", place),
            "tangent_bound": Value(0.1, "0.1", model),
            "precision": Value("bf16", "bfloat16", place),
            "steps": Value(100_000, "max_iter 100000", place),
        },
        differs=(
            "no text encoder, and no loader for the network of Wan 2.1",
            "the number of GPUs, and so the batch, is not in the file",
            "in the first 1000 steps only the student is updated; here one step in five throughout",
            "noise levels of the score difference are uniform in the time of the path, shifted by 5; "
            "here in sigma^(1/7)",
            "the student's later steps are at random noise levels; here at fixed ones",
            "an EMA whose decay is not in the file",
        ),
    )


def _mmd() -> Preset:
    config, runner = "configs/cifar10.yml", "runners/diffusion.py"
    return Preset(
        name="paper:mmd-cifar10",
        method="mmd",
        title="DDPM on CIFAR-10, 5 steps",
        shape=CIFAR10,
        source="diegovalsesia/MMD-DDM; Aiello et al. 2023, arXiv 2301.07969",
        settings={
            "lr": Value(5e-6, "5e-6", config),
            "beta1": Value(0.9, "0.9", config),
            "weight_decay": Value(0.0, "0", config),
            "lr_rampup": Value(0, "none", runner),
            "grad_clip": Value(0.5, "0.5", runner),
            "num_steps": Value(5, "k 5", config),
            "student_sigma": Value(ddpm_level(800), "step 800 of 1000 of DDPM", runner),
            "mmd_kernel": Value("cubic", "degree 3", runner),
            "mmd_spacing": Value("uniform", "every 200th step", runner),
            "ema_half_life": Value(0.0, "no EMA", runner),
            "batch": Value(64, "64", config),
        },
        differs=(
            "features of an Inception network; here of the teacher",
            "the number of steps is not in the code, which saves every 50",
            "the last step is at timestep 0; here the steps are uniform down to a fifth of the first",
        ),
    )


PRESETS = (*_consistency(), _ctm(), _mean_flow(), _rcm(), _mmd())
