# SPDX-License-Identifier: Apache-2.0
"""Which patches of a picture a model still sees, and how to paint them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visprune.core.trace import Trace
from visprune.errors import ConfigError

__all__ = ["KeptMap", "kept_of", "mosaic", "paint", "place", "seen_part"]

_VEIL = np.array([236, 236, 240], np.float32)
_KEPT = np.array([0, 0, 0], np.float32)
_MERGED = np.array([213, 94, 0], np.float32)  # vermillion of the Okabe-Ito palette


@dataclass(frozen=True)
class KeptMap:
    """Where every token of one picture went.

    Attributes:
        pos: (t, h, w) of all N tokens, ``[N, 3]``.
        dest: slot that each went into, -1 where dropped, ``[N]``.
        index: the token that each slot stands for, ``[K]``.
    """

    pos: Tensor
    dest: Tensor
    index: Tensor

    def grid(self, region: int) -> tuple[int, int]:
        """Rows and columns of a region (``t``)."""
        last = self.pos[self.pos[:, 0] == region].amax(0)
        return int(last[1]) + 1, int(last[2]) + 1

    @property
    def regions(self) -> list[int]:
        """The values of ``t``: thumbnail and full grid of a tiled picture, frames of a video."""
        return [int(t) for t in self.pos[:, 0].unique()]


def kept_of(trace: Trace) -> KeptMap:
    """Where the tokens of the one picture of a forward went.

    Raises:
        ConfigError: it held not exactly one picture, or its tokens are no patches.
    """
    if len(trace.kept) != 1:
        raise ConfigError(
            f"A drawing shows exactly one picture; the last forward held {len(trace.kept)}. Run "
            f"one, alone."
        )
    if trace.placed and trace.placed[0] == "queries":
        raise ConfigError(
            "The visual tokens of this model are learned queries, which are no patches of the "
            "picture: there is nothing to draw. run.kept has their numbers."
        )
    return KeptMap(pos=trace.all_pos[0].cpu(), dest=trace.slots[0].cpu(), index=trace.kept[0].cpu())


def paint(picture: Image.Image, kept: KeptMap, region: int = 0, cell: int = 16) -> np.ndarray:
    """Paint one region of a picture: what was dropped lies under a veil.

    Kept patches stand as they are, in a thin frame. Tokens that were averaged into rectangles are
    drawn as these rectangles in their mean colour. Where tokens were merged from all over the
    picture, the patch they were merged into is framed in orange and they show through the veil.

    Args:
        picture: what the region shows, whole; stretched to the grid.
        kept: where the tokens went.
        region: the ``t`` to paint.
        cell: side of a patch in the painting, pixels.

    Returns:
        uint8 ``[rows * cell, columns * cell, 3]``.
    """
    rows, columns = kept.grid(region)
    size = (columns * cell, rows * cell)
    canvas = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    inside = kept.pos[:, 0] == region
    dest = np.full((rows, columns), -1)
    dest[kept.pos[inside, 1], kept.pos[inside, 2]] = kept.dest[inside].numpy()
    head = np.zeros((rows, columns), bool)
    slots = torch.zeros(len(kept.pos), dtype=torch.bool)
    slots[kept.index] = True
    head[kept.pos[inside, 1], kept.pos[inside, 2]] = slots[inside].numpy()
    out = _veil(canvas, 0.84)
    numbers, counts = np.unique(dest[dest >= 0], return_counts=True)
    for slot, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        _paint_slot(out, canvas, dest == slot, head, count, cell)
    return np.clip(out, 0, 255).astype(np.uint8)


Box = tuple[float, float, float, float]
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_LONGEST = 1400  # pixels


def seen_part(picture: Image.Image, box: Box | None) -> Image.Image:
    """The part of a picture that a grid covers; grey where it was padded.

    Args:
        picture: the picture.
        box: left, top, right, bottom in fractions of it; ``None``: all.
    """
    if box is None:
        return picture
    across, down = picture.size
    left, top = round(box[0] * across), round(box[1] * down)
    right, bottom = round(box[2] * across), round(box[3] * down)
    part = Image.new("RGB", (max(1, right - left), max(1, bottom - top)), (128, 128, 128))
    part.paste(picture, (-left, -top))
    return part


def place(picture: Image.Image, painted: np.ndarray, box: Box | None) -> np.ndarray:
    """Put a painted grid where it lies on the whole picture; what the model does not see fades.

    Args:
        picture: the picture.
        painted: uint8 ``[h, w, 3]``, stretched to the part that it covers.
        box: that part, in fractions of the picture; ``None``: all of it.

    Returns:
        uint8 ``[H, W, 3]``.
    """
    part = box or _WHOLE
    union = (min(part[0], 0.0), min(part[1], 0.0), max(part[2], 1.0), max(part[3], 1.0))
    across, down = picture.size
    wide, high = (union[2] - union[0]) * across, (union[3] - union[1]) * down
    scale = min(len(painted) / ((part[3] - part[1]) * down), _LONGEST / max(wide, high))

    def pixels(ends: Box) -> tuple[int, int, int, int]:
        x = [round((end - union[0]) * across * scale) for end in (ends[0], ends[2])]
        y = [round((end - union[1]) * down * scale) for end in (ends[1], ends[3])]
        return x[0], y[0], max(x[1], x[0] + 1), max(y[1], y[0] + 1)

    size = (max(1, round(wide * scale)), max(1, round(high * scale)))
    canvas = Image.new("RGB", size, (128, 128, 128))
    for ends, shown in ((_WHOLE, picture), (part, Image.fromarray(painted))):
        left, top, right, bottom = pixels(ends)
        canvas.paste(shown.resize((right - left, bottom - top)), (left, top))
        if ends is _WHOLE and part != _WHOLE:
            faded = _veil(np.asarray(canvas, np.float32), 0.7)
            canvas = Image.fromarray(np.clip(faded, 0, 255).astype(np.uint8))
    out = np.array(canvas)
    if part != _WHOLE:
        left, top, right, bottom = pixels(part)
        _frame(out, (slice(top, bottom), slice(left, right)), _KEPT, 0.7, width=2)
    return out


def mosaic(picture: Image.Image, kept: KeptMap, boxes: Mapping[int, Box]) -> np.ndarray:
    """Paint the tiles that a picture was cut into, each where it lies on it, about 700 high.

    Args:
        picture: the picture.
        kept: where the tokens went.
        boxes: of each tile (a value of ``t``), in fractions of the picture; together they cover it.

    Returns:
        uint8 ``[H, W, 3]``.
    """
    tops = sorted({box[1] for box in boxes.values()})
    cell = max(4, 700 // (len(tops) * kept.grid(min(boxes))[0]))
    painted = {t: paint(seen_part(picture, box), kept, t, cell) for t, box in boxes.items()}
    rows = [[painted[t] for t, box in boxes.items() if box[1] == top] for top in tops]
    return np.concatenate([np.concatenate(row, 1) for row in rows])


def _veil(canvas: np.ndarray, strength: float) -> np.ndarray:
    gray = canvas @ np.array([0.299, 0.587, 0.114], np.float32)
    return strength * _VEIL + (1 - strength) * gray[..., None]


def _paint_slot(
    out: np.ndarray, canvas: np.ndarray, member: np.ndarray, head: np.ndarray, count: int, cell: int
) -> None:
    """Paint the patches of one slot into ``out``, in place."""
    where = np.argwhere(member)
    top, left = where.min(0)
    bottom, right = where.max(0) + 1
    if count == (bottom - top) * (right - left):
        box = (slice(top * cell, bottom * cell), slice(left * cell, right * cell))
        patch = canvas[box]
        out[box] = patch if count == 1 else patch.mean((0, 1))
        _frame(out, box, _KEPT, 0.55)
        return
    for row, column in where.tolist():
        box = (slice(row * cell, (row + 1) * cell), slice(column * cell, (column + 1) * cell))
        if head[row, column]:
            out[box] = canvas[box]
            _frame(out, box, _MERGED, 1.0, width=max(1, cell // 6))
        else:
            out[box] = _veil(canvas[box], 0.6)


def _frame(
    out: np.ndarray, box: Sequence[slice], color: np.ndarray, strength: float, width: int = 1
) -> None:
    region = out[tuple(box)]
    edge = np.ones(region.shape[:2], bool)
    edge[width:-width, width:-width] = False
    region[edge] = strength * color + (1 - strength) * region[edge]
