# SPDX-License-Identifier: Apache-2.0
"""Slots that are stored in other ways than plain: as codes, or with fewer channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visprune import ops
from visprune.backbones.hf.ragged import Sealed, laid_out


def _moved(offsets: Tensor, rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Where the segments of the samples ``rows`` lie then, and which slots they take now."""
    starts, sizes = offsets[:-1].view(-1, heads), offsets.diff().view(-1, heads)
    starts, sizes = starts[rows].flatten(), sizes[rows].flatten()
    new = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    place = torch.arange(int(new[-1]), device=offsets.device)
    shift = (starts - new[:-1]).repeat_interleave(sizes, output_size=len(place))
    return new, place + shift


class Codes(Sealed):
    """Keys per channel and values per token in a few bits, head after head.

    Args:
        keys: of B x Hk heads, ``[n, d]``.
        values: ``[n, dv]``.
        heads: Hk.
        bits: of a number.
        group: slots of a channel that share a scale.
        separable: channels of values are divided by the root of their largest number before.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        bits: int,
        group: int = 32,
        separable: bool = True,
    ) -> None:
        self.heads, self.bits, self.group = heads, bits, group
        self.form = f"{bits} bit"
        device = keys[0].device
        self.lengths = torch.tensor([len(k) for k in keys], device=device)
        self.offsets = ops.ragged_offsets(self.lengths, align=group)
        self.factor = torch.stack([_factor(v) if separable else v.new_ones(v.shape[1])
                                   for v in values])  # fmt: skip
        scaled = [v / c for v, c in zip(values, self.factor, strict=True)]
        place = torch.arange(int(self.offsets[-1]), device=device)
        owner = torch.searchsorted(self.offsets[1:], place, right=True)
        valid = place - self.offsets[owner] < self.lengths[owner]
        flat = laid_out(keys, self.offsets)
        self.keys = ops.quantize_kv(flat, bits, "channel", group, valid=valid)
        width = values[0].shape[1]
        self.values = ops.quantize_kv(laid_out(scaled, self.offsets), bits, "token", width)

    def attend(self, query: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Codes become numbers inside the operator."""
        found = ops.ragged_decode(
            query, self.keys, self.values, self.offsets, self.lengths, scale=scale,
            softcap=softcap, return_lse=True,
        )  # fmt: skip
        out, lse = found[0], found[1]
        group = query.shape[1] // self.heads
        factor = self.factor.view(len(query), self.heads, 1, -1).repeat_interleave(group, 1)
        return out * factor.to(out.dtype), lse

    def numbers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that the codes stand for, of every head."""
        keys, values = ops.dequantize_kv(self.keys), ops.dequantize_kv(self.values)
        return [
            (keys[a : a + n], values[a : a + n] * c)
            for a, n, c in zip(self.offsets.tolist(), self.lengths.tolist(), self.factor,
                               strict=False)
        ]  # fmt: skip

    def select(self, rows: Tensor) -> None:
        """Codes with their scales."""
        rows = rows.to(self.offsets.device)
        new, source = _moved(self.offsets, rows, self.heads)
        groups = _moved(self.offsets // self.group, rows, self.heads)[1]
        self.keys = _taken(self.keys, source, groups)
        self.values = _taken(self.values, source, source)
        self.lengths = self.lengths.view(-1, self.heads)[rows].flatten()
        self.factor = self.factor.unflatten(0, (-1, self.heads))[rows].flatten(0, 1)
        self.offsets = new

    @property
    def counts(self) -> Tensor:
        """Slots of each head."""
        return self.lengths.view(-1, self.heads)

    @property
    def head_bytes(self) -> Tensor:
        """Codes, and the scales and smallest numbers of the groups in use."""
        size = self.keys.scale.element_size()
        slot = self.keys.codes.shape[1] + self.values.codes.shape[1]
        slot += 2 * size * self.values.scale.shape[-1]
        groups = (self.counts + self.group - 1) // self.group
        each = groups * 2 * size * self.keys.scale.shape[-1]
        return self.counts * slot + each + size * self.factor.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is allocated."""
        parts = [t for x in (self.keys, self.values) for t in (x.codes, x.scale, x.zero)]
        return [*parts, self.factor, self.offsets, self.lengths]


def _factor(value: Tensor) -> Tensor:
    """The root of the largest number of each channel, 1 where all are zero, ``[dv]``."""
    if not len(value):
        return value.new_ones(value.shape[1])
    largest = value.abs().amax(0).sqrt()
    return torch.where(largest > 0, largest, 1.0)


def _taken(x: ops.QuantizedKV, slots: Tensor, scales: Tensor) -> ops.QuantizedKV:
    return ops.QuantizedKV(
        x.codes[slots], x.scale[scales], x.zero[scales], x.bits, x.axis, x.group_size
    )


class Thin(Sealed):
    """Keys with some channels left out, another choice in every head; values are whole.

    Args:
        keys: of B x Hk heads, ``[n, d']``.
        values: ``[n, dv]``.
        channels: which channels the keys have, ``[d']`` of each head.
        heads: Hk.
    """

    form = "thin"

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        channels: Sequence[Tensor],
        heads: int,
    ) -> None:
        self.heads = heads
        self.lengths = torch.tensor([len(k) for k in keys], device=keys[0].device)
        self.offsets = ops.ragged_offsets(self.lengths, align=1)
        self.keys, self.values = laid_out(keys, self.offsets), laid_out(values, self.offsets)
        self.channels = torch.stack(list(channels))

    def attend(self, query: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Queries are cut as the keys are; the scale stays."""
        batch, total, rows, _ = query.shape
        group = total // self.heads
        at = self.channels.view(batch, self.heads, 1, -1).repeat_interleave(group, 1)
        found = ops.ragged_decode(
            query.gather(3, at.expand(-1, -1, rows, -1)), self.keys, self.values, self.offsets,
            self.lengths, scale=scale, softcap=softcap, return_lse=True,
        )  # fmt: skip
        return found[0], found[1]

    def select(self, rows: Tensor) -> None:
        """Slots with their channels."""
        rows = rows.to(self.offsets.device)
        self.offsets, source = _moved(self.offsets, rows, self.heads)
        self.keys, self.values = self.keys[source], self.values[source]
        self.lengths = self.lengths.view(-1, self.heads)[rows].flatten()
        self.channels = self.channels.unflatten(0, (-1, self.heads))[rows].flatten(0, 1)

    @property
    def counts(self) -> Tensor:
        """Slots of each head."""
        return self.lengths.view(-1, self.heads)

    @property
    def head_bytes(self) -> Tensor:
        """Keys, values and the numbers of the channels."""
        slot = (self.keys.shape[1] + self.values.shape[1]) * self.keys.element_size()
        return self.counts * slot + self.channels.shape[1] * self.channels.element_size()

    @property
    def tensors(self) -> list[Tensor]:
        """All that is allocated."""
        return [self.keys, self.values, self.channels, self.offsets, self.lengths]
