# SPDX-License-Identifier: Apache-2.0
"""Families of transformers that need no code of their own.

They all merge alike: features of ``get_image_features`` take the places of placeholder tokens, and
the decoder is given the embedded sequence. What is left to say is which pieces of the encoder's
output are one picture, and where its tokens lie.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from visprune.backbones.hf.features import lengths, together
from visprune.backbones.vlm.join import join
from visprune.backbones.vlm.known import COUNTED, UNCOUNTED
from visprune.backbones.vlm.picture import ImageLayout, Picture, grid
from visprune.backbones.vlm.regions import Region, tiled
from visprune.backbones.vlm.shown import ReadAdapter
from visprune.backbones.vlm.structure import find_decoder, likely_grid, merged_grid
from visprune.cost.cost import ModelShape
from visprune.cost.layers import Projector
from visprune.errors import UnsupportedModel

Kind = Literal["image", "video"]
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
_PROJECTORS = (
    *("multi_modal_projector", "aligner", "connector", "projector", "mm_projector"),
    *("vision_projection", "vision_adapter"),
)
_MERGERS = ("merger", "patch_merger", "connector")
# Names that configs have for the side of a block of patches.
_SIDES = (
    *("spatial_merge_size", "scale_factor", "downsample_factor", "merge_kernel_size"),
    "merge_size",
)
_PIXELS = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos", "pixel_values"),
}


class GenericAdapter(ReadAdapter):
    """A family whose encoder makes one entry of each picture or clip.

    Positions come from the grids that the processor gives; without them from the number of tokens
    and the shape of the picture, in raster order (``Picture.placed`` is then ``"guessed"``, unless
    the cells come out square).
    """

    def __init__(self, model: Any) -> None:
        if not (self.merges_inside or hasattr(self.find_core(model), "get_image_features")):
            raise UnsupportedModel(
                f"{type(model).__name__} has no inner model with get_image_features: where its "
                f"pictures are encoded is not known."
            )
        super().__init__(model)

    def find_decoder(self) -> Any:
        """The decoder inside of ``core``."""
        return find_decoder(self.core)

    @cached_property
    def multi_axis_rope(self) -> bool:  # type: ignore[override]
        """Whether positions are (t, h, w)."""
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        kinds = [rope, *(own for own in rope.values() if isinstance(own, dict))]
        return any("mrope_section" in own for own in kinds)

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        return self._part(_TOWERS, "vision encoder")

    @property
    def projector(self) -> nn.Module:
        """What maps the encoder's tokens to the decoder's."""
        inside = (getattr(self.tower, name, None) for name in _MERGERS)
        merger = next((part for part in inside if isinstance(part, nn.Module)), None)
        return self._part(_PROJECTORS, "projector") if merger is None else merger

    @property
    def projecting(self) -> list[nn.Module]:
        """The projector, and one behind a merger that is a part of the encoder."""
        beside = [getattr(self.core, name, None) for name in _PROJECTORS]
        found = [self.projector, *(part for part in beside if isinstance(part, nn.Module))]
        return list(dict.fromkeys(found))

    @property
    def merge(self) -> int:
        """Side of the block of patches that becomes one token."""
        vision = self.config.vision_config
        for config in (vision, self.config):
            for name in _SIDES:
                value = getattr(config, name, None)
                value = value[0] if isinstance(value, list | tuple) and value else value
                if isinstance(value, int):
                    return value
        shrunk = getattr(self.config, "downsample_ratio", None)
        pooled = getattr(self.config, "mm_tokens_per_image", None)
        if pooled is not None:
            return int(vision.image_size // vision.patch_size // math.isqrt(pooled))
        return 1 if shrunk is None else round(1 / shrunk)

    def cost_shape(self) -> ModelShape:
        """What the whole model costs by token, where that was compared with an own count.

        Raises:
            UnsupportedModel: it was not.
        """
        self.check_counted()
        return super().cost_shape()

    def check_counted(self) -> None:
        """Raise ``UnsupportedModel`` where what the model costs was not compared with a count."""
        kind = self.config.model_type
        if kind not in COUNTED:
            why = UNCOUNTED.get(kind, "it has not been compared with an independent count")
            raise UnsupportedModel(
                f"What {kind} costs by token is not told: {why}. Families of this adapter whose "
                f"cost is: {', '.join(COUNTED)}."
            )

    def _part(self, names: tuple[str, ...], what: str) -> nn.Module:
        for name in names:
            found = getattr(self.core, name, None)
            if isinstance(found, nn.Module):
                return found
        raise UnsupportedModel(
            f"The {what} of {type(self.model).__name__} is not known: it is none of "
            f"{', '.join(names)}."
        )

    # Pictures --------------------------------------------------------------------------------

    def counts(self, call: dict[str, Any], kind: Kind) -> list[int] | None:
        """Not known before encoding."""
        return None

    def promised(self, call: dict[str, Any], kind: Kind) -> list[int] | None:
        """Tokens of each picture as its grid has it; ``None``: there are no grids."""
        grids = self.grids_of(call, kind)
        return None if grids is None else [self.tokens_of(*cells) for cells in grids]

    def tokens_of(self, t: int, h: int, w: int) -> int:
        """Tokens that a grid of patches becomes."""
        return t * h * w // self.merge**2

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """One picture for each entry of the encoder's output."""
        counts = lengths(output)
        if together(output):
            counts = self._apart(call, kind, counts[0])
        pixels = self.pixels_of(call, kind, counts)
        grids = self.grids_of(call, kind)
        if grids is None or len(grids) != len(counts):
            grids = [None] * len(counts)
        return [
            [self.piece(count, own, cells, kind)]
            for count, own, cells in zip(counts, pixels, grids, strict=True)
        ]

    def _apart(self, call: dict[str, Any], kind: Kind, total: int) -> list[int]:
        """Tokens of each entry, where the encoder's output does not tell them apart.

        Raises:
            UnsupportedModel: nor do grids.
        """
        counts = self.promised(call, kind)
        if counts is None or sum(counts) != total:
            raise UnsupportedModel(
                f"The encoder of this {self.config.model_type} gives all {total} tokens in one "
                f"line, and which are of which picture is not known: their grids make "
                f"{counts or 'nothing'}. Upgrade transformers."
            )
        return counts

    def piece(
        self,
        count: int,
        pixels: Tensor | None,
        cells: tuple[int, int, int] | None,
        kind: Kind,
    ) -> Picture:
        """A picture, a tile or a clip.

        Args:
            count: its tokens.
            pixels: what the encoder was given of it.
            cells: (t, h, w) in patches, where the processor says so.
            kind: image or video.
        """
        free = self.free(count, cells)
        pos, placed, grids = self.places(int(free.sum()), pixels, cells)
        return Picture(
            free=free, pos=pos, source=None, pixels=pixels, kind=kind, grids=grids, placed=placed,
            projected=int(free.sum()),
        )  # fmt: skip

    def free(self, count: int, cells: tuple[int, int, int] | None) -> Tensor:
        """Which tokens of a picture are of its patches, ``[count]`` bool; the others are marks.

        Marks (the end of a row, a separator of views) are protected and outside the budget.
        """
        return torch.ones(count, dtype=torch.bool)

    def places(
        self, count: int, pixels: Tensor | None, cells: tuple[int, int, int] | None
    ) -> tuple[Tensor, Literal["grid", "guessed", "queries"], tuple[tuple[int, int, int], ...]]:
        """(t, h, w) of the tokens, how that is known, and the grids that the encoder saw."""
        own = () if cells is None else (cells,)
        if self.queries:
            return grid(1, 1, count), "queries", own or ((1, 1, count),)
        merged = None if cells is None else merged_grid(cells, count)
        if merged is not None:
            return grid(*merged), "grid", own
        if pixels is not None and (pixels.dim() < 3 or pixels.shape[-3] not in (1, 3)):
            pixels = None  # patches in a line
        rows, columns, sure = likely_grid(count, pixels)
        if not own:
            own = (self._cut(pixels) or (1, rows, columns),)
        return grid(1, rows, columns), "grid" if sure else "guessed", own

    def _cut(self, pixels: Tensor | None) -> tuple[int, int, int] | None:
        """The grid of patches that the encoder cuts a picture into, ``None`` where not known."""
        size = getattr(self.config.vision_config, "patch_size", None)
        if pixels is None or size is None:
            return None
        down, across = size if isinstance(size, list | tuple) else (size, size)
        return 1, pixels.shape[-2] // down, pixels.shape[-1] // across

    def grids_of(self, call: dict[str, Any], kind: Kind) -> list[Any] | None:
        """(t, h, w) in patches of each entry, where the processor gives that."""
        given = call.get(f"{kind}_grid_thw")
        if given is None:
            return None
        return [tuple(row) for row in torch.as_tensor(given).tolist()]

    def pixels_of(self, call: dict[str, Any], kind: Kind, counts: list[int]) -> list[Any]:
        """What the encoder was given of each entry; all of it where that cannot be told."""
        names = (*_PIXELS[kind], *call)
        pixels = next(
            (call[n] for n in names if "pixel_values" in n and call.get(n) is not None), None
        )
        if pixels is None:
            return [None] * len(counts)
        grids = self.grids_of(call, kind)
        if grids is not None and len(grids) == len(counts):
            patches = [t * h * w for t, h, w in grids]
            if isinstance(pixels, Tensor) and sum(patches) == len(pixels):
                return list(pixels.split(patches))
        if len(pixels) != len(counts):
            return [pixels] * len(counts)
        sizes = call.get("image_sizes")
        if sizes is None or len(sizes) != len(pixels) or pixels[0].dim() != 3:
            return list(pixels)
        sizes = torch.as_tensor(sizes).tolist()
        return [own[..., :h, :w] for own, (h, w) in zip(pixels, sizes, strict=True)]


