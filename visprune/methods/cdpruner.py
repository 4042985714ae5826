# SPDX-License-Identifier: Apache-2.0
"""CDPruner: a diverse set given the question (NeurIPS 2025, arXiv:2506.10967)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

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
from visprune.methods._text_tower import IDS, NEEDS, PATCHES, of_parts, without_tower

_TEXT = TextStates()


@dataclass(frozen=True, kw_only=True)
class CDPruner(BudgetedMethod):
    """Greedy MAP of a determinantal point process conditioned on the text, at the projector.

    The kernel is ``r_i cos(i, j) r_j`` of the projected features, ``r`` the relevance of a token to
    the text, scaled to 0 to 1 within the picture. Kept tokens are in raster order, and position ids
    close up.

    Without a ``text_tower``, which vision-language models come without, relevance is the mean
    cosine of a projected token with the embeddings of the prompt's text. With one it is, as in
    the official code, *minus* the mean cosine of patch and text in CLIP's space, where patches turn
    away from the text that they show.

    Differences: the official code scales relevance within a whole batch, so that a picture's tokens
    depend on its neighbours. A text that is longer than the tower is read in parts with a begin and
    an end each; there later parts have none.

    Args:
        text_tower: ``(CLIPModel, its tokenizer, the tokenizer of the vision-language model)``: of
            the CLIP that the image encoder is from; as a fourth, what cuts the question out of a
            prompt's text behind the picture. Methods share a tower that was built.
    """

    name: ClassVar[str] = "cdpruner"
    default_positions: ClassVar[PositionRule] = "compact"

    text_tower: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the tower."""
        super().__post_init__()
        of_parts(self)

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        needs = (_TEXT,) if self.text_tower is None else NEEDS
        return (Stage(Site.projector(), self.budget, needs),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Relevance, then a diverse set."""
        cosine = (
            self._by_tower(ctx) if self.text_tower is not None else self._by_prompt(tokens, ctx)
        )
        index = pick(tokens.features, relevance(cosine), ctx.num_keep)
        return Selection.keep(index, tokens.num_tokens)

    def _by_prompt(self, tokens: VisualTokens, ctx: Context) -> Tensor:
        """Mean cosine of projected tokens with the embeddings of the text, ``[B, N]``."""
        text = normalize(ctx[_TEXT].float(), dim=-1)  # rows of padding are zero
        number = (text.abs().sum(-1) > 0).sum(1, keepdim=True).clamp(min=1)
        unit = normalize(tokens.features.float(), dim=-1)
        return (unit @ (text.sum(1) / number)[..., None])[..., 0]

    def _by_tower(self, ctx: Context) -> Tensor:
        """Minus the mean cosine of patches with the parts of the text, ``[B, N]``."""
        unit = normalize(self.text_tower.place(ctx[PATCHES]), dim=-1)
        parts = [
            normalize(self.text_tower.embed(x), dim=-1) for x in self.text_tower.texts(ctx[IDS])
        ]
        mean = torch.stack([part.mean(0) for part in parts])
        return -(unit @ mean[..., None].to(unit.device))[..., 0]

    def to_dict(self) -> dict[str, Any]:
        """With the tower by name: it is weights of another model."""
        return without_tower(self)

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
