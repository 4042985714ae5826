# SPDX-License-Identifier: Apache-2.0
"""The LLaVA line after LLaVA-NeXT: a thumbnail, crops packed into one grid, and clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from visprune.backbones.hf.features import lengths
from visprune.backbones.vlm.deepstack import take_before
from visprune.backbones.vlm.generic import GenericAdapter, Kind
from visprune.backbones.vlm.join import join
from visprune.backbones.vlm.picture import ImageLayout, Picture, grid
from visprune.backbones.vlm.shown import ShownEncoder, blocks
from visprune.cost.cost import ModelShape
from visprune.errors import UnsupportedModel


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


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a picture come from.

    Attributes:
        told: of every token its region (0: thumbnail, 1: grid of crops, -1: a newline), row and
            column in patches, between two of them where the grid was interpolated, ``[n, 3]``.
        across: crops in a row of the grid.
    """

    told: Tensor
    across: int = 1

    @property
    def free(self) -> Tensor:
        """Which of the tokens are no newlines, ``[n]`` bool."""
        return self.told[:, 0] >= 0

    def sources(self, side: int, first: int) -> tuple[Tensor, Tensor | None]:
        """The patches that each free token is made of, and how much each of them counts.

        Args:
            side: patches along one side of a crop.
            first: crops of the call before this picture's.

        Returns:
            ``[N]`` and ``None``, or ``[N, 4]`` each where tokens lie between patches.
        """
        region, row, column = self.told[self.free].unbind(-1)
        found, parts = [], []
        down, right = row - row.floor(), column - column.floor()
        for y, by_row in ((row.floor(), 1 - down), (row.ceil(), down)):
            for x, by_column in ((column.floor(), 1 - right), (column.ceil(), right)):
                crop = (y // side) * self.across + x // side
                crop = torch.where(region == 0, 0, crop + 1)
                found.append((first + crop) * side**2 + (y % side) * side + x % side)
                parts.append(by_row * by_column)
        source, weight = torch.stack(found, -1).long(), torch.stack(parts, -1)
        if bool((weight[:, 0] == 1).all()):
            return source[:, 0], None
        return source, weight.float()


class PackedAdapter(GenericAdapter):
    """A family that packs crops as LLaVA-NeXT does.

    Newlines are protected and outside the budget. Their places, and the patches that the other
    tokens are made of, are those that the model's own packing gives to the coordinates of patches.
    A picture of one crop has one newline, at its end.

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
        for number, (count, packing) in enumerate(
            zip(counts, self._packed(call, counts, sizes), strict=True)
        ):
            own = pixels[number, :count] if pixels.dim() == 5 else pixels[first : first + count]
            source, weight = self._sources(packing, first)
            first += count
            picture = Picture(
                free=packing.free,
                pos=packed_places(packing.free, self.side),
                source=source,
                weight=weight,
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

    def _packed(self, call: dict[str, Any], counts: list[int], sizes: Tensor) -> list[Packing]:
        """What the model's own packing makes of the coordinates of patches."""
        options: dict[str, Any] = {}
        if self.strategy:
            options["vision_feature_select_strategy"] = "full"
        ratio = call.get("vision_aspect_ratio") or getattr(self.config, "vision_aspect_ratio", None)
        if ratio is not None:
            options["vision_aspect_ratio"] = ratio
        each = zip(counts, torch.as_tensor(sizes), strict=True)
        grids = [self._grid(size) if count > 1 else (0, 1) for count, size in each]
        newline = torch.full((3,), -1.0, dtype=torch.float64)
        packed = self.core.pack_image_features(
            [self._cells(*grid) for grid in grids], sizes, image_newline=newline, **options
        )
        if isinstance(packed, tuple):  # with the length of each
            packed = packed[0]
        return [Packing(told, grid[1]) for told, grid in zip(packed, grids, strict=True)]

    def _grid(self, size: Tensor) -> tuple[int, int]:
        """Rows and columns of crops that a picture is cut into."""
        vision = self.config.vision_config
        down, across = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, vision.image_size
        )
        return int(down), int(across)

    def _cells(self, down: int, across: int) -> Tensor:
        """Region, row and column of each patch of a thumbnail and its crops, ``[crops, P, 3]``.

        In float64, which holds them exactly, also where they are interpolated to between two.
        """
        side = self.side
        within = grid(1, side, side)
        starts = grid(1, down, across) * side + torch.tensor([1, 0, 0])
        return torch.cat([within[None], starts[:, None] + within]).double()

    def _sources(self, packing: Packing, first: int) -> tuple[Tensor | None, Tensor | None]:
        """What tokens are made of, where the encoder can be read."""
        if self.read_encoder is None:
            return None, None
        return packing.sources(self.side, first)

    def find_sources(self, pictures: list[Picture]) -> None:
        """They are said where pictures are made."""

    def clips(self, call: dict[str, Any], output: Any) -> list[list[Picture]]:
        """Clips."""
        raise NotImplementedError  # pragma: no cover - abstract

    def clip(
        self,
        pixels: Tensor,
        side: int,
        marks: int,
        source: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> list[Picture]:
        """A clip of frames of ``side`` squared tokens, and of marks behind them."""
        frames, aside = len(pixels), self.patches_aside
        count = frames * side * side
        return [
            Picture(
                free=torch.arange(count + marks) < count,
                pos=grid(frames, side, side),
                source=source,
                weight=weight,
                pixels=pixels,
                kind="video",
                grids=((frames, aside, aside),),
            )
        ]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """What is known of all frames, one behind the other."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


class OneVisionAdapter(PackedAdapter):
    """LLaVA-OneVision: large pictures are interpolated, frames too; one newline ends a clip."""

    strategy = False

    def clips(self, call: dict[str, Any], output: Any) -> list[list[Picture]]:
        """Clips, every frame at half the resolution."""
        side, clips = math.ceil(self.patches_aside / 2), call["pixel_values_videos"]
        frame = Packing(self.core.apply_pooling(self._cells(0, 1))[0])
        found = []
        for number, pixels in enumerate(clips):
            frames = range(number * len(pixels), (number + 1) * len(pixels))
            each = [self._sources(frame, first) for first in frames]
            parts = (_stacked(column) for column in zip(*each, strict=True))
            found.append(self.clip(pixels, side, 1, *parts))
        return found


class NextVideoAdapter(PackedAdapter):
    """LLaVA-NeXT-Video: pictures as LLaVA-NeXT, frames pooled before the projector."""

    @property
    def whole_from(self) -> Literal["encoder"]:
        """What is followed by the whole grid, where tokens left inside the encoder."""
        return "encoder"

    def cost_shape(self) -> ModelShape:
        """As of others, where nothing but the projector works on frames.

        Raises:
            UnsupportedModel: a convolution pools frames; pictures do not pass it.
        """
        pool = self.core.vision_resampler.pool
        if next(pool.parameters(), None) is not None:
            raise UnsupportedModel(
                f"This {self.config.model_type} pools frames by a {type(pool).__name__}, which "
                f"pictures do not pass: what it costs by token is not counted."
            )
        return super().cost_shape()

    def clips(self, call: dict[str, Any], output: Any) -> list[list[Picture]]:
        """Clips, every frame pooled."""
        stride, clips = self.config.spatial_pool_stride, call["pixel_values_videos"]
        aside, found = self.patches_aside, []
        for number, pixels in enumerate(clips):
            source = None
            if self.read_encoder is not None:
                frames = torch.arange(number * len(pixels), (number + 1) * len(pixels))
                source = blocks((aside, aside), stride) + frames[:, None, None] * aside**2
                source = source.flatten(0, 1)
            made = self.clip(pixels, aside // stride, 0, source)
            made[0].projected = len(made[0].pos)
            found.append(made)
        return found


class GraniteAdapter(PackedAdapter):
    """Granite 4 Vision: placeholders are zero, and get features before several decoder layers.

    A crop is pooled, by windows.
    """

    starts_empty = True
    continues = False  # its forward hands out no cache

    @cached_property
    def adds_later(self) -> bool:
        """Always."""
        return True

    @property
    def side(self) -> int:
        """Tokens along one side of a crop."""
        return int(self.patches_aside * Fraction(self.config.downsample_rate))

    @property
    def _unread(self) -> str:
        """Why the encoder cannot be read."""
        return "its tokens are queries, of which several look at all patches of one window"

    def later_features(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Take out of the decoder's arguments what it would add to visual tokens, by layer."""
        return take_before(kwargs)


class VideoLlavaAdapter(GenericAdapter):
    """Video-LLaVA: every frame of a clip keeps its class token, which is protected.

    Frames that follow one another without a token between them are one clip.

    Pictures and clips have encoders of their own, of one shape.
    """

    @cached_property
    def _of_clips(self) -> ShownEncoder:
        """The encoder of clips."""
        return self.shown_encoder(self.core.video_tower)

    def watch_encoder(
        self, layer: int, record: Callable[[Tensor, Tensor, float], None]
    ) -> list[Any]:
        """A layer of both: a call of one runs the one or the other."""
        return [*super().watch_encoder(layer, record), *self._of_clips.watch(layer, record)]

    def encoder_blocks(self, layer: int) -> list[nn.Module]:
        """Those of both."""
        return [*super().encoder_blocks(layer), self._of_clips.layers[layer]]

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
            kind="video", grids=grids, placed=placed, projected=count,
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
