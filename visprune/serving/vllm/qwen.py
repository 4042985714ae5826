# SPDX-License-Identifier: Apache-2.0
"""Qwen-VL in vLLM: survivors keep their (t, h, w) positions, as in the whole prompt.

vLLM asks for positions before a picture is encoded, when it is not known which of its tokens stay.
So each placeholder of a pruned picture first gets the position where the picture begins, its token
carries from the encoder where in the picture it comes from (as digits that every dtype holds
exactly, and that caches keep with it), and the forward adds the two. Nothing of the runner is
touched: chunked prefill and cached pictures work like any others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from visprune.core.signals import Fingerprint, Signal
from visprune.serving.asked import Asked
from visprune.serving.places import from_digits, merged, spec_of, to_digits
from visprune.serving.shorten import Encoded, shorten
from visprune.serving.vllm.processor import (
    FIELD,
    Prunes,
    check_graphs,
    encoded_together,
    parts,
    taken,
)

_DIGITS = 6


class _QwenProcessor(Prunes):
    """Blocks of patches on the picture's own grid."""

    def places(self, kind: str, number: int, items: Any, out: Any) -> tuple[Tensor, int]:
        """Those of the grid that the image processor made."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return merged(out[kind][number][f"{kind}_grid_thw"].data, merge), 0


class Qwen2VLProcessor(_QwenProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """Pictures and clips."""

    kinds = ("image", "video")


class Qwen25VLProcessor(_QwenProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Pictures and clips."""

    kinds = ("image", "video")


