# SPDX-License-Identifier: Apache-2.0
"""How tokens that left an encoder's layers come back."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Restoration(Protocol):
    """What a selection that brings its tokens back knows of those that left."""

    def restore(self, kept: Tensor) -> Tensor:
        """All tokens again, from what has become of those that stayed.

        Args:
            kept: in slot order, as a later layer has them, ``[B, K, D]``.

        Returns:
            ``[B, N, D]``; those that stayed to the bit.
        """
