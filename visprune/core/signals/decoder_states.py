# SPDX-License-Identifier: Apache-2.0
"""Tensors of a decoder layer: states, queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visprune.core.signals.base import DecoderLayer, DecoderSeen, DecoderSignal

Uses = Literal["attention", "states", "sequence"]


@dataclass(frozen=True)
class HiddenStates(DecoderSignal):
    """Visual tokens as they entered the previous layer, ``[B, N, D]``.

    What enters the stage itself are the tokens' ``features``.
    """

    uses: ClassVar[Uses] = "states"
    token_dim: ClassVar[int | None] = -2

    def read(self, seen: DecoderSeen) -> Tensor:
        """As they are."""
        return seen.hidden


@dataclass(frozen=True)
class FinalNormStates(DecoderSignal):
    """What enters the stage, behind the norm of the decoder's end, ``[B, N, D]``."""

    uses: ClassVar[Uses] = "sequence"
    token_dim: ClassVar[int | None] = -2

    def read(self, seen: DecoderSeen) -> Tensor:
        """The decoder's own norm."""
        if seen.norm is None:
            raise LookupError("This decoder has no norm behind its last layer.")
        return seen.norm(seen.hidden)


@dataclass(frozen=True)
class QueriesKeys(DecoderSignal):
    """Queries and keys of the visual tokens, all heads: ``[B, H + Hk, N, d]``, queries first.

    Attributes:
        rotary: with the rotary embedding, or before it.
    """

    token_dim: ClassVar[int | None] = -2
    reads_values: ClassVar[bool] = False

    layer: DecoderLayer = "own"
    rotary: bool = True

    @property
    def unrotated(self) -> bool:
        """Before the rotary embedding."""
        return not self.rotary

    def read(self, seen: DecoderSeen) -> Tensor:
        """Of the new slots."""
        if seen.query is None or seen.key is None:
            raise LookupError("QueriesKeys uses attention.")
        return torch.cat([seen.query, seen.key[:, :, seen.stored :]], dim=1)


@dataclass(frozen=True)
class KeysValues(DecoderSignal):
    """Keys (with the rotary embedding) and values, all heads: ``[B, 2, Hk, N, d]``."""

    token_dim: ClassVar[int | None] = -2

    def read(self, seen: DecoderSeen) -> Tensor:
        """Of the new slots."""
        if seen.key is None or seen.value is None:
            raise LookupError("KeysValues uses attention.")
        both = torch.stack([seen.key, seen.value], dim=1)
        return both[:, :, :, seen.stored :]
