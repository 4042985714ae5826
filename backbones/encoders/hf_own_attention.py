# SPDX-License-Identifier: Apache-2.0
"""Attention that is written out in the module: BLIP's does not ask transformers for a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from visprune.backbones.encoders.base import Instead, ShownQK


class OwnAttention:
    """What one such module is asked for, with queries, keys and values projected together.

    Args:
        attention: the module, with ``qkv``, ``num_heads``, ``scale``, ``projection``, ``dropout``.
        record: is shown queries and keys.
        bias: what is added to the scores of each key ``[B, T]``. Where there is one, attention is
            computed here; else the module's own forward runs.
    """

    def __init__(
        self,
        attention: Any,
        record: ShownQK | None = None,
        bias: Callable[[], Tensor | None] | None = None,
    ) -> None:
        self.attention, self.record, self.bias = attention, record, bias

    def install(self) -> list[Any]:
        """Put it in place; returns what takes it off."""
        if self.record is not None:
            return [self.attention.qkv.register_forward_hook(self._show)]
        return [Instead(self.attention, "forward", self._attend)]

    def _heads(self, together: Tensor) -> tuple[Tensor, ...]:
        """``[B, T, 3 D]`` as three of ``[B, H, T, d]``."""
        heads = self.attention.num_heads
        return together.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _show(self, module: nn.Module, args: Any, output: Tensor) -> None:
        query, key, _ = self._heads(output)
        assert self.record is not None
        self.record(query, key, self.attention.scale)

    def _attend(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        bias, own = None if self.bias is None else self.bias(), self.attention
        if bias is None:
            return type(own).forward(own, hidden_states, **kwargs)
        query, key, value = self._heads(own.qkv(hidden_states))
        scores = query @ key.transpose(-1, -2) * own.scale
        probs = (scores + bias[:, None, None].to(scores.dtype)).softmax(dim=-1)
        rows = own.dropout(probs) @ value
        return own.projection(rows.transpose(1, 2).flatten(2)), probs
