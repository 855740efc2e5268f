"""`distmatch evaluate SAMPLES REFERENCE --divergences ...`: the table, the JSON, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distmatch.data import digits
from distmatch.metrics.names import EVERYTHING
from tests.helpers.command import command, contents, done

ROW = {"value", "stderr", "n", "estimator", "meaning"}
MAYBE = {"warning", "largest", "p_value", "resamples", "test_n"}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of sample files: p is N(1, 1) and q is N(0, 1) on the line, and what is no sample file."""
    folder = tmp_path_factory.mktemp("between")
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISTMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        np.savez("p.npz", x=(1 + rng.standard_normal((1500, 1))).astype(np.float32))
        np.savez("q.npz", x=rng.standard_normal((1500, 1)).astype(np.float32))
        np.save("plane.npy", rng.standard_normal((300, 2)).astype(np.float32))
        np.savez("few.npz", x=rng.standard_normal((20, 1)))
        np.savez("holes.npz", x=np.where(rng.random((50, 1)) < 0.1, np.nan, 1.0))
        real = digits()
        pictures, labels = real.raw.numpy()[:, 0], np.asarray(real.labels)
        pictures = (pictures * (255 / pictures.max())).astype(np.uint8)
        order = rng.permutation(len(pictures))
        np.savez("real.npz", x=pictures[order[:800]], labels=labels[order[:800]])
        rest = order[800:]
        np.savez("more.npz", x=pictures[rest])
        np.savez("lost.npz", x=pictures[rest][labels[rest] < 7])
        Path("run").mkdir()
        Path("run/config.toml").write_text('verb = "distill"\n')
        Path("model").mkdir()
        Path("model/model.safetensors").write_bytes(b"")
        yield folder


@pytest.mark.statistical
def test_known_laws_give_known_numbers() -> None:
    answer = done("evaluate q.npz p.npz --divergences all --json").json()
    assert set(answer) == {"p", "q", "features", "seed", "estimates", "not_computed", "notes"}
    assert (answer["p"], answer["q"]) == ("p.npz", "q.npz")
    rows = answer["estimates"]
    assert set(rows) | set(answer["not_computed"]) == set(EVERYTHING)
    for row in rows.values():
        assert set(row) >= ROW
        assert set(row) <= ROW | MAYBE
    assert rows["js"]["largest"] == pytest.approx(math.log(2))
    # 4 standard errors: see tests/metrics/test_between.py
    for name, truth in (("kl_neighbors", 0.5), ("wasserstein", 1.0), ("frechet", 1.0), ("sinkhorn", 0.5)):
        assert abs(rows[name]["value"] - truth) < 4 * rows[name]["stderr"], name
    for name, truth in (("kl", 0.5), ("reverse_kl", 0.5), ("js", 0.1114), ("tv", 0.3829)):
        assert rows[name]["value"] < truth + 4 * rows[name]["stderr"]
        assert rows[name]["value"] > truth / 2
        assert rows[name]["meaning"].startswith("lower bound")
    assert rows["mmd"]["p_value"] == rows["energy"]["p_value"] == 0.001


@pytest.mark.slow
def test_the_reference_is_p_and_comes_second_or_as_data(place: Path) -> None:
    wide = place / "wide.npz"
    np.savez(wide, x=3 * np.random.default_rng(1).standard_normal((1500, 1)).astype(np.float32))
    both = [
        done(f"evaluate {b} {a} --divergences kl,kl_neighbors --json").json()["estimates"]
        for a, b in (("wide.npz", "q.npz"), ("q.npz", "wide.npz"))
    ]
    as_data = done("evaluate q.npz --data wide.npz --divergences kl,kl_neighbors --json").json()
    wide.unlink()
    assert as_data["estimates"] == both[0]
    # KL is 2.90 from the wide one to the narrow one and 0.65 the other way round.
    for name in ("kl", "kl_neighbors"):
        assert both[0][name]["value"] > 1.2
        assert both[1][name]["value"] < 0.9


@pytest.mark.slow
def test_the_table_has_a_row_for_each_name_in_the_order_asked_for() -> None:
    answer = done("evaluate q.npz p.npz --divergences mmd,js,fkl,renyi:2,gjs:0.3,fisher,mmd:laplace")
    lines = answer.out.splitlines()
    assert lines[0] == "p (the reference) = p.npz, q (the samples) = q.npz"
    names = [line.split()[0] for line in lines[3:9]]
    assert names == ["mmd", "js", "kl", "renyi:2", "gjs:0.3", "mmd:laplace"]
    assert ">= " in lines[4]
    assert "0.693" in lines[4]
    assert ">= " not in lines[3]
    assert "not computed: fisher needs the scores" in answer.out
    assert "999 resamples of at most 1500 samples" in answer.out
    assert "divergence may be far above" in answer.out


def test_warnings_stand_below_the_table() -> None:
    answer = done("evaluate q.npz q.npz --divergences wasserstein")
    row = next(line for line in answer.out.splitlines() if line.startswith("wasserstein"))
    assert "[1]" in row
    assert "[1] wasserstein: not distinguishable from 0" in answer.out
    assert "note: 1500 samples are in both sets" in answer.out


