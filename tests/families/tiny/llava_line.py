# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the LLaVA line: pictures of a thumbnail and crops, clips of frames."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from tests.families.tiny.parts import IMAGE, VIDEO, Inputs, family, noise, text, vit

PINPOINTS = [[24, 48], [48, 24], [48, 48]]


def crops(name: str) -> Inputs:
    """A thumbnail and two crops; with a capital letter four, of which some are padding."""
    size, there = ([40, 46], 5) if name.isupper() else ([24, 40], 3)
    pixels = torch.zeros(1, 5, 3, 24, 24)  # padded to the most of the batch, as processors do
    pixels[:, :there] = noise(name, 1, there, 3, 24, 24)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def frames(name: str) -> Inputs:
    """Three frames."""
    return {"pixel_values_videos": noise(name, 1, 3, 3, 24, 24)}


@family("llava_onevision", crops, clip=frames)
def llava_onevision(layers: int) -> Any:
    return _onevision(layers, "anyres_max_9")


@family("llava_onevision_shrunk", crops, clip=frames)
def llava_onevision_shrunk(layers: int) -> Any:
    """Pictures of more than one crop are interpolated."""
    return _onevision(layers, "anyres_max_1")


def _onevision(layers: int, ratio: str) -> Any:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vit()),
        text_config=tf.Qwen2Config(**text(layers)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_aspect_ratio=ratio,
        image_grid_pinpoints=PINPOINTS,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


@family("llava_next_video", crops, clip=frames)
def llava_next_video(layers: int) -> Any:
    config = tf.LlavaNextVideoConfig(
        vision_config=tf.CLIPVisionConfig(**vit(projection_dim=16)),
        text_config=tf.LlamaConfig(**text(layers)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
        image_grid_pinpoints=PINPOINTS,
    )
    return tf.LlavaNextVideoForConditionalGeneration(config)


@family(
    "video_llava",
    lambda name: {"pixel_values": noise(name, 1, 3, 24, 24)},
    clip=lambda name: {"pixel_values_videos": noise(name, 1, 3, 3, 24, 24)},
)
def video_llava(layers: int) -> Any:
    config = tf.VideoLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vit(projection_dim=16)),
        text_config=tf.LlamaConfig(**text(layers)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
    )
    return tf.VideoLlavaForConditionalGeneration(config)


@family("granite4_vision", crops)
def granite4_vision(layers: int) -> Any:
    config = tf.Granite4VisionConfig(
        vision_config=tf.CLIPVisionConfig(**vit(projection_dim=16, hidden_size=64)),
        text_config=text(layers, model_type="granite4_vision_text", embedding_multiplier=2.0),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0], [-1, 2]],
        spatial_vision_layer=-1,
        spatial_target_layers=[1, 3],
    )
    return tf.Granite4VisionForConditionalGeneration(config)