class TriedAdapter(GenericAdapter):
    """A family without a row in the registry: whether the contract holds, a check has to say."""

    proved = False


class OneIdAdapter(GenericAdapter):
    """A family that writes clips with the placeholder of pictures (GLM-4V)."""

    same_id = True


class QueriesAdapter(GenericAdapter):
    """A family that reads pictures with learned queries."""

    queries = True


class TilesAdapter(GenericAdapter):
    """A family whose encoder makes one entry of each tile; tiles of a picture follow one another.

    ``t`` of a token is the number of its tile: how the tiles lie in the picture is not told to the
    model.

    Attributes:
        between: tokens between two tiles of one picture, at most.
        thumbnail: where among the tiles the whole picture stands.
    """

    between: ClassVar[int] = 0
    thumbnail: ClassVar[Literal["first", "last"]] = "last"

    def regions(self, count: int, size: tuple[int, int]) -> list[Region]:
        """Tiles row by row, and the whole picture."""
        return tiled(count, size, self.thumbnail)

    def joined(self, call: dict[str, Any], layouts: list[ImageLayout]) -> list[ImageLayout]:
        """Put tiles together that lie close enough."""
        return join(
            layouts,
            lambda one, other: other.positions[0] - one.positions[-1] - 1 <= self.between,
        )


