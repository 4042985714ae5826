# SPDX-License-Identifier: Apache-2.0
"""Context-mixing kernels (ContMix, arXiv 2502.20087) in the place of timm's ``Attention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from visprune.backbones.vit.contmix import CONTEXT, KernelBias
from visprune.backbones.vit.overlock_parts import resized
from visprune.backbones.vit.refusals import refuse_mask
from visprune.backbones.vit.with_attention_grid import Grid, attend
from visprune.errors import ConfigError, UnsupportedModel


@register_notrace_module
class GridContMix(KernelBias):
    """The projections of an attention of timm under context mixing, on tokens [B, N, C].

    A patch's query meets 7 x 7 averages of the patches' keys, and what it finds becomes two kernels
    of its own, one set per head: the small one for the first half of the value channels, the large
    one for the second. Its softmax goes over the prefix tokens too, with plain scores; a prefix
    token sees everything, as in the model. A grid smaller than the large kernel is enlarged, as in
    ContMix. See ``grid_attention`` for the rules of the other kinds.
    """

    grid: Grid
    num_heads: int
    scale: float

    @classmethod
    def like(
        cls, attn: Any, grid: Grid, kernel_size: int = 7, small_kernel_size: int = 5
    ) -> GridContMix:
        """Kernels for the projections and norms of timm's ``attn``."""
        gated = getattr(attn, "gate", None) is not None
        if not isinstance(attn, Attention) or gated:
            raise UnsupportedModel(
                f"ContMix averages keys without rotary positions: of timm it takes Attention "
                f"without gates, not {type(attn).__name__}{' with a gate' if gated else ''}. "
                "Neighborhood attention can."
            )
        sides = (small_kernel_size, kernel_size)
        if any(not isinstance(side, int) for side in sides) or not 2 <= sides[0] <= sides[1]:
            raise ConfigError(
                f"ContMix: small_kernel_size must be 2 to kernel_size, both whole numbers; got "
                f"{small_kernel_size!r} and {kernel_size!r}."
            )
        channels = attn.qkv.weight.shape[0] // 3
        if channels % (2 * attn.num_heads):
            raise ConfigError(f"ContMix: each head has two equal halves of values; got heads of "
                              f"{channels // attn.num_heads} channels.")  # fmt: skip
        new = cls()
        new.num_heads, new.scale, new.grid = attn.num_heads, attn.scale, grid
        for name in ("qkv", "q_norm", "k_norm", "norm", "proj", "proj_drop"):
            setattr(new, name, getattr(attn, name))
        dd = {"device": attn.qkv.weight.device, "dtype": attn.qkv.weight.dtype}
        new._add_kernels(attn.num_heads, kernel_size, small_kernel_size, dd)
        new.init_own_weights()
        return new.train(attn.training)

    def init_own_weights(self) -> None:
        """Truncated normal of 0.02: the kernels start close to averages."""
        for parameter in (self.weight_proj.weight, self.rpb1, self.rpb2):
            trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.weight_proj.bias)

    def arguments(self) -> dict[str, Any]:
        """What :func:`with_attention` made this of, apart from the model."""
        return {"kind": "contmix", "kernel_size": self.large, "small_kernel_size": self.small}

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] -> the same."""
        refuse_mask(attn_mask, is_causal)
        modules: Any = self
        size, first = self.grid.check(x), self.grid.num_prefix
        q, k, v = modules.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = modules.q_norm(q).type_as(v), modules.k_norm(k).type_as(v)
        out = self._patches(q, k, v, size)
        if first:
            seen = attend(q[:, :first], k, v, self.scale).flatten(2)
            out = torch.cat((seen, out), 1)
        return modules.proj_drop(modules.proj(modules.norm(out)))

    def _patches(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, N, heads, d] -> [B, H W, C], of the patches."""
        first = self.grid.num_prefix
        maps = [t[:, first:].flatten(2).unflatten(1, size).permute(0, 3, 1, 2) for t in (q, k, v)]
        larger = self.enlarged(*size)
        if larger is not None:
            maps = [resized(t, larger) for t in maps]
        keys = F.adaptive_avg_pool2d(maps[1], CONTEXT).flatten(2).transpose(1, 2)
        queries = maps[0].permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1)) * self.scale
        logits = self.kernels(queries, keys.unflatten(-1, (self.num_heads, -1)))
        seen = (queries, k[:, :first], v[:, :first].flatten(2)) if first else None
        out = self.mixed(logits, maps[2].permute(0, 2, 3, 1), seen)
        if larger is not None:
            out = F.adaptive_avg_pool2d(out.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
        return out.flatten(1, 2)

    def extra_repr(self) -> str:
        """Kernels, for ``print(model)``."""
        return f"kernel_size={self.large}, small_kernel_size={self.small}"
