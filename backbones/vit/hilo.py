# SPDX-License-Identifier: Apache-2.0
"""HiLo attention (arXiv 2205.13213) as a module on channels-last maps."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.vit.refusals import refuse_scripting
from visprune.errors import ConfigError


@register_notrace_module
class HiLo(nn.Module):
    """Attention in two frequency bands: heads on small windows, heads on pooled keys.

    Of ``num_heads`` heads, ``int(num_heads * alpha)`` (truncated) are low-frequency: every pixel
    queries the averages of ``window_size`` x ``window_size`` windows. The others are
    high-frequency: attention inside each window. The outputs are concatenated, high first; each
    branch has its own projections. With ``window_size=1`` every head is low-frequency and this is
    plain attention.

    Parameters have the names of the published checkpoints (ziplab/LITv2 at 7501c86,
    ``classification/models/attentions.py``): ``l_q``, ``l_kv``, ``l_proj``, ``h_qkv``, ``h_proj``;
    a branch without heads has none.

    A map that the window does not divide is padded with zeros at the right and at the bottom and
    the output cropped, as ``detection/mmdet/models/backbones/litv2.py`` of the same repository
    does: the padding is not masked, it acts as keys (its key and value are the bias) and enters
    the averages. The official classification code accepts square maps only and cannot be given
    such a size. The official ``attn_drop`` and ``proj_drop`` are never used there; here
    ``proj_drop`` drops outputs and there is no ``attn_drop``.

    Args:
        dim: channels, divisible by ``num_heads``.
        num_heads: heads of both branches together.
        window_size: side of a window, in pixels.
        alpha: share of low-frequency heads, 0 to 1.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on the scores, ``head_dim ** -0.5`` if None.
        proj_drop: dropout of the output.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: ``dim`` is not divisible, or a value is out of range.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"HiLo: dim must be a multiple of num_heads; "
                              f"got dim={dim}, num_heads={num_heads}.")  # fmt: skip
        if window_size < 1 or not 0 <= alpha <= 1:
            raise ConfigError(f"HiLo: window_size must be at least 1 and alpha in 0..1; "
                              f"got window_size={window_size}, alpha={alpha}.")  # fmt: skip
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.head_dim = dim // num_heads
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        self.l_dim = self.l_heads * self.head_dim
        self.h_dim = self.h_heads * self.head_dim
        self.scale = qk_scale or self.head_dim**-0.5
        if self.l_heads:
            self.l_q = nn.Linear(dim, self.l_dim, bias=qkv_bias, **dd)
            self.l_kv = nn.Linear(dim, 2 * self.l_dim, bias=qkv_bias, **dd)
            self.l_proj = nn.Linear(self.l_dim, self.l_dim, **dd)
        if self.h_heads:
            self.h_qkv = nn.Linear(dim, 3 * self.h_dim, bias=qkv_bias, **dd)
            self.h_proj = nn.Linear(self.h_dim, self.h_dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ConfigError(f"HiLo takes maps [B, H, W, {self.dim}]; got {list(x.shape)}.")
        if self._unobserved():
            names = ("h_qkv", "h_proj", "l_q", "l_kv", "l_proj")
            h_qkv, h_proj, l_q, l_kv, l_proj = (self._pair(name) for name in names)
            whole = ops.hilo_layer(
                x, self.head_dim, h_qkv, h_proj, l_q, l_kv, l_proj,
                window_size=self.window_size, scale=self.scale,
            )  # fmt: skip
            return self.proj_drop(whole)
        q, k, v, pad_k, pad_v = self._high(x)
        low_q = low_k = low_v = None
        if self.l_heads:
            low_q = self._low_queries(x)
            pooled = ops.hilo_pool(x, self.window_size)
            low_k, low_v = self._split(self.l_kv(pooled), self.l_heads)
        out = ops.hilo_attention(
            q, k, v, low_q, low_k, low_v,
            window_size=self.window_size, scale=self.scale, pad_k=pad_k, pad_v=pad_v,
        )  # fmt: skip
        return self._join(out)

    def _unobserved(self) -> bool:
        """Whether the projections may be run by their weights alone, which saves copies.

        Not where somebody listens to them, or put something else in the place of one: an adapter,
        a quantised layer, a parametrisation.
        """
        return all(
            type(part) is nn.Linear
            and not (part._forward_hooks or part._forward_pre_hooks)
            and not (part._backward_hooks or part._backward_pre_hooks)
            for name, part in self.named_children()
            if name != "proj_drop"
        )

    def _pair(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a projection; None for a branch without heads."""
        part = getattr(self, name, None)
        return None if part is None else (part.weight, part.bias)

    def _high(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """q, k, v [B, H, W, heads, d] of the high branch, key and value of a padded pixel."""
        if not self.h_heads:
            return (None,) * 5
        pads: tuple[Tensor | None, ...] = (None, None)
        if x.shape[1] % self.window_size or x.shape[2] % self.window_size:
            # A padded pixel is zero before the projection, so its key and value are the bias.
            pads = self._split(self.h_qkv(x.new_zeros(self.dim)), self.h_heads)[1:]
        return (*self._split(self.h_qkv(x), self.h_heads), *pads)

    def _low_queries(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., heads, d] of the low branch."""
        return self.l_q(x).unflatten(-1, (self.l_heads, self.head_dim))

    def _join(self, out: Tensor) -> Tensor:
        """[..., heads, d], high heads first -> the output [..., C]."""
        high, low = out.flatten(-2).split([self.h_dim, self.l_dim], -1)
        parts = [self.h_proj(high)] if self.h_heads else []
        parts += [self.l_proj(low)] if self.l_heads else []
        return self.proj_drop(torch.cat(parts, -1) if len(parts) > 1 else parts[0])

    def _split(self, x: Tensor, heads: int) -> tuple[Tensor, ...]:
        """[..., n * heads * d] -> n times [..., heads, d]."""
        return x.unflatten(-1, (-1, heads, self.head_dim)).unbind(-3)

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds for a map of this size, padding counted (the official ``flops``)."""
        s = self.window_size
        windows = -(-height // s) * -(-width // s)
        tokens, area = windows * s * s, s * s
        high = (
            tokens * self.h_dim * (3 * self.dim + self.h_dim) + 2 * windows * area**2 * self.h_dim
        )
        low = tokens * self.l_dim * (self.dim + self.l_dim + 2 * windows)
        return high + low + 2 * windows * self.dim * self.l_dim

    def extra_repr(self) -> str:
        """Heads per branch, for ``print(model)``."""
        return f"dim={self.dim}, high={self.h_heads}, low={self.l_heads}, window={self.window_size}"
