"""Pictures of one to three colored digits with captions, made from those of scikit-learn; no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distmatch.base.seeds import generator
from distmatch.data.dataset import Dataset
from distmatch.data.scaling import Scaling
from distmatch.nets.words import WordEncoder, split_words

Variant = Literal["", "three", "relations"]
Split = Literal["train", "test"]

NAME = "captioned-digits"
SIDE = 8  # of a slot, and of the digits of scikit-learn
_SMALL = 6  # side of a small digit
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (255, 50, 50),
    "green": (60, 210, 60),
    "blue": (70, 100, 255),
    "yellow": (250, 220, 50),
    "purple": (220, 70, 230),
    "white": (240, 240, 240),
}
_AFTER = {"row": ("left of", "right of"), "column": ("above", "below")}
_VOCABULARY = (*["a", ",", "then", "small", "of", "left", "right", "above", "below"], *COLORS, *DIGITS)
_GRIDS: dict[Variant, tuple[int, int]] = {"": (1, 2), "three": (1, 3), "relations": (2, 2)}
_LENGTHS: dict[Variant, int] = {"": 8, "three": 13, "relations": 10}
_SAMPLES = {"train": 40_000, "test": 4_000}
_ONE = 0.25  # share of pictures with one digit


@dataclass(frozen=True)
class Scenes:
    """What is in pictures, slot by slot in reading order: S slots of 8x8 pixels, or one of them empty.

    Attributes:
        grid: Rows and columns of slots.
        image: Index of the digit among those of scikit-learn, (N, S).
        digit: 0 to 9, or -1 for an empty slot, (N, S).
        color: Index into :data:`COLORS`, (N, S).
        small: Whether the digit is small, (N, S).
    """

    grid: tuple[int, int]
    image: Tensor
    digit: Tensor
    color: Tensor
    small: Tensor

    def __len__(self) -> int:
        return len(self.digit)


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for.

    Attributes:
        digit: The digits in the order in which they are read in the picture: row by row, from the left.
        color: Their colors, indices into :data:`COLORS`.
        small: Whether each is small.
        axis: ``"row"`` where they must be in one row, ``"column"`` where in one column, ``""`` otherwise.
    """

    digit: tuple[int, ...]
    color: tuple[int, ...]
    small: tuple[bool, ...]
    axis: str


def captioned_digits(variant: Variant = "", split: Split = "train") -> Dataset:
    """Pictures with captions in their ``captions``, and these as word tokens in their ``conditions``.

    By default 3x8x16 with one or two digits: "a red seven, then a blue two" from left to right, "a red seven"
    anywhere. ``three`` has up to three digits, 3x8x24. ``relations`` are 3x16x16 with digits of two sizes, a
    small one anywhere in its slot: "a small red seven above a blue two".

    The 1,797 digits of scikit-learn are divided: one in five occurs in the test pictures alone.
    """
    scenes, order = draw_scenes(variant, split, _SAMPLES[split])
    captions = tuple(captions_of(scenes, order))
    encoder = word_encoder(variant)
    return Dataset(
        raw=render(scenes, generator(0, f"{NAME}/{variant}/{split}/places")),
        labels=None,
        class_names=(),
        name=":".join(filter(None, (NAME, variant, "" if split == "train" else split))),
        scaling=Scaling.for_images(0, 255, "colors, 0..255"),
        conditions=encoder.encode(captions),
        captions=captions,
        prompt_encoder=encoder,
    )


def word_encoder(variant: Variant = "") -> WordEncoder:
    """The encoder of the captions of a variant; all have the same vocabulary."""
    return WordEncoder(_VOCABULARY, _LENGTHS[variant])


def draw_scenes(variant: Variant, split: Split, n: int, seed: int = 0) -> tuple[Scenes, Tensor]:
    """Random scenes.

    Args:
        variant: Which pictures.
        split: Which digits of scikit-learn occur in them.
        n: Number of scenes.
        seed: Other scenes for another seed.

    Returns:
        The scenes, and whether the caption of each begins with the last digit, (n,) bool.
    """
    from sklearn.datasets import load_digits  # here, because importing distmatch must stay quick

    gen = generator(seed, f"{NAME}/{variant}/{split}")
    labels = torch.from_numpy(load_digits().target)
    shuffled = torch.randperm(len(labels), generator=generator(0, f"{NAME}/split"))
    held_out = len(labels) // 5
    ours = shuffled[:held_out] if split == "test" else shuffled[held_out:]
    rows, columns = grid = _GRIDS[variant]
    slots = rows * columns
    image = ours[torch.randint(len(ours), (n, slots), generator=gen)]
    color = torch.randint(len(COLORS), (n, slots), generator=gen)
    small = torch.rand(n, slots, generator=gen) < (0.5 if variant == "relations" else 0.0)
    patterns = _patterns(grid)
    number = torch.rand(n, generator=gen)
    sizes = torch.tensor([sum(pattern) for pattern in patterns])
    most = int(sizes.max())
    # One digit in a quarter of the pictures; the other numbers have equal shares of the rest.
    more = ((number - _ONE) / (1 - _ONE) * (most - 1)).long()
    wanted = torch.where(number < _ONE, 1, 2 + more)
    weights = (sizes[None] == wanted[:, None]).float()
    chosen = torch.multinomial(weights, 1, generator=gen)[:, 0]
    filled = torch.tensor(patterns)[chosen]
    turned = torch.rand(n, generator=gen) < (0.5 if variant == "relations" else 0.0)
    digit = torch.where(filled, labels[image], -1)
    return Scenes(grid, image, digit, color, small), turned & (filled.sum(1) > 1)


