# SPDX-License-Identifier: Apache-2.0
"""Labelled pictures drawn by code: a data set that needs no download, to see a recipe run."""

from __future__ import annotations

import numpy as np

from visprune.errors import ConfigError
from visprune.eval.tasks.embedded.draw import draw_scene
from visprune.eval.tasks.embedded.scene import COLORS, DIGITS, SHAPES, SceneObject
from visprune.train.image.pictures import Pictures

__all__ = ["DRAWN", "DrawnPictures"]

DRAWN = "drawn:"
_SIDE = 64  # pixels
_SMALLEST, _LARGEST = 24, 44
_PARTS = {"train": 0, "val": 1, "test": 2}


class DrawnPictures(Pictures):
    """One shape on a textured background; the class is the shape, colour and place say nothing.

    Args:
        path: ``drawn:N``: N pictures to train with, a quarter as many in any other part.
        split: ``train``, ``val`` or ``test``; no two share a picture.

    Raises:
        ConfigError: N is no whole number of at least one picture of each class, or there is no
            such part.
    """

    def __init__(self, path: str, split: str) -> None:
        count = path.removeprefix(DRAWN)
        if not count.isdecimal() or int(count) < 4 * len(SHAPES):
            raise ConfigError(
                f"data.path={path!r}: drawn pictures are asked for as {DRAWN}N, with N of at least "
                f"{4 * len(SHAPES)}, such as {DRAWN}1200."
            )
        if split not in _PARTS:
            raise ConfigError(f"Drawn pictures have the parts {', '.join(_PARTS)}; got {split!r}.")
        number = int(count) if split == "train" else int(count) // 4
        self.where, self.classes = f"{path}, {split}", list(SHAPES)
        self.labels = np.arange(number, dtype=np.int64) % len(SHAPES)
        self._part = _PARTS[split]

    def name(self, index: int) -> str:
        """See :class:`Pictures`."""
        return f"{self.where}: number {index}"

    def data(self, index: int) -> np.ndarray:
        """See :class:`Pictures`."""
        rng = np.random.default_rng([_SIDE, self._part, index])
        size = int(rng.integers(_SMALLEST, _LARGEST + 1))
        left, top = (int(x) for x in rng.integers(0, _SIDE - size + 1, 2))
        color, digit = COLORS[rng.integers(len(COLORS))], DIGITS[rng.integers(len(DIGITS))]
        shown = SceneObject(SHAPES[self.labels[index]], color, digit, left, top, size)
        return draw_scene(rng, [shown], _SIDE)
