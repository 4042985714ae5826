# SPDX-License-Identifier: Apache-2.0
"""TOVA: keep what the last token looks at (EMNLP 2024, arXiv:2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import Eviction, LastRow, Recurring, Scope


@dataclass(frozen=True, kw_only=True)
class TOVA(Recurring):
    """A layer keeps one set of slots for all its heads: the best of the last query's row.

    **Score**: attention of the prompt's last token, mean over heads. **Budget**: the same
    everywhere. **Action**: drop. **Scope**: as given; nothing is protected, not the newest slot.

    ``every=1`` is the paper's cache, which is cut after every token.
    """

    name: ClassVar[str] = "tova"

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Last row, same everywhere, drop."""
        return Eviction(LastRow(), self.amount, scope=Scope(self.scope), every=self.every)
