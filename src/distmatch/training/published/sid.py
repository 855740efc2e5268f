"""SiD, the methods that build on its code (SiDA, Uni-Instruct), and Diff-Instruct, on which it builds."""

from __future__ import annotations

from typing import NamedTuple

from distmatch.training.published.preset import CIFAR10, IMAGENET64, Preset, Value, adam, of_run
from distmatch.training.published.units import karras_level, level, log_level, steps, updates

_DROPOUT = "student and fake score use dropout, the fake score augmentation; here neither"
_FRESH = "the fake score is updated first, and the student on new samples; here both on the same"
_HALF = "fp16 and Adam's epsilon 1e-6; here --precision, and 1e-8"
_CLIP = "gradients of the fake score are clipped at 1 per element; here not"


def _average(millions: float, batch: int, place: str) -> dict[str, Value]:
    value = updates(millions * 1e6, batch)
    return {"ema_half_life": Value(value, f"{millions:g} Mimg in batches of {batch}", place)}


def _shared(lr: float, batch: int, millions: float, *, script: str, stem: str) -> dict[str, Value]:
    """Settings shared by SiD, SiDA and Uni-Instruct.

    Args:
        lr: Learning rate.
        batch: Samples per step.
        millions: Half-life of the EMA, in millions of images.
        script: The file of the commands.
        stem: Stem of the names of the other files.
    """
    loss, loop, train = f"{stem}_loss.py", f"{stem}_training_loop.py", f"{stem}_train.py"
    return {
        **adam(lr, 0.0, 0.999, script, train),
        "lr_rampup": Value(0, "none", loop),
        "grad_clip": Value(0.0, "no clipping of the norm", loop),
        "fake_score_steps": Value(1, "1", loop),
        "student_sigma": Value(level(2.5), "init_sigma 2.5", script),
        "noise_low": Value(level(0.002), "0.002", loss),
        "noise_high": Value(karras_level(0.8), "tmax 800 of 1000 of EDM's grid: 24.4", script),
        "fake_score_distribution": Value("log-normal", "as in EDM's training", loss),
        "noise_mean": Value(log_level(-1.2), "P_mean -1.2", loss),
        "noise_std": Value(1.2, "P_std 1.2", loss),
        **_average(millions, batch, train if millions == 0.5 else script),
    }


def _adversary(batch: int, lr: float, script: str, loop: str) -> dict[str, Value]:
    return {
        "lr_discriminator": Value(lr, f"{lr:g}, with the fake score", script),
        "ratio_features": Value("fake", "of the fake score, which is trained by it", loop),
        "warmup_steps": Value(steps(1e5, batch), "100 kimg", loop),
    }


class _Setup(NamedTuple):
    """What these papers share: the teacher, learning rate, batch and half-life of the EMA, in Mimg."""

    name: str
    title: str
    shape: tuple[int, ...]
    lr: float
    batch: int
    millions: float
    differs: tuple[str, ...]

    def preset(self, method: str, source: str, settings: dict[str, Value], *differs: str) -> Preset:
        return Preset(
            name=f"paper:{method}-{self.name}",
            method=method,
            title=self.title,
            shape=self.shape,
            source=source,
            settings=settings,
            differs=(*differs, *self.differs),
        )

    def shared(self, script: str, stem: str) -> dict[str, Value]:
        return _shared(self.lr, self.batch, self.millions, script=script, stem=stem)


_SETUPS = (
    _Setup("cifar10", "EDM's DDPM++ on CIFAR-10, with and without classes", CIFAR10, 1e-5, 256, 0.5, ()),
    _Setup("imagenet64", "EDM's ADM on ImageNet-64", IMAGENET64, 4e-6, 8192, 2.0, (_HALF,)),
)


