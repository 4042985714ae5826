# SPDX-License-Identifier: Apache-2.0
"""LLaVA-PruMerge and PruMerge+: keep outliers, merge their likes into them (arXiv:2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visprune.core import (
    Budget,
    Context,
    ModelSpec,
    PositionRule,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import EncoderQueriesKeys, WholeClsAttention
from visprune.methods._leftover import others, outliers, ranked, with_leftover

_SEEN, _KEYS = WholeClsAttention("last"), EncoderQueriesKeys("last")


@dataclass(frozen=True, kw_only=True)
class PruMerge(PruningMethod):
    """Keeps the patches that stand out in the class token's attention, and merges others into them.

    Attention is that of the encoder's last layer with all heads taken as one. Without a budget a
    picture keeps as many patches as lie above ``Q3 + 1.5 (Q3 - Q1)``, at least one; with one, one
    less than it. To a kept patch come the 32 patches with the nearest keys (by cosine; kept ones
    too), each times its attention; one token more is the sum of all pruned ones times theirs. The
    weights are not made to sum to one, as in the official code.

    Differences: the official code merges features before the projector; here behind it, as
    everywhere. It lists kept patches by falling attention, here they are in raster order; its
    quartiles are those of a whole batch, here each picture's own. Its ratio does not count the
    token of all pruned ones; ``num_keep`` does.

    Args:
        num_keep: tokens of one image that enter the decoder; ``None``: adaptive.
        keep_ratio: the same as a fraction, rounded down.
        num_keep_per_frame: the same of each frame of a clip.
        neighbours: patches that come to a kept one.
        official: order and quartiles as in the official code.
    """

    name: ClassVar[str] = "prumerge"
    default_positions: ClassVar[PositionRule] = "compact"

    num_keep: int | None = None
    keep_ratio: float | None = None
    num_keep_per_frame: int | None = None
    neighbours: int = 32
    official: bool = False

    def __post_init__(self) -> None:
        """Check the budget."""
        super().__post_init__()
        _ = self.budget

    @property
    def budget(self) -> Budget | None:
        """``None``: the picture decides."""
        return Budget.maybe(
            num_keep=self.num_keep,
            keep_ratio=self.keep_ratio,
            num_keep_per_frame=self.num_keep_per_frame,
            rounding="floor",
        )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget, (_SEEN, _KEYS)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Rank by attention, and merge by keys."""
        score, count, keep = ctx[_SEEN], tokens.num_tokens, ctx.num_keep
        if keep == count:
            return Selection.identity(len(score), count, score.device)
        listed = self.listed(score, keep)
        near = _nearest(ctx[_KEYS][:, 1], listed, self.neighbours)  # [B, M, n]
        slot = torch.arange(listed.shape[1], device=score.device).where(listed >= 0, -1)
        return with_leftover(
            listed, score, score, raster=not self.official, leftover=keep != 1,
            source=near.flatten(1), slot=slot[..., None].expand_as(near).flatten(1),
        )  # fmt: skip

    def listed(self, score: Tensor, keep: int) -> Tensor:
        """The patches that stay, ``[B, M]``, -1 behind an image's last."""
        if keep == 0:
            return ranked(score, outliers(score, joint=self.official))
        return ranked(score, torch.full((len(score),), max(1, keep - 1), device=score.device))

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines of kept and all keys (their width is about that of the features)."""
        return keep * count * width


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge, with patches from all over the picture beside those that stand out.

    Without a budget ``q = #outliers / n`` and every ``s``-th patch stays besides, ``s`` the whole
    part of a third of ``int(1 / q)``, at least 1. With a budget, half of the patches (rounded up)
    stay by attention and as many evenly spaced ones of the others.

    Differences: those of PruMerge. With a ratio the official code lists evenly spaced patches
    whether or not they stay already, so that some come twice (``official=True``: as there).
    """

    name: ClassVar[str] = "prumerge_plus"

    def listed(self, score: Tensor, keep: int) -> Tensor:
        """Those that stand out, then those spaced evenly."""
        count, device = score.shape[1], score.device
        if keep == 0:
            top = super().listed(score, 0)
            every = [max(1, int(1 / (kept / count)) // 3) for kept in (top >= 0).sum(1).tolist()]
            step = torch.tensor(every, device=device)[:, None]
            even = torch.arange(count, device=device).expand(len(score), -1)
            even = even.where((even % step == 0) & (even < count - 1) & others(top, count), -1)
            listed = torch.cat([top, even], dim=1)
            first = (listed < 0).to(torch.int8).argsort(dim=1, stable=True)
            return listed.gather(1, first)[:, : int((listed >= 0).sum(1).max())]
        half = max(1, keep // 2)
        top = super().listed(score, half + 1)
        left = max(1, keep - 1) - half
        steps = torch.arange(left, device=device)
        if self.official:
            apart = int(1 / (half / count))
            even = (apart // 2 + apart * steps).expand(len(score), -1)
        else:
            rest = others(top, count).to(torch.int8).argsort(dim=1, descending=True, stable=True)
            even = rest[:, ((2 * steps + 1) * (count - half)) // (2 * max(1, left))]
        return torch.cat([top, even], dim=1)


def _nearest(keys: Tensor, listed: Tensor, number: int) -> Tensor:
    """The tokens with the nearest keys to each listed one, itself left out: ``[B, M, n]``."""
    count, width = keys.shape[1], listed.shape[1]
    order = others(listed, count).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    found = torch.cat([listed, order], dim=1)  # those listed, then the others
    there = torch.arange(count + width, device=keys.device) - width
    absent = (there >= (count - (listed >= 0).sum(1, keepdim=True))) | (found < 0)
    found = found.clamp(min=0)
    unit = normalize(keys.float(), dim=-1)
    rows = unit.gather(1, found[..., None].expand(-1, -1, unit.shape[2]))
    cosine = rows[:, :width] @ rows.transpose(1, 2)
    own = torch.eye(width, count + width, dtype=torch.bool, device=keys.device)
    cosine = cosine.masked_fill(own | absent[:, None], float("-inf"))
    near = cosine.argsort(dim=2, descending=True, stable=True)[..., : min(number, count - 1)]
    return found[:, None].expand(-1, width, -1).gather(2, near)
