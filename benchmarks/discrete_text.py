"""How well do small discrete diffusion models compress? Characters of a text, and binary digits.

    python benchmarks/discrete_text.py --data tinyshakespeare.npz --out docs/discrete.md

Text: bits a character on the last tenth, for the any-order bound of a network of conditionals, a unigram and
a bigram model counted on the first nine tenths. Digits: nats an image on held-out 8x8 digits made black and
white at 7 of 16, for the bound, for one evaluation of a network of marginals fitted to those conditionals,
and for independent pixels. A diffusion bound averages over all orders, so it pays for predicting far-apart
characters first; a bigram model always knows the character before.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sections import replace_section
from sklearn.datasets import load_digits
from torch import Tensor

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate
from distmatch.base.seeds import generator
from distmatch.discrete import (
    Alphabet,
    ConditionalTraining,
    MarginalTraining,
    TokenNet,
    TokenNetConfig,
    TokenTrainingConfig,
    consistency_loss,
    continue_text,
    nll_bound,
    sample_tokens,
    save_discrete,
    text_crops,
)

NATS_IN_BIT = math.log(2)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    data: Path
    """An .npz file whose array "bytes" is the text."""
    text_steps: int = 800
    digit_steps: int = 400
    """Of the conditionals, and again of the marginals."""
    seed: int = 0
    save: Path | None = None
    """A folder for the two networks of conditionals."""
    out: Path | None = None
    """A Markdown file whose section "measured" is replaced."""


def per_unit(estimate: Estimate, unit: float) -> Estimate:
    return Estimate(estimate.value / unit, estimate.stderr / unit, estimate.n)


def mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)), len(values))


def counted(train: Tensor, test: Tensor, symbols: int) -> tuple[Estimate, Estimate]:
    """Bits a character of unigram and bigram models; for the errors, windows of 64 count as independent."""
    p = torch.bincount(train, minlength=symbols).double() + 1
    p /= p.sum()
    pairs = torch.bincount(train[:-1] * symbols + train[1:], minlength=symbols**2).double()
    follow = pairs.reshape(symbols, symbols) + 0.5 * p
    follow /= follow.sum(1, keepdim=True)
    codes = (-p.log()[test[1:]], -follow.log()[test[:-1], test[1:]])
    windows = [c[: len(c) // 64 * 64].reshape(-1, 64).mean(1) / NATS_IN_BIT for c in codes]
    return mean(windows[0]), mean(windows[1])


def text(options: Options) -> list[str]:
    try:
        raw = np.load(options.data)["bytes"]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"cannot read {options.data}", got=error, expected="an .npz file with bytes"
        ) from error
    corpus = raw.tobytes().decode()
    alphabet = Alphabet.of(corpus)
    tokens = alphabet.encode(corpus)
    cut = len(tokens) * 9 // 10
    first, last = tokens[:cut], tokens[cut:]
    unigram, bigram = counted(first, last, len(alphabet))
    net = TokenNetConfig(len(alphabet), 64, width=96, depth=3)
    steps = options.text_steps
    training = ConditionalTraining(net, steps, TokenTrainingConfig(lr=6e-3, lr_rampup=50))
    model: TokenNet = dm.fit(
        training,
        lambda step: text_crops(first, 64, 64, seed=options.seed, step=step),
        steps=steps,
        seed=options.seed,
    )
    windows = last[: len(last) // 64 * 64].reshape(-1, 64)[::2]
    bound = nll_bound(model, windows, 4, generator=generator(options.seed, "bound"))
    drawn = sample_tokens(model, 64, seed=options.seed, sampler="tweedie", steps=64)
    if options.save:
        save_discrete(options.save / "text", model, {"alphabet": alphabet.characters})
    size = sum(p.numel() for p in model.parameters())
    sample = continue_text(model, alphabet, "ROMEO:\n", 160, seed=options.seed, temperature=0.8)
    return [
        f"Text, {len(windows)} held-out windows of 64 characters; {steps} steps of 64 windows, "
        f"{size:,} parameters:",
        "",
        "| model | bits a character |",
        "|---|---|",
        f"| unigram | {unigram} |",
        f"| bigram | {bigram} |",
        f"| absorbing diffusion, any-order bound | {per_unit(bound, NATS_IN_BIT)} |",
        "",
        f"Sampling 64 characters in 64 steps took {drawn.nfe:.1f} evaluations a sequence; the formula says "
        f"{64 * (1 - (1 - 1 / 64) ** 64):.1f}. After `ROMEO:`, at temperature 0.8:",
        "",
        "```text",
        *sample.splitlines(),
        "```",
    ]


def digits(options: Options) -> list[str]:
    x = torch.from_numpy(load_digits().images > 7).long().flatten(1)
    order = torch.randperm(len(x), generator=generator(options.seed, "split"))
    first, last = x[order[:1500]], x[order[1500:]]
    ink = (first.double().sum(0) + 0.5) / (len(first) + 1)
    independent = mean(-(torch.where(last == 1, ink, 1 - ink)).log().sum(1))
    net = TokenNetConfig(2, 64, width=64, depth=2)
    config = TokenTrainingConfig(lr=3e-3, lr_rampup=50, weight_decay=0.05, on_policy=0.0)

    def batch(step: int) -> Tensor:
        chosen = torch.randint(len(first), (64,), generator=generator(options.seed, f"digits/{step}"))
        return first[chosen]

    steps = options.digit_steps
    run: dict[str, int] = {"steps": steps, "seed": options.seed}
    model: TokenNet = dm.fit(ConditionalTraining(net, steps, config), batch, **run)
    bound = nll_bound(model, last, 32, generator=generator(options.seed, "bound"))
    marginals = dm.fit(MarginalTraining(net, steps, config, conditionals=model), batch, **run)
    with torch.no_grad():
        direct = mean(-marginals.log_marginal(last))
        loss = consistency_loss(marginals, model, last, generator=generator(options.seed, "agree")).mean()
    if options.save:
        save_discrete(options.save / "digits", model)
    return [
        f"Digits, {len(last)} held-out; {steps} steps for the conditionals, as many for the marginals:",
        "",
        "| model | nats an image | evaluations |",
        "|---|---|---|",
        f"| independent pixels | {independent} | |",
        f"| absorbing diffusion, any-order bound | {per_unit(bound, 1 / 64)} | 32 |",
        f"| marginals (not normalized: squared disagreement {float(loss):.2g} nats²) | {direct} | 1 |",
    ]


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    start = time.process_time()
    lines = [*text(options), "", *digits(options)]
    minutes = (time.process_time() - start) / 60
    command = f"--data {options.data.name} --text-steps {options.text_steps}"
    command += f" --digit-steps {options.digit_steps} --seed {options.seed}"
    lines += ["", f"`python benchmarks/discrete_text.py {command}`: {minutes:.1f} minutes of one core."]
    content = "\n".join(lines)
    print(content)
    if options.out:
        replace_section(options.out, "measured", content)


if __name__ == "__main__":
    main()
