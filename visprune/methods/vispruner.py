# SPDX-License-Identifier: Apache-2.0
"""VisPruner: important tokens, and others that differ (ICCV 2025, arXiv:2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
from visprune.core.signals import ClsAttention, EncoderFeatures, ReceivedAttention
from visprune.errors import ConfigError

_FEATURES = EncoderFeatures("feature")
_NEAR = 32  # nearest tokens that are known from the start


@dataclass(frozen=True, kw_only=True)
class VisPruner(BudgetedMethod):
    """Keeps the most attended patches, and thins the others out by likeness, at the projector.

    ``int(important * k)`` patches stay by the class token's attention in the encoder layer that the
    model reads (mean over heads; of an encoder without a class token, by the mean attention that a
    patch receives in the last layer, as the authors' SigLIP code does). The others are listed by
    falling attention and thinned out, 8 at a time, until the budget is met: of the even places of
    the list those go whose largest cosine to an odd place is largest; the even ones that stay, by
    falling cosine, and the odd ones are the new list. Cosines are of features before the projector.
    Kept tokens are in raster order, and position ids close up, as in the official code.

    Difference: the official code fails where the list has an odd length or fewer even places than
    have to go; here the longer half is the even one, and fewer go at once. It gives each crop of a
    tiled picture the same budget; here the picture has one.

    Args:
        important: share of the budget that is kept by attention, in [0, 1].
    """

    name: ClassVar[str] = "vispruner"
    default_positions: ClassVar[PositionRule] = "compact"

    important: float = 0.5

    def __post_init__(self) -> None:
        """Check the share."""
        super().__post_init__()
        if not 0.0 <= self.important <= 1.0:
            raise ConfigError(
                f"important is a share of the budget, in [0, 1]; got {self.important!r}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        has_cls = spec.why_not("cls_token") is None
        seen = ClsAttention("feature") if has_cls else ReceivedAttention("last")
        return (Stage(Site.projector(), self.budget, (seen, _FEATURES)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The important ones, then what is left of the others."""
        count, keep = tokens.num_tokens, ctx.num_keep
        of_class = ctx.get(ClsAttention("feature"))
        score = ctx[ReceivedAttention("last")] if of_class is None else of_class
        order = score.mean(dim=1).argsort(dim=1, descending=True, stable=True)
        first = int(keep * self.important)
        diverse = thin_out(ctx[_FEATURES], order[:, first:], keep - first)
        return Selection.keep(torch.cat([order[:, :first], diverse], dim=1), count)

    def macs(self, count: int, keep: int, width: int) -> int:
        """All pairwise cosines, once."""
        return count * count * width


def thin_out(features: Tensor, listed: Tensor, keep: int) -> Tensor:
    """Take the tokens most like another out of a list, until ``keep`` are left.

    Args:
        features: ``[B, N, D]``.
        listed: the list, ``[B, R]``.
        keep: tokens to leave.
    """
    if keep == 0:
        return listed[:, :0]
    # In float32 many cosines of like tokens are equal, and the published order of those is none.
    unit = normalize(features.double(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    near, who = cosine.topk(min(_NEAR + 1, cosine.shape[2]), dim=2)  # each finds itself too
    while listed.shape[1] > keep:
        even, odd = listed[:, ::2], listed[:, 1::2]
        is_odd = torch.zeros(cosine.shape[:2], dtype=torch.bool, device=cosine.device)
        is_odd = is_odd.scatter(1, odd, True)
        best = _largest(cosine, near, who, even, is_odd)
        order = best.argsort(dim=1, descending=True, stable=True)
        drop = min(8, listed.shape[1] - keep, even.shape[1])
        listed = torch.cat([even.gather(1, order[:, drop:]), odd], dim=1)
    return listed


def _largest(cosine: Tensor, near: Tensor, who: Tensor, even: Tensor, is_odd: Tensor) -> Tensor:
    """The largest cosine of each of ``even`` ``[B, E]`` to one that ``is_odd`` ``[B, N]``.

    Mostly one of its nearest tokens is odd; only for the others a whole row is looked at.
    """
    wide = even[..., None].expand(-1, -1, who.shape[2])
    neighbours = who.gather(1, wide)
    hit = is_odd.gather(1, neighbours.flatten(1)).view_as(neighbours)
    first = hit.to(torch.uint8).argmax(dim=2, keepdim=True)
    best = near.gather(1, wide).gather(2, first)[..., 0]
    image, place = (~hit.any(dim=2)).nonzero(as_tuple=True)
    rows = cosine[image, even[image, place]].masked_fill(~is_odd[image], float("-inf"))
    best[image, place] = rows.amax(dim=1)
    return best
