# SPDX-License-Identifier: Apache-2.0
"""KVMerger: neighbours with one direction become one slot (arXiv:2407.08454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, ColumnSums, Eviction, MergeNeighbours, Scope


@dataclass(frozen=True, kw_only=True)
class KVMerger(CacheMethod):
    """Contiguous slots whose keys point one way merge into the one that got most attention.

    **Score**: column sums over the whole prompt (they name the pivot of a set). **Budget**: the
    same everywhere. **Action**: the nearest neighbours join until the budget is met; keys and
    values are means with Gaussian weights of the distance to the pivot's key. **Scope**: with
    ``"prompt"``, the first ``sinks`` and last ``recent`` slots stay and count.

    There is no official code. Known at second hand: sets are contiguous, pivots have the largest
    attention, weights are ``exp(-d^2 / 2 s^2)``. Not known: the cosine that makes a set (here: what
    the budget asks for), ``s`` (here: the mean distance in the set), what is protected, and whether
    a set counts as often as it has slots (``counts``).

    Args:
        counts: whether it does.
        sinks: slots at the beginning that stay, with ``scope="prompt"``.
        recent: slots at the end that stay, with ``scope="prompt"``.
    """

    name: ClassVar[str] = "kvmerger"

    counts: bool = True
    sinks: int = 4
    recent: int = 32

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Column sums, same everywhere, neighbours merge."""
        scope = Scope(self.scope, first=self.sinks, last=self.recent)
        action = MergeNeighbours(self.counts)
        return Eviction(ColumnSums(), self.amount, action=action, scope=scope)
