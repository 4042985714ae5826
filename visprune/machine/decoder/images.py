# SPDX-License-Identifier: Apache-2.0
"""What a forward keeps of each image and of each layer, and what it reports of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.base import ImageLayout
from visprune.core.slots import SlotTable
from visprune.core.trace import Trace


@dataclass
class ImageState:
    """One image on its way through the layers.

    Attributes:
        layout: where it was in the input.
        tokens: its surviving tokens, as indices within the image, ``[K]``.
        slots: where they are in the current table, ``[K]``.
        fixed: where its protected tokens are, ``[F]``.
        size: patches that each survivor stands for, ``[K]``.
        withdrawn: whether a withdrawal took all its tokens.
    """

    layout: ImageLayout
    tokens: Tensor
    slots: Tensor
    fixed: Tensor
    size: Tensor
    withdrawn: bool = False

    @classmethod
    def start(cls, layout: ImageLayout) -> ImageState:
        """All tokens in their places."""
        is_free = layout.picture.free.to(layout.positions.device)
        free = layout.positions[is_free]
        return cls(
            layout=layout,
            tokens=torch.arange(len(free), device=free.device),
            slots=free,
            fixed=layout.positions[~is_free],
            size=torch.ones(len(free), device=free.device),
        )


@dataclass
class Entered:
    """What one decoder layer was given, so that a recomputation can be given the same.

    Attributes:
        table: the slots that the layer works on.
        steps: how its stages shortened the hidden states.
        changed: keyword arguments that replace the model's own.
    """

    table: SlotTable
    steps: list[Callable[[Tensor], Tensor]]
    changed: dict[str, Any]


def finished(trace: Trace, images: list[ImageState]) -> Trace:
    """The trace of a call that is over: counts by row instead of by layer, and what was kept."""
    for name in (
        "tokens_per_layer",
        "sequence_per_layer",
        "stored_per_layer",
        "cached_per_layer",
    ):
        by_layer = getattr(trace, name)
        setattr(trace, name, [list(row) for row in zip(*by_layer, strict=True)])
    for image in images:
        trace.kept.append(image.tokens)
        pos = image.layout.picture.pos
        trace.pos.append(pos[image.tokens.to(pos.device)])
        trace.num_tokens.append(len(pos))
        trace.image_rows.append(image.layout.row)
        trace.grids.append(image.layout.picture.grids)
    return trace
