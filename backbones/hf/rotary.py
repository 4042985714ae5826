# SPDX-License-Identifier: Apache-2.0
"""Whether an attention module turns whole heads, half against half, as Llama does."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def turns_halves(attention: Any, head: int) -> bool:
    """Ask the function that the module's own file applies rotary embeddings with.

    Args:
        attention: the module.
        head: its head dimension.
    """
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None or head % 2:
        return False
    made = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 2, head, generator=made)
    angle = torch.randn(1, 2, head // 2, generator=made)
    cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
    try:
        found = apply(x, x, cos, sin)[0]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    half = head // 2
    wanted = x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
    return isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, wanted)
