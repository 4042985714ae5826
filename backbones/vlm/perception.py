# SPDX-License-Identifier: Apache-2.0
"""Perception LM: timm's encoder with rotary embeddings; a token is a mean of patches."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from visprune.backbones.encoders.base import ShownQK
from visprune.backbones.encoders.timm_eva import TimmEva
from visprune.backbones.vlm.generic import Kind, TilesAdapter
from visprune.backbones.vlm.shown import ShownEncoder
from visprune.cost.cost import ModelShape
from visprune.cost.layers import Projector


class ShownTimm(ShownEncoder):
    """The layers of such an encoder, as they are read.

    Args:
        tower: timm's model.
        merge: side of the block of patches that becomes one token.
    """

    def __init__(self, tower: Any, merge: int) -> None:
        self._adapter = TimmEva(tower)
        self.layers = [layer.block for layer in self._adapter.layers]
        self.has_cls = self._adapter.has_cls
        self.grid, self._merge = self._adapter.default_grid(), merge
        self.patches = self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self._adapter.prefix

    def watch(self, layer: int, record: ShownQK) -> list[Any]:
        """Show queries and keys ``[P, H, T, d]`` of a layer, and the scale of scores."""
        return self._adapter.watch(layer, record)


class PerceptionAdapter(TilesAdapter):
    """Clips are encoded as pictures are, frame by frame."""

    thumbnail = "first"

    @property
    def merge(self) -> int:
        """Side of the block of patches whose mean becomes one token."""
        return int(self.config.projector_pooling_ratio)

    @cached_property
    def read_encoder(self) -> ShownTimm:
        """The encoder as signals are read of it."""
        return ShownTimm(self.tower.timm_model, self.merge)

    def encodes(
        self,
        kind: Kind,
        given: dict[str, Any],
        call: dict[str, Any] | None,
    ) -> Kind:
        """What ``get_image_features`` was given: pictures, or the clips of the call."""
        clips = (call or {}).get("pixel_values_videos")
        return "video" if clips is not None and given.get("pixel_values") is clips else kind

    def pixels_of(self, call: dict[str, Any], kind: Kind, counts: list[int]) -> list[Any]:
        """The tiles or frames, one after the other."""
        return list(call["pixel_values"].flatten(0, 1))

    def cost_shape(self) -> ModelShape:
        """As of others; the projector works on every patch of a block, and then takes their mean.

        Raises:
            UnsupportedModel: a module holds what cannot be counted.
        """
        shape = super().cost_shape()
        macs = self.merge**2 * shape.projector.macs_per_token
        return replace(shape, projector=Projector(macs, merge=self.merge))

    def _cut(self, pixels: Tensor | None) -> tuple[int, int, int] | None:
        """The grid of patches that the encoder cuts a picture into."""
        return (1, *self.read_encoder.grid)
