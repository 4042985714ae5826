# SPDX-License-Identifier: Apache-2.0
"""The embedded model: a small LLaVA that ships with the package and answers questions offline.

An ordinary ``LlavaForConditionalGeneration`` with a ``LlavaProcessor``: CLIP-style vision tower,
24 x 24 = 576 visual tokens, Llama decoder of 8 layers. The same shapes of things as LLaVA-1.5
(arXiv:2310.03744), a ten-thousandth of its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from visprune.backbones.vlm.embedded.tokenizer import CHAT_TEMPLATE, SPECIAL, build_tokenizer
from visprune.errors import ConfigError

__all__ = ["PROMPT", "WEIGHTS", "build_model", "build_processor", "load"]

WEIGHTS = Path(__file__).parent / "weights"
PROMPT = "USER: <image>\n{question} ASSISTANT:"
IMAGE_SIZE, PATCH_SIZE = 192, 8


def load(
    dtype: torch.dtype = torch.float32,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the embedded model and its processor from package data, without a network.

    Args:
        dtype: Floating-point type of the weights.

    Returns:
        Model in evaluation mode on the CPU, and its processor (padding on the left).

    Raises:
        ConfigError: If the package was installed without the weights.
    """
    if not (WEIGHTS / "model.safetensors").is_file():
        raise ConfigError(
            "The embedded model's weights (backbones/vlm/embedded/weights/model.safetensors) are "
            "not there. Install the package again, or train them: "
            "visprune train configs/train/embedded.yaml."
        )
    model = LlavaForConditionalGeneration.from_pretrained(
        WEIGHTS, dtype=dtype, local_files_only=True, key_mapping=_key_mapping()
    )
    return model.eval(), LlavaProcessor.from_pretrained(WEIGHTS, local_files_only=True)


def _key_mapping() -> dict[str, str] | None:
    """Names of the tower's weights in older transformers, where its layers lie one level deeper."""
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1))
    if not hasattr(tower, "vision_model"):
        return None
    return {r"vision_tower\.(?!vision_model)": "vision_tower.vision_model."}


def build_model(
    vocab_size: int,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
) -> LlavaForConditionalGeneration:
    """Build the model with random weights (draws from torch's global generator).

    Args:
        vocab_size: Number of tokens, special ones included.
        vision: Fields of ``CLIPVisionConfig`` to change.
        text: Fields of ``LlamaConfig`` to change.

    Returns:
        Model in fp32 with SDPA attention. Features are read before the last tower layer, as in
        LLaVA, so that layer serves the CLS token alone.
    """
    vision_fields = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "hidden_act": "gelu_pytorch_tanh",
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    text_fields = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        # A large base leaves half of the rotary pairs nearly unturned over 600 positions: a word
        # must find its patch wherever in the picture it is.
        "rope_theta": 1e6,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    special = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    ids = {f"{name}_token_id": SPECIAL.index(token) for name, token in special.items()}
    text_fields = {**text_fields, **(text or {})}
    theta = text_fields.pop("rope_theta")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**vision_fields, **(vision or {})}),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            **ids,
            **text_fields,
        ),
        image_token_id=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(max_new_tokens=4, do_sample=False, **ids)
    return model


def build_processor(
    words: Sequence[str], *, image: int = IMAGE_SIZE, patch: int = PATCH_SIZE
) -> LlavaProcessor:
    """Build the processor: word-level tokenizer, CLIP image processor, LLaVA's prompt.

    Args:
        words: Vocabulary beside the special tokens, without repetition.
        image: Side of the pictures that the tower takes, in pixels.
        patch: Side of a patch.

    Returns:
        Processor that expands ``<image>`` to a placeholder for each patch (576) and pads on the
        left.
    """
    images = CLIPImageProcessor(
        size={"shortest_edge": image},
        crop_size={"height": image, "width": image},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(words),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's CLS, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )
