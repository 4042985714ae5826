# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose decoders put pictures into the text themselves."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.parts import IMAGE, Inputs, family, noise, square, text, vit, wrapped


def _chameleon(layers: int, **over: Any) -> Any:
    # What a model never writes is no word of a prompt: its loss would have no bound.
    codes = {f"IMGIMG{letter}Z": 80 + n for n, letter in enumerate("ABCDEFGHIJ")}
    config = tf.ChameleonConfig(
        **text(layers, num_key_value_heads=4, **over),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 10,
            "latent_channels": 8,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={**codes, "<image>": IMAGE},
    )
    return tf.ChameleonForConditionalGeneration(config)


@family("chameleon", square(1, 3, 8, 12), prompt=wrapped)
def chameleon(layers: int) -> Any:
    return _chameleon(layers)


@family("chameleon_swin", square(1, 3, 8, 12), prompt=wrapped)
def chameleon_swin(layers: int) -> Any:
    """Its layers norm what leaves their attention (the 34B model)."""
    return _chameleon(layers, swin_norm=True)


def _crops(name: str) -> Inputs:
    """The whole and one crop; with a capital letter two, of which the last is padded.

    In a call without any padding the encoder of transformers 5.24 attends causally under SDPA, so
    that a picture would be another one beside others.
    """
    crops = 2 if name.isupper() else 1
    masks = torch.ones(1, 3, 8, 8)
    masks[:, crops, :, 4:] = 0
    return {
        "image_pixel_values": noise(name, 1, 3, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32 * crops]]),
        "image_attention_mask": masks,
    }


@family("phi4_multimodal", _crops, count=lambda name: 49 if name.isupper() else 33)
def phi4_multimodal(layers: int) -> Any:
    decoder = text(layers)
    decoder.pop("head_dim")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    config = tf.Phi4MultimodalConfig(
        **decoder,
        original_max_position_embeddings=4096,
        rope_parameters=rope,
        vision_config=vit(image_size=32, crop_size=32, image_token_id=IMAGE, feature_layer=-2),
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "audio_token_id": 94,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 8,
            "input_size": 16,
            "time_reduction": 4,
        },
    )
    return tf.Phi4MultimodalForCausalLM(config)
