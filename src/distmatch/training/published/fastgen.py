"""f-distill, DMD2 and sCM in FastGen, on EDM's networks and Stable Diffusion 1.5."""

from __future__ import annotations

from distmatch.training.published.preset import CIFAR10, IMAGENET64, Preset, Value, adam, of_run
from distmatch.training.published.units import half_life, level, log_level

_SOURCE = "NVlabs/FastGen, fastgen/configs"
_CRITIC, _RATIO, _SCM = "config_dmd2.py", "config_f_distill.py", "config_scm.py"
_AVERAGES = "FastGen also keeps EMAs with decay 0.99995 and 0.9996"
_BOUNDS = "the ratio is clipped to [0.1, 20] before normalization; here by --ratio-clip after it"
_HIGHEST = Value(0.0, "max_t 80, sigma_max", "config.py")


def _with_fake_score(lr: float, place: str, batch: int, count: int) -> dict[str, Value]:
    """Settings shared by the experiments with a fake score, whose EMA is also updated at fake score steps."""
    rates = "opt.py" if lr == 1e-4 else place
    return {
        **adam(lr, 0.9, 0.999, rates, "opt.py"),
        "lr_discriminator": Value(lr, f"{lr:g}", rates),
        "weight_decay": Value(0.01, "AdamW, 0.01", "opt.py"),
        "lr_rampup": Value(0, "warm_up_steps 0", _CRITIC),
        "grad_clip": Value(10.0, "grad_norm 10, of the student", "callbacks.py"),
        "fake_score_steps": Value(5, "student_update_freq 5", _CRITIC),
        "order": Value("alternate", "a step updates the student or the fake score", _CRITIC),
        "student_sigma": _HIGHEST,
        "noise_low": Value(level(0.002), "min_t 0.002", "config.py"),
        "noise_high": _HIGHEST,
        "gan_weight": Value(1e-3, "gan_loss_weight_gen 0.001", _CRITIC),
        "ema_half_life": Value(half_life(0.9999, 5), "decay 0.9999 at every step, K 5", "callbacks.py"),
        **of_run(batch, count, f"max_iter {count}", place),
    }


def _ratio(divergence: str, memory: float, place: str) -> dict[str, Value]:
    return {
        "divergence": Value(divergence, f"f_div {divergence}", place if divergence == "kl" else _RATIO),
        "ratio_bins": Value(10, "bin_num 10", _RATIO),
        "ratio_memory": Value(memory, f"ratio_ema_rate {memory:g}", place if memory else _RATIO),
    }


def _tangents(lr: float, std: float, place: str, batch: int, count: int) -> dict[str, Value]:
    """Settings shared by the experiments with sCM."""
    return {
        "lr": Value(lr, f"{lr:g}", "opt.py" if lr == 1e-4 else place),
        "beta1": Value(0.9, "0.9", _SCM),
        "beta2": Value(0.99, "0.99", _SCM),
        "weight_decay": Value(0.0, "0", _SCM),
        "lr_rampup": Value(0, "warm_up_steps 0", _SCM),
        "consistency_from": Value("teacher", "use_cd True", place),
        "student_sigma": _HIGHEST,
        "level_distribution": Value("log-normal", "lognormal", _SCM),
        "level_mean": Value(log_level(-1.0), "train_p_mean -1", _SCM),
        "level_std": Value(std, f"train_p_std {std:g}", _SCM if std == 1.4 else place),
        "tangent_warmup": Value(1e4 / count, f"10000 of {count} steps", _SCM),
        "tangent_bound": Value(0.1, "0.1", _SCM),
        "ema_half_life": Value(half_life(0.9999), "decay 0.9999", "callbacks.py"),
        **of_run(batch, count, f"max_iter {count}", place),
    }


