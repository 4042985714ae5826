# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 and LLaVA-NeXT in vLLM. Position ids close up, as the tokens of a line do there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.models import llava, llava_next
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems

from visprune.core.signals import EncoderSignal, Fingerprint
from visprune.core.signals.base import EncoderSeen
from visprune.serving.asked import Asked
from visprune.serving.places import shown_layers, spec_of, square, tiled
from visprune.serving.shorten import Encoded, shorten
from visprune.serving.vllm.processor import (
    Prunes,
    Refuses,
    check_graphs,
    encoded_together,
    parts,
    taken,
)

# Names of CLIP's and SigLIP's weights as transformers has them since 5: one level less than here.
NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(
            r"^(model\.)?vision_tower\.(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
        ): "vision_tower.vision_model."
    }
)


class LlavaProcessor(Prunes, llava.LlavaMultiModalProcessor):
    """One grid a picture."""

    @property
    def shows(self) -> frozenset[str]:
        """Layers of CLIP."""
        return shown_layers(self.info.get_hf_config())

    def places(self, kind: str, number: int, items: Any, out: Any) -> tuple[Tensor, int]:
        """The grid of the encoder."""
        pos, free = square(self.info.get_hf_config())
        return pos, len(free) - len(pos)


class PixtralProcessor(Refuses, llava.PixtralHFMultiModalProcessor):
    """Pixtral, which LLaVA's class serves too."""

    reason = "its pictures have tokens between their rows"


class LlavaNextProcessor(Prunes, llava_next.LlavaNextMultiModalProcessor):
    """A thumbnail and crops, newlines kept."""

    @property
    def shows(self) -> frozenset[str]:
        """Layers of CLIP."""
        return shown_layers(self.info.get_hf_config())

    def places(self, kind: str, number: int, items: Any, out: Any) -> tuple[Tensor, int]:
        """Those of the picture's own size."""
        size = items.get_items("image", ImageProcessorItems).get_image_size(number)
        pos, free = _tiled(self.info.get_hf_config(), (size.height, size.width))
        return pos, len(free) - len(pos)


def _processor(info: Any, dummy_inputs: Any, **more: Any) -> Any:
    pixtral = isinstance(info, llava.PixtralHFProcessingInfo)
    return (PixtralProcessor if pixtral else LlavaProcessor)(info, dummy_inputs, **more)


