# SPDX-License-Identifier: Apache-2.0
"""Slots that are stored in pages, of which each new token reads a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visprune.backbones.hf.ragged import Sealed, laid_out


@dataclass
class Probe:
    """One vector for a window of queries, in which those far from what was usual weigh more.

    That is ActQKV's: a query's weight is the mean over channels of its squared distance from a
    running mean, by a running variance. The first window's variance is that of a sample (0 of one
    query).

    Attributes:
        after: windows until the weights set in; before, the vector is the plain mean.
        windows: how many there were.
        mean: running, ``[B, C]``.
        var: running, ``[B, C]``.
    """

    after: int
    windows: int = 0
    mean: Tensor | None = None
    var: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The vector of each sample's queries, ``[B, R, C]`` to ``[B, C]``."""
        weight = self.weights(x).mean(-1)
        total = weight.sum(1, keepdim=True)
        share = torch.where(total > 0, weight / total, 1 / x.shape[1])
        return (x * share[..., None]).sum(1)

    def weights(self, x: Tensor) -> Tensor:
        """How far each channel of the next window lies from what was usual, ``[B, R, C]``."""
        self._take(x)
        self.windows += 1
        assert self.mean is not None, "of the windows so far"
        assert self.var is not None, "of the windows so far"
        if self.windows <= self.after + 1:
            return torch.ones_like(x)
        spread = self.var + self.var.mean(-1, keepdim=True) / 100
        return (x - self.mean[:, None]).square() / spread.clamp(min=1e-30)[:, None]

    def _take(self, x: Tensor) -> None:
        """Go on with mean and variance; old windows fade once there were ``after`` of them."""
        size, mean, var = x.shape[1], x.mean(1), x.var(1, correction=0)
        if self.mean is None or self.var is None:
            self.mean, self.var = mean, var * (size / max(1, size - 1))
            return
        past = max(1, min(self.windows, self.after))
        moved = (mean - self.mean).square() / (1 + 1 / past)
        self.var = (self.var * (past - 1 / size) + var + moved) / (past + 1 - 1 / size)
        self.mean = (self.mean * past + mean) / (past + 1)

    def select(self, rows: Tensor) -> None:
        """Keep the samples ``rows``."""
        if self.mean is not None and self.var is not None:
            self.mean, self.var = self.mean[rows], self.var[rows]


@dataclass
class Purse:
    """How many pages each layer of a cache reads, out of what all of them may read of a token.

    A layer whose scores are more even than others' gets more, and hands on what it does not take
    (ActQKV). Its part of what is left is its mean entropy by those of the layers from it on; until
    all are known for ``last`` tokens, an equal part.

    Attributes:
        last: tokens whose entropies count.
        least: pages that a layer reads at least.
        entropies: of each layer, the last ones, ``[B]``.
        left: of the token that is read now, ``[B]``.
    """

    last: int
    least: int = 1
    entropies: list[list[Tensor]] = field(default_factory=list)
    left: Tensor | None = None

    def join(self) -> int:
        """The number of one more layer; layers join in the order in which they run."""
        self.entropies.append([])
        return len(self.entropies) - 1

    def take(self, layer: int, entropy: Tensor, most: Tensor, each: int) -> Tensor:
        """How many pages a layer reads, ``[B]``.

        Args:
            layer: its number.
            entropy: of its scores, 0 to 1, ``[B]``.
            most: pages that there are, ``[B]``.
            each: pages that layers read in the mean.
        """
        layers = len(self.entropies)
        self.entropies[layer] = [*self.entropies[layer], entropy.double()][-self.last :]
        if layer == 0 or self.left is None:
            self.left = entropy.new_full(entropy.shape, each * layers, dtype=torch.float64)
        share = torch.full_like(self.left, 1 / (layers - layer))
        if all(len(known) == self.last for known in self.entropies):
            means = torch.stack([torch.stack(x).mean(0) for x in self.entropies[layer:]])
            share = torch.where(means.sum(0) > 0, means[0] / means.sum(0), share)
        count = (share * self.left).round().clamp(min=self.least)
        count = torch.minimum(count, most.to(count))
        self.left = self.left - count
        return count.long()

    def select(self, layer: int, rows: Tensor) -> None:
        """Keep the samples ``rows`` of what is known of a layer."""
        self.entropies[layer] = [x[rows] for x in self.entropies[layer]]


