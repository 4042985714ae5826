# SPDX-License-Identifier: Apache-2.0
"""Some tokens stay and one more is made of all others; how many, an outlier test may say."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.core import Selection


def outliers(score: Tensor, *, joint: bool = False) -> Tensor:
    """How many of each image's scores ``[B, N]`` lie above ``Q3 + 1.5 (Q3 - Q1)``, at least one.

    Args:
        score: of tokens.
        joint: quartiles of the whole batch, whose mean number all images are given.

    Returns:
        int64 ``[B]``.
    """
    batch, count = score.shape
    rows = score.reshape(1, -1) if joint else score
    # torch.quantile interpolates as numpy's default does, but takes at most 2**24 numbers.
    low, high = torch.quantile(rows, torch.tensor([0.25, 0.75]).to(rows), dim=1)
    above = (rows > (high + 1.5 * (high - low))[:, None]).sum(1)
    if joint:
        above = above.new_tensor([int(count * (int(above) / (batch * count)))] * batch)
    return above.clamp(min=1)


def with_leftover(
    listed: Tensor,
    score: Tensor,
    weight: Tensor,
    *,
    raster: bool = True,
    leftover: bool = True,
    source: Tensor | None = None,
    slot: Tensor | None = None,
) -> Selection:
    """Keep some tokens, and append one that is made of the others.

    Args:
        listed: tokens that stay, ``[B, M]``, -1 behind an image's last.
        score: ``[B, N]``; the token that is appended stands for the best of those that go.
        weight: of every token in the one that is appended, ``[B, N]``.
        raster: list those that stay by their place, or as they are given.
        leftover: whether one is appended at all (never where all stay).
        source: tokens that come to kept ones besides, ``[B, E]``, weighed the same way.
        slot: the place in ``listed`` of the kept token that they come to, -1: of none.
    """
    batch, count = score.shape
    steps, there = torch.arange(count, device=score.device), listed >= 0
    kept = there.sum(dim=1, keepdim=True)
    gone = others(listed, count)
    place = torch.arange(listed.shape[1], device=score.device).expand_as(listed)
    if raster:
        new = listed.where(there, count).argsort(dim=1, stable=True)
        listed, place = listed.gather(1, new), place.scatter(1, new, place)
    more = gone.any(dim=1, keepdim=True) & leftover
    head = score.masked_fill(~gone, float("-inf")).argmax(dim=1, keepdim=True)
    index = torch.nn.functional.pad(listed, (0, 1), value=-1)
    index = index.scatter(1, kept, head.where(more, -1))
    total = kept + more
    index = index[:, : int(total.max())]
    appended = torch.arange(index.shape[1], device=score.device) == kept
    own = weight.gather(1, index.clamp(min=0))
    own = torch.where(appended & more, own, torch.ones_like(own))
    tokens = steps.expand(batch, -1)
    to = kept.where(gone & more & (tokens != head), -1)
    if source is not None and slot is not None:
        tokens = torch.cat([tokens, source], dim=1)
        to = torch.cat([to, place.gather(1, slot.clamp(min=0)).where(slot >= 0, -1)], dim=1)
    return Selection(
        index, count, own, tokens, to, weight.gather(1, tokens),
        gaps=True, overlaps=source is not None, count=total[:, 0],
    )  # fmt: skip


def others(listed: Tensor, count: int) -> Tensor:
    """Which of ``count`` tokens are not in ``listed`` ``[B, M]``, ``[B, N]``.

    Where a token is listed twice, the first of the others make up for it, as in PruMerge's code: as
    many are named as the list leaves of ``count``.
    """
    there = listed >= 0
    gone = torch.ones(len(listed), count + 1, dtype=torch.bool, device=listed.device)
    gone = gone.scatter(1, listed.where(there, count), False)[:, :count]
    behind = gone.flip(1).cumsum(1).flip(1)
    return gone & (behind <= count - there.sum(1, keepdim=True))


def ranked(score: Tensor, kept: Tensor) -> Tensor:
    """The ``kept`` ``[B]`` best of ``score`` ``[B, N]``, best first, -1 behind an image's last."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, : int(kept.max())]
    steps = torch.arange(order.shape[1], device=score.device)
    return order.where(steps < kept[:, None], -1)