def _tiled(config: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return tiled(config, size, get_anyres_image_grid_shape, unpad_image)


class _LastLayer(nn.Module):
    """Queries and keys of CLIP's last layer, where the model reads the one before it.

    vLLM neither holds nor runs that layer. Every worker has all of its heads.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.prefix = f"layers.{config.num_hidden_layers - 1}."
        self.loaded: set[str] = set()

    def take(self, name: str, weight: Tensor) -> bool:
        """Take a weight of a checkpoint, if it is one of these."""
        own = name.partition(self.prefix)[2].removeprefix("self_attn.")
        if "vision_tower" not in name or own not in dict(self.named_parameters()):
            return False
        self.get_parameter(own).data.copy_(weight)
        self.loaded.add(own)
        return True

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """Queries and keys of all heads, side by side, of the states that enter the layer."""
        x = self.layer_norm1(hidden)
        return [self.q_proj(x), self.k_proj(x)]


class _Reads:
    """Mix-in of vLLM's models: class-token attention and keys of CLIP, where a method asks."""

    config: Any
    vision_tower: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_graphs(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.together = encoded_together(vllm_config)
        own = "last" in shown_layers(self.config) and _feature(self.config) != "last"
        self.visprune_last = _LastLayer(self.config.vision_config) if own else None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load what vLLM's own model has, and the layer that it leaves out."""
        last = self.visprune_last
        rest = (x for x in weights if last is None or not last.take(*x))
        loaded: set[str] = super().load_weights(rest)  # type: ignore[misc]
        if last is not None:
            missing = dict(last.named_parameters()).keys() - last.loaded
            if missing:
                raise ValueError(
                    f"The checkpoint lacks {sorted(missing)} of the image encoder's last layer, "
                    f"which methods that start from the class token read."
                )
            loaded |= {f"visprune_last.{name}" for name in last.loaded}
        return loaded

    @contextmanager
    def reading(self, asked: list[Asked], spec: Any) -> Iterator[dict[Any, Tensor]]:
        """Yields what was read by the end of the encoder's call: ``[P, ...]`` by signal."""
        found: dict[Any, Tensor] = {}
        shown = shown_layers(self.config)
        signals = (s for one in asked for x in one.method.schedule(spec) for s in x.signals)
        wanted = {s for s in signals if isinstance(s, EncoderSignal) and s.layer in shown}
        hooks: list[Any] = []
        if wanted:
            layer = self.vision_tower.vision_model.encoder.layers[-1]
            last = {s for s in wanted if s.layer == "last"} if self.visprune_last else set()
            output = {s for s in wanted if s.uses == "output"}
            hear = partial(_heard, layer.self_attn, wanted - last - output, found)
            hooks.append(layer.self_attn.qkv_proj.register_forward_hook(hear))
            hear = partial(_left_layer, layer.self_attn, last, output, found, self.visprune_last)
            hooks.append(layer.register_forward_hook(hear))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def _feature(config: Any) -> str:
    """The layer whose output the model reads, as signals name it."""
    layer, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return "last" if layer in (-1, count) else "feature"


def _heard(
    attention: Any, wanted: set[Any], found: dict[Any, Tensor], module: Any, args: Any, output: Any
) -> None:
    both = [_heads(x, attention) for x in output[0].chunk(3, dim=-1)[:2]]
    if attention.tp_size > 1 and get_tensor_model_parallel_world_size() > 1:
        # Every worker chooses by all heads, so that all of them choose the same.
        both = [tensor_model_parallel_all_gather(x.contiguous(), dim=1) for x in both]
    _read(both, attention, wanted, found)


def _left_layer(
    attention: Any, last: set[Any], output: set[Any], found: dict[Any, Tensor],
    behind: _LastLayer | None, module: Any, args: Any, out: Any,
) -> None:  # fmt: skip
    hidden = out[0] if isinstance(out, tuple) else out
    if output:
        seen = EncoderSeen(1, True, hidden=hidden)
        found.update({signal: signal.read(seen) for signal in output})
    if last and behind is not None:
        _read([_heads(x, attention) for x in behind(hidden)], attention, last, found)


def _heads(x: Tensor, attention: Any) -> Tensor:
    return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _read(both: list[Tensor], attention: Any, wanted: set[Any], found: dict[Any, Tensor]) -> None:
    seen = EncoderSeen(1, True, query=both[0], key=both[1], scale=attention.scale)
    found.update({signal: signal.read(seen) for signal in wanted})


@MULTIMODAL_REGISTRY.register_processor(
    _processor,
    info=llava._build_llava_or_pixtral_hf_info,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class Llava(_Reads, llava.LlavaForConditionalGeneration):
    """vLLM's LLaVA; pictures that were asked to be are shortened once encoded."""

    hf_to_vllm_mapper = NAMES | llava.LlavaForConditionalGeneration.hf_to_vllm_mapper

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode pictures, and prune them."""
        asked = taken(kwargs, "image")
        if asked is None:
            return super().embed_multimodal(**kwargs)
        sizes = [len(square(self.config)[1])] * len(asked)
        return [one for own, part in parts(kwargs, sizes, self.together)
                for one in self._pruned(asked[own], part)]  # fmt: skip

    def _pruned(self, asked: list[Asked], kwargs: dict[str, Any]) -> list[Tensor]:
        spec, pixels = spec_of(self.config), kwargs["pixel_values"]
        with self.reading(asked, spec) as heard:
            whole = super().embed_multimodal(**kwargs)
        pos, free = square(self.config)
        return [
            _left(one, rows, pos, free, spec, pixels[number],
                  {signal: value[number : number + 1] for signal, value in heard.items()},
                  torch.arange(len(pos)))
            for number, (one, rows) in enumerate(zip(asked, whole, strict=True))
        ]  # fmt: skip


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class LlavaNext(_Reads, llava_next.LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT; newlines stay and do not count."""

    hf_to_vllm_mapper = NAMES | llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode pictures, and prune them."""
        asked = taken(kwargs, "image")
        if asked is None:
            return super().embed_multimodal(**kwargs)
        sizes = [len(_tiled(self.config, (int(h), int(w)))[1]) for h, w in kwargs["image_sizes"]]
        return [one for own, part in parts(kwargs, sizes, self.together)
                for one in self._pruned(asked[own], part)]  # fmt: skip

    def _pruned(self, asked: list[Asked], kwargs: dict[str, Any]) -> list[Tensor]:
        spec, pixels, sizes = spec_of(self.config), kwargs["pixel_values"], kwargs["image_sizes"]
        with self.reading(asked, spec) as heard:
            whole = super().embed_multimodal(**kwargs)
        left, first = [], 0
        for one, rows, own, size in zip(asked, whole, pixels, sizes, strict=True):
            shape = (int(size[0]), int(size[1]))
            pos, free = _tiled(self.config, shape)
            crops = {signal: value[first : first + len(own)] for signal, value in heard.items()}
            first += len(own)
            source = _sources(self.config, shape)
            left.append(_left(one, rows, pos, free, spec, own, crops, source))
        return left


def _sources(config: Any, size: tuple[int, int]) -> Tensor:
    """Of the free tokens of a tiled picture, the patch among those of all its crops, ``[N]``."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    index = torch.arange((1 + rows * columns) * side * side, dtype=torch.float64)
    base, crops = index[: side * side], index[side * side :]
    crops = crops.view(rows, columns, side, side).transpose(1, 2).reshape(1, rows * side, -1)
    return torch.cat([base, unpad_image(crops, size).flatten()]).long()


def _left(
    asked: Asked, rows: Tensor, pos: Tensor, free: Tensor, spec: Any, pixels: Tensor,
    heard: dict[Any, Tensor], source: Tensor,
) -> Tensor:  # fmt: skip
    """What is left of one picture."""
    signals: dict[Any, Any] = {
        signal: value.movedim(signal.token_dim, 1).flatten(0, 1)[source.to(value.device)]
        for signal, value in heard.items()
    }
    signals[Fingerprint()] = Fingerprint().read(pixels)
    picture = Encoded(rows, pos, free, signals=signals)
    return shorten(asked, picture, spec)[0]
