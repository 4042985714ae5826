# SPDX-License-Identifier: Apache-2.0
"""RazorAttention: what a streaming head drops leaves a mean behind (arXiv:2407.15891)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Compensate, Eviction, Gated, Recency, Scope
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RazorAttention(CacheMethod):
    """Heads that retrieve keep every slot; of what the others drop, one mean slot stays.

    **Score**: the place. **Budget**: all, for the heads with the largest gates; else the amount.
    **Action**: the dropped slots of a head become one with their mean key and value, whose weight
    counts as many times. **Scope**: as given; the amount is a streaming head's, the mean slot not
    counted.

    There is no official code, and what is known comes from the paper at second hand: that the mean
    slot counts as often as slots were dropped, how many sinks stay, and how heads are told apart
    (there, by echo and induction scores on repeated random tokens). Here gates are given, or
    measured on the prompt itself as in ``duo_attention``.

    Args:
        gates: of every layer, of every key head; large ones retrieve.
        sparsity: share of the heads that do not.
        sinks: first slots that such a head keeps.
        window: queries that gates are measured with.
    """

    name: ClassVar[str] = "razor_attention"

    gates: tuple[tuple[float, ...], ...] | None = None
    sparsity: float = 0.85
    sinks: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        """Check the share of heads."""
        super().__post_init__()
        if not 0.0 <= self.sparsity <= 1.0:
            raise ConfigError(f"sparsity is a share of the heads, in [0, 1]; got {self.sparsity}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Places, by gates, one mean."""
        gates = None if self.gates is None else tuple(tuple(x) for x in self.gates)
        if gates is not None and len(gates) != spec.num_layers:
            raise ConfigError(
                f"razor_attention: gates has {len(gates)} layers; {spec.family} has "
                f"{spec.num_layers}. Give one row each."
            )
        budget = Gated(self.sparsity, gates, self.window)
        scope = Scope(self.scope)
        return Eviction(Recency(self.sinks), self.amount, budget, Compensate(), scope)
