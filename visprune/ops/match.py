# SPDX-License-Identifier: Apache-2.0
"""ToMe's matching as pairs: who merges, into whom, and who is left (see ``visprune.ops``)."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.errors import BudgetError, ConfigError
from visprune.kernels.common.precision import outside_autocast
from visprune.kernels.reduce_tokens.op import alternate_cosines
from visprune.ops.check import floating
from visprune.ops.reduce import take_rows


def bipartite_pairs(metric: Tensor, r: int, prefix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's bipartite soft matching (arXiv 2210.09461) on the patches behind ``prefix`` tokens.

    The same rule as :func:`visprune.ops.bipartite_match` on the whole sequence, whose first
    ``prefix`` tokens (class, distillation, registers) neither merge nor take others; they only
    shift which patches are even. Returned as pairs, what a merge needs can be picked row by row,
    without a search for it. Plain PyTorch on every device, so that a compiler can fuse it: the
    scores of half the tokens with the other half are small beside the layer's own attention.

    Args:
        metric: [B, N, C] of the patches, e.g. keys averaged over heads.
        r: pairs to merge, at most ``N // 2``.
        prefix: tokens before the patches.

    Returns:
        ``index`` int64 [B, N - r], the patch that each slot stands for, in the official order: kept
        even tokens (by position where there is a prefix, else by falling similarity), then odd
        ones. ``source`` int64 [B, r], the patches that merge away, best pair first; ``slot`` int64
        [B, r], where each goes. Ties keep the lower index.

    Raises:
        BudgetError: ``r`` is negative or above ``N // 2``.
        ConfigError: a wrong shape or dtype.
    """
    name = "bipartite_pairs"
    if metric.ndim != 3:
        raise ConfigError(f"{name}: metric must be [B, N, C]; got {list(metric.shape)}.")
    floating(name, metric=metric)
    count = metric.shape[1]
    if not 0 <= r <= count // 2:
        raise BudgetError(f"{name}: r must be in 0..{count // 2} (half of {count}); got {r}.")
    with outside_autocast(metric.device.type):
        scores = alternate_cosines(metric.detach(), prefix % 2)  # [B, evens, odds]
    # A maximum with its place, of every row, is a parallel region on a CPU however few rows there
    # are; the maximum alone is none, and places are asked of the rows that merge.
    ranked = scores.amax(dim=-1).argsort(dim=1, descending=True, stable=True)
    slot = take_rows(scores, ranked[:, :r]).argmax(dim=-1)
    shift = prefix % 2  # behind an odd prefix the even tokens are the odd patches
    patches = ranked * 2 + shift if shift else ranked * 2
    left = patches[:, r:].sort(dim=1).values if prefix else patches[:, r:]
    odd = torch.arange(1 - shift, count, 2, device=metric.device).expand(metric.shape[0], -1)
    return torch.cat([left, odd], dim=1), patches[:, :r], slot + left.shape[1]
