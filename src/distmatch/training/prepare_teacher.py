"""From the options of `train` to a job that is ready to start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distmatch.base.errors import UserError
from distmatch.base.ranks import Ranks
from distmatch.base.seeds import generator
from distmatch.data import Dataset, load_data
from distmatch.data.ahead import ahead
from distmatch.data.batches import Batches
from distmatch.diffusion.paths.core import NoisePath
from distmatch.diffusion.paths.kinetic import kinetic_path_of
from distmatch.diffusion.paths.specs import KINETIC
from distmatch.interop import save_denoiser
from distmatch.interop.text_encoder import TextEncoder
from distmatch.nets.text import TextInput
from distmatch.nets.words import WordEncoder
from distmatch.nets.work import network_work
from distmatch.training.devices import check_compile_mode, compile_network, pick_device, with_marked_steps
from distmatch.training.known_data import OBSERVED, describe_data, digest_of_data, few_samples, remember
from distmatch.training.noisy_data import with_frozen_noise
from distmatch.training.observations import observe
from distmatch.training.options import NetOptions, RunOptions, TeacherConfig, TrainOptions
from distmatch.training.parallel import shares_out
from distmatch.training.prepare_watch import watch_of_teacher
from distmatch.training.processes import start_together
from distmatch.training.runs import Job
from distmatch.training.segments import DATA
from distmatch.training.teacher import TeacherTraining
from distmatch.training.trackers import check_trackers


def flips(run: RunOptions, data: Dataset) -> bool:
    """Whether to mirror, once it is known that the data are images or video.

    Raises:
        UserError: They are not.
    """
    if run.flip and data.scaling.kind != "image":
        raise UserError(
            "--flip mirrors images", got=f"{data.name}, which contains {data.kind}s", fix="leave it out"
        )
    return run.flip


def prepare_training(options: TrainOptions, data: Dataset | None = None, *, fresh: bool = True) -> Job:
    """Builds everything a teacher's training needs; writes nothing.

    Args:
        options: The options.
        data: Used instead of ``options.data``.
        fresh: Whether the training begins, and is not resumed.

    Raises:
        UserError: The options or the data cannot be used.
    """
    run, ranks = options.run, start_together("train", options, fresh=fresh)
    check_trackers(run.track)
    own_rows = ranks.rows(run.batch)
    device = pick_device(run.device)
    check_compile_mode(run.compile, run.compile_mode, device)
    if options.teacher.fokker_planck > 0 and (run.compile or shares_out(run, ranks)):
        raise UserError(
            "--fokker-planck takes third derivatives, which compiled and shared-out networks do not have",
            got="--compile" if run.compile else f"--parallel {run.parallel}",
            fix="omit it, or --fokker-planck",
        )
    data = load_data(options.data, labels=options.labels) if data is None else data
    digest = digest_of_data(data)
    chosen = options.net.settled(data.shape, device.type, text=bool(data.captions))
    data, text = _with_text(data, chosen, options.teacher.text_encoder)
    larger = _larger(chosen, data, text) if options.net.net == "auto" else None
    options = replace(options, net=chosen)
    about, known = describe_data(data, options.data), None
    if options.teacher.observe:
        _check_observed(options, ranks)
        about |= {OBSERVED: options.teacher.observe}
        data, known = observe(data, options.teacher, run.seed)  # what follows gets no other data
        options = replace(options, watch=replace(options.watch, watch_samples=0))
    sigma_data, noisy, levels = _training_data(options.teacher, data, run.seed)
    sigma_data = sigma_data if known is None else known.std()
    method = TeacherTraining(
        config=options.teacher,
        net=chosen.resolve(data.shape, device.type),
        shape=data.shape,
        num_classes=data.num_classes,
        sigma_data=sigma_data,
        total_steps=run.steps,
        device=device,
        bf16=run.precision == "bf16",
        path=_fitted_path(options.teacher, noisy, run.seed),
        text=text,
        prompt_encoder=data.prompt_encoder,
        ranks=ranks,
        observations=known,
    )
    state = method.init(run.seed)
    ranks.broadcast(state.tensors())
    if run.compile:
        compile_network(state.denoiser.net, run.compile_mode)
    extra: dict[str, Any] = {
        "kind": "teacher",
        "data": about,
        "seed": run.seed,
        "label_dropout": options.teacher.label_dropout,
    }

    def result() -> Any:
        model = method.result(state)
        remember(model, about)
        return model

    batches = Batches(noisy, run.batch, run.seed, flips(run, data), device, levels)
    return Job(
        verb="train",
        options=options,
        state=state,
        step=with_marked_steps(method.step, run.compile_mode),
        batches=ahead(lambda step: batches(step, own_rows), device, data),
        networks={"teacher": state.denoiser},
        notes={
            "data": data.name,
            "samples": len(data),
            DATA: digest,
            "sigma_data": state.denoiser.sigma_data,
            "path": method.objective.path.name,
            "prediction": method.objective.prediction,
            **({"larger_net": larger} if larger else {}),
        },
        warnings=[
            *few_samples(data, run.batch),
            *([] if text else _left_out(data)),
            *method.warnings,
            *([] if known is None else known.warnings),
        ],
        result=result,
        save=lambda folder, model: save_denoiser(folder, model, extra),
        remarks=[_remark(larger)] if larger else [],
        data=data,
        watch=watch_of_teacher(options, state, data, batches, device),
    )


def _check_observed(options: TrainOptions, ranks: Ranks) -> None:
    """Refuses options that need samples which training from observations does not have.

    Raises:
        UserError: With the option.
    """
    run = options.run
    needs = {
        "--flip": run.flip,
        f"--path {KINETIC}": options.teacher.path == KINETIC,
        "--keep-best fd": options.watch.keep_best == "fd",
        f"--parallel {run.parallel}": shares_out(run, ranks),
    }
    if found := [option for option, given in needs.items() if given]:
        raise UserError(
            "training from observations has no whole samples, and completes them by whole networks",
            got=f"--observe {options.teacher.observe} with {found[0]}",
            fix=f"omit {found[0]}",
        )


def _with_text(data: Dataset, net: NetOptions, folder: str) -> tuple[Dataset, TextInput | None]:
    """The data with encoded captions, without labels, and what of them a network takes as its text.

    Data without captions come back as they are, and so do all data for networks that take no text.

    Args:
        data: The data.
        net: The network.
        folder: A text encoder; '' for word tokens.

    Raises:
        UserError: A text encoder that cannot be used, or that nothing would be encoded by.
    """
    if not data.captions or net.net not in ("dit", "dit-small"):
        if folder:
            raise UserError(
                "--text-encoder encodes captions for a dit",
                got=f"a {net.net} and {data.name}, {'with' if data.captions else 'without'} captions",
                fix="leave it out, or use --net dit and data with captions",
            )
        return data, None
    data = replace(data, labels=None, class_names=())
    if folder:
        chosen = TextEncoder.of(folder, data.captions)
        return data.encoded_by(chosen), TextInput(chosen.length, size=chosen.size)
    if data.prompt_encoder is None:
        data = data.encoded_by(WordEncoder.of(data.captions))
    encoder: Any = data.prompt_encoder
    return data, TextInput(encoder.length, tokens=len(encoder.words) + 1)


def _left_out(data: Dataset) -> list[str]:
    """A warning about conditioning that the network does not take."""
    names = ", ".join(sorted(data.conditions))
    others = "take captions, a dit, and class labels only"
    return [f"the built-in networks {others}: {names} of these data is not used"] if names else []


def _larger(chosen: NetOptions, data: Dataset, text: TextInput | None) -> dict[str, Any] | None:
    """The network that an accelerator would have by default, where another one was chosen for a CPU."""
    shape, classes = data.shape, data.num_classes
    nets = (chosen, replace(chosen, net="auto").settled(shape, "cuda", text=text is not None))
    if nets[0] == nets[1]:
        return None
    small, large = (network_work(net.resolve(shape, "cpu"), shape, classes, text) for net in nets)
    times = round(large[1] / small[1], 1)
    return {
        "net": nets[1].net,
        "parameters": large[0],
        "times_the_work": times,
        "chosen_net": chosen.net,
        "chosen_parameters": small[0],
    }


def _remark(larger: dict[str, Any]) -> str:
    return (
        f"network: {larger['chosen_net']}, the default on a CPU, with {larger['chosen_parameters']:,} "
        f"parameters; --net {larger['net']} has {larger['parameters']:,} and "
        f"{larger['times_the_work']:.0f} times the work"
    )


def _training_data(config: TeacherConfig, data: Dataset, seed: int) -> tuple[float, Dataset, Tensor | None]:
    """Standard deviation of the clean data, what is trained on, and the noise level of each sample in it."""
    noise = config.ambient_noise
    if noise == 0:
        return data.std() or 1.0, data, None
    if config.ambient_given:
        return max(data.std() ** 2 - noise**2, 0.0) ** 0.5 or 1.0, data, torch.full((len(data),), noise)
    return data.std() or 1.0, *with_frozen_noise(data, noise, config.ambient_clean, seed)


def _fitted_path(config: TeacherConfig, data: Dataset, seed: int) -> NoisePath | None:
    """The path that is made for the data, when the options ask for it."""
    if config.path != KINETIC:
        return None
    chosen = torch.randperm(len(data), generator=generator(seed, "path samples"))[:4096]
    low, high = config.sigma_min, config.sigma_max
    return kinetic_path_of(data.batch(chosen)[0], rho_min=low, rho_max=high, seed=seed)
