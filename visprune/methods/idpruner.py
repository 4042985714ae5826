# SPDX-License-Identifier: Apache-2.0
"""IDPruner: importance against likeness to what is kept (of AngelSlim, 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
from visprune.core.numeric import is_whole
from visprune.errors import ConfigError
from visprune.methods._saliency import attended, saliency


@dataclass(frozen=True, kw_only=True)
class IDPruner(BudgetedMethod):
    """Picks tokens by maximal marginal relevance, at the projector.

    The first is the most important; each next has the largest ``balance * importance -
    (1 - balance) * s``, where ``s`` is its largest cosine (projected features) to one picked
    already. Importance is scaled to 0 to 1 within the picture. Ties keep the lower index; kept
    tokens are in raster order.

    Difference: the authors' importance comes from a trained network (VisionSelector), whose weights
    are for one model. Here it is the class token's attention in the encoder layer that the model
    reads, mean over heads, or the mean attention that a patch receives there; the published figures
    are not this method's.

    Args:
        balance: weight of importance, in [0, 1].
        at_once: tokens picked in one step.
    """

    name: ClassVar[str] = "idpruner"
    default_positions: ClassVar[PositionRule] = "compact"

    balance: float = 0.5
    at_once: int = 1

    def __post_init__(self) -> None:
        """Check balance and step."""
        super().__post_init__()
        if not 0.0 <= self.balance <= 1.0:
            raise ConfigError(f"balance is a weight, in [0, 1]; got {self.balance!r}.")
        if not is_whole(self.at_once) or self.at_once < 1:
            raise ConfigError(f"at_once is a number of tokens, at least 1; got {self.at_once!r}.")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget, (saliency(spec),)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Greedy, by importance and likeness."""
        index = marginal(tokens.features, attended(ctx), ctx.num_keep, self.balance, self.at_once)
        return Selection.keep(index, tokens.num_tokens)

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines to every picked token."""
        return keep * count * width


def marginal(x: Tensor, raw: Tensor, keep: int, balance: float, at_once: int = 1) -> Tensor:
    """The published rule on tensors, in order of selection: int64 ``[B, keep]``.

    Args:
        x: features, ``[B, N, D]``.
        raw: importance, ``[B, N]``.
        keep: tokens to pick.
        balance: see the class.
        at_once: see the class.
    """
    low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
    importance = (raw - low) / (high - low + 1e-6)
    x = x.float()
    unit = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
    near = torch.full_like(importance, float("-inf"))
    score, picked = importance.clone(), []
    gone = torch.zeros_like(importance, dtype=torch.bool)
    for done in range(0, keep, at_once):
        order = score.masked_fill(gone, float("-inf")).argsort(dim=1, descending=True, stable=True)
        best = order[:, : min(at_once, keep - done)]
        picked.append(best)
        gone = gone.scatter(1, best, True)
        rows = unit.gather(1, best[..., None].expand(-1, -1, unit.shape[2]))
        near = torch.maximum(near, (unit @ rows.transpose(1, 2)).amax(2))
        score = balance * importance - (1 - balance) * near
    return torch.cat(picked, dim=1)
