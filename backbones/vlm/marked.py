# SPDX-License-Identifier: Apache-2.0
"""Families with marks among the visual tokens, or whose decoder is told which tokens are visual."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.cost.matrices import token_macs
from visprune.backbones.vlm.generic import GenericAdapter, Kind, NamedTilesAdapter
from visprune.backbones.vlm.picture import Picture
from visprune.cost.cost import ModelShape
from visprune.cost.layers import Projector


class HunYuanAdapter(GenericAdapter):
    """HunYuan-VL: a begin, a newline behind every row, an end."""

    def tokens_of(self, t: int, h: int, w: int) -> int:
        """With these."""
        return len(self.free(0, (t, h, w)))

    def free(self, count: int, cells: tuple[int, int, int] | None) -> Tensor:
        """All but these."""
        assert cells is not None, "its encoder takes grids"
        side = self.merge
        found = torch.ones(cells[1] // side, cells[2] // side + 1, dtype=torch.bool)
        found[:, -1] = False
        edge = torch.zeros(1, dtype=torch.bool)
        return torch.cat([edge, found.flatten(), edge])

    def cost_shape(self) -> ModelShape:
        """As of others; newlines pass the last layer of the merger.

        Raises:
            UnsupportedModel: a module holds what cannot be counted.
        """
        shape = super().cost_shape()
        last: Any = self.projector.mlp
        macs = shape.projector.macs_per_token
        return replace(shape, projector=Projector(macs, merge=self.merge, row=token_macs(last)))


class SeparatorAdapter(GenericAdapter):
    """DeepSeek-OCR 2: learned queries of local views and of the whole, and a separator."""

    queries = True

    def free(self, count: int, cells: tuple[int, int, int] | None) -> Tensor:
        """All but the last."""
        return torch.arange(count) < count - 1


class CodesAdapter(GenericAdapter):
    """Emu3: codes of a picture's cells, embedded as words are, and a newline behind every row.

    Pictures that it writes itself are words: nothing of those is visual.
    """

    def token_id(self, kind: Kind) -> int | None:
        """The placeholder; clips have none."""
        return self.core.vocabulary_mapping.image_token_id if kind == "image" else None

    @property
    def tower(self) -> nn.Module:
        """What makes codes of pixels."""
        return self.core.vqmodel

    @property
    def merge(self) -> int:
        """One code is one token."""
        return 1

    def grids_of(self, call: dict[str, Any], kind: Kind) -> list[Any] | None:
        """(t, h, w) in cells of each picture; what it was padded with makes no tokens."""
        side = self.core.vqmodel.vision_spatial_factor
        sizes = torch.as_tensor(call["image_sizes"]).tolist()
        return [(1, height // side, width // side) for height, width in sizes]

    def free(self, count: int, cells: tuple[int, int, int] | None) -> Tensor:
        """All but the newlines."""
        assert cells is not None, "its encoder takes sizes"
        found = torch.ones(cells[1], cells[2] + 1, dtype=torch.bool)
        found[:, -1] = False
        return found.flatten()


class ErnieAdapter(GenericAdapter):
    """ERNIE 4.5 VL: the decoder has experts of its own for visual tokens and the marks around."""

    by_token = ("moe_mm_token_type_ids",)


class RealTilesAdapter(NamedTilesAdapter):
    """Granite Docling: as Idefics 3, and the processor says which tiles are real."""

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """Every tile of each sample."""
        real = call.get("pixel_attention_mask")
        return self.rows(call["pixel_values"], real, output, kind)
