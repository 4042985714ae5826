# SPDX-License-Identifier: Apache-2.0
"""VL-Cache: layers whose text looks at few slots keep few (ICLR 2025, arXiv:2410.23317)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import ModelSpec
from visprune.core.cache import (
    CacheBudget,
    CacheMethod,
    CacheSeen,
    ColumnSums,
    Eviction,
    Looked,
    Scope,
)
from visprune.errors import ConfigError


@dataclass(frozen=True)
class BySparsity(CacheBudget):
    """Layers share the amount by how many slots their observers look at.

    Attributes:
        ratio: of the counted slots, the mean over layers; ``None``: what the amount leaves.
        window: observers; ``None``: the text behind the last picture.
        own_windows: each layer's recent window is a tenth of its own share.
    """

    ratio: float | None = None
    window: int | None = None
    own_windows: bool = False

    def read(self, seen: CacheSeen) -> Tensor:
        """The share of causal entries below a hundredth of their row's largest, mean of heads."""
        at = seen.behind() if self.window is None else seen.window(self.window)
        rows = seen.rows(at)
        causal = torch.arange(seen.length, device=at.device) <= (at + seen.stored)[:, None]
        small = (rows < 0.01 * rows.amax(-1, keepdim=True)) & causal
        return (small.sum((1, 2)) / causal.sum()).mean()

    def shares(self, layers: Sequence[Looked]) -> Tensor:
        """Of the counted slots, what each layer keeps beside its window."""
        dense = 1 - torch.stack([looked.budget for looked in layers]).float()
        ratio = self.ratio
        if ratio is None:
            ratio = sum(x.keep for x in layers) / max(1, sum(x.num_free for x in layers))
        part = 0.9 if self.ratio is not None and not self.own_windows else 1.0
        return (dense / dense.sum() * ratio * part * len(layers)).clamp(0.01 * part, 1.0)

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """A part of every layer's counted slots, at least one."""
        found = []
        if all(x.keep >= x.num_free for x in layers):
            return super().share(layers)
        for looked, part in zip(layers, self.shares(layers).tolist(), strict=True):
            if self.own_windows:  # the window of this layer stays besides
                looked.free[looked.counted - max(1, int(part * looked.counted * 0.1)) :] = False
            found.append(torch.full((looked.heads,), max(1, int(part * looked.counted))))
        return found


@dataclass(frozen=True, kw_only=True)
class VLCache(CacheMethod):
    """Text behind the picture tells which slots matter, and how many a layer needs.

    **Score**: column sums over the text behind the picture. **Budget**: layers by 1 - sparsity,
    where sparsity is the share of small entries in those rows. **Action**: drop. **Scope**: as
    given; with ``"prompt"``, as published, a tenth of ``keep_ratio`` is a recent window.

    There is no official code; this is the rule of EffiVLM-Bench, in whose outputs it is tested.

    Args:
        per_head: rank for each key head; else one set of slots serves the layer.
        own_windows: with ``scope="prompt"``, windows follow the layers' shares.
        window: observers; ``None``: the text behind the last picture.
    """

    name: ClassVar[str] = "vl_cache"

    per_head: bool = False
    own_windows: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        """With the prompt's slots counted, the amount is a share."""
        super().__post_init__()
        if self.scope == "prompt" and self.keep_ratio is None:
            raise ConfigError("vl_cache with scope='prompt' takes keep_ratio, a share of it.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Text's column sums, by sparsity, drop."""
        score = ColumnSums("behind" if self.window is None else self.window,
                           "sum" if self.per_head else "all")  # fmt: skip
        whole = self.scope == "prompt"
        ratio = self.keep_ratio if whole else None
        budget = BySparsity(ratio, self.window, self.own_windows and whole)
        share = 0.0 if ratio is None or self.own_windows else ratio * 0.1
        scope = Scope(self.scope, last=int(whole and not self.own_windows), last_share=share)
        return Eviction(score, self.amount, budget, scope=scope)
