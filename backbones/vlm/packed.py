# SPDX-License-Identifier: Apache-2.0
"""The LLaVA line after LLaVA-NeXT: a thumbnail, crops packed into one grid, and clips."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from visprune.backbones.hf.features import lengths
from visprune.backbones.vlm.deepstack import take_before
from visprune.backbones.vlm.generic import GenericAdapter, Kind
from visprune.backbones.vlm.join import join
from visprune.backbones.vlm.picture import ImageLayout, Picture, grid


def packed_places(free: Tensor, side: int) -> Tensor:
    """(t, h, w) of the free tokens of a thumbnail and a grid whose rows end with newlines.

    Args:
        free: which of the tokens are no newlines, ``[n]`` bool.
        side: of the thumbnail, in tokens.

    Returns:
        ``[N, 3]``: ``t`` is 0 for the thumbnail and 1 for the grid.
    """
    place = torch.arange(len(free))
    rest = place >= side * side
    # A newline ends each row: the row is the number of newlines before it.
    row = torch.cumsum((~free & rest).long(), 0)
    inside = free & rest
    width = int((row[inside] == 0).sum()) if bool(inside.any()) else 1
    column = torch.where(rest, place - side * side - row * (width + 1), place % side)
    height = torch.where(rest, row, place // side)
    return torch.stack([rest.long(), height, column], dim=-1)[free]


class PackedAdapter(GenericAdapter):
    """A family that packs crops as LLaVA-NeXT does.

    Newlines are protected and outside the budget. Their places are those that the model's own
    packing gives them. A picture of one crop has one newline, at its end.

    Attributes:
        strategy: whether the packing is told how features of the encoder are selected.
    """

    strategy: ClassVar[bool] = True

    @property
    def side(self) -> int:
        """Tokens along one side of a crop."""
        return self.patches_aside

    @property
    def patches_aside(self) -> int:
        """Patches along one side of a crop or frame."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """One picture or clip for each entry of the encoder's output."""
        if kind == "video":
            return self.clips(call, output)
        return self.crops(call)

    def crops(self, call: dict[str, Any]) -> list[list[Picture]]:
        """Pictures."""
        sizes, pixels = call["image_sizes"], call["pixel_values"]
        counts = self._crops_of(sizes, call.get("batch_num_images"))
        aside = self.patches_aside
        out, first = [], 0
        for number, (count, free) in enumerate(
            zip(counts, self._packed(call, counts, sizes), strict=True)
        ):
            own = pixels[number, :count] if pixels.dim() == 5 else pixels[first : first + count]
            first += count
            picture = Picture(
                free=free,
                pos=packed_places(free, self.side),
                source=None,
                pixels=own,
                grids=((1, aside, aside),) * count,
            )
            out.append([picture])
        return out

    def _crops_of(self, sizes: Tensor, together: Tensor | None) -> list[int]:
        """Crops of each picture; ``together``: pictures of each sample, several are not cut."""
        cut = [True] * len(sizes)
        if together is not None:
            cut = [count == 1 for count in torch.as_tensor(together).tolist() for _ in range(count)]
        return [
            image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=self.config.image_grid_pinpoints,
                patch_size=self.config.vision_config.image_size,
            )
            if own
            else 1
            for size, own in zip(torch.as_tensor(sizes), cut, strict=True)
        ]

    def _packed(self, call: dict[str, Any], counts: list[int], sizes: Tensor) -> list[Tensor]:
        """Which tokens are no newlines, by packing nothing with newlines as the model packs."""
        options: dict[str, Any] = {}
        if self.strategy:
            options["vision_feature_select_strategy"] = "full"
        ratio = call.get("vision_aspect_ratio") or getattr(self.config, "vision_aspect_ratio", None)
        if ratio is not None:
            options["vision_aspect_ratio"] = ratio
        nothing = [torch.zeros(count, self.side**2, 1) for count in counts]
        packed = self.core.pack_image_features(
            nothing, sizes, image_newline=torch.ones(1), **options
        )
        if isinstance(packed, tuple):  # with the length of each
            packed = packed[0]
        return [tokens[:, 0] == 0 for tokens in packed]

    def clips(self, call: dict[str, Any], output: Any) -> list[list[Picture]]:
        """Clips."""
        raise NotImplementedError  # pragma: no cover - abstract

    def clip(self, pixels: Tensor, side: int, marks: int) -> list[Picture]:
        """A clip of frames of ``side`` squared tokens, and of marks behind them."""
        frames, aside = len(pixels), self.patches_aside
        count = frames * side * side
        return [
            Picture(
                free=torch.arange(count + marks) < count,
                pos=grid(frames, side, side),
                source=None,
                pixels=pixels,
                kind="video",
                grids=((frames, aside, aside),),
            )
        ]


class OneVisionAdapter(PackedAdapter):
    """LLaVA-OneVision: large pictures are interpolated, frames too; one newline ends a clip."""

    strategy = False

    def clips(self, call: dict[str, Any], output: Any) -> list[list[Picture]]:
        """Clips, every frame at half the resolution."""
        side = math.ceil(self.patches_aside / 2)
        return [self.clip(pixels, side, 1) for pixels in call["pixel_values_videos"]]


class NextVideoAdapter(PackedAdapter):
    """LLaVA-NeXT-Video: pictures as LLaVA-NeXT, frames pooled."""

    def clips(self, call: dict[str, Any], output: Any) -> list[list[Picture]]:
        """Clips, every frame pooled."""
        side = self.patches_aside // self.config.spatial_pool_stride
        return [self.clip(pixels, side, 0) for pixels in call["pixel_values_videos"]]


class GraniteAdapter(PackedAdapter):
    """Granite 4 Vision: placeholders are zero, and get features before several decoder layers.

    A crop is pooled, by windows.
    """

    starts_empty = True

    @cached_property
    def adds_later(self) -> bool:
        """Always."""
        return True

    @property
    def side(self) -> int:
        """Tokens along one side of a crop."""
        return int(self.patches_aside * Fraction(self.config.downsample_rate))

    def later_features(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Take out of the decoder's arguments what it would add to visual tokens, by layer."""
        return take_before(kwargs)


class VideoLlavaAdapter(GenericAdapter):
    """Video-LLaVA: every frame of a clip keeps its class token, which is protected.

    Frames that follow one another without a token between them are one clip.
    """

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """One picture or frame for each entry of the encoder's output."""
        made = super().pieces(call, kind, output)
        if kind == "image":
            return made
        return [
            [self._frame(count, pixels)]
            for count, pixels in zip(
                lengths(output), call["pixel_values_videos"].flatten(0, 1), strict=True
            )
        ]

    def _frame(self, count: int, pixels: Tensor) -> Picture:
        pos, placed, grids = self.places(count - 1, pixels, None)
        return Picture(
            free=torch.arange(count) > 0, pos=pos, source=None, pixels=pixels,
            kind="video", grids=grids, placed=placed,
        )  # fmt: skip

    def joined(self, call: dict[str, Any], layouts: list[ImageLayout]) -> list[ImageLayout]:
        """Put the frames of a clip together."""
        return join(
            layouts,
            lambda one, other: (
                one.picture.kind == other.picture.kind == "video"
                and other.positions[0] == one.positions[-1] + 1
            ),
        )
