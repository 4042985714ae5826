# SPDX-License-Identifier: Apache-2.0
"""Which part of a picture a model sees: what its preparation cuts off, or adds at the sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["seen_by_processor", "seen_by_transform"]

Box = list[float]


@dataclass
class _Canvas:
    """What is left of a picture, in pixels of the original, and how many of its own pixels it has.

    Attributes:
        left: left end in the original.
        top: upper end.
        width: in pixels of the original; beyond them where it was padded.
        height: the same.
        columns: its own pixels.
        rows: the same.
    """

    left: float
    top: float
    width: float
    height: float
    columns: float
    rows: float

    @classmethod
    def of(cls, size: tuple[int, int]) -> _Canvas:
        return cls(0.0, 0.0, *size, *size)

    def pad_to_square(self) -> None:
        side = max(self.width, self.height)
        # The processor shifts by whole pixels.
        self.left, self.top = -((side - self.width) // 2), -((side - self.height) // 2)
        self.width = self.height = self.columns = self.rows = side

    def resize(self, rows: float, columns: float) -> None:
        self.rows, self.columns = rows, columns

    def resize_shortest(self, edge: float) -> None:
        scale = edge / min(self.rows, self.columns)
        self.resize(self.rows * scale, self.columns * scale)

    def center_crop(self, rows: float, columns: float) -> None:
        width, height = (columns / self.columns * self.width, rows / self.rows * self.height)
        self.left += (self.width - width) / 2
        self.top += (self.height - height) / 2
        self.width, self.height, self.rows, self.columns = width, height, rows, columns

    def box(self, size: tuple[int, int]) -> Box | None:
        """Left, top, right, bottom in fractions of the picture; ``None``: all of it."""
        across, down = size
        ends = [self.left / across, self.top / down,
                (self.left + self.width) / across, (self.top + self.height) / down]  # fmt: skip
        whole = all(abs(end - full) < 1e-6 for end, full in zip(ends, (0, 0, 1, 1), strict=True))
        return None if whole else [round(end, 6) for end in ends]


def seen_by_processor(image_processor: Any, family: str, size: tuple[int, int]) -> Box | None:
    """Return where the grid of a transformers model lies on a picture.

    LLaVA-1.5's processor resizes the shorter edge and cuts the middle out, or pads to a square
    first (``do_pad``). LLaVA-NeXT squeezes the thumbnail and takes the padding of its crops away
    again, Qwen and Pixtral squeeze to whole patches: their grids cover the picture, also where a
    processor's settings speak of a crop (LLaVA-NeXT's is one of tiles that have that size already).

    Args:
        image_processor: of the model.
        family: ``config.model_type``.
        size: width and height of the picture.

    Returns:
        Left, top, right, bottom in fractions of the picture, beyond 0 and 1 where it was padded;
        ``None``: the grid covers the picture.
    """
    if family != "llava" or image_processor is None:
        return None
    if getattr(image_processor, "patch_size", None):  # Pixtral: it pads the batch, not the picture
        return None
    canvas = _Canvas.of(size)
    if getattr(image_processor, "do_pad", False):
        canvas.pad_to_square()
    if getattr(image_processor, "do_resize", True):
        target = image_processor.size
        if target.get("shortest_edge"):
            canvas.resize_shortest(target["shortest_edge"])
        elif target.get("height") and target.get("width"):
            canvas.resize(target["height"], target["width"])
    if getattr(image_processor, "do_center_crop", False):
        canvas.center_crop(image_processor.crop_size["height"], image_processor.crop_size["width"])
    return canvas.box(size)


def seen_by_transform(transform: Any, size: tuple[int, int]) -> Box | None:
    """Return the same for the torchvision transform of a timm or open_clip model.

    Args:
        transform: a ``Compose`` of ``Resize`` and ``CenterCrop`` and what moves no pixel.
        size: width and height of the picture.

    Returns:
        As :func:`seen_by_processor`; ``None`` also for steps that it does not know.
    """
    from torchvision import transforms

    canvas = _Canvas.of(size)
    for step in getattr(transform, "transforms", ()):
        if isinstance(step, transforms.Resize):
            sides = step.size
            if isinstance(sides, Sequence) and len(sides) == 2:
                canvas.resize(*sides)
            else:
                canvas.resize_shortest(sides[0] if isinstance(sides, Sequence) else sides)
        elif isinstance(step, transforms.CenterCrop):
            canvas.center_crop(*step.size)
        elif "crop" in type(step).__name__.lower() or "resize" in type(step).__name__.lower():
            return None
    return canvas.box(size)
