# SPDX-License-Identifier: Apache-2.0
"""HoloV: a share of the budget for every crop of the picture (NeurIPS 2025, arXiv:2510.02912)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
class HoloV(BudgetedMethod):
    """Divides the budget among contiguous crops, and keeps the most attended tokens of each.

    At the projector: the sequence is cut into ``crops`` equal spans. A token's score is its
    attention times 1000 plus 0.09 times the variance of its cosines (projected features) within the
    crop, scaled to the same size; a crop is given its share of the budget by its mean score. Inside
    a crop attention alone decides, as in the official code (the paper: the whole score). Attention
    is the class token's in the encoder layer that the model reads, mean over heads; of an encoder
    without a class token, the mean attention that a patch receives there.

    Differences: the official code fills up with vectors of zeros what a crop cannot take that is
    given more than it has; here that goes, one each, to the crops of largest score that have room.
    It lists a crop's tokens by falling attention; here they are in raster order.

    Args:
        crops: spans; 0: by the budget, ``max(1, int(1024 / 576 * n / k))``, as the authors' code
            for Qwen2.5-VL has it.
        official: zeros and order as in the official code.
    """

    name: ClassVar[str] = "holov"
    default_positions: ClassVar[PositionRule] = "compact"

    crops: int = 16
    official: bool = False

    def __post_init__(self) -> None:
        """Check the number of crops."""
        super().__post_init__()
        if self.crops < 0:
            raise ConfigError(f"crops is a number of spans, or 0: by the budget; got {self.crops}.")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget, (saliency(spec),)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Quotas, then the most attended of each crop."""
        count, keep = tokens.num_tokens, ctx.num_keep
        if keep == count:
            return Selection.identity(len(tokens.features), count, tokens.features.device)
        attention = attended(ctx)
        crops = min(count, self.crops or max(1, int(1024 / 576 * count / keep)))
        crop, size = _cut(count, crops, attention.device)
        score = _crop_scores(tokens.features.float(), attention, size)
        quota, score = _quotas(score, keep)
        over = (quota - size).clamp(min=0)
        taken = quota - over
        if not self.official:
            taken = _handed_on(taken, over.sum(1), size, score)
        crop = crop.expand_as(attention)
        stay = ops.rank_within(attention, crop) < taken.gather(1, crop)
        if not self.official:
            return Selection.top(stay.float(), keep)
        whole = (taken >= size).gather(1, crop)
        return _as_there(attention, stay, crop, whole, keep)

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines within the crops."""
        crops = min(count, self.crops or max(1, int(1024 / 576 * count / max(1, keep))))
        return count * count * width // crops


def _cut(count: int, crops: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The crop of each token ``[1, N]``, and the sizes of crops; the first are longer by one."""
    size = torch.full((crops,), count // crops, device=device)
    size[: count % crops] += 1
    return torch.arange(crops, device=device).repeat_interleave(size)[None], size


def _crop_scores(features: Tensor, attention: Tensor, size: Tensor) -> Tensor:
    """The score of every crop, ``[B, P]``."""
    unit = features / (features.norm(dim=-1, keepdim=True) + 1e-6)
    scores: list[Tensor] = []
    start = 0
    for span in size.tolist():
        own, seen = unit[:, start : start + span], attention[:, start : start + span]
        start += span
        if span == 1:  # as there: not times 1000
            scores.append(seen)
            continue
        cosine = own @ own.transpose(1, 2)
        cosine.diagonal(dim1=1, dim2=2).zero_()
        mean = cosine.sum(2, keepdim=True) / (span - 1)
        spread = (cosine - mean).square().sum(2) / (span - 1)
        scale = (1000 * seen).abs().mean(1) / (spread.abs().mean(1) + 1e-6)
        scores.append(1000 * seen + 0.09 * spread * scale[:, None])
    return torch.stack([score.mean(1) for score in scores], dim=1)


def _quotas(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The budget in proportion to the scores, and the weights of the crops, both ``[B, P]``."""
    weight = score / (score.sum(1, keepdim=True) + 1e-6)
    quota = (weight * keep).floor().long()
    order = weight.argsort(dim=1, descending=True, stable=True)
    rest = keep - quota.sum(1, keepdim=True)
    rounds = torch.arange(score.shape[1], device=score.device)
    return quota.scatter_add(1, order, (rounds < rest).long()), weight


def _handed_on(taken: Tensor, over: Tensor, size: Tensor, weight: Tensor) -> Tensor:
    """Give what some crops cannot take to those with room, one each in order of weight."""
    while bool((over > 0).any()):
        room = taken < size
        order = weight.masked_fill(~room, float("-inf")).argsort(
            dim=1, descending=True, stable=True
        )
        rounds = torch.arange(weight.shape[1], device=weight.device)
        more = (rounds < over[:, None]) & room.gather(1, order)
        taken = taken.scatter_add(1, order, more.long())
        over = over - more.sum(1)
    return taken


def _as_there(attention: Tensor, stay: Tensor, crop: Tensor, whole: Tensor, keep: int) -> Selection:
    """Crop by crop, a whole one in its order, else by falling attention; then zeros."""
    score = torch.where(whole, 0.0, attention)
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, crop.gather(1, order).argsort(dim=1, stable=True))
    first = (~stay).gather(1, order).to(torch.int8).argsort(dim=1, stable=True)
    index = order.gather(1, first[:, :keep])
    empty = torch.zeros_like(index)
    own = stay.gather(1, index).to(torch.float32)  # a token that does not stay holds a zero's place
    return Selection.merge(index, attention.shape[1], empty, empty - 1, own * 0.0, own, gaps=True)
