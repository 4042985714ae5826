# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: keep the first slots and the last ones (ICLR 2024, arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import Eviction, Recency, Recurring, Scope


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Recurring):
    """Keeps ``sinks`` slots at the beginning and the most recent ones, the same in every head.

    **Score**: the place. **Budget**: the same everywhere. **Action**: drop. **Scope**: with
    ``"prompt"``, as published, places of the whole prompt; with ``"visual"``, of its visual tokens.

    Keys keep their phase. The paper's code stores keys before the rotary embedding and gives each
    the place that it has in the cache, which matters once a text outgrows the positions that a
    model was trained for.

    Args:
        sinks: slots at the beginning.
    """

    name: ClassVar[str] = "streaming_llm"

    sinks: int = 4

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Places, same everywhere, drop."""
        return Eviction(Recency(self.sinks), self.amount, scope=Scope(self.scope), every=self.every)
