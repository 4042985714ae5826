# SPDX-License-Identifier: Apache-2.0
"""What heads are given: tokens, which of them are real, and how many patches each stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.errors import ConfigError


def check_tokens(name: str, x: Tensor, dim: int) -> None:
    """Raise ``ConfigError`` unless ``x`` is [B, N, dim] with at least one token."""
    if x.ndim != 3 or x.shape[-1] != dim or x.shape[1] == 0:
        raise ConfigError(f"{name} takes tokens [B, N, {dim}], N at least 1; got {list(x.shape)}.")


def score_bias(x: Tensor, mask: Tensor | None, sizes: Tensor | None) -> Tensor | None:
    """What is added to the scores of tokens before a softmax, [B, N]; None for nothing.

    Args:
        x: tokens [B, N, D].
        mask: bool [B, N], False for padding.
        sizes: [B, N], how many patches a merged token stands for: it counts as so many.
    """
    for name, given in (("mask", mask), ("sizes", sizes)):
        if given is not None and given.shape != x.shape[:2]:
            raise ConfigError(f"{name} must be {list(x.shape[:2])}, one entry per token; got "
                              f"{list(given.shape)}.")  # fmt: skip
    bias = None if sizes is None else sizes.to(x.dtype).log()
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        raise ConfigError(f"mask must be bool, False for padding; got {mask.dtype}.")
    bias = x.new_zeros(x.shape[:2]) if bias is None else bias
    return bias.masked_fill(~mask, -torch.inf)
