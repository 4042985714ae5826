# SPDX-License-Identifier: Apache-2.0
"""DuoAttention: some heads keep all, the others the first and last slots (arXiv:2410.10819)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, Gated, Recency, Scope
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DuoAttention(CacheMethod):
    """Heads that retrieve keep every slot; the others keep ``sinks`` first slots and recent ones.

    **Score**: the place. **Budget**: all, for the heads with the largest gates; else the amount.
    **Action**: drop. **Scope**: as given; the amount is what a streaming head keeps, sinks among it
    (published: ``scope="prompt"``, 64 sinks and 256 recent slots).

    The paper trains the gates (``alpha``) of every key head, and offers them for a few language
    models; ``gates`` takes them. Without, they are measured on the prompt itself: the part of its
    last queries' attention that falls on what a streaming head would drop.

    Args:
        gates: of every layer, of every key head.
        sparsity: share of the heads that stream.
        sinks: first slots that a streaming head keeps.
        window: queries that gates are measured with.
    """

    name: ClassVar[str] = "duo_attention"

    gates: tuple[tuple[float, ...], ...] | None = None
    sparsity: float = 0.5
    sinks: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        """Check the share of heads."""
        super().__post_init__()
        if not 0.0 <= self.sparsity <= 1.0:
            raise ConfigError(f"sparsity is a share of the heads, in [0, 1]; got {self.sparsity}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Places, by gates, drop."""
        gates = None if self.gates is None else tuple(tuple(x) for x in self.gates)
        if gates is not None and len(gates) != spec.num_layers:
            raise ConfigError(
                f"duo_attention: gates has {len(gates)} layers; {spec.family} has "
                f"{spec.num_layers}. Give one row each."
            )
        budget = Gated(self.sparsity, gates, self.window)
        return Eviction(Recency(self.sinks), self.amount, budget, scope=Scope(self.scope))
