# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose encoders take pictures as pixels: InternVL, Mistral 3, DeepSeek-VL, Aria."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.parts import (
    IMAGE,
    VOCAB,
    VSTART,
    WIDTH,
    Inputs,
    family,
    noise,
    sized,
    square,
    text,
    vit,
    wrapped,
)


def tiles(name: str) -> Inputs:
    """Two tiles of a picture, three of one with a capital letter."""
    return {"pixel_values": noise(name, 3 if name.isupper() else 2, 3, 24, 24)}


def _internvl(layers: int, config: Any, model: Any, text_config: Any) -> Any:
    made = config(
        vision_config=vit(image_size=[24, 24], patch_size=[4, 4]),
        text_config=text_config(**text(layers)),
        image_token_id=IMAGE,
        image_seq_length=9,
    )
    return model(made)


@family("internvl", tiles, prompt=wrapped)
def internvl(layers: int) -> Any:
    return _internvl(layers, tf.InternVLConfig, tf.InternVLForConditionalGeneration, tf.Qwen2Config)


@family("qianfan_ocr", tiles, prompt=wrapped)
def qianfan_ocr(layers: int) -> Any:
    return _internvl(
        layers, tf.QianfanOCRConfig, tf.QianfanOCRForConditionalGeneration, tf.Qwen3Config
    )


def _crops(ids: list[int], clip: bool) -> list[int]:
    """Ovis 2: start, thumbnail, grid, crops with a mark between two of them, end."""
    each = [ids[n : n + 9] for n in range(0, len(ids), 9)]
    out = [VSTART, *each[0], 94]
    for number, crop in enumerate(each[1:]):
        out += [*([95] if number else []), *crop]
    return [*out, 98]


@family("ovis2", tiles, prompt=_crops)
def ovis2(layers: int) -> Any:
    config = tf.Ovis2Config(
        vision_config=vit(vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5),
        text_config=tf.Qwen2Config(**text(layers)),
        image_token_id=IMAGE,
        hidden_size=WIDTH,
        vocab_size=VOCAB,
        visual_indicator_token_ids=[94, 95, 96, 97, 98],
    )
    return tf.Ovis2ForConditionalGeneration(config)


@family("mistral3", sized)
def mistral3(layers: int) -> Any:
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**vit(hidden_size=32)),
        text_config=tf.MistralConfig(**text(layers), sliding_window=None),
        image_token_index=IMAGE,
    )
    return tf.Mistral3ForConditionalGeneration(config)


@family("mistral3_ministral3", sized)
def mistral3_ministral3(layers: int) -> Any:
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**vit(hidden_size=32)),
        text_config=tf.Ministral3Config(**text(layers)),
        image_token_index=IMAGE,
    )
    return tf.Mistral3ForConditionalGeneration(config)


@family("lighton_ocr", sized)
def lighton_ocr(layers: int) -> Any:
    config = tf.LightOnOcrConfig(
        vision_config=tf.PixtralVisionConfig(**vit(hidden_size=32)),
        text_config=tf.Qwen3Config(**text(layers)),
        image_token_id=IMAGE,
    )
    return tf.LightOnOcrForConditionalGeneration(config)


@family("vipllava", square(1, 3, 24, 24))
def vipllava(layers: int) -> Any:
    config = tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vit(projection_dim=16)),
        text_config=tf.LlamaConfig(**text(layers)),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2, 1],
    )
    return tf.VipLlavaForConditionalGeneration(config)


@family("deepseek_vl", square(1, 3, 24, 24))
def deepseek_vl(layers: int) -> Any:
    config = tf.DeepseekVLConfig(
        text_config=tf.LlamaConfig(**text(layers)),
        vision_config=tf.SiglipVisionConfig(**vit()),
        image_token_id=IMAGE,
    )
    return tf.DeepseekVLForConditionalGeneration(config)


SAM = {
    "hidden_size": 24,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}


def _both(name: str) -> Inputs:
    return {
        "pixel_values": noise(name, 1, 3, 24, 24),
        "high_res_pixel_values": noise(name, 1, 3, 64, 64),
    }


@family("deepseek_vl_hybrid", _both)
def deepseek_vl_hybrid(layers: int) -> Any:
    high = tf.SamVisionConfig(**{**SAM, "image_size": 64, "num_pos_feats": 8})
    config = tf.DeepseekVLHybridConfig(
        text_config=tf.LlamaConfig(**text(layers)),
        vision_config=tf.SiglipVisionConfig(**vit()),
        high_res_vision_config=high,
        image_token_id=IMAGE,
    )
    return tf.DeepseekVLHybridForConditionalGeneration(config)


