# SPDX-License-Identifier: Apache-2.0
"""All that a method at the cache is written with: its four parts, and the base that holds them."""

from visprune.core.cache.budgets import JointHeads, Pyramid
from visprune.core.cache.method import CacheMethod, CacheStage
from visprune.core.cache.parts import (
    Action,
    Amount,
    CacheBudget,
    Counted,
    Drop,
    Eviction,
    HeadSlots,
    Looked,
    Same,
    Scope,
    Score,
)
from visprune.core.cache.scores import (
    ColumnSums,
    KeyNorm,
    LastRow,
    Recency,
    WindowAttention,
    smoothed,
)
from visprune.core.cache.seen import CacheSeen
from visprune.core.cache.trace import CacheTrace

__all__ = [
    "Action",
    "Amount",
    "CacheBudget",
    "CacheMethod",
    "CacheSeen",
    "CacheStage",
    "CacheTrace",
    "ColumnSums",
    "Counted",
    "Drop",
    "Eviction",
    "HeadSlots",
    "JointHeads",
    "KeyNorm",
    "LastRow",
    "Looked",
    "Pyramid",
    "Recency",
    "Same",
    "Scope",
    "Score",
    "WindowAttention",
    "smoothed",
]
