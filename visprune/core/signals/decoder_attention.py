# SPDX-License-Identifier: Apache-2.0
"""How the prompt attends to its visual tokens, in one decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visprune.core.signals.base import DecoderLayer, DecoderSeen, DecoderSignal

Raters = Literal["text", "after_image", "all"]


@dataclass(frozen=True)
class LastQueryAttention(DecoderSignal):
    """Attention of the prompt's last token to the visual tokens, ``[B, H, N]``."""

    reads_values: ClassVar[bool] = False

    def read(self, seen: DecoderSeen) -> Tensor:
        """One row of the map, for each head."""
        return seen.new(seen.rows(seen.queries("last"))[:, :, 0])


@dataclass(frozen=True)
class AttentionRows(DecoderSignal):
    """Attention of many tokens of the prompt to the visual tokens, ``[B, H, R, N]``.

    Rows of a sample with fewer queries are zero at the front. A subclass may choose other queries.

    Attributes:
        raters: whose rows.
    """

    reads_values: ClassVar[bool] = False

    raters: Raters = "after_image"

    def queries(self, seen: DecoderSeen) -> Tensor:
        """Slots of the queries, -1 in padding, ``[B, R]``."""
        return seen.queries(self.raters)

    def read(self, seen: DecoderSeen) -> Tensor:
        """Rows of the map, for each head."""
        at = self.queries(seen)
        rows = seen.new(seen.rows(at))
        return rows.masked_fill((at < 0).to(rows.device)[:, None, :, None], 0.0)


@dataclass(frozen=True)
class DecoderReceivedAttention(DecoderSignal):
    """Attention that visual tokens receive, summed over queries of the prompt, ``[B, H, N]``.

    Attributes:
        raters: which queries; taken by parts, so that no whole map is held.
    """

    reads_values: ClassVar[bool] = False

    raters: Raters = "all"

    def read(self, seen: DecoderSeen) -> Tensor:
        """Column sums over the chosen queries."""
        at = seen.queries(self.raters)
        total: Tensor | None = None
        for part in at.split(256, dim=1):
            rows = seen.new(seen.rows(part))
            real = (part >= 0).to(rows.device)[:, None, :, None]
            summed = rows.masked_fill(~real, 0.0).sum(2)
            total = summed if total is None else total + summed
        assert total is not None, "a prompt has at least one token"
        return total


@dataclass(frozen=True)
class VisualShare(DecoderSignal):
    """The share of the text's attention that goes to all visual tokens of the sample, ``[B]``.

    Mean over heads and over the text after the first visual token.
    """

    token_dim: ClassVar[int | None] = None
    reads_values: ClassVar[bool] = False

    layer: DecoderLayer = "previous"

    def read(self, seen: DecoderSeen) -> Tensor:
        """Rows of the text, summed over visual slots."""
        at = seen.queries("after_image")
        rows = seen.new(seen.rows(at))
        visual = seen.visual.to(rows.device)[:, None, None]
        mass = (rows * visual).sum(-1).mean(1)  # [B, R]
        real = (at >= 0).to(mass.device)
        return torch.where(real, mass, 0.0).sum(1) / real.sum(1).clamp(min=1)
