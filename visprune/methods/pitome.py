# SPDX-License-Identifier: Apache-2.0
"""PiToMe: merge what is redundant, protect what is rare (NeurIPS 2024, arXiv:2405.16148)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

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
from visprune.core.numeric import is_number
from visprune.core.signals import EncoderKeys
from visprune.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class PiToMe(PruningMethod):
    """Merges patches of high energy in every layer of an encoder, between attention and MLP.

    Of n patches, ``r = floor(n - keep_ratio n)`` merge. A patch's energy is the mean over all of
    ``elu(cosine - margin)`` of the keys (mean over heads), so it is high in large uniform regions;
    the margin falls from layer to layer, ``margin (1 - l / L)``. In the first half of the layers,
    patches in falling order of energy alternate between two sets that are matched as in ToMe. In
    the second half only the 2 r of highest energy take part: alternately they go into the best
    match or stay to receive, and all others are protected. Means are weighted by size. All as in
    the official code (which calls the switch ``use_bsm_pitome``); ties keep the lower index, and
    prefix tokens take no part.

    Attention adds the logarithm of a key's size only on request: the official patch of ViTs
    (hchautran/PiToMe 550b5de) has ``prop_attn=False`` and gives its attention no sizes; only that
    of BLIP-2 adds them.

    Args:
        keep_ratio: fraction of the patches kept in each layer, in [0.5, 1].
        margin: of the first layer; the code has 0.75.
        prop_attn: whether attention adds the logarithm of sizes (proportional attention).
    """

    name: ClassVar[str] = "pitome"
    size_weighted: ClassVar[bool] = True
    gives_back: ClassVar[bool] = True

    keep_ratio: float
    margin: float = 0.75
    prop_attn: bool = False

    def __post_init__(self) -> None:
        """Check the ratio."""
        super().__post_init__()
        if not (is_number(self.keep_ratio) and 0.5 <= self.keep_ratio <= 1.0):
            raise BudgetError(
                f"keep_ratio is the fraction of patches kept in each layer, in [0.5, 1]: at most "
                f"half can merge; got {self.keep_ratio!r}."
            )

    @property
    def size_bias(self) -> bool:
        """Proportional attention."""
        return self.prop_attn

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage in every layer."""
        step, needs = StepBudget(keep_ratio=self.keep_ratio), (EncoderKeys("own"),)
        return tuple(
            Stage(Site.encoder(layer, after_attention=True), step, needs)
            for layer in range(spec.encoder_layers)
        )

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Rank by energy, and merge."""
        batch, count = tokens.features.shape[0], tokens.num_tokens
        r = count - ctx.num_keep
        if r == 0:
            return Selection.identity(batch, count, tokens.features.device)
        unit = normalize(ctx[EncoderKeys("own")].float(), dim=-1)
        cosine = unit @ unit.transpose(1, 2)  # [B, N, N]
        margin = self.margin * (1.0 - ctx.layer / ctx.num_layers)
        energy = elu(cosine - margin).mean(dim=2)
        order = energy.argsort(dim=1, descending=True, stable=True)
        if ctx.layer < math.ceil(ctx.num_layers / 2):
            giving, taking = order[:, ::2], order[:, 1::2]
            best, partner = _best(cosine, giving, taking)
            ranked = best.argsort(dim=1, descending=True, stable=True)
            merged, left = ranked[:, :r], giving.gather(1, ranked[:, r:])
            source, partner = giving.gather(1, merged), partner.gather(1, merged)
        else:
            source, taking, left = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
            _, partner = _best(cosine, source, taking)
        index = torch.cat([left, taking], dim=1)
        return Selection.mean(index, source, partner + left.shape[1], tokens.size)

    def macs(self, count: int, keep: int, width: int) -> int:
        """All pairwise cosines."""
        return 0 if keep == count else count * count * width


def _best(cosine: Tensor, giving: Tensor, taking: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``giving`` ``[B, A]`` its largest cosine to one of ``taking`` ``[B, T]``."""
    rows = cosine.gather(1, giving[..., None].expand(-1, -1, cosine.shape[2]))
    pairs = rows.gather(2, taking[:, None].expand(-1, giving.shape[1], -1))
    best, partner = pairs.max(dim=2)
    return best, partner
