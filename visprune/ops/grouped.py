# SPDX-License-Identifier: Apache-2.0
"""Ranks inside groups: crops of a picture, windows, frames (see ``visprune.ops``)."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.errors import ConfigError


def rank_within(score: Tensor, group: Tensor) -> Tensor:
    """The place of each token among those of its group, by falling score.

    Args:
        score: [B, N]. Ties keep the lower index.
        group: int64 [B, N], the number of each token's group.

    Returns:
        int64 [B, N], 0 for the best of a group.

    Raises:
        ConfigError: the shapes differ.
    """
    if score.ndim != 2 or score.shape != group.shape:
        raise ConfigError(
            f"rank_within: score and group must be [B, N] alike; got {list(score.shape)} and "
            f"{list(group.shape)}."
        )
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    sorted_group = group.gather(1, order)
    steps = torch.arange(score.shape[1], device=score.device).expand_as(order)
    first = torch.ones_like(order, dtype=torch.bool)
    first[:, 1:] = sorted_group[:, 1:] != sorted_group[:, :-1]
    start = torch.where(first, steps, 0).cummax(dim=1).values
    return torch.empty_like(order).scatter_(1, order, steps - start)


def shares(group: Tensor, total: int) -> Tensor:
    """Divide a number of tokens among groups in proportion to their sizes.

    What rounding down leaves goes, one each, to the groups with the largest remainder, the lower
    number first; no group is given more than it has.

    Args:
        group: int64 [B, N], the number of each token's group, from 0.
        total: to divide, at most N.

    Returns:
        int64 [B, G], G one more than the largest number.

    Raises:
        ConfigError: ``total`` is negative or above N.
    """
    batch, count = group.shape
    if not 0 <= total <= count:
        raise ConfigError(f"shares: total must be in 0..{count}; got {total}.")
    size = torch.zeros(batch, int(group.max()) + 1, dtype=torch.long, device=group.device)
    size = size.scatter_add(1, group, torch.ones_like(group))
    quota = size * total // max(1, count)
    rest = size * total - quota * count
    order = rest.argsort(dim=1, descending=True, stable=True)
    more = torch.arange(size.shape[1], device=group.device) < total - quota.sum(1, keepdim=True)
    return quota.scatter_add(1, order, more.long())
