# SPDX-License-Identifier: Apache-2.0
"""What attention on a grid inside a ViT of timm needs: the grid of the call, its prefix tokens."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from visprune.errors import ConfigError


class Grid:
    """The grid of patches of the call that is running; a forward hook on the patch embedding."""

    def __init__(self, num_prefix: int, size: tuple[int, int] = (0, 0)) -> None:
        self.num_prefix = num_prefix
        self.size = size

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Read the grid of the images that the embedding was given."""
        height, width = args[0].shape[-2:]
        self.size = tuple(module.dynamic_feat_size((height, width)))

    def check(self, x: Tensor) -> tuple[int, int]:
        """(height, width) in patches; raises ``ConfigError`` where ``x`` [B, N, C] is no grid."""
        height, width = self.size
        if x.shape[1] != self.num_prefix + height * width:
            raise ConfigError(
                f"Attention on a grid needs all tokens: {self.num_prefix} + {height} x {width}; "
                f"got {x.shape[1]}. Token reduction and patch dropout cannot be combined with it."
            )
        return height, width


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain attention of [B, n, heads, d] to [B, m, heads, d]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
