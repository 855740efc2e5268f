"""`distmatch doctor`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distmatch.base.errors import cause
from distmatch.cli.answer import print_json
from distmatch.cli.help import Help
from distmatch.cli.parse import parse
from distmatch.training.pipeline_options import PipelineOptions

HELP = Help(
    """Check this machine and installation: versions, devices, data, places to write, speed. With --teacher,
show what a teacher takes and predicts instead; with --store, compare every byte of a store with its hashes.

example: distmatch doctor --json
         distmatch doctor --teacher stable-diffusion/ --size 512
         distmatch doctor --store photos-256"""
)


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of `distmatch doctor`."""

    seed: int = 0
    """Seed of the test tensors."""
    json: bool = False
    """Print one JSON object on stdout."""
    teacher: str = ""
    """A run, model or diffusers folder: print its samples, conditioning, prediction and noise path."""
    store: str = ""
    """A store of distmatch prepare: verify it."""
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        ok: True, False, or None where it is optional and absent.
        detail: What was found.
        fix: What to do when it is not ok.
    """

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def run(argv: list[str]) -> None:
    """Parses, checks, prints."""
    options = parse(DoctorOptions, argv, verb="doctor", said=HELP)
    if options.teacher:
        _describe(options)
        return
    if options.store:
        _verify(options)
        return
    from distmatch.training.environment import environment

    env = environment()
    env.pop("command", None)
    checks = [
        _attempt(check) for check in (_torch_check, _step_check(options.seed), _gloo, _cache, _data, _space)
    ]
    checks += _optional_packages()
    healthy = all(check.ok is not False for check in checks)
    if options.json:
        print_json({"ok": healthy, "checks": [vars(check) for check in checks], "environment": env})
    else:
        for key, value in env.items():
            print(f"{key:12} {_words(value)}")
        for check in checks:
            mark = {True: "ok", False: "PROBLEM", None: "absent"}[check.ok]
            print(f"{mark:8} {check.name}: {check.detail}")
            if not check.ok and check.fix:
                print(f"         fix: {check.fix}")
    if not healthy:
        raise SystemExit(1)


def _describe(options: DoctorOptions) -> None:
    """Prints what a teacher takes and predicts."""
    from distmatch.training.teachers import describe_teacher

    found = describe_teacher(options.teacher, **options.pipeline.given())
    if options.json:
        print_json(found)
        return
    for key, value in found.items():
        print(f"{key:12} {value}")


def _verify(options: DoctorOptions) -> None:
    """Prints that a store is whole."""
    from distmatch.data.store.reading import verify_store

    samples = verify_store(Path(options.store).expanduser())["samples"]
    if options.json:
        print_json({"store": options.store, "samples": samples, "ok": True})
        return
    print(f"{options.store} is whole: {samples:,} samples")


def _words(value: Any) -> str:
    """A value of the environment for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(one)}" for key, one in value.items())
    return "; ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _optional_packages() -> list[Check]:
    from distmatch.interop.optional import DIFFUSERS, EFFICIENTNET, EFFICIENTNET_WEIGHTS, ONNX, PEFT

    packages = (DIFFUSERS, PEFT, *ONNX, EFFICIENTNET, EFFICIENTNET_WEIGHTS)
    found = [(package, package.version) for package in packages]
    return [
        Check(package.name, True, version)
        if version
        else Check(package.name, None, f"{package.task} it", package.install)
        for package, version in found
    ]


def _attempt(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a health check reports what breaks, whatever it is
        return Check(
            getattr(check, "__name__", "check").strip("_"), False, f"{type(error).__name__}: {error}"
        )


def _torch_check() -> Check:
    import torch

    found = "an accelerator" if torch.accelerator.is_available() else "no accelerator, the CPU is used"
    return Check("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads, {found}")


def _step_check(seed: int) -> Callable[[], Check]:
    def training_step() -> Check:
        from dataclasses import replace

        from distmatch.training.options import TrainOptions
        from distmatch.training.prepare_teacher import prepare_training

        options = TrainOptions()
        job = prepare_training(replace(options, run=replace(options.run, seed=seed)))
        job.step(job.state, job.batches(0))
        began = time.perf_counter()
        for step in range(1, 6):
            info = job.step(job.state, job.batches(step))
        loss = float(info["loss"])
        milliseconds = 200 * (time.perf_counter() - began)
        return Check("training step", 0 < loss < 10, f"{milliseconds:.0f} ms on digits, loss {loss:.2f}")

    return training_step


def _gloo() -> Check:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Check("distributed", None, "torch was built without gloo")
    with tempfile.TemporaryDirectory() as folder:
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        except RuntimeError as error:  # one process needs it for nothing
            return Check("distributed", None, f"gloo does not start here: {cause(error)}")
        dist.destroy_process_group()
    return Check("distributed", True, "gloo starts")


def _cache() -> Check:
    from distmatch.base.files import cache_folder

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            "cache", None, f"{folder}: {error.strerror}; feature networks are trained anew each time"
        )
    return Check("cache", True, str(folder))


def _data() -> Check:
    folder = os.environ.get("DISTMATCH_DATA")
    if not folder:
        return Check("DISTMATCH_DATA", None, "not set: fashion_mnist and cifar10 cannot be named")
    found = sorted(p.name for p in Path(folder).glob("*.npz"))
    ok = bool(found)
    return Check(
        "DISTMATCH_DATA", ok, f"{folder}: {len(found)} archives", "point it at the folder of the archives"
    )


def _space() -> Check:
    place: Any = Path.cwd()
    with tempfile.TemporaryFile(dir=place):
        pass
    stat = os.statvfs(place)
    free = stat.f_bavail * stat.f_frsize / 2**30
    return Check("working folder", free > 0.5, f"{place}: writable, {free:.1f} GiB free", "free some space")
