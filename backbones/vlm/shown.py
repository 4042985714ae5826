# SPDX-License-Identifier: Apache-2.0
"""Image encoders whose layers can be read, and in some of which tokens can leave.

Such an encoder takes every picture (or tile) as a sequence of its own, patches in raster order
behind a class token or none; what follows it makes one token of each patch or of a square block.
Where tokens leave, the grid is given back behind the encoder or, one by one, behind the projector.
"""

from __future__ import annotations

import functools
import inspect
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visprune.backbones.cost.attention import find_attention
from visprune.backbones.cost.encoder import stack
from visprune.backbones.encoders.base import EncoderAdapter, ShownQK
from visprune.backbones.encoders.hf_vit import HfViT
from visprune.backbones.hf.probe import Attended, Wanted, watch
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.known import READ, REDUCED
from visprune.backbones.vlm.picture import Picture
from visprune.errors import UnsupportedModel

_CLASS_TOKENS = ("class_embedding", "cls_token")


class ShownEncoder:
    """The layers of such an encoder.

    Args:
        tower: the encoder.
        grid: patches along height and width of a picture.
        merge: side of the block of patches that becomes one token.

    Attributes:
        layers: its layers.
        has_cls: whether a class token stands before the patches.
        patches: of a picture.
        grid: their rows and columns.
    """

    def __init__(self, tower: nn.Module, grid: tuple[int, int], merge: int) -> None:
        self.layers: list[nn.Module] = list(stack(tower)[1])
        names = [name for name, _ in tower.named_parameters()]
        self.has_cls = any(name.endswith(_CLASS_TOKENS) for name in names)
        self.patches = grid[0] * grid[1]
        self.grid, self._merge = grid, merge

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.has_cls)

    def watch(self, layer: int, record: ShownQK) -> list[Any]:
        """Show queries and keys ``[P, H, T, d]`` of a layer, and the scale of scores."""
        attention = find_attention(self.layers[layer])
        assert attention is not None, "a layer of a stack attends"
        return [watch(attention, functools.partial(_wanted, record))]

    def blocks(self) -> Tensor:
        """The patches that each token of a picture is made of, ``[N, merge * merge]``."""
        return blocks(self.grid, self._merge)


def blocks(grid: tuple[int, int], side: int) -> Tensor:
    """The patches in each square block of a grid, ``[N, side * side]``.

    Blocks and the patches of a block are in raster order; patches beyond whole blocks are in none.

    Args:
        grid: patches along height and width.
        side: of a block.
    """
    height, width = grid
    raster = torch.arange(height * width).view(height, width)
    rows, columns = height // side, width // side
    whole = raster[: rows * side, : columns * side]
    parts = whole.view(rows, side, columns, side).transpose(1, 2)
    return parts.reshape(rows * columns, side * side)


def reduced(tower: nn.Module, config: Any) -> EncoderAdapter | None:
    """An encoder in which tokens can leave: one of plain layers, of which one is read.

    Args:
        tower: the encoder.
        config: of the model around it.
    """
    if several_layers(config) is not None:
        return None
    try:
        return HfViT(tower)
    except UnsupportedModel:
        return None


def several_layers(config: Any) -> str | None:
    """Why tokens cannot leave where more than one layer is read; ``None``: one is."""
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None or isinstance(layers, int):
        return None
    return f"it joins the outputs of encoder layers {layers}, which would differ in length"


class ReadAdapter(VLMAdapter):
    """Base of families whose encoder can be read, and in some of them be reduced.

    Attributes:
        queries: whether the tokens are learned queries and no patches.
    """

    queries: ClassVar[bool] = False

    @cached_property
    def read_encoder(self) -> ShownEncoder | None:
        """The encoder as signals are read of it."""
        return self.shown_encoder(self.tower) if self.config.model_type in READ else None

    def shown_encoder(self, tower: nn.Module) -> ShownEncoder:
        """An encoder, as signals are read of it."""
        vision = self.config.vision_config
        sizes = (vision.image_size, vision.patch_size)
        (height, width), (down, across) = (
            size if isinstance(size, list | tuple) else (size, size) for size in sizes
        )
        return ShownEncoder(tower, (height // down, width // across), self.merge)

    @cached_property
    def encoder(self) -> EncoderAdapter | None:
        """The encoder, where tokens can leave inside it."""
        return reduced(self.tower, self.config) if self.config.model_type in REDUCED else None

    @property
    def has_cls(self) -> bool:
        """Whether the encoder has a class token that can be read."""
        return self.read_encoder is not None and self.read_encoder.has_cls

    @property
    def encoder_end(self) -> int:
        """The encoder's layer whose output the model reads, 0-based; of several, the last."""
        count = 0 if self.read_encoder is None else len(self.read_encoder.layers)
        given = getattr(self.config, "vision_feature_layer", None)
        each = given if isinstance(given, list | tuple) else [-1 if given is None else given]
        # hidden_states has one entry more than there are layers: entry i is the output of i - 1.
        return max((one if one >= 0 else count + 1 + one) - 1 for one in each)

    @property
    def no_encoder(self) -> str:
        """Why no token can leave inside the encoder."""
        if self.read_encoder is None:
            return self._unread
        if self.config.model_type in REDUCED:
            kind = type(self.tower).__name__
            return several_layers(self.config) or f"its encoder {kind} is not made of plain layers"
        return several_layers(self.config) or (
            "what reads its encoder (a part of the encoder itself, or features of several layers) "
            "wants the whole grid; attention and features of the encoder can be read"
        )

    @property
    def lacking(self) -> dict[str, str]:
        """By capability of signals, why the model has it not."""
        if self.encoder is not None and self.merge > 1:
            side = self.merge
            return {"dropping": f"a token of it is joined from {side} x {side} patches"}
        if self.read_encoder is not None:
            return {}
        return dict.fromkeys(("encoder_attention", "encoder_features", "cls_token"), self._unread)

    @property
    def _unread(self) -> str:
        """Why the encoder cannot be read."""
        kind = self.config.model_type
        if self.queries:
            return f"the visual tokens of {kind} are learned queries, and no patches"
        if "image_grid_thw" in inspect.signature(self.core.get_image_features).parameters:
            return f"the encoder of {kind} packs the patches of all pictures into one sequence"
        return f"which of the tokens of {kind} is which patch of its encoder is not known"

    def find_sources(self, pictures: list[Picture]) -> None:
        """Say of pictures that were just encoded which patches their tokens are made of."""
        encoder, first = self.read_encoder, 0
        if encoder is None:
            return
        for picture in pictures:
            own = encoder.blocks()
            count = int(picture.free.sum()) // len(own)
            if count * len(own) != int(picture.free.sum()):
                return  # not one grid for each tile
            parts = [own + (first + n) * encoder.patches for n in range(count)]
            source = torch.cat(parts)
            picture.source = source[:, 0] if source.shape[1] == 1 else source
            first += count


def _wanted(record: ShownQK) -> Wanted:
    return Wanted(functools.partial(_hand_on, record))


def _hand_on(record: ShownQK, attended: Attended) -> None:
    record(attended.query, attended.key, attended.scale)
