"""What goes wrong in a run that has started, or in what one left: nothing is lost, and it is said."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distmatch.base.files import load_tensors
from distmatch.methods.matching.loop import Matching
from distmatch.training.checkpoint import load_checkpoint
from distmatch.training.teacher import TeacherTraining
from tests.helpers.command import TINY, checkpoints, command, contents, done, weights
from tests.helpers.wrong_inputs import make_inputs, refused


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def here(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Works in the folder of the inputs, and sees to it that a test leaves it as it was."""
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("DISTMATCH_CACHE", str(inputs.parent / "cache"))
    before = contents(inputs)
    yield inputs
    assert contents(inputs) == before


@pytest.mark.parametrize("damage", ["cut", "pickle", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    shutil.copytree("t", tmp_path / "t")
    file = tmp_path / "t/checkpoints/step-000006/state.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[:-50]
    elif damage == "pickle":
        data = bytearray(pickle.dumps({"a": 1}))
    elif damage == "flipped":
        data[-1000] ^= 1
    else:
        (file.parent / "state.json").write_text("{}")
    file.write_bytes(data)
    before = contents(tmp_path)
    refused(f"train --out {tmp_path}/t --resume --steps 8", "checkpoints", "--overwrite")
    assert contents(tmp_path) == before


@pytest.fixture
def plain_user(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a copy of ``t``, a folder ``closed`` and a read-only one, and no rights of root.

    Outside pytest's own folders, which nobody but their owner may enter.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(here / "t", place / "t")
        for folder, mode in ((place / "closed", 0o000), (place / "shown", 0o555), (place, 0o755)):
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)
        monkeypatch.chdir(place)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield place
        finally:
            if root:
                os.seteuid(0)
            (place / "closed").chmod(0o700)


@pytest.mark.parametrize(
    "line",
    [
        f"train {TINY} --out closed/run",
        f"train {TINY} --out shown/run",
        f"train {TINY} --data closed/x.npz --out shown/run",
        "train --config closed/a.toml --out shown/run",
        "distill --teacher closed/t --out shown/run",
        "demo --out closed/run",
        "sample t --n 2 --steps 2 --out closed/a.npz",
        "sample t --n 2 --steps 2 --out shown/a.npz",
        "sample t --n 2 --steps 2 --out shown/folder",
        "sample closed/t --out a.npz",
        "evaluate closed/t",
        "report closed/t",
        "export t --out closed/a",
        "export t --out shown/a",
    ],
)
def test_folders_that_one_may_not_enter_or_write(line: str, plain_user: Path) -> None:
    answer = command(line)
    assert answer.code == 2, answer.err
    assert "Permission denied" in answer.err.splitlines()[-1]
    assert contents(plain_user / "shown") == {}


def test_what_does_not_fit_into_memory() -> None:
    refused(f"train {TINY} --batch {10**15} --out new --dry-run", "does not fit into memory", "--batch")


def _run(verb: str, out: Path, options: str = "") -> str:
    start = (
        f"train {TINY} --lr-decay constant" if verb == "train" else "distill --teacher t --fake-score-steps 2"
    )
    return f"{start} --batch 32 --checkpoint-every 2 --log-every 1 --out {out} {options}"


@pytest.fixture(scope="module", params=["train", "distill"])
def halved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, inputs: Path
) -> tuple[str, Path, Path]:
    """A verb, a run of it, and the first half of the same run."""
    verb, folder = str(request.param), tmp_path_factory.mktemp("halved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        done(_run(verb, folder / "whole", "--steps 8"))
        done(_run(verb, folder / "half", "--steps 4"))
    return verb, folder / "whole", folder / "half"


@pytest.mark.parametrize(
    "call",
    [
        "write",
        pytest.param("replace", marks=pytest.mark.slow),
        pytest.param("fsync", marks=pytest.mark.slow),
        "limit",
    ],
)
def test_a_full_disk_loses_no_checkpoint(
    call: str, halved: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write fails first: the message says so, and the run goes on once there is space."""
    verb, whole, half = halved
    for spared in (0,) if call == "limit" else (0, 1, 2, 3, 5, 8):
        run = tmp_path / f"run-{spared}"
        shutil.copytree(half, run)
        line = f"{verb} --out {run} --resume --steps 8"
        with monkeypatch.context() as patch:
            if call != "limit":
                patch.setattr(os, call, _failing(getattr(os, call), spared))
                refused_after_start(line, "No space left on device")
            else:  # a real refusal by the system: no file may grow beyond 3 kB
                soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
                try:
                    refused_after_start(line, "File too large")
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert load_checkpoint(run / "checkpoints")[0] >= 4
        assert not list(run.rglob("*.tmp"))
        done(line)
        assert weights(run) == weights(whole)


def refused_after_start(line: str, *words: str) -> None:
    """As :func:`refused`, for a run whose progress is on stderr already."""
    answer = command(line)
    assert answer.code == 2, answer
    assert answer.out == ""
    assert "Traceback" not in answer.err
    last = answer.err.splitlines()[-1]
    for word in ("Expected: ", "Fix: ", *words):
        assert word in last, answer.err


def _failing(real: Callable[..., Any], spared: int) -> Callable[..., Any]:
    """``real``, on a disk that is full after ``spared`` calls."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > spared:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("verb", "method", "term"),
    [
        ("train", TeacherTraining, "loss"),
        ("distill", Matching, "loss_gan"),
        ("distill", Matching, "loss_fake"),
    ],
)
def test_a_loss_that_becomes_nan_stops_the_run_and_is_named(
    verb: str, method: type, term: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(_run(verb, tmp_path / "whole", "--steps 8"))
    step = method.step  # type: ignore[attr-defined]

    def poisoned(self: Any, state: Any, batch: Any) -> dict[str, torch.Tensor]:
        info: dict[str, torch.Tensor] = step(self, state, batch)
        return {**info, term: info[term] * float("nan")} if state.step == 6 else info

    with monkeypatch.context() as patch:
        patch.setattr(method, "step", poisoned)
        refused_after_start(
            _run(verb, tmp_path / "run", "--steps 8"),
            f"{term} became nan by step 6",
            "good checkpoint is step 4",
        )
    assert checkpoints(tmp_path / "run") == ["step-000002", "step-000004"]
    done(f"{verb} --out {tmp_path}/run --resume")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step is taken before the weights change, so a finite one does not vouch for them."""
    step = TeacherTraining.step

    def poisoned(self: Any, state: Any, batch: Any) -> dict[str, torch.Tensor]:
        info = step(self, state, batch)
        if state.step == 4:
            next(state.denoiser.parameters()).data[0] = float("inf")
        return info

    monkeypatch.setattr(TeacherTraining, "step", poisoned)
    words = ("denoiser/net.", "not finite after step 4", "good checkpoint is step 2")
    refused_after_start(_run("train", tmp_path / "run", "--steps 4"), *words)
    assert checkpoints(tmp_path / "run") == ["step-000002"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_learning_rate_beyond_reason(tmp_path: Path) -> None:
    line = f"train {TINY} --batch 32 --steps 60 --lr 1e30 --grad-clip 0 --out {tmp_path}/run"
    refused_after_start(
        line, "training went wrong", "loss", "lower the learning rate", "no checkpoint was written"
    )
    assert checkpoints(tmp_path / "run") == []
    # The advice works: with a lower rate the run begins anew.
    done(f"train --out {tmp_path}/run --resume --lr 1e-3 --steps 3")


def test_debug_shows_where() -> None:
    answer = command("train --data absent.npz --out new --debug")
    assert answer.code == 2
    assert "Traceback" in answer.err


# The length of a safetensors header comes first in the file, so its first bytes may look like a pickle's.
@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_length_that_looks_like_a_pickle_is_none(length: int, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).ljust(length).encode()
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\x01\x02")
    assert load_tensors(tmp_path / "a.safetensors")["a"].tolist() == [1, 2]
