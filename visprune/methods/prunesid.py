# SPDX-License-Identifier: Apache-2.0
"""PruneSID: semantic groups, thinned out by likeness (ICLR 2026, arXiv:2603.09480)."""

from __future__ import annotations

import math
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
from visprune.core.signals import EncoderFeatures
from visprune.methods._saliency import attended, saliency

_FEATURES = EncoderFeatures("feature")


@dataclass(frozen=True, kw_only=True)
class PruneSID(BudgetedMethod):
    """Groups tokens by principal components, and keeps of each group those unlike one another.

    At the projector, on features before it. With ``K = k + 1`` (the published K counts the class
    token): a token belongs to the one of ``int(K / 4)`` principal components of the sigmoid of the
    features that it loads most on. Inside a group the most attended token stays and suppresses
    those whose cosine to it is above ``K / 32`` times the picture's mean, then the next one does;
    those that stay come first. A group's share of the budget follows their number.

    Differences: the official code draws the components' start at random and is never the same
    twice; here from ``seed``. It lists tokens group by group; here they are in raster order. Of an
    encoder without a class token the mean attention that a patch receives counts.

    Args:
        seed: of the components' start.
    """

    name: ClassVar[str] = "prunesid"
    default_positions: ClassVar[PositionRule] = "compact"

    seed: int = 0

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget, (saliency(spec), _FEATURES)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Groups, survivors, quotas."""
        count, keep = tokens.num_tokens, ctx.num_keep
        if keep == count:
            return Selection.identity(len(tokens.features), count, tokens.features.device)
        features = ctx[_FEATURES].float()
        number = min(max(1, (keep + 1) // 4), count, features.shape[2])
        group = components(features, number, self.seed)
        return Selection.keep(pick(features, attended(ctx), group, number, keep), count)

    def macs(self, count: int, keep: int, width: int) -> int:
        """All pairwise cosines, and six products with the components."""
        return count * width * (count + 6 * max(1, (keep + 1) // 4))


def components(features: Tensor, number: int, seed: int) -> Tensor:
    """The principal component that each token ``[B, N, D]`` loads most on, ``[B, N]``.

    Two rounds of subspace iteration. Images one by one: the last bit of a product depends on the
    batch, and a group may hang on it.
    """
    start = torch.randn(features.shape[1], number, generator=torch.Generator().manual_seed(seed))
    found = []
    for image in features.sigmoid():
        table = image.T - image.T.mean(0)  # [D, N]: tokens are the variables
        basis = torch.linalg.qr(table @ start.to(table)).Q
        for _ in range(2):
            basis = torch.linalg.qr(table @ torch.linalg.qr(table.T @ basis).Q).Q
        loadings = torch.linalg.svd(basis.T @ table, full_matrices=False).Vh
        found.append(loadings.abs().argmax(0))
    return torch.stack(found)


def pick(features: Tensor, score: Tensor, group: Tensor, number: int, keep: int) -> Tensor:
    """The published rule on tensors: tokens group by group, ``[B, keep]``.

    Args:
        features: ``[B, N, D]``.
        score: attention, ``[B, N]``, each below 900.
        group: of every token, ``[B, N]``.
        number: of groups.
        keep: K - 1.
    """
    unit = normalize(features, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    count = score.shape[1]
    pairs = max(1, count * (count - 1) // 2)
    limit = cosine.triu(1).sum((1, 2)) / pairs * ((keep + 1) / 32)
    member = group[:, None] == torch.arange(number, device=group.device)[:, None]  # [B, G, N]
    ranked, survived = _suppress(cosine > limit[:, None, None], score, member)
    size, alive = member.sum(2), (member & survived[:, None]).sum(2)
    rows = []
    for place in range(len(score)):
        quota = _quotas(size[place].tolist(), alive[place].tolist(), keep + 1)
        order = ranked[place].argsort(descending=True, stable=True)
        order = order[group[place, order].argsort(stable=True)]
        of = group[place, order].tolist()
        left = list(quota)
        row = []
        for token, own in zip(order.tolist(), of, strict=True):
            if left[own]:
                left[own] -= 1
                row.append(token)
        rows.append(row)
    return torch.tensor(rows, device=score.device)


def _suppress(alike: Tensor, score: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of every token, and whether it survived; all groups take their next one at once."""
    alive = member.clone()
    ranked, survived = score.clone(), torch.zeros_like(score, dtype=torch.bool)
    for done in range(score.shape[1]):
        best = score[:, None].masked_fill(~alive, float("-inf")).argmax(2)  # [B, G]
        there = alive.any(2)
        if not bool(there.any()):
            break
        rows = alike.gather(1, best[..., None].expand(-1, -1, alike.shape[2]))
        alive = (alive & ~rows).scatter(2, best[..., None], False)
        taken = torch.zeros_like(best[:, :1]).expand_as(score)
        taken = taken.scatter_add(1, best, there.long()) > 0
        ranked = torch.where(taken & ~survived, 1000.0 - done, ranked)
        survived = survived | taken
    return ranked, survived


def _quotas(size: list[int], alive: list[int], total: int) -> list[int]:
    """Tokens taken of each group; their sum is ``total - 1``."""
    low = [min(1, n) for n in size]
    high = [min(5 * math.ceil(total / 64), n, c) for n, c in zip(size, alive, strict=True)]
    while sum(high) < total:
        high = [min(h + 1, n) for h, n in zip(high, size, strict=True)]
    extra, done, given, taken = max(0, total - sum(low) - 1), 0, 0, []
    for own, least, most in zip(alive, low, high, strict=True):
        done += own
        upto = round(extra * done / max(1, sum(alive)))
        taken.append(min(upto - given + least, most))
        given = upto
    for place in sorted(range(len(size)), key=lambda g: -alive[g]):
        missing = extra + sum(low) - sum(taken)
        taken[place] += min(max(0, missing), high[place] - taken[place])
    return taken
