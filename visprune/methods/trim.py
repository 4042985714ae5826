# SPDX-License-Identifier: Apache-2.0
"""TRIM: keep what the question speaks of, and the mean of the rest (arXiv:2409.10994)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from visprune.core import (
    Budget,
    Context,
    ModelSpec,
    PositionRule,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import TextStates
from visprune.methods._leftover import outliers, ranked, with_leftover
from visprune.methods._text_tower import IDS, NEEDS, PATCHES, of_parts, without_tower

_TEXT = TextStates()
_WORDS = 40  # of a prompt, whose length is not known where operations are counted


@dataclass(frozen=True, kw_only=True)
class TRIM(PruningMethod):
    """Keeps the tokens most like the text, and makes one of the others, at the projector.

    Tokens are ranked by the softmax over the picture of their product with the text. Without a
    budget a picture keeps as many as lie above ``Q3 + 1.5 (Q3 - Q1)``, at least one; with one, one
    less than it, in raster order. The last token is the mean of all others.

    With a ``text_tower`` the product is, as in the official code, *minus* that of patch and text in
    CLIP's space, where patches turn away from the text that they show. Vision-language models come
    without one, and then a token's score is its cosine with the word of the prompt that it is most
    like. (Its product with the mean of the words, the nearest thing to a text's one embedding, says
    little: words that stand in every question outweigh those that name something, and of unscaled
    tokens the longest win. On the embedded model at 64 of 576 tokens it was no better than chance.)

    Differences: the official budget does not count the token that is a mean. Its
    quartiles are those of a whole batch; here each picture has its own. It rounds its result to
    fp16.

    Args:
        num_keep: tokens of one image that enter the decoder, with the mean; ``None``: adaptive.
        keep_ratio: the same as a fraction, rounded down.
        num_keep_per_frame: the same of each frame of a clip.
        text_tower: ``(CLIPModel, its tokenizer, the tokenizer of the vision-language model)``: of
            the CLIP that the image encoder is from; as a fourth, what cuts the question out of a
            prompt's text behind the picture. Methods share a tower that was built.
    """

    name: ClassVar[str] = "trim"
    default_positions: ClassVar[PositionRule] = "compact"

    num_keep: int | None = None
    keep_ratio: float | None = None
    num_keep_per_frame: int | None = None
    text_tower: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the budget."""
        super().__post_init__()
        _ = self.budget
        of_parts(self)

    @property
    def budget(self) -> Budget | None:
        """``None``: the picture decides."""
        return Budget.maybe(
            num_keep=self.num_keep,
            keep_ratio=self.keep_ratio,
            num_keep_per_frame=self.num_keep_per_frame,
            rounding="floor",
        )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        needs = (_TEXT,) if self.text_tower is None else NEEDS
        return (Stage(Site.projector(), self.budget, needs),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Rank by the text."""
        if self.text_tower is not None:
            return trim_tokens(self._by_tower(ctx), ctx.num_keep)
        return trim_tokens(self._by_word(tokens, ctx), ctx.num_keep)

    def _by_word(self, tokens: VisualTokens, ctx: Context) -> Tensor:
        """Cosines with the nearest word of the prompt, ``[B, N]``; -1 of a prompt without words."""
        text: Tensor = ctx[_TEXT].float()
        there = text.abs().sum(-1) > 0  # rows of padding are zero
        cosine = normalize(tokens.features.float(), dim=-1) @ normalize(text, dim=-1).mT
        return pad(cosine.masked_fill(~there[:, None], -1.0), (0, 1), value=-1.0).amax(-1)

    def _by_tower(self, ctx: Context) -> Tensor:
        """Minus the products of patches and text, ``[B, N]``; of a text in parts, of their mean."""
        patches = self.text_tower.place(ctx[PATCHES])
        texts = [self.text_tower.embed(text).mean(0) for text in self.text_tower.texts(ctx[IDS])]
        return -(patches @ torch.stack(texts)[..., None].to(patches.device))[..., 0]

    def to_dict(self) -> dict[str, Any]:
        """With the tower by name: it is weights of another model."""
        return without_tower(self)

    def macs(self, count: int, keep: int, width: int) -> int:
        """A product with the text; without a tower, with each word of it, taken as 40."""
        return count * width * (_WORDS if self.text_tower is None else 1)


def trim_tokens(product: Tensor, num_keep: int = 0, *, joint: bool = False) -> Selection:
    """The published rule on tensors.

    Args:
        product: of tokens and text, ``[B, N]``.
        num_keep: tokens with the mean, 0: adaptive.
        joint: quartiles of the whole batch.
    """
    score = product.softmax(dim=1)
    batch, count = score.shape
    if num_keep == count:
        return Selection.identity(batch, count, score.device)
    kept = torch.full((batch,), max(1, num_keep - 1), device=score.device)
    if num_keep == 0:
        kept = outliers(score, joint=joint)
    weight = (1.0 / (count - kept).clamp(min=1))[:, None].expand_as(score)
    return with_leftover(ranked(score, kept), score, weight, leftover=num_keep != 1)
