# SPDX-License-Identifier: Apache-2.0
"""What a layer deep in the decoder shows in a first pass, before the projector's stages choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core.signals.base import DecoderSeen, DecoderSignal, DecoderUse


@dataclass(frozen=True)
class AheadSignal(DecoderSignal):
    """Base of the signals for which the prompt is read twice, at a stage at the projector.

    The first pass goes from the embedded prompt, as the stage is given it, to the queries and keys
    of one layer and ends there; a cache of earlier turns is read, and not written. ``run.cost()``
    counts it under ``selection``.

    Attributes:
        at: the layer, 0-based, or a fraction of the depth as of a ``Site``.
    """

    uses: ClassVar[DecoderUse] = "ahead"

    at: int | float = 13 / 32


@dataclass(frozen=True)
class LastQueryLogits(AheadSignal):
    """Products of the prompt's last query with the keys, summed over heads, smoothed, ``[B, N]``.

    Neither scaled nor a softmax; the mean of ``kernel`` neighbours divides by ``kernel`` at both
    ends, too. Neighbours are taken along the whole sequence, text among it, without padding.

    Attributes:
        kernel: odd; 1: no smoothing.
    """

    kernel: int = 5

    def read(self, seen: DecoderSeen) -> Tensor:
        """One row of products."""
        query, key = (x.float() for x in seen.attention())
        last = seen.last.to(query.device)
        rows, heads = torch.arange(len(query), device=query.device), key.shape[1]
        row = query[rows, :, last].unflatten(1, (heads, -1)).sum(2)  # one query for each key head
        product = torch.einsum("bhd,bhld->bl", row, key)
        place = torch.arange(key.shape[2], device=key.device)
        visible = place <= last[:, None] + seen.stored
        mask = None if seen.mask is None else seen.mask(last[:, None])
        if mask is not None:
            lets = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            visible = visible & lets.to(key.device).any(1)[:, 0]
        seen.spent = visible.sum(1) * heads * key.shape[3]
        return seen.new(torch.stack([self._smooth(*x) for x in zip(product, visible, strict=True)]))

    def _smooth(self, product: Tensor, visible: Tensor) -> Tensor:
        """Of one sample, over what stands there without gaps."""
        out = torch.zeros_like(product)
        there = product[visible][None]
        half = self.kernel // 2
        out[visible] = torch.nn.functional.avg_pool1d(there, self.kernel, 1, half)[0]
        return out
