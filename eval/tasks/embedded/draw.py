# SPDX-License-Identifier: Apache-2.0
"""Drawing the scenes of the embedded question set with NumPy alone."""

from __future__ import annotations

from functools import cache

import numpy as np

from visprune.eval.tasks.embedded.scene import PATCH, SceneObject

RGB = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (60, 90, 245),
    "yellow": (245, 225, 50),
    "purple": (185, 70, 220),
    "orange": (250, 145, 30),
    "cyan": (70, 220, 230),
    "white": (245, 245, 245),
}
# 5 x 7 bitmaps, one row of five bits per number, top to bottom.
_GLYPHS = {
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
}
_COVERED = 0.3  # share of a patch that an object must cover to own it


def draw_scene(rng: np.random.Generator, objects: list[SceneObject], side: int) -> np.ndarray:
    """Paint objects on a textured background with distractors.

    Args:
        rng: Source of randomness for texture, distractors and shade.
        objects: What to paint.
        side: Side of the square picture, pixels.

    Returns:
        Picture, uint8 ``[side, side, 3]``.
    """
    canvas = _background(rng, side)
    _distract(rng, canvas)
    for item in objects:
        rows = slice(item.top, item.top + item.size)
        cols = slice(item.left, item.left + item.size)
        mask = shape_mask(item.shape, item.size)[..., None]
        color = np.asarray(RGB[item.color], np.float32) + rng.uniform(-12, 12, 3)
        canvas[rows, cols] += mask * (color - canvas[rows, cols])
        _print_digit(canvas[rows, cols], item)
    noise = rng.integers(-10, 11, size=canvas.shape, dtype=np.int8)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def patch_owner(objects: list[SceneObject], side: int) -> np.ndarray:
    """Which object each patch shows.

    Args:
        objects: Objects of the picture.
        side: Side of the square picture, pixels, a multiple of the patch size.

    Returns:
        Index into ``objects``, or -1 for background, int64 ``[side / 8, side / 8]``.
    """
    grid = side // PATCH
    owner = np.full((grid, grid), -1, np.int64)
    for index, item in enumerate(objects):
        row, col = item.top // PATCH, item.left // PATCH
        span = (item.size + 2 * PATCH - 2) // PATCH
        area = np.zeros((span * PATCH, span * PATCH), np.float32)
        top, left = item.top - row * PATCH, item.left - col * PATCH
        area[top : top + item.size, left : left + item.size] = shape_mask(item.shape, item.size)
        share = area.reshape(span, PATCH, span, PATCH).mean(axis=(1, 3))
        share = share[: grid - row, : grid - col]
        owner[row : row + span, col : col + span][share >= _COVERED] = index
    return owner


@cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Antialiased mask of a shape in its box, float32 ``[size, size]`` in [0, 1]."""
    fine = 4
    axis = (np.arange(size * fine) + 0.5) / (size * fine) * 2 - 1
    u, v = axis[None, :], axis[:, None]  # u to the right, v down, both in (-1, 1)
    inside = {
        "circle": lambda: u**2 + v**2 <= 1,
        "square": lambda: np.maximum(abs(u), abs(v)) <= 0.9,
        "triangle": lambda: (abs(u) <= (v + 1) / 2) & (v <= 0.95),
        "diamond": lambda: abs(u) + abs(v) <= 1,
        "cross": lambda: np.minimum(abs(u), abs(v)) <= 0.4,
        "heart": lambda: _heart(u * 1.2, 0.15 - v * 1.12),
    }[shape]()
    mask = (inside & np.ones((size * fine, size * fine), bool)).astype(np.float32)
    return mask.reshape(size, fine, size, fine).mean(axis=(1, 3))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0


@cache
def _glyph(digit: str, height: int) -> np.ndarray:
    """Mask of a digit, float32 ``[height, 5 / 7 of it]``."""
    rows = [[row >> (4 - bit) & 1 for bit in range(5)] for row in _GLYPHS[digit]]
    width, fine = round(height * 5 / 7), 7 * 5
    big = np.kron(np.asarray(rows, np.float32), np.ones((height * 5, width * 7), np.float32))
    return big.reshape(height, fine, width, fine).mean(axis=(1, 3))


def _print_digit(box: np.ndarray, item: SceneObject) -> None:
    """Print the digit in near-black at the middle of the box (lower on a triangle), in place."""
    mask = _glyph(item.digit, 11 if item.size < 32 else 14)[..., None]
    height, width = mask.shape[:2]
    drop = item.size // 7 if item.shape == "triangle" else 0
    top, left = (item.size - height) // 2 + drop, (item.size - width) // 2
    region = box[top : top + height, left : left + width]
    region += mask * (15 - region)


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth random texture, float32 ``[side, side, 3]``, darker than every object colour."""
    knots = int(rng.integers(4, 13))
    base = rng.uniform(40, 110, 3)
    coarse = (
        base + rng.uniform(-35, 35, (knots, knots, 1)) + rng.uniform(-12, 12, (knots, knots, 3))
    )
    weights = _upsample(side, knots)
    smooth = np.einsum("yk,klc,xl->yxc", weights, coarse.astype(np.float32), weights, optimize=True)
    return np.ascontiguousarray(smooth, dtype=np.float32)


@cache
def _upsample(side: int, knots: int) -> np.ndarray:
    """Linear interpolation matrix from ``knots`` points to ``side`` pixels."""
    place = np.linspace(0, knots - 1, side)
    return np.clip(1 - abs(place[:, None] - np.arange(knots)), 0, 1).astype(np.float32)


def _distract(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draw thin lines and small blobs in arbitrary colours, in place."""
    side = len(canvas)
    for _ in range(int(rng.integers(2, 7)) * side // 192):
        start, end = rng.uniform(0, side - 2, (2, 2))
        steps = np.linspace(0, 1, int(abs(end - start).max()) + 2)[:, None]
        line = (start + steps * (end - start)).astype(np.int64)
        color = rng.uniform(20, 230, 3)
        for shift in (0, 1):
            canvas[line[:, 0] + shift, line[:, 1]] = color
    for _ in range(int(rng.integers(4, 13)) * side // 192):
        size = int(rng.integers(4, 9))
        top, left = rng.integers(0, side - size, 2)
        blob = canvas[top : top + size, left : left + size]
        blob += shape_mask("circle", size)[..., None] * (rng.uniform(20, 230, 3) - blob)
