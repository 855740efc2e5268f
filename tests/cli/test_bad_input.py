"""What the user got wrong: one message, exit code 2, and nothing on the disk changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.command import TINY, contents
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
    "short.npz": ("labels do not match the samples", "(39,)", "(40,)"),
    "objects.npz": ("Python objects", "can run any code"),
    "text.npz": ("not numbers",),
    "data.pkl": ("pickle", "was not opened"),
    "model.pt": ("pickle", "was not opened"),
    "hollow": ("hollow",),
    "notes": ("notes",),
    "images:one-hot": (":one-hot is for tables", "leave it out: images."),
    "digits:one-hot": (":one-hot is for tables", "leave it out: digits."),
    "picture.png": ("picture.png is a single image", "--out samples.npz"),
    "digitz": ("unknown data name", "did you mean digits"),
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
    "distill --teacher t --data twelve.npz": ("classes that the teacher does not have: 10, 11",),
    "distill --teacher u --guidance 2": ("guidance needs a conditional teacher", "--guidance"),
    "distill --teacher ring8 --guidance 2": ("guidance needs a conditional teacher",),
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
    "distill --teacher t --method dmd2 --divergence kl": ("dmd2 minimizes reverse KL", "f-distill"),
    "demo --divergence jss": ("unknown divergence", "did you mean js"),
    "demo --divergence tv": ("tv has no second derivative",),
    "demo --device abacus": ("device cannot be used", "'abacus'"),
    "train --net unett": ("unknown value of --net", "did you mean unet"),
    "train --device abacus": ("device cannot be used", "'abacus'"),
    "train --stepz 3": ("unknown option", "--stepz", "did you mean --steps"),
    "train --accumulate 2": ("--accumulate is an option of distmatch distill",),
    "train --tangent jvp": ("--tangent is an option of distmatch distill",),
    "distill --label-dropout 0.2": ("--label-dropout is an option of distmatch train",),
    "train --shard-size 2": ("--shard-size", "--parallel hybrid"),
    "trian": ("unknown verb", "did you mean train"),
}
VALUES = {
    "train --steps 0": ("--steps must be at least 1", "0"),
    "train --steps 1e3": ("--steps", "'1e3'", "a whole number"),
    "train --steps": ("--steps",),
    "train --batch 0": ("--batch must be at least 1",),
    "train --keep 0": ("--keep must be at least 1",),
    "train --checkpoint-every 0": ("--checkpoint-every must be at least 1",),
    "distill --teacher ring8 --student-times abc": ("--student-times", "'abc'", "numbers, separated by"),
    "distill --teacher ring8 --student-times 0.5 3": ("each below the one before", "Fix: --num-steps N"),
    "distill --teacher ring8 --size x": ("--size", "'x'", "whole numbers"),
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
    "distill --teacher t --num-steps 0": ("--num-steps must be at least 1",),
    "distill --teacher t --lr 0": ("--lr must be positive",),
    "distill --teacher t --gan-weight -1": ("--gan-weight must not be negative",),
    "distill --teacher t --noise-low 5 --noise-high 1": (
        "--noise-low 5 and --noise-high 1",
        "the first one below",
    ),
    "distill --teacher t --ratio-bins 0": ("--ratio-bins must be at least 1",),
    "distill --teacher t --ratio-memory 2": ("--ratio-memory must be in [0, 1)",),
    "distill --teacher t --order alternate --fake-score-steps 1": ("--order alternate",),
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
    "absent": ("absent does not exist", "diffusers", ".pkl of EDM", "ring8, grid25, skewed2"),
    "begun": ("begun is a run that has not finished", "distmatch train --resume --out begun"),
    "notes": ("notes contains no model",),
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
    f"train {TINY}": ("no folder was given", "--out"),
    f"train {TINY} --out t": ("t is not empty", "--resume", "--overwrite"),
    "distill --teacher t --out s": ("s is not empty", "--resume", "--overwrite"),
    "distill --teacher ring8 --out s": ("s is not empty",),
    "demo --out t": ("t is not empty", "--resume", "--overwrite"),
    f"train {TINY} --out notes --overwrite": ("not a run folder of distmatch and was left alone",),
    f"train {TINY} --out notes --resume": ("not a run folder of distmatch",),
    **{
        f"{verb} --out new --resume{dry}": ("nothing to resume", "no such folder", "check the path")
        for verb in ("train", "distill", "compare")
        for dry in ("", " --dry-run")
    },
    "distill --resume --dry-run": ("no folder was given", "--out"),
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
    "sample t --steps 0 --out a.npz": ("steps of a sampling grid",),
    "sample t --classes 12 --out a.npz": ("no such class", "8, 9"),
    "sample t --guidance nan --out a.npz": ("--guidance must be finite",),
    "sample s --steps 3 --out a.npz": ("the steps and the guidance of a student",),
    "sample u --guidance 2 --out a.npz": ("guidance needs a conditional teacher",),
    "sample": ("MODEL", "`distmatch sample --help-all`"),
    "evaluate absent": ("absent does not exist",),
    "evaluate absent.csv:one-hot images.npz": ("absent.csv:one-hot does not exist",),
    "evaluate picture.png digits": ("picture.png is a single image", "--out samples.npz"),
    "evaluate digits images.npz": ("digits is a data set", "distmatch evaluate images.npz digits"),
    "evaluate images.npz s": ("s is a run", "distmatch evaluate s images.npz"),
    "evaluate s t": ("t is a run", "distmatch sample t"),
    "evaluate s --data t/model": ("t/model is a model", "distmatch sample t/model"),
    "evaluate begun": ("begun is a run that has not finished", "distmatch train --resume --out begun"),
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
    "train --out t --resume --width 64": ("keeps its --width", "a run of 40"),
    "train --out t --resume --batch 16": ("keeps its --batch", "a run of 32"),
    "train --out t --resume --seed 1 --lr 0.1": ("keeps its --seed",),
    "train --out t --resume --data ring8": ("keeps its --data", "digits"),
    "train --out t --resume --steps 5": ("cannot become shorter", "a run of 6"),
    "distill --out s --resume --fake-score-steps 2": ("keeps its --fake-score-steps",),
    "distill --out s --resume --steps 5 --lr 0.5": ("cannot become shorter",),
    "train --out t --resume 77": ("no checkpoint of step 77", "6", "to continue from the newest"),
    "train --out t --resume absent": ("absent", "missing"),
    "train --out t --resume notes": ("missing",),
    "train --out t --resume s/checkpoints/step-000006": ("a run of another kind", "same command"),
    "distill --out s --resume t/checkpoints/step-000006": ("a run of another kind", "same command"),
    "distill --out t --resume": ("config of another verb",),
    "distill --out s --resume --method dmd2": ("keeps its method", "in a run of"),
    "distill --out s --resume --method scm": ("keeps its method", "in a run of"),
    "distill --out s --resume --divergence kl": ("keeps its divergence", "--divergence kl"),
}


@pytest.mark.parametrize("line", CHECKPOINTS)
def test_checkpoints_that_do_not_fit_change_nothing(line: str) -> None:
    refused(line if "--steps" in line else f"{line} --steps 8", *CHECKPOINTS[line])


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
        "--gan-weight 0.5 --method sid",
        "--gan-weight 0.5 --method consistency",
        "--batch 1 --method mmd",
        "--student-sigma 0.001 --method scm",
        "--student-sigma 200",
        "--noise-low 3 --noise-high 2",
    ],
)
def test_distillation_settings_that_cannot_be_used(option: str) -> None:
    refused(f"distill --teacher t {option} --dry-run", option.split()[0])
