# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose decoders have sliding-window layers; pictures are longer than the window."""

from __future__ import annotations

from typing import Any

import transformers as tf

from tests.families.tiny.others import tiles
from tests.families.tiny.parts import (
    IDS,
    IMAGE,
    VEND,
    VSTART,
    Inputs,
    family,
    patches,
    qwen_vit,
    sliding,
    square,
    text,
    vit,
    wrapped,
)


def token_types(made: Inputs) -> Inputs:
    """``token_type_ids``: 1 image."""
    return {"token_type_ids": (made["input_ids"] == IMAGE).long()}


@family("gemma3", square(1, 3, 24, 24), prompt=wrapped, extra=token_types)
def gemma3(layers: int) -> Any:
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**text(layers, **sliding(layers), query_pre_attn_scalar=8)),
        vision_config=tf.SiglipVisionConfig(**vit(vision_use_head=False)),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=VSTART,
        eoi_token_index=VEND,
    )
    return tf.Gemma3ForConditionalGeneration(config)


@family("exaone4_5", patches())
def exaone4_5(layers: int) -> Any:
    config = tf.Exaone4_5_Config(
        text_config=tf.Exaone4Config(**text(layers, **sliding(layers))),
        vision_config=qwen_vit(window_size=16, fullatt_block_indexes=[1], num_key_value_heads=1),
        **IDS,
    )
    return tf.Exaone4_5_ForConditionalGeneration(config)


def _apart(ids: list[int], clip: bool) -> list[int]:
    """Start, tiles with a mark before each, end."""
    each = [ids[n : n + 9] for n in range(0, len(ids), 9)]
    out = [VSTART]
    for number, tile in enumerate(each):
        out += [94 + number, *tile]
    return [*out, VEND]


@family("aya_vision", tiles, prompt=_apart)
def aya_vision(layers: int) -> Any:
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**vit()),
        image_token_index=IMAGE,
        downsample_factor=2,
        text_config=tf.Cohere2Config(**text(layers, **sliding(layers))),
    )
    return tf.AyaVisionForConditionalGeneration(config)


@family("cohere2_vision", tiles, prompt=_apart)
def cohere2_vision(layers: int) -> Any:
    config = tf.Cohere2VisionConfig(
        vision_config=tf.SiglipVisionConfig(**vit()),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
        text_config=tf.Cohere2Config(**text(layers, **sliding(layers))),
    )
    return tf.Cohere2VisionForConditionalGeneration(config)


@family("idefics2_sliding", square(1, 3, 24, 24), prompt=wrapped, by_row=True)
def idefics2_sliding(layers: int) -> Any:
    """All layers see a window, as in Mistral's default config."""
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 16,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    config = tf.Idefics2Config(
        vision_config=vit(),
        perceiver_config=perceiver,
        image_token_id=IMAGE,
        text_config=tf.MistralConfig(**text(layers), sliding_window=12),
    )
    return tf.Idefics2ForConditionalGeneration(config)
