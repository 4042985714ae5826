# SPDX-License-Identifier: Apache-2.0
"""A picture, once it is encoded, and where it stands in a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from visprune.core.signals.base import Signal


@dataclass
class Picture:
    """What is known of one image (or video) once it is encoded.

    Attributes:
        free: which of its tokens may be dropped, ``[n]`` bool (newline tokens may not).
        pos: (t, h, w) of the free tokens, ``[N, 3]``.
        source: encoder patch of each free token, counted over all encoder pictures of the call,
            ``[N]``, or of a token made of several, ``[N, m]``; ``None`` where the encoder offers no
            signals.
        weight: what part of a token each of several is, ``[N, m]``; ``None``: all the same.
        pixels: what the encoder saw; dropped once methods' signals are read from them.
        kind: image or video.
        grids: (t, h, w) in patches of everything that the encoder saw of it.
        signals: what methods are shown of the encoder and the pixels, by signal; tensors with the
            free tokens along their first axis, ``[N, ...]``.
        alive: where tokens left inside the encoder, the free tokens that stand for those that are
            left, in raster order, ``[K]``.
        size: patches merged into each of them, ``[K]``.
        encoded: where the encoder got another number of patches than ``grids`` (some left out,
            some to pad it), how many it got of each frame, and of each window if it has windows.
        projected: tokens that leave the projector; ``None``: one for each block of ``grids``.
        spent: multiply-adds of that choice.
        placed: how ``pos`` is known: ``"grid"``: from the grid that the encoder worked on;
            ``"guessed"``: from the number of tokens, in raster order; ``"queries"``: the tokens
            are no patches and stand in a line.
    """

    free: Tensor
    pos: Tensor
    source: Tensor | None
    pixels: Tensor | None
    kind: Literal["image", "video"] = "image"
    grids: tuple[tuple[int, int, int], ...] = ()
    signals: dict[Signal, Any] = field(default_factory=dict)
    alive: Tensor | None = None
    size: Tensor | None = None
    encoded: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    projected: int | None = None
    spent: int = 0
    placed: Literal["grid", "guessed", "queries"] = "grid"
    weight: Tensor | None = None

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """Largest t, h and w."""
        return tuple(self.pos.amax(0).tolist())

    @cached_property
    def frames(self) -> tuple[int, ...]:
        """Free tokens of each frame of a clip; none of a picture."""
        if self.kind == "image":
            return ()
        return tuple(self.pos[:, 0].unique(return_counts=True)[1].tolist())


@dataclass
class ImageLayout:
    """One image of a batch, found in its sequence.

    Attributes:
        picture: what is known of it.
        row: sample that it belongs to.
        positions: places of its tokens in that row's input sequence, ``[n]``.
    """

    picture: Picture
    row: int
    positions: Tensor


def grid(t: int, h: int, w: int) -> Tensor:
    """(t, h, w) of every cell in raster order, ``[t*h*w, 3]``."""
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, 3)
