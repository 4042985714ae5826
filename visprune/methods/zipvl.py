# SPDX-License-Identifier: Apache-2.0
"""ZipVL: as many slots as hold a share of the attention (arXiv:2410.08584)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import ModelSpec
from visprune.core.cache import (
    CacheBudget,
    CacheMethod,
    CacheSeen,
    Eviction,
    Looked,
    ProbeSums,
    Scope,
)
from visprune.errors import ConfigError


@dataclass(frozen=True)
class ByMass(CacheBudget):
    """The fewest slots of a layer that hold a share of what the probes give to all that may leave.

    Attributes:
        tau: the share.
        score: whose probes.
    """

    tau: float = 0.975
    score: ProbeSums = field(default_factory=ProbeSums)

    def read(self, seen: CacheSeen) -> int:
        """Their number."""
        if self.tau >= 1.0:
            return int(seen.free.sum())
        mass = self.score.sums(seen)[seen.free].double().sort(descending=True).values.cumsum(0)
        return int((mass < self.tau * mass[-1]).sum()) + 1 if len(mass) else 0

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """Each layer its own."""
        return [torch.full((x.heads,), int(x.budget)) for x in layers]


@dataclass(frozen=True, kw_only=True)
class ZipVL(CacheMethod):
    """Each layer keeps what holds ``tau`` of its attention: many slots if that is spread, else few.

    **Score**: attention of probe rows, mean of heads, divided by the probes that see a slot.
    **Budget**: the fewest slots whose undivided sums reach ``tau``. **Action**: drop. **Scope**:
    as given. The method decides how much stays, so it takes no budget.

    This is the rule of the paper's second version, which drops (the first quantised). There is no
    official code; which rows probe, how heads are joined and ``tau`` are assumptions. The paper
    skips the same tokens in the attention of the prompt itself, which is not done here.

    Args:
        tau: share of the attention, in (0, 1].
        probe: share of the prompt's rows that are the last ones, and as many earlier ones; 1: all.
        seed: of the draw of earlier rows.
    """

    name: ClassVar[str] = "zipvl"
    decides: ClassVar[bool] = True

    tau: float = 0.975
    probe: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the shares, and that no budget is given."""
        super().__post_init__()
        if self.amount.budget is not None or self.max_cache is not None:
            raise ConfigError("zipvl decides itself how much stays: give tau, and no budget.")
        for name in ("tau", "probe"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is a share in (0, 1], got {getattr(self, name)}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Probes, by mass, drop."""
        score = ProbeSums(self.probe, self.seed, group="all")
        return Eviction(score, self.amount, ByMass(self.tau, score), scope=Scope(self.scope))
