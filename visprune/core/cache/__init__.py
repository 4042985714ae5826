# SPDX-License-Identifier: Apache-2.0
"""All that a method at the cache is written with: its four parts, and the base that holds them."""

from visprune.core.cache.actions import (
    CloseUp,
    Compensate,
    DropAndHide,
    MergeNearest,
    MergeNeighbours,
)
from visprune.core.cache.budgets import Gated, JointHeads, Listed, Pyramid
from visprune.core.cache.method import CacheMethod, CacheStage, Recurring
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
    LearnedScore,
    ProbeSums,
    Recency,
    WindowAttention,
    smoothed,
)
from visprune.core.cache.seen import CacheSeen
from visprune.core.cache.stored import DropChannels, Quantise, ReadPages
from visprune.core.cache.trace import CacheTrace

__all__ = [
    "Action",
    "Amount",
    "CacheBudget",
    "CacheMethod",
    "CacheSeen",
    "CacheStage",
    "CacheTrace",
    "CloseUp",
    "ColumnSums",
    "Compensate",
    "Counted",
    "Drop",
    "DropAndHide",
    "DropChannels",
    "Eviction",
    "Gated",
    "HeadSlots",
    "JointHeads",
    "KeyNorm",
    "LastRow",
    "LearnedScore",
    "Listed",
    "Looked",
    "MergeNearest",
    "MergeNeighbours",
    "ProbeSums",
    "Pyramid",
    "Quantise",
    "ReadPages",
    "Recency",
    "Recurring",
    "Same",
    "Scope",
    "Score",
    "WindowAttention",
    "smoothed",
]
