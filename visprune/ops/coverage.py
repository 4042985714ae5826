# SPDX-License-Identifier: Apache-2.0
"""Greedy coverage weighted by saliency (see ``visprune.ops``)."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.errors import BudgetError, ConfigError
from visprune.kernels.common.precision import outside_autocast, wide
from visprune.ops.check import floating, shape

# Gains looked at together: enough to keep the machine busy, few enough to be worth it.
_BLOCK = 32


def greedy_coverage(x: Tensor, weight: Tensor, num_keep: int) -> Tensor:
    """Pick tokens greedily by weight times gain of coverage (SCOPE); exact, no duplicates.

    A set covers token i by its largest cosine to it, at least 0; a token's gain is what it adds to
    the sum over all i. Ties keep the lower index. Gains only fall as the set grows, in floating
    point too, so that an old gain is a bound: of each image only tokens whose bound reaches the
    best gain are looked at again.

    Args:
        x: [B, N, D] features, any length: they are compared by direction.
        weight: [B, N], non-negative.
        num_keep: tokens to keep.

    Returns:
        int64 [B, num_keep] in selection order.

    Raises:
        BudgetError: ``num_keep`` negative or above N.
        ConfigError: a wrong shape or dtype.
    """
    name = "greedy_coverage"
    if x.ndim != 3:
        raise ConfigError(f"{name}: x must be [B, N, D]; got {list(x.shape)}.")
    floating(name, x=x, weight=weight)
    shape(name, "weight", weight, tuple(x.shape[:2]))
    if not 0 <= num_keep <= x.shape[1]:
        raise BudgetError(f"{name}: num_keep must be in 0..{x.shape[1]}; got {num_keep}.")
    picked = []
    with torch.no_grad(), outside_autocast(x.device.type):
        for row, own in zip(x.detach(), weight.detach(), strict=True):
            unit = torch.nn.functional.normalize(wide(row), dim=-1)
            picked.append(_cover(unit @ unit.T, own.to(unit.dtype), num_keep))
    if not picked:
        return torch.zeros(0, num_keep, dtype=torch.long, device=x.device)
    return torch.stack(picked)


def _cover(cosine: Tensor, weight: Tensor, num_keep: int) -> Tensor:
    """Indices in selection order, of one image's cosines [N, N]."""
    count = len(cosine)
    covered = cosine.new_zeros(count)
    bound = weight * cosine.clamp(min=0.0).sum(1)  # gains over the empty set: exact
    fresh = torch.ones(count, dtype=torch.bool, device=cosine.device)
    out = torch.zeros(num_keep, dtype=torch.long, device=cosine.device)
    for step in range(num_keep):
        while True:
            best = bound.argmax()  # the lowest index of the largest
            if bool(fresh[best]):
                break
            stale = bound.masked_fill(fresh, float("-inf"))
            block = stale.topk(min(_BLOCK, count)).indices
            gain = (cosine[block] - covered).clamp(min=0.0).sum(1)
            renewed = weight[block] * gain
            # Of a block that ran out of stale ones, the others stay what they are.
            again = ~fresh[block]
            bound[block] = torch.where(again, renewed, bound[block])
            fresh[block] = True
        out[step] = best
        covered = torch.maximum(covered, cosine[best])
        bound[best] = float("-inf")
        fresh = bound.isinf()  # those picked have no gain to look at again
    return out
