# SPDX-License-Identifier: Apache-2.0
"""How the tokens of an image encoder attend to its patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune import ops
from visprune.core.signals.base import EncoderLayer, EncoderSeen, EncoderSignal


@dataclass(frozen=True)
class ClsAttention(EncoderSignal):
    """Attention of the class token to the patches, ``[B, H, N]``."""

    requires: ClassVar[tuple[str, ...]] = ("cls_token", "encoder_attention")
    every: ClassVar[bool] = False

    layer: EncoderLayer = "last"

    def read(self, seen: EncoderSeen) -> Tensor:
        """One row of the map, for each head."""
        query, key = seen.attention()
        mask = None if seen.bias is None else seen.bias[:, None, None].to(key.dtype)
        rows = ops.attention_rows(query[:, :, :1], key, scale=seen.scale, mask=mask)
        return rows[:, :, 0, seen.prefix :]

    def macs(self, tokens: int, width: int) -> int:
        """One query, all keys."""
        return tokens * width


@dataclass(frozen=True)
class ReceivedAttention(EncoderSignal):
    """Attention that a patch receives, mean over all queries, class token included: ``[B, H, N]``.

    Needs no class token. Never holds a whole map: queries are taken by parts.
    """

    requires: ClassVar[tuple[str, ...]] = ("encoder_attention", "every_query")

    layer: EncoderLayer = "feature"

    def read(self, seen: EncoderSeen) -> Tensor:
        """Column sums, divided by the number of queries."""
        query, key = seen.attention()
        mask = None if seen.bias is None else seen.bias[:, None, None].to(key.dtype)
        total = ops.column_sums(query, key, scale=seen.scale, mask=mask, reduce="none")
        return total[..., seen.prefix :] / query.shape[2]

    def macs(self, tokens: int, width: int) -> int:
        """All queries, all keys."""
        return tokens * tokens * width


@dataclass(frozen=True)
class EncoderKeys(EncoderSignal):
    """Keys of the patches, mean over heads, ``[B, N, d]``."""

    token_dim: ClassVar[int] = -2
    every: ClassVar[bool] = False

    def read(self, seen: EncoderSeen) -> Tensor:
        """The mean over heads, without gradient: matching has none."""
        return seen.attention()[1].detach()[:, :, seen.prefix :].mean(1)


@dataclass(frozen=True)
class EncoderQueriesKeys(EncoderSignal):
    """Queries and keys of the patches, all heads side by side, ``[B, 2, N, H * d]``."""

    token_dim: ClassVar[int] = -2

    def read(self, seen: EncoderSeen) -> Tensor:
        """Heads in their order; grouped keys repeated to the queries' heads."""
        query, key = seen.attention()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        both = torch.stack([query, key], dim=1)[:, :, :, seen.prefix :]
        return both.transpose(2, 3).flatten(3)


@dataclass(frozen=True)
class WholeClsAttention(EncoderSignal):
    """Attention of the class token to the patches, all heads taken as one, ``[B, N]``.

    Scores are those of the whole width: products of all heads summed, divided by its root.
    """

    requires: ClassVar[tuple[str, ...]] = ("cls_token", "encoder_attention")

    layer: EncoderLayer = "last"

    def read(self, seen: EncoderSeen) -> Tensor:
        """One row of the map of one head."""
        query, key = seen.attention()
        heads = query.shape[1]
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        flat = key.transpose(1, 2).flatten(2)[:, None]
        row = query[:, :, :1].transpose(1, 2).flatten(2)[:, None]
        mask = None if seen.bias is None else seen.bias[:, None, None].to(key.dtype)
        rows = ops.attention_rows(row, flat, scale=seen.scale * heads**-0.5, mask=mask)
        return rows[:, 0, 0, seen.prefix :]

    def macs(self, tokens: int, width: int) -> int:
        """One query, all keys."""
        return tokens * width


@dataclass(frozen=True)
class EncoderLogits(EncoderSignal):
    """Scores before the softmax of class token and patches, mean over heads: ``[B, 1 + N, 1 + N]``.

    Row and column 0 are the class token's; other tokens before the patches are left out. One
    product of the whole width: no map of a single head is ever there.
    """

    requires: ClassVar[tuple[str, ...]] = ("cls_token", "encoder_attention", "every_query")

    def read(self, seen: EncoderSeen) -> Tensor:
        """The products of all heads summed, over their number."""
        query, key = seen.attention()
        heads = query.shape[1]
        key = key.repeat_interleave(heads // key.shape[1], dim=1)

        def shown(x: Tensor) -> Tensor:
            x = torch.cat([x[:, :, :1], x[:, :, seen.prefix :]], dim=2)
            return x.transpose(1, 2).flatten(2).float()

        return shown(query) @ shown(key).transpose(1, 2) * (seen.scale / heads)

    def macs(self, tokens: int, width: int) -> int:
        """All queries, all keys."""
        return tokens * tokens * width
