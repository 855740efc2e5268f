"""Captioned digits: pictures that contain what their captions say, drawn from digits held apart."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distmatch.base.errors import UserError
from distmatch.data import load_data
from distmatch.data.batches import Batches
from distmatch.data.captions import COLORS, DIGITS, SIDE, draw_scenes, wanted_by, word_encoder
from distmatch.nets.words import WordEncoder

KNOWN = load_digits(return_X_y=True)
PALETTE = np.array(list(COLORS.values())) / 255


@pytest.fixture(scope="module", params=["", "three", "relations"])
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def held_out(variant):
    return load_data(":".join(filter(None, ("captioned-digits", variant, "test"))))


def found_in(picture: np.ndarray) -> list[tuple[int, int, int, int, bool]]:
    """Row, column, digit, color and size in each filled slot, by comparison with every digit of scikit-learn.

    A small digit is not recognised: its digit is -1.
    """
    known, labels = KNOWN
    found = []
    for top in range(0, picture.shape[1], SIDE):
        for left in range(0, picture.shape[2], SIDE):
            slot = picture[:, top : top + SIDE, left : left + SIDE] / 255
            if not slot.any():
                continue
            # All pixels are multiples of the color.
            residual = [np.abs(np.cross(slot.reshape(3, -1).T, color)).max() for color in PALETTE]
            color = int(np.argmin(residual))
            grey = slot[PALETTE[color].argmax()] / PALETTE[color].max() * 16
            error = np.abs(known - grey.reshape(-1)).max(1)
            small = error.min() > 0.1
            digit = -1 if small else int(labels[error.argmin()])
            found.append((top // SIDE, left // SIDE, digit, color, small))
    return found


def test_pictures_contain_what_their_captions_say(held_out):
    for picture, caption in zip(held_out.raw[:150].numpy(), held_out.captions[:150], strict=True):
        found, words = found_in(picture), caption.replace(",", "").split()
        colors = [list(COLORS).index(word) for word in words if word in COLORS]
        digits = [DIGITS.index(word) for word in words if word in DIGITS]
        ordered = found[::-1] if {"right", "below"} & set(words) else found
        assert [entry[3] for entry in ordered] == colors, caption
        for entry, digit in zip(ordered, digits, strict=True):
            assert entry[2] in (digit, -1), caption
        assert sum(entry[4] for entry in found) == words.count("small"), caption
        if {"left", "right"} & set(words):
            assert (found[0][0] == found[1][0], found[0][1] == found[1][1]) == (True, False), caption
        if {"above", "below"} & set(words):
            assert (found[0][0] == found[1][0], found[0][1] == found[1][1]) == (False, True), caption


def test_pictures_are_the_same_each_time_and_tokens_those_of_the_captions(held_out, variant):
    again = load_data(held_out.name)
    assert again.content_hash == held_out.content_hash
    assert again.captions == held_out.captions
    encoder = word_encoder(variant)
    tokens = held_out.conditions["tokens"]
    for row in range(20):
        words = [encoder.words[i - 1] for i in tokens[row].tolist() if i]
        assert words == held_out.captions[row].replace(",", " ,").split()
    longest = tokens.gt(0).sum(1).max()
    assert longest == encoder.length == tokens.shape[1]


def test_digits_of_test_pictures_occur_in_no_other_and_one_digit_in_a_quarter():
    scenes = {split: draw_scenes("", split, 20_000)[0] for split in ("train", "test")}
    used = {split: set(s.image.unique().tolist()) for split, s in scenes.items()}
    assert not used["train"] & used["test"]
    assert len(used["train"] | used["test"]) == 1797
    single = (scenes["train"].digit >= 0).sum(1) == 1
    # Five standard errors of a share of 1/4 in 20,000.
    assert abs(single.float().mean() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5


@pytest.mark.parametrize(
    ("caption", "digit", "color", "small", "axis"),
    [
        ("a red seven, then a blue two", (7, 2), (0, 2), (False, False), ""),
        ("a small red seven above a blue two", (7, 2), (0, 2), (True, False), "column"),
        ("a small red seven below a blue two", (2, 7), (2, 0), (False, True), "column"),
        ("a white zero right of a small green one", (1, 0), (1, 5), (True, False), "row"),
        ("a yellow five", (5,), (3,), (False,), ""),
        ("nothing", (), (), (), ""),
    ],
)
def test_captions_are_understood(caption, digit, color, small, axis):
    wanted = wanted_by(caption)
    assert (wanted.digit, wanted.color, wanted.small, wanted.axis) == (digit, color, small, axis)


def test_subsets_keep_captions_and_without_labels_there_are_none(held_out):
    part = held_out.subset(torch.tensor([3, 1]))
    assert part.captions == (held_out.captions[3], held_out.captions[1])
    bare = held_out.without_labels()
    assert not bare.captions
    assert not bare.conditions


def test_batches_have_the_captions_of_their_samples(held_out):
    batch = Batches(held_out, 16, seed=3)(2)
    wanted = held_out.prompt_encoder.encode(batch.texts)
    assert all(torch.equal(batch.conditioning[name], value) for name, value in wanted.items())


def test_prompts_of_other_words_or_too_many_are_errors():
    encoder = WordEncoder.of(["a red seven", "a blue two, then a one"])
    assert encoder.length == 7
    assert torch.equal(encoder.encode([""])["tokens"], torch.zeros(1, 7, dtype=torch.int64))
    assert torch.equal(encoder.encode(["A  Red seven"])["tokens"], encoder.encode(["a red seven"])["tokens"])
    with pytest.raises(UserError, match="pink in 'a pink seven'"):
        encoder.encode(["a red seven", "a pink seven"])
    with pytest.raises(UserError, match="8 words"):
        encoder.encode(["a " * 8])
    assert WordEncoder.from_dict(encoder.to_dict()).fingerprint == encoder.fingerprint
    assert WordEncoder(encoder.words[::-1], 7).fingerprint != encoder.fingerprint
    for words, length in ((["a", "a"], 3), (["A"], 3), ([], 3), (["a b"], 3), (["a"], 0)):
        with pytest.raises(UserError):
            WordEncoder(words, length)
