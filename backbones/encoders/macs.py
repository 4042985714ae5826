# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds of a whole model, and of an encoder outside its layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visprune.backbones.cost.matrices import matrix_weights


def embedding_macs(embed: Any, grid: tuple[int, ...]) -> int:
    """Patch embedding of one picture of ``grid`` patches; a convolutional stem is counted whole."""
    proj = getattr(embed, "proj", embed)
    if isinstance(proj, nn.Conv2d) and not hasattr(embed, "backbone"):
        return math.prod(grid) * proj.weight.numel()
    ratio = embed.feat_ratio(as_scalar=False)
    size = [side * step for side, step in zip(grid[-2:], ratio, strict=True)]
    stem: Any = _bare(embed).eval()
    stem.strict_img_size = False
    dtype = next(stem.parameters()).dtype
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stem(torch.empty(1, 3, *size, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2


def _bare(module: nn.Module) -> nn.Module:
    """A module on shapes alone, without what is hung on it.

    A deep copy would take the hooks along, and with them the method in force and the whole model,
    and the copied hooks would run.
    """
    own = copy.copy(module)
    inside = vars(own)
    inside.pop("forward", None)  # of the instance: a hook too
    for name, value in tuple(inside.items()):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            inside[name] = type(value)()
    inside["_parameters"] = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    inside["_buffers"] = {
        name: None if b is None else b.to("meta") for name, b in module._buffers.items()
    }
    inside["_modules"] = {
        name: None if m is None else _bare(m) for name, m in module._modules.items()
    }
    return own


@torch.no_grad()
def counted_macs(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Multiply-adds of one picture: every matrix product, convolution and attention that runs.

    Counted on shapes alone, on a copy without data: before 2.15, torch counts fused attention on a
    CPU as nothing.

    Args:
        model: A model without a method in force; it stays as it is.
        size: Channels, height, width.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    dtype = next(p.dtype for p in shadow.parameters() if p.is_floating_point())
    with FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, *size, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2


def head_macs(heads: Iterable[Any], pool: Any, tokens: int) -> int:
    """Classifier heads, and attention pooling over ``tokens`` tokens."""
    total = sum(matrix_weights(head) for head in heads if head is not None)
    if pool is None:
        return total
    once = matrix_weights(pool)
    if hasattr(pool, "kv"):
        each = matrix_weights(pool.kv)
        return total + once + (tokens - 1) * each + 2 * tokens * pool.kv.in_features
    return total + once + 2 * tokens * tokens * pool.num_heads * pool.head_dim
