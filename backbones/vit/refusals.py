# SPDX-License-Identifier: Apache-2.0
"""What attention that replaces timm's cannot be given."""

from __future__ import annotations

from torch import Tensor

from visprune.errors import ConfigError


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ``ConfigError`` where timm's callers give a mask."""
    if attn_mask is not None or is_causal:
        raise ConfigError(
            "This attention has its own pattern, which is its own mask; attn_mask and is_causal "
            "cannot be given."
        )