class MarkedTilesAdapter(TilesAdapter):
    """One mark between two tiles; an end and a start between two pictures."""

    between = 1


class OvisAdapter(MarkedTilesAdapter):
    """Ovis 2: the whole picture comes before its tiles.

    A feature is a mean of the rows of a table, by probabilities that the encoder's head gives them.
    """

    continues = False  # the mark behind a picture is embedded together with it

    @property
    def projector(self) -> nn.Module:
        """The encoder's head."""
        return self.tower.head_linear  # type: ignore[return-value]

    @property
    def merge(self) -> int:
        """Side of the block of patches that becomes one token."""
        return int(self.config.vision_config.hidden_stride)

    def cost_shape(self) -> ModelShape:
        """As of others, and the product of probabilities and table.

        Raises:
            UnsupportedModel: a module holds what cannot be counted.
        """
        shape = super().cost_shape()
        table = self.core.visual_embeddings_table.weight.numel()
        macs = shape.projector.macs_per_token + table
        return replace(shape, projector=Projector(macs, merge=self.merge))

    def regions(self, count: int, size: tuple[int, int]) -> list[Region]:
        """The whole; its processor lays tiles out by the area that they cover, not by shape."""
        if count == 1:
            return [Region("full picture")]
        return [Region("thumbnail"), *[Region("tile", None)] * (count - 1)]


class RowsAdapter(TilesAdapter):
    """A family whose encoder makes one entry of all pictures of a sample (Idefics 2).

    Its pixels are ``[B, n, 3, H, W]``, all zero where a sample has fewer. Crops of a picture have
    one mark between them, and so have two pictures without a word between them: these are counted
    as one.
    """

    between = 1

    def pieces(self, call: dict[str, Any], kind: Kind, output: Any) -> list[list[Picture]]:
        """Every picture or tile of each sample."""
        return self.rows(call["pixel_values"], None, output, kind)

    def rows(
        self, pixels: Tensor, there: Tensor | None, output: Any, kind: Kind
    ) -> list[list[Picture]]:
        """The pieces of each sample.

        Args:
            pixels: ``[B, n, 3, H, W]``.
            there: which of them are real, ``[B, n]`` bool; ``None``: those that are not all zero.
            output: what the encoder made of them.
            kind: image or video.
        """
        there = (pixels != 0).flatten(2).any(-1) if there is None else there.bool()
        each = sum(lengths(output)) // max(1, int(there.sum()))
        return [
            [self.piece(each, one, None, kind) for one in row[real]]
            for row, real in zip(pixels, there, strict=True)
        ]


class QueryRowsAdapter(RowsAdapter):
    """The same, of learned queries."""

    queries = True


class NamedTilesAdapter(RowsAdapter):
    """Every tile stands behind a mark with its place, the whole picture comes last (Idefics 3).

    Whose mark the last tile of a row has is a whole picture, and ends one.
    """

    def joined(self, call: dict[str, Any], layouts: list[ImageLayout]) -> list[ImageLayout]:
        """Put the tiles of a picture together, up to its whole."""
        ids = call.get("input_ids")
        if ids is None:  # merged by hand: the marks are gone
            return layouts
        marks = [int(ids[x.row, int(x.positions[0]) - 1]) for x in layouts]
        ends = {
            mark
            for number, mark in enumerate(marks)
            if number + 1 == len(layouts) or layouts[number + 1].row != layouts[number].row
        }
        mark_of = {id(layout): mark for layout, mark in zip(layouts, marks, strict=True)}
        return join(layouts, lambda one, other: mark_of[id(one)] not in ends)
