"""Characters as tokens: alphabets, crops of a corpus, and text continued or filled in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmatch.base.checks import check_count, check_equal
from distmatch.base.errors import UserError
from distmatch.base.seeds import generator
from distmatch.discrete.sampling import sample_tokens
from distmatch.discrete.tokens import Conditionals


@dataclass(frozen=True)
class Alphabet:
    """The characters of a model, in the order of their tokens.

    Attributes:
        characters: Each once; token i is ``characters[i]``.
    """

    characters: str

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise UserError("an alphabet needs each character once", got=repr(self.characters[:80]))

    @classmethod
    def of(cls, text: str) -> Alphabet:
        """The characters that occur in ``text``, sorted."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Tokens (len(text),) int64.

        Raises:
            UserError: A character is not in the alphabet.
        """
        place = {c: i for i, c in enumerate(self.characters)}
        strange = sorted(set(text) - place.keys())
        if strange:
            raise UserError(
                "the text has characters that are not in the alphabet",
                got=" ".join(map(repr, strange[:10])),
                expected=f"only {self.characters!r}",
            )
        return torch.tensor([place[c] for c in text], dtype=torch.int64)

    def decode(self, tokens: Tensor, hidden: str = "_") -> str:
        """The text of tokens (L,); hidden ones are written as ``hidden``."""
        symbols = self.characters + hidden
        return "".join(symbols[i] for i in tokens.tolist())


def text_crops(corpus: Tensor, length: int, batch: int, *, seed: int, step: int) -> Tensor:
    """The batch of a training step: random windows of a corpus, a function of seed and step alone.

    Args:
        corpus: Tokens (n,) int64.
        length: Tokens in a window.
        batch: Number of windows.
        seed: Seed of the run.
        step: Number of the step.

    Returns:
        (batch, length) int64.

    Raises:
        UserError: The corpus is shorter than a window.
    """
    if corpus.ndim != 1 or len(corpus) < length:
        raise UserError(
            "the corpus is shorter than a window",
            got=f"shape {tuple(corpus.shape)}",
            expected=f"at least {length} tokens",
        )
    starts = torch.randint(len(corpus) - length + 1, (batch,), generator=generator(seed, f"crops/{step}"))
    return corpus[starts[:, None] + torch.arange(length)]


def continue_text(
    model: Conditionals,
    alphabet: Alphabet,
    prompt: str,
    characters: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    sampler: str = "any-order",
    steps: int | None = None,
    device: torch.device | str = "cpu",
) -> str:
    """Continues ``prompt`` for a number of characters.

    The model sees whole windows, so a text longer than one is written window by window, each beginning with
    the last half window of what is there.

    Args:
        model: The conditionals.
        alphabet: Its characters.
        prompt: May be empty.
        characters: How many to add.
        seed: Seed of the draw.
        temperature: Divides the logits.
        top_p: Smallest share of probability kept.
        sampler: As in :func:`sample_tokens`.
        steps: As in :func:`sample_tokens`.
        device: Device of the network.

    Returns:
        The prompt and what was added.

    Raises:
        UserError: Unknown characters, or a model of another alphabet.
    """
    _check(model, alphabet)
    check_count("the number of characters to add", characters)
    text = alphabet.encode(prompt)
    wanted = len(text) + characters
    window = 0
    while len(text) < wanted:
        seen = text[len(text) - min(len(text), model.length // 2) :]
        given = torch.full((1, model.length), model.vocabulary)
        given[0, : len(seen)] = seen
        # Each window has its own random stream.
        drawn = sample_tokens(
            model,
            1,
            seed=seed + window,
            sampler=sampler,
            steps=steps,
            given=given,
            temperature=temperature,
            top_p=top_p,
            device=device,
        )
        text = torch.cat([text, drawn.tokens[0, len(seen) :].cpu()])
        window += 1
    return alphabet.decode(text[:wanted])


def fill_text(
    model: Conditionals,
    alphabet: Alphabet,
    template: str,
    *,
    seed: int,
    hidden: str = "_",
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
) -> str:
    """Fills the characters ``hidden`` of a template of at most one window.

    Args:
        model: The conditionals.
        alphabet: Its characters.
        template: Text in which ``hidden`` marks what is to be drawn.
        seed: Seed of the draw.
        hidden: One character that is not in the alphabet.
        temperature: Divides the logits.
        device: Device of the network.

    Raises:
        UserError: The template is too long, or the mark is a character of the alphabet.
    """
    _check(model, alphabet)
    if len(hidden) != 1 or hidden in alphabet.characters:
        raise UserError("the mark must be one character outside the alphabet", got=repr(hidden))
    check_count("the length of the template", len(template), 0, model.length)
    given = torch.full((1, model.length), model.vocabulary)
    fixed = torch.tensor([c != hidden for c in template], dtype=torch.bool)
    given[0, : len(template)][fixed] = alphabet.encode(template.replace(hidden, ""))
    # What follows the template is unknown too; it is drawn with the rest and cut off.
    drawn = sample_tokens(model, 1, seed=seed, given=given, temperature=temperature, device=device)
    return alphabet.decode(drawn.tokens[0, : len(template)])


def _check(model: Conditionals, alphabet: Alphabet) -> None:
    check_equal("the sizes of alphabet and vocabulary", len(alphabet), model.vocabulary)
