# SPDX-License-Identifier: Apache-2.0
"""DART: drop what repeats a few pivots (EMNLP 2025, arXiv:2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import (
    BudgetedMethod,
    Context,
    ModelSpec,
    Rounding,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import (
    DecoderSeen,
    DecoderSignal,
    FinalNormStates,
    Slots,
    TextSlots,
    TextStates,
)
from visprune.errors import ConfigError


@dataclass(frozen=True)
class KeyNorms(DecoderSignal):
    """L1 norms of the keys of all slots, all heads together, ``[B, P]``."""

    token_dim: ClassVar[int | None] = None

    def read(self, seen: DecoderSeen) -> Tensor:
        """Of the new slots."""
        if seen.key is None:
            raise LookupError("KeyNorms uses attention.")
        return seen.key[:, :, seen.stored :].abs().sum((1, 3))


_TEXT = TextStates(which="after_image", normed=True)
_NEEDS = (KeyNorms(), Slots(), TextSlots(), FinalNormStates(), _TEXT)


@dataclass(frozen=True, kw_only=True)
class DART(BudgetedMethod):
    """Keeps pivots, and the image tokens that resemble them least.

    Pivots are the ``pivot_image`` visual tokens and the ``pivot_text`` tokens of the text behind
    the picture whose keys in the layer before (all heads, after the rotary embedding) have the
    largest L1 norm. One after another, a pivot takes the visual tokens of smallest cosine to it (of
    states behind the decoder's last norm) among those not yet taken. Text pivots are no visual
    tokens: what stays are the image pivots and what was taken, in order, with their position ids.

    Here exactly ``num_keep`` tokens stay, shared out among the pivots, those with larger norms
    first, image before text. The official code (``official=True``) lets each of them take
    ``int(n / pivots)`` of the n that the budget names, so that 132 tokens stay of a budget of 128;
    and it visits the pivots in the order of a Python set of their places in the sequence, which
    no one can have meant. Samples of a batch are pruned each by its own pivots.

    Args:
        layer: 0-based decoder layer on entering which the tokens are gone, at least 1.
        pivot_image: pivots among the visual tokens.
        pivot_text: and among the text behind them.
        official: count and order as in the official code.
    """

    name: ClassVar[str] = "dart"

    layer: int | float = 2
    pivot_image: int = 4
    pivot_text: int = 4
    official: bool = False

    def __post_init__(self) -> None:
        """Check the pivots."""
        super().__post_init__()
        if self.pivot_image < 1 or self.pivot_text < 0:
            raise ConfigError(
                f"dart takes pivot_image of at least 1 and pivot_text of at least 0, got "
                f"{self.pivot_image} and {self.pivot_text}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage inside the decoder."""
        rounding: Rounding = "floor" if self.official else "round"
        budget = replace(self.budget, rounding=rounding)
        return (Stage(Site.decoder(self.layer), budget, _NEEDS),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Pivots, then what is least like them."""
        count = tokens.num_tokens
        if ctx.num_keep >= count:
            return Selection.identity(len(tokens.features), count, tokens.features.device)
        norms, slots, text = ctx[KeyNorms()], ctx[Slots()], ctx[TextSlots()]
        norm = norms.gather(1, slots)  # [B, N]
        text_norm = norms.gather(1, text.clamp(min=0)).masked_fill(text < 0, -1.0)
        heads = min(self.pivot_image, ctx.num_keep)
        own = norm.argsort(dim=1, descending=True, stable=True)[:, :heads]
        asked = text_norm.argsort(dim=1, descending=True, stable=True)[:, : self.pivot_text]
        there = torch.cat([torch.ones_like(own) > 0, text.gather(1, asked) >= 0], dim=1)
        states, words = ctx[FinalNormStates()], ctx[_TEXT]
        pivots = torch.cat([_rows(states, own), _rows(words, asked)], dim=1)
        quota = _quotas(there, ctx.num_keep - heads)
        if self.official:
            places = torch.cat([slots.gather(1, own), text.gather(1, asked)], dim=1)
            turn = torch.tensor([_visited(row) for row in places.tolist()], device=pivots.device)
            pivots = _rows(pivots, turn)
            each = ctx.num_keep // (self.pivot_image + self.pivot_text)
            quota = torch.full_like(quota, each) * there.gather(1, turn)
        return Selection.where(_taken(states, pivots, own, quota))

    def macs(self, count: int, keep: int, width: int) -> int:
        """The norms of the keys' sums aside, one cosine per pivot and token."""
        return 0 if keep >= count else (self.pivot_image + self.pivot_text) * count * width


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _quotas(there: Tensor, count: int) -> Tensor:
    """Share ``count`` tokens out among the pivots that are there, ``[B, V]``."""
    number = there.sum(1, keepdim=True)
    rank = there.long().cumsum(1) - 1
    return (count // number + (rank < count % number).long()) * there


def _taken(states: Tensor, pivots: Tensor, own: Tensor, quota: Tensor) -> Tensor:
    """Which tokens stay, ``[B, N]``: pivots, and what each takes of what the others left."""
    wide = torch.promote_types(states.dtype, torch.float32)
    unit = torch.nn.functional.normalize(states.to(wide), dim=-1)
    cosine = unit @ torch.nn.functional.normalize(pivots.to(wide), dim=-1).transpose(1, 2)
    stay = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    stay = stay.scatter(1, own, True)
    rank = torch.arange(states.shape[1], device=states.device)
    for number in range(pivots.shape[1]):
        order = cosine[..., number].masked_fill(stay, torch.inf).argsort(dim=1, stable=True)
        stay = stay | torch.zeros_like(stay).scatter(1, order, rank < quota[:, number, None])
    return stay


def _visited(places: list[int]) -> list[int]:
    """Numbers of the pivots in the order in which Python's set gives their places, -1 last."""
    order = [places.index(place) for place in set(places) if place >= 0]
    return order + [n for n, place in enumerate(places) if place < 0]
