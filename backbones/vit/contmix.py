# SPDX-License-Identifier: Apache-2.0
"""Context-mixing dynamic convolution, ContMix (arXiv 2502.20087).

Every pixel makes two kernels of its own, 5 x 5 and K x K, out of its affinity to 7 x 7 averages of
the whole map, and each sums half of the channels over the pixel's neighborhood: the windows and the
position bias of neighborhood attention (``visprune.ops.na_av``). Names of parameters are those of
LMMMEng/OverLoCK at 2c8ab3b, ``models/contmix.py`` and ``models/overlock.py``, which need natten
below 0.20.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.vit.flat_stages import Pointwise
from visprune.backbones.vit.overlock_parts import (
    ChannelNorm,
    DilatedReparam,
    LayerScale,
    ResidualDWConv,
    SqueezeExcite,
    conv_norm,
    mlp,
    resized,
)
from visprune.backbones.vit.refusals import refuse_scripting
from visprune.errors import ConfigError

CONTEXT = 7  # side of the averages of the whole map
SIZES_KEPT = 8


def offset_bias(rpb: Tensor, height: int, width: int) -> Tensor:
    """The bias of every pixel's neighbours, as ``visprune.ops.na_qk`` adds it.

    Args:
        rpb: [heads, 2 K - 1, 2 K - 1], a bias for every offset.
        height: of the map, at least K.
        width: of the map, at least K.

    Returns:
        [height, width, heads, K * K].
    """
    kernel = (rpb.shape[1] + 1) // 2
    found = rpb
    for axis, length in ((1, height), (2, width)):
        place = torch.arange(length, device=rpb.device)
        start = (place - kernel // 2).clamp(0, length - kernel)  # windows move, they are never cut
        neighbour = start[:, None] + torch.arange(kernel, device=rpb.device)
        offset = neighbour - place[:, None] + kernel - 1
        found = found.index_select(2 * axis - 1, offset.flatten()).unflatten(
            2 * axis - 1, (length, kernel)
        )
    return found.permute(1, 3, 0, 2, 4).flatten(3)


class Kept:
    """What :func:`offset_bias` gave for some sizes, for as long as its parameters are the same.

    The parameters are compared by value: an optimizer, a loaded file or a write to ``.data`` is
    seen. A copy or a pickle of the model starts empty.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], tuple[list[Tensor], Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Kept, ())

    def get(self, size: tuple[int, int], of: list[Tensor]) -> Tensor | None:
        """The kept tensor, if it was made of these parameters."""
        parameters, kept = self.found.get(size, ([], None))
        same = len(parameters) == len(of) and all(map(_same, parameters, of))
        return kept if same else None

    def put(self, size: tuple[int, int], of: list[Tensor], made: Tensor) -> None:
        """Keep a tensor; of many sizes only the last ones."""
        while len(self.found) >= SIZES_KEPT and size not in self.found:
            self.found.pop(next(iter(self.found)), None)
        self.found[size] = ([t.detach().clone() for t in of], made)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class KernelBias(nn.Module):
    """Base of what holds ``weight_proj``, ``rpb1`` and ``rpb2``: the bias of both kernels.

    Attributes:
        weight_proj: from affinities to the weights of both kernels, the small one first.
        rpb1: bias of the small kernel's offsets, [heads, 2 S - 1, 2 S - 1].
        rpb2: bias of the large kernel's offsets.
    """

    __prepare_scriptable__ = refuse_scripting

    weight_proj: Any
    rpb1: nn.Parameter
    rpb2: nn.Parameter

    def _add_kernels(self, groups: int, large: int, small: int, dd: dict[str, Any]) -> None:
        self.groups, self.large, self.small = groups, large, small
        count = small**2 + large**2
        self.weight_proj = nn.Conv2d(CONTEXT**2, count, 1, **dd)
        self.rpb1 = nn.Parameter(torch.zeros(groups, 2 * small - 1, 2 * small - 1, **dd))
        self.rpb2 = nn.Parameter(torch.zeros(groups, 2 * large - 1, 2 * large - 1, **dd))
        self.kept = Kept()

    def kernel_bias(self, height: int, width: int) -> Tensor:
        """Of the logits of both kernels: [height * width * groups, S * S + K * K].

        In inference on a CPU it is kept per size: making it takes a twentieth of the model's time.
        """
        of = [self.rpb1, self.rpb2, self.weight_proj.bias]
        keep = (
            of[0].is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        )  # comparing on a GPU would wait for it
        kept = self.kept.get((height, width), of) if keep else None
        if kept is not None:
            return kept
        both = torch.cat([offset_bias(rpb, height, width) for rpb in of[:2]], -1)
        made = (both + of[2]).flatten(0, 2)
        if keep:
            self.kept.put((height, width), of, made)
        return made

    def kernels(self, q: Tensor, k: Tensor) -> Tensor:
        """Logits of both kernels.

        Args:
            q: [B, H, W, groups, d], scaled.
            k: [B, 49, groups, d].

        Returns:
            [B, H, W, groups, S * S + K * K], the small kernel first.
        """
        b, height, width = q.shape[:3]
        affinity = q.flatten(1, 2).transpose(1, 2) @ k.permute(0, 2, 3, 1)
        affinity = affinity.transpose(1, 2).reshape(b, -1, CONTEXT**2)
        weight = self.weight_proj.weight.flatten(1).t().expand(b, -1, -1)
        bias = self.kernel_bias(height, width).expand(b, -1, -1)
        logits = torch.baddbmm(bias.type_as(affinity), affinity, weight.type_as(affinity))
        return logits.view(b, height, width, self.groups, -1)

    def mixed(
        self, logits: Tensor, v: Tensor, seen: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """Both kernels over their halves of the channels.

        Args:
            logits: as :meth:`kernels` gives them.
            v: [B, H, W, C].
            seen: queries [B, H, W, groups, d], scaled, keys [B, P, groups, d] and values [B, P, C]
                of tokens that stand in no place: the softmax of the large kernel goes over their
                scores too.

        Returns:
            [B, H, W, C].
        """
        count = self.large**2
        near, far = v.unflatten(-1, (2, self.groups, -1)).unbind(-3)
        small, large = logits.split([self.small**2, count], -1)
        near = ops.na_av(small.softmax(-1).type_as(v), near, self.small)
        if seen is not None:
            scores = torch.einsum("bhwgd,bpgd->bhwgp", seen[0], seen[1])
            large = torch.cat((large, scores), -1)
        weights = large.softmax(-1).type_as(v)
        far = ops.na_av(weights[..., :count], far, self.large)
        if seen is not None:
            values = seen[2].unflatten(-1, (2, self.groups, -1))[:, :, 1]
            far = far + torch.einsum("bhwgp,bpgd->bhwgd", weights[..., count:], values)
        return torch.cat((near, far), -2).flatten(-2)

    def enlarged(self, height: int, width: int) -> tuple[int, int] | None:
        """The size of a map on which the large kernel fits; None where it does already."""
        short = min(height, width)
        if short >= self.large:
            return None
        long = int(self.large / short * max(height, width))
        return (self.large, long) if height <= width else (long, self.large)


class ContextMixer(KernelBias):
    """What the two official blocks share. Maps are [B, C, H, W] in channels-last memory.

    Args:
        dim: channels that are mixed.
        wide: channels of the stream; those beyond ``dim`` are context.
        key_dim: channels that keys are made of.
        num_heads: half the number of groups.
        kernel_size: side of the large kernel, one of ``overlock_parts.BRANCHES``.
        small_kernel_size: side of the small kernel.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        layer_scale: start value of layer scale; without it if None.
        res_scale: scale the shortcut and not the branch.
        drop_path: stochastic depth.
        deploy: merged form of the dilated kernel.
        dd: device and dtype of the parameters.

    Raises:
        ConfigError: ``dim`` is not divisible, or a kernel is not possible.
    """

    def __init__(
        self,
        dim: int,
        wide: int,
        key_dim: int,
        num_heads: int,
        kernel_size: int,
        small_kernel_size: int,
        mlp_ratio: float,
        layer_scale: float | None,
        res_scale: bool,
        drop_path: float,
        deploy: bool,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        groups = 2 * num_heads
        if num_heads < 1 or dim % (2 * groups):
            raise ConfigError(
                f"ContMix: each of 2 * num_heads groups has two equal halves, so dim must be a "
                f"multiple of 4 * num_heads; got dim={dim}, num_heads={num_heads}."
            )
        if not 2 <= small_kernel_size <= kernel_size:
            raise ConfigError(
                f"ContMix: the small kernel must be 2 to kernel_size = {kernel_size}; "
                f"got {small_kernel_size}."
            )
        self.dim, self.res_scale = dim, res_scale
        self.scale = (dim // groups) ** -0.5  # of dim, though queries have half of it
        self.dwconv1 = ResidualDWConv(wide, dd)
        self.norm1 = ChannelNorm(wide, dd)
        self.weight_query = nn.Sequential(*conv_norm(dim, dim // 2, dd))
        pool = nn.AdaptiveAvgPool2d(CONTEXT)
        self.weight_key = nn.Sequential(pool, *conv_norm(key_dim, dim // 2, dd))
        self._add_kernels(groups, kernel_size, small_kernel_size, dd)
        self.gate = nn.Sequential(*conv_norm(dim, dim, dd), nn.SiLU())
        self.lepe = nn.Sequential(
            DilatedReparam(dim, kernel_size, deploy, dd), nn.BatchNorm2d(dim, **dd)
        )
        self.se_layer = SqueezeExcite(dim, dd)
        self.proj = nn.Sequential(nn.BatchNorm2d(dim, **dd), Pointwise(dim, wide, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.dwconv2 = ResidualDWConv(wide, dd)
        self.norm2 = ChannelNorm(wide, dd)
        self.mlp = mlp(wide, int(dim * mlp_ratio), dd)
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(wide, layer_scale, dd)
            for _ in range(2)
        )

    def mix(self, q_from: Tensor, k_from: Tensor, v: Tensor) -> Tensor:
        """Context mixing of ``v`` [B, dim, H, W], with what queries and keys are made of."""
        height, width = v.shape[2:]
        larger = self.enlarged(height, width)
        if larger is not None:
            q_from, k_from, v = (resized(t, larger) for t in (q_from, k_from, v))
        q, k = self.weight_query(q_from) * self.scale, self.weight_key(k_from)
        q, k, v = (t.permute(0, 2, 3, 1) for t in (q, k, v))
        q, k = (t.unflatten(-1, (self.groups, -1)) for t in (q, k))
        out = self.mixed(self.kernels(q, k.flatten(1, 2)), v).permute(0, 3, 1, 2)
        return out if larger is None else F.adaptive_avg_pool2d(out, (height, width))

    def residual(self, x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        """A branch and its shortcut, one of them scaled."""
        if self.res_scale:
            return scale(x) + self.drop_path(branch)
        return x + self.drop_path(scale(branch))

    def finished(self, identity: Tensor, mixed: Tensor, x: Tensor) -> Tensor:
        """What follows mixing: local part, channel weights, gate, shortcut, MLP."""
        out = self.se_layer(mixed + self.lepe(x)) * self.gate(x)
        x = self.residual(identity, self.proj(out), self.ls1)
        x = self.dwconv2(x)
        return self.residual(x, self.mlp(self.norm2(x)), self.ls2)


@register_notrace_module
class ContMixBlock(ContextMixer):
    """ContMix as a block for any backbone: a map [B, C, H, W] of any size to one of the same shape.

    Args:
        dim: channels, a multiple of ``4 * num_heads``.
        kernel_size: side of the large kernel: 5, 7, 9, 11, 13, 15 or 17.
        small_kernel_size: side of the small kernel.
        num_heads: half the number of groups of channels with kernels of their own.
        mlp_ratio: hidden over input channels of the MLP.
        layer_scale: start value of layer scale; without it if None.
        res_scale: layer scale on the shortcut and not on the branch.
        drop_path: stochastic depth.
        deploy: merged form of the dilated kernel.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: ``dim`` is not divisible, or a kernel is not possible.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        small_kernel_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        res_scale: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            dim, dim, dim, num_heads, kernel_size, small_kernel_size, mlp_ratio, layer_scale,
            res_scale, drop_path, deploy, dd,
        )  # fmt: skip
        self.weight_value = nn.Sequential(*conv_norm(dim, dim, dd))
        self.fusion_proj = nn.Sequential(*conv_norm(dim, dim, dd))
        self.init_own_weights()

    def init_own_weights(self) -> None:
        """Truncated normal of 0.02 for the biases of the offsets."""
        trunc_normal_(self.rpb1, std=0.02)
        trunc_normal_(self.rpb2, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ConfigError(f"ContMixBlock takes maps [B, {self.dim}, H, W]; got "
                              f"{list(x.shape)}.")  # fmt: skip
        identity = self.dwconv1(x.contiguous(memory_format=torch.channels_last))
        x = self.norm1(identity)
        mixed = self.fusion_proj(self.mix(x, x, self.weight_value(x)))
        return self.finished(identity, mixed, x)
