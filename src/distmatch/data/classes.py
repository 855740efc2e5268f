"""Classes: names, counts, order, their match between data and models, draws of them, their folder names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from distmatch.base.checks import check_name
from distmatch.base.errors import UserError
from distmatch.base.mersenne import skip
from distmatch.base.seeds import generator
from distmatch.data.dataset import Dataset
from distmatch.diffusion.conditioning import (
    LABEL,
    Conditioning,
    ConditioningLike,
    as_conditioning,
    check_conditioning,
    spec_of,
)

Balance = Literal["data", "uniform"]
BALANCES: tuple[Balance, ...] = ("data", "uniform")
"""How classes are drawn: in the shares of the training data, or evenly."""
_SHOWN = 12  # names in a message: a thousand would bury it
_SURE = 1e-3  # chance of a false alarm when shares of classes are compared
_LONGEST = 200  # bytes of a folder's name; file systems end at 255


@dataclass(frozen=True)
class Classes:
    """The classes that a model was trained on.

    Attributes:
        names: One name for each class, or ().
        counts: How often each occurred in the training data, or () when that is not known.
    """

    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: Dataset) -> Classes:
        """Those of a data set; empty without labels."""
        if data.labels is None:
            return cls()
        counts = torch.bincount(data.labels.cpu(), minlength=data.num_classes)
        return cls(names_of(data), tuple(counts.tolist()))

    @classmethod
    def from_dict(cls, about: Mapping[str, Any], num_classes: int) -> Classes:
        """Those in the description of a saved model; what does not fit ``num_classes`` is not used.

        Args:
            about: What a saved model keeps of its data; older ones keep no counts.
            num_classes: Classes of the model.
        """
        names, counts = about.get("class_names"), about.get("class_counts")
        named = isinstance(names, (list, tuple)) and len(names) == num_classes
        counted = (
            isinstance(counts, (list, tuple))
            and len(counts) == num_classes
            and all(type(c) is int and c >= 0 for c in counts)
            and any(counts)
        )
        return cls(tuple(map(str, names)) if named else (), tuple(counts) if counted else ())  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as :meth:`from_dict` reads it."""
        return {"class_names": list(self.names), "class_counts": list(self.counts)}


def names_of(data: Dataset) -> tuple[str, ...]:
    """One name for each class: the given ones, else the numbers."""
    return names_for(data.class_names, data.num_classes)


def names_for(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The names, or the numbers of ``num_classes`` classes where they have none."""
    return tuple(names) or tuple(str(k) for k in range(num_classes))


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers from 0, each another one."""
    plain = all(re.fullmatch(r"[0-9]{1,9}", name) for name in names)
    return plain and len({int(name) for name in names}) == len(names)


def in_order(names: Sequence[str]) -> list[str]:
    """Names in the order in which classes are numbered: by value where all are numbers, else as text."""
    return sorted(names, key=int) if are_numbers(names) else sorted(names)


def class_named(text: str, names: Sequence[str], num_classes: int) -> int:
    """The number of the class that ``text`` means: by name, or by number where the classes have no such name.

    Raises:
        UserError: There is no such class.
    """
    if text in names:
        return list(names).index(text)
    number = int(text) if re.fullmatch(r"-1|[0-9]{1,9}", text) else None
    if number == -1 or (number is not None and number < num_classes and not are_numbers(names or ("?",))):
        return number
    if number is not None and names and are_numbers(names) and number in (own := [int(v) for v in names]):
        return own.index(number)
    known = listed(names) if names else f"0 to {num_classes - 1}"
    raise UserError("there is no such class", got=text, expected=f"{known}, or -1 for none")


def listed(names: Sequence[str]) -> str:
    """The names separated by commas, with the middle of a long list omitted."""
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[: _SHOWN - 2])}, ..., {names[-1]} ({len(names)} in all)"


def matched(data: Dataset, names: Sequence[str], num_classes: int, whose: str) -> Dataset:
    """The data with their classes numbered as those of a model or of other data.

    Classes are matched by name. Names that are numbers (of folders, or labels that have no names) match equal
    numbers, and mean the number of a class where the other side has words or no names at all. Words match a
    side without names only when both have as many classes. Classes that do not occur need no match.

    Args:
        data: The data; without labels they come back as they are.
        names: Names of the classes to match, or ().
        num_classes: Their number; 0 when nothing is to be matched.
        whose: Who has them, for messages: ``the teacher``.

    Returns:
        The data with ``num_classes`` classes under ``names``.

    Raises:
        UserError: A class that occurs has no counterpart; the message lists both sets.
    """
    if data.labels is None or num_classes == 0:
        return data
    own = names_of(data)
    places = _places(own, tuple(names), num_classes)
    labels = torch.tensor(places)[data.labels.cpu()]
    if bool((labels < 0).any()):
        lost = [own[k] for k in data.labels[labels.to(data.labels.device) < 0].unique().tolist()]
        raise UserError(
            f"{data.name} has classes that {whose} does not have: {listed(lost)}",
            got=f"classes {listed(own)}",
            expected=f"classes of {whose}: {listed(names) if names else f'0 to {num_classes - 1}'}",
            fix="give folders (or class_names of an .npz) the same names, or leave these classes out",
        )
    known = tuple(names) or (own if places == list(range(num_classes)) else ())
    return dataclasses.replace(
        data, labels=labels.to(data.labels.device), class_names=names_for(known, num_classes)
    )


def _places(own: tuple[str, ...], names: tuple[str, ...], num_classes: int) -> list[int]:
    """The number of each class on the other side, -1 where it has none."""
    if are_numbers(own) and (not names or are_numbers(names)):
        at = {int(name): k for k, name in enumerate(names_for(names, num_classes))}
        return [at.get(int(name), -1) for name in own]
    by_name = {name: k for k, name in enumerate(names)}
    if are_numbers(own) and not all(name in by_name for name in own):
        return [int(name) if int(name) < num_classes else -1 for name in own]
    if not names and len(own) == num_classes:
        return list(range(num_classes))
    return [by_name.get(name, -1) for name in own]


