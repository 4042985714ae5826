# SPDX-License-Identifier: Apache-2.0
"""Scenes of the embedded question set: which objects there are and where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PATCH = 8  # pixels; the embedded model's patch size, so labels fall on its grid
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "heart")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
DIGITS = ("1", "2", "3", "4", "5", "6", "7", "8")
MIN_SIZE, MAX_SIZE = 24, 44  # pixels: 3 to 5.5 patches wide, so at most 6 or 7 are touched
GAP = 4  # pixels left free between the boxes of two objects


@dataclass(frozen=True)
class Layout:
    """How full pictures are.

    Attributes:
        low: fewest objects.
        high: most objects; fewer are placed if a picture has no room left.
        smallest: width of the smallest, pixels.
        largest: width of the largest, pixels.
    """

    low: int = 3
    high: int = 6
    smallest: int = MIN_SIZE
    largest: int = MAX_SIZE


LAYOUTS = {"plain": Layout(), "dense": Layout(low=6, high=8, smallest=20, largest=26)}


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Attributes:
        shape: One of :data:`SHAPES`.
        color: One of :data:`COLORS`.
        digit: The digit printed on it, one of :data:`DIGITS`.
        left: Left edge of its box, pixels.
        top: Upper edge of its box, pixels.
        size: Width and height of its box, pixels.
    """

    shape: str
    color: str
    digit: str
    left: int
    top: int
    size: int

    @property
    def name(self) -> str:
        """Colour and shape; no two objects of one picture share it."""
        return f"{self.color} {self.shape}"

    @property
    def center(self) -> tuple[float, float]:
        """Centre of the box as (x, y), pixels."""
        return self.left + self.size / 2, self.top + self.size / 2


def sample_scene(
    rng: np.random.Generator, side: int, layout: Layout = LAYOUTS["plain"]
) -> list[SceneObject]:
    """Draw the objects of one picture.

    A group of two to four objects shares its colour or its shape. Without such groups nearly every
    count would be zero or one, and a name's two words would never both be needed.

    Args:
        rng: Source of randomness.
        side: Side of the square picture, pixels.
        layout: How many objects, and how large.

    Returns:
        Objects with pairwise different (colour, shape) and disjoint boxes.
    """
    group = int(rng.integers(2, min(5, layout.high + 1)))
    count = int(rng.integers(max(layout.low, group), layout.high + 1))
    names = _names(rng, group, count)
    digits = rng.integers(0, len(DIGITS), size=count)
    objects: list[SceneObject] = []
    for (color, shape), digit in zip(names, digits, strict=True):
        place = _free_place(rng, objects, side, layout)
        if place is not None:
            left, top, size = place
            item = SceneObject(SHAPES[shape], COLORS[color], DIGITS[digit], left, top, size)
            objects.append(item)
    return objects


def _names(rng: np.random.Generator, group: int, count: int) -> list[tuple[int, int]]:
    """Different (colour, shape) index pairs; the first ``group`` of them share one of the two."""
    colors = rng.permutation(len(COLORS))
    shapes = rng.permutation(len(SHAPES))
    if rng.random() < 0.5:
        names = [(int(colors[0]), int(shapes[i])) for i in range(group)]
    else:
        names = [(int(colors[i]), int(shapes[0])) for i in range(group)]
    shared = names[0]
    by_color = names[1][0] == shared[0]
    while len(names) < count:
        pair = int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))
        joins_group = pair[0] == shared[0] if by_color else pair[1] == shared[1]
        if not joins_group and pair not in names:
            names.append(pair)
    return names


def _free_place(
    rng: np.random.Generator, objects: list[SceneObject], side: int, layout: Layout
) -> tuple[int, int, int] | None:
    """A (left, top, size) whose box keeps :data:`GAP` from all others, or None after 40 tries."""
    for _ in range(40):
        size = int(rng.integers(layout.smallest, layout.largest + 1))
        left, top = (int(v) for v in rng.integers(0, side - size + 1, size=2))
        clear = all(
            left >= o.left + o.size + GAP
            or o.left >= left + size + GAP
            or top >= o.top + o.size + GAP
            or o.top >= top + size + GAP
            for o in objects
        )
        if clear:
            return left, top, size
    return None
