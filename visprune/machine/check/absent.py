# SPDX-License-Identifier: Apache-2.0
"""The untouched decoder on the tokens that are left: what dropping means for recurrent layers.

There is no key to hide in a state that went from token to token. The decoder is given the shorter
sequence itself, with the positions that its tokens had in the whole one: others were never there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.base import VLMAdapter
from visprune.machine.check.hide import before_layers

Inputs = dict[str, Any]


def decoder_call(adapter: VLMAdapter, inputs: Inputs) -> tuple[Inputs, list[Tensor | None]]:
    """What the untouched decoder is called with, and the mask of each of its layers.

    Layers that are given none, or one of two dimensions, see everything before them.
    """
    seen: Inputs = {}
    masks: list[Tensor | None] = []

    def layer(number: int, module: Any, args: Any, kwargs: Inputs) -> None:
        mask = kwargs.get("attention_mask")
        masks.append(mask if isinstance(mask, Tensor) and mask.dim() == 4 else None)

    def decoder(module: Any, args: Any, kwargs: Inputs) -> None:
        merged = adapter.embedded(args, kwargs, _unheard) if adapter.merges_inside else kwargs
        seen.update(merged)

    handle = adapter.language_model.register_forward_pre_hook(decoder, with_kwargs=True)
    try:
        with before_layers(adapter.layers, layer):
            adapter.model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen, masks


def _unheard(kind: str, pictures: object) -> None:
    """Who is told of pictures of an untouched model."""


@contextmanager
def leaving(
    adapter: VLMAdapter, keep: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> Iterator[None]:
    """Let tokens of one row leave at the layers whose ``keep`` ``[S]`` lacks them.

    Those that the first layer lacks are not among what the decoder is called with. ``masks`` are
    the row's own of the whole sequence, ``[1, 1, S, S]``: windows count what was seen.
    """

    def before(number: int, layer: Any, args: Any, kwargs: Inputs) -> Any:
        stays = keep[number][keep[max(0, number - 1)]]  # of what the layer before worked on
        there = keep[number][keep[0]]  # of what the decoder made masks and positions of
        mask, rotary = masks[number], kwargs.get("position_embeddings")
        own = None if mask is None else mask[..., keep[number], :][..., keep[number]]
        changed: Inputs = {"position_ids": None, "attention_mask": own}
        if rotary is not None:
            changed["position_embeddings"] = tuple(part[..., there, :] for part in rotary)
        return (args[0][:, stays], *args[1:]), {**kwargs, **changed}

    with before_layers(adapter.layers, before):
        yield


@torch.no_grad()
def absent_logits(adapter: VLMAdapter, inputs: Inputs, keep: Sequence[Tensor]) -> Tensor:
    """Logits ``[B, S, V]`` of the untouched decoder on the tokens that ``keep`` has, row by row.

    Args:
        adapter: the model family.
        inputs: what the model takes, with a padding mask ``[B, S]``.
        keep: tokens that each layer works on, ``[B, S]`` bool.

    Returns:
        Zero where a token is gone.
    """
    call, masks = decoder_call(adapter, inputs)
    embeds = call["inputs_embeds"]
    ids = call.get("position_ids")
    if ids is None:
        ids = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
    ids = ids.expand(*ids.shape[:-2], len(embeds), -1)
    rows = []
    for row, valid in enumerate(inputs["attention_mask"].bool().to(embeds.device)):
        own = [one[row].to(embeds.device) & valid for one in keep]
        first = own[0]
        given = {
            "inputs_embeds": embeds[row : row + 1, first],
            "position_ids": ids[..., row : row + 1, first],
            "attention_mask": torch.ones(
                1, int(first.sum()), dtype=torch.long, device=embeds.device
            ),
        }
        seen = [None if mask is None else mask[row : row + 1] for mask in masks]
        with leaving(adapter, own, seen):
            hidden = adapter.language_model(**given, use_cache=False).last_hidden_state[0]
        logits = adapter.head(hidden)
        out = logits.new_zeros(len(valid), logits.shape[-1])
        out[own[-1]] = logits
        rows.append(out)
    return torch.stack(rows)
