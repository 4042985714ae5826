# SPDX-License-Identifier: Apache-2.0
"""ThinK: keys with fewer channels (ICLR 2025, arXiv:2407.21018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, DropChannels, Eviction, Scope, WindowAttention
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ThinK(CacheMethod):
    """Of the keys that SnapKV keeps, each head lets go of the channels that matter least.

    **Score**: SnapKV's. **Budget**: all stay, unless one is given. **Action**: slots beyond it are
    dropped; of the others' keys the ``ratio`` of channels with the smallest product of the mean
    square of the last 32 queries and that of the keys goes. **Scope**: with ``"prompt"``, as
    published, the last ``recent`` slots stay and keep all channels; with ``"visual"``, text does.

    Squares of the query heads of a key head are averaged; in the official code keys are repeated
    to all query heads before.

    Args:
        ratio: share of the channels that go, rounded down.
        recent: slots at the end that keep all, with ``scope="prompt"``.
        window: queries that SnapKV's score looks at.
    """

    name: ClassVar[str] = "think"
    decides: ClassVar[bool] = True

    ratio: float = 0.4
    recent: int = 32
    window: int = 32

    def __post_init__(self) -> None:
        """Check the share."""
        super().__post_init__()
        if not 0.0 <= self.ratio < 1.0:
            raise ConfigError(f"ratio is a share of the channels, in [0, 1); got {self.ratio}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Window, all stay, channels."""
        scope = Scope(self.scope, last=self.recent)
        action = DropChannels(self.ratio)
        return Eviction(WindowAttention(self.window), self.amount, action=action, scope=scope)
