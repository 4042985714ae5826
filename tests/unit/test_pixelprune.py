# SPDX-License-Identifier: Apache-2.0
"""PixelPrune's rule equals a loop over the cells in float64, and its properties hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from visprune.core.method import Context
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError
from visprune.methods.pixelprune import unpredicted


def one_by_one(grid: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """What stays, and what stands for each cell: the rule as it is written down, cell by cell."""
    height, width, _ = grid.shape
    stands, stays = grid.double().clone(), torch.zeros(height, width, dtype=torch.bool)

    def like(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= tolerance

    for row in range(height):
        for column in range(width):
            if row == column == 0:
                stays[0, 0] = True
                continue
            if row == 0 or column == 0:
                guess = stands[row, column - 1] if row == 0 else stands[row - 1, 0]
            else:
                left, up = stands[row, column - 1], stands[row - 1, column]
                corner = stands[row - 1, column - 1]
                guess = up if like(corner, left) and not like(corner, up) else left
            if like(grid[row, column].double(), guess):
                stands[row, column] = guess
            else:
                stays[row, column] = True
    return stays, stands


def screen(height: int, width: int, seed: int) -> Tensor:
    """Flat rectangles upon each other, ``[H, W, 6]``."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.zeros(height, width, 6)
    for _ in range(5):
        top, left = (int(torch.randint(0, n, (1,), generator=draw)) for n in (height, width))
        grid[top : top + 4, left : left + 5] = torch.rand(6, generator=draw)
    return grid


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (7, 11), (16, 12)])
def test_the_rule_is_that_of_the_loop(shape: tuple[int, int], tolerance: float) -> None:
    for seed in range(6):
        grid = screen(*shape, seed)
        if seed % 2:
            noise = torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed))
            grid = grid + 0.04 * noise
        stays, stands = one_by_one(grid, tolerance)
        assert torch.equal(unpredicted(grid[None], tolerance)[0], stays)
        assert float((stands - grid.double()).abs().max()) <= tolerance  # errors do not add up


def test_frames_are_looked_at_one_by_one() -> None:
    grids = torch.stack([screen(6, 8, seed) for seed in range(3)])
    for tolerance in (0.0, 0.1):
        each = [unpredicted(grid[None], tolerance)[0] for grid in grids]
        assert torch.equal(unpredicted(grids, tolerance), torch.stack(each))


def _tokens(grid: Tensor) -> VisualTokens:
    frames, height, width, features = grid.shape
    axes = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width)), indexing="ij")
    pos = torch.stack(axes, -1).reshape(1, -1, 3)
    flat = grid.reshape(1, -1, features)
    return VisualTokens(flat, torch.ones(flat.shape[:2]), pos)


def test_what_it_keeps_of_plain_pictures() -> None:
    method = visprune.get_method("pixelprune")
    plain = method.select(_tokens(torch.full((2, 5, 7, 12), 0.3)), Context())
    assert plain.index.tolist() == [[0, 35]]  # one of each frame
    noise = torch.rand(1, 5, 7, 12)
    assert method.select(_tokens(noise), Context()).num_slots == 35
    one = method.select(_tokens(noise[:, :1, :1]), Context())
    assert one.index.tolist() == [[0]]
    halves = torch.zeros(1, 6, 8, 12)
    halves[:, :, 4:] = 1.0
    assert method.select(_tokens(halves), Context()).index.tolist() == [[0, 4]]  # an edge down
    halves = torch.zeros(1, 6, 8, 12)
    halves[:, 3:] = 1.0
    assert method.select(_tokens(halves), Context()).index.tolist() == [[0, 24]]  # and across
    holes = torch.full((1, 4, 4, 3), float("nan"))
    assert method.select(_tokens(holes), Context()).num_slots == 16  # nothing is known of them


@pytest.mark.parametrize("given", [{"tolerance": -0.1}, {"std": 0.0}])
def test_numbers_that_say_nothing(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tolerance of at least 0 and a std above 0"):
        visprune.get_method("pixelprune", **given)
    loose = visprune.get_method("pixelprune", tolerance=0.1, std=0.25)
    grid = torch.tensor([0.0, 0.39, 0.8])[None, None, :, None]
    assert loose.select(_tokens(grid), Context()).index.tolist() == [[0, 2]]
