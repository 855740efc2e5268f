"""Tables: CSV in and out, words, missing values, values that float32 cannot hold, and ranges."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.data import Scaling, from_arrays, load_data
from distmatch.data.columns import Column, columns_of, table_text
from distmatch.training.known_data import describe_data, seen_by
from distmatch.training.noisy_data import with_frozen_noise
from distmatch.training.ranges import Range
from tests.helpers.command import SHORT, TINY, command, done

RNG = np.random.default_rng(0)
TABLE = """price,city,size,label
0,Bonn,1.5,cheap
250.25,"Ulm, old",2,dear
99,Bonn,3.5,cheap
101,Ulm,-2,cheap
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A table of 60 flats, with a word, a class and prices that are never negative, and a teacher of it."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = np.random.default_rng(1)
        rows = [
            f"{rng.integers(0, 90)},{rng.choice(['Bonn', 'Ulm', 'Kiel'])},{1.7e9 + 500 * rng.random()!r},"
            f"{rng.choice(['new', 'old'])}"
            for _ in range(60)
        ]
        Path("flats.csv").write_text("\n".join(["price,city,sold,label", *rows]))
        done(f"train --data flats.csv:one-hot {TINY} {SHORT} --out t")
        yield folder


def test_a_table_is_read_with_names_words_and_classes(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", TABLE)
    data = load_data(f"{path}:one-hot")
    assert data.columns == (Column("price"), Column("city", ("Bonn", "Ulm", "Ulm, old")), Column("size"))
    assert data.class_names == ("cheap", "dear")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 0, 0]
    assert data.raw.tolist() == [
        [0, 1, 0, 0, 1.5],
        [250.25, 0, 0, 1, 2],
        [99, 1, 0, 0, 3.5],
        [101, 0, 1, 0, -2],
    ]
    assert load_data(f"{path}:one-hot", labels=False).labels is None
    text = table_text(data.columns, data.raw.numpy(), data.labels.numpy(), data.class_names)
    again = load_data(f"{written(tmp_path / 'u.csv', text)}:one-hot")
    assert torch.equal(again.raw, data.raw)
    assert (again.columns, again.class_names) == (data.columns, data.class_names)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a;b\n1;2\n3;4\n", ["a", "b"]),
        ("a\tb\n1\t2\n3\t4\n", ["a", "b"]),
        ("\ufeffa,b\n1,2\n\n3,4\n", ["a", "b"]),
        ("1,2\n3,4\n", ["column 1", "column 2"]),
        ("a,\r\n1,2\r\n3,4\r\n", ["a", "column 2"]),
    ],
)
def test_forms_of_a_table(tmp_path: Path, text: str, names: list[str]) -> None:
    data = load_data(written(tmp_path / "t.csv", text))
    assert data.raw.tolist() == [[1, 2], [3, 4]]
    assert [column.name for column in data.columns] == names