def _f_distill() -> list[Preset]:
    source = f"{_SOURCE}; Xu et al. 2025, arXiv 2502.15681"
    cifar, imagenet = "EDM/config_f_distill_cifar10.py", "EDM/config_f_distill_in64.py"
    latents = "SD15/config_f_distill.py"
    stable = {
        **_with_fake_score(1e-5, latents, 2048, 100_000),
        **_ratio("js", 0.0, latents),
        "fake_score_steps": Value(10, "student_update_freq 10", latents),
        "guidance": Value(1.75, "guidance_scale 1.75", latents),
        "ema_half_life": Value(0.0, "use_ema False", "config.py"),
        "precision": Value("bf16", "precision_amp bfloat16", latents),
    }
    del stable["noise_low"]
    return [
        Preset(
            name="paper:f-distill-cifar10",
            method="f-distill",
            title="EDM's DDPM++ on CIFAR-10, by class",
            shape=CIFAR10,
            source=source,
            settings={**_with_fake_score(1e-4, cifar, 2048, 100_000), **_ratio("kl", 0.0, cifar)},
            differs=("the paper's table 5 has 60,000 steps", _BOUNDS, _AVERAGES),
        ),
        Preset(
            name="paper:f-distill-imagenet64",
            method="f-distill",
            title="EDM's ADM on ImageNet-64",
            shape=IMAGENET64,
            source=source,
            settings={
                **_with_fake_score(2e-6, imagenet, 512, 600_000),
                **_ratio("js", 0.5, imagenet),
                "gan_weight": Value(3e-3, "gan_loss_weight_gen 3e-3", imagenet),
            },
            differs=(
                "the paper's table 5 has 380,000 steps, the last with learning rate 5e-7",
                _BOUNDS,
                "the weight is divided by its mean over the batch; here by a running mean, as the ratio",
                _AVERAGES,
            ),
        ),
        Preset(
            name="paper:f-distill-sd15",
            method="f-distill",
            title="Stable Diffusion 1.5, text to image",
            text=True,
            shape=(4, 64, 64),
            source=source,
            settings=stable,
            differs=(
                "no text encoder: prompts are given as embeddings",
                "noise levels are uniform in the time of the path, 0.001 to 0.999; here in sigma^(1/7)",
                "the paper's table 5 has a batch of 1024 and 60,000 steps",
                _BOUNDS,
            ),
        ),
    ]


def _dmd2() -> Preset:
    return Preset(
        name="paper:dmd2-cifar10",
        method="dmd2",
        title="EDM's DDPM++ on CIFAR-10, by class",
        shape=CIFAR10,
        source=f"{_SOURCE}; DMD2's authors publish none for CIFAR-10",
        settings=_with_fake_score(1e-4, "EDM/config_dmd2_cifar10.py", 2048, 100_000),
        differs=(_AVERAGES,),
    )


def _scm() -> list[Preset]:
    source = f"{_SOURCE}; Lu and Song 2024, arXiv 2410.11081, use other networks"
    cifar, imagenet = "EDM/config_scd_cifar10.py", "EDM/config_scd_in64.py"
    return [
        Preset(
            name="paper:scm-cifar10",
            method="scm",
            title="EDM's DDPM++ on CIFAR-10",
            shape=CIFAR10,
            source=source,
            settings={
                **_tangents(1e-4, 1.4, cifar, 512, 500_000),
                "grad_clip": Value(0.0, "grad_norm 1000000", _SCM),
            },
            differs=("RAdam; here AdamW", _AVERAGES),
        ),
        Preset(
            name="paper:scm-imagenet64",
            method="scm",
            title="EDM's ADM on ImageNet-64",
            shape=IMAGENET64,
            source=source,
            settings={
                **_tangents(7e-5, 1.6, imagenet, 1024, 600_000),
                "grad_clip": Value(10.0, "grad_norm 10", imagenet),
                "precision": Value("bf16", "precision_amp bfloat16", imagenet),
            },
            differs=(
                "the learning rate decays with the inverse square root of the steps after 35,000; here "
                "it is constant",
                "Adam's epsilon is 1e-11; here 1e-8",
                _AVERAGES,
            ),
        ),
    ]


PRESETS = (*_f_distill(), _dmd2(), *_scm())
