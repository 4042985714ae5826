# SPDX-License-Identifier: Apache-2.0
"""The blocks of OverLoCK, its stem and its downsampling, under the published names."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune.backbones.vit.contmix import ContextMixer
from visprune.backbones.vit.flat_stages import Pointwise
from visprune.backbones.vit.overlock_parts import (
    GRN,
    ChannelNorm,
    DilatedReparam,
    LayerScale,
    ResidualDWConv,
    SqueezeExcite,
    conv_norm,
)


class RepConvBlock(nn.Module):
    """A static large kernel between pointwise layers, in one branch."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float,
        layer_scale: float | None,
        res_scale: bool,
        drop_path: float,
        deploy: bool,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.res_scale = res_scale
        self.dwconv = ResidualDWConv(dim, dd)
        self.proj = nn.Sequential(
            ChannelNorm(dim, dd),
            DilatedReparam(dim, kernel_size, deploy, dd),
            nn.BatchNorm2d(dim, **dd),
            SqueezeExcite(dim, dd),
            Pointwise(dim, hidden, **dd),
            nn.GELU(),
            ResidualDWConv(hidden, dd),
            GRN(hidden, dd),
            Pointwise(hidden, dim, **dd),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.ls = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        x = self.dwconv(x)
        if self.res_scale:
            return self.ls(x) + self.drop_path(self.proj(x))
        return x + self.drop_path(self.ls(self.proj(x)))


@register_notrace_module
class DynamicConvBlock(ContextMixer):
    """ContMix of the map, with keys from the context that runs beside it."""

    def __init__(
        self,
        dim: int,
        ctx_dim: int,
        num_heads: int,
        kernel_size: int,
        small_kernel_size: int,
        mlp_ratio: float,
        layer_scale: float | None,
        res_scale: bool,
        drop_path: float,
        is_first: bool,
        is_last: bool,
        deploy: bool,
        dd: dict[str, Any],
    ) -> None:
        ctx = ctx_dim // 4
        super().__init__(
            dim, dim + ctx, ctx, num_heads, kernel_size, small_kernel_size, mlp_ratio,
            layer_scale, res_scale, drop_path, deploy, dd,
        )  # fmt: skip
        wide = dim + ctx
        self.ctx, self.is_first, self.is_last = ctx, is_first, is_last
        if not is_first:
            self.x_scale = LayerScale(ctx, 1.0, dd)
            self.h_scale = LayerScale(ctx, 1.0, dd)
        self.fusion = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, **dd),
            nn.BatchNorm2d(wide, **dd),
            nn.GELU(),
            Pointwise(wide, dim, **dd),
            GRN(dim, dd),
        )
        self.dyconv_proj = nn.Sequential(*conv_norm(dim, dim, dd))

    def init_own_weights(self) -> None:
        """The biases of the offsets start at zero."""
        nn.init.zeros_(self.rpb1)
        nn.init.zeros_(self.rpb2)

    def forward(self, x: Tensor, h_x: Tensor, h_r: Tensor) -> Any:
        """One block.

        Args:
            x: [B, dim, H, W].
            h_x: the context as the block before left it, [B, ctx_dim // 4, H, W].
            h_r: the context as it was made, of the same shape.

        Returns:
            ``x`` and ``h_x``; of the last block one map of both.
        """
        if not self.is_first:
            h_x = self.x_scale(h_x) + self.h_scale(h_r)
        identity = self.dwconv1(torch.cat((x, h_x), 1))
        both = self.norm1(identity)
        x = self.fusion(both)
        q_from, k_from = both.split([self.dim, self.ctx], 1)
        mixed = self.dyconv_proj(self.mix(q_from, k_from, x))
        out = self.finished(identity, mixed, x)
        return out if self.is_last else out.split([self.dim, self.ctx], 1)


class DownsampleBoth(nn.Module):
    """Halve the map and the context beside it."""

    def __init__(self, dim: int, out: int, ctx: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.x_proj = nn.Sequential(*conv_norm(dim, out, dd, 3, 2))
        self.h_proj = nn.Sequential(*conv_norm(ctx, ctx, dd, 3, 2))

    def forward(self, x: Tensor, h_x: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B, ., H, W] -> [B, ., ceil(H / 2), ceil(W / 2)]."""
        return self.x_proj(x), self.h_proj(h_x)


def stem(in_chans: int, dim: int, dd: dict[str, Any]) -> nn.Sequential:
    """Four 3 x 3 convolutions, the first and third of stride 2."""
    half = dim // 2
    layers: list[nn.Module] = []
    for before, after, stride in (
        (in_chans, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1),
    ):  # fmt: skip
        layers += [*conv_norm(before, after, dd, 3, stride), nn.GELU()]
    return nn.Sequential(*layers[:-1])
