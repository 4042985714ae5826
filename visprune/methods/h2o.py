# SPDX-License-Identifier: Apache-2.0
"""H2O: keep the heavy hitters and the most recent slots (NeurIPS 2023, arXiv:2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import ColumnSums, Drop, DropAndHide, Eviction, Recurring, Scope
from visprune.core.cache.seen import Group
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class H2O(Recurring):
    """Each key head keeps the slots that all queries of the prompt together attended to most.

    **Score**: column sums of causal attention over the whole prompt. **Budget**: the same
    everywhere. **Action**: drop. **Scope**: with ``"prompt"``, as published, the last ``recent``
    slots stay and count.

    This is the release that really drops (``utils_real_drop``), at the end of the prompt; with
    ``every=1``, after each token too, and sums go on (guesses of an assistant are counted). The
    first release stores everything under a mask. All that it can ever see again is what stays
    here; but its mask has a column more than its scores, so that the oldest of the recent slots is
    hidden from the next token, and ranked with the others after it. ``first_release=True`` does so,
    in as small a cache. Column sums favour early slots, which more queries see; ``zipcache``'s
    score divides by their number.

    Args:
        recent: slots at the end of the prompt that stay.
        group: over the query heads of a key head.
        first_release: hide the oldest of the recent slots from the next token; with ``every=1``.
    """

    name: ClassVar[str] = "h2o"

    recent: int = 32
    group: Group = "sum"
    first_release: bool = False

    def __post_init__(self) -> None:
        """Check that what is hidden comes back."""
        super().__post_init__()
        if self.first_release and (self.every != 1 or self.recent < 1):
            raise ConfigError(
                f"first_release=True hides the oldest of the recent slots from one token after "
                f"another; got every={self.every}, recent={self.recent}. Give every=1 and recent "
                f"from 1."
            )

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Column sums, same everywhere, drop."""
        return Eviction(
            ColumnSums(group=self.group),
            self.amount,
            action=DropAndHide(self.recent) if self.first_release else Drop(),
            scope=Scope(self.scope, last=self.recent),
            every=self.every,
        )
