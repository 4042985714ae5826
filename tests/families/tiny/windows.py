# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose decoders have sliding-window layers; pictures are longer than the window."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.others import tiles
from tests.families.tiny.parts import (
    IDS,
    IMAGE,
    MROPE,
    VEND,
    VIDS,
    VSTART,
    WIDTH,
    Inputs,
    family,
    framed,
    mm_types,
    noise,
    patches,
    qwen_vit,
    sliding,
    square,
    text,
    vit,
    wrapped,
)
from tests.families.tiny.qwen import QWEN3_VIT


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


@family("cohere_compass", patches(), clip=patches("video"), prompt=framed, extra=mm_types)
def cohere_compass(layers: int) -> Any:
    rope = dict.fromkeys(("full_attention", "sliding_attention"), MROPE)
    config = tf.CohereCompassConfig(
        text_config=text(layers, rope_parameters=rope, **sliding(layers)),
        vision_config=qwen_vit(**QWEN3_VIT),
        **VIDS,
    )
    return tf.CohereCompassForConditionalGeneration(config)


MUSE_VIT = {
    "patch_size": 4,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@family("muse_glimmer", patches(), clip=patches("video"), prompt=wrapped)
def muse_glimmer(layers: int) -> Any:
    config = tf.MuseGlimmerConfig(
        text_config=text(layers, sliding_window=12),
        vision_config=MUSE_VIT,
        out_hidden_size=64,
        projector_hidden_size=32,
        **IDS,
    )
    return tf.MuseGlimmerForConditionalGeneration(config)


@family("muse_spark", patches(), clip=patches("video"), prompt=wrapped)
def muse_spark(layers: int) -> Any:
    config = tf.MuseSparkConfig(
        text_config=text(
            layers,
            sliding_window=12,
            num_local_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            moe_hidden_size=16,
        ),
        vision_config=MUSE_VIT,
        out_hidden_size=64,
        projector_hidden_size=32,
        audio_config={
            "hidden_sizes": [8, 8],
            "depths": [1, 1],
            "patch_sizes": [4, 2],
            "num_hidden_layers": 2,
            "out_hidden_size": WIDTH,
        },
        audio_token_id=94,
        **IDS,
    )
    return tf.MuseSparkForConditionalGeneration(config)


def views(name: str) -> Inputs:
    """A whole picture; of one with a capital letter two local views before it."""
    local = {"pixel_values_local": noise(name, 2, 3, 64, 64)} if name.isupper() else {}
    return {
        "pixel_values": noise(chr(ord(name) + 1), 1, 3, 64, 64),
        "num_local_patches": torch.tensor([2 if name.isupper() else 0]),
        **local,
    }


@family("step3p7", views, prompt=wrapped)
def step3p7(layers: int) -> Any:
    config = tf.Step3p7Config(
        vision_config=vit(image_size=64, max_position_embeddings=256, mlp_ratio=2.0),
        image_token_id=IMAGE,
        text_config=text(
            layers,
            num_local_experts=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            share_expert_dim=16,
            num_sliding_attention_heads=4,
            **sliding(layers),
        ),
    )
    return tf.Step3p7ForConditionalGeneration(config)
