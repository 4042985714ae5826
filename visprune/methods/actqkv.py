# SPDX-License-Identifier: Apache-2.0
"""ActQKV: read the blocks that the activation-biased query is near to (arXiv:2502.13542)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, KeyNorm, ReadPages, Scope
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ActQKV(CacheMethod):
    """All slots stay in blocks; each new token reads the ``top`` blocks nearest to its query.

    **Score**: none (of a budget, the norm of the key). **Budget**: all stay, unless one is given.
    **Action**: read the blocks whose mean key has the largest cosine with the mean of the new
    queries, all heads as one vector. **Scope**: as given; what is not counted is always read. With
    ``top`` for all blocks it is full attention. Bytes are not saved, reading is.

    The official probe weighs a window's queries by how far they lie from running statistics, but
    only after more than a thousand windows were seen; before, and here, it is their plain mean. Its
    budget that moves blocks between layers by the entropy of their scores is not here.

    Args:
        block: slots of a block.
        top: blocks that are read.
    """

    name: ClassVar[str] = "actqkv"
    decides: ClassVar[bool] = True

    block: int = 16
    top: int = 8

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        for name in ("block", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Norms, all stay, blocks."""
        action = ReadPages(self.block, self.top, "cosine")
        return Eviction(KeyNorm(), self.amount, action=action, scope=Scope(self.scope))
