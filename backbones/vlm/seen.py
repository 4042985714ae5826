# SPDX-License-Identifier: Apache-2.0
"""Which part of a picture a model sees, and how far out of shape: what its preparation does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Canvas", "Seen", "fit_to_square"]

# Processors of transformers that make one square of a picture. Others cut it into tiles or whole
# patches, and their settings may speak of a crop all the same (LLaVA-NeXT's is one of tiles that
# have that size already).
_SQUARING = (
    *("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor", "Gemma3ImageProcessor"),
)


@dataclass(frozen=True)
class Seen:
    """Where the grid of a model's tokens lies on a picture.

    Attributes:
        box: left, top, right, bottom in fractions of the picture, beyond 0 and 1 where it was
            padded; ``None``: the grid covers the picture.
        stretch: how much wider than high a square of the picture is to the model; 1: square.
    """

    box: tuple[float, float, float, float] | None = None
    stretch: float = 1.0

    @property
    def share(self) -> float:
        """Part of the picture that is seen."""
        if self.box is None:
            return 1.0
        left, top, right, bottom = self.box
        return (min(right, 1.0) - max(left, 0.0)) * (min(bottom, 1.0) - max(top, 0.0))

    @property
    def squeezed(self) -> float:
        """The same as :attr:`stretch`, whichever side is the longer one: 1 or more."""
        return max(self.stretch, 1.0 / self.stretch)


@dataclass
class Canvas:
    """What is left of a picture, in pixels of the original, and how many of its own pixels it has.

    Attributes:
        size: width and height of the original.
        left: left end in the original.
        top: upper end.
        width: in pixels of the original; beyond them where it was padded.
        height: the same.
        columns: its own pixels.
        rows: the same.
    """

    size: tuple[int, int]
    left: float
    top: float
    width: float
    height: float
    columns: float
    rows: float

    @classmethod
    def of(cls, size: tuple[int, int]) -> Canvas:
        """The whole of a picture of a width and a height."""
        return cls(size, 0.0, 0.0, *size, *size)

    def pad_to_square(self) -> None:
        """Put it into the middle of the square of its longer side."""
        side = max(self.width, self.height)
        # Processors shift by whole pixels.
        self.left, self.top = -((side - self.width) // 2), -((side - self.height) // 2)
        self.width = self.height = self.columns = self.rows = side

    def resize(self, rows: float, columns: float) -> None:
        """Make it of so many pixels, out of shape if need be."""
        self.rows, self.columns = rows, columns

    def resize_shortest(self, edge: float) -> None:
        """Make its shorter side of so many pixels."""
        scale = edge / min(self.rows, self.columns)
        self.resize(self.rows * scale, self.columns * scale)

    def center_crop(self, rows: float, columns: float) -> None:
        """Cut the middle out, or pad around it."""
        width, height = (columns / self.columns * self.width, rows / self.rows * self.height)
        self.left += (self.width - width) / 2
        self.top += (self.height - height) / 2
        self.width, self.height, self.rows, self.columns = width, height, rows, columns

    def seen(self) -> Seen:
        """Where it lies on the original, and how far it is out of shape."""
        across, down = self.size
        ends = (self.left / across, self.top / down,
                (self.left + self.width) / across, (self.top + self.height) / down)  # fmt: skip
        whole = all(abs(end - full) < 1e-6 for end, full in zip(ends, (0, 0, 1, 1), strict=True))
        stretch = (self.columns / self.width) / (self.rows / self.height)
        left, top, right, bottom = (round(end, 6) for end in ends)
        return Seen(None if whole else (left, top, right, bottom), stretch)


def fit_to_square(image_processor: Any, canvas: Canvas) -> None:
    """Do to a canvas what a processor of transformers does to a picture, where it squares it.

    Resized by the shorter edge and the middle cut out (LLaVA-1.5), padded to a square before that
    (its ``do_pad``), or squeezed into a square. A processor that is not known to do one of them
    changes nothing.
    """
    kinds = {kind.__name__.removesuffix("Fast") for kind in type(image_processor).__mro__}
    if kinds.isdisjoint(_SQUARING):
        return
    pads = "LlavaImageProcessor" in kinds  # CLIP's do_pad evens out a batch
    if pads and getattr(image_processor, "do_pad", False):
        canvas.pad_to_square()
    size, crop = image_processor.size or {}, getattr(image_processor, "crop_size", None) or {}
    if getattr(image_processor, "do_resize", True):
        if size.get("shortest_edge"):
            canvas.resize_shortest(size["shortest_edge"])
        elif size.get("height") and size.get("width"):
            canvas.resize(size["height"], size["width"])
    if getattr(image_processor, "do_center_crop", False) and crop.get("height"):
        canvas.center_crop(crop["height"], crop["width"])
