# SPDX-License-Identifier: Apache-2.0
"""Tiny random vision-language models, built from configs: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE, VIDEO, PAD, EOS, VOCAB = 90, 91, 0, 2, 100
FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")


def _text(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "max_position_embeddings": 4096,
    }


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=4,
        projection_dim=16,
    )


def build(family: str, *, layers: int = 4, attn: str = "sdpa", seed: int = 0) -> Any:
    """A tiny model of ``family``, fp32, in eval mode, with weights large enough to matter."""
    torch.manual_seed(seed)
    if family in ("llava", "llava_next"):
        text = LlamaConfig(**_text(layers))
        common = {
            "vision_config": _clip(),
            "text_config": text,
            "image_token_id": IMAGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
        if family == "llava":
            model = LlavaForConditionalGeneration(LlavaConfig(**common))
        else:
            pinpoints = [[24, 48], [48, 24], [48, 48]]
            config = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
            model = LlavaNextForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        text = {**_text(layers), "rope_parameters": rope}
        ids = {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        }
        vision = {
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        }
        if family == "qwen2_vl":
            vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
            model = Qwen2VLForConditionalGeneration(
                Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
            )
        else:
            vision |= {
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            }
            model = Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
            )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    return model.eval()


def inputs(
    family: str, rows: list[list[Any]], *, seed: int = 0, pad_side: str = "left"
) -> dict[str, Any]:
    """Model inputs for rows of segments: an int is that many text tokens, a str a picture.

    Pictures: ``"a"``, ``"b"``, … (their content follows from the letter); for llava_next and Qwen a
    capital letter is a larger one; for Qwen ``"v"`` is a video of four frames.
    """
    makers = {"llava": _llava, "llava_next": _llava_next}
    return makers.get(family, _qwen)(rows, seed, pad_side)


def _finish(ids: list[list[int]], pad_side: str) -> dict[str, Any]:
    width = max(len(row) for row in ids)
    pads = [[PAD] * (width - len(row)) for row in ids]
    marks = [[0] * (width - len(row)) for row in ids]
    left = pad_side == "left"
    full = [p + r if left else r + p for p, r in zip(pads, ids, strict=True)]
    mask = [m + [1] * len(r) if left else [1] * len(r) + m for m, r in zip(marks, ids, strict=True)]
    return {"input_ids": torch.tensor(full), "attention_mask": torch.tensor(mask)}


def _words(count: int, seed: int, salt: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1000 + salt)
    return torch.randint(3, 80, (count,), generator=generator).tolist()


def _pixels(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(ord(name)))


def _llava(rows: list[list[Any]], seed: int, pad_side: str) -> dict[str, Any]:
    ids, pixels = [], []
    for row in rows:
        out: list[int] = []
        for place, part in enumerate(row):
            if isinstance(part, int):
                out += _words(part, seed, place * 10 + part)
            else:
                out += [IMAGE] * 36
                pixels.append(_pixels(part, 3, 24, 24))
        ids.append(out)
    made = _finish(ids, pad_side)
    return {**made, "pixel_values": torch.stack(pixels)} if pixels else made


def _next_tokens(size: tuple[int, int]) -> tuple[int, int]:
    """(tiles, tokens) of a picture whose size is one of the pinpoints."""
    rows, columns = size[0] // 24 * 6, size[1] // 24 * 6
    return 1 + size[0] // 24 * (size[1] // 24), 36 + rows * (columns + 1)


def _llava_next(rows: list[list[Any]], seed: int, pad_side: str) -> dict[str, Any]:
    ids, pixels, sizes = [], [], []
    for row in rows:
        out: list[int] = []
        for place, part in enumerate(row):
            if isinstance(part, int):
                out += _words(part, seed, place * 10 + part)
            else:
                size = (48, 48) if part.isupper() else (24, 48)
                tiles, tokens = _next_tokens(size)
                out += [IMAGE] * tokens
                pixels.append(
                    torch.nn.functional.pad(
                        _pixels(part, tiles, 3, 24, 24), (0, 0) * 3 + (0, 5 - tiles)
                    )
                )
                sizes.append(size)
        ids.append(out)
    made = _finish(ids, pad_side)
    if not pixels:
        return made
    return {**made, "pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}


def _qwen(rows: list[list[Any]], seed: int, pad_side: str) -> dict[str, Any]:
    ids, types = [], []
    found: dict[str, list[Any]] = {"image": [], "video": []}
    for row in rows:
        out: list[int] = []
        for place, part in enumerate(row):
            if isinstance(part, int):
                out += _words(part, seed, place * 10 + part)
                continue
            video = part == "v"
            t, h, w = (2, 4, 4) if video else (1, 8, 12) if part.isupper() else (1, 6, 8)
            out += [92, *[VIDEO if video else IMAGE] * (t * h * w // 4), 93]
            flat = _pixels(part, t * h * w, 3 * 2 * 4 * 4)
            found["video" if video else "image"].append((flat, (t, h, w)))
        ids.append(out)
    made = _finish(ids, pad_side)
    types = (made["input_ids"] == IMAGE).int() + 2 * (made["input_ids"] == VIDEO).int()
    made["mm_token_type_ids"] = types
    for kind, parts in found.items():
        if parts:
            key = "pixel_values" if kind == "image" else "pixel_values_videos"
            made[key] = torch.cat([p for p, _ in parts])
            made[f"{kind}_grid_thw"] = torch.tensor([g for _, g in parts])
    return made