def drawn_labels(
    n: int,
    num_classes: int,
    seed: int,
    counts: Sequence[int] = (),
    balance: Balance = "data",
    stream: str = "labels",
    first: int = 0,
) -> Tensor:
    """Draws the classes of ``n`` samples, independently.

    Args:
        n: Number of samples.
        num_classes: Number of classes.
        seed: Seed of the draw; label i depends on the seed and i alone.
        counts: How often each class occurred in the training data; () when that is not known.
        balance: ``data`` draws by ``counts``, ``uniform`` evenly among the classes that occurred. Without
            counts all classes are drawn evenly.
        stream: Which draw of this seed.
        first: Number of the first sample.

    Returns:
        Int64 (n,) on the CPU.

    Raises:
        UserError: An unknown ``balance``.
    """
    check_name("class balance", balance, BALANCES)
    weights = torch.tensor(counts or [1] * num_classes, dtype=torch.float64)
    if balance == "uniform":
        weights = (weights > 0).double()
    edges = weights.cumsum(0)
    source = generator(seed, stream)
    skip(source, 2 * first)
    u = torch.rand(n, generator=source, dtype=torch.float64)
    return torch.searchsorted(edges, u * edges[-1], right=True).clamp(max=num_classes - 1)


def checked_conditioning(
    given: ConditioningLike,
    n: int,
    model: Any,
    seed: int,
    counts: Sequence[int] = (),
    balance: Balance = "data",
    first: int = 0,
) -> Conditioning:
    """What ``n`` samples are conditioned on: what is given, checked, or classes drawn for a model of classes.

    Args:
        given: Labels (n,), a conditioning, or None.
        n: Number of samples.
        model: The denoiser or student.
        seed: Seed of the draw.
        counts: How often each class occurred in training; () when that is not known.
        balance: See :func:`drawn_labels`.
        first: Number of the first sample.

    Raises:
        UserError: It does not fit the model, or is missing where it cannot be drawn.
    """
    spec = spec_of(model)
    if given is None:
        if set(spec) - {LABEL}:
            raise UserError(
                "this model needs the conditioning of its samples",
                got="no condition",
                expected=f"values of {', '.join(spec)}",
                fix="pass a distmatch.Conditioning, for samples without a condition "
                "null_conditioning(model, n)",
            )
        labels = drawn_labels(n, model.num_classes, seed, counts, balance, first=first) if spec else None
        return as_conditioning(labels)
    conditioning = as_conditioning(given)
    if not spec and conditioning:
        raise UserError("this model is unconditional", got=", ".join(conditioning), fix="leave it out")
    check_conditioning(conditioning, n, spec)
    return conditioning


def share_warning(labels: Tensor, reference: Tensor, names: Sequence[str]) -> str | None:
    """A warning if the class proportions of two sets of samples differ, or None.

    A chi-square test of homogeneity, which raises a false alarm once in a thousand.

    Args:
        labels: Classes of the samples, (n,), -1 for none.
        reference: Those of the real data, (m,).
        names: Names of the classes.
    """
    a, b = (torch.bincount(v[v >= 0].cpu(), minlength=len(names)).double() for v in (labels, reference))
    seen = (a + b) > 0
    a, b = a[seen], b[seen]
    if len(a) < 2 or a.sum() == 0 or b.sum() == 0:
        return None
    expected = (a + b) / (a + b).sum()
    statistic = sum((((c - c.sum() * expected) ** 2) / (c.sum() * expected)).sum() for c in (a, b))
    chance = float(torch.special.gammaincc(torch.tensor((len(a) - 1) / 2).double(), statistic / 2))
    if chance >= _SURE:
        return None
    shares = torch.stack((a / a.sum(), b / b.sum()))
    worst = int((shares[0] - shares[1]).abs().argmax())
    name = [n for n, s in zip(names, seen.tolist(), strict=True) if s][worst]
    return (
        f"the class proportions of the samples differ from those of the real data (class {name}: "
        f"{float(shares[0, worst]):.1%} of the samples, {float(shares[1, worst]):.1%} of the real "
        f"data): every comparison of the two sets includes this difference"
    )


def from_folder_name(folder: str) -> str:
    """The name of the class with samples in ``folder``; undoes :func:`folder_names`.

    Raises:
        UserError: The name is not text.
    """
    try:
        folder.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            "the name of a class folder is not UTF-8", got=ascii(folder), fix="rename the folder"
        ) from error
    return unquote(folder, errors="strict") if _is_quoted(folder) else folder


def _is_quoted(folder: str) -> bool:
    try:
        return _quoted(unquote(folder, errors="strict")) == folder
    except UnicodeDecodeError:
        return False


def _quoted(name: str) -> str:
    """The name with %XX for what file systems, shells or terminals could take for something else."""
    safe = "".join(c if c.isprintable() and c not in '/\\%<>:"|?*' else quote(c, safe="") for c in name)
    return "%2E" + safe[1:] if safe.startswith(".") else safe


def folder_names(names: Sequence[str]) -> list[str]:
    """A safe folder name for each class, from which :func:`from_folder_name` has the name back.

    The numbers of the classes where that cannot be: a name is empty, very long, or the same as another but
    for capitals.
    """
    found = [_quoted(name) for name in names]
    fit = all(0 < len(name.encode()) <= _LONGEST and name == name.strip() for name in found)
    if fit and len({name.casefold() for name in found}) == len(found):
        return found
    return [str(k) for k in range(len(names))]
