# SPDX-License-Identifier: Apache-2.0
"""Families that cut a picture into slices and tell their sizes in patches: LFM2, MiniCPM-V."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch

from visprune.backbones.vlm.generic import GenericAdapter, Kind, MarkedTilesAdapter
from visprune.backbones.vlm.join import join
from visprune.backbones.vlm.known import behind
from visprune.backbones.vlm.picture import ImageLayout, Picture
from visprune.cost.cost import ModelShape
from visprune.cost.layers import Encoder

# From which on LFM2 resizes positions by a product, and projects padding along.
_PRODUCTS = "5.24"


class NaFlexTilesAdapter(MarkedTilesAdapter):
    """Tiles with one mark between them, the thumbnail last; patches are padded to one length."""

    def grids_of(self, call: dict[str, Any], kind: Kind) -> list[Any] | None:
        """(t, h, w) in patches of each tile."""
        return [(1, *row) for row in torch.as_tensor(call["spatial_shapes"]).tolist()]

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """Of each tile, which is encoded and projected together with what pads it."""
        made, room = super().pieces(call, kind, output), int(call["pixel_values"].shape[1])
        for (picture,) in made:
            picture.encoded = (room,), ()
            if not behind(_PRODUCTS):
                picture.projected = room // self.merge**2
        return made

    def cost_shape(self) -> ModelShape:
        """As of others; the table of positions is resized by a product for each patch.

        Raises:
            UnsupportedModel: a module holds what cannot be counted.
        """
        shape, tower = super().cost_shape(), cast(Any, self.tower)
        if behind(_PRODUCTS):
            return shape
        table = tower.embeddings.position_embedding.weight.numel()
        assert isinstance(shape.vision, Encoder), "read from modules"
        return replace(shape, vision=replace(shape.vision, patch=shape.vision.patch + table))

    @property
    def padding_counts(self) -> bool:
        """Whether a bias makes something of padding that was set to zero."""
        return bool(getattr(self.text_config, "conv_bias", False))


class SlicesAdapter(GenericAdapter):
    """A whole picture between marks of its own, and slices between others behind it (MiniCPM-V).

    Whose mark the first piece of a row has is a whole picture. Frames of a clip follow one another
    with nothing between them but such marks and ends of lines.

    Attributes:
        between: tokens between two frames or slices of one clip, at most.
    """

    between: ClassVar[int] = 3
    packed = MappingProxyType({"pixel_values": -1, "pixel_values_videos": -1})

    @property
    def continues(self) -> bool:
        """Not where positions have several axes: a tiny model shows other logits."""
        return not self.multi_axis_rope

    def grids_of(self, call: dict[str, Any], kind: Kind) -> list[Any] | None:
        """(t, h, w) in patches of each piece."""
        sizes = call.get("target_sizes" if kind == "image" else "target_sizes_videos")
        if sizes is None:
            return None
        return [(1, *row) for row in torch.as_tensor(sizes).tolist()]

    def pixels_of(self, call: dict[str, Any], kind: Kind, counts: list[int]) -> list[Any]:
        """The picture of each piece ``[C, H, W]``, put together of its patches in one line."""
        pixels = call["pixel_values" if kind == "image" else "pixel_values_videos"]
        grids, out, first = self.grids_of(call, kind) or [], [], 0
        side = pixels.shape[-2]
        for _, down, across in grids:
            end = first + down * across * side
            cells = pixels[0, ..., first:end].unflatten(-1, (down, across, side))  # [C, s, h, w, s]
            out.append(cells.movedim(1, 2).flatten(3).flatten(1, 2))
            first = end
        return out

    def joined(self, call: dict[str, Any], layouts: list[ImageLayout]) -> list[ImageLayout]:
        """Put slices together with the picture that they are of, and frames of a clip."""
        ids = call.get("input_ids")
        if ids is None:  # merged by hand: the marks are gone
            return layouts
        if layouts[0].picture.kind == "video":
            return join(
                layouts,
                lambda one, other: other.positions[0] - one.positions[-1] - 1 <= self.between,
            )
        marks = {id(x): int(ids[x.row, int(x.positions[0]) - 1]) for x in layouts}
        whole: dict[int, int] = {}
        for layout in layouts:
            whole.setdefault(layout.row, marks[id(layout)])
        return join(layouts, lambda one, other: marks[id(other)] != whole[other.row])
