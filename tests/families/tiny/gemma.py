# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Gemma 4 and Gemma 3n: windows, inputs of each layer, shared keys, streams."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.parts import (
    IMAGE,
    PAD,
    VEND,
    VIDEO,
    VOCAB,
    VSTART,
    Inputs,
    family,
    framed,
    mm_types,
    noise,
    sliding,
    square,
    text,
    wrapped,
)

SHARED: dict[str, Any] = {"layers": 6, "scale": 0.5, "params": {"todre": {"depth": 0.4}}}


def placed(name: str, *shape: int, down: int, across: int, room: int) -> tuple[Any, Any]:
    """Patches in a line with their (x, y), padded to ``room`` of them."""
    y, x = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
    places = torch.full((1, room, 2), -1)
    places[0, : down * across] = torch.stack([x.flatten(), y.flatten()], -1)
    pixels = torch.zeros(1, room, *shape)
    pixels[0, : down * across] = noise(name, down * across, *shape).sigmoid()
    return pixels, places


def picture(name: str) -> Inputs:
    """A picture of its own size; a capital letter is a larger one."""
    across = 8 if name.isupper() else 6
    pixels, places = placed(name, 48, down=8, across=across, room=64)
    return {"pixel_values": pixels, "image_position_ids": places}


def clip(name: str) -> Inputs:
    """Two frames."""
    made = [placed(chr(ord(name) + n), 48, down=4, across=6, room=32) for n in range(2)]
    return {
        "pixel_values_videos": torch.cat([pixels for pixels, _ in made]),
        "video_position_ids": torch.cat([places for _, places in made]),
        "num_frames_per_video": torch.tensor([2]),
    }


def _gemma4(layers: int, **over: Any) -> Any:
    config = tf.Gemma4Config(
        text_config=tf.Gemma4TextConfig(
            **text(layers, **sliding(layers), vocab_size_per_layer_input=VOCAB, **over)
        ),
        vision_config=tf.Gemma4VisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=12,
            pooling_kernel_size=2,
            patch_size=4,
            position_embedding_size=64,
        ),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=97,
        boi_token_id=VSTART,
        eoi_token_id=VEND,
    )
    return tf.Gemma4ForConditionalGeneration(config)


@family("gemma4", picture, clip=clip, prompt=framed, extra=mm_types, scale=0.5)
def gemma4(layers: int) -> Any:
    return _gemma4(layers, use_bidirectional_attention="vision", hidden_size_per_layer_input=0)


@family("gemma4_small", picture, clip=clip, prompt=framed, extra=mm_types, **SHARED)
def gemma4_small(layers: int) -> Any:
    """E2B and E4B: inputs of each layer, and two layers that share keys and values."""
    return _gemma4(layers, hidden_size_per_layer_input=8, num_kv_shared_layers=2)


def raw(name: str) -> Inputs:
    """Patches without an encoder."""
    across = 8 if name.isupper() else 6
    pixels, places = placed(name, 192, down=4, across=across, room=32)
    return {"pixel_values": pixels, "image_position_ids": places}


@family("gemma4_unified", raw, prompt=wrapped, extra=mm_types, scale=0.5)
def gemma4_unified(layers: int) -> Any:
    config = tf.Gemma4UnifiedConfig(
        text_config=tf.Gemma4UnifiedTextConfig(
            **text(layers, **sliding(layers), use_bidirectional_attention="vision")
        ),
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 24,
            "mm_posemb_size": 16,
            "output_proj_dims": 24,
        },
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=97,
        boi_token_id=VSTART,
        eoi_token_id=VEND,
    )
    return tf.Gemma4UnifiedForConditionalGeneration(config)


@family("gemma3n", square(1, 3, 128, 128), prompt=wrapped, **SHARED)
def gemma3n(layers: int) -> Any:
    """Two streams, inputs of each layer, shared keys; another small network for its encoder."""
    config = tf.Gemma3nConfig(
        text_config=tf.Gemma3nTextConfig(
            **text(
                layers,
                **sliding(layers),
                vocab_size_per_layer_input=88,
                hidden_size_per_layer_input=8,
                altup_num_inputs=2,
                laurel_rank=4,
                num_kv_shared_layers=2,
                activation_sparsity_pattern=[0.0] * layers,
            )
        ),
        vision_config={
            "architecture": "test_convnext",
            "hidden_size": 64,
            "vocab_size": 6,
            "vocab_offset": 88,
            "do_pooling": False,
            "num_classes": 0,
            "model_args": {},
        },
        audio_config={
            "vocab_size": 6,
            "vocab_offset": 94,
            "hidden_size": 16,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "sscp_conv_channel_size": [4, 4],
            "input_feat_size": 16,
        },
        vision_soft_tokens_per_image=16,
        image_token_id=IMAGE,
        boi_token_id=VSTART,
        eoi_token_id=VEND,
        audio_token_id=97,
    )
    model = tf.Gemma3nForConditionalGeneration(config)
    with torch.no_grad():  # a root of the mean square of zeros has no gradient
        model.get_input_embeddings().weight[PAD].normal_()
        for layer in model.model.language_model.layers:  # zeros: inputs of layers have no effect
            layer.altup.correct_output_scale.fill_(1.0)
    return model
