"""What the user got wrong: one message, exit code 2, and nothing on the disk changed."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command import SHORT, TINY, checkpoints, command, contents, done, weights
from distmatch.base.files import load_tensors
from distmatch.methods.matching.loop import Matching
from distmatch.training.checkpoint import load_checkpoint
from distmatch.training.teacher import TeacherTraining


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``t`` (teacher), ``s`` (student), ``u`` (unconditional teacher), and files good and bad."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done(f"train {TINY} {SHORT} --out t")
        done(f"train {TINY} {SHORT} --no-labels --out u")
        done(f"distill --teacher t {SHORT} --out s")
        rng = np.random.default_rng(0)
        images = rng.integers(0, 255, (40, 8, 8), dtype=np.uint8)
        floats = images.astype(np.float32) / 255
        np.savez("images.npz", x=images)
        np.savez("vectors.npz", x=rng.normal(size=(40, 3)).astype(np.float32))
        np.savez("large.npz", x=rng.integers(0, 255, (40, 9, 9), dtype=np.uint8))
        np.savez("nan.npz", x=np.where(np.arange(64).reshape(8, 8) == 5, np.nan, floats))
        np.savez("inf.npz", x=np.where(np.arange(64).reshape(8, 8) == 5, np.inf, floats))
        np.savez("negative.npz", x=images, labels=np.arange(40) - 3)
        np.savez("huge.npz", x=images, labels=np.arange(40) * 1000)
        np.savez("fractions.npz", x=images, labels=np.arange(40) / 2)
        np.savez("short.npz", x=images, labels=np.arange(39) % 10)
        np.savez("twelve.npz", x=images, labels=np.arange(40) % 12)
        np.savez("flat.npz", x=np.arange(10.0))
        np.savez("nobody.npz", x=np.zeros((0, 8, 8), np.uint8))
        np.savez("objects.npz", x=np.array([{"a": 1}, None], dtype=object))
        np.savez("text.npz", x=np.array([["a", "b"], ["c", "d"]]))
        Path("empty.npz").write_bytes(b"")
        Path("cut.npz").write_bytes(Path("images.npz").read_bytes()[:-200])
        Path("words.npz").write_text("these are words")
        np.save("vectors.npy", rng.normal(size=(40, 3)))
        Path("cut.npy").write_bytes(Path("vectors.npy").read_bytes()[:300])
        Path("data.pkl").write_bytes(pickle.dumps(images))
        Path("hollow").mkdir()
        Path("notes").mkdir()
        Path("notes/read.txt").write_text("words")
        Path("wrong.toml").write_text('verb = "train"\n[run]\nstepz = 3\n')
        Path("typed.toml").write_text('verb = "train"\n[run]\nsteps = "many"\n')
        Path("broken.toml").write_text("verb = train\n")
        for name in ("pickled", "cut", "foreign", "other", "newer"):
            shutil.copytree("t/model", f"models/{name}")
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(2)}, buffer)
        Path("models/pickled/model.safetensors").write_bytes(buffer.getvalue())
        Path("models/cut/model.safetensors").write_bytes(weights("t")[:-100])
        Path("models/foreign/config.json").write_text('{"model_type": "unet"}')
        config = json.loads(Path("models/other/config.json").read_text())
        Path("models/other/config.json").write_text(
            json.dumps({**config, "net": {**config["net"], "width": 48}})
        )
        Path("models/newer/config.json").write_text(json.dumps({**config, "version": 99}))
        Path("model.pt").write_bytes(buffer.getvalue())
    return folder


@pytest.fixture(autouse=True)
def here(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Works in the folder of the inputs, and sees to it that a test leaves it as it was."""
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("DISTMATCH_CACHE", str(inputs.parent / "cache"))
    before = contents(inputs)
    yield inputs
    assert contents(inputs) == before


def refused(line: str, *words: str) -> None:
    """`distmatch LINE` ends with 2 and one message with these words; the fixture sees what it wrote."""
    answer = command(line)
    assert answer.code == 2, answer
    assert answer.out == ""
    messages = [text for text in answer.err.splitlines() if not text.startswith("warning: ")]
    assert len(messages) == 1, answer.err
    assert messages[0].startswith(f"distmatch {line.split()[0]}: ")
    assert "Traceback" not in answer.err
    assert any(part in messages[0] for part in ("Got: ", "Expected: ", "Fix: ")), messages[0]
    for word in words:
        assert word in messages[0], messages[0]


