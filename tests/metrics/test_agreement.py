"""Agreement of pictures with captions: a judge that is right, and one that is not; diversity of prompts."""

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.data import load_data
from distmatch.metrics.agreement import Judge, prompt_diversity, train_judge


class Fixed(nn.Module):
    """Reads slots that have the answer in their first pixels: digit (10: none), color and size."""

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        answer = slots[:, 0, 0, :3].round().long()
        return (
            nn.functional.one_hot(answer[:, 0], 11).float(),
            nn.functional.one_hot(answer[:, 1], 6).float(),
            answer[:, 2].float() - 0.5,
        )


def pictures(grid: tuple[int, int], *slots: tuple[int, int, int] | None) -> Tensor:
    """One picture with the answers of :class:`Fixed` in its slots; None is an empty one."""
    x = torch.zeros(1, 3, 8 * grid[0], 8 * grid[1])
    for slot, answer in enumerate(slots):
        top, left = slot // grid[1] * 8, slot % grid[1] * 8
        x[0, 0, top, left : left + 3] = torch.tensor(answer or (10, 0, 0))
    return x


RED, BLUE, SQUARE, PAIR = 0, 2, (2, 2), (1, 2)


@pytest.mark.parametrize(
    ("grid", "slots", "caption", "scores"),
    [
        (PAIR, [(7, RED, 0), (2, BLUE, 0)], "a red seven, then a blue two", (1, 1, 1)),
        (PAIR, [(2, BLUE, 0), (7, RED, 0)], "a red seven, then a blue two", (0, 0, 1)),
        (PAIR, [(7, BLUE, 0), (2, BLUE, 0)], "a red seven, then a blue two", (1, 0.5, 1)),
        (PAIR, [None, (7, RED, 0)], "a red seven, then a blue two", (0.5, 0.5, 0)),
        (PAIR, [None, (7, RED, 0)], "a red seven", (1, 1, 1)),
        (PAIR, [(7, RED, 0), (7, RED, 0)], "a red seven", (1, 1, 0)),
        (PAIR, [None, None], "a red seven", (0, 0, 0)),
        (SQUARE, [(7, RED, 1), None, (2, BLUE, 0), None], "a small red seven above a blue two", (1, 1, 1, 1)),
        (
            SQUARE,
            [(7, RED, 0), None, (2, BLUE, 0), None],
            "a small red seven above a blue two",
            (1, 1, 1, 0.5),
        ),
        (SQUARE, [(7, RED, 1), (2, BLUE, 0), None, None], "a small red seven above a blue two", (1, 1, 0, 1)),
        (SQUARE, [(2, BLUE, 0), None, (7, RED, 1), None], "a small red seven below a blue two", (1, 1, 1, 1)),
        (SQUARE, [None, None, (2, BLUE, 0), (7, RED, 0)], "a red seven right of a blue two", (1, 1, 1, 1)),
        # The second and third slots follow each other and are neither in a row nor in a column.
        (SQUARE, [None, (2, BLUE, 0), (7, RED, 0), None], "a red seven right of a blue two", (1, 1, 0, 1)),
        (SQUARE, [None, (7, RED, 0), (2, BLUE, 0), None], "a red seven above a blue two", (1, 1, 0, 1)),
    ],
)
def test_scores_are_those_counted_by_hand(grid, slots, caption, scores):
    judge = Judge(grid, grid == SQUARE, Fixed())
    found = judge.agreement(torch.cat([pictures(grid, *slots)] * 2), [caption] * 2)
    assert [found[name].value for name in ("digit", "color", "layout", "size")[: len(scores)]] == list(scores)
    assert found["mean"].value == pytest.approx(sum(scores) / len(scores))
    assert found["mean"].stderr == 0


def test_standard_errors_are_those_of_means_over_pictures():
    x = torch.cat([pictures(PAIR, (7, RED, 0), None)] * 30 + [pictures(PAIR, None, None)] * 10)
    found = Judge(PAIR, False, Fixed()).agreement(x, ["a red seven"] * 40)
    assert found["mean"].value == 0.75
    assert found["mean"].stderr == pytest.approx((0.75 * 0.25 / 39) ** 0.5)


@pytest.mark.slow
def test_a_judge_reads_pictures_of_digits_it_never_saw():
    """A quarter of the steps of the real judge: colors and layouts are certain, digits nearly."""
    judge = train_judge(steps=200)
    data = load_data("captioned-digits:test").subset(torch.arange(1000))
    x = data.scaling.to_model(data.raw)
    found = judge.agreement(x, data.captions)
    assert found["color"].value > 0.98
    assert found["layout"].value > 0.98
    assert found["digit"].value > 0.8
    # Captions of other pictures: one digit in ten is right by chance, and where only one is asked for, any.
    shuffled = judge.agreement(x, data.captions[1:] + data.captions[:1])
    assert shuffled["digit"].value < 0.2
    assert shuffled["color"].value < 0.3
    again = train_judge(steps=2), train_judge(steps=2)
    assert all(torch.equal(a, b) for a, b in zip(*(j.network.parameters() for j in again), strict=True))


def test_diversity_counts_different_samples():
    """Prompts of k disjoint pictures have Vendi score k, and pairs at distance sqrt(2) on 2 of D pixels."""
    x = -torch.ones(3, 4, 16)
    for prompt, different in enumerate((1, 2, 4)):
        for seed in range(4):
            x[prompt, seed, seed % different] = 0
    found = prompt_diversity(x)
    assert found["vendi"].value == pytest.approx(7 / 3)
    assert found["vendi"].stderr == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item() / 3**0.5)
    # Of 6 pairs 0, 4 and 6 differ, by 1 at two of 16 places.
    assert found["distance"].value == pytest.approx((10 / 6) * (2 / 16) ** 0.5 / 3)


def test_what_cannot_be_compared_is_an_error():
    judge = Judge(PAIR, False, Fixed())
    with pytest.raises(UserError, match="cannot be compared"):
        judge.agreement(torch.zeros(2, 3, 8, 16), ["a red seven"])
    with pytest.raises(UserError, match="cannot be compared"):
        judge.agreement(torch.zeros(1, 3, 16, 16), ["a red seven"])
    with pytest.raises(UserError, match="two or more"):
        prompt_diversity(torch.zeros(4, 1, 3))
