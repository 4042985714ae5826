# SPDX-License-Identifier: Apache-2.0
"""Batches for the embedded model's recipe; each is a pure function of its step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from visprune.backbones.vlm.embedded.tokenizer import SPECIAL
from visprune.eval.tasks.embedded import (
    COLORS,
    DIGITS,
    KINDS,
    PATCH,
    SHAPES,
    Scene,
    SceneObject,
    draw_picture,
    words,
)

GRID = 24
TOKENS = GRID * GRID
PREFIX = 2  # "<s> USER:" stand before the picture
IGNORE = -100
VOCABULARY = (*SPECIAL, *words())
ID = {word: i for i, word in enumerate(VOCABULARY)}


@dataclass
class PatchLabels:
    """What each patch shows. All int64 ``[B, N]``; ``IGNORE`` on background where it says so.

    Attributes:
        shape: Index into SHAPES; ``len(SHAPES)`` for background.
        color: Index into COLORS; ``IGNORE`` for background.
        digit: Index into DIGITS; ``IGNORE`` for background.
        center: 1 on the patch that holds an object's centre, else 0.
        row: Row in the 24 x 24 grid.
        col: Column in it.
    """

    shape: torch.Tensor
    color: torch.Tensor
    digit: torch.Tensor
    center: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor

    def to(self, device: torch.device) -> PatchLabels:
        """Copy on a device."""
        return PatchLabels(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def gather(self, index: torch.Tensor) -> PatchLabels:
        """Labels of the patches ``index`` ``[B, n]`` only."""
        return replace(
            self, **{f.name: getattr(self, f.name).gather(1, index) for f in fields(self)}
        )


@dataclass
class QuestionBatch:
    """Several questions per picture behind one another, each blind to the others.

    Attributes:
        ids: Tokens, int64 ``[B, T]``.
        segment: Number of the question, from 1; 0 for padding, int64 ``[B, T]``.
        position: Position in a prompt of this question alone, int64 ``[B, T]``.
        target: Next token where one is learned, else ``IGNORE``, int64 ``[B, T]``.
        kind: Index into KINDS where the answer is predicted, else -1, int64 ``[B, T]``.
    """

    ids: torch.Tensor
    segment: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor
    kind: torch.Tensor

    def to(self, device: torch.device) -> QuestionBatch:
        """Copy on a device."""
        return QuestionBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def encode_questions(pictures: Sequence[Scene]) -> QuestionBatch:
    """Tokens of all questions of each picture, as the processor would encode each one alone.

    Args:
        pictures: Pictures with questions.

    Returns:
        Batch padded on the right.
    """
    rows: list[list[tuple[int, int, int, int, int]]] = []
    for picture in pictures:
        row = []
        for number, question in enumerate(picture.questions, 1):
            text = question.text.replace("?", " ?").split()
            ids = [ID[word] for word in (*text, "ASSISTANT:", question.answer)]
            kind = KINDS.index(question.kind)
            for j, token in enumerate(ids):
                last = len(ids) - 1 - j  # 0 on the answer, 1 on "ASSISTANT:"
                target = {0: ID["</s>"], 1: ids[-1]}.get(last, IGNORE)
                position = PREFIX + TOKENS + j
                row.append((token, number, position, target, kind if last == 1 else -1))
        rows.append(row)
    length = max(map(len, rows))
    pad = (ID["<pad>"], 0, 0, IGNORE, -1)
    table = torch.tensor([row + [pad] * (length - len(row)) for row in rows])  # [B, T, 5]
    return QuestionBatch(*table.unbind(-1))


def block_mask(segment: torch.Tensor, visual: int) -> torch.Tensor:
    """Which key each query sees: the visual tokens before it, and its own question before it.

    Args:
        segment: Question of each text token ``[B, T]``, 0 for padding.
        visual: Number of tokens before them (prefix and picture), shared by all questions.

    Returns:
        True where seen, bool ``[B, 1, visual + T, visual + T]``.
    """
    batch = segment.shape[0]
    whole = torch.cat([segment.new_full((batch, visual), -1), segment], dim=1)  # [B, S]
    shared = whole[:, None, :] == -1
    own = whole[:, None, :] == whole[:, :, None]
    return ((shared | own).tril())[:, None]


def patch_labels(
    owners: np.ndarray, objects: Sequence[Sequence[SceneObject]], corner: np.ndarray | None = None
) -> PatchLabels:
    """Labels of every patch.

    Args:
        owners: Object of each patch, -1 for none, ``[B, g, g]``.
        objects: Objects of each picture.
        corner: Row and column of the picture's first patch in the 24 x 24 grid ``[B, 2]``.

    Returns:
        Labels ``[B, g * g]``.
    """
    batch, grid = owners.shape[:2]
    shape = np.full((batch, grid, grid), len(SHAPES))
    color, digit = (np.full((batch, grid, grid), IGNORE) for _ in range(2))
    center = np.zeros((batch, grid, grid), np.int64)
    for b, items in enumerate(objects):
        for index, item in enumerate(items):
            mine = owners[b] == index
            shape[b][mine] = SHAPES.index(item.shape)
            color[b][mine] = COLORS.index(item.color)
            digit[b][mine] = DIGITS.index(item.digit)
            x, y = item.center
            center[b, int(y) // PATCH, int(x) // PATCH] = 1
    first = np.zeros((batch, 2), np.int64) if corner is None else corner
    axis = np.arange(grid)
    row = np.broadcast_to(first[:, 0, None, None] + axis[None, :, None], shape.shape)
    col = np.broadcast_to(first[:, 1, None, None] + axis[None, None, :], shape.shape)
    arrays = (shape, color, digit, center, row, col)
    return PatchLabels(*(torch.from_numpy(a.reshape(batch, -1).astype(np.int64)) for a in arrays))


def choose_patches(
    rng: np.random.Generator, owners: np.ndarray, keep: int, drop: float
) -> torch.Tensor:
    """Which patches the decoder is shown: most of the objects', and background to fill up.

    Args:
        rng: Source of randomness.
        owners: Object of each patch, -1 for none, ``[B, 24, 24]``.
        keep: Patches per picture.
        drop: Each picture hides a share of its object patches drawn between 0 and this.

    Returns:
        Indices in raster order, int64 ``[B, keep]``.
    """
    flat = owners.reshape(len(owners), -1)
    rank = rng.random(flat.shape) + 1.0  # background: anywhere in [1, 2)
    hidden = rng.random(flat.shape) < rng.random((len(flat), 1)) * drop
    rank[(flat >= 0) & ~hidden] -= 1.0
    rank[(flat >= 0) & hidden] += 1.0
    chosen = np.sort(np.argsort(rank, axis=1)[:, :keep], axis=1)
    return torch.from_numpy(chosen)


def to_pixels(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Pixels as the processor normalises them, float32 ``[B, 3, H, W]`` in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def dense_batch(
    rng: np.random.Generator, batch: int, side: int, low: int, high: int
) -> tuple[torch.Tensor, PatchLabels]:
    """Pictures without questions at a random place of the 24 x 24 grid, with patch labels.

    Args:
        rng: Source of randomness.
        batch: Pictures.
        side: Side, pixels.
        low: Fewest objects.
        high: Most objects.

    Returns:
        Pixels ``[B, 3, side, side]`` and labels ``[B, (side / 8) ** 2]``.
    """
    made = [draw_picture(rng, side, low, high) for _ in range(batch)]
    corner = rng.integers(0, GRID - side // PATCH + 1, size=(batch, 2))
    labels = patch_labels(np.stack([m[2] for m in made]), [m[1] for m in made], corner)
    return to_pixels([m[0] for m in made]), labels
