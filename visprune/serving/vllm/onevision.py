# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision in vLLM: pictures of many crops are interpolated, a clip ends with a newline."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    unpad_image,
)
from vllm.model_executor.models import llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems, VideoProcessorItems

from visprune.core.signals import Fingerprint
from visprune.serving.asked import Asked
from visprune.serving.places import pooled, spec_of, tiled
from visprune.serving.shorten import Encoded, shorten
from visprune.serving.vllm.llava import NAMES
from visprune.serving.vllm.processor import Prunes, check_graphs, encoded_together, parts, taken

# Crops whose tokens a picture has at most; vLLM takes this many whatever the checkpoint says.
_MOST = 9


class OneVisionProcessor(Prunes, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """A thumbnail and crops, newlines kept; clips."""

    kinds = ("image", "video")

    def places(self, kind: str, number: int, items: Any, out: Any) -> tuple[Tensor, int]:
        """Those of the picture's own size, or of the clip's frames."""
        config = self.info.get_hf_config()
        if kind == "video":
            frames = items.get_items("video", VideoProcessorItems).get_num_frames(number)
            pos, free = pooled(config, frames)
        else:
            size = items.get_items("image", ImageProcessorItems).get_image_size(number)
            pos, free = _tiled(config, (size.height, size.width))
        return pos, len(free) - len(pos)


def _tiled(config: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return tiled(config, size, get_anyres_image_grid_shape, unpad_image, most=_MOST)


@MULTIMODAL_REGISTRY.register_processor(
    OneVisionProcessor,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class OneVision(llava_onevision.LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision; newlines stay and do not count."""

    hf_to_vllm_mapper = (
        NAMES | llava_onevision.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper
    )

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_graphs(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.together = encoded_together(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode pictures or clips, and prune them."""
        pictures, clips = taken(kwargs, "image"), taken(kwargs, "video")
        if pictures is not None:
            places = [_tiled(self.config, (int(h), int(w))) for h, w in kwargs["image_sizes"]]
            return self._pruned("image", pictures, kwargs, places)
        if clips is not None:
            places = [pooled(self.config, len(own)) for own in kwargs["pixel_values_videos"]]
            return self._pruned("video", clips, kwargs, places)
        return super().embed_multimodal(**kwargs)

    def _pruned(
        self, kind: Literal["image", "video"], asked: list[Asked], kwargs: dict[str, Any],
        places: list[tuple[Tensor, Tensor]],
    ) -> list[Tensor]:  # fmt: skip
        left = []
        for own, part in parts(kwargs, [len(free) for _, free in places], self.together):
            whole = super().embed_multimodal(**part)
            if kind == "video":
                pixels = list(part["pixel_values_videos"])
            else:  # without what others of its request pad it with
                pixels = [crops[: self._crops((int(h), int(w)))]
                          for crops, (h, w) in zip(part["pixel_values"], part["image_sizes"],
                                                   strict=True)]  # fmt: skip
            left += [
                self._left(one, rows.flatten(0, -2), seen, kind, *at)
                for one, rows, seen, at in zip(
                    asked[own], whole, pixels, places[own], strict=True)
            ]  # fmt: skip
        return left

    def _crops(self, size: tuple[int, int]) -> int:
        """Crops of a picture and its thumbnail, behind which others of its request pad it."""
        rows, columns = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        return 1 + int(rows * columns)

    def _left(
        self, asked: Asked, rows: Tensor, pixels: Tensor, kind: Literal["image", "video"],
        pos: Tensor, free: Tensor,
    ) -> Tensor:  # fmt: skip
        seen: dict[Any, Any] = {Fingerprint(): Fingerprint().read(pixels)}
        return shorten(asked, Encoded(rows, pos, free, signals=seen, kind=kind),
                       spec_of(self.config))[0]  # fmt: skip
