# SPDX-License-Identifier: Apache-2.0
"""Tiny models with processors, as folders that a server loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipVisionConfig,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

EMBEDDED = Path(__file__).parents[3] / "backbones/vlm/embedded/weights"
START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
_SPECIAL = ["<pad>", "<s>", "<|im_end|>", "<unk>", START, END, IMAGE, VIDEO, "<image>",
            "<video>", "<img>", "</img>", "<IMG_CONTEXT>"]  # fmt: skip
_PIXELS = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 400}


def _tokenizer(**other: str) -> PreTrainedTokenizerFast:
    words = [*_SPECIAL, *(f"w{n}" for n in range(91)), *"0123456789.", "seconds", "<", ">"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(word, normalized=False) for word in _SPECIAL])
    named = other or {"image_token": IMAGE, "video_token": VIDEO,
             "vision_bos_token": START, "vision_eos_token": END}  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>",
        unk_token="<unk>", padding_side="left", extra_special_tokens=named,
    )  # fmt: skip


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 120, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "max_position_embeddings": 4096, **more,
    }  # fmt: skip


def _mrope(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], **more}
    return {"rope_parameters": rope}


def _vision(**more: Any) -> dict[str, Any]:
    return {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "in_channels": 3, **more}  # fmt: skip


_TOKENS = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 4,
           "vision_end_token_id": 5, "tie_word_embeddings": False}  # fmt: skip


def build(family: str, folder: Path) -> Path:
    """Write the tiny model of a family; weights of a seed, larger than usual so that all count."""
    torch.manual_seed(0)
    model, processor = _BUILDERS[family]()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                if not weight.any():  # places that begin as zeros would tell no patches apart
                    weight.normal_(std=0.1)
                weight.mul_(4.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen2_vl() -> tuple[Any, Any]:
    vision = _vision(embed_dim=64, hidden_size=128, mlp_ratio=2)
    config = Qwen2VLConfig(text_config=_text(**_mrope()), vision_config=vision, **_TOKENS)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**_PIXELS), _tokenizer(), Qwen2VLVideoProcessor(**_PIXELS),
        chat_template="{{ messages }}",
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config), processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    vision = _vision(hidden_size=64, out_hidden_size=128, intermediate_size=96, window_size=112,
                     fullatt_block_indexes=[1])  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=_text(**_mrope()), vision_config=vision, **_TOKENS)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**_PIXELS), _tokenizer(), Qwen2VLVideoProcessor(**_PIXELS),
        chat_template="{{ messages }}",
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl() -> tuple[Any, Any]:
    vision = _vision(hidden_size=64, out_hidden_size=128, intermediate_size=96,
                     num_position_embeddings=256, deepstack_visual_indexes=[0, 1])  # fmt: skip
    text = _text(head_dim=32, **_mrope(mrope_interleaved=True))
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_TOKENS)
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 400}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=14, size=size), _tokenizer(),
        Qwen3VLVideoProcessor(patch_size=14, size=size), chat_template="{{ messages }}",
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                              num_attention_heads=2, image_size=56, patch_size=14)  # fmt: skip
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**_text()), image_token_index=8,
        image_grid_pinpoints=pinpoints, tie_word_embeddings=False,
    )  # fmt: skip
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    tokenizer = _tokenizer()
    tokenizer.image_token = "<image>"
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template="{{ messages }}",
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    vision = SiglipVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                num_attention_heads=2, image_size=56, patch_size=14)  # fmt: skip
    pinpoints = [[56, 112], [112, 56], [112, 112], [224, 224]]
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**_text()), image_token_index=8,
        video_token_index=9, vision_feature_layer=-1, image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    tokenizer = _tokenizer(image_token="<image>", video_token="<video>")
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints), tokenizer,
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template="{{ messages }}",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 2, "image_size": [56, 56], "patch_size": [7, 7],
              "attention_bias": True}  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**_text()), image_token_id=12,
        image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(crop_to_patches=True, max_patches=4, size=size), tokenizer,
        InternVLVideoProcessor(size=size), image_seq_length=16, chat_template="{{ messages }}",
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), processor


def _pixtral() -> tuple[Any, Any]:
    vision = PixtralVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                 num_attention_heads=2, image_size=112, patch_size=14)  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_text()), image_token_index=10,
        vision_feature_select_strategy="full", vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14), _tokenizer(),
        patch_size=14, image_token="<img>", image_break_token="</img>", image_end_token="<image>",
        chat_template="{{ messages }}",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


_BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "pixtral": _pixtral,
}


def named_as_before(folder: Path, target: Path) -> Path:
    """A copy of a LLaVA whose tower's weights have the names that vLLM's own models know."""
    shutil.copytree(folder, target)
    weights = {re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): value
               for name, value in load_file(target / "model.safetensors").items()}  # fmt: skip
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


__all__ = ["EMBEDDED", "build", "named_as_before"]
