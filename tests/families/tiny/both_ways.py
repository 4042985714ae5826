# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose prompts, or pictures, are seen both ways on all layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.parts import (
    IMAGE,
    VEND,
    VSTART,
    WIDTH,
    Inputs,
    family,
    noise,
    square,
    text,
    vit,
    wrapped,
)


def _prefix(made: Inputs) -> Inputs:
    """0: the prompt, seen both ways; what follows has 1."""
    return {"token_type_ids": torch.zeros_like(made["input_ids"])}


def _paligemma(layers: int, decoder: Any) -> Any:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**vit(projection_dim=WIDTH, vision_use_head=False)),
        text_config=decoder,
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


@family("paligemma", square(1, 3, 24, 24), extra=_prefix)
def paligemma(layers: int) -> Any:
    return _paligemma(layers, tf.GemmaConfig(**text(layers)))


@family("paligemma2", square(1, 3, 24, 24), extra=_prefix, only_eager=True)
def paligemma2(layers: int) -> Any:
    decoder = tf.Gemma2Config(**text(layers, sliding_window=12, query_pre_attn_scalar=8))
    return _paligemma(layers, decoder)


def _image_types(made: Inputs) -> Inputs:
    """Types, and which patches of the whole batch are pooled."""
    types = {"mm_token_type_ids": (made["input_ids"] == IMAGE).long()}
    if "pixel_values" not in made:
        return types
    return {**types, "image_token_pooling": _pools(len(made["pixel_values"]))}


def _pools(crops: int) -> torch.Tensor:
    """Four patches of each token, counted over all crops."""
    cell = torch.arange(36).view(3, 2, 3, 2).permute(0, 2, 1, 3).reshape(9, 4)
    return torch.cat([cell + 36 * crop for crop in range(crops)])


def _pooled(name: str) -> Inputs:
    """Patches of a whole picture, and of one crop besides with a capital letter."""
    crops = 2 if name.isupper() else 1
    return {
        "pixel_values": noise(name, crops, 36, 48),
        "image_token_pooling": _pools(crops),
        "image_grids": torch.tensor([[3, 3, *((3, 3) if crops == 2 else (0, 0))]]),
    }


@family("molmo2", _pooled, prompt=wrapped, extra=_image_types)
def molmo2(layers: int) -> Any:
    return _molmo2(layers)


@family("molmo2_scaled", _pooled, prompt=wrapped, extra=_image_types)
def molmo2_scaled(layers: int) -> Any:
    """Some layers have another rotary embedding."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    return _molmo2(layers, rope_scaling_layers=[0, 2], rope_parameters=rope)


def _molmo2(layers: int, **over: Any) -> Any:
    config = tf.Molmo2Config(
        text_config=tf.Molmo2TextConfig(**text(layers, additional_vocab_size=16, **over)),
        vision_config=tf.Molmo2VisionConfig(
            **vit(image_size=[24, 24], num_key_value_heads=2, head_dim=12)
        ),
        adapter_config=tf.Molmo2AdapterConfig(
            vision_feature_layer=[-1, -2],
            hidden_size=24,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=32,
            text_hidden_size=WIDTH,
        ),
        image_patch_id=IMAGE,
        image_start_token_id=VSTART,
        low_res_image_start_token_id=94,
        image_end_token_id=VEND,
        frame_start_token_id=95,
        frame_end_token_id=96,
    )
    return tf.Molmo2ForConditionalGeneration(config)