@family("got_ocr2", square(1, 3, 64, 64))
def got_ocr2(layers: int) -> Any:
    config = tf.GotOcr2Config(
        vision_config=SAM,
        text_config=tf.Qwen2Config(**text(layers)),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return tf.GotOcr2ForConditionalGeneration(config)


@family("pp_chart2table", square(1, 3, 64, 64))
def pp_chart2table(layers: int) -> Any:
    config = tf.PPChart2TableConfig(
        vision_config={**SAM, "model_type": "pp_chart2table_vision"},
        text_config=tf.Qwen2Config(**text(layers)),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return tf.GotOcr2ForConditionalGeneration(config)


@family("janus", square(1, 3, 24, 24), prompt=wrapped)
def janus(layers: int) -> Any:
    vq = {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_patches": 6,
        "embed_dim": 4,
        "num_embeddings": 20,
        "latent_channels": 8,
        "projection_dim": WIDTH,
        "num_hidden_layers": 1,
        "image_token_embed_dim": WIDTH,
        "num_res_blocks": 1,
    }
    config = tf.JanusConfig(
        text_config=tf.LlamaConfig(**text(layers)),
        vq_config=vq,
        image_token_id=IMAGE,
        vision_config=vit(projection_dim=WIDTH, mlp_ratio=2.0, num_image_tokens=36),
    )
    return tf.JanusForConditionalGeneration(config)


@family("fast_vlm", square(1, 3, 96, 128))
def fast_vlm(layers: int) -> Any:
    vision = tf.TimmWrapperConfig(
        architecture="resnet18",
        num_classes=0,
        do_pooling=False,
        model_args={"features_only": False},
        num_features=512,
        hidden_size=512,
    )
    config = tf.FastVlmConfig(
        vision_config=vision, text_config=tf.Qwen2Config(**text(layers)), image_token_index=IMAGE
    )
    return tf.FastVlmForConditionalGeneration(config)


def _masked(name: str) -> Inputs:
    return {
        "pixel_values": noise(name, 1, 3, 24, 24),
        "pixel_mask": torch.ones(1, 24, 24, dtype=torch.bool),
    }


@family("aria", _masked)
def aria(layers: int) -> Any:
    config = tf.AriaConfig(
        vision_config=tf.Idefics3VisionConfig(**vit()),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={36: 9},
        text_config=tf.AriaTextConfig(**text(layers, moe_num_experts=4, moe_num_shared_experts=1)),
    )
    return tf.AriaForConditionalGeneration(config)


@family("idefics2", square(1, 3, 24, 24), prompt=wrapped, by_row=True)
def idefics2(layers: int) -> Any:
    perceiver = {
        "hidden_size": WIDTH,
        "resampler_n_latents": 8,
        "resampler_depth": 2,
        "resampler_n_heads": 2,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    config = tf.Idefics2Config(
        vision_config=vit(),
        perceiver_config=perceiver,
        image_token_id=IMAGE,
        text_config=tf.MistralConfig(**text(layers), sliding_window=None),
    )
    return tf.Idefics2ForConditionalGeneration(config)


def marked(ids: list[int], clip: bool) -> list[int]:
    """Idefics 3: every tile behind a marker of its own, the whole picture last."""
    each = [ids[n : n + 9] for n in range(0, len(ids), 9)]
    out: list[int] = []
    for number, tile in enumerate(each):
        out += [VSTART, 99 if number == len(each) - 1 else 94 + number, *tile]
    return [*out, VSTART]


@family("idefics3", tiles, prompt=marked, by_row=True)
def idefics3(layers: int) -> Any:
    config = tf.Idefics3Config(
        vision_config=vit(),
        image_token_id=IMAGE,
        scale_factor=2,
        text_config=tf.LlamaConfig(**text(layers)),
    )
    return tf.Idefics3ForConditionalGeneration(config)


@family("smolvlm", tiles, prompt=marked, by_row=True)
def smolvlm(layers: int) -> Any:
    config = tf.SmolVLMConfig(
        vision_config=vit(),
        image_token_id=IMAGE,
        scale_factor=2,
        text_config=tf.LlamaConfig(**text(layers)),
    )
    return tf.SmolVLMForConditionalGeneration(config)


@family("apertus1p5", lambda name: {
    "pixel_values": noise(name, 1, 3, 8, 12), "image_sizes": torch.tensor([[8, 12]]),
}, only_eager=True)  # fmt: skip
def apertus1p5(layers: int) -> Any:
    config = tf.Apertus1p5Config(
        text_config=text(layers, vocab_size=4300, num_key_value_heads=2),
        vision_config={
            "codebook_size": 32,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [4],
            "resolution": 8,
        },
        image_token_id=IMAGE,
        audio_token_id=94,
        image_token_offset=100,
        audio_token_offset=132,
    )
    return tf.Apertus1p5ForConditionalGeneration(config)