class Qwen3VLProcessor(_QwenProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Pictures."""

    apart = (
        "Timestamps stand between the frames of its clips, and how many tokens of each frame stay "
        "is not known before they are encoded. "
    )


class _Qwen:
    """Mix-in of vLLM's models."""

    config: Any
    visual: Any
    # Features that methods compare; further layers' (DeepStack) may stand beside them.
    compared: ClassVar[bool] = False
    _places: tuple[Tensor, Tensor] | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1:
            raise ValueError(
                f"visprune gives tokens of Qwen-VL their places where they are embedded: in the "
                f"first of {stages} pipeline stages alone. Use tensor parallelism, or leave the "
                f"plug-in out (VLLM_PLUGINS=)."
            )
        check_graphs(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.together = encoded_together(vllm_config)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Of the whole prompt, with the place where each pruned picture begins for all it keeps."""
        stock = super().get_mrope_input_positions  # type: ignore[misc]
        features = sorted(mm_features, key=lambda x: x.mm_position.offset)
        pruned = [x for x in features if x.data is not None and _field_of(x) in x.data]
        if not pruned:
            return stock(input_tokens, mm_features)
        tokens: list[int] = []
        taken_from: list[int] = []
        moved, first = [], 0
        for feature in features:
            at = feature.mm_position
            tokens += input_tokens[first : at.offset]
            taken_from += range(len(tokens) - (at.offset - first), len(tokens))
            first = at.offset + at.length
            own = input_tokens[at.offset : first]
            whole = len(merged(feature.data[f"{feature.modality}_grid_thw"].data, self._merge)) if (
                feature in pruned) else at.length  # fmt: skip
            begin = len(tokens)
            moved.append(replace(feature, mm_position=replace(at, offset=begin, length=whole)))
            tokens += [own[0]] * whole if feature in pruned else own
            taken_from += [begin] * at.length if feature in pruned else range(begin, len(tokens))
        tokens += input_tokens[first:]
        taken_from += range(len(tokens) - (len(input_tokens) - first), len(tokens))
        positions, _ = stock(tokens, moved)
        end = int(positions.max()) + 1
        return positions[:, taken_from].contiguous(), end - len(input_tokens)

    @property
    def _merge(self) -> int:
        return int(self.config.vision_config.spatial_merge_size)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode pictures or clips; what is left of pruned ones has its places behind it."""
        asked = {kind: found for kind in ("image", "video")
                 if (found := taken(kwargs, kind)) is not None}  # fmt: skip
        if not asked:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        ((kind, settings),) = asked.items()
        grids = kwargs[f"{kind}_grid_thw"]
        patches = [int(thw.prod()) for thw in grids]
        flat = {"pixel_values" if kind == "image" else "pixel_values_videos": patches}
        sizes = [count // self._merge**2 for count in patches]
        return tuple(
            one for own, part in parts(kwargs, sizes, self.together, flat)
            for one in self._pruned(kind, settings[own], part)
        )  # fmt: skip

    def _pruned(self, kind: str, settings: list[Asked], given: dict[str, Any]) -> list[Tensor]:
        whole = super().embed_multimodal(**given)  # type: ignore[misc]
        spec, out, first = spec_of(self.config), [], 0
        pixels = given["pixel_values" if kind == "image" else "pixel_values_videos"]
        seconds = given.get("second_per_grid_ts")
        for number, (one, rows) in enumerate(zip(settings, whole, strict=True)):
            thw = given[f"{kind}_grid_thw"][number]
            patches = int(thw.prod())
            own = pixels[first : first + patches]
            first += patches
            out.append(self._left(one, rows, thw, own, kind, spec,
                                  None if seconds is None else seconds[number]))  # fmt: skip
        return out

    def _left(
        self, asked: Asked, rows: Tensor, thw: Tensor, pixels: Tensor, kind: Any, spec: Any,
        seconds: Any,
    ) -> Tensor:  # fmt: skip
        pos = merged(thw.cpu(), self._merge)
        width = self.config.text_config.hidden_size if self.compared else None
        signals: dict[Signal, Any] = {Fingerprint(): Fingerprint().read(pixels)}
        left, index = shorten(
            asked, Encoded(rows, pos, width=width, signals=signals, kind=kind), spec
        )
        pos = pos[index.cpu()]
        if kind == "video":
            rate = getattr(self.config.vision_config, "tokens_per_second", 1.0)
            factor = (1.0 if seconds is None else float(seconds)) * rate
            pos = torch.cat([(pos[:, :1] * factor).long(), pos[:, 1:]], dim=1)
        return torch.cat([left, to_digits(pos).to(left)], dim=1)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Take the places off the features, for the forward that follows."""
        self._places = None
        found = multimodal_embeddings
        if found is not None and len(found) and is_multimodal is not None:
            width = self._width
            if any(x.shape[-1] > width for x in found):
                places = [from_digits(x[:, width:]) if x.shape[-1] > width
                          else torch.zeros(len(x), 3, dtype=torch.long, device=x.device)
                          for x in found]  # fmt: skip
                self._places = (is_multimodal, torch.cat(places).T)
                found = [x[:, :width] for x in found]
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, found, is_multimodal=is_multimodal
        )

    @property
    def _width(self) -> int:
        """Features of a token as vLLM's own model gives it."""
        levels = len(getattr(self.visual, "deepstack_visual_indexes", ())) if self.compared else 0
        return int(self.config.text_config.hidden_size) * (1 + levels)

    def forward(
        self, input_ids: Any, positions: Tensor, intermediate_tensors: Any = None,
        inputs_embeds: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run the decoder, tokens of pruned pictures at their own places."""
        if self._places is not None:
            (mask, places), self._places = self._places, None
            at = mask.nonzero()[:, 0].to(positions.device)
            positions = positions.index_add(1, at, places.to(positions))
        return super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )


def _field_of(feature: Any) -> str:
    return f"{FIELD}_{feature.modality}"


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor,
    info=qwen2_vl.Qwen2VLProcessingInfo,
    dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder,
)
class Qwen2VL(_Qwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen25VL(_Qwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=qwen3_vl.Qwen3VLProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class Qwen3VL(_Qwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL; DeepStack features go the way of their tokens."""

    compared = True
