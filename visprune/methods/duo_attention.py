# SPDX-License-Identifier: Apache-2.0
"""DuoAttention: some heads keep all, the others the first and last slots (arXiv:2410.10819)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, Gated, Recency, Scope
from visprune.core.cache.gates import Gates, as_gates, check_layers
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DuoAttention(CacheMethod):
    """Heads that retrieve keep every slot; the others keep ``sinks`` first slots and recent ones.

    **Score**: the place. **Budget**: all, for the heads with the largest gates; else the amount.
    **Action**: drop. **Scope**: as given; the amount is what a streaming head keeps, sinks among it
    (published: ``scope="prompt"``, 64 sinks and 256 recent slots).

    The paper trains the gates (``alpha``) of every key head, and offers them for a few language
    models; ``gates`` takes them. Without, they are measured on the prompt itself: the part of its
    last queries' attention that falls on what a streaming head would drop. ``visprune calibrate
    heads MODEL --pictures FOLDER`` takes the mean of that over many pictures.

    Args:
        gates: of every layer, of every key head; or the file that ``visprune calibrate heads``
            wrote.
        sparsity: share of the heads that stream.
        sinks: first slots that a streaming head keeps.
        window: queries that gates are measured with.
    """

    name: ClassVar[str] = "duo_attention"

    gates: Gates | str | None = None
    sparsity: float = 0.5
    sinks: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        """Check the share of heads."""
        super().__post_init__()
        object.__setattr__(self, "gates", as_gates(self.name, self.gates))
        if not 0.0 <= self.sparsity <= 1.0:
            raise ConfigError(f"sparsity is a share of the heads, in [0, 1]; got {self.sparsity}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Places, by gates, drop."""
        gates = as_gates(self.name, self.gates)
        check_layers(self.name, gates, spec)
        budget = Gated(self.sparsity, gates, self.window)
        return Eviction(Recency(self.sinks), self.amount, budget, scope=Scope(self.scope))
