# SPDX-License-Identifier: Apache-2.0
"""CDPruner: a diverse set given the question (NeurIPS 2025, arXiv:2506.10967)."""

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
from visprune.core.signals import TextStates

_TEXT = TextStates()


@dataclass(frozen=True, kw_only=True)
class CDPruner(BudgetedMethod):
    """Greedy MAP of a determinantal point process conditioned on the text, at the projector.

    The kernel is ``r_i cos(i, j) r_j`` of the projected features, ``r`` the relevance of a token to
    the text, scaled to 0 to 1 within the picture. Kept tokens are in raster order, and position ids
    close up.

    Differences: the official code asks CLIP's text tower, which vision-language models come
    without, and takes *minus* the mean cosine, since CLIP's patches turn away from the text that
    they show. Here relevance is the mean cosine of a projected token with the embeddings of the
    prompt's text, not turned. The official code scales relevance within a whole batch, so that a
    picture's tokens depend on its neighbours.
    """

    name: ClassVar[str] = "cdpruner"
    default_positions: ClassVar[PositionRule] = "compact"

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget, (_TEXT,)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Relevance, then a diverse set."""
        text = normalize(ctx[_TEXT].float(), dim=-1)  # rows of padding are zero
        number = (text.abs().sum(-1) > 0).sum(1, keepdim=True).clamp(min=1)
        unit = normalize(tokens.features.float(), dim=-1)
        cosine = (unit @ (text.sum(1) / number)[..., None])[..., 0]
        index = pick(tokens.features, relevance(cosine), ctx.num_keep)
        return Selection.keep(index, tokens.num_tokens)

    def macs(self, count: int, keep: int, width: int) -> int:
        """Cosines with each picked token, an update of as many coefficients, and the text."""
        return count * (keep * width + keep * keep // 2 + width)


def relevance(similarity: Tensor, *, joint: bool = False) -> Tensor:
    """Scale similarities ``[B, N]`` to 0 to 1.

    Args:
        similarity: of tokens and text.
        joint: over the whole batch, as in the official code.
    """
    axes = (0, 1) if joint else 1
    low = torch.amin(similarity, axes, keepdim=True)
    spread = torch.amax(similarity, axes, keepdim=True) - low
    scaled = (similarity - low + 1e-6) / spread  # 1e-6 above alone, as there
    return torch.where(spread > 0, scaled, torch.ones_like(scaled))


def pick(features: Tensor, relevance: Tensor, num_keep: int) -> Tensor:
    """Indices in selection order, ``[B, num_keep]``."""
    return ops.greedy_diverse(features, num_keep, objective="dpp", relevance=relevance)
