# SPDX-License-Identifier: Apache-2.0
"""FlashVID: telling tokens of each frame, and trees of the others through time (ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visprune import ops
from visprune.core import (
    BudgetedMethod,
    Context,
    ModelSpec,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import ClsAttention, Frames, ReceivedAttention
from visprune.errors import ConfigError
from visprune.methods._saliency import attended, saliency

_FRAMES = Frames()


@dataclass(frozen=True, kw_only=True)
class FlashVID(BudgetedMethod):
    """Keeps some tokens of every frame of a clip, and merges the others over time, then space.

    At the projector. **Selection**: ``alpha`` of the budget, an equal number for each frame, by
    farthest-first on cosine distance times attention (where the model shows it) times the token's
    mean product with the frames' mean features. **Trees**: of the others, a token is joined to the
    most similar one of the frame before if their cosine is above ``link``, never across a cut, and
    only as many, the most similar first, as leave enough for the budget; a tree's token is its mean
    and stands at its first frame. Cuts are where the mean features of two frames have a cosine
    below ``cut``, and the least similar ones besides up to ``segments`` spans. **Clusters**: the
    trees of each frame, by DPC-KNN, share out the rest of the budget; a cluster is the mean of its
    trees. A still picture is a clip of one frame.

    There is no arXiv number in the official repository (Fanziyang-v/FlashVID). Differences from it:
    its second stage, inside the decoder, is a chain here (``"flashvid+fastv"``), and the budget
    holds before it, exactly; its trees add up a grandchild that they do not count; the tokens
    selected from a span of one frame are not merged a second time; nothing random is added to
    densities.

    Args:
        alpha: share of the budget for selection, in [0, 1].
        link: cosine above which tokens of two frames are joined.
        cut: cosine of two frames below which a span ends.
        segments: spans that a clip has at least.
    """

    name: ClassVar[str] = "flashvid"

    alpha: float = 0.7
    link: float = 0.8
    cut: float = 0.9
    segments: int = 8

    def __post_init__(self) -> None:
        """Check the share."""
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha is a share of the budget, in [0, 1]; got {self.alpha!r}.")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        wants = (saliency(spec),)
        return (Stage(Site.projector(), self.budget, (_FRAMES,), wants),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Clip by clip: each has trees of its own."""
        batch, count, keep = *tokens.features.shape[:2], ctx.num_keep
        if keep == count:
            return Selection.identity(batch, count, tokens.features.device)
        frames = int(ctx[_FRAMES].max()) + 1
        regular = torch.arange(count, device=tokens.features.device) // max(1, count // frames)
        if not bool((ctx[_FRAMES] == regular).all()):
            raise ConfigError(f"{self.name} joins whole frames; in a chain it comes first.")
        known = any(ctx.get(s("feature")) is not None for s in (ClsAttention, ReceivedAttention))
        attention = attended(ctx) if known else torch.ones_like(tokens.features[..., 0])
        index, dest, weight = zip(
            *(
                self.merge(x.float().unflatten(0, (frames, -1)), seen.view(frames, -1), keep)
                for x, seen in zip(tokens.features, attention, strict=True)
            ),
            strict=True,
        )
        return Selection.assign(torch.stack(index), torch.stack(dest), torch.stack(weight))

    def merge(self, x: Tensor, seen: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of one clip ``[T, n, D]``: their tokens, each token's slot and weight there."""
        frames, each, _ = x.shape
        chosen = tell_apart(x, seen, min(each, int(self.alpha * keep) // frames)).flatten()
        left = keep - int(chosen.sum())
        root = self.trees(x, ~chosen.view(frames, each), left)
        size = torch.bincount(root, minlength=frames * each)
        mean = torch.zeros_like(x.flatten(0, 1)).index_add_(0, root, x.flatten(0, 1))
        mean = mean / size.clamp(min=1)[:, None]
        head = torch.arange(frames * each, device=x.device)  # the token of each token's slot
        trees = torch.ones_like(size)
        free = (size > 0) & ~chosen
        place = free.nonzero()[:, 0]
        if left and len(place):
            quota = ops.shares((place // each)[None], left)[0]
            for frame in (quota > 0).nonzero()[:, 0].tolist():
                own, number = place[place // each == frame], int(quota[frame])
                centres, cluster = ops.dpc_knn(mean[own][None], number, min(number, 7))
                head[own] = own[centres[0]][cluster[0]]
                trees[own] = torch.bincount(cluster[0], minlength=number)[cluster[0]]
            gone = place[quota[place // each] == 0]
            head[gone] = -1
        elif not left:
            head[~chosen] = -1
        token = head[root]
        index = token[token >= 0].unique()
        dest = torch.searchsorted(index, token.clamp(min=0)).where(token >= 0, -1)
        return index, dest, 1.0 / (size[root] * trees[root])

    def trees(self, x: Tensor, free: Tensor, enough: int) -> Tensor:
        """The first token of the tree that each token is in, ``[T n]``; itself, if in none."""
        frames, each, _ = x.shape
        parent = torch.arange(frames * each, device=x.device)
        if frames > 1:
            unit = normalize(x, dim=-1)
            cosine = unit[1:] @ unit[:-1].transpose(1, 2)
            cosine = cosine.masked_fill(~free[:-1, None], float("-inf"))
            best, who = cosine.max(dim=2)
            joined = (best > self.link) & free[1:] & ~self.cuts(x)[:, None]
            order = best.masked_fill(~joined, float("-inf")).flatten()
            order = order.argsort(descending=True, stable=True)
            number = min(int(joined.sum()), max(0, int(free.sum()) - enough))
            child = order[:number]
            parent[child + each] = child // each * each + who.flatten()[child]
        for _ in range((frames - 1).bit_length()):
            parent = parent[parent]
        return parent

    def cuts(self, x: Tensor) -> Tensor:
        """Whether a span ends behind each frame but the last, ``[T - 1]``."""
        unit = normalize(x.mean(dim=1), dim=-1)
        alike = (unit[1:] * unit[:-1]).sum(-1)
        number = max(int((alike < self.cut).sum()), min(self.segments - 1, len(alike)))
        order = alike.argsort(stable=True)[:number]
        return torch.zeros_like(alike, dtype=torch.bool).index_fill_(0, order, True)

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines inside a frame and with the one before, of one frame at the least."""
        return count * width


def tell_apart(x: Tensor, seen: Tensor, number: int) -> Tensor:
    """Which ``number`` tokens of every frame are selected, bool ``[T, n]``.

    Args:
        x: ``[T, n, D]``.
        seen: attention, ``[T, n]``.
        number: at most n.
    """
    chosen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    if number == 0:
        return chosen
    weight = seen * (x @ x.mean(dim=1).T).mean(dim=2)
    apart = ops.gram(normalize(x, dim=-1)).neg_().add_(1.0)  # of cosines; the same both ways
    near = _second(apart) * weight  # the nearest is itself
    if bool((weight < 0).any()):
        near = torch.where(weight < 0, -_second(apart.neg_()) * weight, near)
        apart.neg_()
    distance = apart.mul_(weight[:, None])
    for step in range(number):
        best = near.argmax(dim=1, keepdim=True)
        chosen.scatter_(1, best, True)
        row = distance.gather(1, best[..., None].expand(-1, -1, x.shape[1]))[:, 0]
        near = row.masked_fill(chosen, -torch.inf) if step == 0 else torch.minimum(near, row)
        near.scatter_(1, best, -torch.inf)
    return chosen


def _second(x: Tensor) -> Tensor:
    """The second least number of every row ``[..., n]``; of one number, that."""
    if x.shape[-1] == 1:
        return x[..., 0]
    at = x.argmin(dim=-1, keepdim=True)
    least = x.gather(-1, at)
    found = x.scatter_(-1, at, torch.inf).amin(dim=-1)
    x.scatter_(-1, at, least)
    return found
