# SPDX-License-Identifier: Apache-2.0
"""VidCom2: more tokens for frames unlike the clip, of each the unlike (arXiv:2505.14454)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visprune import ops
from visprune.core import (
    Budget,
    BudgetedMethod,
    Context,
    ModelSpec,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import Frames

_FRAMES = Frames()
_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class VidCom2(BudgetedMethod):
    """Keeps of every frame the tokens least like their clip and their frame, at the projector.

    Features are those of the half of the channels that vary least over the clip, of unit length. A
    token's likeness is a sum of five Gaussians of its distance to the mean of the clip, and the
    same to that of its frame; the least alike stay, in raster order. A frame keeps the fraction
    ``base (1 + p - mean p)`` of its tokens (at most all, at least one token), ``p`` the softmax
    over frames of minus their tokens' mean likeness to the clip, divided by 0.01. ``base`` is
    ``keep_ratio``, or ``num_keep / n``: shares are rounded frame by frame, so that a clip may keep
    a few tokens more or fewer. A still picture is a clip of one frame.

    ``exact=True`` is the rule as vLLM ships it, which a server needs: a clip keeps what its budget
    says (a fraction rounded down), or one token a frame. What shares are too many leave where they
    are most alike, what they are too few come where they are least.

    Differences: the official code puts the newlines of LLaVA-Video's grid behind the tokens of
    their frame; here they stay where they are. With a base of 1 it drops some of ordinary frames
    all the same; here all tokens stay.
    """

    name: ClassVar[str] = "vidcom2"
    served: ClassVar[Mapping[str, Any]] = {"exact": True}

    exact: bool = False

    @property
    def budget(self) -> Budget:
        """A fraction is rounded down, where it is kept to."""
        return replace(super().budget, rounding="floor" if self.exact else "round")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector; every frame has a share of its own."""
        return (Stage(Site.projector(), None, (_FRAMES,)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Shares of frames, then the least alike of each."""
        count = tokens.num_tokens
        original = ctx.original or count
        base = self.keep_ratio or min(1.0, (self.num_keep or 0) / original)
        if base >= 1.0:
            return Selection.identity(len(tokens.features), count, tokens.features.device)
        frames: Tensor = ctx[_FRAMES]
        of_clip, of_frame = likeness(tokens.features.float(), frames)
        kept = shares(of_clip, frames, base * original / count)
        alike = of_clip + of_frame
        stays = ops.rank_within(-alike, frames) < kept.gather(1, frames)
        if self.exact:
            stays = _to_the_number(stays, alike, frames, self.budget.resolve(count, original))
        return Selection.where(stays)

    def known_ahead(self, places: Sequence[tuple[int, int, int]], kind: str) -> int | None:
        """All but the official shares of several frames, which depend on how unlike they are."""
        count, frames = len(places), len({t for t, _, _ in places})
        if self.exact:
            return max(frames, self.budget.resolve(count, count, strict=self.strict))
        base = self.keep_ratio or self.budget.resolve(count, count, strict=self.strict) / count
        if base >= 1.0:
            return count
        if kind == "video" and frames > 1:
            return None
        alone = torch.zeros(1, count)
        return int(shares(alone, alone.long(), base)[0, 0])

    def macs(self, count: int, keep: int, width: int) -> int:
        """Two distances a token, over half of the channels."""
        return count * width


def likeness(features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Likeness of each token to its clip and to its frame, ``[B, N]`` each."""
    half = max(1, features.shape[2] // 2)
    quiet = features.var(dim=1, unbiased=False).argsort(dim=1, stable=True)[:, :half]
    x = normalize(features.gather(2, quiet[:, None].expand(-1, features.shape[1], -1)), dim=-1)
    at = frames[..., None].expand_as(x)
    means = x.new_zeros(len(x), int(frames.max()) + 1, half)
    means = means.scatter_reduce(1, at, x, "mean", include_self=False)
    return _near(x, x.mean(dim=1, keepdim=True)), _near(x, means.gather(1, at))


def _near(x: Tensor, centre: Tensor) -> Tensor:
    distance = (x - centre).square().sum(-1)
    return torch.stack([(-distance / (2 * width)).exp() for width in _WIDTHS]).sum(0)


def _to_the_number(stays: Tensor, alike: Tensor, frames: Tensor, keep: int) -> Tensor:
    """Which stay once each clip keeps ``keep`` tokens, or one a frame; all ``[B, N]``."""
    length = int(frames.max()) + 1
    there = torch.zeros_like(frames[:, :1]).repeat(1, length).scatter_(1, frames, 1)
    wanted = there.sum(1, keepdim=True).clamp(min=keep)
    order = alike.argsort(dim=1, stable=True)
    order = order.gather(1, (~stays.gather(1, order)).int().argsort(dim=1, stable=True))
    return torch.zeros_like(stays).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device) < wanted
    )


def shares(of_clip: Tensor, frames: Tensor, base: float) -> Tensor:
    """How many tokens each frame keeps, ``[B, T]``; ``base`` is the fraction kept on average."""
    length = int(frames.max()) + 1
    zeros = of_clip.new_zeros(len(of_clip), length)
    size = zeros.scatter_add(1, frames, torch.ones_like(of_clip))
    unlike = -zeros.scatter_add(1, frames, of_clip) / size.clamp(min=1)
    there = size > 0
    unlike = unlike.masked_fill(~there, float("-inf"))
    weight = ((unlike - unlike.amax(1, keepdim=True)) / 0.01).softmax(dim=1)
    mean = weight.sum(1, keepdim=True) / there.sum(1, keepdim=True)
    share = (base * (1 + weight - mean)).clamp(max=1.0)
    return (share * size).round().clamp(min=1).long()
