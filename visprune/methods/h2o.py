# SPDX-License-Identifier: Apache-2.0
"""H2O: keep the heavy hitters and the most recent slots (NeurIPS 2023, arXiv:2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import ColumnSums, Eviction, Recurring, Scope
from visprune.core.cache.seen import Group


@dataclass(frozen=True, kw_only=True)
class H2O(Recurring):
    """Each key head keeps the slots that all queries of the prompt together attended to most.

    **Score**: column sums of causal attention over the whole prompt. **Budget**: the same
    everywhere. **Action**: drop. **Scope**: with ``"prompt"``, as published, the last ``recent``
    slots stay and count.

    This is the release that really drops (``utils_real_drop``), at the end of the prompt; with
    ``every=1``, after each token too, and sums go on (guesses of an assistant are counted). The
    first release hides instead: a slot can vanish for one token and come back, which no cache that
    is smaller can do, and is not offered. Column sums favour early slots, which more queries see;
    ``zipcache``'s score divides by their number.

    Args:
        recent: slots at the end of the prompt that stay.
        group: over the query heads of a key head.
    """

    name: ClassVar[str] = "h2o"

    recent: int = 32
    group: Group = "sum"

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Column sums, same everywhere, drop."""
        return Eviction(
            ColumnSums(group=self.group),
            self.amount,
            scope=Scope(self.scope, last=self.recent),
            every=self.every,
        )
