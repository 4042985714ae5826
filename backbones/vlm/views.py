# SPDX-License-Identifier: Apache-2.0
"""Step 3.7: a picture is seen whole, and in local views before it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.cost.matrices import token_macs
from visprune.backbones.hf.features import lengths
from visprune.backbones.vlm.generic import GenericAdapter, Kind
from visprune.backbones.vlm.picture import Picture, grid
from visprune.cost.cost import ModelShape
from visprune.cost.layers import Projector


class ViewsAdapter(GenericAdapter):
    """Local views one after the other, then the whole picture, as one entry (Step 3.7).

    ``t`` of a token is the number of its view. Two convolutions behind the encoder's layers halve
    the grid twice.
    """

    @property
    def merge(self) -> int:
        """Side of the block of patches that becomes one token."""
        return 4

    @property
    def projecting(self) -> list[nn.Module]:
        """The convolutions, and the projector."""
        tower: Any = self.tower
        return [self.projector, tower.downsampler1, tower.downsampler2]

    def cost_shape(self) -> ModelShape:
        """As of others; the first convolution gives four places for each token.

        Raises:
            UnsupportedModel: a module holds what cannot be counted.
        """
        shape, first = super().cost_shape(), self.projecting[1]
        macs = shape.projector.macs_per_token + 3 * token_macs(first)
        return replace(shape, projector=Projector(macs, merge=self.merge))

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """One picture for each entry: its views have the sizes of the pixels."""
        views = call.get("num_local_patches")
        each = lengths(output)
        counts = [0] * len(each) if views is None else torch.as_tensor(views).tolist()
        return [
            [self._picture(total, number, int(views), call)]
            for number, (total, views) in enumerate(zip(each, counts, strict=True))
        ]

    def _picture(self, total: int, number: int, views: int, call: dict[str, Any]) -> Picture:
        free, pos, grids = self.laid_out(total, number, views, self._ratio(call), call)
        return Picture(
            free=free, pos=pos, source=None, pixels=call["pixel_values"][number], grids=grids
        )

    def _ratio(self, call: dict[str, Any]) -> float:
        """The side of a local view in sides of the whole."""
        local = call.get("pixel_values_local")
        return 1.0 if local is None else local.shape[-1] / call["pixel_values"].shape[-1]

    def laid_out(
        self, total: int, number: int, views: int, ratio: float, call: dict[str, Any]
    ) -> tuple[Tensor, Tensor, tuple[tuple[int, int, int], ...]]:
        """Which tokens are free, ``[total]``; their (t, h, w); the grids of the views.

        Args:
            total: tokens of the picture.
            number: of the picture in the call.
            views: local ones.
            ratio: their side, in sides of the whole.
            call: of the encoder.
        """
        whole = math.isqrt(round(total / (1 + views * ratio * ratio)))
        local = round(whole * ratio)
        sides = (*[local] * views, whole)
        pos = torch.cat(
            [grid(1, side, side) + torch.tensor([t, 0, 0]) for t, side in enumerate(sides)]
        )
        patches = tuple((1, self.merge * side, self.merge * side) for side in sides)
        return torch.ones(total, dtype=torch.bool), pos, patches
