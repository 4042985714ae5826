# SPDX-License-Identifier: Apache-2.0
"""Attention masks of one decoder layer, made from what its own slots hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from visprune.backbones.hf.cache import CACHE_ARGUMENT


class _Stored:
    """Stands for a cache of which only the number of stored slots matters."""

    is_compileable = False
    layers: tuple[()] = ()

    def __init__(self, stored: int) -> None:
        self.stored = stored

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.stored

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.stored

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.stored + query_length, 0


def slot_mask(config: Any, hidden: Tensor, valid: Tensor | None, stored: int) -> Any:
    """The causal mask over slots, in the form that the model's attention implementation takes.

    Args:
        config: the text config (it names the attention implementation).
        hidden: ``[B, Q, D]``, for batch, length, dtype and device.
        valid: which of the stored and new slots may be attended to, ``[B, stored + Q]`` bool;
            ``None`` for all.
        stored: slots already in the layer's cache.

    Returns:
        What ``create_causal_mask`` returns: a 4-D tensor, a 2-D one (FlashAttention), a block mask
        (flex), or ``None`` where plain causal attention says the same.
    """
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=valid,
        position_ids=None,
        **{CACHE_ARGUMENT: _Stored(stored)},
    )


def gather_mask(mask: Tensor, query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    """Cut a user's 4-D mask down to slots.

    Args:
        mask: ``[B or 1, H or 1, S, T]``, bool (true = visible) or additive.
        query: rows of ``mask`` that the query slots hold, ``[B, Q]``.
        key: columns of ``mask`` that the key slots hold, ``[B, P]``.
        valid: key slots that are not padding, ``[B, P]``.

    Returns:
        ``[B, H or 1, Q, P]``.
    """
    batch, heads = query.shape[0], mask.shape[1]
    mask = mask.expand(batch, -1, -1, -1)
    rows = query.to(mask.device)[:, None, :, None].expand(-1, heads, -1, mask.shape[3])
    out = mask.gather(2, rows)
    cols = key.to(mask.device)[:, None, None, :].expand(-1, heads, out.shape[2], -1)
    out = out.gather(3, cols)
    hidden = ~valid.to(mask.device)[:, None, None, :]
    fill = False if out.dtype == torch.bool else torch.finfo(out.dtype).min
    return out.masked_fill(hidden, fill)
