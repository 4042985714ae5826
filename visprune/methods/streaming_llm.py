# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: keep the first slots and the last ones (ICLR 2024, arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CloseUp, Eviction, Recency, Recurring, Scope
from visprune.core.method import PositionRule


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Recurring):
    """Keeps ``sinks`` slots at the beginning and the most recent ones, the same in every head.

    **Score**: the place. **Budget**: the same everywhere. **Action**: close up. **Scope**: with
    ``"prompt"``, as published, places of the whole prompt; with ``"visual"``, of its visual tokens.

    As in the paper a slot has the position that its place in the cache gives it: keys are turned
    on to it when others leave, and later tokens count from there (the official code stores keys
    before their rotary embedding). So with ``every`` a text never outgrows the positions that a
    model was trained for. With ``positions="original"``, and for tokens with (t, h, w) places,
    keys keep their phase.

    Args:
        sinks: slots at the beginning.
    """

    name: ClassVar[str] = "streaming_llm"
    default_positions: ClassVar[PositionRule] = "compact"
    closes_up: ClassVar[bool] = True

    sinks: int = 4

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Places, same everywhere, close up."""
        return Eviction(
            Recency(self.sinks),
            self.amount,
            action=CloseUp(),
            scope=Scope(self.scope),
            every=self.every,
        )
