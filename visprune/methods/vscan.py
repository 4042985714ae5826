# SPDX-License-Identifier: Apache-2.0
"""VScan: a global and a local scan of the encoder, then the question's (arXiv:2505.22654)."""

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
from visprune.core.signals import LastQueryAttention
from visprune.errors import ConfigError
from visprune.methods._saliency import attended, saliency

_ASKED = LastQueryAttention(layer="own")


@dataclass(frozen=True, kw_only=True)
class VScan(BudgetedMethod):
    """Keeps what stands out in every window and in the whole picture, and averages the rest in.

    **Stage 1**, at the projector. Local: half of what it keeps, an equal number for each of 4 x 4
    windows of the picture, by the class token's attention in a shallow layer of the encoder (the
    sixth of 24). Global: the rest, by its attention in the layer that the model reads, among those
    not kept yet. Every other token goes to the kept one of largest cosine (projected features) and
    is averaged in. Attention is the mean over heads; of an encoder without a class token, the mean
    that a patch receives. **Stage 2**, in the middle of the decoder, keeps what the prompt's last
    token is about to attend to most.

    The budget is what survives stage 2; stage 1 keeps ``1 / second`` times as much. So what the
    paper calls 64 tokens, 96 and then 32, is ``num_keep=32``: 64 a layer on average.

    Differences: what does not divide by the number of windows is lost in the official code, which
    keeps fewer tokens then than it was told; here it is spent globally (``official=True``: lost).
    The official code wants a grid of 24 x 24; here any is cut into 4 x 4 windows, each region of a
    tiled picture by itself.

    Args:
        layer: the shallow layer, 0-based, or a fraction of the encoder's depth.
        second: what stage 2 keeps of what stage 1 leaves, in (0, 1]; 1 leaves stage 2 out.
        depth: 0-based decoder layer of stage 2, or a fraction of the depth.
        official: lose what does not divide.
    """

    name: ClassVar[str] = "vscan"
    default_positions: ClassVar[PositionRule] = "compact"

    layer: int | float = 5 / 24
    second: float = 1 / 3
    depth: int | float = 0.5
    official: bool = False

    def __post_init__(self) -> None:
        """Check the share."""
        super().__post_init__()
        if not 0.0 < self.second <= 1.0:
            raise ConfigError(f"second is what stage 2 keeps, in (0, 1]; got {self.second}.")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """A stage at the projector and one inside the decoder."""
        needs = (saliency(spec, self.layer), saliency(spec))
        if self.second == 1.0:
            return (Stage(Site.projector(), self.budget, needs),)
        first = self.budget.scaled(1.0 / self.second, rounding="round")
        later = Stage(Site.decoder(self.depth), self.budget, (_ASKED,))
        return (Stage(Site.projector(), first, needs), later)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Local, global, and the rest averaged in; later, what is asked."""
        if ctx.site.kind == "decoder":
            return Selection.top(ctx[_ASKED].mean(dim=1), ctx.num_keep)
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
        """Cosines of what goes to what stays; stage 2 adds up a row, which counts as no more."""
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