@pytest.mark.slow
def test_a_seed_decides_everything() -> None:
    line = "evaluate q.npz p.npz --divergences js,kl_neighbors,energy --n 300 --json"
    first, again, other = (done(f"{line} --seed {seed}").json()["estimates"] for seed in (0, 0, 1))
    assert first == again
    assert first["js"] != other["js"]


@pytest.mark.slow
def test_images_by_pixels_and_by_classifier() -> None:
    names = "--divergences js,energy,frechet --json"
    same = done(f"evaluate more.npz real.npz {names}").json()
    lost = done(f"evaluate lost.npz real.npz {names}").json()
    assert same["estimates"]["energy"]["p_value"] > 0.05
    assert lost["estimates"]["energy"]["p_value"] == 0.001
    assert "warning" not in lost["estimates"]["energy"]
    assert "64 pixel values" in same["notes"][0]
    seen = done(f"evaluate lost.npz real.npz {names} --features classifier").json()
    # Three digits in ten are missing: JS of the labels is 0.107.
    assert seen["estimates"]["js"]["value"] > 0.03
    assert "classifier of p's labels" in seen["notes"][0]


def test_a_toy_can_be_either_side() -> None:
    first = done("evaluate plane.npy ring8 --divergences kernel_stein,energy --n 300 --json").json()
    second = done("evaluate ring8 plane.npy --divergences kernel_stein,energy --n 300 --json").json()
    for answer, whose in ((first, "samples of q, score of p"), (second, "samples of p, score of q")):
        row = answer["estimates"]["kernel_stein"]
        assert whose in row["meaning"]
        assert row["p_value"] == 0.001
        assert row["n"] == 300


def test_two_draws_of_a_toy_are_not_the_same_draw() -> None:
    answer = done("evaluate ring8 ring8 --divergences energy,kernel_stein --n 400 --json").json()
    assert answer["notes"] == []
    for row in answer["estimates"].values():
        assert row["p_value"] > 0.01  # one or two seeds in a hundred are below


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("q.npz p.npz --data p.npz", ("two references", "p.npz")),
        ("p.npz --divergences all", ("two sets of samples", "the reference is p")),
        ("q.npz p.npz --divergences all --data digits", ("--data",)),
        ("q.npz p.npz --divergences all --teacher t", ("--teacher",)),
        ("plane.npy p.npz --divergences all", ("differ", "(1,)", "(2,)")),
        ("plane.npy real.npz --divergences all", ("differ", "images", "vectors")),
        ("few.npz p.npz --divergences all", ("too few samples of q", "20", "40")),
        ("q.npz p.npz --divergences js --n 10", ("too few samples", "10", "40")),
        ("holes.npz p.npz --divergences all", ("holes.npz", "not finite")),
        ("q.npz run --divergences all", ("run is a model", "distmatch sample run")),
        ("model p.npz --divergences all", ("model is a model", "distmatch sample model")),
        ("absent.npz p.npz --divergences all", ("absent.npz does not exist",)),
        ("q.npz p.npz --divergences js,helinger", ("'helinger'", "did you mean hellinger")),
        ("q.npz p.npz --divergences mmd:cosine", ("kernel", "laplace")),
        ("q.npz p.npz --divergences skew_kl", ("skew_kl:0.5",)),
        ("q.npz p.npz --divergences ,", ("no divergence was named",)),
        ("q.npz p.npz --divergences fisher", ("none of these can be computed",)),
        ("q.npz p.npz --divergences js --features classifier", ("labels",)),
        ("q.npz p.npz --divergences js --features pixel", ("did you mean pixels",)),
    ],
)
def test_what_cannot_be_is_refused(line: str, words: tuple[str, ...], place: Path) -> None:
    before = contents(place)
    answer = command(f"evaluate {line}")
    assert answer.code == 2, answer
    assert answer.out == ""
    messages = [text for text in answer.err.splitlines() if not text.startswith("divergences: ")]
    assert len(messages) == 1, answer.err
    for word in words:
        assert word in messages[0], messages[0]
    assert contents(place) == before


def test_json_is_finite_and_alone_on_stdout() -> None:
    answer = done("evaluate q.npz p.npz --divergences js,frechet --json")
    json.loads(answer.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "divergences" not in answer.out


def test_other_shares_of_classes_are_told(tmp_path: Path) -> None:
    """Of the two sets by their names, where both have labels."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((300, 2)).astype(np.float32)
    common = {"class_names": ["cat", "dog"]}
    np.savez(tmp_path / "even.npz", x=x, labels=np.arange(300) % 2, **common)
    np.savez(tmp_path / "cats.npz", x=x[::-1], labels=np.arange(300) % 10 > 7, **common)
    np.savez(tmp_path / "swapped.npz", x=x[::-1], labels=1 - np.arange(300) % 2, class_names=["dog", "cat"])
    np.savez(tmp_path / "birds.npz", x=x[::-1], labels=np.arange(300) % 2, class_names=["owl", "wren"])
    np.savez(tmp_path / "none.npz", x=x[::-1])

    def warned(samples: str) -> str:
        line = f"evaluate {tmp_path}/{samples}.npz {tmp_path}/even.npz --divergences energy --json"
        return " ".join(done(line).json().get("warnings", []))

    assert "class cat: 80.0% of the samples, 50.0% of the real data" in warned("cats")
    assert "not compared" in warned("birds")
    assert warned("none") == warned("swapped") == ""
