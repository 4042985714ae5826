# SPDX-License-Identifier: Apache-2.0
"""Which tokens survive, or into which slot they merge: a weighted K x N map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visprune.errors import ConfigError


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[B, K]`` of ``x`` ``[B, N, D]``: ``[B, K, D]``.

    By whole rows of the flattened batch: ``gather`` reads an index per element, and is three to
    ten times slower on a CPU.
    """
    batch, count, width = x.shape
    if batch == 1:
        return torch.nn.functional.embedding(index, x[0])
    return torch.nn.functional.embedding(_flat(index, count), x.reshape(batch * count, width))


def _flat(index: Tensor, count: int) -> Tensor:
    """Rows of a batch as rows of all its pictures, one after another."""
    return index + torch.arange(0, index.shape[0] * count, count, device=index.device)[:, None]


def behind(index: Tensor, prefix: int) -> Tensor:
    """``index`` ``[B, K]`` on a sequence with ``prefix`` tokens before these, all kept."""
    if prefix == 0:
        return index
    first = torch.arange(prefix, device=index.device).expand(index.shape[0], -1)
    return torch.cat([first, index + prefix], dim=1)


def add_rows(out: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Add ``rows`` ``[B, R, D]`` to rows ``at`` ``[B, R]`` of ``out`` ``[B, K, D]``, in place."""
    batch, count, width = out.shape
    flat = out.view(batch * count, width)
    flat.index_add_(0, _flat(at, count).flatten(), rows.reshape(-1, width))
    return out


@dataclass(frozen=True)
class Selection:
    """A map from N tokens to K slots: each token goes into one slot, with a weight, or is dropped.

    Pruning, merging and pooling are one type: ``out[s] = sum over i with dest[i] == s of
    weight[i] * x[i]``. Rows of the K x N matrix need not sum to one (VisionZip's contextual rows
    sum to two).

    Attributes:
        index: the token that each slot stands for (it gives the slot its position), ``[B, K]``
            int64; slots stay in this order within their image.
        dest: the slot of each token, -1 where dropped, ``[B, N]`` int64; ``None`` for pure
            pruning, where slot ``s`` is exactly token ``index[s]``.
        weight: the weight of each token in its slot, ``[B, N]``; ``None`` with ``dest=None``.
        num_tokens: N.
    """

    index: Tensor
    num_tokens: int
    dest: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes (values are the method's business)."""
        if self.index.dim() != 2 or self.index.dtype != torch.int64:
            raise ConfigError(
                f"Selection.index is int64 [B, K], got {self.index.dtype} "
                f"{tuple(self.index.shape)}."
            )
        if (self.dest is None) != (self.weight is None):
            raise ConfigError("Selection takes dest and weight together, or neither.")
        if self.dest is not None and self.dest.shape != (self.index.shape[0], self.num_tokens):
            raise ConfigError(
                f"Selection.dest is [B, N] = [{self.index.shape[0]}, {self.num_tokens}], "
                f"got {tuple(self.dest.shape)}."
            )

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

    @property
    def num_slots(self) -> int:
        """K."""
        return self.index.shape[1]

    @property
    def merges(self) -> bool:
        """Whether slots are sums of tokens rather than tokens."""
        return self.dest is not None

    def _map(self) -> tuple[Tensor, Tensor]:
        """Return (dest, weight) in explicit form."""
        if self.dest is not None and self.weight is not None:
            return self.dest, self.weight
        batch, slots = self.index.shape
        dest = self.index.new_full((batch, self.num_tokens), -1)
        dest.scatter_(1, self.index, torch.arange(slots, device=dest.device).expand(batch, -1))
        return dest, (dest >= 0).to(torch.float32)

    def matrix(self) -> Tensor:
        """Return the explicit map ``[B, K, N]``, float32."""
        dest, weight = self._map()
        full = weight.new_zeros(dest.shape[0], self.num_slots + 1, self.num_tokens)
        full.scatter_(1, torch.where(dest < 0, self.num_slots, dest)[:, None], weight[:, None])
        return full[:, : self.num_slots]

    def reduce(self, x: Tensor) -> Tensor:
        """Apply the map to ``x`` ``[B, N, D]``; returns ``[B, K, D]`` in the dtype of ``x``."""
        if self.dest is None or self.weight is None:
            return take_rows(x, self.index)
        slot = torch.where(self.dest < 0, self.num_slots, self.dest)
        # Merges are sums of many tokens: accumulate in float32 also for half-precision features.
        scaled = x.to(torch.promote_types(x.dtype, torch.float32)) * self.weight[..., None]
        out = scaled.new_zeros(x.shape[0], self.num_slots + 1, x.shape[-1])
        out = out.scatter_add(1, slot[..., None].expand_as(scaled), scaled)
        return out[:, : self.num_slots].to(x.dtype)

    def reduce_behind(self, x: Tensor, prefix: int) -> Tensor:
        """Apply the map behind ``prefix`` tokens, which all stay: ``[B, P + N, D]``."""
        if not self.merges:
            return take_rows(x, behind(self.index, prefix))
        return torch.cat([x[:, :prefix], self.reduce(x[:, prefix:])], dim=1)

    def sizes(self, size: Tensor) -> Tensor:
        """Return how many patches each slot stands for, given ``size`` ``[B, N]``: ``[B, K]``."""
        if self.dest is None:
            return size.gather(1, self.index)
        dest, _ = self._map()
        out = size.new_zeros(size.shape[0], self.num_slots + 1)
        out.scatter_add_(1, torch.where(dest < 0, self.num_slots, dest), size)
        return out[:, : self.num_slots]

    def expand(self, y: Tensor) -> Tensor:
        """Undo the map for dense prediction: ``[B, K, D]`` to ``[B, N, D]``.

        Each token gets the value of its slot; dropped tokens get zeros.
        """
        dest, _ = self._map()
        padded = torch.cat([y, y.new_zeros(y.shape[0], 1, y.shape[-1])], dim=1)
        return take_rows(padded, torch.where(dest < 0, self.num_slots, dest))

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
        index = self.index.gather(1, later.index)
        if not (self.merges or later.merges):
            return Selection(index=index, num_tokens=self.num_tokens)
        dest1, weight1 = self._map()
        dest2, weight2 = later._map()
        inner = dest1.clamp(min=0)
        dest = torch.where(dest1 < 0, -1, dest2.gather(1, inner))
        weight = torch.where(dest < 0, 0.0, weight1 * weight2.gather(1, inner))
        return Selection(index=index, num_tokens=self.num_tokens, dest=dest, weight=weight)