class Pages(Sealed):
    """Whole slots in pages, of which each token reads the nearest few: nothing is saved but time.

    Args:
        keys: of B x Hk heads, ``[n, d]``; the heads of a sample have equally many.
        values: ``[n, dv]``.
        heads: Hk.
        size: slots of a page.
        top: pages that are read.
        by: ``"cosine"``: of the mean query with the mean key of a page, all heads as one vector;
            ``"softmax"``: the attention that its slots would get, summed over heads.
        after: windows of queries until their mean is a weighted one (:class:`Probe`); ``None``: it
            never is.
        purse: what layers that read other numbers of pages share; ``None``: all read ``top``.
    """

    form = "paged"

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        size: int,
        top: int,
        by: str,
        after: int | None = None,
        purse: Purse | None = None,
    ) -> None:
        self.probed = None if after is None else Probe(after)
        self.purse, self.number = purse, 0 if purse is None else purse.join()
        self.heads, self.size, self.top, self.by = heads, size, top, by
        counts = torch.tensor([len(k) for k in keys[::heads]], device=keys[0].device)
        self.lengths = counts
        pages = max(1, -(-int(counts.max()) // size))
        offsets = torch.arange(len(keys) + 1, device=keys[0].device) * pages * size
        self.keys = laid_out(keys, offsets).view(-1, heads, pages, size, keys[0].shape[1])
        self.values = laid_out(values, offsets).view(-1, heads, pages, size, values[0].shape[1])
        self._represent()

    def _represent(self) -> None:
        pages = self.keys.shape[2]
        place = torch.arange(pages * self.size, device=self.keys.device).view(pages, self.size)
        self.valid = place < self.lengths[:, None, None]  # [B, pages, size]
        count = self.valid.sum(-1).clamp(min=1)
        self.mean = self.keys.sum(3) / count[:, None, :, None]  # [B, Hk, pages, d]

    def attend(self, query: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """To the pages that these queries are near to."""
        batch, total, rows, _ = query.shape
        pages = self.keys.shape[2]
        if self.top < pages:
            at, read = self._chosen(self._nearest(query, scale))
        else:
            at, read = torch.arange(pages, device=query.device).expand(batch, -1), None
        index = at[:, None, :, None, None]
        shape = (-1, self.heads, -1, self.size)
        keys, values = (
            x.gather(2, index.expand(*shape, x.shape[-1])).flatten(2, 3)
            for x in (self.keys, self.values)
        )
        seen = self.valid.gather(1, at[..., None].expand(-1, -1, self.size)).flatten(1)
        if read is not None:
            seen = seen & read.repeat_interleave(self.size, dim=1)
        rowed = query.unflatten(1, (self.heads, total // self.heads)).flatten(2, 3)
        score = (rowed.float() @ keys.float().mT) * scale
        score = softcap * torch.tanh(score / softcap) if softcap else score
        score = score.masked_fill(~seen[:, None, None], -torch.inf)
        lse = score.logsumexp(-1)
        weight = score.softmax(-1).nan_to_num(0.0)
        out = (weight @ values.float()).to(query.dtype)
        return out.view(batch, total, rows, -1), lse.view(batch, total, rows)

    def probe(self, query: Tensor) -> Tensor:
        """One vector of new queries ``[B, H, R, d]``, key heads side by side: ``[B, Hk * d]``."""
        grouped = query.unflatten(1, (self.heads, -1)).float()
        if self.probed is None:
            return grouped.mean((2, 3)).flatten(1)
        return self.probed(grouped.mean(2).transpose(1, 2).flatten(2))

    def _chosen(self, near: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pages by place, ``[B, K]``, and which of them are read; ``None``: all."""
        if self.purse is None:
            return near.topk(self.top, dim=1).indices.sort(dim=1).values, None
        there = torch.isfinite(near)
        most = there.sum(1)
        share = near.softmax(1).nan_to_num(0.0)  # a sample may have no page
        entropy = torch.special.entr(share).sum(1) / most.clamp(min=2).log()
        count = self.purse.take(self.number, entropy, most, self.top)
        at = near.topk(int(count.max()), dim=1).indices
        read = torch.arange(at.shape[1], device=at.device) < count[:, None]
        at, order = at.sort(dim=1)
        return at, read.gather(1, order)

    def _nearest(self, query: Tensor, scale: float) -> Tensor:
        """How near the queries are to each page, ``[B, pages]``."""
        if self.by == "cosine":
            pages = self.mean.float().transpose(1, 2).flatten(2)
            near = torch.nn.functional.cosine_similarity(self.probe(query)[:, None], pages, dim=-1)
        else:
            grouped = query.unflatten(1, (self.heads, -1)).float()
            keys = self.keys.float().flatten(2, 3)
            score = torch.einsum("bhgrd,bhnd->bhgrn", grouped, keys) * scale
            score = score.masked_fill(~self.valid.flatten(1)[:, None, None, None], -torch.inf)
            mass = score.softmax(-1).nan_to_num(0.0).sum((1, 2, 3))
            near = mass.view(len(query), -1, self.size).sum(-1)
        return near.masked_fill(~self.valid.any(-1), -torch.inf)

    def select(self, rows: Tensor) -> None:
        """Whole samples."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.lengths = self.lengths[rows]
        if self.probed is not None:
            self.probed.select(rows)
        if self.purse is not None:
            self.purse.select(self.number, rows)
        self._represent()

    @property
    def counts(self) -> Tensor:
        """Slots of each head."""
        return self.lengths[:, None].expand(-1, self.heads)

    @property
    def head_bytes(self) -> Tensor:
        """Slots, and the means of the pages."""
        size = self.keys.element_size()
        slot = (self.keys.shape[-1] + self.values.shape[-1]) * size
        pages = (self.counts + self.size - 1) // self.size
        return self.counts * slot + pages * self.mean.shape[-1] * size

    @property
    def tensors(self) -> list[Tensor]:
        """All that is allocated."""
        return [self.keys, self.values, self.mean, self.valid, self.lengths]
