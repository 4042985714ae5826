# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 (``llava``): one encoder picture per image, its patches in raster order."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from visprune.backbones.encoders.base import EncoderAdapter
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.markup import VICUNA_V1
from visprune.backbones.vlm.picture import Picture, grid
from visprune.backbones.vlm.shown import reduced, several_layers
from visprune.errors import ConfigError, UnsupportedModel

# One square grid for all pictures, with or without a class token.
SQUARE = ("clip_vision_model", "siglip_vision_model")
PIXTRAL = "pixtral"


class LlavaAdapter(VLMAdapter):
    """Adapter of ``LlavaForConditionalGeneration``.

    With ``vision_feature_select_strategy="full"`` the class token is among the visual tokens; it is
    protected and outside the budget. Pixtral is of this class too: each picture has the grid of its
    own size, and the tokens that end its rows are text.

    Attributes:
        towers: ``model_type`` of the image encoders whose tokens it knows the places of.
    """

    towers: ClassVar[tuple[str, ...]] = (*SQUARE, PIXTRAL)
    prompt_style = "llava15"
    markup: ClassVar[str | None] = VICUNA_V1

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        kind = self.config.vision_config.model_type
        if kind not in self.towers:
            raise UnsupportedModel(
                f"This {self.config.model_type} model sees with a {type(self.tower).__name__} "
                f"({kind}), and which of its tokens is which patch is not known. Image encoders "
                f"that {self.config.model_type} is pruned with: {', '.join(self.towers)}."
            )

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        return self.core.vision_tower

    @property
    def has_cls(self) -> bool:
        """Whether the encoder has a class token (CLIP has, SigLIP has not)."""
        return any(name.endswith("class_embedding") for name, _ in self.tower.named_parameters())

    @cached_property
    def encoder(self) -> EncoderAdapter | None:
        """The tower, if it is made of CLIP's or SigLIP's layers and one of them is read."""
        return reduced(self.tower, self.config)

    @property
    def no_encoder(self) -> str:
        """Why there is no :attr:`encoder`."""
        several = several_layers(self.config)
        if several is not None:
            return several
        if self.own_sizes:
            return (
                "its encoder packs all pictures of a call into one sequence, each of its own size"
            )
        return f"its encoder {type(self.tower).__name__} is not made of CLIP's or SigLIP's layers"

    @property
    def encoder_end(self) -> int:
        """The encoder's layer whose output the model reads, 0-based."""
        layer = int(self.config.vision_feature_layer)
        count = 0 if self.encoder is None else len(self.encoder.layers)
        # hidden_states has one entry more than there are layers: entry i is the output of i - 1.
        return (layer if layer >= 0 else count + 1 + layer) - 1

    @property
    def projector(self) -> nn.Module:
        """What maps the encoder's tokens to the decoder's, one by one."""
        return self.core.multi_modal_projector

    @property
    def own_sizes(self) -> bool:
        """Whether each picture has a grid of its own size (Pixtral)."""
        return self.config.vision_config.model_type == PIXTRAL

    @property
    def side(self) -> int:
        """Patches along one side of an encoder picture."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    @property
    def keeps_cls(self) -> bool:
        """Whether the class token is among the visual tokens."""
        return self.has_cls and self.config.vision_feature_select_strategy == "full"

    def pictures(self, call: dict[str, Any], kind: Literal["image", "video"]) -> list[Picture]:
        """One picture per row of ``pixel_values``."""
        if self.own_sizes:
            return self._own_sized(call["pixel_values"], call.get("image_sizes"))
        side = self.side
        patches = side * side
        out = []
        for number, pixels in enumerate(call["pixel_values"]):
            free = torch.ones(patches + self.keeps_cls, dtype=torch.bool)
            if self.keeps_cls:
                free[0] = False
            source = torch.arange(patches) + number * patches
            out.append(
                Picture(free=free, pos=grid(1, side, side), source=source, pixels=pixels,
                        grids=((1, side, side),))
            )  # fmt: skip
        return out

    def _own_sized(self, pixels: Any, sizes: Any) -> list[Picture]:
        """One picture per row of ``pixels``, each cut out of what pads the batch to one size."""
        step = self.config.vision_config.patch_size
        if sizes is None:
            if len(pixels) > 1:
                raise ConfigError(
                    f"{len(pixels)} pictures came without image_sizes, which says what size each "
                    f"of them has. Pass the processor's own outputs, whole."
                )
            sizes = [pixels[0].shape[-2:]]
        out = []
        for picture, (height, width) in zip(pixels, torch.as_tensor(sizes).tolist(), strict=True):
            rows, columns = height // step, width // step
            out.append(
                Picture(free=torch.ones(rows * columns, dtype=torch.bool),
                        pos=grid(1, rows, columns), source=None,
                        pixels=picture[:, :height, :width], grids=((1, rows, columns),))
            )  # fmt: skip
        return out
