# SPDX-License-Identifier: Apache-2.0
"""Hooks on the parts of timm's attention modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visprune.backbones.encoders.base import Hooks, ShownQK


def watch_norms(attention: Any, record: ShownQK, *, heads_last: bool = False) -> list[Any]:
    """Show what comes out of ``q_norm`` and ``k_norm``; the query's runs first."""
    hooks = _Norms(attention, record, heads_last=heads_last)
    return [
        attention.q_norm.register_forward_hook(hooks.query),
        attention.k_norm.register_forward_hook(hooks.key),
    ]


class _Norms(Hooks):
    """The hooks of :func:`watch_norms` on one attention module."""

    def __init__(self, attention: Any, record: ShownQK, *, heads_last: bool) -> None:
        super().__init__()
        self.attention, self.record, self.heads_last = attention, record, heads_last

    def query(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.call.held = [output]

    def key(self, module: nn.Module, args: Any, output: Tensor) -> None:
        q, k = self.call.held.pop(), output
        if self.heads_last:  # [B, T, H, d]
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        self.record(q, k, self.attention.scale)


class Branches(Hooks):
    """Attention modules side by side count as one with the heads of all."""

    def __init__(self, count: int, record: ShownQK) -> None:
        super().__init__()
        self.count, self.record = count, record

    def collect(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Take queries and keys ``[B, H, T, d]`` of one; show those of all with the last."""
        held = [*self.call.held, q, k]
        if len(held) == 2 * self.count:
            self.record(torch.cat(held[::2], 1), torch.cat(held[1::2], 1), scale)
            held = []
        self.call.held = held


class Weighing(Hooks):
    """The hooks of ``TimmViT.weigh_keys`` on one attention module.

    With a the plain probabilities and p the policy a token gets ``(sum_j p_j a_ij v_j + own_i v_i)
    / (sum_j p_j a_ij + own_i)``, ``own_i = (1 - p_i) a_ii``: its own key always counts, as in the
    official training. Else a token would learn of its decision how well it does without itself,
    which no token does that is really dropped.
    """

    def __init__(self, attention: Any, prefix: int, policy: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self.attention, self.prefix, self.policy = attention, prefix, policy

    def install(self) -> list[Any]:
        """Put them on."""
        return [
            self.attention.qkv.register_forward_hook(self._scale_values),
            *watch_norms(self.attention, self._add_up),
            self.attention.norm.register_forward_pre_hook(self._divide),
        ]

    def _whole(self) -> Tensor | None:
        given = self.policy()
        return None if given is None else nn.functional.pad(given, (self.prefix, 0), value=1.0)

    def _scale_values(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        weight = self._whole()
        if weight is None:
            return None
        q, k, v = output.chunk(3, dim=-1)
        self.call.held = [v]
        return torch.cat([q, k, v * weight[..., None].to(v.dtype)], dim=-1)

    def _add_up(self, q: Tensor, k: Tensor, scale: float) -> None:
        weight = self._whole()
        if weight is not None:
            # [B, H, T, T], as the official code has it: the sums are exact only if the diagonal is.
            plain = ((q * scale) @ k.transpose(-2, -1)).float().softmax(dim=-1)
            weight = weight[:, None].float()
            own = (1 - weight) * plain.diagonal(dim1=-2, dim2=-1)
            total = (plain @ weight[..., None])[..., 0] + own
            self.call.held += [own.transpose(1, 2)[..., None], total.transpose(1, 2)[..., None]]

    def _divide(self, module: nn.Module, args: Any) -> Any:
        if len(self.call.held) < 3:
            return None
        value, own, total = self.call.held
        self.call.held = []
        heads, values = (t.unflatten(-1, (self.attention.num_heads, -1)) for t in (args[0], value))
        return (((heads + own * values) / total).flatten(-2).to(args[0].dtype),)
