# SPDX-License-Identifier: Apache-2.0
"""GOT-OCR 2: Segment Anything's encoder, which takes tiles of one size and pads its windows."""

from __future__ import annotations

import math
from typing import Any

from visprune.backbones.cost.decoder import read_decoder
from visprune.backbones.cost.matrices import token_macs
from visprune.backbones.vlm.generic import TilesAdapter
from visprune.cost.cost import ModelShape
from visprune.cost.layers import Encoder, Projector


class SamTilesAdapter(TilesAdapter):
    """Two convolutions in front of the projector halve the grid twice."""

    @property
    def merge(self) -> int:
        """Side of the block of patches that becomes one token."""
        return 4

    def cost_shape(self) -> ModelShape:
        """What a token of the decoder costs, and each tile at once.

        Raises:
            UnsupportedModel: a module holds what cannot be counted.
        """
        self.check_counted()
        parts: Any = self.projector
        projector = 4 * token_macs(parts.conv_upsampler1) + token_macs(parts.conv_upsampler2)
        projector += token_macs(parts.multimodal_projector)
        tower: Any = self.tower
        side = int(tower.image_size) // int(self.config.vision_config.patch_size)
        tile = sum(_layer_macs(layer, side) for layer in tower.layers)
        tile += side * side * token_macs(tower.neck)
        return ModelShape(
            decoder=read_decoder(self.layers, self.head, self.text_config),
            vision=Encoder((), token_macs(tower.patch_embed), pooled=tile),
            projector=Projector(projector, merge=self.merge),
        )


def _layer_macs(layer: Any, side: int) -> int:
    """Multiply-adds of a layer on a grid of ``side`` squared patches.

    Each query is also multiplied with the embeddings of all rows and of all columns of its window,
    by how far they lie from it.
    """
    window = int(layer.window_size) or side
    width = int(layer.attn.proj.in_features)
    tokens = (math.ceil(side / window) * window) ** 2
    near = 2 * window * width if layer.attn.use_rel_pos else 0
    token = token_macs(layer.attn.qkv) + token_macs(layer.attn.proj) + near
    return tokens * (token + window**2 * 2 * width) + side**2 * token_macs(layer.mlp)
