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
from tests.families.tiny.hybrid import LINEAR, ROPE, hybrid
from tests.families.tiny.parts import MROPE, text
from tests.families.tiny.qwen import AUDIO, GLM_ROPE

WORDS = ("what", "is", "in", "this", "picture", "?", "and", "that", "video", *"0123456789:.")
TILE_MARKS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
IDEFICS_MARKS = [
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *TILE_MARKS,
]
QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_PICTURE = "<|vision_start|> <|image_pad|> <|vision_end|>"


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
    # Numbers by digit: the time of a frame is told from another.
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.Digits(True)])
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
    words = tokenizer(*IDEFICS_MARKS)
    config = tf.Idefics3Config(
        vision_config=siglip(image_size=364, patch_size=14),
        text_config=tf.LlamaConfig(**text(3)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    processor = tf.Idefics3Processor(tf.Idefics3ImageProcessor(), words, image_seq_len=169)
    return tf.Idefics3ForConditionalGeneration(config), processor, "<image>"


def smolvlm() -> tuple[Any, Any, str]:
    words = tokenizer(*IDEFICS_MARKS, "<video>")
    config = tf.SmolVLMConfig(
        vision_config=siglip(image_size=364, patch_size=14),
        text_config=tf.LlamaConfig(**text(3)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    processor = tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(), words, tf.SmolVLMVideoProcessor(), image_seq_len=169
    )
    return tf.SmolVLMForConditionalGeneration(config), processor, "<image>"


def qwen_ids(words: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, words.convert_tokens_to_ids(list(QWEN_MARKS)), strict=True))


def qwen_vit(**over: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        **over,
    }


def qwen3_vl() -> tuple[Any, Any, str]:
    words = tokenizer(*QWEN_MARKS)
    config = tf.Qwen3VLConfig(
        text_config=text(3, rope_parameters=MROPE),
        vision_config=qwen_vit(deepstack_visual_indexes=[0, 1]),
        **qwen_ids(words),
    )
    pictures = tf.Qwen2VLImageProcessor(patch_size=16, merge_size=2)
    processor = tf.Qwen3VLProcessor(pictures, words, tf.Qwen3VLVideoProcessor())
    return tf.Qwen3VLForConditionalGeneration(config), processor, QWEN_PICTURE


def qwen3_5() -> tuple[Any, Any, str]:
    words = tokenizer(*QWEN_MARKS)
    config = tf.Qwen3_5Config(
        text_config=text(4, layer_types=hybrid(4), rope_parameters=ROPE, **LINEAR),
        vision_config=qwen_vit(),
        **qwen_ids(words),
    )
    pictures = tf.Qwen2VLImageProcessor(patch_size=16, merge_size=2)
    processor = tf.Qwen3VLProcessor(pictures, words, tf.Qwen3VLVideoProcessor())
    return tf.Qwen3_5ForConditionalGeneration(config), processor, QWEN_PICTURE


def qwen2_5_omni() -> tuple[Any, Any, str]:
    words = tokenizer(
        image_token="<|IMAGE|>",
        video_token="<|VIDEO|>",
        audio_token="<|AUDIO|>",
        vision_bos_token="<|vision_bos|>",
        vision_eos_token="<|vision_eos|>",
        audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
    )
    config = tf.Qwen2_5OmniThinkerConfig(
        text_config=text(3, rope_parameters=MROPE),
        vision_config=qwen_vit(window_size=112, fullatt_block_indexes=[1]),
        audio_config=AUDIO,
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        audio_token_index=words.audio_token_id,
        vision_start_token_id=words.vision_bos_token_id,
        vision_end_token_id=words.vision_eos_token_id,
    )
    processor = tf.Qwen2_5OmniProcessor(
        tf.Qwen2VLImageProcessor(), tf.Qwen2VLVideoProcessor(), tf.WhisperFeatureExtractor(), words
    )
    mark = "<|vision_bos|> <|IMAGE|> <|vision_eos|>"
    return tf.Qwen2_5OmniThinkerForConditionalGeneration(config), processor, mark


def glm4v() -> tuple[Any, Any, str]:
    marks = [f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")]
    words = tokenizer("<|image|>", "<|video|>", *marks)
    names = [f"{kind}_{edge}_token_id" for kind in ("image", "video") for edge in ("start", "end")]
    ids = dict(zip(names, words.convert_tokens_to_ids(marks), strict=True))
    config = tf.Glm4vConfig(
        text_config=text(3, rope_parameters=GLM_ROPE),
        vision_config=qwen_vit(image_size=336),
        image_token_id=words.convert_tokens_to_ids("<|image|>"),
        video_token_id=words.convert_tokens_to_ids("<|video|>"),
        **ids,
    )
    processor = tf.Glm4vProcessor(tf.Glm4vImageProcessor(), words, tf.Glm4vVideoProcessor())
    mark = "<|begin_of_image|> <|image|> <|end_of_image|>"
    return tf.Glm4vForConditionalGeneration(config), processor, mark


def kimi_k25() -> tuple[Any, Any, str]:
    words = tokenizer(
        *("<|media_begin|>", "<|media_content|>", "<|media_end|>"),
        *("<|media_pad|>", "<|kimi_k25_video_placeholder|>"),
    )
    latents = {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
    }
    config = tf.Kimi_K25Config(
        text_config=tf.DeepseekV3Config(**{**text(3), **latents}),
        projection_hidden_size=24,
        vision_config=siglip(),
        image_token_id=words.convert_tokens_to_ids("<|media_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|kimi_k25_video_placeholder|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|media_begin|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|media_end|>"),
    )
    processor = tf.Kimi_K25Processor(
        tf.Kimi_K25ImageProcessor(), words, tf.Kimi_K25VideoProcessor()
    )
    mark = "<|media_begin|> <|media_content|> <|media_pad|> <|media_end|>"
    return tf.Kimi_K25ForConditionalGeneration(config), processor, mark


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
    "smolvlm": (smolvlm, [2197, 2197, 2197]),
    "qwen3_5": (qwen3_5, [300, 165, 150]),
    "qwen2_5_omni_thinker": (qwen2_5_omni, [391, 221, 187]),
    "glm4v": (glm4v, [391, 221, 187]),
    "kimi_k25": (kimi_k25, [414, 234, 216]),
}
# What stands for a clip, and tokens of one of eight frames of 320 x 240: by hand, two frames and
# cells of 32 or 28 pixels a token, rounded; Qwen2.5-Omni enlarges frames to 128 cells at least,
# Kimi K2.5 pads to whole cells and takes the mean of four frames.
CLIPS: dict[str, tuple[str, int]] = {
    "llava_onevision": ("<video>", 8 * 196),
    "qwen3_vl": ("<|video_pad|>", 4 * 10 * 8),
    "qwen3_5": ("<|video_pad|>", 4 * 10 * 8),
    "qwen2_5_omni_thinker": ("<|vision_bos|> <|VIDEO|> <|vision_eos|>", 4 * 14 * 10),
    "glm4v": ("<|begin_of_video|> <|video|> <|end_of_video|>", 4 * 11 * 9),
    "kimi_k25": ("<|kimi_k25_video_placeholder|>", 2 * 12 * 9),
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


@pytest.mark.parametrize("family", CLIPS)
@torch.no_grad()
def test_a_clip_made_of_frames(family: str) -> None:
    torch.manual_seed(0)
    mark, expected = CLIPS[family]
    model, processor, _ = FAMILIES[family][0]()
    model.eval().generation_config.eos_token_id = None
    frames = np.stack([np.asarray(photo(320, 240, seed)) for seed in range(8)])
    known = {"fps": 2.0, "total_num_frames": 8, "duration": 4.0, "frames_indices": list(range(8))}
    inputs = processor(
        videos=[frames], text=[f"{mark} what is in this ?"], return_tensors="pt", padding=True,
        videos_kwargs={"video_metadata": [known], "do_sample_frames": False},
    )  # fmt: skip
    plain = model(**inputs, logits_to_keep=1).logits
    with visprune.prune(model, "keep_all") as run:
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, plain)
    assert run.trace.num_tokens == [expected]
    with visprune.prune(model, "divprune", num_keep=40) as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert len(run.trace.kept[0]) == 40
    kept = {place[0] for place in run.trace.pos[0].tolist()}
    assert len(kept) > 1, "the budget is for the whole clip, not for one frame"
