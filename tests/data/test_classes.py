"""Classes keep their names from the data through training to what is sampled, and are matched by them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data import Dataset, from_arrays, load_data
from distmatch.data.classes import (
    Classes,
    class_named,
    drawn_labels,
    folder_names,
    from_folder_name,
    matched,
    names_of,
    share_warning,
)
from distmatch.methods.student import Student
from distmatch.training.known_data import known_data, remember, seen_by
from distmatch.training.models import open_model
from distmatch.training.options import DistillOptions
from distmatch.training.prepare import prepare_distillation
from tests.helpers.command import SHORT, TINY, command, done

COUNTS = (6, 5, 4, 7, 5, 6, 5, 4, 6, 5, 4, 90)


def pictures(labels: list[int]) -> np.ndarray:
    """Pictures (n, 4, 4) whose first pixel says which class they are of, and whose others are noise."""
    x = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4), dtype=np.uint8)
    x[:, 0, 0] = np.array(labels) * 10
    return x


def write_folders(place: Path, labels: list[int], names: list[str]) -> None:
    for k, (image, label) in enumerate(zip(pictures(labels), labels, strict=True)):
        (place / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / names[label] / f"{k:04}.png")


def true_classes(data: Dataset) -> list[int]:
    return (data.raw[:, 0, 0, 0] // 10).tolist()


def labels_of(data: Dataset) -> list[int]:
    assert data.labels is not None
    return data.labels.tolist()


EVERY = [k for k, count in enumerate(COUNTS) for _ in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Twelve numbered classes as folders and as an archive, a teacher of them, and its student."""
    folder = tmp_path_factory.mktemp("classes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISTMATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        write_folders(folder / "numbers", EVERY, [str(k) for k in range(12)])
        words = ["cat", "dog", "T-shirt/top", *"abcdefghi"]
        np.savez("words.npz", x=pictures(EVERY), labels=EVERY, class_names=words)
        done(f"train --data numbers {TINY} {SHORT} --out t")
        done(f"train --data words.npz {TINY} {SHORT} --out w")
        done(f"distill --teacher t --method diff-instruct {SHORT} --out s")
        yield folder


def test_numbered_folders_are_in_order_of_their_numbers(place: Path) -> None:
    data = load_data(place / "numbers")
    assert data.class_names == tuple(str(k) for k in range(12))
    assert labels_of(data) == true_classes(data)


def test_folders_with_a_gap_keep_their_numbers(tmp_path: Path) -> None:
    """Without folder 5 the class of folder 7 is still 7 for whoever has all twelve."""
    gap = [label for label in EVERY if label != 5]
    write_folders(tmp_path, gap, [str(k) for k in range(12)])
    data = load_data(tmp_path)
    assert data.num_classes == 11
    numbers = tuple(str(k) for k in range(12))
    for names in (numbers, (), tuple("abcdefghijkl")):  # numbers, a model without names, words
        seen = matched(data, names, 12, "the teacher")
        assert labels_of(seen) == true_classes(data)
        assert seen.num_classes == 12
    with pytest.raises(UserError, match=r"does not have: 5\.") as error:
        matched(from_arrays(pictures(EVERY), EVERY), data.class_names, 11, "the teacher")
    assert "0, 1, 2, 3, 4, 5, 6" in str(error.value)
    assert "0, 1, 2, 3, 4, 6, 7" in str(error.value)


def test_words_are_matched_by_name_in_any_order() -> None:
    data = from_arrays(pictures([0, 1, 2, 1]), [0, 1, 2, 1], class_names=["dog", "cat", "cow"])
    assert labels_of(matched(data, ("cat", "cow", "dog"), 3, "the teacher")) == [2, 0, 1, 0]
    assert labels_of(matched(data, ("cat", "ant", "cow", "dog"), 4, "the teacher")) == [3, 0, 2, 0]
    assert matched(data, (), 3, "the teacher").class_names == ("dog", "cat", "cow")
    for names, count in ((("cat", "dog"), 2), ((), 4), (("0", "1", "2"), 3)):
        with pytest.raises(UserError, match="dog, cat, cow"):
            matched(data, names, count, "the teacher")


def test_only_classes_that_occur_need_a_match() -> None:
    data = from_arrays(pictures([0, 1, 0]), [0, 1, 0], class_names=["dog", "cat", "cow"])
    assert labels_of(matched(data, ("cat", "dog"), 2, "the teacher")) == [1, 0, 1]
    unlabeled = data.without_labels()
    assert matched(unlabeled, ("cat", "dog"), 2, "the teacher") is unlabeled


def test_names_and_counts_are_kept_with_teacher_and_student(place: Path) -> None:
    for run in ("t", "s"):
        about = json.loads((place / run / "model" / "config.json").read_text())["extra"]["data"]
        assert about["class_names"] == [str(k) for k in range(12)]
        assert about["class_counts"] == list(COUNTS)
        assert open_model(str(place / run)).classes == Classes(tuple(map(str, range(12))), COUNTS)
    assert Student.from_pretrained(place / "s").classes.counts == COUNTS


def test_a_teacher_in_memory_knows_its_classes(place: Path, tmp_path: Path) -> None:
    teacher = dm.load_teacher(place / "t")
    assert known_data(teacher)["class_counts"] == list(COUNTS)
    write_folders(tmp_path / "gap", [k for k in EVERY if k != 5], [str(k) for k in range(12)])
    settings = {"steps": 5, "batch": 8, "quiet": True}
    student = dm.distill(teacher, load_data(tmp_path / "gap"), method="diff-instruct", **settings)
    assert student.classes.names[5:7] == ("5", "6")
    assert student.classes.counts == (*COUNTS[:5], 0, *COUNTS[6:])
    trained = dm.train(load_data(tmp_path / "gap"), net="mlp", width=8, depth=1, **settings)
    assert Classes.from_dict(known_data(trained), 11).names[5] == "6"
    with pytest.raises(UserError, match="does not have: 5"):
        dm.distill(trained, load_data(place / "numbers"), method="diff-instruct", **settings)


def test_samples_carry_the_names_and_are_read_again(place: Path, tmp_path: Path) -> None:
    done(f"sample {place}/t --steps 2 --n 300 --out {tmp_path}/folder")
    done(f"sample {place}/t --steps 2 --n 300 --out {tmp_path}/a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
        assert saved["class_names"].tolist() == [str(k) for k in range(12)]
        asked = saved["labels"]
    again = matched(load_data(tmp_path / "folder"), tuple(map(str, range(12))), 12, "the teacher")
    assert np.bincount(labels_of(again), minlength=12).tolist() == np.bincount(asked, minlength=12).tolist()
    assert command(f"evaluate {tmp_path}/folder --data {place}/numbers --features pixels").code == 0
    answer = command(f"evaluate {tmp_path}/folder --data {place}/words.npz --features pixels --json")
    assert answer.code == 0  # numbers are numbers where the other side has words


def test_words_come_back_as_safe_folders(place: Path, tmp_path: Path) -> None:
    done(f"sample {place}/w --steps 2 --n 24 --classes cat T-shirt/top 4 --out {tmp_path}/folder")
    assert sorted(f.name for f in (tmp_path / "folder").iterdir()) == ["T-shirt%2Ftop", "b", "cat"]
    assert load_data(tmp_path / "folder").class_names == ("T-shirt/top", "b", "cat")
    assert "cat, dog" in command(f"sample {place}/w --classes cow --out {tmp_path}/x.npz").err


@pytest.mark.parametrize(
    "names",
    [
        ["../../etc/passwd", "a"],
        [".hidden", ".."],
        ["100%", "50%25"],
        ["<script>", "a\u202eb"],
        ["nul\0", "a\nb"],
        ["a\\b", 'c"d'],
        ["caf\u00e9", "\u732b"],
    ],
)
def test_folder_names_are_safe_and_give_the_name_back(names: list[str]) -> None:
    found = folder_names(names)
    assert [from_folder_name(name) for name in found] == names
    for name in found:
        assert not set(name) & set('/\\\0<>"')
        assert name.isprintable()
        assert not name.startswith(".")


def test_names_that_no_folder_can_have_become_numbers() -> None:
    for names in (["", "a"], ["Cat", "cat"], ["x" * 300, "a"], [" a", "b"]):
        assert folder_names(names) == ["0", "1"]
    with pytest.raises(UserError, match="not UTF-8"):
        from_folder_name("a\udcff")
    assert from_folder_name("100%") == "100%"  # nobody quoted this


@pytest.mark.statistical
def test_classes_are_drawn_in_the_shares_of_the_training_data(place: Path, tmp_path: Path) -> None:
    """10,000 draws, seed 0: each share within 4 sigma of its own; the share of class 11 is 90 of 147."""
    student = Student.from_pretrained(place / "s")
    n = 10_000
    for balance, due in (
        ("data", np.array(COUNTS) / sum(COUNTS)),
        ("uniform", np.full(12, 1 / 12)),
    ):
        drawn = drawn_labels(n, 12, 0, student.classes.counts, balance)  # type: ignore[arg-type]
        got = np.bincount(drawn.numpy(), minlength=12) / n
        assert (abs(got - due) < 4 * np.sqrt(due * (1 - due) / n)).all()
        x = student.sample(64, seed=0, class_balance=balance)  # type: ignore[arg-type]
        torch.testing.assert_close(x, student.sample(64, seed=0, conditioning=drawn[:64]), rtol=0, atol=0)
    answer = done(f"sample {place}/s --n 200 --out {tmp_path}/a.npz --json")
    assert answer.json()["class_balance"] == "data"
    even = done(f"sample {place}/s --n 200 --class-balance uniform --out {tmp_path}/b.npz")
    assert "evenly" in even.out
    shares = []
    for name in "ab":
        with np.load(tmp_path / f"{name}.npz") as saved:
            shares.append((saved["labels"] == 11).mean())
    assert shares[0] > 0.45
    assert shares[1] < 0.2
    assert command(f"sample {place}/s --classes 3 --class-balance uniform --out {tmp_path}/c.npz").code == 2


def test_even_draws_leave_out_classes_that_were_not_there() -> None:
    assert set(drawn_labels(500, 3, 0, (5, 0, 2), "uniform").tolist()) == {0, 2}
    assert set(drawn_labels(500, 3, 0).tolist()) == {0, 1, 2}
    longer = drawn_labels(500, 3, 0, (5, 1, 2))
    assert longer[:40].tolist() == drawn_labels(40, 3, 0, (5, 1, 2)).tolist()


def test_a_model_without_names_or_counts_works(place: Path, tmp_path: Path) -> None:
    """As models that were saved before these were kept."""
    for kept, told in ((("class_names",), "does not record how often"), ((), "does not record")):
        config = json.loads((place / "s" / "model" / "config.json").read_text())
        data = config["extra"]["data"]
        config["extra"]["data"] = {k: v for k, v in data.items() if not k.startswith("class_") or k in kept}
        old = tmp_path / f"old{len(kept)}"
        (old / "model").mkdir(parents=True)
        (old / "model" / "config.json").write_text(json.dumps(config))
        (old / "model" / "model.safetensors").write_bytes(
            (place / "s" / "model" / "model.safetensors").read_bytes()
        )
        assert told in done(f"sample {old} --n 8 --out {old}/x.npz").out


@pytest.mark.parametrize(
    "wrong",
    [{"class_names": 3}, {"class_counts": ["a", 1]}, {"class_counts": [-1, 3]}, {"class_counts": [0, 0]}],
)
def test_names_and_counts_of_a_damaged_config_are_not_used(wrong: dict[str, object]) -> None:
    assert Classes.from_dict(wrong, 2) == Classes()


def test_other_shares_are_said(place: Path, tmp_path: Path) -> None:
    """A false alarm has a chance of 1 in 1000: of 1000 pairs (seed 0) 1, at most 4 (3 sigma)."""
    done(f"sample {place}/s --n 200 --class-balance uniform --out {tmp_path}/even.npz")
    done(f"sample {place}/s --n 200 --out {tmp_path}/due.npz")
    even = command(f"evaluate {tmp_path}/even.npz --data {place}/numbers --features pixels")
    due = command(f"evaluate {tmp_path}/due.npz --data {place}/numbers --features pixels")
    assert "class 11" in even.err
    assert "class proportions" not in due.err
    p = torch.tensor([0.91, 0.09], dtype=torch.float64)
    gen = torch.Generator().manual_seed(0)
    draws = [torch.multinomial(p, 400, replacement=True, generator=gen) for _ in range(2000)]
    alarms = sum(
        share_warning(a, b, ("0", "1")) is not None for a, b in zip(draws[::2], draws[1::2], strict=True)
    )
    assert alarms <= 4
    assert share_warning(torch.zeros(10).long(), torch.zeros(10).long(), ("0", "1")) is None


def test_classes_by_name_or_number() -> None:
    assert class_named("cat", ("dog", "cat"), 2) == 1
    assert class_named("1", ("dog", "cat"), 2) == 1
    assert class_named("1", (), 2) == 1
    assert class_named("7", ("5", "7"), 2) == 1
    assert class_named("-1", ("5", "7"), 2) == -1
    for text, names in (("1", ("5", "7")), ("2", ()), ("cow", ("dog", "cat")), ("1.5", ())):
        with pytest.raises(UserError, match="no such class"):
            class_named(text, names, 2)


def test_columns_are_scaled_as_the_model_scales_them() -> None:
    """Other rows of the same table must not be stretched to the range of the first."""
    whole = from_arrays(np.linspace(0, 100, 50, dtype=np.float32)[:, None])
    half = from_arrays(np.linspace(0, 50, 50, dtype=np.float32)[:, None])
    seen = seen_by(half, {"scaling": whole.scaling.to_dict()}, 0, "the teacher")
    assert float(seen.batch(torch.arange(50))[0].max()) == 0.0
    assert names_of(seen) == ()


def test_what_is_known_is_found_inside_wrappers() -> None:
    class Holder:
        inner: object = None

    inner, outer = Holder(), Holder()
    remember(inner, {"class_names": ["a"]})
    outer.inner = inner
    assert known_data(outer) == {"class_names": ["a"]}
    assert known_data(Holder()) == {}


def test_models_that_work_together_number_classes_alike(place: Path, tmp_path: Path) -> None:
    """Both have twelve classes: class 3 of one is another than class 3 of the other."""
    for option in ("--guidance 2 --guidance-reference w", "--hybrid-teacher w"):
        model = "s" if "hybrid" in option else "t"
        answer = command(f"sample {model} {option} --n 8 --out {tmp_path}/a.npz")
        assert answer.code == 2
        assert "cat" in answer.err
    assert command(f"sample t --guidance 2 --guidance-reference t --n 8 --out {tmp_path}/a.npz").code == 0


def test_without_data_a_student_is_asked_for_the_teachers_shares(place: Path) -> None:
    """2000 labels, seed 0; class 11 is 90 of 147, within 4 sigma."""
    teacher = dm.load_teacher(place / "t")
    options = DistillOptions.of("diff-instruct")
    job = prepare_distillation(replace(options, run=replace(options.run, batch=2000)), teacher, fresh=False)
    labels = job.batches(0).conditioning["label"]
    assert labels is not None
    due = 90 / 147
    assert abs(float((labels == 11).double().mean()) - due) < 4 * (due * (1 - due) / 2000) ** 0.5
    assert not torch.equal(labels, job.batches(1).conditioning["label"])
    assert job.result().classes.counts == COUNTS
