# SPDX-License-Identifier: Apache-2.0
"""Which tokens survive, or into which slot they merge: a weighted map from N tokens to K slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from visprune import ops
from visprune.core.restoration import Restoration
from visprune.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Selection:
    """A map from the N tokens of each of B images to its slots, given by entries.

    Pruning, merging and pooling are one type: ``out[s] = own[s] * x[index[s]] + sum over entries e
    with slot[e] == s of weight[e] * x[source[e]]``. A token that is in no entry is dropped; one may
    be in several. Rows of the K x N matrix need not sum to one (VisionZip's contextual rows sum to
    two). Images may keep different numbers of slots (``count``), also none.

    Attributes:
        index: the token that each slot stands for (it gives the slot its position), ``[B, K]``
            int64; -1 behind an image's last slot. Slots stay in this order within their image: one
            whose token lies before its predecessor's comes right behind the predecessor, so a
            merged token is appended by naming it last.
        num_tokens: N.
        own: the weight of ``index`` in its slot, ``[B, K]``; ``None``: 1.
        source: tokens that come to a slot besides, ``[B, E]``; ``None``: there are none.
        slot: the slot of each of them, -1 where an image has fewer, ``[B, E]``.
        weight: and its weight there, ``[B, E]``.
        gaps: whether some of ``slot`` are -1.
        overlaps: whether a token may be in several slots.
        count: slots of each image, ``[B]`` int64; ``None``: K.
        entered: patches that each token stood for, ``[B, N]``, once the choice is made.
        macs: multiply-adds that the rule spent on each image.
        evidence: numbers that the method decided by, one per image, for the trace.
        carried: numbers that go on with the slots, for the method's next stage, ``[B, K]``.
        grows: what part of its size each of ``source`` brings to its slot, ``[B, E]``; ``None``:
            all of it.
        summed: sizes ``[B, N]`` that were added up with the slots, and their sums ``[B, K]``.
        restoration: how the tokens that left come back; ``None``: they do not.
    """

    index: Tensor
    num_tokens: int
    own: Tensor | None = None
    source: Tensor | None = None
    slot: Tensor | None = None
    weight: Tensor | None = None
    gaps: bool = False
    overlaps: bool = False
    count: Tensor | None = None
    entered: Tensor | None = None
    macs: int = 0
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    carried: Tensor | None = None
    grows: Tensor | None = None
    summed: tuple[Tensor, Tensor] | None = None
    restoration: Restoration | None = None

    def __post_init__(self) -> None:
        """Check shapes (values are the method's business)."""
        index = self.index
        if index.dim() != 2 or index.dtype != torch.int64:
            raise ConfigError(
                f"Selection.index is int64 [B, K], got {index.dtype} {tuple(index.shape)}."
            )
        entries = (self.source, self.slot, self.weight)
        if any(x is None for x in entries) != all(x is None for x in entries):
            raise ConfigError("Selection takes source, slot and weight together, or none of them.")
        for name, of in (("own", index), ("slot", self.source), ("weight", self.source)):
            given = getattr(self, name)
            if given is not None and of is not None and given.shape != of.shape:
                raise ConfigError(
                    f"Selection.{name} is {list(of.shape)}, got {tuple(given.shape)}."
                )
        if self.count is not None and self.count.shape != index.shape[:1]:
            raise ConfigError(
                f"Selection.count is [B] = [{index.shape[0]}], got {tuple(self.count.shape)}."
            )

    # How they are made -------------------------------------------------------------------------

    @classmethod
    def keep(cls, index: Tensor, num_tokens: int) -> Selection:
        """Pure pruning: keep ``index`` ``[B, K]`` (any order; stored in raster order)."""
        return cls(index=index.sort(dim=1).values, num_tokens=num_tokens)

    @classmethod
    def top(cls, score: Tensor, num_keep: int) -> Selection:
        """Pure pruning: keep the ``num_keep`` highest of ``score`` ``[B, N]``; ties, the lower."""
        order = score.argsort(dim=1, descending=True, stable=True)
        return cls.keep(order[:, :num_keep], score.shape[1])

    @classmethod
    def identity(cls, batch: int, num_tokens: int, device: torch.device | str = "cpu") -> Selection:
        """Keep everything."""
        index = torch.arange(num_tokens, device=device).expand(batch, -1)
        return cls(index=index, num_tokens=num_tokens)

    @classmethod
    def where(cls, stay: Tensor, **more: Mapping[str, Tensor]) -> Selection:
        """Pure pruning by a mask: keep the tokens that ``stay`` ``[B, N]`` bool is true of.

        Every image keeps its own number of them, also none (its protected tokens then leave too).
        """
        count = stay.sum(dim=1)
        width = int(count.max()) if len(count) else 0
        index = (~stay).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        there = torch.arange(width, device=stay.device) < count[:, None]
        return cls(index.where(there, -1), stay.shape[1], count=count, **more)  # type: ignore[arg-type]

    @classmethod
    def merge(
        cls, index: Tensor, num_tokens: int, source: Tensor, slot: Tensor, weight: Tensor,
        own: Tensor | None = None, *, gaps: bool = False, overlaps: bool = False,
    ) -> Selection:  # fmt: skip
        """Slots ``index`` ``[B, K]``, each with what comes to it: see the class."""
        return cls(index, num_tokens, own, source, slot, weight, gaps=gaps, overlaps=overlaps)

    @classmethod
    def mean(cls, index: Tensor, source: Tensor, slot: Tensor, size: Tensor) -> Selection:
        """Merge tokens into the mean of their slot, weighted by their sizes ``[B, N]``."""
        kept, came = size.gather(1, index), size.gather(1, source)
        total = kept.scatter_add(1, slot, came)
        return cls(
            index,
            size.shape[1],
            own=kept / total,
            source=source,
            slot=slot,
            weight=came / total.gather(1, slot),
            summed=(size, total),
        )

    @classmethod
    def assign(cls, index: Tensor, dest: Tensor, weight: Tensor) -> Selection:
        """Give the slot of each token, -1 where dropped, and its weight there, both ``[B, N]``."""
        slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
        inside = dest.gather(1, index) == slots
        own = torch.where(inside, weight.gather(1, index), 0.0)
        heads = torch.zeros_like(dest, dtype=torch.bool)
        heads = heads.scatter(1, index, inside)
        source = torch.arange(dest.shape[1], device=index.device).expand_as(dest)
        slot = dest.masked_fill(heads, -1)
        return cls.merge(index, dest.shape[1], source, slot, weight, own, gaps=True)

    @classmethod
    def stack(cls, rows: Sequence[Selection]) -> Selection:
        """Selections of one image each as that of all, each with its own number of slots.

        Images may have different numbers of tokens too: N is the largest.
        """
        counts = torch.tensor([row.num_slots for row in rows], device=rows[0].index.device)
        ragged = len(set(counts.tolist())) > 1
        merges, owns = any(row.merges for row in rows), any(row.own is not None for row in rows)
        source = slot = weight = None
        if merges:
            entries = [row._listed() for row in rows]
            source, slot = (_padded([e[n] for e in entries], fill) for n, fill in ((0, 0), (1, -1)))
            weight = _padded([e[2] for e in entries], 0.0)
        one = [torch.ones(row.index.shape, device=row.index.device) for row in rows]
        own = [x if row.own is None else row.own for row, x in zip(rows, one, strict=True)]
        carried = [row.carried for row in rows if row.carried is not None]
        return cls(
            _padded([row.index for row in rows], -1), max(row.num_tokens for row in rows),
            _padded(own, 0.0) if owns else None, source, slot, weight, gaps=merges,
            overlaps=any(row.overlaps for row in rows), count=counts if ragged else None,
            carried=_padded(carried, 0.0) if len(carried) == len(rows) else None,
            grows=_grown(rows) if any(row.grows is not None for row in rows) else None,
        )  # fmt: skip

    def _listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Source, slot and weight, of no entries where it only prunes."""
        if self.source is None or self.slot is None or self.weight is None:
            none = self.index[:, :0]
            return none, none, torch.ones(none.shape, device=none.device)
        return self.source, self.slot, self.weight

    # What they are -----------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """K, the most that an image keeps."""
        return self.index.shape[1]

    @property
    def counts(self) -> list[int]:
        """Slots of each image."""
        if self.count is None:
            return [self.num_slots] * self.index.shape[0]
        return [int(x) for x in self.count.tolist()]

    @property
    def merges(self) -> bool:
        """Whether slots are sums of tokens rather than tokens."""
        return self.source is not None

    @property
    def size(self) -> Tensor:
        """Patches that each slot stands for, ``[B, K]``."""
        if self.summed is not None and self.summed[0] is self.entered:
            return self.summed[1]
        if self.entered is None:
            return self.sizes(torch.ones(1, self.num_tokens, device=self.index.device).expand(
                len(self.index), -1))  # fmt: skip
        return self.sizes(self.entered)

    def chosen(self, entered: Tensor, macs: int) -> Selection:
        """The same with what was chosen from, ``[B, N]``, and what the rule spent."""
        return Selection(
            self.index, self.num_tokens, self.own, self.source, self.slot, self.weight,
            gaps=self.gaps, overlaps=self.overlaps, count=self.count, entered=entered, macs=macs,
            evidence=self.evidence, carried=self.carried, grows=self.grows, summed=self.summed,
            restoration=self.restoration,
        )  # fmt: skip

    def carrying(self, numbers: Tensor) -> Selection:
        """The same, with numbers of the tokens ``[B, N]`` that go on with their slots."""
        return replace(self, carried=numbers.gather(1, self.index.clamp(min=0)))

    def growing(self, part: Tensor) -> Selection:
        """The same, where each of ``source`` brings ``part`` ``[B, E]`` of its size to its slot."""
        return replace(self, grows=part)

    def returning(self, restoration: Restoration) -> Selection:
        """The same, where tokens that left can come back."""
        return replace(self, restoration=restoration)

    def row(self, place: int) -> Selection:
        """The selection of one image, without padding and restoration."""
        span, width = slice(place, place + 1), self.counts[place]

        def part(x: Tensor | None, end: int | None = None) -> Tensor | None:
            return None if x is None else x[span, :end]

        return Selection(
            self.index[span, :width], self.num_tokens, part(self.own, width), part(self.source),
            part(self.slot), part(self.weight), gaps=self.gaps, overlaps=self.overlaps,
            entered=part(self.entered), macs=self.macs, carried=part(self.carried, width),
            grows=part(self.grows),
            evidence={name: x[span] for name, x in self.evidence.items()},
        )  # fmt: skip

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """All entries: source, slot (-1 where there is none) and weight, each ``[B, K + E]``."""
        slots = torch.arange(self.num_slots, device=self.index.device).expand_as(self.index)
        slots = slots.where(self.index >= 0, -1)
        own = torch.ones(slots.shape, device=slots.device) if self.own is None else self.own
        if self.source is None or self.slot is None or self.weight is None:
            return self.index, slots, own
        return (
            torch.cat([self.index, self.source], dim=1),
            torch.cat([slots, self.slot], dim=1),
            torch.cat([own, self.weight.to(own.dtype)], dim=1),
        )

    def matrix(self) -> Tensor:
        """Return the explicit map ``[B, K, N]``, float32."""
        source, slot, weight = self.entries()
        batch, slots = self.index.shape
        flat = torch.where(slot < 0, slots, slot) * self.num_tokens + source.clamp(min=0)
        full = weight.new_zeros(batch, (slots + 1) * self.num_tokens)
        full = full.scatter_add(1, flat, weight)
        return full.view(batch, slots + 1, self.num_tokens)[:, :slots]

    def dest(self) -> Tensor:
        """The slot that stands for each token, -1 where dropped, ``[B, N]``.

        Of a token in several slots the one that it gives its name to, else one that it comes to.
        """
        return self._by_token()[0]

    def _by_token(self) -> tuple[Tensor, Tensor]:
        """The slot of each token and its weight there, ``[B, N]``; one column more takes gaps."""
        batch, tokens = self.index.shape[0], self.num_tokens
        source, slot, weight = self.entries()
        at = source if not self.gaps and self.count is None else source.where(slot >= 0, tokens)
        if self.overlaps:  # a token's own slot is written last
            at, slot, weight = at.flip(1), slot.flip(1), weight.flip(1)
        dest = slot.new_full((batch, tokens + 1), -1).scatter(1, at, slot)
        share = weight.new_zeros(batch, tokens + 1).scatter(1, at, weight)
        return dest[:, :tokens], share[:, :tokens]

    # What is done with them --------------------------------------------------------------------

    def reduce(self, x: Tensor, prefix: int = 0) -> Tensor:
        """Apply the map to ``x`` behind ``prefix`` tokens, which all stay.

        Args:
            x: ``[B, prefix + N, D]``.
            prefix: class, distillation, register tokens.

        Returns:
            ``[B, prefix + K, D]`` in the dtype of ``x``; zeros behind an image's last slot.
        """
        if self.source is None or self.slot is None or self.weight is None:
            return self._heads(x, prefix)
        if x.is_cuda and prefix == 0 and not torch.compiler.is_compiling():
            source, slot, weight = self.entries()  # in one order of additions, which atomics lack
            return ops.reduce_tokens(x, self.num_slots, source, slot, weight)
        wide = torch.promote_types(x.dtype, torch.float32)  # many tokens may come to one slot
        if self.summed is not None and wide == x.dtype:
            return self._drawn(x, prefix)
        out = self._heads(x, prefix).to(wide)
        if self.own is not None:
            out[:, prefix:].mul_(self.own[..., None])
        rows = ops.take_rows(x, self.source + prefix).to(wide) * self.weight[..., None]
        slot = self.slot
        if self.gaps:
            rows, slot = rows.masked_fill((slot < 0)[..., None], 0.0), slot.clamp(min=0)
        return ops.add_rows(out, slot + prefix, rows).to(x.dtype)

    def _drawn(self, x: Tensor, prefix: int) -> Tensor:
        """Means: each slot is drawn towards what comes to it, and no other is touched.

        Weights of a slot sum to one, so `own * x + sum of w * came` is `x + sum of w * (came - x)`:
        operations on the rows that merge alone, which are few, in place of all.
        """
        assert self.source is not None
        assert self.slot is not None
        assert self.weight is not None
        out, slot = self._heads(x, prefix), self.slot + prefix
        pull = ops.take_rows(x, self.source + prefix) - ops.take_rows(out, slot)
        return ops.add_rows(out, slot, pull * self.weight[..., None])

    def _heads(self, x: Tensor, prefix: int) -> Tensor:
        """The prefix and the tokens that slots stand for; zeros where an image has no slot."""
        if self.count is None:
            return ops.take_rows(x, _behind(self.index, prefix))
        out = ops.take_rows(x, _behind(self.index.clamp(min=0), prefix))
        gone = torch.nn.functional.pad(self.index < 0, (prefix, 0))
        return out.masked_fill(gone[..., None], 0.0)

    def sizes(self, size: Tensor) -> Tensor:
        """Return how many patches each slot stands for, given ``size`` ``[B, N]``: ``[B, K]``."""
        out = size.gather(1, self.index.clamp(min=0))
        if self.count is not None:
            out = out.masked_fill(self.index < 0, 0.0)
        if self.source is None or self.slot is None:
            return out
        came, slot = size.gather(1, self.source), self.slot
        if self.grows is not None:
            came = came * self.grows
        if self.gaps:
            came, slot = came.masked_fill(slot < 0, 0.0), slot.clamp(min=0)
        return out.scatter_add(1, slot, came)

    def expand(self, y: Tensor) -> Tensor:
        """Undo the map for dense prediction: ``[B, K, D]`` to ``[B, N, D]``.

        Each token gets the value of its slot; dropped tokens get zeros, or what the restoration
        makes of them.
        """
        if self.restoration is not None:
            return self.restoration.restore(y)
        dest = self.dest()
        padded = torch.cat([y, y.new_zeros(y.shape[0], 1, y.shape[-1])], dim=1)
        return ops.take_rows(padded, torch.where(dest < 0, self.num_slots, dest))

    def then(self, later: Selection) -> Selection:
        """Compose: first this selection, then ``later`` on its slots.

        Raises:
            ConfigError: ``later`` does not take this selection's number of slots.
        """
        if later.num_tokens != self.num_slots:
            raise ConfigError(
                f"Cannot compose: the first selection yields {self.num_slots} slots, the second "
                f"takes {later.num_tokens}."
            )
        index = self.index.gather(1, later.index.clamp(min=0)).where(later.index >= 0, -1)
        if not (self.merges or later.merges):
            return Selection(index, self.num_tokens, count=later.count)
        if self.overlaps or later.overlaps:
            return _of_matrix(index, later.matrix() @ self.matrix(), later.count)
        inner, first = self._by_token()
        outer, second = later._by_token()
        dest = outer.gather(1, inner.clamp(min=0)).where(inner >= 0, -1)
        weight = torch.where(dest >= 0, first * second.gather(1, inner.clamp(min=0)), 0.0)
        whole = Selection.assign(index.clamp(min=0), dest, weight)
        return replace(whole, index=index, count=later.count)


def _padded(rows: Sequence[Tensor], fill: float) -> Tensor:
    """Rows ``[1, K]`` of different length as ``[B, K]``."""
    width = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    return torch.cat([pad(row, (0, width - row.shape[1]), value=fill) for row in rows])


def _grown(rows: Sequence[Selection]) -> Tensor:
    """What part of its size each of their sources brings, ``[B, E]``."""
    each = [row._listed() for row in rows]
    parts = [e[2].new_ones(e[2].shape) if row.grows is None else row.grows
             for row, e in zip(rows, each, strict=True)]  # fmt: skip
    return _padded(parts, 0.0)


def _behind(index: Tensor, prefix: int) -> Tensor:
    """``index`` ``[B, K]`` on a sequence with ``prefix`` tokens before these, all kept."""
    if prefix == 0:
        return index
    if prefix == 1:  # the one before is number 0, which padding writes too
        return torch.nn.functional.pad(index + 1, (1, 0))
    first = torch.arange(prefix, device=index.device).expand(index.shape[0], -1)
    return torch.cat([first, index + prefix], dim=1)


def _of_matrix(index: Tensor, matrix: Tensor, count: Tensor | None) -> Selection:
    """The selection of an explicit map ``[B, K, N]``."""
    batch, slots, tokens = matrix.shape
    at = index.clamp(min=0)[..., None]
    own = matrix.gather(2, at)[..., 0]
    weight = matrix.scatter(2, at, 0.0).flatten(1)
    source = torch.arange(tokens, device=index.device).repeat(batch, slots)
    slot = torch.arange(slots, device=index.device).repeat_interleave(tokens).expand(batch, -1)
    slot = slot.where(weight != 0, -1)
    whole = Selection.merge(index, tokens, source, slot, weight, own, gaps=True, overlaps=True)
    return replace(whole, count=count)
