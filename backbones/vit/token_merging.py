# SPDX-License-Identifier: Apache-2.0
"""Deformable token merging (arXiv 2105.14217): a 2 x 2 convolution that chooses where it reads."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = 4  # places that the 2 x 2 kernel reads per output


class DeformConv2x2(nn.Module):
    """Deformable convolution (v1, no modulation) with kernel 2, stride 2 and no padding.

    The same function as ``torchvision.ops.deform_conv2d`` behind an offset convolution that starts
    at zero: four bilinear reads per output, zero outside the map, then one matrix. Written with
    ``grid_sample`` because that runs in bf16, exports, is counted by PyTorch's FLOP counter (the
    torchvision operator counts as zero) and is no slower. Parameter names are those of
    ziplab/LITv2 at 7501c86, ``classification/mm_modules/DCN/modules/deform_conv2d.py``.

    Args:
        dim: input channels.
        out_dim: output channels.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_dim, dim, 2, 2, **dd))
        self.bias = nn.Parameter(torch.empty(out_dim, **dd))
        self.conv_offset = nn.Conv2d(dim, 2 * TAPS, 2, stride=2, **dd)
        self.init_own_weights()

    def init_own_weights(self) -> None:
        """Uniform as in ``nn.Conv2d``; the offsets start at zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out_dim, H // 2, W // 2]; an odd last row or column is not read."""
        b, c, height, width = x.shape
        offset = self.conv_offset(x).float()  # [B, 8, h, w]: (dy, dx) of tap (0, 0), (0, 1), ...
        h, w = offset.shape[-2:]
        offset = offset.view(b, 2, 2, 2, h, w)
        rows = _places(h, x.device).view(1, 2, 1, h, 1) + offset[:, :, :, 0]
        columns = _places(w, x.device).view(1, 1, 2, 1, w) + offset[:, :, :, 1]
        # grid_sample wants (x, y) with the centres of the first and last pixel at -1 and 1.
        grid = torch.stack([columns * (2 / (width - 1)) - 1, rows * (2 / (height - 1)) - 1], -1)
        grid = grid.view(b, TAPS * h, w, 2)
        read = F.grid_sample(x.float(), grid, padding_mode="zeros", align_corners=True)
        # Channel by channel its four taps: the order of the weight's axes, so nothing is copied.
        read = read.to(self.weight.dtype).view(b, c * TAPS, h, w)
        return F.conv2d(read, self.weight.flatten(1)[..., None, None], self.bias)


def _places(count: int, device: torch.device) -> Tensor:
    """Where the two taps along one axis read without an offset: [2, count]."""
    return 2.0 * torch.arange(count, device=device) + torch.arange(2, device=device)[:, None]


class TokenMerging(nn.Module):
    """Deformable convolution, batch norm, GELU: [B, H, W, C] -> [B, H // 2, W // 2, 2 C].

    Args:
        dim: input channels C.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dconv = DeformConv2x2(dim, 2 * dim, device=device, dtype=dtype)
        self.norm_layer = nn.BatchNorm2d(2 * dim, device=device, dtype=dtype)
        self.act_layer = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.dconv(x.permute(0, 3, 1, 2).contiguous())
        return self.act_layer(self.norm_layer(x)).permute(0, 2, 3, 1).contiguous()
