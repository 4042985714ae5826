# SPDX-License-Identifier: Apache-2.0
"""Slots: which token of the original sequence stands where in a shortened, padded batch."""

from __future__ import annotations

from collections.abc import Sequence
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
        bias: what attention adds to the scores of each slot, ``[B, P]``; ``None``: nothing.
        moved: whether slots of a table as long as the input stand in another order: a token that a
            choice recycles stands behind those it kept, also where nothing leaves.
    """

    index: Tensor
    valid: Tensor
    real: Tensor
    padded: bool
    length: int
    filled: bool = False
    bias: Tensor | None = None
    moved: bool = False

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
        """Whether tokens of the input are missing, or stand in other slots than their own.

        Not a matter of length alone: beside a long row, a pruned one is filled up to that length.
        """
        return self.num_slots != self.length or self.filled or self.moved

    def gather(self, rel: Tensor, real: Tensor) -> SlotTable:
        """Return the table of the slots ``rel`` ``[B, P']``; not ``real`` ones are padding."""
        valid = self.valid.gather(1, rel) & real
        filled = not bool(real.all())
        padded = self.padded or filled
        if padded:
            padded = not bool(valid.all())
        whole = rel.shape[1] == self.length and not filled
        return SlotTable(
            index=self.index.gather(1, rel),
            valid=valid,
            real=self.real.gather(1, rel) & real,
            padded=padded,
            length=self.length,
            filled=self.filled or filled,
            bias=None if self.bias is None else self.bias.gather(1, rel),
            moved=self.moved or (whole and bool((rel.diff(dim=1) < 0).any())),
        )

    def last_valid(self) -> Tensor:
        """Return the slot of each row's last valid token, ``[B]``."""
        steps = torch.arange(self.num_slots, device=self.valid.device)
        return torch.where(self.valid, steps, -1).amax(dim=1).clamp(min=0)

    def places(self) -> Tensor:
        """Return the slot of each token of the input, -1 where it is gone, ``[B, S]``."""
        steps = torch.arange(self.num_slots, device=self.index.device).expand_as(self.index)
        target = torch.where(self.real, self.index, self.length)
        out = self.index.new_full((len(self.index), self.length + 1), -1)
        return out.scatter(1, target, steps)[:, : self.length]

    def readers(self) -> Tensor:
        """Return the slot that each token of the input reads its output from, ``[B, S]``.

        Its own; of a token that is gone, that of the last one before it that is still there (in
        front of all of them, of the first).
        """
        places = self.places()
        steps = torch.arange(self.length, device=places.device).expand_as(places)
        there = places >= 0
        before = torch.where(there, steps, -1).cummax(dim=1).values
        first = there.to(torch.uint8).argmax(dim=1)[:, None]
        return places.gather(1, torch.where(before < 0, first, before)).clamp(min=0)

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


def in_order(staying: Tensor, chosen: Sequence[Tensor]) -> Tensor:
    """How the slots that are left follow one another.

    What was chosen of a picture stays in the selection's order: a slot whose token lies before its
    predecessor's (a merged token appended at the end) sorts with the predecessor.

    Args:
        staying: slots that no selection was asked about, ascending.
        chosen: of each picture, the slots that its selection keeps.

    Returns:
        The order of ``torch.cat([staying, *chosen])``.
    """
    keys = [slots.cummax(0).values if len(slots) else slots for slots in chosen]
    return torch.cat([staying, *keys]).argsort(stable=True)
