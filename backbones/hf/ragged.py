# SPDX-License-Identifier: Apache-2.0
"""A cache layer whose key heads hold different numbers of slots, one head after the other.

``update`` stores the new tokens and hands back a mark; the watched attention module
(:mod:`visprune.backbones.hf.probe`) finds it and lets the layer attend, through
``visprune.ops.ragged_decode``: nothing is padded to the longest head, and no mask stands for what
is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visprune import ops
from visprune.backbones.hf.cache import Ledger, SlotLayer
from visprune.errors import UnsupportedModel

ROOM = 64  # slots of each head that are free for tokens to come
_MARK = "_visprune_layer"


class Segments:
    """Keys and values of B x Hk heads, one after the other, each with room to grow.

    Attributes:
        keys: ``[S, d]``.
        values: ``[S, dv]``.
        bias: what is added to the scores of each slot, ``[S]``; ``None``: nothing.
        offsets: where each head starts, ``[B * Hk + 1]``.
        lengths: slots that it uses, ``[B * Hk]``.
        heads: Hk.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        heads: int,
    ) -> None:
        self.heads = heads
        self.lengths = torch.tensor([len(k) for k in keys], device=keys[0].device)
        self._lay_out(self.lengths)
        size = int(self.offsets[-1])
        self.keys = keys[0].new_zeros(size, keys[0].shape[1])
        self.values = values[0].new_zeros(size, values[0].shape[1])
        self.bias: Tensor | None = None
        if any(b is not None for b in biases):
            self.bias = torch.zeros(size, device=self.keys.device)
        for start, key, value, bias in zip(self.offsets.tolist(), keys, values, biases,
                                           strict=False):  # fmt: skip
            self.keys[start : start + len(key)] = key
            self.values[start : start + len(key)] = value
            if bias is not None and self.bias is not None:
                self.bias[start : start + len(key)] = bias

    def _lay_out(self, lengths: Tensor, more: int = 0) -> None:
        self.offsets = ops.ragged_offsets(lengths + max(ROOM, more))
        self.room = int((self.offsets.diff() - lengths).min())  # counted down without the device

    def __len__(self) -> int:
        return len(self.lengths) // self.heads

    @property
    def tensors(self) -> list[Tensor]:
        """All that is allocated."""
        parts = [self.keys, self.values, self.offsets, self.lengths]
        return parts if self.bias is None else [*parts, self.bias]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one head."""
        each = [self.keys[:1], self.values[:1]] + ([] if self.bias is None else [self.bias[:1]])
        return sum(x.numel() * x.element_size() for x in each)

    def append(self, keys: Tensor, values: Tensor, hidden: Tensor | None) -> None:
        """Store new tokens ``[B, Hk, R, d]``; those that are ``hidden`` ``[B, R]`` are not seen."""
        count = keys.shape[2]
        if count > self.room:
            self._move(torch.arange(len(self), device=self.keys.device), more=count)
        at = self.offsets[:-1, None] + self.lengths[:, None]
        at = (at + torch.arange(count, device=at.device)).flatten()
        self.keys.index_copy_(0, at, keys.detach().flatten(0, 2))
        self.values.index_copy_(0, at, values.detach().flatten(0, 2))
        if hidden is not None and self.bias is None:
            self.bias = torch.zeros(len(self.keys), device=self.keys.device)
        if self.bias is not None:
            new = torch.zeros(count, device=self.bias.device).expand(len(self), self.heads, count)
            if hidden is not None:
                new = new.masked_fill(hidden[:, None].to(new.device), -torch.inf)
            self.bias.index_copy_(0, at, new.reshape(-1))
        self.lengths = self.lengths + count
        self.room -= count

    def _move(self, rows: Tensor, more: int = 0) -> None:
        """Lay the samples ``rows`` out anew, in their order."""
        before, sizes = self.offsets[:-1], self.lengths
        before, sizes = (x.view(-1, self.heads)[rows].flatten() for x in (before, sizes))
        self._lay_out(sizes, more)
        packed = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))[:-1]
        total = int(sizes.sum())
        place = torch.arange(total, device=sizes.device)
        place = place - packed.repeat_interleave(sizes, output_size=total)
        source = place + before.repeat_interleave(sizes, output_size=total)
        target = place + self.offsets[:-1].repeat_interleave(sizes, output_size=total)
        size = int(self.offsets[-1])
        self.keys = self.keys.new_zeros(size, self.keys.shape[1]).index_copy_(
            0, target, self.keys[source]
        )
        self.values = self.values.new_zeros(size, self.values.shape[1]).index_copy_(
            0, target, self.values[source]
        )
        if self.bias is not None:
            self.bias = self.bias.new_zeros(size).index_copy_(0, target, self.bias[source])
        self.lengths = sizes

    def select(self, rows: Tensor) -> None:
        """Keep the samples ``rows``, in their order, repeats allowed."""
        self._move(rows.to(self.keys.device))

    def crop(self, count: int) -> None:
        """Take the last ``count`` slots of every head back."""
        self.lengths = self.lengths - count
        self.room += count

    def attend(
        self, query: Tensor, scale: float, softcap: float | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of new queries ``[B, H, R, d]``, the newest slots of every head."""
        found = ops.ragged_decode(
            query.detach(), self.keys, self.values, self.offsets, self.lengths, scale=scale,
            bias=self.bias, causal=query.shape[2] > 1, softcap=softcap, return_lse=with_lse,
        )  # fmt: skip
        return found if isinstance(found, tuple) else (found, None)


