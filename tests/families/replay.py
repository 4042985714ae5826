# SPDX-License-Identifier: Apache-2.0
"""Tokens that are merged: the layers of the untouched model, with the explicit maps between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visprune.core.selection import Selection
from visprune.machine.check.hide import before_layers
from visprune.machine.find import find_adapter

Stages = list[tuple[int, Selection]]


def mapped(
    selection: Selection, stands: Tensor, size: Tensor, free: set[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A choice as a map of slots: ``[K, P]``, the place that each new slot stands at, its size.

    Args:
        selection: of the slots of one picture, in order.
        stands: the place of every slot, ``[P]``.
        size: tokens that every slot stands for, ``[P]``.
        free: places of the picture's tokens.
    """
    eye = torch.eye(len(stands))
    visual = [slot for slot, at in enumerate(stands.tolist()) if at in free]
    sizes = selection.sizes(size[visual][None])[0]
    slots = [(at, 0, at, eye[n], size[n]) for n, at in enumerate(stands.tolist()) if at not in free]
    last = -1
    for rank, (index, row) in enumerate(
        zip(selection.index[0].tolist(), selection.matrix()[0], strict=True)
    ):
        own = int(stands[visual[index]])
        last = max(last, own)  # slots stay in the selection's order
        slots.append((last, rank, own, row @ eye[visual], sizes[rank]))
    slots.sort(key=lambda slot: slot[:2])
    _, _, places, rows, sizes = zip(*slots, strict=True)
    return torch.stack(rows), torch.tensor(places), torch.stack(sizes)


@torch.no_grad()
def replayed(
    model: Any, inputs: dict[str, Any], free: set[int], stages: Stages, *, weighs: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits ``[K, V]`` of a prompt of one picture, and the places that are left of it, ``[K]``.

    A slot sees those before it; where a mask says more (windows, pictures seen both ways), it sees
    what the token of its place sees.

    Args:
        model: untouched, with eager attention: every layer is given the mask of the whole sequence.
        inputs: of one sample, without padding.
        free: places of the picture's tokens, marks left out.
        stages: choices, by the layer that they were made on entering.
        weighs: behind the stages, scores grow by the logarithm of what a key stands for.
    """
    adapter = find_adapter(model)
    length = inputs["input_ids"].shape[1]
    made, stands, size = torch.eye(length), torch.arange(length), torch.ones(length)
    later: dict[int, Tensor] = {}

    def decoder(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        features, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if features is None or mask is None:
            return None
        for number, one in enumerate(features):
            whole = torch.zeros(length, one.shape[-1])
            whole[mask[0]] = one
            later[number + 1] = whole  # what leaves a layer enters the next
        return args, {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}

    def layer(number: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal made, stands, size
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if number in later:
            hidden = hidden + (made @ later[number])[None]
        for selection in (one for at, one in stages if at == number):
            step, stands, size = mapped(selection, stands, size, free)
            hidden, made = (step @ hidden[0])[None], step @ made
        mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        kwargs["attention_mask"] = None
        if mask is not None and mask.dim() == 4:
            by_place = adapter.windowed  # elsewhere a slot sees those before it
            order = stands if by_place else torch.arange(len(stands))
            mask = mask[..., order, :][..., order]
            kwargs["attention_mask"] = mask + size.log() if weighs else mask
        kwargs["position_embeddings"] = tuple(
            part[..., stands, :] for part in kwargs["position_embeddings"]
        )
        if ids is not None:
            kwargs["position_ids"] = ids[..., stands]
        return (hidden, *args), kwargs

    handle = adapter.language_model.register_forward_pre_hook(decoder, with_kwargs=True)
    try:
        with before_layers(adapter.layers, layer):
            logits = model(**inputs, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits, stands
