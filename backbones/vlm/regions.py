# SPDX-License-Identifier: Apache-2.0
"""Where the grids of a picture that was cut into tiles lie on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Region:
    """One grid of tokens (one value of ``t``) of a picture.

    Attributes:
        name: what it is.
        box: left, top, right, bottom in fractions of the picture; ``None``: not known.
    """

    name: str
    box: Box | None = WHOLE


def layout(tiles: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles that a picture was cut into.

    Processors choose the layout whose shape is closest to the picture's; of those of the same
    number that is the one here.

    Args:
        tiles: how many.
        size: width and height of the picture.
    """
    wanted = size[0] / size[1]
    pairs = [(tiles // columns, columns) for columns in range(1, tiles + 1) if not tiles % columns]
    # Ratios are compared as processors do: by their difference.
    return min(pairs, key=lambda pair: abs(pair[1] / pair[0] - wanted))


def tiled(count: int, size: tuple[int, int], thumbnail: Literal["first", "last"]) -> list[Region]:
    """Regions of a picture cut into tiles row by row, beside which its whole is shown.

    Args:
        count: regions, the whole among them.
        size: width and height of the picture.
        thumbnail: where the whole stands.
    """
    if count == 1:
        return [Region("full picture")]
    rows, columns = layout(count - 1, size)
    found = [
        Region(
            f"tile {row + 1}, {column + 1}",
            (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    whole = Region("thumbnail")
    return [whole, *found] if thumbnail == "first" else [*found, whole]
