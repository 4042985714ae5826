# SPDX-License-Identifier: Apache-2.0
"""Tiny models of which some visual tokens are marks, or whose decoders are told what is visual."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.others import SAM, marked, tiles
from tests.families.tiny.parts import (
    IDS,
    IMAGE,
    MROPE,
    PAD,
    VEND,
    VIDEO,
    VSTART,
    WIDTH,
    Inputs,
    family,
    mm_types,
    noise,
    patches,
    qwen_vit,
    text,
    vit,
    wrapped,
)


def _ernie_types(made: Inputs) -> Inputs:
    """Marks around a picture go to the experts of pictures, too."""
    ids = made["input_ids"]
    return {**mm_types(made), "moe_mm_token_type_ids": ((ids >= IMAGE) & (ids <= VEND)).int()}


@family(
    "ernie4_5_vl_moe",
    patches(patch=(48,)),
    clip=patches("video", (48,)),
    prompt=wrapped,
    extra=_ernie_types,
)
def ernie4_5_vl_moe(layers: int) -> Any:
    experts = {
        "moe_intermediate_size": [16, 16],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
    }
    config = tf.Ernie4_5_VLMoeConfig(
        text_config=text(layers, **experts, rope_parameters={**MROPE, "mrope_section": [1, 1, 2]}),
        vision_config=qwen_vit(temporal_merge_size=2),
        image_start_token_id=VSTART,
        image_end_token_id=VEND,
        **IDS,
    )
    return tf.Ernie4_5_VLMoeForConditionalGeneration(config)


@family("hunyuan_vl", patches(patch=(48,)), extra=mm_types)
def hunyuan_vl(layers: int) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "out_hidden_size": WIDTH,
        "text_hidden_size": WIDTH,
        "patch_size": 4,
        "max_image_size": 64,
    }
    config = tf.HunYuanVLConfig(
        text_config=text(layers, rope_parameters=rope),
        vision_config=vision,
        image_token_id=IMAGE,
        im_start_id=VSTART,
        im_end_id=VEND,
        im_newline_id=94,
    )
    return tf.HunYuanVLForConditionalGeneration(config)


def _views(name: str) -> Inputs:
    """A picture, with a capital letter two local views of it besides."""
    local = {"pixel_values_local": noise(name, 2, 3, 64, 64)} if name.isupper() else {}
    return {
        "pixel_values": noise(name, 1, 3, 64, 64),
        "num_local_patches": torch.tensor([2 if name.isupper() else 0]),
        **local,
    }


@family("deepseek_ocr2", _views)
def deepseek_ocr2(layers: int) -> Any:
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
    }
    config = tf.DeepseekOcr2Config(
        text_config={**text(layers), **experts},
        vision_config={
            "sam_config": {**SAM, "image_size": 64, "downsample_channels": [24, 32]},
            "encoder_config": {**text(2), "hidden_size": 32},
        },
        image_token_id=IMAGE,
    )
    return tf.DeepseekOcr2ForConditionalGeneration(config)


def _real_tiles(name: str) -> Inputs:
    made = tiles(name)
    there = torch.ones(len(made["pixel_values"]), dtype=torch.bool)
    return {**made, "pixel_attention_mask": there}


@family("granite_docling", _real_tiles, prompt=marked, by_row=True)
def granite_docling(layers: int) -> Any:
    scales = {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.35,
        "residual_multiplier": 0.5,
    }
    config = tf.GraniteDoclingConfig(
        vision_config=vit(out_hidden_size=WIDTH, scale_factor=2, deepstack_visual_indexes=[0, 1]),
        image_token_id=IMAGE,
        pad_token_id=PAD,
        text_config=text(layers, **scales),
    )
    return tf.GraniteDoclingForConditionalGeneration(config)


def _pe_tiles(name: str) -> Inputs:
    """Pictures as rows of tiles: all pictures of a call have as many."""
    return {"pixel_values": noise(name, 1, 2, 3, 64, 64)}


@family(
    "perception_lm",
    _pe_tiles,
    clip=lambda name: {"pixel_values_videos": noise(name, 1, 3, 3, 64, 64)},
)
def perception_lm(layers: int) -> Any:
    vision = tf.TimmWrapperConfig(
        architecture="vit_pe_core_tiny_patch16_384",
        num_classes=0,
        do_pooling=True,
        model_args={
            "embed_dim": 24,
            "depth": 1,
            "num_heads": 2,
            "img_size": (64, 64),
            "patch_size": 8,
            "ref_feat_shape": (8, 8),
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
        },
    )
    vision.num_features = 24
    config = tf.PerceptionLMConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**text(layers)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
        vision_use_cls_token=True,
    )
    return tf.PerceptionLMForConditionalGeneration(config)


def _coded(name: str) -> Inputs:
    """A picture in cells of two pixels, padded to the size of the larger ones."""
    height, width = (12, 16) if name.isupper() else (8, 12)
    pixels = torch.zeros(1, 3, 12, 16)
    pixels[..., :height, :width] = noise(name, 1, 3, height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


NEWLINE = 60  # of Emu3


@family("emu3", _coded, prompt=wrapped)
def emu3(layers: int) -> Any:
    codes = {f"<|visual token {code:06}|>": 10 + code for code in range(40)}
    config = tf.Emu3Config(
        text_config=text(layers),
        vq_config={
            "codebook_size": 40,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [3],
        },
        vocabulary_map={**codes, "<image>": IMAGE, "<|extra_200|>": NEWLINE},
    )
    return tf.Emu3ForConditionalGeneration(config)
