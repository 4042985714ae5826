# SPDX-License-Identifier: Apache-2.0
"""Cut a cache again while tokens are decoded: when that is due, and what has to be known for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import SlotLayer
from visprune.core.cache import Eviction
from visprune.machine.decoder.forward import Forward

# What layers note of their slots: which samples had a picture [B], and of the first slots, for each
# key head, which token of the sequence each is and what score it has so far, [B, Hk, n].
PICTURED, PLACES, RECEIVED = "pictured", "places", "received"


def watched(fwd: Forward, layer: int) -> SlotLayer | None:
    """The cache of a layer that is cut again, in a call without a picture; ``None``: none is."""
    if fwd.cache is None or fwd.images or layer >= len(fwd.cache.layers):
        return None
    entry = fwd.cache.layers[layer]
    return entry if isinstance(entry, SlotLayer) and PICTURED in entry.noted else None


def due(eviction: Eviction, fwd: Forward, entry: SlotLayer) -> bool:
    """Whether a layer is cut at the end of a call.

    That is after a token that was decoded alone: of several some may be guesses, which are taken
    back, and what is taken back must not have pushed anything out.
    """
    most, every = eviction.amount.max_cache, eviction.every
    if most is None or every is None or fwd.length > 1:
        return False
    more = most + every - 1
    # The ledger tells of the slots before this call, at no cost to the device.
    if entry.ledger.index.shape[1] < more:
        return False
    if not entry.ledger.padded:
        return True
    counts = entry.ledger.valid.sum(1)[entry.noted[PICTURED].to(entry.ledger.valid.device)]
    return bool((counts >= more).any())


def places_of(entry: SlotLayer) -> Tensor:
    """Which token of the sequence each slot of each key head is, ``[B, Hk, P]``."""
    found = entry.ledger.index[:, None].expand(-1, entry.keys.shape[1], -1)
    known = entry.noted.get(PLACES)
    if known is None:
        return found
    known = known.to(found.device)
    return torch.cat([known, found[..., known.shape[2] :]], dim=2)


def received_of(entry: SlotLayer, row: int, places: Tensor) -> Tensor | None:
    """The score so far of a sample's slots ``places`` ``[L]``, 0 for new ones: ``[Hk, L]``."""
    known = entry.noted.get(RECEIVED)
    if known is None:
        return None
    places, count = places.to(known.device), known.shape[2]
    score = known[row][:, places.clamp(max=count - 1)]
    return score.masked_fill(places >= count, 0.0)


def note_scores(entry: SlotLayer, samples: Any) -> None:
    """Note the scores of a layer that stays as it is.

    Args:
        entry: the layer.
        samples: of each sample, its slots ``places`` and what was ``looked`` at.
    """
    shape = (len(samples), entry.keys.shape[1], entry.num_stored)
    received = torch.zeros(shape, device=entry.keys.device)
    for row, sample in enumerate(samples):
        if sample.looked is not None:
            received[row][:, sample.places] = sample.looked.score.float()
    entry.noted[RECEIVED] = received


def note_kept(made: SlotLayer, old: SlotLayer, rows: Any, scores: Any) -> None:
    """Note what slots a layer has kept, and their scores.

    Args:
        made: the layer that holds them.
        old: the one that they were chosen from.
        rows: of each sample, what its heads keep.
        scores: of each sample, the score of the slots ``rows[n].places``, ``[Hk, L]``; ``None``:
            a sample that stays whole.
    """
    shape = made.keys.shape[:3]
    places = torch.full(shape, -1, device=made.keys.device)
    received = torch.zeros(shape, device=made.keys.device)
    before = places_of(old)
    for number, row in enumerate(rows):
        index = torch.stack([head.index for head in row.heads])
        at = row.places.to(before.device)[index.to(before.device)]
        valid = made.ledger.valid[number].to(places.device)
        places[number][:, valid] = before[number].gather(1, at).to(places.device)
        if scores[number] is not None:
            received[number][:, valid] = scores[number].float().gather(1, index)
    made.noted[PLACES], made.noted[RECEIVED] = places, received
