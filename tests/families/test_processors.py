# SPDX-License-Identifier: Apache-2.0
"""Pictures at photo size through families' own processors at their defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import visprune
from tests.families.tiny.parts import MROPE, text

WORDS = ("what", "is", "in", "this", "picture", "?", "and", "that")
TILE_MARKS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A picture of photo size: smooth colours, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(x / rng.uniform(20, 90) + y / rng.uniform(20, 90)) for _ in range(3)]
    edges = ((x // 97 + y // 61) % 2)[..., None] * 60
    pixels = 110 + 60 * np.stack(waves, -1) + edges + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tokenizer(*specials: str, **named: str) -> Any:
    """Words of one prompt; ``named``: tokens that the processor asks for by name."""
    marks = list(dict.fromkeys([*specials, *named.values()]))
    words = ["[UNK]", "<s>", "</s>", "[PAD]", *marks, *WORDS, "\n"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="[PAD]",
        padding_side="left",
        extra_special_tokens=named,
    )
    made.add_special_tokens({"additional_special_tokens": marks})
    return made


def siglip(**over: Any) -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **over,
    }


def onevision() -> tuple[Any, Any, str]:
    words = tokenizer("<image>", "<video>")
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**siglip(image_size=384, patch_size=14)),
        text_config=tf.Qwen2Config(**text(3)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
    )
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(),
        words,
        tf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor, "<image>"


def internvl() -> tuple[Any, Any, str]:
    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = tf.InternVLConfig(
        vision_config=siglip(image_size=[448, 448], patch_size=[14, 14]),
        text_config=tf.Qwen2Config(**text(3)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    size = {"height": 448, "width": 448}
    pictures = tf.GotOcr2ImageProcessor(crop_to_patches=True, max_patches=12, size=size)
    processor = tf.InternVLProcessor(pictures, words, tf.InternVLVideoProcessor(size=size))
    return tf.InternVLForConditionalGeneration(config), processor, "<IMG_CONTEXT>"


def idefics3() -> tuple[Any, Any, str]:
    words = tokenizer(
        *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        *TILE_MARKS,
    )
    config = tf.Idefics3Config(
        vision_config=siglip(image_size=364, patch_size=14),
        text_config=tf.LlamaConfig(**text(3)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    processor = tf.Idefics3Processor(tf.Idefics3ImageProcessor(), words, image_seq_len=169)
    return tf.Idefics3ForConditionalGeneration(config), processor, "<image>"


def qwen3_vl() -> tuple[Any, Any, str]:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*marks)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    vision = {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 1],
    }
    config = tf.Qwen3VLConfig(
        text_config=text(3, rope_parameters=MROPE),
        vision_config=vision,
        **dict(zip(names, words.convert_tokens_to_ids(list(marks)), strict=True)),
    )
    pictures = tf.Qwen2VLImageProcessor(patch_size=16, merge_size=2)
    processor = tf.Qwen3VLProcessor(pictures, words, tf.Qwen3VLVideoProcessor())
    mark = "<|vision_start|> <|image_pad|> <|vision_end|>"
    return tf.Qwen3VLForConditionalGeneration(config), processor, mark


def gemma3() -> tuple[Any, Any, str]:
    words = tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<image_soft_token>")
    decoder = text(3, sliding_window=64, query_pre_attn_scalar=8)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**decoder, layer_types=kinds),
        vision_config=tf.SiglipVisionConfig(
            **siglip(image_size=896, patch_size=14, vision_use_head=False)
        ),
        mm_tokens_per_image=256,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessor(size={"height": 896, "width": 896}), words
    )
    return tf.Gemma3ForConditionalGeneration(config), processor, "<boi>"


def mistral3() -> tuple[Any, Any, str]:
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(
            **siglip(hidden_size=32, image_size=1540, patch_size=14)
        ),
        text_config=tf.MistralConfig(**text(3), sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )
    pictures = tf.PixtralImageProcessor(patch_size=28, size={"longest_edge": 1540})
    processor = tf.PixtralProcessor(pictures, words, patch_size=14, spatial_merge_size=2)
    return tf.Mistral3ForConditionalGeneration(config), processor, "[IMG]"


# Tokens of photos of 640 x 480, 480 x 360 and 320 x 480. By hand: LLaVA-OneVision's thumbnail of
# 27 x 27 and 40 x 54 of the unpadded grid, several pictures uncut; 12 or 6 tiles and a whole of 256
# (InternVL) or 169 (Idefics 3); cells of 32 (Qwen3-VL) and 28 pixels (Mistral 3), rounded or
# rounded up.
Made = Callable[[], tuple[Any, Any, str]]
FAMILIES: dict[str, tuple[Made, list[int]]] = {
    "llava_onevision": (onevision, [2889, 729, 729]),
    "internvl": (internvl, [3328, 3328, 1792]),
    "idefics3": (idefics3, [2197, 2197, 2197]),
    "qwen3_vl": (qwen3_vl, [300, 165, 150]),
    "gemma3": (gemma3, [256, 256, 256]),
    "mistral3": (mistral3, [414, 234, 216]),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_photos_of_different_sizes_in_one_batch(family: str) -> None:
    torch.manual_seed(0)
    make, expected = FAMILIES[family]
    model, processor, mark = make()
    model.eval().generation_config.eos_token_id = None
    pictures = [photo(640, 480, 0), photo(480, 360, 1), photo(320, 480, 2)]
    prompts = [f"{mark} what is in this picture ?", f"{mark} and {mark} what is this and that ?"]
    inputs = processor(
        images=[pictures[:1], pictures[1:]], text=prompts, return_tensors="pt", padding=True
    )
    options = {"max_new_tokens": 2, "do_sample": False}
    plain = model(**inputs, logits_to_keep=1).logits
    with visprune.prune(model, "keep_all") as run:
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, plain)
    assert run.trace.num_tokens == expected
    assert run.trace.image_rows == [0, 1, 1]
    with visprune.prune(model, "divprune", num_keep=64) as run:
        model.generate(**inputs, **options)
    assert [len(kept) for kept in run.trace.kept] == [64] * 3
    with visprune.prune(model, "fastv", keep_ratio=0.25) as run:
        model(**inputs, logits_to_keep=1)
    quarter = [round(n * 0.25) for n in expected]
    assert [row[-1] for row in run.trace.tokens_per_layer] == [quarter[0], sum(quarter[1:])]
    for places, count in zip(run.trace.pos, quarter, strict=True):
        assert len({tuple(place) for place in places.tolist()}) == count
