# SPDX-License-Identifier: Apache-2.0
"""Slots: which token of the original sequence stands where in a shortened, padded batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SlotTable:
    """The slots of one forward, at one depth.

    Attributes:
        index: position in this forward's own input sequence that each slot holds, ``[B, P]``.
        valid: whether the slot may be attended to, ``[B, P]`` (false for padding).
        real: whether the slot holds a token of the input at all, ``[B, P]``; padding that the
            user put into the input is real, padding that evens out rows is not.
        padded: whether any slot is not valid; known without reading the device.
        length: S, the length of the input sequence.
        filled: whether any slot is padding that evens out rows (not real).
    """

    index: Tensor
    valid: Tensor
    real: Tensor
    padded: bool
    length: int
    filled: bool = False

    @classmethod
    def identity(
        cls, batch: int, length: int, valid: Tensor | None, device: torch.device
    ) -> SlotTable:
        """Every token in its place; ``valid`` is the padding mask of the input ``[B, S]``."""
        index = torch.arange(length, device=device).expand(batch, -1)
        everything = torch.ones(batch, length, dtype=torch.bool, device=device)
        if valid is None:
            return cls(index, everything, everything, False, length)
        return cls(index, valid, everything, not bool(valid.all()), length)

    @property
    def num_slots(self) -> int:
        """P."""
        return self.index.shape[1]

    @property
    def shortened(self) -> bool:
        """Whether tokens of the input are missing.

        Not a matter of length alone: beside a long row, a pruned one is filled up to that length.
        """
        return self.num_slots != self.length or self.filled

    def gather(self, rel: Tensor, real: Tensor) -> SlotTable:
        """Return the table of the slots ``rel`` ``[B, P']``; not ``real`` ones are padding."""
        valid = self.valid.gather(1, rel) & real
        filled = not bool(real.all())
        padded = self.padded or filled
        if padded:
            padded = not bool(valid.all())
        return SlotTable(
            index=self.index.gather(1, rel),
            valid=valid,
            real=self.real.gather(1, rel) & real,
            padded=padded,
            length=self.length,
            filled=self.filled or filled,
        )

    def last_valid(self) -> Tensor:
        """Return the slot of each row's last valid token, ``[B]``."""
        steps = torch.arange(self.num_slots, device=self.valid.device)
        return torch.where(self.valid, steps, -1).amax(dim=1).clamp(min=0)

    def scatter(self, x: Tensor, fill: float) -> Tensor:
        """Put ``x`` ``[B, P, ...]`` back at its places in a ``[B, S, ...]`` tensor of ``fill``."""
        batch, rest = x.shape[0], x.shape[2:]
        rows = torch.arange(batch, device=self.index.device)[:, None] * self.length
        # One spare row at the end takes the padding, so that the result stays contiguous.
        target = torch.where(self.real, rows + self.index, batch * self.length)
        out = x.new_full((batch * self.length + 1, *rest), fill)
        out = out.index_copy(0, target.flatten().to(x.device), x.flatten(0, 1))
        return out[:-1].view(batch, self.length, *rest)

    def kept(self) -> Tensor:
        """Return which tokens of the input are still there, bool ``[B, S]``."""
        ones = torch.ones_like(self.index, dtype=torch.bool)
        target = torch.where(self.real, self.index, self.length)
        out = ones.new_zeros(ones.shape[0], self.length + 1)
        return out.scatter(1, target, ones)[:, : self.length]


def gather_sequence(x: Tensor, rel: Tensor, dim: int) -> Tensor:
    """Gather ``rel`` ``[B, P]`` along the sequence dimension ``dim`` of ``x``.

    The batch dimension lies just before ``dim``; where it is 1 it is expanded to B.
    """
    dim = dim % x.dim()
    rel = rel.to(x.device)
    if x.shape[dim - 1] != rel.shape[0]:
        x = x.expand(*x.shape[: dim - 1], rel.shape[0], *x.shape[dim:])
    shape = [1] * x.dim()
    shape[dim - 1], shape[dim] = rel.shape
    target = list(x.shape)
    target[dim] = rel.shape[1]
    return x.gather(dim, rel.reshape(shape).expand(target))


def assemble(rows: list[Tensor], pad_side: str) -> tuple[Tensor, Tensor]:
    """Stack index rows of different length.

    Args:
        rows: one int64 tensor of slots per sample.
        pad_side: ``"left"`` or ``"right"``: where shorter rows get padding.

    Returns:
        ``rel`` ``[B, P]`` (0 in padding) and ``real`` ``[B, P]``.
    """
    width = max(1, *(len(row) for row in rows))
    rel = rows[0].new_zeros(len(rows), width)
    real = torch.zeros(len(rows), width, dtype=torch.bool, device=rel.device)
    for number, row in enumerate(rows):
        span = slice(width - len(row), width) if pad_side == "left" else slice(0, len(row))
        rel[number, span] = row
        real[number, span] = True
    return rel, real
