# SPDX-License-Identifier: Apache-2.0
"""PixelPrune: leave out patches that their neighbours predict (2026, arXiv:2604.00886)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import (
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PixelPrune(PruningMethod):
    """Drops blocks of patches whose pixels repeat, before the encoder: it gets shorter too.

    A block is what becomes one token (2 x 2 patches in Qwen-VL). In raster order each is predicted
    by the one to its left, or, where an edge runs down between them (the upper left equals the left
    one and not the upper one), by the one above; in the first row by the left one, in the first
    column by the upper one. What is predicted to within ``tolerance`` leaves. The comparison is
    with what stands for a neighbour, so that errors do not add up; at tolerance 0 nothing is lost
    of the pixels. Frames of a clip are looked at one by one. Position ids stay.

    Documents and screens repeat much (22 to 71 % of their blocks are unique in the paper), photos
    hardly anything: the picture decides how many tokens stay.

    Args:
        tolerance: largest difference of one pixel, of a range of 1 (the paper's tau, 0 to 0.1).
        std: what the processor divides pixels by, where ``tolerance`` is not 0: 0.5 for Qwen3-VL;
            of a processor with three numbers, their mean (Qwen2-VL: 0.27).
    """

    name: ClassVar[str] = "pixelprune"

    tolerance: float = 0.0
    std: float = 0.5

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if not (self.tolerance >= 0.0 and self.std > 0.0):
            raise ConfigError(
                f"pixelprune takes a tolerance of at least 0 and a std above 0; got "
                f"{self.tolerance} and {self.std}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage before the encoder, which decides itself."""
        return (Stage(Site.pixels()),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """What is not predicted."""
        frames, height, width = (int(n) + 1 for n in tokens.pos[0].amax(0))
        grid = tokens.features.reshape(-1, height, width, tokens.features.shape[-1])
        kept = unpredicted(grid, self.tolerance / self.std)
        return Selection.where(kept.reshape(len(tokens.features), frames * height * width))

    def macs(self, count: int, keep: int, width: int) -> int:
        """Three differences a block."""
        return 3 * count * width


def unpredicted(grid: Tensor, tolerance: float) -> Tensor:
    """Which cells of a grid their neighbours do not predict, bool ``[B, H, W]``.

    Args:
        grid: ``[B, H, W, E]``.
        tolerance: largest difference that is none.
    """
    if tolerance == 0.0:  # what stands for a cell then equals it
        left, up = grid[:, 1:, :-1], grid[:, :-1, 1:]
        above = (grid[:, :-1, :-1] == left).all(-1) & (grid[:, :-1, :-1] != up).any(-1)
        kept = torch.ones(grid.shape[:3], dtype=torch.bool, device=grid.device)
        kept[:, 0, 1:] = (grid[:, 0, 1:] != grid[:, 0, :-1]).any(-1)
        kept[:, 1:, 0] = (grid[:, 1:, 0] != grid[:, :-1, 0]).any(-1)
        by_left, by_up = ((grid[:, 1:, 1:] != other).any(-1) for other in (left, up))
        kept[:, 1:, 1:] = torch.where(above, by_up, by_left)
        return kept
    return _anchored(grid, tolerance)


def _anchored(grid: Tensor, tolerance: float) -> Tensor:
    """The same for a tolerance: a cell that leaves is taken over by what predicted it.

    Cells of one anti-diagonal depend on earlier ones alone, and are decided together.
    """
    _, height, width, _ = grid.shape
    stands = grid.clone()
    kept = torch.ones(grid.shape[:3], dtype=torch.bool, device=grid.device)
    for line in range(1, height + width - 1):
        row = torch.arange(max(0, line - width + 1), min(height, line + 1), device=grid.device)
        column = line - row
        up_row, left_column = (row - 1).clamp(min=0), (column - 1).clamp(min=0)
        left, up = stands[:, row, left_column], stands[:, up_row, column]
        corner = stands[:, up_row, left_column]
        above = _near(corner, left, tolerance) & ~_near(corner, up, tolerance)
        above = torch.where(row == 0, False, torch.where(column == 0, True, above))
        predicted = torch.where(above[..., None], up, left)
        near = _near(grid[:, row, column], predicted, tolerance)
        kept[:, row, column] = ~near
        stands[:, row, column] = torch.where(near[..., None], predicted, grid[:, row, column])
    return kept


def _near(one: Tensor, other: Tensor, tolerance: float) -> Tensor:
    return (one - other).abs().amax(-1) <= tolerance
