# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose encoders take flat patches and grids: Qwen, its relatives, GLM, Kimi."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.parts import (
    IDS,
    IMAGE,
    MOE,
    MROPE,
    VEND,
    VIDEO,
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
    text,
    vit,
    wrapped,
)

CLIP = patches("video")
QWEN3_VIT = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
AUDIO = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "n_window": 4,
    "output_dim": WIDTH,
    "max_source_positions": 64,
}


@family("qwen3_vl", patches(), clip=CLIP, prompt=framed, extra=mm_types)
def qwen3_vl(layers: int) -> Any:
    config = tf.Qwen3VLConfig(
        text_config=text(layers, rope_parameters=MROPE), vision_config=qwen_vit(**QWEN3_VIT), **VIDS
    )
    return tf.Qwen3VLForConditionalGeneration(config)


@family("qwen3_vl_moe", patches(), clip=CLIP, prompt=framed, extra=mm_types)
def qwen3_vl_moe(layers: int) -> Any:
    config = tf.Qwen3VLMoeConfig(
        text_config=text(layers, rope_parameters=MROPE, **MOE),
        vision_config=qwen_vit(**QWEN3_VIT),
        **VIDS,
    )
    return tf.Qwen3VLMoeForConditionalGeneration(config)


@family("cosmos3_omni", patches(), clip=CLIP, prompt=framed, extra=mm_types)
def cosmos3_omni(layers: int) -> Any:
    config = tf.Cosmos3OmniConfig(
        text_config=text(layers, model_type="qwen3_vl_text", rope_parameters=MROPE),
        vision_config=qwen_vit(model_type="qwen3_vl_vision", **QWEN3_VIT),
        **VIDS,
    )
    return tf.Cosmos3OmniForConditionalGeneration(config)


@family(
    "qwen2_5_omni_thinker",
    patches(),
    clip=patches("video", video_second_per_grid=torch.tensor([1.0])),
    prompt=wrapped,
)
def qwen2_5_omni_thinker(layers: int) -> Any:
    config = tf.Qwen2_5OmniThinkerConfig(
        text_config=text(layers, rope_parameters=MROPE),
        vision_config=qwen_vit(window_size=16, fullatt_block_indexes=[1]),
        audio_config=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=94,
        vision_start_token_id=VSTART,
        vision_end_token_id=VEND,
    )
    return tf.Qwen2_5OmniThinkerForConditionalGeneration(config)


@family(
    "qwen3_omni_moe_thinker",
    patches(),
    clip=patches("video", video_second_per_grid=torch.tensor([1.0])),
    prompt=wrapped,
)
def qwen3_omni_moe_thinker(layers: int) -> Any:
    config = tf.Qwen3OmniMoeThinkerConfig(
        text_config=text(layers, rope_parameters=MROPE, **MOE),
        vision_config=qwen_vit(**QWEN3_VIT),
        audio_config={**AUDIO, "n_window_infer": 8, "downsample_hidden_size": 8},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=94,
        vision_start_token_id=VSTART,
        vision_end_token_id=VEND,
    )
    return tf.Qwen3OmniMoeThinkerForConditionalGeneration(config)


@family("hyperclovax_vision_v2", patches(), clip=CLIP)
def hyperclovax_vision_v2(layers: int) -> Any:
    config = tf.HyperCLOVAXVisionV2Config(
        text_config=tf.HyperCLOVAXConfig(**text(layers)),
        vision_config=qwen_vit(
            model_type="qwen2_5_vl_vision", window_size=16, fullatt_block_indexes=[1]
        ),
        **IDS,
    )
    return tf.HyperCLOVAXVisionV2ForConditionalGeneration(config)


@family(
    "video_llama_3",
    patches(patch=(48,), image_merge_sizes=torch.tensor([2])),
    clip=patches("video", (48,), video_merge_sizes=torch.tensor([2])),
)
def video_llama_3(layers: int) -> Any:
    config = tf.VideoLlama3Config(
        text_config=tf.Qwen2Config(**text(layers)),
        vision_config=vit(model_type="video_llama_3_vision"),
        **IDS,
    )
    return tf.VideoLlama3ForConditionalGeneration(config)


@family("paddleocr_vl", patches(patch=(3, 4, 4)), prompt=wrapped, extra=mm_types)
def paddleocr_vl(layers: int) -> Any:
    config = tf.PaddleOCRVLConfig(
        text_config=text(layers, rope_parameters=MROPE),
        vision_config=vit(spatial_merge_size=2),
        **VIDS,
    )
    return tf.PaddleOCRVLForConditionalGeneration(config)


