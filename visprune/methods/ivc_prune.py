# SPDX-License-Identifier: Apache-2.0
"""IVC-Prune: keep the question's foreground, and the marks of a coordinate frame (ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune import ops
from visprune.core import (
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import RotaryTables, SampleKeysValues, Slots, TextSlots
from visprune.errors import ConfigError

_NEEDS = (SampleKeysValues(), RotaryTables(), Slots(), TextSlots(), TextSlots(which="all"))


@dataclass(frozen=True, kw_only=True)
class IVCPrune(PruningMethod):
    """Keeps what the question's values agree with, and tokens that mark where others are.

    ``W = softmax(v v^T / sqrt(d))`` over the values of the layer before, all tokens of the sample
    as keys, mean over key heads. Seeds are the visual tokens of largest mean W over the question
    (the text behind the first picture, without its first two tokens); the foreground those of
    largest mean W over seeds and question. To these come the visual tokens whose rotary table has
    the largest mean cosine, and the largest mean sine: they hold the frame in which positions are
    read. What stays is the union, so each picture keeps its own number (28 to 31 % with the
    defaults of LLaVA-1.5); shares are rounded as Python's ``round``. Position ids stay.

    Difference: the official code also takes the dropped tokens out of the cache of the layers
    before; here those layers keep what they have stored. Its path for Qwen2.5-VL, which fills up to
    half of the tokens, is not offered.

    Args:
        layer: 0-based decoder layer on entering which the tokens are gone, or a fraction of the
            depth (16 of LLaVA-1.5-7B's 32).
        seeds: their share of a picture's tokens; at least one.
        foreground: its share.
        coordinates: the share of each of the two kinds of marks.
        skip: tokens behind the picture that are no question.
    """

    name: ClassVar[str] = "ivc_prune"

    layer: int | float = 0.5
    seeds: float = 0.01
    foreground: float = 0.2
    coordinates: float = 0.05
    skip: int = 2

    def __post_init__(self) -> None:
        """Check the shares."""
        super().__post_init__()
        shares = (self.seeds, self.foreground, self.coordinates)
        if not all(0.0 <= share <= 1.0 for share in shares) or self.skip < 0:
            raise ConfigError(
                f"ivc_prune takes seeds, foreground and coordinates in [0, 1] and skip of at least "
                f"0; got {shares} and {self.skip}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage inside the decoder, which decides itself."""
        return (Stage(Site.decoder(self.layer), None, _NEEDS),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Foreground and marks."""
        count, slots = tokens.num_tokens, ctx[Slots()]
        values = ctx[SampleKeysValues()][:, 1]  # [B, Hk, P, d]
        seen = _places(ctx[TextSlots(which="all")], values.shape[2])
        question = _without_first(ctx[TextSlots()], self.skip)
        score = _agreement(values, seen, question, slots)
        seeds = _top(score, max(1, round(self.seeds * count)))
        rows = torch.cat([slots.gather(1, seeds), question], dim=1)
        front = _top(_agreement(values, seen, rows, slots), round(self.foreground * count))
        tables = ctx[RotaryTables()].mean(-1)  # [B, 2, P]
        marks = [
            _top(tables[:, n].gather(1, slots), round(self.coordinates * count)) for n in (0, 1)
        ]
        stay = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
        return Selection.where(stay.scatter(1, torch.cat([front, *marks], dim=1), True))

    def macs(self, count: int, keep: int, width: int) -> int:
        """The values of seeds against all tokens; those of the question are not counted."""
        return max(1, round(self.seeds * count)) * count * width


def _places(slots: Tensor, width: int) -> Tensor:
    """Which of ``width`` slots are named, bool ``[B, P]``."""
    none = torch.zeros(len(slots), width + 1, dtype=torch.bool, device=slots.device)
    return none.scatter(1, slots.where(slots >= 0, width), True)[:, :width]


def _without_first(slots: Tensor, skip: int) -> Tensor:
    """Text without its first tokens, unless there are no others; -1 where there is none."""
    there = slots >= 0
    later = there & (there.long().cumsum(1) > skip)
    return slots.where(torch.where(later.any(1, keepdim=True), later, there), -1)


def _agreement(values: Tensor, seen: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Mean over the slots ``rows`` ``[B, R]`` of their map to the visual tokens, ``[B, N]``."""
    at = rows.clamp(min=0)[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
    drawn = ops.attention_rows(
        values.gather(2, at), values, mask=seen[:, None, None], reduce="mean"
    )
    there = (rows >= 0)[..., None].to(drawn.dtype)
    mean = (drawn * there).sum(1) / there.sum(1).clamp(min=1)
    return mean.gather(1, slots)


def _top(score: Tensor, count: int) -> Tensor:
    return score.argsort(dim=1, descending=True, stable=True)[:, :count]
