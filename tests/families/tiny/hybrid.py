# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose decoders have recurrent layers: linear attention, convolutions, Mamba."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.parts import (
    IDS,
    IMAGE,
    MOE,
    VEND,
    VIDEO,
    VIDS,
    VSTART,
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

LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}
STATES: dict[str, Any] = {"recurrent": True, "scale": 4.0}
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 1, 0],
    "partial_rotary_factor": 0.5,
    "mrope_interleaved": True,
}


def hybrid(layers: int, recurrent: str = "linear_attention") -> list[str]:
    """The first and the last layer attend to nothing; those that methods look at do."""
    return [recurrent if n in (0, layers - 1) else "full_attention" for n in range(layers)]


@family("qwen3_5", patches(), clip=patches("video"), prompt=framed, extra=mm_types, **STATES)
def qwen3_5(layers: int) -> Any:
    config = tf.Qwen3_5Config(
        text_config=text(layers, layer_types=hybrid(layers), rope_parameters=ROPE, **LINEAR),
        vision_config=qwen_vit(num_position_embeddings=64),
        **VIDS,
    )
    return tf.Qwen3_5ForConditionalGeneration(config)


@family("qwen3_5_moe", patches(), clip=patches("video"), prompt=framed, extra=mm_types, **STATES)
def qwen3_5_moe(layers: int) -> Any:
    config = tf.Qwen3_5MoeConfig(
        text_config=text(
            layers,
            layer_types=hybrid(layers),
            rope_parameters=ROPE,
            shared_expert_intermediate_size=16,
            **MOE,
            **LINEAR,
        ),
        vision_config=qwen_vit(num_position_embeddings=64),
        **VIDS,
    )
    return tf.Qwen3_5MoeForConditionalGeneration(config)


def naflex(name: str) -> Inputs:
    """Patches of pictures of their own size, padded to one length; larger for capitals."""
    down, across = (4, 8) if name.isupper() else (4, 6)
    pixels, there = torch.zeros(1, 32, 48), torch.zeros(1, 32, dtype=torch.long)
    pixels[:, : down * across] = noise(name, 1, down * across, 48)
    there[:, : down * across] = 1
    return {
        "pixel_values": pixels,
        "spatial_shapes": torch.tensor([[down, across]]),
        "pixel_attention_mask": there,
    }


@family("lfm2_vl", naflex, prompt=wrapped, **STATES)
def lfm2_vl(layers: int) -> Any:
    config = tf.Lfm2VlConfig(
        text_config=tf.Lfm2Config(**text(layers, layer_types=hybrid(layers, "conv"))),
        image_token_id=IMAGE,
        projector_hidden_size=32,
        downsample_factor=2,
        vision_config=tf.Siglip2VisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=4,
            num_patches=64,
            vision_use_head=False,
        ),
    )
    return tf.Lfm2VlForConditionalGeneration(config)


@family("lfm3_vl", patches(), clip=patches("video"), prompt=wrapped, **STATES)
def lfm3_vl(layers: int) -> Any:
    kinds = ["conv", "full_attention", "sliding_attention", "conv"]
    config = tf.Lfm3VlConfig(
        text_config=tf.Lfm3Config(**text(layers, layer_types=kinds[:layers], sliding_window=12)),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "patch_size": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        projector_hidden_size=32,
        **VIDS,
    )
    return tf.Lfm3VlForConditionalGeneration(config)


SLICE, SLICE_END, NEWLINE = 94, 95, 96


def packed(name: str) -> Inputs:
    """A picture and two slices of it, as patches in one line; slices of a capital are larger."""
    sizes = [(8, 8), *[(8, 16) if name.isupper() else (8, 8)] * 2]
    count = sum(down * across for down, across in sizes)
    return {
        "pixel_values": noise(name, 1, 3, 4, 4 * count),
        "target_sizes": torch.tensor(sizes, dtype=torch.int32),
    }


