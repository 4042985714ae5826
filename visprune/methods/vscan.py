# SPDX-License-Identifier: Apache-2.0
"""VScan's first stage: a global and a local scan of the encoder (arXiv:2505.22654)."""

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
    PositionRule,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.errors import ConfigError
from visprune.methods._saliency import attended, saliency


@dataclass(frozen=True, kw_only=True)
class VScan(BudgetedMethod):
    """Keeps what stands out in every window and in the whole picture, and averages the rest in.

    At the projector. Local: half of the budget, an equal number for each of 4 x 4 windows of the
    picture, by the class token's attention in a shallow layer of the encoder (the sixth of 24).
    Global: the rest of the budget, by its attention in the layer that the model reads, among those
    not kept yet. Every other token goes to the kept one of largest cosine (projected features) and
    is averaged in. Attention is the mean over heads; of an encoder without a class token, the mean
    that a patch receives. The method's second stage, inside the decoder, is ``pyramiddrop``'s rule
    at one depth.

    Differences: what does not divide by the number of windows is lost in the official code, which
    keeps fewer tokens then than it was told; here it is spent globally (``official=True``: lost).
    The official code wants a grid of 24 x 24; here any is cut into 4 x 4 windows, each region of a
    tiled picture by itself.

    Args:
        layer: the shallow layer, 0-based, or a fraction of the encoder's depth.
        official: lose what does not divide.
    """

    name: ClassVar[str] = "vscan"
    default_positions: ClassVar[PositionRule] = "compact"

    layer: int | float = 5 / 24
    official: bool = False

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        needs = (saliency(spec, self.layer), saliency(spec))
        return (Stage(Site.projector(), self.budget, needs),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Local, global, and the rest averaged in."""
        batch, count, keep = *tokens.features.shape[:2], ctx.num_keep
        if keep == count:
            return Selection.identity(batch, count, tokens.features.device)
        window, number = _windows(tokens.pos)
        each = keep // 2 // number
        shallow, deep = attended(ctx, self.layer), attended(ctx)
        local = ops.rank_within(shallow, window) < each
        left = keep - keep // 2 if self.official else 0
        if self.official and not bool((local.sum(1) == each * number).all()):
            raise ConfigError("official=True wants windows that hold their share of the budget.")
        total = each * number + left if self.official else keep
        ranked = deep.masked_fill(local, float("inf")).argsort(dim=1, descending=True, stable=True)
        index, others = ranked[:, :total].sort(dim=1).values, ranked[:, total:].sort(dim=1).values
        unit = normalize(tokens.features.float(), dim=-1)
        kept, gone = ops.take_rows(unit, index), ops.take_rows(unit, others)
        nearest = (gone @ kept.transpose(1, 2)).argmax(dim=2)
        return Selection.mean(index, others, nearest, torch.ones_like(deep))

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines of what goes to what stays."""
        return keep * (count - keep) * width


def _windows(pos: Tensor) -> tuple[Tensor, int]:
    """The window of each token ``[B, N]``, and how many there are: 4 x 4 of every region."""
    region = torch.unique(pos[..., 0], return_inverse=True)[1]
    regions = int(region.max()) + 1
    window = region
    for axis in (1, 2):
        place, edges = pos[..., axis], pos.new_zeros(len(pos), regions)
        low = edges.scatter_reduce(1, region, place, "amin", include_self=False)
        high = edges.scatter_reduce(1, region, place, "amax", include_self=False)
        extent = (high - low + 1).gather(1, region)
        window = window * 4 + (place - low.gather(1, region)) * 4 // extent
    return window, 16 * regions
