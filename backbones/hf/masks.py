# SPDX-License-Identifier: Apache-2.0
"""Attention masks of one decoder layer, made from what its own slots hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

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


def masks_by_kind(
    config: Any, hidden: Tensor, mask: Any, cache: Any, kinds: set[str]
) -> dict[str, Any]:
    """The masks that a decoder with several kinds of layers makes of a call, by kind.

    Args:
        config: the text config.
        hidden: ``[B, S, D]``.
        mask: what the decoder is given: already a dict, or two- or four-dimensional, or ``None``.
        cache: the cache, before the call.
        kinds: of its layers.
    """
    if not isinstance(mask, dict):
        mask = create_masks_for_generate(
            config=config, inputs_embeds=hidden, attention_mask=mask, position_ids=None,
            **{CACHE_ARGUMENT: cache},
        )  # fmt: skip
    return mask if isinstance(mask, dict) else dict.fromkeys(kinds, mask)


def window_mask(
    given: Tensor | None,
    query: Tensor,
    old: Tensor,
    old_valid: Tensor,
    rows: Tensor,
    real: Tensor,
    *,
    window: int | None,
    additive: torch.dtype | None,
) -> Tensor:
    """The mask of a layer whose queries may see a window, by places and not by slots.

    Args:
        given: the mask that the untouched call has, ``[B, 1 or H, S, >= S]``: its last S columns
            are the new tokens. ``None``: causal, and no window is shorter.
        query: places of the query slots in all that was seen, ``[B, Q]``.
        old: places of the stored slots, ``[B, C]``.
        old_valid: which of them may be attended to, ``[B, C]``.
        rows: places of the query slots within the call, ``[B, Q]``.
        real: which query slots hold a token, ``[B, Q]``.
        window: how many places back a query sees, itself among them; ``None``: all.
        additive: dtype of a mask that is added to scores; ``None``: a bool mask.

    Returns:
        ``[B, 1 or H, Q, C + Q]``.
    """
    seen = old_valid[:, None] & torch.ones_like(query, dtype=torch.bool)[..., None]
    if window is not None:
        seen = seen & (old[:, None] > query[..., None] - window)
    if given is None:
        new = real[:, None] & (query[:, None] <= query[..., None])
        if window is not None:
            new = new & (query[:, None] > query[..., None] - window)
        new = _as(new[:, None], additive)
    else:
        own = given[..., -int(given.shape[-2]) :]
        new = gather_mask(own, rows, rows, real)
    seen = _as(seen[:, None], additive).to(new.device)
    return torch.cat([seen.expand(-1, new.shape[1], -1, -1), new], dim=-1)


def _as(visible: Tensor, additive: torch.dtype | None) -> Tensor:
    if additive is None:
        return visible
    out = torch.zeros(visible.shape, dtype=additive, device=visible.device)
    return out.masked_fill(~visible, torch.finfo(additive).min)


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


def biased_mask(mask: Tensor | None, bias: Tensor, queries: int) -> Tensor:
    """A mask with a bias of each key added.

    Args:
        mask: ``[B or 1, H or 1, Q or 1, K]``, bool (true = visible) or additive; ``None``: causal
            over slots, the queries being the last of them.
        bias: ``[B, K]``, of the dtype of the result.
        queries: Q.

    Returns:
        Additive, ``[B, H or 1, Q or 1, K]``.
    """
    row = bias[:, None, None]
    if mask is None:
        keys = bias.shape[1]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device)
        mask = mask.tril(keys - queries)[None, None]
    if mask.dtype != torch.bool:
        return mask.to(bias.device) + row.to(mask.dtype)
    visible = mask.to(bias.device)
    shape = torch.broadcast_shapes(row.shape, visible.shape)
    return row.expand(shape).masked_fill(~visible, torch.finfo(bias.dtype).min)
