# SPDX-License-Identifier: Apache-2.0
"""Turn queries and keys of one decoder layer into what a stage asked to be shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visprune import ops
from visprune.backbones.hf.cache import CACHE_ARGUMENT, stored_length
from visprune.core.budget import Stage
from visprune.machine.decoder.forward import Forward


def decoder_attention(
    stage: Stage, fwd: Forward, layer: int
) -> Callable[[Tensor, Tensor, float], None]:
    """Make the callback that turns queries and keys of ``layer`` into what ``stage`` needs.

    It leaves in ``fwd.attention``: ``[B, H, P]`` rows of the last query, or for ``text_queries``
    the share of the text's attention that goes to visual tokens, ``[B]``.
    """

    @torch.no_grad()
    def record(query: Tensor, key: Tensor, scale: float) -> None:
        table = fwd.table
        stored = key.shape[2] - table.num_slots
        valid = fwd.visible(layer, table)
        if stage.needs.attention == "last_query":
            at = table.last_valid()[:, None]
        else:
            at = _text_queries(fwd)
        place = at.clamp(min=0).to(query.device)
        chosen = place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        rows = query.gather(2, chosen)
        mask = None if valid is None else valid[:, None, None].to(query.device)
        if fwd.mask4d is not None:
            own = fwd.cut(layer, table).to(query.device)
            wanted = place[:, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
            mask = own.gather(2, wanted)
        attention = ops.attention_rows(
            rows,
            key,
            scale=scale,
            mask=mask,
            query_idx=place + stored,
            causal=True,
        )  # [B, H, R, stored + P]
        fwd.trace.selection_macs += (
            rows.shape[0] * rows.shape[1] * rows.shape[2] * key.shape[2] * key.shape[3]
        )
        if stage.needs.attention == "last_query":
            fwd.attention = attention[:, :, 0]
        else:
            fwd.attention = _visual_share(fwd, attention, at, stored)

    return record


def _text_queries(fwd: Forward) -> Tensor:
    """Slots of the text after the first visual token, per sample, -1 in padding, ``[B, R]``."""
    visual = torch.zeros_like(fwd.table.valid)
    for image in fwd.images:
        visual[image.layout.row, image.slots] = True
        visual[image.layout.row, image.fixed] = True
    text = fwd.table.valid & ~visual & (visual.long().cumsum(1) > 0)
    width = max(1, int(text.sum(1).max()))
    steps = torch.arange(text.shape[1], device=text.device)
    return torch.where(text, steps, -1).topk(width, dim=1).values.flip(1)


def _visual_share(fwd: Forward, attention: Tensor, at: Tensor, stored: int) -> Tensor:
    visual = torch.zeros_like(fwd.table.valid)
    for image in fwd.images:
        visual[image.layout.row, image.slots] = True
        visual[image.layout.row, image.fixed] = True
    visual = visual.to(attention.device)
    mass = (attention[..., stored:] * visual[:, None, None]).sum(-1).mean(1)  # [B, R]
    real = (at >= 0).to(mass.device)
    return (mass * real).sum(1) / real.sum(1).clamp(min=1)


def own_attention(
    stage: Stage,
    fwd: Forward,
    layer: int,
    hidden: Tensor,
    module: Any,
    rotary: Any,
    capture: Callable[..., None],
) -> None:
    """Read the attention that a layer is about to have, from its own projections."""
    record = decoder_attention(stage, fwd, layer)

    def with_cache(query: Tensor, key: Tensor, scale: float) -> None:
        if fwd.cache is not None and stored_length(fwd.cache, layer):
            key = torch.cat([fwd.cache.layers[layer].keys.to(key), key], dim=2)
        record(query, key, scale)

    with torch.no_grad():
        capture(
            module.self_attn,
            with_cache,
            hidden_states=module.input_layernorm(hidden),
            attention_mask=None,
            position_embeddings=rotary,
            **{CACHE_ARGUMENT: None},
        )
    config = fwd.adapter.text_config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    fwd.trace.selection_macs += hidden.shape[0] * hidden.shape[1] * config.hidden_size * width
