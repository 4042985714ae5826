# SPDX-License-Identifier: Apache-2.0
"""The small modules of OverLoCK, on maps ``[B, C, H, W]`` in channels-last memory.

Names and shapes of parameters are those of LMMMEng/OverLoCK at 2c8ab3b, ``models/overlock.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune.backbones.vit.flat_stages import Pointwise
from visprune.errors import ConfigError

EPS = 1e-6

# Of each large kernel: (kernel, dilation) of the branches beside it.
BRANCHES = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


@register_notrace_module
class ResidualDWConv(nn.Conv2d):
    """A depthwise 3 x 3 convolution with a shortcut.

    In inference the shortcut is added in place: a fresh map of the first stage costs more in page
    faults than the convolution takes.
    """

    def __init__(self, dim: int, dd: dict[str, Any]) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        out = super().forward(x)
        return x + out if torch.is_grad_enabled() or out.dtype != x.dtype else out.add_(x)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def __init__(self, dim: int, dd: dict[str, Any]) -> None:
        super().__init__(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A factor and a summand per channel.

    The official code runs this as a depthwise 1 x 1 convolution, hence the shape of the weight; as
    one multiply-add it is an eighth of the time.
    """

    def __init__(self, dim: int, value: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), float(value), **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))

    def init_own_weights(self) -> None:
        """The factor starts at its constant, the summand at zero."""
        nn.init.constant_(self.weight, self.value)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, 0])


@register_notrace_module
class GRN(nn.Module):
    """Global response normalisation (arXiv 2301.00808).

    PyTorch's norm over the places of a channels-last map takes up to 20 times as long on a CPU as
    the sum of squares; that has no gradient where a channel is zero, so it is for inference.
    """

    def __init__(self, dim: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1, **dd))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1, **dd))

    def init_own_weights(self) -> None:
        """Both start at zero: the identity."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        if torch.is_grad_enabled() or x.dtype != torch.float32:
            size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        else:
            size = x.square().sum((2, 3), keepdim=True).sqrt()
        size = size / (size.mean(1, keepdim=True) + EPS)
        return torch.addcmul(self.beta, x, self.gamma * size + 1)


class SqueezeExcite(nn.Module):
    """Weigh each channel by what all channels are on average."""

    def __init__(self, dim: int, dd: dict[str, Any]) -> None:
        super().__init__()
        hidden = max(16, dim // 8)
        self.proj = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            Pointwise(dim, hidden, **dd),
            nn.GELU(),
            Pointwise(hidden, dim, **dd),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return x * self.proj(x)


class DilatedReparam(nn.Module):
    """A large depthwise kernel; in training form small dilated ones beside it, under batch norms.

    All of them together are one kernel with a bias: :meth:`reparameterize` (which timm's
    ``reparameterize_model`` calls) puts it in their place.

    Args:
        dim: channels.
        kernel_size: one of ``BRANCHES``.
        deploy: the merged form from the start.
        dd: device and dtype of the parameters.

    Raises:
        ConfigError: a kernel without branches.
    """

    def __init__(self, dim: int, kernel_size: int, deploy: bool, dd: dict[str, Any]) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ConfigError(
                f"OverLoCK: a large kernel is one of {', '.join(map(str, sorted(BRANCHES)))}; "
                f"got {kernel_size}."
            )
        self.dim, self.kernel_size, self.deploy = dim, kernel_size, deploy
        self.lk_origin = self._conv(kernel_size, 1, deploy, dd)
        if not deploy:
            self.origin_bn = nn.BatchNorm2d(dim, **dd)
            for kernel, step in BRANCHES[kernel_size]:
                self.add_module(f"dil_conv_k{kernel}_{step}", self._conv(kernel, step, False, dd))
                self.add_module(f"dil_bn_k{kernel}_{step}", nn.BatchNorm2d(dim, **dd))

    def _conv(self, kernel: int, step: int, bias: bool, dd: dict[str, Any]) -> nn.Conv2d:
        return nn.Conv2d(
            self.dim, self.dim, kernel, padding=step * (kernel - 1) // 2, dilation=step,
            groups=self.dim, bias=bias, **dd,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        if self.deploy:
            return self.lk_origin(x)
        out = self.origin_bn(self.lk_origin(x))
        for kernel, step in BRANCHES[self.kernel_size]:
            name = f"k{kernel}_{step}"
            out = out + getattr(self, f"dil_bn_{name}")(getattr(self, f"dil_conv_{name}")(x))
        return out

    def reparameterize(self) -> None:
        """Merge the branches, in place; a merged kernel stays as it is."""
        if self.deploy:
            return
        like = self.lk_origin.weight
        weight, bias = merged_kernel(self.state_dict(), self.kernel_size, self.origin_bn.eps)
        dd = {"device": like.device, "dtype": like.dtype}
        merged = self._conv(self.kernel_size, 1, True, dd).train(self.training)
        with torch.no_grad():
            merged.weight.copy_(weight)
            assert merged.bias is not None
            merged.bias.copy_(bias)
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        self.lk_origin, self.deploy = merged, True

    def extra_repr(self) -> str:
        """Form, for ``print(model)``."""
        return f"deploy={self.deploy}"


def merged_kernel(
    state: Mapping[str, Tensor], kernel_size: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Weight [C, 1, K, K] and bias [C] of the one kernel that the branches are together.

    Args:
        state: state dict of :class:`DilatedReparam` in training form.
        kernel_size: K.
        eps: of the batch norms.
    """
    weight, bias = _under_norm(state, "lk_origin", "origin_bn", eps)
    weight = weight.clone()
    for kernel, step in BRANCHES[kernel_size]:
        name = f"k{kernel}_{step}"
        part, shift = _under_norm(state, f"dil_conv_{name}", f"dil_bn_{name}", eps)
        first = (kernel_size - step * (kernel - 1) - 1) // 2
        taps = slice(first, kernel_size - first, step)
        weight[:, :, taps, taps] += part
        bias = bias + shift
    like = state["lk_origin.weight"].dtype
    return weight.to(like), bias.to(like)


def _under_norm(
    state: Mapping[str, Tensor], conv: str, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64 of a convolution without bias and the batch norm after it."""
    names = ("weight", "bias", "running_mean", "running_var")
    scale, shift, mean, variance = (state[f"{norm}.{name}"].double() for name in names)
    scale = scale / (variance + eps).sqrt()
    return state[f"{conv}.weight"].double() * scale[:, None, None, None], shift - mean * scale


def mlp(dim: int, hidden: int, dd: dict[str, Any]) -> nn.Sequential:
    """1 x 1, GELU, residual 3 x 3, response norm, 1 x 1."""
    return nn.Sequential(
        Pointwise(dim, hidden, **dd),
        nn.GELU(),
        ResidualDWConv(hidden, dd),
        GRN(hidden, dd),
        Pointwise(hidden, dim, **dd),
    )


def conv_norm(
    dim: int, out: int, dd: dict[str, Any], kernel: int = 1, stride: int = 1
) -> list[nn.Module]:
    """A convolution without bias and its batch norm."""
    norm = nn.BatchNorm2d(out, **dd)
    if kernel == stride == 1:
        return [Pointwise(dim, out, bias=False, **dd), norm]
    return [nn.Conv2d(dim, out, kernel, stride, kernel // 2, bias=False, **dd), norm]


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, as the official code resizes everywhere."""
    return F.interpolate(x, (size[0], size[1]), mode="bilinear", align_corners=False)
