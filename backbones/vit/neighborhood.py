# SPDX-License-Identifier: Apache-2.0
"""Neighborhood attention (arXiv 2204.07143, 2209.15001) as a module on channels-last maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.vit.refusals import refuse_scripting
from visprune.errors import ConfigError


@register_notrace_module
class NeighborhoodAttention2d(nn.Module):
    """Every pixel attends to the ``kernel_size`` x ``kernel_size`` pixels around it.

    At the border the window is shifted, never cut. Parameters have the names of the published
    NAT and DiNAT checkpoints: ``qkv``, ``rpb`` [heads, 2 k_h - 1, 2 k_w - 1], ``proj``
    (SHI-Labs/NATTEN at dd364e1, ``src/natten/natten2d.py``).

    As there, a map smaller than ``kernel_size * dilation`` is padded with zeros at the right and
    at the bottom before the projections, unmasked: padded pixels act as keys. Beyond it: even and
    rectangular kernels, strides, causal axes.

    Args:
        dim: channels, divisible by ``num_heads``.
        num_heads: attention heads.
        kernel_size: window, one number or (height, width).
        dilation: step between the keys of a window.
        stride: pixels that share one window (arXiv 2504.16922).
        is_causal: per axis, whether only earlier pixels are seen; not with ``rel_pos_bias``.
        rel_pos_bias: learn a bias for every offset, as all published models do.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on the scores, ``head_dim ** -0.5`` if None.
        attn_drop: dropout of the attention weights; in training this takes the unfused operators.
        proj_drop: dropout of the output.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: ``dim`` is not divisible, or a kernel, stride or dilation is not possible.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"NeighborhoodAttention2d: dim must be a multiple of num_heads; "
                              f"got dim={dim}, num_heads={num_heads}.")  # fmt: skip
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size: tuple[int, int] = to_2tuple(kernel_size)
        self.dilation: tuple[int, int] = to_2tuple(dilation)
        self.stride: tuple[int, int] = to_2tuple(stride)
        self.is_causal: tuple[bool, bool] = to_2tuple(is_causal)
        self._check_window()
        self.scale = qk_scale or self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        sides = [2 * k - 1 for k in self.kernel_size]
        self.rpb = nn.Parameter(torch.empty(num_heads, *sides, **dd)) if rel_pos_bias else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_own_weights()

    def _check_window(self) -> None:
        for kernel, dilation, stride in zip(
            self.kernel_size, self.dilation, self.stride, strict=True
        ):
            if kernel < 2 or dilation < 1 or not 1 <= stride <= kernel:
                raise ConfigError(
                    "NeighborhoodAttention2d: kernel_size must be at least 2, dilation at least 1 "
                    f"and stride in 1..kernel_size; got {self.kernel_size}, {self.dilation} and "
                    f"{self.stride}."
                )

    def init_own_weights(self) -> None:
        """Truncated normal of 0.02 for the biases of the offsets."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ConfigError(
                f"NeighborhoodAttention2d takes maps [B, H, W, {self.dim}]; got {list(x.shape)}."
            )
        height, width = x.shape[1:3]
        pad_h, pad_w = (
            max(0, k * d - size)
            for k, d, size in zip(self.kernel_size, self.dilation, (height, width), strict=True)
        )
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = self.attend(q, k, v).flatten(-2)
        return self.proj_drop(self.proj(out[:, :height, :width]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **extra: Tensor) -> Tensor:
        """[B, H, W, heads, d] -> the same.

        Args:
            q: queries.
            k: keys.
            v: values.
            extra: ``additional_keys`` and ``additional_values``, which every query sees too.
        """
        window: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
        }
        if self.training and self.attn_drop.p and not extra:
            scores = ops.na_qk(q, k, scale=self.scale, rpb=self.rpb, **window)
            return ops.na_av(self.attn_drop(scores.softmax(-1)), v, **window)
        window.update(scale=self.scale, rpb=self.rpb, **extra)
        out: Any = ops.neighborhood_attention(q, k, v, **window)  # a tuple only with return_lse
        return out

    def extra_repr(self) -> str:
        """Heads and window, for ``print(model)``."""
        window = f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"
        return f"dim={self.dim}, num_heads={self.num_heads}, {window}"
