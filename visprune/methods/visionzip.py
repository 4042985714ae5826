# SPDX-License-Identifier: Apache-2.0
"""VisionZip: keep dominant tokens, merge the rest (CVPR 2025, arXiv:2412.04467)."""

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
from visprune.core.signals import ClsAttention, EncoderKeys
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VisionZip(BudgetedMethod):
    """Keeps dominant tokens and merges the rest into a few contextual ones, at the projector.

    Dominant: most class-token attention in the encoder's feature layer, summed over heads.
    Contextual: every ``max(1, R // c)``-th of the R others is a target; each remaining one goes to
    the target whose normalised mean-head key is nearest; a contextual token is its target plus the
    mean of what came to it (its row of the map sums to two). Contextual tokens follow the dominant
    ones, and position ids close up (``positions="compact"``), as in the official code.

    Differences: the official code merges encoder features before the projector and also keeps the
    class token; transformers' LLaVA has no place for the class token, so all ``num_keep`` tokens
    are patches, and merging happens after the projector.

    Args:
        contextual: contextual tokens among the budget; ``None``: 10 of 64, as in the published
            settings (30 of 192, 20 of 128).
    """

    name: ClassVar[str] = "visionzip"
    default_positions: ClassVar[PositionRule] = "compact"

    contextual: int | None = None

    def __post_init__(self) -> None:
        """Check the split."""
        super().__post_init__()
        limit = self.num_keep  # of frames, it is known with the clip
        if self.contextual is not None and (
            self.contextual < 0 or (limit and self.contextual >= limit)
        ):
            raise ConfigError(
                f"contextual lies between 0 and num_keep - 1 = {(limit or 1) - 1}, got "
                f"{self.contextual}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        needs = (ClsAttention("feature"), EncoderKeys("feature"))
        return (Stage(Site.projector(), self.budget, needs),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Dominant by attention, contextual by keys."""
        count, keep = tokens.num_tokens, ctx.num_keep
        if keep == count:
            return Selection.identity(len(tokens.features), count, tokens.features.device)
        contextual = round(keep * 10 / 64) if self.contextual is None else self.contextual
        contextual = min(contextual, keep - 1)
        return zip_tokens(
            ctx[ClsAttention("feature")].sum(dim=1),
            ctx[EncoderKeys("feature")],
            keep - contextual,
            contextual,
        )


def zip_tokens(score: Tensor, keys: Tensor, dominant: int, contextual: int) -> Selection:
    """The published rule on tensors.

    Args:
        score: class-token attention summed over heads, ``[B, N]``.
        keys: keys averaged over heads, ``[B, N, d]``.
        dominant: tokens kept as they are.
        contextual: tokens that the rest is merged into.
    """
    batch, count = score.shape
    order = score.argsort(dim=1, descending=True, stable=True)
    top = order[:, :dominant].sort(dim=1).values
    if contextual == 0:
        return Selection.keep(top, count)
    rest = order[:, dominant:].sort(dim=1).values  # [B, R]
    step = max(1, rest.shape[1] // contextual)
    is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=score.device)
    is_target[torch.arange(0, rest.shape[1], step, device=score.device)[:contextual]] = True
    targets, others = rest[:, is_target], rest[:, ~is_target]
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    near, far = ops.take_rows(unit, targets), ops.take_rows(unit, others)
    nearest = (far @ near.transpose(1, 2)).argmax(dim=2)  # [B, R - c]
    came = torch.zeros(batch, targets.shape[1], device=score.device)
    came.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=came.dtype))
    index = torch.cat([top, targets], dim=1)
    weight = 1.0 / came.gather(1, nearest)
    return Selection.merge(index, count, others, dominant + nearest, weight)