DATA = {
    "absent.npz": ("absent.npz does not exist",),
    "empty.npz": ("cannot read empty.npz", "truncated"),
    "cut.npz": ("cannot read cut.npz", "truncated"),
    "cut.npy": ("cannot read cut.npy", "truncated"),
    "words.npz": ("cannot read words.npz",),
    "flat.npz": ("wrong number of axes", "(10,)"),
    "nobody.npz": ("there is nothing in it", "(0, 8, 8)"),
    "nan.npz": ("not finite", "nan", "(0, 0, 0, 5)"),
    "inf.npz": ("not finite", "inf"),
    "negative.npz": ("labels must not be negative", "-3"),
    "huge.npz": ("labels must be class numbers", "39000"),
    "fractions.npz": ("labels must be whole numbers", "0.5"),
    "short.npz": ("labels do not fit the samples", "(39,)", "(40,)"),
    "objects.npz": ("Python objects", "can run any code"),
    "text.npz": ("not numbers",),
    "data.pkl": ("pickle", "was not opened"),
    "model.pt": ("pickle", "was not opened"),
    "hollow": ("hollow",),
    "notes": ("notes",),
    "digitz": ("unknown data name", "did you mean digits?"),
    "wrong.toml": ("cannot be read", ".npz"),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("verb", [f"train {TINY}", "distill --teacher t", "evaluate s"])
def test_data_that_cannot_be_used(verb: str, data: str) -> None:
    out = "" if verb.startswith("evaluate") else "--out new"
    refused(f"{verb} --data {data} {out}", *DATA[data])


PAIRS = {
    "distill --teacher t --data vectors.npz": ("same shape", "(1, 8, 8)", "(3,)"),
    "distill --teacher t --data large.npz": ("same shape", "(1, 9, 9)"),
    "distill --teacher t --data images.npz": ("class-conditional", "no labels", "--no-labels"),
    "distill --teacher t --data twelve.npz": ("classes that the teacher does not know", "12", "10"),
    "distill --teacher u --guidance 2": ("guidance needs a class-conditional teacher", "--guidance"),
    "distill --teacher ring8 --guidance 2": ("guidance needs a class-conditional teacher",),
    "distill --teacher ring8 --flip": ("--flip mirrors images",),
    "distill --teacher s": ("s is a student",),
    "distill --teacher ring8 --data vectors.npz": ("same shape",),
    "distill": ("no teacher was named", "--teacher"),
}
NAMES = {
    "distill --teacher t --divergence jss": ("unknown divergence", "'jss'", "did you mean js"),
    "distill --teacher t --divergence hellingr": ("did you mean hellinger",),
    "distill --teacher t --divergence alpha:x": ("alpha", "finite number"),
    "distill --teacher t --divergence tv": ("tv has no second derivative",),
    "distill --teacher t --method dmd3": ("unknown method", "did you mean dmd"),
    "distill --teacher t --method dmd2 --divergence kl": ("dmd2 minimises reverse KL", "f-distill"),
    "demo --divergence jss": ("unknown divergence", "did you mean js"),
    "demo --divergence tv": ("tv has no second derivative",),
    "demo --device abacus": ("device cannot be used", "'abacus'"),
    "train --net unett": ("unknown value of --net", "did you mean unet"),
    "train --device abacus": ("device cannot be used", "'abacus'"),
    "train --stepz 3": ("unknown option", "--stepz", "did you mean --steps"),
    "trian": ("unknown verb", "did you mean train"),
}
VALUES = {
    "train --steps 0": ("--steps must be at least 1", "0"),
    "train --steps 1e3": ("--steps", "'1e3'", "a whole number"),
    "train --steps": ("--steps",),
    "train --batch 0": ("--batch must be at least 1",),
    "train --keep 0": ("--keep must be at least 1",),
    "train --checkpoint-every 0": ("--checkpoint-every must be at least 1",),
    "train --lr fast": ("--lr", "'fast'", "a number"),
    "train --lr nan": ("--lr must be positive", "nan"),
    "train --lr -1": ("--lr must be positive",),
    "train --label-dropout 2": ("--label-dropout must be in [0, 1)", "2.0"),
    "train --beta2 1": ("--beta2 must be in [0, 1)",),
    "train --weight-decay -1": ("--weight-decay must not be negative",),
    "train --grad-clip -1": ("--grad-clip must not be negative",),
    "train --sigma-min 5 --sigma-max 1": ("--sigma-min must be below --sigma-max", "5.0"),
    "train --sigma-min 0": ("--sigma-min must be positive",),
    "train --sigma-max inf": ("--sigma-max", "inf"),
    "train --sigma-data -1": ("--sigma-data must not be negative",),
    "train --noise-mean nan": ("--noise-mean must be finite",),
    "train --width 0": ("width must be a positive",),
    "train --net mlp --patch 2": ("--patch does not apply", "mlp"),
    "train --precision fp64": ("--precision", "'fp64'", "bf16"),
    "train --data ring8 --flip": ("--flip mirrors images",),
    "distill --teacher t --calls 0": ("--calls must be positive",),
    "distill --teacher t --lr 0": ("--lr must be positive",),
    "distill --teacher t --gan-weight -1": ("--gan-weight must not be negative",),
    "distill --teacher t --noise-low 5 --noise-high 1": ("0 < low < high",),
    "distill --teacher t --ratio-bins 0": ("bins=0", "bins >= 1"),
    "distill --teacher t --ratio-memory 2": ("memory=2.0",),
    "distill --teacher t --order alternate --critic-steps 1": ("--order alternate",),
}
CONFIGS = {
    "train --config s/config.toml": ("config of another verb", "distill"),
    "distill --config t/config.toml": ("config of another verb", "train"),
    "train --config absent.toml": ("absent.toml is missing",),
    "train --config wrong.toml": ("unknown option in wrong.toml [run]", "did you mean steps"),
    "train --config typed.toml": ("run.steps", "'many'", "int"),
    "train --config broken.toml": ("broken.toml is not valid TOML", "line 1"),
    "train --config images.npz": ("images.npz is not",),
}


@pytest.mark.parametrize(
    ("line", "words"), [*PAIRS.items(), *NAMES.items(), *VALUES.items(), *CONFIGS.items()]
)
def test_options_that_cannot_be_used(line: str, words: tuple[str, ...]) -> None:
    refused(line if line == "trian" else f"{line} --out new", *words)


MODELS = {
    "absent": ("absent does not exist",),
    "notes": ("notes holds no model",),
    "model.pt": ("pickle", "was not opened"),
    "models/pickled": ("pickle", "was not opened", "safetensors"),
    "models/cut": ("cannot read", "truncated"),
    "models/foreign": ("does not describe a model of distmatch",),
    "models/other": ("another architecture", "40)", "48)"),
    "models/newer": ("another version",),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "line", ["sample {} --out new.npz", "distill --teacher {} --out new", "export {} --out n"]
)
def test_models_that_cannot_be_used(line: str, model: str) -> None:
    refused(line.format(model), *MODELS[model])


PLACES = {
    f"train {TINY}": ("no place was given", "--out"),
    f"train {TINY} --out t": ("t is not empty", "--resume", "--overwrite"),
    "distill --teacher t --out s": ("s is not empty", "--resume", "--overwrite"),
    "distill --teacher ring8 --out s": ("s is not empty",),
    "demo --out t": ("t is not empty", "--resume", "--overwrite"),
    f"train {TINY} --out notes --overwrite": ("not a run folder of distmatch and was left alone",),
    f"train {TINY} --out notes --resume": ("not a run folder of distmatch",),
    f"train {TINY} --out new --resume": ("nothing to resume",),
    f"train {TINY} --out t --resume --overwrite": ("--resume and --overwrite",),
    f"train {TINY} --out images.npz": ("images.npz is a file",),
    f"train {TINY} --out images.npz/below/it": ("cannot write", "Not a directory"),
    "distill --teacher t --out t --overwrite": ("would delete t", "which this run needs"),
    "sample t --steps 2 --out images.npz": ("images.npz exists", "--overwrite"),
    "sample t --steps 2 --out images.npz/a.npz": ("images.npz is a file",),
    "sample t --steps 2 --out notes --overwrite": ("notes holds something else and was left alone",),
    "sample t --steps 2 --out a.jpg": ("cannot be written in this form", ".npz, .png"),
    "sample ring8 --out folder": ("cannot be written in this form", "vectors"),
    "export t --out s": ("s exists",),
    "export t --out notes --overwrite": ("notes already exists and is not a model folder",),
    "export t --out images.npz/a": ("cannot write",),
    "export t": ("--out",),
    "export ring8 --out a": ("ring8 is a formula",),
    "sample t --n 0 --out a.npz": ("--n and --batch must be at least 1",),
    "sample t --steps 0 --out a.npz": ("at least one step",),
    "sample t --classes 12 --out a.npz": ("labels do not fit", "0 to 9"),
    "sample t --guidance nan --out a.npz": ("--guidance must be finite",),
    "sample s --steps 3 --out a.npz": ("a student has its calls",),
    "sample u --guidance 2 --out a.npz": ("guidance needs a class-conditional teacher",),
    "sample": ("MODEL", "`distmatch sample --help`"),
    "evaluate absent": ("absent does not exist",),
    "evaluate images.npz": ("no real data", "--data"),
    "evaluate images.npz --data vectors.npz": ("another shape", "vectors"),
    "evaluate t/model": ("t/model is a model folder", "distmatch sample"),
    "evaluate s --data vectors.npz": ("same shape",),
    "evaluate s --data images.npz": ("no labels",),
    "evaluate s --features foo": ("unknown feature space",),
    "evaluate s --n 3": ("too few samples",),
    "evaluate s --n 0": ("--n must be at least 1",),
    "report absent": ("absent is not a run folder",),
    "report notes": ("notes is not a run folder",),
}


@pytest.mark.parametrize("line", PLACES)
def test_places_and_counts_that_cannot_be_used(line: str) -> None:
    refused(line, *PLACES[line])


CHECKPOINTS = {
    "train --out t --resume --width 64": ("another architecture", "(64, 64)"),
    "train --out t --resume 77": ("no checkpoint of step 77", "6"),
    "train --out t --resume absent": ("absent", "missing"),
    "train --out t --resume notes": ("missing",),
    "train --out t --resume s/checkpoints/step-000006": ("another architecture",),
    "distill --out s --resume t/checkpoints/step-000006": ("a run of another kind", "same verb"),
    "distill --out t --resume": ("config of another verb",),
}


@pytest.mark.parametrize("line", CHECKPOINTS)
def test_checkpoints_that_do_not_fit_change_nothing(line: str) -> None:
    refused(f"{line} --steps 8", *CHECKPOINTS[line])


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


@pytest.mark.parametrize(
    "option",
    [
        "--beta1 2",
        "--beta2 1",
        "--weight-decay -1",
        "--fit-steps -1",
        "--lr-rampup -1",
        "--guidance nan",
        "--lr inf",
    ],
)
def test_distillation_settings_that_cannot_be_used(option: str) -> None:
    refused(f"distill --teacher t {option} --dry-run", option.split()[0])


def _run(verb: str, out: Path, options: str = "") -> str:
    start = f"train {TINY} --lr-decay constant" if verb == "train" else "distill --teacher t --critic-steps 2"
    return f"{start} --batch 32 --checkpoint-every 2 --log-every 1 --out {out} {options}"


@pytest.mark.parametrize("verb", ["train", "distill"])
@pytest.mark.parametrize("call", ["write", "replace", "fsync", "limit"])
def test_a_full_disk_loses_no_checkpoint(
    call: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write fails first: the message says so, and the run goes on once there is space."""
    done(_run(verb, tmp_path / "whole", "--steps 8"))
    done(_run(verb, tmp_path / "run", "--steps 4"))
    resume = f"{verb} --out {tmp_path}/run --resume --steps 8"
    for spared in (0,) if call == "limit" else (0, 1, 2, 3, 5, 8):
        run = tmp_path / f"run-{spared}"
        shutil.copytree(tmp_path / "run", run)
        line = resume.replace(f"{tmp_path}/run", str(run))
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
        assert weights(run) == weights(tmp_path / "whole")


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
