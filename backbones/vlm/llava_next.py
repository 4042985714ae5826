# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT (``llava_next``): a thumbnail and the crops of the full picture, as one pool."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from visprune.backbones.vlm.llava import SQUARE, LlavaAdapter
from visprune.backbones.vlm.picture import Picture


class LlavaNextAdapter(LlavaAdapter):
    """Adapter of ``LlavaNextForConditionalGeneration``.

    Newline tokens, one at the end of each row of the full-resolution grid, are protected and
    outside the budget. ``t`` is 0 for the thumbnail and 1 for the grid.
    """

    towers = SQUARE
    markup = None

    def pictures(self, call: dict[str, Any], kind: Literal["image", "video"]) -> list[Picture]:
        """One picture per image, its tokens where the model's own packing puts them."""
        sizes, pixels = call["image_sizes"], call["pixel_values"]
        config = self.config
        tiles = [
            image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=config.image_grid_pinpoints,
                patch_size=config.vision_config.image_size,
            )
            for size in sizes
        ]
        packed = self._packed_indices(tiles, sizes)
        out, first = [], 0
        for number, source in enumerate(packed):
            flat = pixels.dim() == 4
            own = pixels[first : first + tiles[number]] if flat else pixels[number, : tiles[number]]
            first += tiles[number]
            out.append(
                Picture(
                    free=source >= 0,
                    pos=self._places(source),
                    source=source[source >= 0],
                    pixels=own,
                    grids=((1, self.side, self.side),) * len(own),
                )
            )
        return out

    def _packed_indices(self, tiles: list[int], sizes: Tensor) -> list[Tensor]:
        """Encoder patch of every token (-1: newline), by packing the indices as the model packs."""
        patches = self.side * self.side
        # float64 holds every index exactly; the packing only moves values about.
        index = torch.arange(sum(tiles) * patches, dtype=torch.float64).view(-1, patches, 1)
        packed, _ = self.core.pack_image_features(
            list(index.split(tiles)),
            sizes,
            vision_feature_select_strategy="default",
            image_newline=torch.tensor([-1.0], dtype=torch.float64),
        )
        return [tokens[:, 0].round().long() for tokens in packed]

    def _places(self, source: Tensor) -> Tensor:
        """(t, h, w) of the free tokens of one image."""
        side = self.side
        free = source >= 0
        thumbnail = torch.arange(len(source)) < side * side
        rest = ~thumbnail
        # A newline ends each row: the row is the number of newlines before it.
        row = torch.cumsum((~free & rest).long(), 0)
        width = int((row[free & rest] == 0).sum()) if bool((free & rest).any()) else 1
        rank = torch.arange(len(source)) - side * side
        column = torch.where(rest, rank - row * (width + 1), torch.arange(len(source)) % side)
        height = torch.where(rest, row, torch.arange(len(source)) // side)
        return torch.stack([rest.long(), height, column], dim=-1)[free]
