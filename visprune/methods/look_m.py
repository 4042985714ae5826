# SPDX-License-Identifier: Apache-2.0
"""LOOK-M: text stays, and pictures merge (Findings of EMNLP 2024, arXiv:2406.18139)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from visprune.core import ModelSpec
from visprune.core.cache import (
    Action,
    CacheMethod,
    ColumnSums,
    Drop,
    Eviction,
    MergeNearest,
    Scope,
)
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LookM(CacheMethod):
    """Visual slots that get little attention go into the kept one with the nearest key.

    **Score**: column sums over the whole prompt. **Budget**: the same everywhere. **Action**: merge
    into the nearest, as the ``merge`` says. **Scope**: with ``"prompt"``, as published, the last
    ``recent`` slots stay and count, and so does all text (``text_prior``): where text is more than
    the budget, no visual slot stays. There dropped slots go into text too; with ``"visual"`` they
    go into visual ones alone (EffiVLM-Bench found that merging across modalities hurts).

    As in the code, ``"average"`` and ``"weighted"`` lose about half of what is dropped: slots
    merge only if their cosine, mean of heads, reaches the mean of all. For ``"average"`` the code
    applies that to the targets and not to the sources, so that other slots come to them than are
    near; ``official=True`` does so.

    Args:
        merge: how; ``"none"``: drop.
        text_prior: with ``scope="prompt"``, whether text stays; without, the first four slots do.
        recent: last slots that stay, with ``scope="prompt"``.
        official: repeat the index of the official ``"average"``.
    """

    name: ClassVar[str] = "look_m"

    merge: Literal["pivot", "weighted", "average", "none"] = "pivot"
    text_prior: bool = True
    recent: int = 32
    official: bool = False

    def __post_init__(self) -> None:
        """Check the names."""
        super().__post_init__()
        if self.merge not in ("pivot", "weighted", "average", "none"):
            raise ConfigError(
                f"merge is 'pivot', 'weighted', 'average' or 'none', got {self.merge!r}."
            )

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Column sums, same everywhere, merge."""
        action: Action = Drop()
        if self.merge != "none":
            action = MergeNearest(
                self.merge, self.merge != "pivot", self.official, self.scope == "visual"
            )
        whole = self.scope == "prompt"
        sinks = 4 if whole and not self.text_prior and self.merge != "none" else 0
        scope = Scope(self.scope, last=self.recent, text_stays=self.text_prior)
        amount = replace(self.amount, yields=self.text_prior)
        return Eviction(ColumnSums(sinks=sinks), amount, action=action, scope=scope)
