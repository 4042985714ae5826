# SPDX-License-Identifier: Apache-2.0
"""ActQKV: read the blocks that the activation-biased query is near to (arXiv:2502.13542)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, KeyNorm, ReadPages, Scope
from visprune.core.numeric import is_whole
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ActQKV(CacheMethod):
    """All slots stay in blocks; each new token reads the ``top`` blocks nearest to its query.

    **Score**: none (of a budget, the norm of the key). **Budget**: all stay, unless one is given.
    **Action**: read the blocks whose mean key has the largest cosine with the mean of the new
    queries, all heads as one vector. **Scope**: as given; what is not counted is always read. With
    ``top`` for all blocks it is full attention. Bytes are not saved, reading is.

    ``after`` and ``spread`` are its two other parts. The official probe weighs a window's queries
    (tokens that come together) by how far they lie from running statistics; these are globals of
    its process, for all layers and requests, and set in only after ``after=1000`` windows. Here
    each layer of a cache has its own, of what came behind the prompt. The official budget moves
    blocks between layers by the entropy of their scores; its mean layer reads half of ``top``, and
    32 at least, where here it reads ``top``, and one at least.

    Args:
        block: slots of a block.
        top: blocks that are read; with ``spread``, by a layer in the mean.
        after: windows until the probe weighs queries; ``None``: it is their mean.
        spread: of how many last tokens the entropies share out blocks among layers; ``None``: every
            layer reads ``top``.
    """

    name: ClassVar[str] = "actqkv"
    decides: ClassVar[bool] = True

    block: int = 16
    top: int = 8
    after: int | None = None
    spread: int | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        for name in ("block", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}.")
        for name, least in (("after", 0), ("spread", 1)):
            given = getattr(self, name)
            if given is not None and (not is_whole(given) or given < least):
                raise ConfigError(f"{name} is a whole number from {least}, or None; got {given!r}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Norms, all stay, blocks."""
        action = ReadPages(self.block, self.top, "cosine", self.after, self.spread)
        return Eviction(KeyNorm(), self.amount, action=action, scope=Scope(self.scope))
