# SPDX-License-Identifier: Apache-2.0
"""ZipCache: salient slots in four bits, the others in two (NeurIPS 2024, arXiv:2405.14256)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, ProbeSums, Quantise, Scope
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ZipCache(CacheMethod):
    """Nothing leaves; slots are stored in few bits, the least salient in fewer.

    **Score**: attention of probe rows (the last ones, and as many earlier ones), divided by the
    number of rows that see a slot: as in the code all rows of the prompt (``over="all"``), or as in
    the paper the probes. **Budget**: all stay, unless one is given; then the rest is dropped first.
    **Action**: keys per channel, values per token, their channels divided by the root of their
    largest number before. **Scope**: as given; what is not counted stays plain, and so do tokens
    that are decoded.

    A scale belongs to ``group`` slots of a key's channel, and to a head's values of a slot; in the
    official code to all slots, and to all heads. Decoding does not quantise anew.

    Args:
        low: share of the slots that get ``low_bits``.
        bits: of the salient slots.
        low_bits: of the others.
        group: slots of a channel that share a scale.
        probe: share of the prompt's rows that are the last ones, and as many earlier ones.
        over: rows that a slot's sum is divided by.
        seed: of the draw of earlier rows.
    """

    name: ClassVar[str] = "zipcache"
    decides: ClassVar[bool] = True

    low: float = 0.4
    bits: int = 4
    low_bits: int = 2
    group: int = 32
    probe: float = 0.05
    over: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check shares and bits."""
        super().__post_init__()
        for name in ("bits", "low_bits"):
            if getattr(self, name) not in (2, 4, 8):
                raise ConfigError(f"{name} is 2, 4 or 8, got {getattr(self, name)}.")
        if not 0.0 <= self.low <= 1.0:
            raise ConfigError(f"low is a share of the slots, in [0, 1]; got {self.low}.")
        if self.over not in ("all", "probes"):
            raise ConfigError(f"over is 'all' or 'probes', got {self.over!r}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Probes, all stay, codes."""
        score = ProbeSums(
            self.probe, self.seed, "sum", over="all" if self.over == "all" else "probes"
        )
        action = Quantise(self.bits, self.low_bits, self.low, self.group)
        return Eviction(score, self.amount, action=action, scope=Scope(self.scope))
