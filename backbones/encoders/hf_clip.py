# SPDX-License-Identifier: Apache-2.0
"""CLIP's and SigLIP's image encoders in transformers, alone and inside vision-language models."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import (
    EncoderAdapter,
    Layer,
    Reduction,
    ShownQK,
    no_mask,
)
from visprune.backbones.hf.probe import Attended, Wanted, watch
from visprune.errors import UnsupportedModel

_LAYERS = ("CLIPEncoderLayer", "SiglipEncoderLayer")


class HfClip(EncoderAdapter):
    """Adapter of ``CLIPVisionModel``, ``SiglipVisionModel`` and the towers made of their layers.

    ``hidden_states`` and ``last_hidden_state`` come out short.
    """

    family = "transformers.CLIPVisionModel"

    def __init__(self, model: Any) -> None:
        self.model, parts = model, dict(model.named_modules())
        layers: Any = next((m for n, m in parts.items() if n.endswith("encoder.layers")), None)
        embed = next((m for n, m in parts.items() if n.endswith("embeddings")), None)
        if layers is None or embed is None or type(layers[0]).__name__ not in _LAYERS:
            raise UnsupportedModel(
                f"{type(model).__name__} is not made of the layers of CLIP's or SigLIP's encoder; "
                f"whether tokens can leave inside it is not known."
            )
        self.embed, self.config = embed, model.config
        self.has_cls = hasattr(embed, "class_embedding")
        self.prefix = int(self.has_cls)
        self.width = int(self.config.hidden_size)
        self.layers = [self._layer(block) for block in layers]

    def _layer(self, block: Any) -> Layer:
        before, width = matrix_weights(block.self_attn), self.width
        return Layer(
            block=block,
            attention=block.self_attn,
            entry=block.layer_norm1,
            branch=block.self_attn,
            attention_weights=before,
            mlp_weights=matrix_weights(block) - before,
            attention_width=width,
            head_width=width // int(self.config.num_attention_heads),
        )

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patches along height and width."""
        step = self.config.patch_size
        return pixels.shape[-2] // step, pixels.shape[-1] // step

    def default_grid(self) -> tuple[int, int]:
        """Patches along height and width of the model's own input size."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    def fixed_macs(self, grid: tuple[int, int], last: int) -> int:
        """Embedding, and what follows the encoder in the model itself."""
        embed: Any = self.embed
        total = grid[0] * grid[1] * embed.patch_embedding.weight.numel()
        projection = getattr(self.model, "visual_projection", None)
        if projection is not None:
            total += matrix_weights(projection)
        if self._pooler() is not None:
            total += 2 * self.width * (last * self.width + last) + 2 * self.width * self.width
            total += matrix_weights(self._pooler().mlp)
        return int(total)

    def _pooler(self) -> Any:
        return next((m for n, m in self.model.named_modules() if n.endswith("head")), None)

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The bias is an additive mask ``[B, 1, 1, T]``.

        Raises:
            UnsupportedModel: a mask is given, or FlashAttention would ignore it.
        """
        given = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        no_mask(given, kwargs.get("is_causal"))
        if bias is None:
            return args, kwargs
        if str(self.config._attn_implementation).startswith("flash"):
            raise UnsupportedModel(
                "FlashAttention takes no bias per key, which merged tokens need in the encoder. "
                "Load the model with attn_implementation='sdpa', or pass prop_attn=False."
            )
        mask = bias[:, None, None].to(args[0].dtype)
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def watch(self, number: int, record: ShownQK) -> list[Any]:
        """By the probe of transformers' attention functions."""
        return [watch(self.layers[number].attention, functools.partial(_wanted, record))]

    def overrides(self, reduction: Reduction) -> list[Any]:
        """SigLIP's pooling weighs tokens by their size."""
        pooler = self._pooler()
        if pooler is None or not isinstance(getattr(pooler, "attention", None), nn.Module):
            return []
        hook = functools.partial(_add_pool_bias, reduction)
        return [pooler.attention.register_forward_pre_hook(hook, with_kwargs=True)]


def _wanted(record: ShownQK) -> Wanted:
    return Wanted(functools.partial(_hand_on, record))


def _hand_on(record: ShownQK, attended: Attended) -> None:
    record(attended.query, attended.key, attended.scale)


def _add_pool_bias(
    reduction: Reduction, module: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    size = reduction.sizes(args[1].shape[1])
    if size is None:
        return None
    return args, {**kwargs, "key_padding_mask": size.log().to(args[1].dtype)}