def laid_out(parts: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """Segments one after the other, each where it starts, ``[S, d]``."""
    out = parts[0].new_zeros(int(offsets[-1]), parts[0].shape[1])
    for start, part in zip(offsets.tolist(), parts, strict=False):
        out[start : start + len(part)] = part
    return out


class Sealed:
    """Slots that a storage of its own holds, beside those that are plain and grow."""

    form = "sealed"

    def attend(self, query: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Attention of ``[B, H, R, d]`` to all of them, and its log-sum-exp ``[B, H, R]``."""
        raise NotImplementedError  # pragma: no cover - abstract

    def select(self, rows: Tensor) -> None:
        """Keep the samples ``rows``."""
        raise NotImplementedError  # pragma: no cover - abstract

    @property
    def counts(self) -> Tensor:
        """Slots of each head, ``[B, Hk]``."""
        raise NotImplementedError  # pragma: no cover - abstract

    @property
    def head_bytes(self) -> Tensor:
        """Bytes of each head, ``[B, Hk]``."""
        raise NotImplementedError  # pragma: no cover - abstract

    @property
    def tensors(self) -> list[Tensor]:
        """All that is allocated."""
        raise NotImplementedError  # pragma: no cover - abstract


class RaggedLayer(SlotLayer):
    """Keys and values head by head; its ledger speaks of the last slots, which all heads have.

    Args:
        segments: what is plain and grows.
        ledger: of the slots that all heads have at their end.
        sealed: what is stored in another way.
    """

    def __init__(self, segments: Segments, ledger: Ledger, sealed: Sequence[Sealed] = ()) -> None:
        self.segments, self.sealed = segments, list(sealed)
        self._hidden: Tensor | None = None
        self._waiting = False
        super().__init__(segments.keys, segments.values, ledger)

    @property
    def keys(self) -> Tensor:
        """The plain ones, ``[S, d]``."""
        return self.segments.keys

    @keys.setter
    def keys(self, value: Any) -> None:
        """They are written by :class:`Segments` alone."""

    @property
    def values(self) -> Tensor:
        """The plain ones, ``[S, dv]``."""
        return self.segments.values

    @values.setter
    def values(self, value: Any) -> None:
        """They are written by :class:`Segments` alone."""

    @property
    def num_stored(self) -> int:
        """Slots that all heads have at their end, which masks and ledgers speak of."""
        return self.ledger.index.shape[1]

    @property
    def form(self) -> str:
        """How it is stored."""
        return "+".join(["ragged", *sorted({x.form for x in self.sealed})])

    @property
    def slots(self) -> Tensor:
        """Slots of each head, ``[B, Hk]``."""
        found = self.segments.lengths.view(-1, self.segments.heads).clone()
        for part in self.sealed:
            found = found + part.counts.to(found.device)
        return found

    @property
    def head_bytes(self) -> Tensor:
        """Bytes of what each head uses, ``[B, Hk]``."""
        found = self.segments.lengths.view(-1, self.segments.heads) * self.segments.slot_bytes
        for part in self.sealed:
            found = found + part.head_bytes.to(found.device)
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """All that is allocated."""
        return [*self.segments.tensors, *(t for part in self.sealed for t in part.tensors)]

    def expect(self, valid: Tensor | None) -> None:
        """Say which of the tokens that come next hold no padding, ``[B, R]``; ``None``: all."""
        self._hidden = None if valid is None else ~valid

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens; returns them with a mark, for :func:`layer_of`.

        Raises:
            UnsupportedModel: what was handed back the last time was not attended to by this layer.
        """
        self._check()
        if self._waiting:
            raise UnsupportedModel(
                "An attention module read a cache whose heads keep different numbers of slots "
                "without asking it. Use a method that keeps the same number in every head."
            )
        self.segments.append(key_states, value_states, self._hidden)
        self._waiting = True
        marked = key_states.view_as(key_states)
        setattr(marked, _MARK, self)
        return marked, value_states

    def attend(self, query: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Attention of the tokens that were stored last, ``[B, H, R, d]`` to ``[B, H, R, dv]``."""
        self._waiting = False
        with torch.no_grad():
            out, lse = self.segments.attend(query, scale, softcap, bool(self.sealed))
            if not self.sealed or lse is None:
                return out
            parts = [part.attend(query, scale, softcap) for part in self.sealed]
            outs, lses = [out, *(x for x, _ in parts)], [lse, *(x for _, x in parts)]
            return ops.merge_attention(outs, lses)[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of all heads."""
        seen = self.ledger.seen
        count = max(0, seen - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if count:
            self.ledger = self.ledger.cropped(count)
            self.segments.crop(count)

    def _rows(self, rows: Tensor, key: Any) -> None:
        self.segments.select(rows)
        for part in self.sealed:
            part.select(rows)
        self.ledger = self.ledger.derive(key, lambda x: x[rows.to(x.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples for beam search."""
        self._rows(beam_idx, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat samples."""
        self._rows(torch.arange(len(self.segments)).repeat_interleave(repeats), repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select samples."""
        self._rows(indices, indices)


def layer_of(key: Tensor) -> RaggedLayer | None:
    """The layer that a tensor of keys stands for, if it is the mark of one."""
    return getattr(key, _MARK, None)
