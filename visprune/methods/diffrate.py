# SPDX-License-Identifier: Apache-2.0
"""DiffRate: prune, then merge, by learned numbers for each layer (ICCV 2023, arXiv:2305.17997)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import (
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    StepBudget,
    VisualTokens,
)
from visprune.core.numeric import is_whole, plain
from visprune.core.signals import ClsAttention
from visprune.errors import BudgetError, ConfigError, did_you_mean
from visprune.methods._diffrate_schedules import SCHEDULES

_BY_DEPTH = {12: "deit_small-2.9", 24: "mae_large-38.5", 32: "mae_huge-103.4"}


@dataclass(frozen=True, kw_only=True)
class DiffRate(PruningMethod):
    """Drops the least attended patches of every layer, and merges the next least into the rest.

    Between attention and MLP, patches are ranked by the class token's attention in that layer (mean
    over heads). The last of them are dropped; those before each join the most similar of the first
    (cosine of the features, class token excluded), and a token becomes the plain mean of itself and
    what joins it. What joins adds its size times that cosine (at least 0) to the token's size,
    whose logarithm attention adds to the key's scores. How many are left after the one and then the
    other is learned in the paper, for each layer; here are the numbers that were published. A model
    without a class token is refused.

    On pictures of another number of patches than the numbers are for, they count as fractions.

    Args:
        numbers: model and billions of multiply-adds, as published: ``"deit_small-2.9"`` (79.5 %).
            ``None``: for 12 layers that, for 24 ``"mae_large-38.5"``, for 32 ``"mae_huge-103.4"``;
            for others, that of 12 at the same fraction of the depth, which nobody measured.
        pruned: one's own numbers instead: tokens left after pruning in each layer, class token
            included.
        merged: and after merging.
        tokens: that ``pruned`` and ``merged`` start from, class token included.
    """

    name: ClassVar[str] = "diffrate"
    size_weighted: ClassVar[bool] = True

    numbers: str | None = None
    pruned: Sequence[int] | None = None
    merged: Sequence[int] | None = None
    tokens: int = 197

    def __post_init__(self) -> None:
        """Check names and numbers."""
        super().__post_init__()
        for name in ("pruned", "merged"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else plain(tuple(given)))
        if self.numbers is not None and self.numbers not in SCHEDULES:
            raise ConfigError(
                f"diffrate has no published numbers {self.numbers!r}."
                f"{did_you_mean(str(self.numbers), list(SCHEDULES))} "
                f"Published: {', '.join(SCHEDULES)}."
            )
        own = (self.pruned, self.merged)
        if own == (None, None):
            return
        fit = len({None if x is None else len(x) for x in own}) == 1 and self.numbers is None
        counts = [n for x in own for n in x or ()]
        if not fit or not counts or not all(is_whole(n) and 2 <= n <= self.tokens for n in counts):
            raise BudgetError(
                f"pruned and merged are two lists, one whole number per layer, the tokens left, "
                f"from 2 (class token and one patch) to tokens={self.tokens}, without "
                f"numbers=...; got pruned={self.pruned!r}, merged={self.merged!r}, "
                f"numbers={self.numbers!r}."
            )

    def _left(self, layers: int) -> tuple[Sequence[int], Sequence[int], int]:
        """Tokens after pruning and after merging, and those at first."""
        if self.pruned is not None and self.merged is not None:
            return self.pruned, self.merged, self.tokens
        pruned, merged = SCHEDULES[self.numbers or _BY_DEPTH.get(layers, "deit_small-2.9")]
        if self.numbers is None and layers != len(pruned):
            at = [layer * len(pruned) // layers for layer in range(layers)]
            return [pruned[n] for n in at], [merged[n] for n in at], pruned[0]
        return pruned, merged, pruned[0]

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage in every layer.

        Raises:
            BudgetError: the model has another number of layers.
        """
        layers, needs = spec.encoder_layers, (ClsAttention("own"),)
        pruned, merged, whole = self._left(layers)
        if layers != len(pruned):
            raise BudgetError(
                f"diffrate's numbers are for {len(pruned)} layers, and {spec.family} has {layers}. "
                f"Published: {', '.join(SCHEDULES)}. Or give pruned=[...] and merged=[...]."
            )
        return tuple(
            Stage(Site.encoder(layer, after_attention=True), _step(min(left), whole), needs)
            for layer, left in enumerate(zip(pruned, merged, strict=True))
        )

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Rank, drop, and merge what is between."""
        keep, count = ctx.num_keep, tokens.num_tokens
        if keep == count:
            return Selection.identity(tokens.features.shape[0], count, tokens.features.device)
        pruned, _, whole = self._left(ctx.num_layers)
        there = max(keep, _step(pruned[ctx.layer], whole).resolve(count, ctx.original))
        attention = ctx[ClsAttention("own")].mean(dim=1)  # [B, N]
        order = attention.argsort(dim=1, descending=True, stable=True)
        index, source = order[:, :keep], order[:, keep:there]
        if source.shape[1] == 0:
            return Selection(index, count)
        cosine, slot = _match(tokens.features.detach(), index, source)
        came = torch.ones(source.shape, device=index.device)
        share = 1.0 / torch.ones(index.shape, device=index.device).scatter_add(1, slot, came)
        merged = Selection.merge(index, count, source, slot, share.gather(1, slot), own=share)
        return merged.growing(cosine.clamp(min=0.0))

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines of what merges with what stays: at most all that leaves."""
        return (count - keep) * keep * width


def _step(left: int, tokens: int) -> StepBudget:
    """``left`` of ``tokens``, the class token among both, as a fraction of the patches."""
    # Half a patch more, so that the fraction rounds down to the very number.
    ratio = min(1.0, (left - 0.5) / (tokens - 1))
    return StepBudget(keep_ratio=ratio, of="original", rounding="floor")


def _match(features: Tensor, index: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """How similar the most similar of the tokens ``index`` is to each of ``source``, and which."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)

    def rows(at: Tensor) -> Tensor:
        return unit.gather(1, at[..., None].expand(-1, -1, unit.shape[-1]))

    best = (rows(source) @ rows(index).transpose(1, 2)).max(dim=-1)
    return best.values, best.indices
