# SPDX-License-Identifier: Apache-2.0
"""Knorm: keep the slots with small keys (EMNLP 2024, arXiv:2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, KeyNorm, Scope


@dataclass(frozen=True, kw_only=True)
class Knorm(CacheMethod):
    """Each key head keeps the slots whose keys have the smallest norm; no query is looked at.

    **Score**: the norm of the key, negative. **Budget**: the same everywhere. **Action**: drop.
    **Scope**: as given. What is kept does not depend on the question, so one cache serves many.
    In models that normalise their keys (Qwen3, Gemma 3) norms differ by the weights of that
    normalisation alone.
    """

    name: ClassVar[str] = "knorm"

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Norms, same everywhere, drop."""
        return Eviction(KeyNorm(), self.amount, scope=Scope(self.scope))
