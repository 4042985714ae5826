# SPDX-License-Identifier: Apache-2.0
"""Pooling: the largest grid within the budget that has about the picture's aspect."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visprune.backbones.vlm.picture import grid
from visprune.core.selection import Selection
from visprune.methods.pool import best_grid, pool_tokens

sides = st.integers(1, 30)


@pytest.mark.parametrize(
    ("height", "width", "budget", "cells"),
    [(24, 24, 64, (8, 8)), (24, 24, 576, (24, 24)), (24, 24, 144, (12, 12)),
     (24, 24, 128, (11, 11)),
     (24, 24, 1, (1, 1)), (24, 24, 3, (1, 1)), (12, 24, 72, (6, 12)), (24, 12, 72, (12, 6)),
     (24, 24, 1000, (24, 24)), (1, 10, 5, (1, 5)), (2, 2, 2, (1, 1)), (3, 4, 12, (3, 4))],
)  # fmt: skip
def test_known_grids(height: int, width: int, budget: int, cells: tuple[int, int]) -> None:
    assert best_grid(height, width, budget) == cells


@given(sides, sides, st.integers(1, 900))
def test_no_larger_grid_of_that_aspect_fits(height: int, width: int, budget: int) -> None:
    rows, columns = best_grid(height, width, budget)
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert rows * columns <= budget

    def fits(r: int, c: int) -> bool:
        return abs(math.log(c * height / (r * width))) <= math.log(1.25)

    grids = [(r, c) for r in range(1, height + 1) for c in range(1, width + 1) if r * c <= budget]
    area = [r * c for r, c in grids if fits(r, c)]
    if area:
        assert fits(rows, columns)
        assert rows * columns == max(area)


@given(sides, sides, st.integers(1, 900))
def test_cells_are_averages_of_blocks(height: int, width: int, budget: int) -> None:
    pos = grid(1, height, width)
    index, dest, weight = pool_tokens(pos, budget, "image")
    made = Selection.assign(index[None], dest[None], weight[None])
    rows, columns = best_grid(height, width, budget)
    assert made.num_slots == rows * columns
    assert bool((dest >= 0).all())  # every patch is in a cell
    sums = made.matrix().sum(2)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert torch.equal(dest[index], torch.arange(len(index)))  # a cell stands for one of its own
    # Cells are rectangles: a row of cells and a column of cells.
    band, line = dest // columns, dest % columns
    for axis, part in ((1, band), (2, line)):
        by_place = [set(part[pos[:, axis] == place].tolist()) for place in pos[:, axis].unique()]
        assert all(len(found) == 1 for found in by_place)
        order = [found.pop() for found in by_place]
        assert order == sorted(order)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 200))
def test_it_is_adaptive_average_pooling_where_the_sides_divide(h: int, w: int, budget: int) -> None:
    pos = grid(1, h, w)
    index, dest, weight = pool_tokens(pos, budget, "image")
    rows, columns = best_grid(h, w, budget)
    if h % rows or w % columns:
        return
    x = torch.arange(float(h * w))[None, :, None]
    made = Selection.assign(index[None], dest[None], weight[None]).reduce(x)
    want = torch.nn.functional.adaptive_avg_pool2d(x.reshape(1, 1, h, w), (rows, columns))
    torch.testing.assert_close(made.flatten(), want.flatten())


def test_a_cell_stands_for_the_patch_at_its_middle() -> None:
    index, _, _ = pool_tokens(grid(1, 9, 9), 9, "image")
    assert index.tolist() == [r * 9 + c for r in (1, 4, 7) for c in (1, 4, 7)]
    # An even block has four middles: the lower index.
    index, _, _ = pool_tokens(grid(1, 4, 4), 4, "image")
    assert index.tolist() == [0, 2, 8, 10]


def test_a_video_is_pooled_in_time_only_where_it_must() -> None:
    pos = grid(8, 4, 4)
    index, dest, _ = pool_tokens(pos, 32, "video")
    assert len(index) == 32  # 8 frames of 2 x 2
    assert torch.equal(pos[index][:, 0], torch.arange(8).repeat_interleave(4))
    index, dest, _ = pool_tokens(pos, 4, "video")
    assert len(index) == 4  # spans of two frames, one cell each
    assert dest.tolist() == torch.arange(4).repeat_interleave(32).tolist()
    assert len(pool_tokens(pos, 1, "video")[0]) == 1


def test_a_tiled_picture_is_pooled_region_by_region() -> None:
    crops = grid(1, 12, 24)
    crops[:, 0] = 1
    pos = torch.cat([grid(1, 12, 12), crops])
    index, dest, weight = pool_tokens(pos, 48, "image")
    assert (dest[:144] < 16).all()  # a third of the budget for a third of the tokens: 4 x 4
    assert (dest[144:] >= 16).all()
    assert int(dest.max()) + 1 == len(index) <= 48
    index, dest, weight = pool_tokens(pos, 1, "image")
    assert len(index) == 1
    assert bool((dest[:144] == 0).all())
    assert bool((dest[144:] == -1).all())  # the thumbnail shows the whole picture
    assert float(weight[144:].abs().sum()) == 0.0
