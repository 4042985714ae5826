# SPDX-License-Identifier: Apache-2.0
"""Pictures at photo size through every family's own image processor and its defaults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

import visprune

WORDS = [
    "what",
    "is",
    "in",
    "this",
    "picture",
    "?",
    "USER",
    ":",
    "ASSISTANT",
    "describe",
    "and",
    "that",
]
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A picture of photo size: smooth colours, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(x / rng.uniform(20, 90) + y / rng.uniform(20, 90)) for _ in range(3)]
    edges = ((x // 97 + y // 61) % 2)[..., None] * 60
    pixels = 110 + 60 * np.stack(waves, -1) + edges + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tokenizer(specials: list[str]) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[PAD]", "<s>", "</s>", *specials, *dict.fromkeys(WORDS)]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )
    made.add_special_tokens({"additional_special_tokens": specials})
    return made


def llava(tiled: bool) -> tuple[Any, Any]:
    words = tokenizer(["<image>"])
    clip = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    shared = {
        "vision_config": clip,
        "text_config": LlamaConfig(**TEXT),
        "image_token_id": words.convert_tokens_to_ids("<image>"),
    }
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    how = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    if not tiled:
        model = LlavaForConditionalGeneration(LlavaConfig(**shared))
        return model, LlavaProcessor(CLIPImageProcessor(**sizes), words, **how)
    config = LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS)
    pictures = LlavaNextImageProcessor(**sizes, image_grid_pinpoints=PINPOINTS)
    return LlavaNextForConditionalGeneration(config), LlavaNextProcessor(pictures, words, **how)


def qwen(family: str) -> tuple[Any, Any]:
    words = tokenizer(MARKS)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, words.convert_tokens_to_ids(MARKS), strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = {**TEXT, "rope_parameters": rope}
    parts = (Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor())
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        return Qwen2VLForConditionalGeneration(config), Qwen2VLProcessor(*parts)
    vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    vision |= {"window_size": 112, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2_5_VLProcessor(*parts)


def built(family: str) -> tuple[Any, Any, str]:
    """(model, processor, what stands for a picture in the prompt)."""
    torch.manual_seed(0)
    if family.startswith("llava"):
        model, processor = llava(family == "llava_next")
        mark = "<image>"
    else:
        model, processor = qwen(family)
        mark = "<|vision_start|> <|image_pad|> <|vision_end|>"
    model.generation_config.eos_token_id = None
    return model.eval(), processor, mark


EXPECTED = {
    "llava": [576, 576, 576],
    "llava_next": [2112, 2304, 1920],
    "qwen2_vl": [486, 999, 777],
    "qwen2_5_vl": [486, 999, 777],
}


@pytest.mark.parametrize("family", EXPECTED)
def test_photos_of_different_sizes_in_one_batch(family: str) -> None:
    model, processor, mark = built(family)
    pictures = [photo(768, 512, 0), photo(1024, 768, 1), photo(1024, 576, 2)]
    prompts = [
        f"USER : {mark} what is in this picture ? ASSISTANT :",
        f"USER : {mark} {mark} describe this and that ASSISTANT :",
    ]
    inputs = processor(images=pictures, text=prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits
        words = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with visprune.prune(model, "keep_all") as run:
            assert torch.equal(model(**inputs, logits_to_keep=1).logits, plain)
            assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), words)
        assert run.trace.num_tokens == EXPECTED[family]
        with visprune.prune(model, "todre", num_keep=64, tau=0.0) as run:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert [len(kept) for kept in run.trace.kept] == [64] * 3
        assert run.trace.tokens_per_layer == [[64] * 4, [128] * 4]
        with visprune.prune(model, "fastv", keep_ratio=0.25) as run:
            model(**inputs, logits_to_keep=1)
        quarter = [round(n * 0.25) for n in EXPECTED[family]]
        assert [row[-1] for row in run.trace.tokens_per_layer] == [quarter[0], sum(quarter[1:])]
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, plain)
    for places, count in zip(run.trace.pos, quarter, strict=True):
        assert len({tuple(place) for place in places.tolist()}) == count


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_clip_made_of_frames(family: str) -> None:
    model, processor, _ = built(family)
    frames = np.stack([np.asarray(photo(320, 240, seed)) for seed in range(8)])
    prompt = "USER : <|vision_start|> <|video_pad|> <|vision_end|> what is this ? ASSISTANT :"
    inputs = processor(videos=[frames], text=[prompt], return_tensors="pt", padding=True)
    with torch.no_grad():
        plain = model(**inputs).logits
        with visprune.prune(model, "keep_all") as run:
            assert torch.equal(model(**inputs).logits, plain)
        assert run.trace.num_tokens[0] == inputs["video_grid_thw"][0].prod() // 4
        with visprune.prune(model, "divprune", num_keep=40) as run:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert run.trace.tokens_per_layer == [[40] * 4]
    frames_kept = {place[0] for place in run.trace.pos[0].tolist()}
    assert len(frames_kept) > 1, "the budget is for the whole clip, not for one frame"
