# SPDX-License-Identifier: Apache-2.0
"""What one decoder layer shows of one sample once its prompt has run, without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visprune import ops

Group = Literal["mean", "max", "sum"]
_ROWS = 64  # rows of the map that are held at once


@dataclass
class CacheSeen:
    """A layer's queries, keys and values of one sample, and which slots may leave its cache.

    Attributes:
        query: post-rotary, of the slots of this call, ``[H, P, d]``.
        key: of stored and new slots, ``[Hk, L, d]``; the last P belong to this call.
        value: ``[Hk, L, dv]``.
        free: which slots may leave, ``[L]`` bool.
        visual: which hold visual tokens, protected ones too, ``[L]`` bool.
        prompt: slots up to the end of the prompt; a guess of an assistant may stand behind.
        scale: of the scores; ``None``: ``d ** -0.5``.
        softcap: bound of the scores, where the model has one.
        text_observes: observers are text alone (the scope is the visual tokens).
        mask: for queries ``[R]``: which keys are visible beyond causality, or what is added to
            their scores, ``[1, 1 or H, R, L]``; ``None``: all.
        turn: for position ids ``[n]``: cosine and sine of the rotary embedding, ``[n, d]``.
        places: position ids of the new slots, ``[P]``; ``None`` where they are no line.
        carried: the score of slots so far, of each key head, ``[Hk, L]``; 0 for new ones.
        layer: 0-based.
        num_layers: of the decoder.
        learned: the method's own module of this layer, if it has one.
        spent: multiply-adds of what was read.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    free: Tensor
    visual: Tensor
    prompt: int = 0
    scale: float | None = None
    softcap: float | None = None
    text_observes: bool = False
    mask: Callable[[Tensor], Tensor | None] | None = None
    turn: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    places: Tensor | None = None
    carried: Tensor | None = None
    layer: int = 0
    num_layers: int = 1
    learned: nn.Module | None = None
    spent: int = 0
    _memo: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """A prompt that fills the call is the rule."""
        self.prompt = self.prompt or self.key.shape[1]

    @property
    def length(self) -> int:
        """L."""
        return self.key.shape[1]

    @property
    def stored(self) -> int:
        """Slots of earlier turns."""
        return self.key.shape[1] - self.query.shape[1]

    @property
    def queries(self) -> Tensor:
        """Numbers of all queries of the prompt, ``[R]``."""
        return torch.arange(self.prompt - self.stored, device=self.key.device)

    def window(self, count: int) -> Tensor:
        """Numbers of the last ``count`` observers of the prompt, ``[R]``, at least one.

        Where budgets count visual tokens, observers are the text behind the last picture, or all
        text before it if none follows.
        """
        at = self.behind() if self.text_observes else self.queries
        return at[-max(1, count) :]

    def behind(self) -> Tensor:
        """Numbers of the text behind the last picture; if none follows, of all text of the prompt.

        A prompt that is a picture alone observes itself.
        """
        at, visual = self.queries, self.visual[self.stored : self.prompt]
        behind = at > (at[visual].amax() if bool(visual.any()) else -1)
        text = at[behind] if bool(behind.any()) else at[~visual]
        return text if len(text) else at

    def rows(self, at: Tensor) -> Tensor:
        """Attention of the queries ``at`` ``[R]`` to all slots, ``[H, R, L]``."""
        self.spent += len(at) * self.length * self.query.shape[0] * self.query.shape[2]
        return ops.attention_rows(
            self.query[None, :, at], self.key[None], scale=self.scale,
            mask=None if self.mask is None else self.mask(at), query_idx=at + self.stored,
            causal=True, softcap=self.softcap,
        )[0]  # fmt: skip

    def columns(self, at: Tensor | None = None) -> Tensor:
        """Attention that slots receive from ``at`` (``None``: the whole prompt), ``[H, L]``."""
        key = ("columns", None if at is None else tuple(at.tolist()))
        if key not in self._memo:
            total: Tensor | None = None
            for part in (self.queries if at is None else at).split(_ROWS):
                summed = self.rows(part).sum(1)
                total = summed if total is None else total + summed
            assert total is not None, "a prompt has a token"
            self._memo[key] = total
        return self._memo[key]

    def grouped(self, x: Tensor, how: Group = "mean") -> Tensor:
        """Of query heads ``[H, ...]`` to key heads ``[Hk, ...]``."""
        heads = self.key.shape[0]
        parts = x.unflatten(0, (heads, x.shape[0] // heads))
        if how == "max":
            return parts.amax(1)
        return parts.sum(1) if how == "sum" else parts.mean(1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of ``[..., d]``, half against half."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
