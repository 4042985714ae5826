# SPDX-License-Identifier: Apache-2.0
"""LightKV: merge image tokens window by window inside the prefill (arXiv:2605.00789)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import (
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
from visprune.core.signals import DecoderSeen, DecoderSignal
from visprune.errors import ConfigError
from visprune.methods._depths import increasing


@dataclass(frozen=True)
class SpreadMass(DecoderSignal):
    """What the keys of the text spread on a token, summed over heads and text, ``[B, N]``.

    Each key of the text gives one, shared out among all queries by the softmax of the scores
    before any mask: so the text behind a picture counts.
    """

    def read(self, seen: DecoderSeen) -> Tensor:
        """A softmax over queries."""
        query, key = seen.attention()
        at, real = seen.queries("text"), (seen.valid & seen.prompt)[:, None, :, None]
        place = at.clamp(min=0)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        chosen = seen.new(key.transpose(2, 3)).transpose(2, 3).gather(2, place)
        chosen = chosen.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = (query @ chosen.transpose(2, 3)) * seen.scale  # [B, H, P, R]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        mass = scores.masked_fill(~real, -torch.inf).softmax(2)
        return mass.masked_fill((at < 0)[:, None, None], 0.0).sum((1, 3))


@dataclass(frozen=True, kw_only=True)
class LightKV(PruningMethod):
    """Halves the image tokens behind three decoder layers, by merging those that are alike.

    A picture's tokens lie in ``W x W`` windows. In each, tokens at even places propose to their
    most similar one at an odd place (cosine), and the ``min(int(ratio * c), c // 2)`` best of c
    tokens merge into it, as a mean weighted by what the text's keys spread on them
    (:class:`SpreadMass`). A picture of fewer than ``8 W^2`` tokens is left as it is. Later layers
    and their caches hold the merged ones; position ids close up.

    Differences: the released LLaVA file has random numbers in place of the weights, with a note to
    remove them; here they are those of its Qwen file, for all models. It lays a picture on a square
    whatever its shape is (``official=True``); here windows are those of the picture's own grid. It
    skips all pictures of a prompt where one is small, and gives up (t, h, w) positions, which
    survivors keep here.

    Args:
        ratios: what part of a window's tokens merges, at each layer, in [0, 0.5].
        windows: W, at each.
        layers: where the stages are: 0-based layers on entering which the tokens are merged, at
            least 1, or fractions of the depth (behind 12, 18 and 24 of 32).
        official: see above.
    """

    name: ClassVar[str] = "lightkv"
    default_positions: ClassVar[PositionRule] = "compact"

    ratios: tuple[float, ...] = (0.5, 0.5, 0.5)
    windows: tuple[int, ...] = (4, 2, 1)
    layers: tuple[int | float, ...] = (13 / 32, 19 / 32, 25 / 32)
    official: bool = False

    def __post_init__(self) -> None:
        """Check what belongs together."""
        super().__post_init__()
        object.__setattr__(self, "layers", increasing("lightkv", self.layers))
        object.__setattr__(self, "ratios", tuple(self.ratios))
        object.__setattr__(self, "windows", tuple(self.windows))
        alike = len(self.ratios) == len(self.windows) == len(self.layers)
        if not alike or not all(0.0 <= r <= 0.5 for r in self.ratios) or min(self.windows) < 1:
            raise ConfigError(
                f"lightkv takes a ratio in [0, 0.5] and a number of windows of at least 1 for each "
                f"of {len(self.layers)} layers; got {self.ratios} and {self.windows}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage per layer, which decides itself; none is left out on a shallow model."""
        at = sorted({Site.decoder(layer).resolve(spec.num_layers) for layer in self.layers})
        return tuple(Stage(Site.decoder(layer), None, (SpreadMass(),)) for layer in at)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Pairs in every window."""
        count, weight = tokens.num_tokens, ctx[SpreadMass()]
        ratio, windows = self.ratios[ctx.stage], self.windows[ctx.stage]
        if count < 8 * windows**2:
            return Selection.identity(len(weight), count, weight.device)
        wide = torch.promote_types(tokens.features.dtype, torch.float32)
        unit = torch.nn.functional.normalize(tokens.features.to(wide), dim=-1)
        return Selection.stack(
            [
                _merged(unit[n], weight[n], self._labels(tokens.pos[n], windows), ratio)
                for n in range(len(weight))
            ]
        )

    def _labels(self, pos: Tensor, windows: int) -> Tensor:
        """The window of each token, ``[N]``."""
        count = len(pos)
        if self.official:
            side = math.isqrt(count - 1) + 1
            steps = torch.arange(count, device=pos.device)
            row, column = steps // side, steps % side
            return _part(row, side, windows) * windows + _part(column, side, windows)
        label = pos[:, 0] * windows**2
        for name in pos[:, 0].unique():
            inside = pos[:, 0] == name
            at = pos[inside, 1:]
            extent = (at.amax(0) + 1).tolist()
            row, column = (_part(at[:, n], extent[n], windows) for n in (0, 1))
            label[inside] += row * windows + column
        return label

    def macs(self, count: int, keep: int, width: int) -> int:
        """Even against odd tokens of a window, at most."""
        return (count // 2) * (count - count // 2) * width


def _part(at: Tensor, side: int, parts: int) -> Tensor:
    """Which of ``parts`` a coordinate below ``side`` is in; the first are one larger."""
    small, larger = divmod(side, parts)
    first = larger * (small + 1)
    if not small:
        return at
    return torch.where(at < first, at // (small + 1), larger + (at - first) // small)


def _merged(unit: Tensor, weight: Tensor, label: Tensor, ratio: float) -> Selection:
    """One picture ``[N, D]``: who merges into whom."""
    count = len(unit)
    target = torch.arange(count, device=unit.device)
    for name in label.unique():
        members = (label == name).nonzero()[:, 0]
        even, odd = members[::2], members[1::2]
        merges = min(int(torch.tensor(ratio) * len(members)), len(members) // 2)
        if not merges:
            continue
        best, partner = (unit[even] @ unit[odd].T).max(1)
        order = best.argsort(descending=True, stable=True)[:merges]
        target[even[order]] = odd[partner[order]]
    stays = target == torch.arange(count, device=unit.device)
    index = stays.nonzero()[:, 0]
    slot_of = torch.cumsum(stays.long(), 0) - 1
    gone = (~stays).nonzero()[:, 0]
    slot = slot_of[target[gone]]
    total = weight[index].scatter_add(0, slot, weight[gone])
    own, share = weight[index] / total, weight[gone] / total[slot]
    alone = torch.bincount(slot, minlength=len(index)) == 0
    own = torch.where(alone, 1.0, own)
    if not len(gone):
        return Selection(index[None], count)
    return Selection.merge(index[None], count, gone[None], slot[None], share[None], own[None])
