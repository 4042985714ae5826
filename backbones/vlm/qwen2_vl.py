# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL (``qwen2_vl``, ``qwen2_5_vl``): any size, images and video, M-RoPE."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal

import torch
from torch import nn

from visprune.backbones.encoders.base import Instead
from visprune.backbones.vlm.base import VLMAdapter
from visprune.backbones.vlm.picture import Picture, grid
from visprune.backbones.vlm.placeholders import mismatch


class Qwen2VLAdapter(VLMAdapter):
    """Adapter of ``Qwen2VLForConditionalGeneration`` and ``Qwen2_5_VLForConditionalGeneration``.

    Survivors keep their (t, h, w) positions, and ``rope_deltas`` stay those of the whole prompt.
    The encoder has no class token.
    """

    multi_axis_rope = True

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        return self.core.visual

    @property
    def projector(self) -> nn.Module:
        """The merger, which makes one token of a block of patches."""
        return self.core.visual.merger

    @property
    def no_encoder(self) -> str:
        """Why tokens cannot leave inside the encoder."""
        return (
            "its vision encoder packs the patches of all pictures into one sequence, in windows "
            "(Qwen2.5-VL) and in the blocks of 2 x 2 that its merger joins; both need every patch"
        )

    def guards(self) -> list[Any]:
        """Also before positions are computed, which ``generate`` does first of all."""
        original = self.core.get_rope_index
        checked = functools.update_wrapper(
            functools.partial(self._rope_index, original, inspect.signature(original)), original
        )
        return [*super().guards(), Instead(self.core, "get_rope_index", checked)]

    def _rope_index(
        self, original: Any, signature: inspect.Signature, /, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the core's ``get_rope_index``."""
        call = signature.bind_partial(*args, **kwargs).arguments
        for kind in ("image", "video"):
            grids = call.get(f"{kind}_grid_thw")
            found = int((call["input_ids"] == self.token_id(kind)).sum())
            if found or grids is not None:
                counts = [] if grids is None else self._counts(grids)
                if found != sum(counts):
                    raise mismatch(kind, found, counts, self.token_id(kind))
        return original(*args, **kwargs)

    def counts(self, call: dict[str, Any], kind: Literal["image", "video"]) -> list[int]:
        """Tokens that each picture of a call becomes."""
        return self._counts(call[f"{kind}_grid_thw"])

    def _counts(self, grids: Any) -> list[int]:
        merged = self.config.vision_config.spatial_merge_size**2
        return [t * h * w // merged for t, h, w in torch.as_tensor(grids).tolist()]

    def pictures(self, call: dict[str, Any], kind: Literal["image", "video"]) -> list[Picture]:
        """One picture per row of ``image_grid_thw`` (or ``video_grid_thw``)."""
        grids = call[f"{kind}_grid_thw"]
        pixels = call["pixel_values" if kind == "image" else "pixel_values_videos"]
        merge = self.config.vision_config.spatial_merge_size
        out, first = [], 0
        for t, h, w in torch.as_tensor(grids).tolist():
            patches = t * h * w
            own = pixels[first : first + patches]
            first += patches
            pos = grid(t, h // merge, w // merge)
            free = torch.ones(len(pos), dtype=torch.bool)
            out.append(Picture(free=free, pos=pos, source=None, pixels=own, kind=kind,
                               grids=((t, h, w),)))  # fmt: skip
        return out
