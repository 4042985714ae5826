# SPDX-License-Identifier: Apache-2.0
"""RazorAttention: what a streaming head drops leaves a mean behind (arXiv:2407.15891)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Compensate, Eviction, Gated, Recency, Scope
from visprune.core.cache.gates import Gates, as_gates, check_layers
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
        gates: of every layer, of every key head; large ones retrieve. Or the file that ``visprune
            calibrate heads`` wrote.
        sparsity: share of the heads that do not.
        sinks: first slots that such a head keeps.
        window: queries that gates are measured with.
    """

    name: ClassVar[str] = "razor_attention"

    gates: Gates | str | None = None
    sparsity: float = 0.85
    sinks: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        """Check the share of heads."""
        super().__post_init__()
        object.__setattr__(self, "gates", as_gates(self.name, self.gates))
        if not 0.0 <= self.sparsity <= 1.0:
            raise ConfigError(f"sparsity is a share of the heads, in [0, 1]; got {self.sparsity}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Places, by gates, one mean."""
        gates = as_gates(self.name, self.gates)
        check_layers(self.name, gates, spec)
        budget = Gated(self.sparsity, gates, self.window)
        scope = Scope(self.scope)
        return Eviction(Recency(self.sinks), self.amount, budget, Compensate(), scope)
