# SPDX-License-Identifier: Apache-2.0
"""HiLo attention in the place of timm's ``Attention``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Attention
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.vit.hilo import HiLo
from visprune.backbones.vit.refusals import refuse_mask
from visprune.backbones.vit.with_attention_grid import Grid, attend
from visprune.errors import ConfigError, UnsupportedModel


@register_notrace_module
class GridHiLo(HiLo):
    """HiLo on tokens [B, N, C] with prefix tokens; see ``grid_attention`` for the rule."""

    grid: Grid
    alpha: float
    normed: bool

    @classmethod
    def like(cls, attn: Any, grid: Grid, copy_weights: bool, **options: Any) -> GridHiLo:
        """HiLo of the size of timm's ``attn``, and with its weights if asked for."""
        gated = getattr(attn, "gate", None) is not None
        if not isinstance(attn, Attention) or gated:
            raise UnsupportedModel(
                f"HiLo has projections of its own and cannot take over {type(attn).__name__}"
                f"{' with a gate' if gated else ''}; of timm it takes Attention without gates or "
                f"rotary embedding. Neighborhood attention can."
            )
        like = attn.qkv.weight
        new = cls(
            like.shape[1], attn.num_heads, qkv_bias=attn.qkv.bias is not None,
            proj_drop=attn.proj_drop.p, device=like.device, dtype=like.dtype, **options,
        )  # fmt: skip
        if grid.num_prefix and not new.l_heads:
            raise ConfigError("HiLo without low-frequency heads never shows the patches to the "
                              "prefix tokens; give a larger alpha.")  # fmt: skip
        new.grid, new.alpha, new.normed = grid, options.get("alpha", 0.5), False
        for name in ("q_norm", "k_norm", "norm"):
            if not isinstance(getattr(attn, name, None), nn.Identity | None):
                new.normed = True
                new.add_module(name, copy.deepcopy(getattr(attn, name)))
                if not copy_weights:
                    getattr(new, name).reset_parameters()
        if copy_weights:
            new.copy_from(attn)
        return new.train(attn.training)

    def arguments(self) -> dict[str, Any]:
        """What :func:`with_attention` made this of, apart from the model."""
        return {"kind": "hilo", "window_size": self.window_size, "alpha": self.alpha}

    def copy_from(self, attn: Any) -> None:
        """Take the weights of plain attention: the first heads become the high-frequency ones."""
        h = self.h_dim
        with torch.no_grad():
            for key in ("weight", "bias"):
                qkv, proj = getattr(attn.qkv, key), getattr(attn.proj, key)
                if qkv is not None:
                    q, k, v = qkv.chunk(3)
                    if self.h_heads:
                        getattr(self.h_qkv, key).copy_(torch.cat((q[:h], k[:h], v[:h])))
                    if self.l_heads:
                        getattr(self.l_q, key).copy_(q[h:])
                        getattr(self.l_kv, key).copy_(torch.cat((k[h:], v[h:])))
                for part, name in ((slice(0, h), "h_proj"), (slice(h, None), "l_proj")):
                    if hasattr(self, name) and proj is not None:
                        block = proj[part, part] if key == "weight" else proj[part]
                        getattr(getattr(self, name), key).copy_(block)
                    elif hasattr(self, name) and key == "bias":
                        nn.init.zeros_(getattr(self, name).bias)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> the same."""
        refuse_mask(attn_mask, is_causal)
        first, size = self.grid.num_prefix, self.grid.check(x)
        prefix, patches = x[:, :first], x[:, first:].unflatten(1, size)
        if not (first or self.normed):
            return super().forward(patches).flatten(1, 2)
        low = self._low(x, prefix, patches)
        low_q = low_k = low_v = None  # as maps
        if low is not None:
            low_q = low[0][:, first:].unflatten(1, size)
            low_k, low_v = low[1][:, None], low[2][:, None]
        high_q, high_k, high_v, pad_k, pad_v = self._high(patches)
        out = ops.hilo_attention(
            high_q, high_k, high_v, low_q, low_k, low_v,
            window_size=self.window_size, scale=self.scale, pad_k=pad_k, pad_v=pad_v,
        ).flatten(1, 2)  # fmt: skip
        if first and low is not None:
            seen = [attend(low[0][:, :first], low[1], low[2], self.scale)]
            if self.h_heads:
                own_q, own_k, own_v = self._split(self.h_qkv(prefix), self.h_heads)
                own_q, own_k = self._normed("q_norm", own_q), self._normed("k_norm", own_k)
                seen.insert(0, attend(own_q, own_k, own_v, self.scale))
            out = torch.cat((torch.cat(seen, 2), out), 1)
        return self._join(out)

    def _low(self, x: Tensor, prefix: Tensor, patches: Tensor) -> tuple[Tensor, ...] | None:
        """Queries [B, N, heads, d], keys and values [B, M, heads, d]; None without low heads."""
        if not self.l_heads:
            return None
        pooled = ops.hilo_pool(patches, self.window_size).flatten(1, 2)
        k, v = self._split(self.l_kv(torch.cat((prefix, pooled), 1)), self.l_heads)
        return self._normed("q_norm", self._low_queries(x)), self._normed("k_norm", k), v

    def _high(self, x: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pad_k, pad_v = super()._high(x)
        q, k, pad_k = (
            t if t is None else self._normed(name, t)
            for name, t in (("q_norm", q), ("k_norm", k), ("k_norm", pad_k))
        )
        return q, k, v, pad_k, pad_v

    def _join(self, out: Tensor) -> Tensor:
        heads = out.shape[-2:]
        return super()._join(self._normed("norm", out.flatten(-2)).unflatten(-1, heads))

    def _normed(self, name: str, t: Tensor) -> Tensor:
        """Under one of the norms of the attention whose place this took, where it had it."""
        norm = getattr(self, name, None)
        return t if norm is None else norm(t).type_as(t)
