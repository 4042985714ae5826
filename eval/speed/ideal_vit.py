# SPDX-License-Identifier: Apache-2.0
"""A vision transformer on fewer tokens from each layer on, without anything that chooses them.

What a reduction can reach on this machine: the dense model's own operations on sequences of the
same lengths. On few tokens they are less efficient per multiply-add, so it lies below what the
ratio of multiply-adds promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

__all__ = ["forward_shortened", "has_ideal"]


def has_ideal(model: Any) -> bool:
    """Whether the model is made of timm's plain blocks, attention first and MLP second."""
    return isinstance(model, VisionTransformer) and all(type(b) is Block for b in model.blocks)


def forward_shortened(
    model: Any, pixels: Tensor, attended: Sequence[int], mapped: Sequence[int]
) -> Tensor:
    """The forward of a timm ViT whose patches are cut to the first so many, layer by layer.

    Args:
        model: see :func:`has_ideal`.
        pixels: ``[B, 3, H, W]``.
        attended: patches that enter the attention of each layer.
        mapped: patches that enter the MLP of each layer.

    Returns:
        Logits ``[B, classes]`` (of no meaning; they cost what a reduced model's do).
    """
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))
    for block, before, inside in zip(model.blocks, attended, mapped, strict=True):
        x = _first(x, prefix + before)
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x = _first(x, prefix + inside)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return model.forward_head(model.norm(x))


def _first(x: Tensor, count: int) -> Tensor:
    return x if x.shape[1] == count else x[:, :count].contiguous()
