# SPDX-License-Identifier: Apache-2.0
"""Families whose prompt, or pictures, are seen both ways on all layers.

The core makes the mask, before the decoder is called.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from visprune.backbones.hf.features import lengths
from visprune.backbones.vlm.generic import GenericAdapter, Kind
from visprune.backbones.vlm.picture import Picture, grid


class BothWaysAdapter(GenericAdapter):
    """PaliGemma: all of the prompt is seen both ways, what is generated is causal."""

    masks_before = True
    continues = False  # the picture sees what is asked behind it
    answer_types: ClassVar[dict[str, int]] = {"token_type_ids": 1}

    @cached_property
    def windowed(self) -> bool:
        """Masks are made before the decoder is called."""
        return True


class PooledAdapter(BothWaysAdapter):
    """Molmo 2: the pictures of a sample see each other both ways.

    A picture is one grid of the whole and one of its crops, side by side. Features are *added* to
    the embeddings of the placeholders, and some layers may have another rotary embedding.
    """

    continues = True
    same_id = True
    answer_types: ClassVar[dict[str, int]] = {}

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """One picture of one or two grids, or one clip of as many as it has frames."""
        clips = kind == "video"
        grids = torch.as_tensor(call["video_grids" if clips else "image_grids"]).tolist()
        pixels = _crops(call, clips, lengths(output))
        return [
            [self._of_grids(_clip(one) if clips else _whole_and_crops(one), own, kind)]
            for one, own in zip(grids, pixels, strict=True)
        ]

    def _of_grids(self, grids: list[tuple[int, int, int]], pixels: Any, kind: Kind) -> Picture:
        pos, first = [], 0
        for cells in grids:
            pos.append(grid(*cells) + torch.tensor([first, 0, 0]))
            first += cells[0]
        places = torch.cat(pos)
        return Picture(
            free=torch.ones(len(places), dtype=torch.bool), pos=places, source=None,
            pixels=pixels, kind=kind, grids=tuple(grids),
        )  # fmt: skip

    def rope_of(self, layer: int) -> str:
        """Which rotary embedding."""
        return str(self.language_model.rope_types[layer])

    def rotary(self, hidden: Tensor, ids: Tensor, kind: str) -> Any:
        """The rotary embedding of position ids."""
        model = self.language_model
        made = model.rotary_emb if kind == "scaled" else model.rotary_emb_unscaled
        return made(hidden, position_ids=ids)


def _clip(cells: list[int]) -> list[tuple[int, int, int]]:
    frames, rows, columns = cells
    return [(frames, rows, columns)]


def _whole_and_crops(cells: list[int]) -> list[tuple[int, int, int]]:
    rows, columns, more_rows, more_columns = cells
    found = [(1, rows, columns), (1, more_rows, more_columns)]
    return [one for one in found if one[1] * one[2]]


def _crops(call: dict[str, Any], clips: bool, counts: list[int]) -> list[Tensor]:
    """The crops or frames of each picture or clip: those whose patches its tokens are made of."""
    pixels = call["pixel_values_videos" if clips else "pixel_values"]
    pixels = pixels.flatten(0, -3)  # [crops, patches, values]
    pools = call["video_token_pooling" if clips else "image_token_pooling"]
    found = []
    for pool in pools[(pools >= 0).any(-1)].split(counts):
        crops = torch.unique(pool[pool >= 0] // pixels.shape[1])
        found.append(pixels[crops.to(pixels.device)])
    return found
