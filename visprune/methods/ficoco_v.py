# SPDX-License-Identifier: Apache-2.0
"""FiCoCo-V: filter, correlate, compress inside the image encoder (arXiv:2411.17686)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
from visprune.core.numeric import is_number, is_whole
from visprune.core.signals import EncoderLogits, PatchPositions
from visprune.errors import BudgetError, ConfigError

_QUANTILE = 0.998


@dataclass(frozen=True, kw_only=True)
class FiCoCoV(PruningMethod):
    """Merges, in the later layers of an encoder, the ``r`` most redundant patches into their likes.

    Between attention and MLP, a patch's score is ``beta`` times the class token's attention to it,
    less ``1 - beta`` times its own mean attention to the patches; both are logits before the
    softmax, mean over heads, divided by their norm over the patches. In every window of two by two
    patches the smallest score of those left is halved where it is positive, doubled where negative:
    what leaves is spread over the picture. The ``r`` smallest leave. Each goes into the staying
    patches whose logits in its row are above the row's 0.998 quantile (two of 577 tokens, never
    fewer than one), by a softmax over these; a patch that takes is divided by one plus what came.

    Beware: this is the paper's rule, not what its released code runs. There merging is switched
    off (``merge_visual = False``); where it is switched on, targets are places in the picture
    applied to a list in order of score, so that patches go into other patches than chosen, and the
    class token leaves its place at the front, where later layers and the projector look for it.
    The scores of windows are kept in a variable of the module, from one picture to the next. Here
    patches stay in place, and only patches that stay take (there also the class token, the patch
    itself and others that leave). Scores, order and weights are those of the code, number for
    number. A model without a class token is refused.

    Args:
        r: patches that merge in each of the layers, at most half of those left.
        beta: weight of the class token's attention, in [0, 1].
        front: fraction of the layers, from the first, that merge nothing, in [0, 1).
    """

    name: ClassVar[str] = "ficoco_v"
    gives_back: ClassVar[bool] = True

    r: int = 42
    beta: float = 0.35
    front: float = 0.5

    def __post_init__(self) -> None:
        """Check all three."""
        super().__post_init__()
        if not is_whole(self.r) or self.r < 0:
            raise BudgetError(
                f"r is how many patches merge in a layer, a whole number of at least 0; got "
                f"{self.r!r}."
            )
        if not (is_number(self.beta) and 0.0 <= self.beta <= 1.0):
            raise ConfigError(
                f"beta weighs the class token's attention against a patch's own, in [0, 1]; got "
                f"{self.beta!r}."
            )
        if not (is_number(self.front) and 0.0 <= self.front < 1.0):
            raise ConfigError(
                f"front is the fraction of layers that merge nothing, in [0, 1); got "
                f"{self.front!r}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage in every layer behind the front ones."""
        layers, step = spec.encoder_layers, StepBudget(num_drop=self.r)
        first = min(math.ceil(self.front * layers), layers - 1)
        return tuple(
            Stage(
                Site.encoder(layer, after_attention=True),
                step,
                # Later stages are handed the windows on: to follow places through maps costs more.
                (EncoderLogits("own"), PatchPositions())
                if layer == first
                else (EncoderLogits("own"),),
            )
            for layer in range(first, layers)
        )

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Filter, correlate, compress."""
        count, keep = tokens.num_tokens, ctx.num_keep
        window = windows(tokens.pos) if ctx.carried is None else ctx.carried
        if keep == count:
            batch, device = tokens.features.shape[0], tokens.features.device
            return Selection.identity(batch, count, device).carrying(window)
        logits = ctx[EncoderLogits("own")]
        order = scores(logits, window, self.beta).argsort(dim=1, stable=True)
        source, index = order[:, : count - keep], order[:, count - keep :].sort(dim=1).values
        rows = logits[:, 1:, 1:].gather(1, source[..., None].expand(-1, -1, count))
        rows = rows.gather(2, index[:, None].expand(-1, source.shape[1], -1))
        slot, weight = correlated(rows, min(takers(count + 1), keep))
        source = source[..., None].expand(slot.shape).flatten(1)
        slot, weight = slot.flatten(1), weight.flatten(1)
        ones = torch.ones(index.shape, dtype=weight.dtype, device=weight.device)
        share = 1.0 / ones.scatter_add(1, slot, weight)
        merged = Selection.merge(
            index, count, source, slot, weight * share.gather(1, slot), own=share, overlaps=True
        )
        return merged.growing(weight).carrying(window)


def windows(pos: Tensor) -> Tensor:
    """The window of two by two patches that each of ``pos`` ``[B, N, 3]`` lies in: ``[B, N]``."""
    frame, row, column = pos.unbind(-1)
    wide = 1 + column.amax() // 2
    high = 1 + row.amax() // 2
    return (frame * high + row // 2) * wide + column // 2


def scores(logits: Tensor, window: Tensor, beta: float) -> Tensor:
    """How little redundant each patch is.

    Args:
        logits: class token and patches, ``[B, 1 + N, 1 + N]``.
        window: of each patch, ``[B, N]``.
        beta: weight of the class token's attention.

    Returns:
        ``[B, N]``; the smallest leave first.
    """
    asked = normalize(logits[:, 0, 1:], dim=-1)
    alike = normalize(logits[:, 1:, 1:].mean(dim=-1), dim=-1)
    score = beta * asked - (1.0 - beta) * alike
    # The first of each window in rising order of score; equal scores keep the order of places.
    order = score.argsort(dim=1, stable=True)
    order = order.gather(1, window.gather(1, order).argsort(dim=1, stable=True))
    ranked = window.gather(1, order)
    first = torch.ones_like(ranked, dtype=torch.bool)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    lowest = torch.zeros_like(first).scatter(1, order, first)
    return torch.where(lowest, torch.where(score > 0, score / 2, score * 2), score)


def takers(tokens: int) -> int:
    """How many of a row of so many logits lie above its quantile, at least one."""
    last = tokens - 1
    return max(1, last - int(_QUANTILE * last))


def correlated(rows: Tensor, takers: int) -> tuple[Tensor, Tensor]:
    """The largest of each of ``rows`` ``[B, R, M]``: which, and their shares, ``[B, R, takers]``.

    Shares of a softmax over the row, divided by their sum: a softmax over these alone.
    """
    best = rows.topk(takers, dim=-1)
    return best.indices, best.values.softmax(dim=-1)
