# SPDX-License-Identifier: Apache-2.0
"""TokenSelect: read the slots that all heads together attend to most (arXiv:2411.02886)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, KeyNorm, ReadPages, Scope
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TokenSelect(CacheMethod):
    """All slots stay; each new token reads the ``top`` that its heads vote for.

    **Score**: none (of a budget, the norm of the key). **Budget**: all stay, unless one is given.
    **Action**: softmax over the slots in every head, summed over heads; the best ``top`` are read,
    one set for the layer. **Scope**: as given; what is not counted is always read. With ``top`` for
    all slots it is full attention. All keys are read to choose, so values alone are read less.

    That a choice is used again where successive queries are alike, and the paged kernel, belong to
    the official server and are not here.

    Args:
        top: slots that are read.
    """

    name: ClassVar[str] = "tokenselect"
    decides: ClassVar[bool] = True

    top: int = 128

    def __post_init__(self) -> None:
        """Check the number."""
        super().__post_init__()
        if self.top < 1:
            raise ConfigError(f"top is at least 1, got {self.top}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Norms, all stay, one slot a page."""
        action = ReadPages(1, self.top, "softmax")
        return Eviction(KeyNorm(), self.amount, action=action, scope=Scope(self.scope))