def packed_clip(name: str) -> Inputs:
    """Two frames."""
    return {
        "pixel_values_videos": noise(name, 1, 3, 4, 4 * 128),
        "target_sizes_videos": torch.tensor([(8, 8)] * 2, dtype=torch.int32),
    }


def sliced(ids: list[int], clip: bool) -> list[int]:
    """The picture between its marks, slices between theirs with an end of line; frames in a row."""
    if clip:
        half = len(ids) // 2
        return [VSTART, *ids[:half], VEND, VSTART, *ids[half:], VEND]
    each = (len(ids) - 4) // 2
    first, second = ids[4 : 4 + each], ids[4 + each :]
    return [
        *(VSTART, *ids[:4], VEND),
        *(SLICE, *first, SLICE_END, NEWLINE),
        *(SLICE, *second, SLICE_END),
    ]


MINICPM: dict[str, Any] = {
    "clip": packed_clip,
    "prompt": sliced,
    "packed": {"pixel_values": 3, "pixel_values_videos": 3},
    **STATES,
}


def _minicpm(layers: int, config: Any, model: Any, **over: Any) -> Any:
    made = config(
        text_config=tf.Qwen3_5TextConfig(
            **text(layers, layer_types=hybrid(layers), rope_parameters=ROPE, **LINEAR)
        ),
        vision_config=vit(image_size=64, insert_layer_id=1),
        insert_layer_id=1,
        downsample_mode="16x",
        **IDS,
        **over,
    )
    return model(made)


@family("minicpmv4_6", packed, **MINICPM)
def minicpmv4_6(layers: int) -> Any:
    return _minicpm(layers, tf.MiniCPMV4_6Config, tf.MiniCPMV4_6ForConditionalGeneration)


@family("minicpm_ocr", packed, **MINICPM)
def minicpm_ocr(layers: int) -> Any:
    return _minicpm(layers, tf.MiniCPMOcrConfig, tf.MiniCPMOcrForConditionalGeneration)


@family("minicpmv4_7", packed, extra=mm_types, **MINICPM)
def minicpmv4_7(layers: int) -> Any:
    return _minicpm(
        layers,
        tf.MiniCPMV4_7Config,
        tf.MiniCPMV4_7ForConditionalGeneration,
        image_start_id=VSTART,
        image_end_id=VEND,
        slice_start_id=SLICE,
        slice_end_id=SLICE_END,
        newline_id=NEWLINE,
    )


def flat(name: str) -> Inputs:
    """Flat patches of a picture with their rows and columns; more of a capital letter."""
    down, across = (4, 8) if name.isupper() else (4, 6)
    return {
        "pixel_values": noise(name, down * across, 48),
        "image_grid_hw": torch.tensor([[down, across]]),
    }


def tubelets(name: str) -> Inputs:
    """Two times two frames, stacked."""
    return {"pixel_values_videos": noise(name, 1, 2, 6, 16, 16)}


ONE_ID: dict[str, Any] = {"video_id": IMAGE, "mixes": False}


@family(
    "nemotron_h_omni", flat, clip=tubelets, prompt=wrapped, layers=6,
    params={"todre": {"depth": 0.5}}, **ONE_ID, **STATES,
)  # fmt: skip
def nemotron_h_omni(layers: int) -> Any:
    mixers = {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "conv_kernel": 4,
        "chunk_size": 16,
        "use_mamba_kernels": False,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "layers_block_type": ["mamba", "attention", "attention", "moe", "mamba", "mlp"],
    }
    base = {name: value for name, value in text(layers).items() if name != "num_hidden_layers"}
    config = tf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=tf.NemotronHConfig(**base, **mixers),
        vision_config=tf.RadioConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=4,
            image_size=24,
            max_img_size=64,
            num_registers=1,
            num_cls_tokens=2,
            video_temporal_patch_size=2,
        ),
        audio_config=None,
        vision_hidden_size=16,
        projector_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=97,
    )
    return tf.NemotronH_Omni_Reasoning_V3(config)
