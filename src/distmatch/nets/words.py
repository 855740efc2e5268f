"""Captions as word tokens: the vocabulary of a small text-conditioned model, which is saved with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from distmatch.base.errors import UserError
from distmatch.diffusion.conditioning import Conditioning

TOKENS = "tokens"
"""The conditioning field of word tokens, int64 (B, length)."""
PADDING = 0
_WORD = re.compile(r"\w+|[^\w\s]")
_MOST_WORDS = 20_000


class WordEncoder:
    """The prompt encoder of a vocabulary: one token for each word and each punctuation mark.

    Token 0 is padding; token i + 1 is ``words[i]``. The empty prompt is padding alone. Case and the amount of
    white space do not matter.

    Args:
        words: The vocabulary, each word once.
        length: Tokens of every prompt; shorter ones are padded at the end.

    Raises:
        UserError: No words, or one twice, or a length below 1.
    """

    def __init__(self, words: Sequence[str], length: int) -> None:
        usable = all(isinstance(word, str) and split_words(word) == [word] for word in words)
        if not usable or not 0 < len(words) == len(set(words)) <= _MOST_WORDS:
            raise UserError(
                "a vocabulary needs each word once, in lower case",
                got=f"{len(words)} words, {len(set(words))} of them different",
                expected=f"1 to {_MOST_WORDS:,} words without spaces",
            )
        if type(length) is not int or length < 1:
            raise UserError("the number of tokens of a prompt must be positive", got=repr(length))
        self.words, self.length = tuple(words), length
        self._tokens = {word: i for i, word in enumerate(self.words, PADDING + 1)}

    @classmethod
    def of(cls, captions: Iterable[str]) -> WordEncoder:
        """The vocabulary of some captions, as long as the longest of them."""
        split = [split_words(caption) for caption in captions]
        return cls(sorted({word for words in split for word in words}), max(map(len, split), default=0))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WordEncoder:
        """The encoder that :meth:`to_dict` described."""
        return cls(list(values["words"]), values["length"])

    def to_dict(self) -> dict[str, Any]:
        """Its JSON form."""
        return {"words": list(self.words), "length": self.length}

    def __deepcopy__(self, memo: dict[int, Any]) -> WordEncoder:
        return self  # it never changes, and copies of a denoiser share it

    @property
    def fingerprint(self) -> str:
        """A sha256 (hex) of vocabulary and length."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The field ``tokens``, int64 (B, length), of B prompts.

        Raises:
            UserError: A prompt is too long, or contains words that are not in the vocabulary.
        """
        tokens = torch.full((len(prompts), self.length), PADDING)
        for row, prompt in enumerate(prompts):
            words = split_words(prompt)
            if unknown := [word for word in words if word not in self._tokens]:
                raise UserError(
                    "this prompt contains words that the model was not trained on",
                    got=f"{', '.join(unknown)} in {prompt!r}",
                    expected=f"words of its captions: {_shortened(self.words)}",
                )
            if len(words) > self.length:
                raise UserError(
                    "this prompt is longer than the captions that the model was trained on",
                    got=f"{len(words)} words: {prompt!r}",
                    expected=f"at most {self.length}, punctuation marks included",
                )
            tokens[row, : len(words)] = torch.tensor([self._tokens[word] for word in words]).long()
        return Conditioning({TOKENS: tokens})


def split_words(caption: str) -> list[str]:
    """The words and punctuation marks of a caption, in lower case."""
    return _WORD.findall(caption.lower())


def _shortened(words: Sequence[str]) -> str:
    return ", ".join(words[:60]) + (f", ... ({len(words)} words)" if len(words) > 60 else "")
