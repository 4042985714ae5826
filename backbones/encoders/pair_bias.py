# SPDX-License-Identifier: Apache-2.0
"""What attention adds to the score of each pair of places, for the tokens that are left."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.backbones.encoders.base import ShownQK


def left(table: Tensor, at: Tensor, prefix: int) -> Tensor:
    """Entries of the tokens that are left.

    Args:
        table: ``[H, T, T]``, ``[1, H, T, T]`` or, of every picture, ``[B, H, T, T]``; T counts the
            prefix. One row for all queries, ``[B, H, 1, T]``, stays one.
        at: place in the grid of each patch that is left, ``[B, N]``.
        prefix: tokens before the patches.

    Returns:
        ``[B, H, K, K]`` (or ``[B, H, 1, K]``), K = prefix + N.
    """
    first = torch.arange(prefix, device=at.device).expand(at.shape[0], -1)
    keys = torch.cat([first, at + prefix], dim=1)
    queries = keys if table.shape[-2] > 1 else torch.zeros_like(keys[:, :1])
    if table.dim() == 4 and table.shape[0] > 1:
        picture = torch.arange(at.shape[0], device=at.device)[:, None, None]
        of_pairs = table.permute(0, 2, 3, 1)[picture, queries[:, :, None], keys[:, None, :]]
        return of_pairs.permute(0, 3, 1, 2).contiguous()
    table = table.flatten(0, -3)
    return table[:, queries[:, :, None], keys[:, None, :]].transpose(0, 1).contiguous()


def record_class_row(
    record: ShownQK, query: Tensor, key: Tensor, scale: float, added: Tensor | None
) -> None:
    """Show queries and keys ``[B, H, T, d]``, or the first token's query ``[B, H, 1, d]`` alone.

    What is ``added`` to its scores, ``[1 or B, H, T, T]``, goes with the keys, as one feature more
    that the query has as ``1 / scale``; of one query there is room for it.
    """
    if added is not None:
        query = query[:, :, :1]
        row = added[..., :1, :].transpose(-1, -2).expand(*key.shape[:3], 1)
        one = torch.full_like(query[..., :1], 1.0 / scale)
        query, key = torch.cat([query, one], dim=-1), torch.cat([key, row.to(key.dtype)], dim=-1)
    record(query, key, scale)
