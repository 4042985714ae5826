# SPDX-License-Identifier: Apache-2.0
"""All that a decoder layer holds of a sample, and where its tokens are in it.

For rules that compare visual tokens with the text, or weigh them among all tokens: slot numbers
(-1 in padding) say which entries of a sample's tensors are whose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visprune.core.signals.base import DecoderSeen, DecoderSignal


@dataclass(frozen=True)
class Slots(DecoderSignal):
    """The slots of the visual tokens, ``[B, N]`` int64."""

    def read(self, seen: DecoderSeen) -> Tensor:
        """Numbers."""
        count = seen.valid.shape[1]
        return torch.arange(count, device=seen.valid.device).expand(len(seen.valid), -1)


@dataclass(frozen=True)
class TextSlots(DecoderSignal):
    """The slots of tokens of the prompt, -1 at the front of shorter rows, ``[B, R]`` int64.

    Attributes:
        which: its text; the text behind the first visual token; or all, visual tokens too.
    """

    token_dim: ClassVar[int | None] = None

    which: Literal["text", "after_image", "all"] = "after_image"

    def read(self, seen: DecoderSeen) -> Tensor:
        """Numbers."""
        return seen.queries(self.which)


@dataclass(frozen=True)
class RotaryTables(DecoderSignal):
    """Cosines and sines of the rotary embedding at the positions of all slots, ``[B, 2, P, d]``.

    Of a model whose positions have several axes, the mean of their tables.
    """

    token_dim: ClassVar[int | None] = None

    def read(self, seen: DecoderSeen) -> Tensor:
        """As the model makes them."""
        if seen.rotary is None:
            raise LookupError("This decoder has no rotary embedding.")
        tables = [x.mean(0) if x.dim() == 4 else x for x in seen.rotary()]
        both = torch.stack(tables, dim=1)
        return both.expand(len(seen.valid), -1, -1, -1)


@dataclass(frozen=True)
class SampleKeysValues(DecoderSignal):
    """Keys (with the rotary embedding) and values of all slots, ``[B, 2, Hk, P, d]``."""

    token_dim: ClassVar[int | None] = None

    def read(self, seen: DecoderSeen) -> Tensor:
        """Of the new slots."""
        if seen.key is None or seen.value is None:
            raise LookupError("SampleKeysValues uses attention.")
        return torch.stack([seen.key, seen.value], dim=1)[:, :, :, seen.stored :]