@family(
    "cosmos3_edge",
    patches(patch=(48,)),
    clip=patches("video", (48,)),
    prompt=framed,
    extra=mm_types,
)
def cosmos3_edge(layers: int) -> Any:
    config = tf.Cosmos3EdgeConfig(
        text_config=text(layers, rope_parameters=MROPE),
        projector_hidden_size=32,
        vision_config=vit(num_patches=36, spatial_merge_size=2),
        **VIDS,
    )
    return tf.Cosmos3EdgeForConditionalGeneration(config)


def chunks(name: str) -> Inputs:
    """A clip of four frames, as two chunks."""
    grids = torch.tensor([[2, 4, 4], [2, 4, 4]])
    return {"pixel_values_videos": noise(name, 64, 3, 4, 4), "video_grid_thw": grids}


def timed(ids: list[int], clip: bool) -> list[int]:
    """Every chunk of a clip behind its time: here two words, and one that all of them share."""
    half = len(ids) // 2
    if not clip:
        return [VSTART, 9, 10, *ids, VEND]
    first = [5, 6, 7, VSTART, 8, 10, *ids[:half], VEND]
    return [*first, 5, 8, 7, VSTART, 8, 10, *ids[half:], VEND]


@family("kimi_k25", patches(patch=(3, 4, 4)), clip=chunks, prompt=timed)
def kimi_k25(layers: int) -> Any:
    mla = {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
    }
    config = tf.Kimi_K25Config(
        text_config=tf.DeepseekV3Config(**{**text(layers), **mla}),
        projection_hidden_size=24,
        vision_config={
            "patch_size": 4,
            "pos_emb_height": 16,
            "pos_emb_width": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
        },
        **VIDS,
    )
    return tf.Kimi_K25ForConditionalGeneration(config)


def _glm_types(made: Inputs) -> Inputs:
    """Clips are written with the placeholder of pictures, and told apart by their type."""
    ids = made["input_ids"]
    return {**mm_types(made), "input_ids": ids.masked_fill(ids == VIDEO, IMAGE)}


GLM = {"clip": CLIP, "prompt": framed, "extra": _glm_types, "mixes": False}
GLM_IDS = {
    **IDS,
    "image_start_token_id": VSTART,
    "image_end_token_id": VEND,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}
GLM_VIT = {"image_size": 24}
GLM_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 1, 0],
    "partial_rotary_factor": 0.5,
}


@family("glm4v", patches(), **GLM)
def glm4v(layers: int) -> Any:
    config = tf.Glm4vConfig(
        text_config=text(layers, rope_parameters=GLM_ROPE),
        vision_config=qwen_vit(**GLM_VIT),
        **GLM_IDS,
    )
    return tf.Glm4vForConditionalGeneration(config)


@family("glm46v", patches(), **GLM)
def glm46v(layers: int) -> Any:
    config = tf.Glm46VConfig(
        text_config=text(layers, rope_parameters=GLM_ROPE, model_type="glm4v_text"),
        vision_config=qwen_vit(**GLM_VIT, model_type="glm4v_vision"),
        **GLM_IDS,
    )
    return tf.Glm46VForConditionalGeneration(config)


@family("glmga", patches(), **GLM)
def glmga(layers: int) -> Any:
    config = tf.GlmgaConfig(
        text_config=text(layers, rope_parameters=GLM_ROPE, model_type="glm4v_text"),
        vision_config=qwen_vit(**GLM_VIT, model_type="glm4v_vision"),
        **GLM_IDS,
    )
    return tf.Glm46VForConditionalGeneration(config)


@family("glm4v_moe", patches(), **GLM)
def glm4v_moe(layers: int) -> Any:
    moe = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = tf.Glm4vMoeConfig(
        text_config=text(layers, rope_parameters=GLM_ROPE, **moe),
        vision_config=qwen_vit(**GLM_VIT),
        **GLM_IDS,
    )
    return tf.Glm4vMoeForConditionalGeneration(config)


@family("glm_ocr", patches(), **GLM)
def glm_ocr(layers: int) -> Any:
    config = tf.GlmOcrConfig(
        text_config=text(layers, rope_parameters=MROPE),
        vision_config=qwen_vit(**GLM_VIT),
        **GLM_IDS,
    )
    return tf.GlmOcrForConditionalGeneration(config)