@pytest.mark.parametrize("empty", ["", "NA", "nan", "NULL", "?", " "])
def test_missing_values_are_named(tmp_path: Path, empty: str) -> None:
    path = written(tmp_path / "t.csv", f"a,b\n1,2\n3,{empty}\n5,6\n")
    for spec in (path, f"{path}:one-hot"):
        with pytest.raises(UserError, match=r"missing in the column b.*1 of 3.*row 2"):
            load_data(spec)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TABLE, r"column city contains text.*'Bonn' in row 1.*t\.csv:one-hot"),
        ("a,b\n1,2\nx,3\n5,6\n", r"column a contains numbers and text.*'x' in row 2"),
        ("a,b\n1_0,2\n1_1,3\n", "column a contains text"),
        ("a,b\n1,2\n3\n", "row 2 is not as long"),
        ("a,a\n1,2\n3,4\n", "two columns of one name"),
        ("a,b\n", "has no rows"),
        ("", "is empty"),
        ("label\n1\n2\n", "no column besides"),
        ("a,label\n1,0.5\n2,1\n", "whole number.*0.5"),
        ("a,label\n1,x\n2,\n", "missing in the column label"),
        ("a,b\n1,inf\n2,3\n", "column b.*'inf' in row 1"),
        ("a,b\n1,2\n1,2\n", "all samples are the same"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_data(written(tmp_path / "t.csv", text))


def test_words_that_cannot_be_encoded(tmp_path: Path) -> None:
    rows = "\n".join(f"{k},name {k}" for k in range(150))
    path = written(tmp_path / "t.csv", f"a,who\n{rows}\n")
    with pytest.raises(UserError, match="too many different words"):
        load_data(f"{path}:one-hot")
    with pytest.raises(UserError, match="option of a table"):
        load_data(f"{path}:ordinal")
    (tmp_path / "b.csv").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(UserError, match="as a table"):
        load_data(tmp_path / "b.csv")


def test_numbers_of_classes_are_in_order_and_keep_their_gaps(tmp_path: Path) -> None:
    data = load_data(written(tmp_path / "t.csv", "a,Label\n1,10\n2,2.0\n3,7\n"))
    assert data.class_names == ("2", "7", "10")
    assert data.labels is not None
    assert data.labels.tolist() == [2, 0, 1]


def test_a_table_goes_in_and_comes_back(place: Path, tmp_path: Path) -> None:
    said = done(f"sample {place}/t --steps 2 --n 200 --out {tmp_path}/x.csv --json").json()
    header, first, *_ = (tmp_path / "x.csv").read_text().splitlines()
    assert header == "price,city,sold,label"
    _, city, sold, label = first.split(",")
    assert city in ("Bonn", "Ulm", "Kiel")
    assert label in ("new", "old")
    assert abs(float(sold) - 1.7e9) < 1e4
    real = load_data(f"{place}/flats.csv:one-hot")
    again = load_data(tmp_path / "x.csv", columns=real.columns)
    assert again.columns == real.columns
    prices = again.raw[:, 0]
    assert (prices < 0).any()  # a teacher of six steps: nothing keeps its prices above zero
    assert said["below_zero"] == {"price": pytest.approx(float((prices < 0).double().mean()))}
    assert 0 < said["outside_range"] < 1
    answer = done(f"evaluate {tmp_path}/x.csv --data {place}/flats.csv:one-hot --features pixels")
    assert "fd" in answer.out


def test_options_of_a_table_on_both_sides(place: Path, tmp_path: Path) -> None:
    """What is measured may be named as the reference is; and a student of a table is drawn as one."""
    flats = f"{place}/flats.csv:one-hot"
    assert "fd" in done(f"evaluate {flats} {flats} --features pixels").out
    line = f"distill --teacher {place}/t {SHORT}"
    for method in ("f-distill", "sid"):  # with real data, and without
        assert "--n 64 --out samples.csv" in done(f"{line} --method {method} --out {tmp_path}/{method}").out


def test_columns_of_whole_numbers_stay_whole(place: Path, tmp_path: Path) -> None:
    done(f"sample {place}/t --steps 2 --n 200 --out {tmp_path}/x.csv")
    done(f"sample {place}/t --steps 2 --n 200 --out {tmp_path}/x.npz")
    _, *rows = (tmp_path / "x.csv").read_text().splitlines()
    price, sold = ([row.split(",")[k] for row in rows] for k in (0, 2))
    assert all(re.fullmatch(r"-?[1-9]\d*|0", cell) for cell in price)
    assert all("." in cell for cell in sold)  # of fractions
    plain = np.load(tmp_path / "x.npz")["x"][:, 0]
    assert np.abs(plain - np.rint(plain)).max() > 0.1
    np.testing.assert_array_equal(np.array(price, float), np.rint(plain))
    like = (Column("a", whole=True), Column("w", ("x", "y")), Column("b"))
    x = np.array([[-0.4, 0.2, 0.8, 1.5], [2.5e18, 1, 0, -2]])
    assert table_text(like, x) == "a,w,b\n0,y,1.5\n2500000000000000000,x,-2.0\n"
    data = load_data(written(tmp_path / "t.csv", "a,b,c\n1,2.0,2.5\n3,4,5\n"))
    assert [c.whole for c in data.columns] == [True, True, False]
    again = columns_of({"columns": [c.to_dict() for c in data.columns]})
    assert [c.whole for c in again] == [True, True, False]
    assert again == (Column("a"), Column("b"), Column("c"))  # a part may be whole by chance


def test_clipping_is_asked_for(place: Path, tmp_path: Path) -> None:
    plain = done(f"sample {place}/t --steps 2 --n 200 --out {tmp_path}/a.csv")
    assert "negative values" in plain.out
    assert "price" in plain.out
    done(f"sample {place}/t --steps 2 --n 200 --clip --out {tmp_path}/b.csv")
    real = load_data(f"{place}/flats.csv:one-hot")
    clipped = load_data(tmp_path / "b.csv", columns=real.columns)
    assert (clipped.raw.amin(0) >= real.raw.amin(0)).all()
    assert (clipped.raw.amax(0) <= real.raw.amax(0)).all()
    assert command(f"sample ring8 --clip --n 8 --out {tmp_path}/c.npz").code == 2


def test_other_tables_must_have_the_same_columns(place: Path, tmp_path: Path) -> None:
    real = load_data(f"{place}/flats.csv:one-hot")
    path = written(tmp_path / "t.csv", "sold,city,price\n1,Ulm,2\n3,Bonn,4\n")
    assert load_data(path, columns=real.columns).raw.tolist() == [[2, 0, 0, 1, 1], [4, 1, 0, 0, 3]]
    about = describe_data(real, "")
    with pytest.raises(UserError, match=r"other columns.*sold, city, price.*price, city, sold"):
        seen_by(load_data(f"{path}:one-hot"), about, 0, "the teacher")
    with pytest.raises(UserError, match=r"a word that the other data do not have.*'Hof'"):
        load_data(written(path, "sold,city,price\n1,Hof,2\n3,Bonn,4\n"), columns=real.columns)
    with pytest.raises(UserError, match="other columns"):
        load_data(written(path, "a,b\n1,2\n3,4\n"), columns=real.columns)


def test_columns_of_models_that_say_none_are_numbered() -> None:
    assert columns_of({}, 2) == (Column("column 1"), Column("column 2"))
    assert columns_of({"columns": [{"name": "a", "values": []}]}, 2)[1].name == "column 2"
    assert columns_of({"columns": 3}, 1) == (Column("column 1"),)
    assert Range.of({}) is None
    assert Range.of({"minimum": [0.0], "maximum": ["x"]}) is None


@pytest.mark.parametrize("kind", [np.float64, torch.float64, np.int64])
def test_columns_far_from_zero_keep_their_values(kind: object) -> None:
    """Seconds since 1970 within a thousand: 5000 draws of which float32 keeps 9, or fewer of whole ones."""
    values = 1.7e9 + np.random.default_rng(0).uniform(0, 1000, (5000, 1))
    given = torch.tensor(values) if kind is torch.float64 else values.astype(kind)  # type: ignore[call-overload]
    exact = np.asarray(given, dtype=np.float64)
    data = from_arrays(given)
    x, _ = data.batch(torch.arange(5000))
    assert x.dtype == torch.float32
    assert float(x.min()) == -1
    assert float(x.max()) == 1
    assert len(torch.unique(x)) >= 0.999 * len(np.unique(exact))
    scaling = Scaling.from_dict(data.scaling.to_dict())
    assert scaling == data.scaling
    back = scaling.export(x)
    assert back.dtype == np.float64
    assert np.abs(back - exact).max() < 1e-4  # 500 times the rounding of float32


def test_ordinary_columns_stay_in_float32() -> None:
    for values in (RNG.normal(3, 100, (50, 2)), RNG.random((50, 2)), RNG.integers(0, 9, (50, 2))):
        data = from_arrays(values)
        assert data.raw.dtype == torch.float32
        assert "precise" not in data.scaling.to_dict()


def test_noise_that_is_frozen_keeps_precise_columns() -> None:
    data = from_arrays(1.7e9 + RNG.uniform(0, 1000, (500, 1)))
    noisy, _ = with_frozen_noise(data, 0.1, 0.0, 0)
    assert len(torch.unique(noisy.raw)) > 490


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_column_that_its_far_values_flatten_is_named(dtype: type) -> None:
    values = RNG.random((200, 3)).astype(dtype)
    values[0, 1] = 1e12
    with pytest.raises(UserError, match=r"column 1 .*logarithm"):
        from_arrays(values)
    three = np.array([[0.0], [1.0], [1e10], [0.0]], dtype=dtype)  # of three values two would be one
    with pytest.raises(UserError, match="3 different values become 2"):
        from_arrays(three)
    heavy = np.random.default_rng(0).standard_cauchy((20_000, 1)).astype(dtype)
    assert len(from_arrays(heavy)) == 20_000


def test_samples_are_measured_as_rows_of_the_table(place: Path, tmp_path: Path) -> None:
    """The same samples soft, in an .npz, and as the rows of a .csv: the same figures."""
    for form in ("csv", "npz"):
        done(f"sample {place}/t --steps 2 --n 120 --out {tmp_path}/x.{form}")
    against = f"{place}/flats.csv:one-hot --features pixels --json"
    rows, soft = (done(f"evaluate {tmp_path}/x.{form} {against}").json() for form in ("csv", "npz"))
    assert soft["samples"] == rows["samples"]
    assert any("rows of the table" in note for note in soft["evaluation"]["notes"])
    assert any("30 samples are small" in note for note in soft["evaluation"]["notes"])
    real = load_data(f"{place}/flats.csv:one-hot")
    model, labels = real.batch(torch.arange(60))
    noisy = model + 0.4 / 90 * torch.tensor([1.0, 90, 90, 90, 0]) * torch.rand(60, 5)
    assert torch.equal(real.as_rows(noisy), model)  # bit for bit: equal rows are copies
    plain = from_arrays(model.numpy(), labels)
    assert torch.equal(plain.as_rows(noisy), noisy)


def test_constant_columns_come_back_to_the_bit(tmp_path: Path) -> None:
    rows = [f"{k % 7 + 0.5},0.1,{k % 3}" for k in range(60)]
    path = written(tmp_path / "t.csv", "\n".join(["a,unit,b", *rows]))
    run = done(f"train --data {path} {TINY} {SHORT} --dry-run")
    assert re.search(r"constant +unit:", run.out)
    done(f"train --data {path} {TINY} {SHORT} --out {tmp_path}/t")
    said = done(f"sample {tmp_path}/t --steps 2 --n 50 --out {tmp_path}/x.csv --json").json()
    done(f"sample {tmp_path}/t --steps 2 --n 50 --out {tmp_path}/x.npz")
    assert all(line.split(",")[1] == "0.1" for line in (tmp_path / "x.csv").read_text().splitlines()[1:])
    x = np.load(tmp_path / "x.npz")["x"]
    assert (x[:, 1] == np.float32(0.1)).all()
    real = load_data(path)
    assert real.constant_columns() == ["unit"]
    low, high = real.raw.amin(0).numpy(), real.raw.amax(0).numpy()
    written_rows = load_data(tmp_path / "x.csv").raw.numpy()
    outside = ((written_rows < low) | (written_rows > high))[:, [0, 2]].mean()
    assert said["outside_range"] == pytest.approx(outside)
    again = Scaling.from_dict(real.scaling.to_dict())
    assert again == real.scaling
    assert again.constant == (1,)
    # Samples from elsewhere that vary there are not made equal to the data.
    other = real.scaling.to_model(real.raw + torch.tensor([0.0, 0.3, 0.0]))
    assert float(real.as_rows(other)[:, 1].min()) == pytest.approx(0.3)


def test_an_index_and_decimal_commas_are_named(tmp_path: Path) -> None:
    text = "\n".join([",a", *(f"{k},{k * k % 5}" for k in range(9))])
    with pytest.warns(UserWarning, match=r"counts 0, 1, 2.*index=False") as found:
        load_data(written(tmp_path / "t.csv", text))
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(written(tmp_path / "t.csv", "n" + text))
    for option in ("", ":one-hot"):
        path = written(tmp_path / "u.csv", "income;n\n1,5;1\n2;2\n-3,25;4\n")
        with pytest.raises(
            UserError, match=r"income contains numbers with decimal commas.*'1,5' in row 1, 2 such"
        ):
            load_data(f"{path}{option}")
