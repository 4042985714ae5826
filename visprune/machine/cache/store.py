# SPDX-License-Identifier: Apache-2.0
"""Store what heads keep: one shorter tensor where they keep as much, else head after head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.hf.cache import Ledger, SlotLayer
from visprune.backbones.hf.pages import Pages, Purse
from visprune.backbones.hf.ragged import RaggedLayer, Sealed, Segments
from visprune.backbones.hf.sealed import Codes, Thin
from visprune.core.cache import CacheTrace, HeadSlots
from visprune.machine.cache.again import places_of
from visprune.machine.decoder.forward import Forward


@dataclass
class RowSlots:
    """What the heads of one sample keep of a layer.

    Attributes:
        heads: of each head.
        places: the slots of the layer's cache that they chose from, ``[L]``.
        tail: slots at the end that all heads have, in one order.
        closed: places that positions have closed up over.
        hidden: the slot that is not seen until the next cut, counted from the end; 0: none.
    """

    heads: list[HeadSlots]
    places: Tensor
    tail: int
    closed: int = 0
    hidden: int = 0

    @classmethod
    def whole(cls, key: Tensor, value: Tensor, places: Tensor) -> RowSlots:
        """All that is there, ``[Hk, L, d]``."""
        index = torch.arange(len(places), device=key.device)
        heads = [HeadSlots(k, v, index) for k, v in zip(key, value, strict=True)]
        return cls(heads, places, len(places))

    @property
    def counts(self) -> list[int]:
        """Slots of each head."""
        return [len(head.key) for head in self.heads]


def store(
    entry: Any,
    rows: list[RowSlots] | None,
    fwd: Forward,
    shared: dict[Any, Any],
    trace: CacheTrace,
) -> Any:
    """The layer that holds what is kept.

    Args:
        entry: as the forward left it.
        rows: of each sample; ``None``: all of it stays.
        fwd: the forward.
        shared: what layers share: ledgers, by shape, and how many pages they may read.
        trace: to note it in.
    """
    if not isinstance(entry, SlotLayer):  # a recurrent layer's state, or a layer that ran not
        _note_none(trace)
        return entry
    if rows is None:
        _note_whole(entry, trace)
        return entry
    even = all(len(set(row.counts)) == 1 for row in rows)
    heads = [head for row in rows for head in row.heads]
    plain = all(head.bias is None and head.form == "plain" for head in heads)
    made: SlotLayer
    if even and plain:
        made = _even(entry, rows, fwd, shared)
    else:
        made = _ragged(entry, rows, fwd, shared)
    _note(made, rows, places_of(entry), trace)
    return made


def _even(
    entry: SlotLayer, rows: list[RowSlots], fwd: Forward, shared: dict[Any, Any]
) -> SlotLayer:
    counts = tuple(row.counts[0] for row in rows)
    width = max(counts)
    shape = (len(rows), len(rows[0].heads), width)
    left = fwd.pad_side == "left"
    keys = entry.keys.new_zeros(*shape, entry.keys.shape[-1])
    values = entry.values.new_zeros(*shape, entry.values.shape[-1])
    for number, row in enumerate(rows):
        span = slice(width - counts[number], width) if left else slice(0, counts[number])
        keys[number, :, span] = torch.stack([head.key for head in row.heads])
        values[number, :, span] = torch.stack([head.value for head in row.heads])
    tails = tuple(row.tail for row in rows)
    apart = tuple((row.closed, row.hidden) for row in rows)
    key = ("even", counts, tails, apart, id(entry.ledger))
    if key not in shared:
        shared[key] = _ledger(entry.ledger, rows, fwd, counts, width, left)
    return SlotLayer(keys, values, shared[key])


def _ragged(
    entry: SlotLayer, rows: list[RowSlots], fwd: Forward, shared: dict[Any, Any]
) -> SlotLayer:
    heads = [head for row in rows for head in row.heads]
    count = len(rows[0].heads)
    segments = Segments(
        [h.key[h.plain].detach() for h in heads],
        [h.value[h.plain].detach() for h in heads],
        [None if h.bias is None else h.bias[h.plain] for h in heads],
        count,
    )
    tail = min(row.tail for row in rows)
    key = ("ragged", tail, id(entry.ledger))
    if key not in shared:
        shared[key] = _ledger(entry.ledger, rows, fwd, (tail,) * len(rows), tail, True)
    return RaggedLayer(segments, shared[key], _sealed(heads, count, shared))


def _sealed(heads: list[HeadSlots], count: int, shared: dict[Any, Any]) -> list[Sealed]:
    """What is not plain of B x Hk heads; those of samples without a picture have none of it."""
    like = next((head for head in heads if head.form != "plain"), None)
    if like is None:
        return []

    def parts(level: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        chosen = [h.bits == level if level and h.bits is not None else ~h.plain for h in heads]
        if level:
            chosen = [c & ~h.plain for c, h in zip(chosen, heads, strict=True)]
        keys = [h.key[c].detach() for h, c in zip(heads, chosen, strict=True)]
        return keys, [h.value[c].detach() for h, c in zip(heads, chosen, strict=True)]

    if like.form == "codes":
        levels = {int(b) for h in heads if h.bits is not None for b in h.bits.unique()} - {0}
        return [Codes(*parts(level), count, level, *like.layout) for level in sorted(levels)]
    if like.form == "pages":
        size, top, by, after, spread = like.layout
        purse = None if spread is None else shared.setdefault("purse", Purse(spread))
        return [Pages(*parts(), count, size, top, by, after, purse)]
    assert like.channels is not None, "of thin keys"
    channels = [like.channels if h.channels is None else h.channels for h in heads]
    keys, values = parts()
    thin = [key[:, at] for key, at in zip(keys, channels, strict=True)]
    return [Thin(thin, values, channels, count)]


def _ledger(
    old: Ledger, rows: list[RowSlots], fwd: Forward, counts: tuple[int, ...], width: int, left: bool
) -> Ledger:
    """What masks and crops have to know of the slots that are left.

    Places of the tail alone are told: those before differ from head to head.
    """
    index = old.index.new_full((len(rows), width), -1)
    valid = torch.zeros(index.shape, dtype=torch.bool, device=index.device)
    bias: Tensor | None = None
    for number, row in enumerate(rows):
        end = width if left else counts[number]
        valid[number, end - counts[number] : end] = True
        tail = min(row.tail, counts[number])
        if tail:
            places = row.places[-tail:].to(old.index.device)
            index[number, end - tail : end] = old.index[number, places]
        if row.hidden:
            bias = torch.zeros(index.shape, device=index.device) if bias is None else bias
            bias[number, end - row.hidden] = -torch.inf
    there = torch.ones(len(rows), old.seen, dtype=torch.bool, device=index.device)
    if fwd.mask2d is not None:
        there = fwd.mask2d[:, : old.seen].to(index.device).bool()
    if old.evicted is not None:
        there = torch.cat([old.evicted, there[:, old.evicted.shape[1] :]], dim=1)
    padded = min(counts) < width
    closed = torch.tensor([row.closed for row in rows], device=old.shift.device)
    return Ledger(old.owner, old.seen, index, valid, padded, old.shift + closed, there, bias)


# What is noted ------------------------------------------------------------------------------------


def _note_none(trace: CacheTrace) -> None:
    trace.form.append("whole")
    trace.allocated.append(0)
    for row in range(len(trace.slots)):
        trace.before[row].append(0)
        trace.slots[row].append([0])
        trace.nbytes[row].append([0])
        trace.kept[row].append([torch.zeros(0, dtype=torch.long)])


def _note_whole(entry: SlotLayer, trace: CacheTrace) -> None:
    heads = 1 if entry.keys.dim() < 4 else entry.keys.shape[1]
    each = _slot_bytes(entry.keys) + _slot_bytes(entry.values)
    trace.form.append("whole")
    trace.allocated.append(entry.keys.nbytes + entry.values.nbytes)
    for row in range(len(trace.slots)):
        index = entry.ledger.index[row][entry.ledger.valid[row]]
        count = len(index)
        trace.before[row].append(count)
        trace.slots[row].append([count] * heads)
        trace.nbytes[row].append([count * each] * heads)
        trace.kept[row].append([index] * heads)


def _note(made: SlotLayer, rows: list[RowSlots], places: Tensor, trace: CacheTrace) -> None:
    if isinstance(made, RaggedLayer):
        slots, sizes = made.slots.tolist(), made.head_bytes.tolist()
        trace.form.append(made.form)
        trace.allocated.append(sum(x.nbytes for x in made.tensors))
    else:
        slots = [row.counts for row in rows]
        each = _slot_bytes(made.keys) + _slot_bytes(made.values)
        sizes = [[count * each for count in row] for row in slots]
        trace.form.append("even")
        trace.allocated.append(made.keys.nbytes + made.values.nbytes)
    for number, row in enumerate(rows):
        trace.before[number].append(len(row.places))
        trace.slots[number].append(slots[number])
        trace.nbytes[number].append(sizes[number])
        at = row.places.to(places.device)
        trace.kept[number].append(
            [_positions(places[number, n, at], head.index) for n, head in enumerate(row.heads)]
        )


def _positions(places: Tensor, index: Tensor) -> Tensor:
    index = index.to(places.device)
    return places[index.clamp(min=0)].where(index >= 0, -1)


def _slot_bytes(x: Tensor) -> int:
    """Bytes of one slot of one head."""
    return x.shape[-1] * x.element_size()
