"""The options of the verbs that train, as dataclasses. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from distmatch.base.errors import UserError
from distmatch.base.rules import (
    Count,
    CountOrNone,
    Decay,
    Finite,
    NotNegative,
    Positive,
    Rule,
    Share,
    check_rules,
)
from distmatch.methods.settings import Settings
from distmatch.methods.table import find_method, own_divergence
from distmatch.nets.config import NetConfig, auto_kind, default_config, kind_of
from distmatch.nets.optimizer import OptimizerSettings
from distmatch.training.observe_options import ObserveSettings
from distmatch.training.pipeline_options import EncodingOptions, PipelineOptions
from distmatch.training.presets import LAPTOP, find_preset
from distmatch.training.watch_options import WatchOptions

_TRACKERS = ("tensorboard", "wandb", "trackio")


def tracker_names(text: str) -> list[str]:
    """The trackers in a list with commas, each once."""
    return list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))


Trackers = Annotated[
    str,
    Rule(
        f"must name {', '.join(_TRACKERS)}, with commas between them",
        lambda text: set(tracker_names(text)) <= set(_TRACKERS),
    ),
]


@dataclass(frozen=True, kw_only=True)
class NetOptions:
    """The network. Only options of its kind can be set; the others have defaults depending on the data."""

    net: Literal["auto", "mlp", "unet", "unet-small", "dit", "dit-small"] = "auto"
    """Kind of network; auto: an MLP for vectors and grey 8x8 images, a U-Net for other images, a DiT for
    sequences, video and samples with captions: unet or dit on an accelerator, unet-small or dit-small on
    a CPU."""
    width: int | None = None
    """Hidden units (mlp), channels at full resolution (unet), token size (dit)."""
    depth: int | None = None
    """Residual blocks (mlp) or transformer blocks (dit)."""
    blocks: int | None = None
    """Residual blocks per resolution (unet)."""
    multipliers: tuple[int, ...] | None = None
    """Channels of each resolution in units of width (unet)."""
    attention: tuple[int, ...] | None = None
    """Resolutions with self-attention, 0 the finest, -1 the coarsest (unet)."""
    patch: int | None = None
    """Side of a patch along every axis (dit)."""
    heads: int | None = None
    """Attention heads (dit)."""
    dropout: float | None = None
    """Dropout while training (mlp, unet)."""

    def settled(self, shape: Sequence[int], device: str, *, text: bool = False) -> NetOptions:
        """The same options with ``auto`` replaced by its value.

        A run that is resumed elsewhere, or with other defaults, then keeps its network.

        Args:
            shape: Shape of one sample.
            device: Type of the device that the run begins on.
            text: Whether the samples have captions.
        """
        return replace(self, net=auto_kind(shape, device, text=text)) if self.net == "auto" else self  # type: ignore[arg-type]

    def resolve(self, shape: Sequence[int], device: str) -> NetConfig:
        """The network's config for samples of this shape.

        Args:
            shape: Shape of one sample.
            device: Type of the device that the run begins on.

        Raises:
            UserError: An option was set that this kind of network does not have.
        """
        config = default_config(self.net, shape, device)
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "net"}
        given = {name: value for name, value in given.items() if value is not None}
        known = {f.name for f in fields(config)}
        for name in given:
            if name not in known:
                raise UserError(
                    f"--{name} does not apply to this network",
                    got=f"a {kind_of(config)}",
                    expected=f"one of {', '.join(sorted(known))}",
                    fix=f"leave --{name} out or choose another --net",
                )
        changes: dict[str, Any] = given
        return replace(config, **changes)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options of a training run."""

    steps: Count = 3000
    """Training steps."""
    seed: int = 0
    """Seed of all random numbers."""
    keep: Count = 3
    """Checkpoints kept."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    log_every: Count = 50
    """Steps between log lines."""
    track: Trackers = ""
    """Trackers that get the logged values and sample grids as well, with commas: tensorboard, wandb, trackio
    (docs/trackers.md)."""

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True, kw_only=True)
class RunOptions(LoopOptions):
    """Options of a training run."""

    batch: Count = 256
    """Samples per step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the networks under bfloat16 autocast; weights and statistics stay in fp32."""
    parallel: Literal["auto", "ddp", "fsdp2", "hybrid"] = "auto"
    """How several processes, started by torchrun, share the work. ddp (auto): each holds whole networks.
    fsdp2: each holds a share of all weights. hybrid: those of a machine do, and machines hold the same."""
    shard_size: CountOrNone = 0
    """Processes that share out the weights with --parallel hybrid; 0: those of a machine."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Mode of --compile; all but the default use CUDA graphs, on accelerators that have them."""
    flip: bool = False
    """Mirror images left-right at random."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(OptimizerSettings, ObserveSettings):
    """How a diffusion teacher is trained; by default with the loss and the preconditioning of EDM."""

    lr: Positive = 1e-3
    lr_decay: Literal["constant", "cosine"] = "cosine"
    lr_rampup: CountOrNone = 200
    ema_half_life: Positive = 200.0
    """Half-life of the EMA of the weights, in steps. The EMA is saved."""
    label_dropout: Decay = 0.1
    """Share of labels or captions dropped in training, so that the teacher can be guided; 0 drops none."""
    text_encoder: str = ""
    """A folder with a text encoder of transformers, whose hidden states are the captions; empty: words, with
    embeddings that are trained too."""
    noise_mean: Finite = -1.2
    """Mean of log sigma in training."""
    noise_std: Positive = 1.2
    """Spread of log sigma in training."""
    sigma_data: NotNegative = 0.0
    """Standard deviation of the data; 0: computed from the data."""
    sigma_min: Positive = 0.002
    """Smallest noise level of sampling."""
    sigma_max: float = 80.0
    """Largest noise level of sampling."""
    path: str = "edm"
    """edm, vp, sub-vp, ve, cosine, condot, trigflow or kinetic-optimal; vp:beta_max=12 sets its options."""
    prediction: Literal["auto", "f", "x0", "eps", "v", "flow", "score"] = "auto"
    """Prediction type; f is that of EDM. auto: the usual one for the path."""
    noise_distribution: Literal["auto", "log-normal", "uniform", "logit-normal"] = "auto"
    """Noise distribution in training: log-normal in sigma, or uniform or logit-normal in the time of the
    path."""
    logit_mean: Finite = 0.0
    """Mean of the logit of time, for logit-normal; above 0 favors noise."""
    logit_std: Positive = 1.0
    """Standard deviation of the logit of time, for logit-normal."""
    weighting: Literal["auto", "edm", "target", "min-snr", "x0"] = "auto"
    """Loss weight: EDM's, 1 on the prediction (target), min-SNR, or 1 on x0."""
    min_snr_gamma: Positive = 5.0
    """Largest weight of min-SNR."""
    learned_uncertainty: bool = False
    """Balance the noise levels by a learned log-variance, as in EDM2."""
    condition_noise: NotNegative = 0.0
    """Noise on the label embedding in training (gamma of CEP, usually 1); 0 is none."""
    condition_noise_kind: Literal["uniform", "gaussian"] = "uniform"
    """Distribution of this noise."""
    pfgm_dims: NotNegative = 0.0
    """Extra dimensions D of PFGM++, for example 2048; 0 is Gaussian noise."""
    instance_noise: NotNegative = 0.0
    """Noise on the data, new in each step: the teacher learns the noised data."""
    ambient_noise: NotNegative = 0.0
    """Fixed noise on the data, from which the clean distribution is learned; 0 for clean data."""
    ambient_clean: Share = 0.1
    """Share of the samples without this noise."""
    ambient_given: bool = False
    """The data already have this noise, in model units: add none."""
    fokker_planck: NotNegative = 0.0
    """Weight of the Fokker-Planck residual, which is 0 where the scores of all noise levels belong to one
    diffusion. A step takes several times as long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fokker_planck > 0 and self.pfgm_dims > 0:
            raise UserError(
                "--fokker-planck is a property of scores, and a teacher of --pfgm-dims has none",
                fix="omit one of them",
            )
        if self.ambient_noise > 0 and (self.pfgm_dims > 0 or self.instance_noise > 0):
            raise UserError(
                "--ambient-noise does not go together with --pfgm-dims or --instance-noise",
                expected="one kind of noise in the data, and Gaussian noise on top of it",
                fix="omit one of them",
            )
        if self.observe and (self.ambient_noise > 0 or self.pfgm_dims > 0 or self.instance_noise > 0):
            raise UserError(
                "--observe does not go together with --ambient-noise, --pfgm-dims or --instance-noise",
                expected="--observe-noise for noise in the observations",
                fix="omit one of them",
            )
        if not self.sigma_min < self.sigma_max < math.inf:
            raise UserError(
                "--sigma-min must be below --sigma-max",
                got=f"--sigma-min {self.sigma_min} and --sigma-max {self.sigma_max}",
                expected="for example 0.002 and 80",
            )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `distmatch train`."""

    data: str = "digits"
    """digits, stacked-digits, moving-digits, captioned-digits, fashion_mnist, cifar10, ring8, grid25,
    skewed2, a folder of images, a .npz, .npy or .csv file (x.csv:one-hot where it has words)."""
    labels: bool = True
    """Use the labels, when there are any."""
    run: RunOptions = field(default_factory=RunOptions)
    net: NetOptions = field(default_factory=NetOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """What a run folder keeps of a training that a program carries out with :func:`distmatch.fit`."""

    run: LoopOptions = field(default_factory=LoopOptions)


@dataclass(frozen=True, kw_only=True)
class DistillInputs:
    """Inputs of a distillation, for every method."""

    data: str = ""
    """The real data, as for train; empty: the data the teacher was trained on."""
    teacher: str = ""
    """A run or model folder, a folder of diffusers, a .pkl of EDM; or ring8, grid25, skewed2 (exact)."""
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    prompts: str = ""
    """Prompts: a text file with one in each line, .jsonl, .csv or .parquet with a column text, prompt or
    caption (or captions.csv:NAME), or a folder of images with metadata.jsonl (docs/prompts.md)."""
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    net: NetOptions = field(default_factory=NetOptions)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(DistillInputs):
    """Options of `distmatch distill`."""

    method: str = "f-distill"
    """f-distill, dmd2, sid, uni-instruct, rcm, ... (docs/methods.md); it determines the options and defaults
    below."""
    preset: str = LAPTOP
    """laptop, the defaults for small networks, or published settings such as paper:sid-cifar10
    (docs/presets.md). It also determines the method if none is given; other options override it."""
    divergence: str | None = None
    """js, kl, reverse_kl, alpha:0.5, gjs:0.3, skew_kl:0.1, ...; unset: the method's own (js)."""
    watch: WatchOptions = field(default_factory=WatchOptions)
    settings: Settings = field(default=None, metadata={"key": "distill"})  # type: ignore[assignment]
    """Those of the method; left out, its own defaults."""

    def __post_init__(self) -> None:
        method = find_method(self.method)
        if self.settings is None:
            object.__setattr__(self, "settings", method.settings())
        elif type(self.settings) is not method.settings:
            raise UserError(
                f"these are no settings of {method.name}",
                got=type(self.settings).__name__,
                expected=method.settings.__name__,
                fix=f"begin with DistillOptions.of({method.name!r})",
            )

    @classmethod
    def of(cls, method: str | None, preset: str = LAPTOP, **changes: Any) -> DistillOptions:
        """The options of a method with its own defaults, and what a preset has otherwise.

        Args:
            method: Its name; None takes that of the preset, or the default.
            preset: Name of the preset.
            changes: Other fields.

        Raises:
            UserError: There is no such method or preset, or they do not go together.
        """
        chosen = find_preset(preset, None if method is None else find_method(method).name)
        if method is None:
            method = chosen.method if chosen else cls.method
        plain = cls(method=method, preset=preset, divergence=own_divergence(find_method(method)))
        given = {name: value.value for name, value in chosen.settings.items()} if chosen else {}
        run = {name: given.pop(name) for name in list(given) if hasattr(plain.run, name)}
        measure = given.pop("divergence", plain.divergence)
        settings = replace(plain.settings, **given)
        plain = replace(plain, divergence=measure, run=replace(plain.run, **run), settings=settings)
        return replace(plain, **changes)
