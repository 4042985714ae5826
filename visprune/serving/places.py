# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a picture come from, by the config of its model, before it is encoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.picture import grid
from visprune.core.method import ModelSpec

_CLASS_TOKEN = ("clip_vision_model", "internvl_vision")
_AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


def spec_of(config: Any) -> ModelSpec:
    """What methods may know of a model, of its config alone.

    Args:
        config: of transformers, with ``text_config`` and ``vision_config``.
    """
    vision, family = config.vision_config, str(config.model_type)
    layer = getattr(config, "vision_feature_layer", None)
    cls = vision.model_type in _CLASS_TOKEN
    lacking = {} if cls and isinstance(layer, int) else {
        "encoder_attention": f"attention of the image encoder of {family} is not read there",
        "encoder_features": f"states of the image encoder of {family} are not read there",
    }  # fmt: skip
    return ModelSpec(
        family=family,
        num_layers=int(getattr(config.text_config, "num_hidden_layers", 1)),
        has_cls=cls,
        multi_axis_rope=family in _AXES,
        encoder_refusal="a server runs its image encoder in code of its own",
        lacking=lacking,
    )


def shown_layers(config: Any) -> frozenset[str]:
    """Layers of the image encoder whose attention is read, as signals name them."""
    layer = getattr(config, "vision_feature_layer", None)
    count = getattr(config.vision_config, "num_hidden_layers", 0)
    kind = config.vision_config.model_type
    if kind not in _CLASS_TOKEN or not isinstance(layer, int):
        return frozenset()
    if kind == "internvl_vision":  # a server reads the last layer, whichever it is told
        return frozenset({"feature", "last"} if layer in (-1, count) else ())
    near = layer in (-1, -2, count - 1, count)
    return frozenset({"feature", "last"} if near else {"feature"})


def square(config: Any) -> tuple[Tensor, Tensor]:
    """Of LLaVA: (t, h, w) of the free tokens of its grid ``[N, 3]``, and which are free ``[n]``."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    kept = int(config.vision_feature_select_strategy == "full")
    free = torch.ones(side * side + kept, dtype=torch.bool)
    free[:kept] = False
    return grid(1, side, side), free


def tiled(
    config: Any, size: tuple[int, int], shape: Callable[..., Any], unpad: Callable[..., Any],
    most: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of LLaVA-NeXT: a thumbnail, and the full picture with a newline behind each row.

    Args:
        config: of the model.
        size: of the picture, (height, width).
        shape: ``get_anyres_image_grid_shape`` of transformers.
        unpad: its ``unpad_image``, which cuts off what the crops were filled up with.
        most: crops whose tokens the full picture has at most; one of more is interpolated
            (LLaVA-OneVision). ``None``: any.

    Returns:
        (t, h, w) of the free tokens, ``[N, 3]``, and which tokens are free, ``[n]``.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    whole = torch.zeros(1, rows * side, columns * side)
    height, width = unpad(whole, size).shape[1:]
    if most is not None:
        ratio = math.sqrt(height * width / (most * side**2))
        if ratio > 1.1:  # below that, the model leaves it
            height, width = int(height // ratio), int(width // ratio)
    line = torch.ones(width + 1, dtype=torch.bool)
    line[-1] = False
    full = grid(1, height, width)
    full[:, 0] = 1
    free = torch.cat([torch.ones(side * side, dtype=torch.bool), line.repeat(height)])
    return torch.cat([grid(1, side, side), full]), free


def pooled(config: Any, frames: int) -> tuple[Tensor, Tensor]:
    """Of LLaVA-OneVision: (t, h, w) of a clip, each frame halved, and a newline behind the last.

    Returns:
        (t, h, w) of the free tokens, ``[N, 3]``, and which tokens are free, ``[n]``.
    """
    side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    pos = grid(frames, side, side)
    return pos, torch.arange(len(pos) + 1) < len(pos)


def _tile(config: Any) -> tuple[int, int, int]:
    """Of InternVL: rows and columns of the patches of a tile, and the side of a token's block."""
    (height, width), (down, across) = (
        config.vision_config.image_size,
        config.vision_config.patch_size,
    )
    return height // down, width // across, round(1 / config.downsample_ratio)


def tiles(config: Any, count: int) -> Tensor:
    """Of InternVL: (t, h, w) tile by tile, ``[N, 3]``; ``t`` is the number of the tile."""
    rows, columns, side = _tile(config)
    return grid(count, rows // side, columns // side)


def blocks(config: Any) -> Tensor:
    """Of InternVL: the patches of a tile that each of its tokens is made of, ``[N, s * s]``."""
    rows, columns, side = _tile(config)
    parts = torch.arange(rows * columns).view(rows // side, side, columns // side, side)
    return parts.transpose(1, 2).reshape(-1, side * side)


def merged(thw: Tensor, merge: int) -> Tensor:
    """Of Qwen-VL: (t, h, w) of the blocks of patches that are one token each, ``[N, 3]``."""
    t, h, w = thw.tolist()
    return grid(t, h // merge, w // merge)


def to_digits(values: Tensor) -> Tensor:
    """Whole numbers below 65,536 as two digits to the base 256, which bfloat16 holds exactly.

    Args:
        values: ``[n, 3]``.

    Returns:
        ``[n, 6]``: high digits, then low ones.
    """
    return torch.cat([values // 256, values % 256], dim=1)


def from_digits(digits: Tensor) -> Tensor:
    """Undo :func:`to_digits`: int64 ``[n, 3]``."""
    whole = digits.round().long()
    return whole[:, :3] * 256 + whole[:, 3:]
