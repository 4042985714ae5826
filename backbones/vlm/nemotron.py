# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H Omni: Mamba, attention and feed-forward layers in turn, and no inner model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.vlm.generic import GenericAdapter, Kind
from visprune.errors import UnsupportedModel


class NemotronHAdapter(GenericAdapter):
    """The model itself merges pictures; its decoder has a head of its own.

    Clips are written with the placeholder of pictures. Positions are not told to any layer.
    """

    same_id = True

    def __init__(self, model: Any) -> None:
        if getattr(model, "video_pruning_rate", 0):
            raise UnsupportedModel(
                f"This {model.config.model_type} model drops tokens of clips by itself "
                f"(video_pruning_rate = {model.video_pruning_rate}). Load it with "
                f"video_pruning_rate=0.0, and choose a method here."
            )
        super().__init__(model)

    def find_core(self, model: Any) -> Any:
        """The model itself."""
        return model

    def find_decoder(self) -> Any:
        """The decoder in front of its head."""
        return self.core.language_model.model

    @property
    def head(self) -> nn.Module:
        """The output head."""
        return self.core.language_model.lm_head

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm behind the decoder's last layer."""
        return self.language_model.norm_f

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.layers[layer].mixer

    def layer_input(self, layer: Any, hidden: Tensor) -> Tensor:
        """What the attention of a decoder layer is given of the states that enter the layer."""
        return layer.norm(hidden)

    def grids_of(self, call: dict[str, Any], kind: Kind) -> list[Any] | None:
        """(t, h, w) in patches of each picture or clip."""
        if kind == "image":
            return [(1, *row) for row in torch.as_tensor(call["image_grid_hw"]).tolist()]
        clips, side = call["pixel_values_videos"], self.tower.patch_size
        tubelets, _, height, width = clips.shape[-4:]
        return [(tubelets, height // side, width // side)] * (len(clips) if clips.dim() == 5 else 1)
