# SPDX-License-Identifier: Apache-2.0
"""Which patches of a picture a model still sees, and how to paint them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visprune.core.method import Context, PruningMethod
from visprune.core.selection import Selection
from visprune.core.tokens import VisualTokens
from visprune.errors import ConfigError

__all__ = ["KeptMap", "Recorder", "paint", "recorded"]

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


@dataclass
class Recorder:
    """What a recorded method selected in its last use, stage by stage."""

    selections: list[Selection] = field(default_factory=list)
    pos: Tensor | None = None

    def clear(self) -> None:
        """Forget, before the next picture."""
        self.selections.clear()
        self.pos = None

    def kept(self) -> KeptMap:
        """Compose the stages into one map.

        Raises:
            ConfigError: not exactly one picture went through since the last ``clear``.
        """
        if self.pos is None or not self.selections or len(self.selections[0].index) != 1:
            raise ConfigError("Recorder.kept takes exactly one picture; run one, alone.")
        whole = self.selections[0]
        for later in self.selections[1:]:
            whole = whole.then(later)
        owned = whole.matrix()[0] != 0  # [K, N]
        dest = torch.where(owned.any(0), owned.to(torch.uint8).argmax(0), -1)
        return KeptMap(pos=self.pos.cpu(), dest=dest.cpu(), index=whole.index[0].cpu())


def recorded(method: PruningMethod) -> tuple[PruningMethod, Recorder]:
    """Return a method that does the same and notes what it selected."""
    recorder = Recorder()

    class Recorded(type(method)):  # type: ignore[misc]
        def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
            selection = super().select(tokens, ctx)
            if not recorder.selections:
                recorder.pos = tokens.pos[0]
            recorder.selections.append(selection)
            return selection

    values: dict[str, Any] = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return Recorded(**values), recorder


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
