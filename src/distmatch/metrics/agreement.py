"""Whether pictures of captioned digits agree with their captions, by classifiers trained on real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.base.estimate import Estimate, mean_of
from distmatch.base.progress import progress
from distmatch.base.seeds import generator, stream_seed
from distmatch.data.captions import COLORS, SIDE, Variant, Wanted, draw_scenes, render, wanted_by
from distmatch.metrics.vendi import vendi_score

_EMPTY = 10  # the class of a slot without a digit
_SCENES, _STEPS, _BATCH = 10_000, 800, 128


class _SlotNetwork(nn.Module):
    """Digit, color and size of one slot, logits (B, 11), (B, 6) and (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(48 * 16, 128),
            nn.ReLU(),
        )
        self.digit, self.color, self.small = (
            nn.Linear(128, 11),
            nn.Linear(128, len(COLORS)),
            nn.Linear(128, 1),
        )

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.body(slots)
        return self.digit(hidden), self.color(hidden), self.small(hidden)[:, 0]


@dataclass(frozen=True)
class Judge:
    """Recognizes the digits of a picture, slot by slot.

    Attributes:
        grid: Rows and columns of slots of 8x8 pixels.
        sizes: Whether captions speak of sizes.
        network: The classifier of a slot.
    """

    grid: tuple[int, int]
    sizes: bool
    network: nn.Module

    @torch.no_grad()
    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Digit (10: none), color and size in each slot of pictures (N, 3, height, width): (N, S) each."""
        digit, color, small = self.network(_slots(x.detach().cpu().float(), self.grid))
        slots = self.grid[0] * self.grid[1]
        found = (digit.argmax(1), color.argmax(1), small > 0)
        return tuple(part.unflatten(0, (-1, slots)) for part in found)

    def agreement(self, x: Tensor, captions: Sequence[str]) -> dict[str, Estimate]:
        """The share of pictures' properties that are those of their captions.

        The digits of picture and caption are compared in the order in which they are read in the picture.

        Args:
            x: Pictures in model space, (N, 3, height, width), drawn independently.
            captions: Their captions.

        Returns:
            ``digit`` and ``color`` of the digits that a caption names, of which a missing one is wrong;
            ``layout``: as many digits, in one row or column where the caption says so; ``size`` where
            captions mention it; and ``mean``, over these. Standard errors are those of means over pictures.

        Raises:
            UserError: Pictures of another size, or another number of captions.
        """
        height, width = (SIDE * side for side in self.grid)
        if tuple(x.shape[1:]) != (3, height, width) or len(x) != len(captions):
            raise UserError(
                "pictures and captions cannot be compared",
                got=f"{tuple(x.shape)} and {len(captions)} captions",
                expected=f"(N, 3, {height}, {width}) and N captions",
            )
        read = self.read(x)
        scores = torch.tensor(
            [
                self._scores(wanted_by(caption), *(part[row].tolist() for part in read))
                for row, caption in enumerate(captions)
            ],
            dtype=torch.float64,
        )
        names = ("digit", "color", "layout", "size")[: 4 if self.sizes else 3]
        scores = scores[:, : len(names)]
        parts = {name: mean_of(scores[:, i]) for i, name in enumerate(names)}
        return {**parts, "mean": mean_of(scores.mean(1))}

    def _scores(
        self, wanted: Wanted, digit: list[int], color: list[int], small: list[bool]
    ) -> tuple[float, float, float, float]:
        filled = [slot for slot, value in enumerate(digit) if value != _EMPTY]
        n = max(len(wanted.digit), 1)
        pairs = list(zip(filled, wanted.digit, wanted.color, wanted.small, strict=False))
        layout = len(filled) == len(wanted.digit)
        if layout and wanted.axis and len(filled) == 2:
            apart = filled[1] - filled[0]
            same_row = filled[0] // self.grid[1] == filled[1] // self.grid[1]
            layout = same_row if wanted.axis == "row" else apart == self.grid[1]
        return (
            sum(digit[slot] == d for slot, d, _, _ in pairs) / n,
            sum(color[slot] == c for slot, _, c, _ in pairs) / n,
            float(layout),
            sum(small[slot] == s for slot, _, _, s in pairs) / n,
        )


def train_judge(variant: Variant = "", *, seed: int = 0, steps: int = _STEPS) -> Judge:
    """A judge of captioned digits, trained on real pictures alone, of the digits of the training data.

    Args:
        variant: Which pictures.
        seed: Seed of network, pictures and batches.
        steps: Training steps.
    """
    scenes, _ = draw_scenes(variant, "train", _SCENES, seed=stream_seed(seed, "judge"))
    pictures = render(scenes, generator(seed, "judge/places")).float() / 127.5 - 1
    slots = _slots(pictures, scenes.grid)
    digit = torch.where(scenes.digit < 0, _EMPTY, scenes.digit).flatten()
    color, small = scenes.color.flatten(), scenes.small.flatten().float()
    stream = generator(seed, "judge/batches")
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        progress(steps, desc="judge", delay=5.0) as bar,
    ):
        torch.manual_seed(stream_seed(seed, "judge/network"))
        network = _SlotNetwork()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(slots), (_BATCH,), generator=stream)
            # Noise of random size, so that pictures that are not quite real can be read.
            size = 0.2 * torch.rand(_BATCH, 1, 1, 1, generator=stream)
            x = slots[rows] + size * torch.randn(_BATCH, 3, SIDE, SIDE, generator=stream)
            to_digit, to_color, to_size = network(x)
            there = (digit[rows] != _EMPTY).float()
            loss = F.cross_entropy(to_digit, digit[rows])
            loss = loss + (there * F.cross_entropy(to_color, color[rows], reduction="none")).mean()
            size_loss = F.binary_cross_entropy_with_logits(to_size, small[rows], reduction="none")
            loss = loss + (there * size_loss).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(1, loss=loss.detach())
    return Judge(scenes.grid, variant == "relations", network.eval().requires_grad_(False))


def prompt_diversity(x: Tensor) -> dict[str, Estimate]:
    """How different the samples of one prompt are, averaged over prompts.

    Args:
        x: Samples in model space, (prompts, seeds, *shape).

    Returns:
        ``vendi``: the Vendi score of the samples of a prompt, with black, -1, as the zero of the cosines;
        compare it at equal numbers of seeds only. ``distance``: the mean over pairs of the root mean square
        difference. Standard errors are those of means over prompts.

    Raises:
        UserError: Fewer than two prompts or seeds.
    """
    if x.ndim < 3 or min(x.shape[:2]) < 2:
        raise UserError(
            "diversity needs two or more samples of two or more prompts",
            got=tuple(x.shape),
            expected="(prompts, seeds, *shape)",
        )
    rows = x.detach().cpu().double().flatten(2)
    vendi = torch.tensor([vendi_score(row + 1) for row in rows], dtype=torch.float64)
    distance = torch.stack([torch.pdist(row).mean() for row in rows]) / rows.shape[2] ** 0.5
    return {"vendi": mean_of(vendi), "distance": mean_of(distance)}


def _slots(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pictures (N, 3, height, width) as slots (N * S, 3, 8, 8), row by row."""
    rows, columns = grid
    parts = x.unflatten(3, (columns, SIDE)).unflatten(2, (rows, SIDE))  # (N, 3, rows, 8, columns, 8)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, SIDE, SIDE)