def _sid() -> list[Preset]:
    source, script = "mingyuanzhou/SiD; Zhou et al. 2024, arXiv 2404.04057", "run_sid.sh"
    duration = "the scripts stop at 100 Mimg; the steps here are those of the released network"
    lengths = {
        "cifar10": (403_968e3, "403,968 kimg, without classes", duration + "; 713,312 kimg with classes"),
        "imagenet64": (939_176e3, "939,176 kimg", duration),
    }
    found = []
    for on in _SETUPS:
        images, text, differs = lengths[on.name]
        settings = {
            "sid_alpha": Value(1.2, "alpha 1.2", script),
            **on.shared(script, "sid"),
            **of_run(on.batch, steps(images, on.batch), text, "README.md"),
        }
        found.append(on.preset("sid", source, settings, differs, _DROPOUT, _FRESH))
    return found


def _sida() -> list[Preset]:
    source = "mingyuanzhou/SiD, branch sida; Zhou et al. 2024, arXiv 2410.14919"
    script, loop = "run_sida.sh", "sida_training_loop.py"
    lengths = {
        "cifar10": (300e6, "duration 300 Mimg", "sida_train.py"),
        "imagenet64": (100e6, "duration 100 Mimg, from SiD's generator", script),
    }
    differs = (
        "the adversarial term starts after 200 kimg; here with the student's first update",
        "the discriminator's loss has EDM's weight of its noise level; here --joint-weight",
        _CLIP,
        _DROPOUT,
        _FRESH,
    )
    found = []
    for on in _SETUPS:
        images, *length = lengths[on.name]
        settings = {
            "sid_alpha": Value(1.0, "alpha 1", script),
            **on.shared(script, "sida"),
            **_adversary(on.batch, on.lr, script, loop),
            # Both losses are sums over the elements of a sample, and ours are means; their ratio is the same.
            "gan_weight": Value(1e-4, "lsg_gan 0.01 relative to lsg 100", script),
            **of_run(on.batch, steps(images, on.batch), *length),
        }
        found.append(on.preset("sida", source, settings, *differs))
    return found


def _uni_instruct() -> list[Preset]:
    source = "a-little-hoof/Uni_Instruct; Wang et al. 2025, arXiv 2505.20755"
    script, loop = "run_uni_instruct.sh", "fsim_training_loop.py"
    differs = (
        "the ratio comes from the discriminator's loss; here from its logit",
        "the student is initialized with SiD's generator; here with the teacher",
        "the adversarial weight is not converted, since the term has another form",
        _CLIP,
        _DROPOUT,
        _FRESH,
    )
    found = []
    for on in _SETUPS:
        settings = {
            "divergence": Value("kl", "Forward-KL", script),
            **on.shared(script, "fsim"),
            **_adversary(on.batch, on.lr, script, loop),
            "ratio_warmup": Value(steps(2e5, on.batch), "200 kimg", loop),
            **of_run(on.batch, steps(300e6, on.batch), "duration 300 Mimg", script),
        }
        found.append(on.preset("uni-instruct", source, settings, *differs))
    return found


def _diff_instruct() -> Preset:
    train, loss, readme = "di_train.py", "di_loss.py", "README.md"
    return Preset(
        name="paper:diff-instruct-cifar10",
        method="diff-instruct",
        title="EDM's DDPM++ on CIFAR-10, without classes",
        shape=CIFAR10,
        source="pkulwj1994/diff_instruct; Luo et al. 2023, arXiv 2305.18455",
        settings={
            **adam(1e-5, 0.0, 0.999, readme, train),
            "lr_rampup": Value(0, "lr_warmup_kimg -1", readme),
            "fake_score_steps": Value(1, "1", "di_training_loop.py"),
            "student_sigma": Value(level(1.0), "init_sigma 1.0", readme),
            "noise_distribution": Value("log-normal", "as in EDM's training", loss),
            "noise_mean": Value(log_level(-1.2), "P_mean -1.2", loss),
            "noise_std": Value(1.2, "P_std 1.2", loss),
            **_average(0.5, 128, train),
            "batch": Value(128, "128", readme),
            "steps": Value(steps(200e6, 128), "duration 200 Mimg", train),
        },
        differs=("the difference of the denoisers has no weight; here --scaling", _DROPOUT),
    )


PRESETS = (*_sid(), *_sida(), *_uni_instruct(), _diff_instruct())
