# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a picture come from, by the config of its model, before it is encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.picture import grid
from visprune.core.method import ModelSpec

_AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


def spec_of(config: Any) -> ModelSpec:
    """What methods may know of a model, of its config alone.

    Args:
        config: of transformers, with ``text_config`` and ``vision_config``.
    """
    vision, family = config.vision_config, str(config.model_type)
    clip = vision.model_type == "clip_vision_model"
    layers = getattr(config, "vision_feature_layer", None)
    lacking = {} if clip and isinstance(layers, int) else {
        "encoder_attention": f"attention of the image encoder of {family} is not read there",
        "encoder_features": f"states of the image encoder of {family} are not read there",
    }  # fmt: skip
    return ModelSpec(
        family=family,
        num_layers=int(getattr(config.text_config, "num_hidden_layers", 1)),
        has_cls=clip,
        multi_axis_rope=family in _AXES,
        encoder_refusal="a server runs its image encoder in code of its own",
        lacking=lacking,
    )


def shown_layers(config: Any) -> frozenset[str]:
    """Layers of the image encoder whose attention is read, as signals name them."""
    layer = getattr(config, "vision_feature_layer", None)
    count = getattr(config.vision_config, "num_hidden_layers", 0)
    if config.vision_config.model_type != "clip_vision_model" or not isinstance(layer, int):
        return frozenset()
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
    config: Any, size: tuple[int, int], shape: Callable[..., Any], unpad: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """Of LLaVA-NeXT: a thumbnail, and the full picture with a newline behind each row.

    Args:
        config: of the model.
        size: of the picture, (height, width).
        shape: ``get_anyres_image_grid_shape`` of transformers.
        unpad: its ``unpad_image``, which cuts off what the crops were filled up with.

    Returns:
        (t, h, w) of the free tokens, ``[N, 3]``, and which tokens are free, ``[n]``.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    whole = torch.zeros(1, rows * side, columns * side)
    height, width = unpad(whole, size).shape[1:]
    line = torch.ones(width + 1, dtype=torch.bool)
    line[-1] = False
    full = grid(1, height, width)
    full[:, 0] = 1
    free = torch.cat([torch.ones(side * side, dtype=torch.bool), line.repeat(height)])
    return torch.cat([grid(1, side, side), full]), free


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