def _patterns(grid: tuple[int, int]) -> list[tuple[bool, ...]]:
    """Which slots may be filled together: any of one row; of a square, one, or two next to each other."""
    slots = grid[0] * grid[1]
    every = [tuple(bool(k >> s & 1) for s in range(slots)) for k in range(1, 2**slots)]
    if grid[0] == 1:
        return every
    diagonal = {(True, False, False, True), (False, True, True, False)}
    return [pattern for pattern in every if sum(pattern) < 3 and pattern not in diagonal]


def render(scenes: Scenes, gen: torch.Generator) -> Tensor:
    """The pictures of scenes, uint8 (N, 3, height, width).

    Args:
        scenes: What is in them.
        gen: Draws the places of small digits in their slots.
    """
    from sklearn.datasets import load_digits

    rows, columns = scenes.grid
    shapes = torch.from_numpy(load_digits().images).float()[:, None] / 16  # (M, 1, 8, 8)
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    shift = torch.randint(SIDE - _SMALL + 1, (2, *scenes.image.shape), generator=gen)
    out = torch.zeros(len(scenes), 3, rows * SIDE, columns * SIDE, dtype=torch.uint8)
    shrunk = F.interpolate(shapes, size=(_SMALL, _SMALL), mode="area")
    for slot in range(rows * columns):
        shape = shapes[scenes.image[:, slot]]
        if bool(scenes.small.any()):
            shape = torch.where(
                scenes.small[:, slot, None, None, None],
                _placed(shrunk[scenes.image[:, slot]], shift[:, :, slot]),
                shape,
            )
        shape = shape * (scenes.digit[:, slot] >= 0)[:, None, None, None]
        colored = (shape * palette[scenes.color[:, slot], :, None, None]).round().to(torch.uint8)
        top, left = slot // columns * SIDE, slot % columns * SIDE
        out[:, :, top : top + SIDE, left : left + SIDE] = colored
    return out


def _placed(small: Tensor, shift: Tensor) -> Tensor:
    """Small digits (N, 1, 6, 6) in slots, ``shift`` (2, N) pixels from the upper left corner."""
    out = torch.zeros(len(small), 1, SIDE, SIDE)
    for down in range(SIDE - _SMALL + 1):
        for right in range(SIDE - _SMALL + 1):
            here = (shift[0] == down) & (shift[1] == right)
            out[here, :, down : down + _SMALL, right : right + _SMALL] = small[here]
    return out


def captions_of(scenes: Scenes, turned: Tensor) -> list[str]:
    """One caption for each scene.

    Args:
        scenes: What is in the pictures.
        turned: Whether the caption begins with the last digit, (N,) bool; with relations only.
    """
    colors, relations = list(COLORS), scenes.grid[0] > 1
    fields = zip(*(t.tolist() for t in (scenes.digit, scenes.color, scenes.small, turned)), strict=True)
    captions = []
    for digit, color, small, last in fields:
        filled = [slot for slot, value in enumerate(digit) if value >= 0]
        named = [f"a {'small ' * small[s]}{colors[color[s]]} {DIGITS[digit[s]]}" for s in filled]
        if not relations:
            captions.append(", then ".join(named))
        elif len(named) == 1:
            captions.append(named[0])
        else:
            axis = "row" if filled[1] - filled[0] == 1 else "column"
            captions.append(f" {_AFTER[axis][last]} ".join(named[::-1] if last else named))
    return captions


def wanted_by(caption: str) -> Wanted:
    """What a caption asks for; one that is not of this grammar asks for what can be read from it."""
    words = split_words(caption)
    places = [i for i, word in enumerate(words) if word in DIGITS]
    colors = list(COLORS)
    found = []
    for start, end in zip([0, *(i + 1 for i in places)], places, strict=False):
        named = words[start:end]
        color = next((colors.index(word) for word in named if word in COLORS), -1)
        found.append((DIGITS.index(words[end]), color, "small" in named))
    axis = "row" if {"left", "right"} & set(words) else "column" if {"above", "below"} & set(words) else ""
    if {"right", "below"} & set(words):
        found.reverse()
    return Wanted(
        tuple(digit for digit, _, _ in found),
        tuple(color for _, color, _ in found),
        tuple(small for _, _, small in found),
        axis,
    )
