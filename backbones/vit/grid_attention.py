# SPDX-License-Identifier: Apache-2.0
"""HiLo and neighborhood attention inside any plain ViT of timm, prefix tokens included.

The papers have no class token, so the rule for prefix tokens (class, distillation, registers) is
ours. Neighborhood: every patch sees its neighbours and all prefix tokens, a prefix token sees
everything. HiLo: the prefix tokens are keys of the low-frequency branch beside the pooled windows,
and are one window of their own in the high-frequency branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat, to_2tuple
from timm.models import register_notrace_module
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.vit.hilo import HiLo
from visprune.errors import ConfigError, UnsupportedModel
from visprune.registry import did_you_mean

KINDS = ("hilo", "neighborhood")
_ATTENTIONS = (Attention, AttentionRope, EvaAttention)


class Grid:
    """The grid of patches of the call that is running; a forward hook on the patch embedding."""

    def __init__(self, num_prefix: int) -> None:
        self.num_prefix = num_prefix
        self.size = (0, 0)

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Read the grid of the images that the embedding was given."""
        height, width = args[0].shape[-2:]
        self.size = tuple(module.dynamic_feat_size((height, width)))

    def check(self, x: Tensor) -> tuple[int, int]:
        """(height, width) in patches; raises ``ConfigError`` where ``x`` [B, N, C] is no grid."""
        height, width = self.size
        if x.shape[1] != self.num_prefix + height * width:
            raise ConfigError(
                f"Attention on a grid needs all tokens: {self.num_prefix} + {height} x {width}; "
                f"got {x.shape[1]}. Token reduction and patch dropout cannot be combined with it."
            )
        return height, width


def with_attention(
    vit: nn.Module,
    kind: str,
    blocks: Iterable[int] | None = None,
    copy_weights: bool = True,
    **options: Any,
) -> nn.Module:
    """Replace the attention of a timm ViT by HiLo or neighborhood attention, in place.

    ``"neighborhood"`` keeps the model's projections, norms and rotary embedding and their names:
    only which keys a patch sees changes, so every checkpoint still loads, and a window as large as
    the grid gives the same output. ``"hilo"`` has projections of its own (``HiLo``'s names); they
    start from the model's: queries, keys and values as they are, the output projection without the
    part that mixes the two branches. With ``window_size=1`` the output is the same.

    Args:
        vit: a model with ``blocks``, ``patch_embed`` and ``num_prefix_tokens``
            (``VisionTransformer``, ``Eva`` and what derives from them).
        kind: ``"hilo"`` or ``"neighborhood"``.
        blocks: numbers of the blocks, counted from 0; all if None. Call again for others, e.g.
            with another dilation.
        copy_weights: start HiLo from the model's weights.
        options: ``window_size=2``, ``alpha=0.5`` (HiLo); ``kernel_size=7``, ``dilation=1``,
            ``stride=1``, ``is_causal=False``, ``rel_pos_bias=False`` (neighborhood).

    Returns:
        ``vit`` itself.

    Raises:
        ConfigError: an unknown kind, block or option.
        UnsupportedModel: a model, or an attention of it, that cannot be replaced.
    """
    if kind not in KINDS:
        raise ConfigError(f"Unknown attention {kind!r}.{did_you_mean(kind, KINDS)} "
                          f"Known: {', '.join(KINDS)}.")  # fmt: skip
    model: Any = vit
    has_grid = hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size")
    if not (has_grid and hasattr(model, "blocks") and hasattr(model, "num_prefix_tokens")):
        raise UnsupportedModel(
            f"with_attention needs a ViT with blocks, num_prefix_tokens and a patch_embed that "
            f"knows its grid; {type(vit).__name__} is none."
        )
    count = len(model.blocks)
    chosen = list(range(count)) if blocks is None else list(blocks)
    if any(not 0 <= i < count for i in chosen):
        raise ConfigError(f"blocks must be in 0..{count - 1}; got {chosen}.")
    made = {}  # all before the first is put in place: a refusal leaves the model as it was
    grid = _grid(model)
    for index in chosen:
        for parent, name, attn in _attentions(model.blocks[index], index):
            made[parent, name] = _replace(attn, kind, grid, copy_weights, options)
    for (parent, name), new in made.items():
        setattr(parent, name, new)
    if not any(isinstance(h, Grid) for h in model.patch_embed._forward_hooks.values()):
        model.patch_embed.register_forward_hook(grid)
    return vit


def _grid(model: Any) -> Grid:
    """The model's grid: one for all calls of ``with_attention`` on it."""
    hooks = model.patch_embed._forward_hooks.values()
    return next((h for h in hooks if isinstance(h, Grid)), Grid(model.num_prefix_tokens))


def _attentions(block: nn.Module, index: int) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, module) of the attentions of a block that can be replaced."""
    kinds = (*_ATTENTIONS, GridNeighborhoodAttention, GridHiLo)
    found = [
        (parent, name, child)
        for parent in block.modules()
        if not isinstance(parent, kinds)
        for name, child in parent.named_children()
        if isinstance(child, kinds)
    ]
    again = any(isinstance(child, GridNeighborhoodAttention | GridHiLo) for *_, child in found)
    if again or not found:
        why = "was replaced before" if again else "has no attention that can be replaced"
        known = ", ".join(kind.__name__ for kind in _ATTENTIONS)
        raise UnsupportedModel(
            f"Block {index} ({type(block).__name__}) {why}; supported are timm's {known}."
        )
    return found


def _replace(
    attn: Any, kind: str, grid: Grid, copy_weights: bool, options: dict[str, Any]
) -> nn.Module:
    known = {
        "hilo": {"window_size", "alpha"},
        "neighborhood": {"kernel_size", "dilation", "stride", "is_causal", "rel_pos_bias"},
    }[kind]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{kind} attention has no option {name!r}.{did_you_mean(name, known)} "
                f"Known: {', '.join(sorted(known))}."
            )
    if kind == "neighborhood":
        return GridNeighborhoodAttention(attn, grid, **options)
    return GridHiLo.like(attn, grid, copy_weights, **options)


@register_notrace_module
class GridNeighborhoodAttention(nn.Module):
    """The projections of an attention of timm, with neighborhoods instead of all keys.

    A window larger than the grid is the grid.

    Args:
        attn: timm's attention; its parts move here under their names.
        grid: shared by the blocks.
        kernel_size: window in patches, one number or (height, width).
        dilation: step between the keys of a window.
        stride: patches that share one window.
        is_causal: per axis.
        rel_pos_bias: a learned bias for every offset, ``rpb``, zero at first.
    """

    def __init__(
        self,
        attn: Any,
        grid: Grid,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
    ) -> None:
        super().__init__()
        for name, child in attn.named_children():
            self.add_module(name, child)
        for name, parameter in attn.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in attn.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in attn.state_dict())
        if getattr(attn, "num_kv_groups", 1) > 1:
            raise UnsupportedModel("Neighborhood attention needs as many key heads as query heads.")
        self.num_heads = attn.num_heads
        self.scale = attn.scale
        self.rotate_half = getattr(attn, "rotate_half", False)
        self.grid = grid
        self.kernel_size: tuple[int, int] = to_2tuple(kernel_size)
        self.dilation: tuple[int, int] = to_2tuple(dilation)
        self.stride: tuple[int, int] = to_2tuple(stride)
        self.is_causal: tuple[bool, bool] = to_2tuple(is_causal)
        if min(self.kernel_size) < 2 or min(self.dilation) < 1 or min(self.stride) < 1:
            raise ConfigError(
                "Neighborhood attention: kernel_size must be at least 2, dilation and stride at "
                f"least 1; got {self.kernel_size}, {self.dilation} and {self.stride}."
            )
        self.rpb = None
        if rel_pos_bias:
            like = attn.proj.weight
            sides = [2 * k - 1 for k in self.kernel_size]
            self.rpb = nn.Parameter(like.new_zeros(self.num_heads, *sides))

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[B, N, C] -> the same."""
        _no_mask(attn_mask, is_causal)
        height, width = self.grid.check(x)
        q, k, v = self._project(x, rope)  # [B, N, heads, d]
        modules: Any = self
        out = modules.norm(self._attend(q, k, v, height, width).flatten(2))
        gate = getattr(self, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return modules.proj_drop(modules.proj(out))

    def _project(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        modules: Any = self
        if getattr(self, "qkv", None) is None:
            names = (modules.q_proj, modules.k_proj, modules.v_proj)
            q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)) for f in names)
        else:
            qkv = modules.qkv(x)
            if getattr(self, "q_bias", None) is not None:
                qkv = qkv + torch.cat((modules.q_bias, modules.k_bias, modules.v_bias))
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = modules.q_norm(q), modules.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        return q, k, v

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        first = self.grid.num_prefix
        patches = apply_rot_embed_cat(x[:, first:].transpose(1, 2), rope, half=self.rotate_half)
        return torch.cat((x[:, :first], patches.transpose(1, 2)), 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        first = self.grid.num_prefix
        maps: Any = [t[:, first:].unflatten(1, (height, width)) for t in (q, k, v)]
        pairs = list(zip(self.kernel_size, (height, width), self.dilation, strict=True))
        kernel = tuple(min(size, length // step) for size, length, step in pairs)
        rpb: Tensor | None = self.rpb
        if rpb is not None and kernel != self.kernel_size:
            a, b = (size - used for size, used in zip(self.kernel_size, kernel, strict=True))
            rpb = rpb[:, a : rpb.shape[1] - a, b : rpb.shape[2] - b]
        options: dict[str, Any] = {
            "kernel_size": kernel,
            "stride": tuple(min(s, used) for s, used in zip(self.stride, kernel, strict=True)),
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "rpb": rpb,
        }
        if first:
            options |= {"additional_keys": k[:, :first], "additional_values": v[:, :first]}
        out: Any = ops.neighborhood_attention(*maps, **options)
        out = out.flatten(1, 2)
        if not first:
            return out
        return torch.cat((_attend(q[:, :first], k, v, self.scale), out), 1)

    def extra_repr(self) -> str:
        """Window, for ``print(model)``."""
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"


@register_notrace_module
class GridHiLo(HiLo):
    """HiLo on tokens [B, N, C] with prefix tokens; see the module for the rule."""

    grid: Grid

    @classmethod
    def like(cls, attn: Any, grid: Grid, copy_weights: bool, **options: Any) -> GridHiLo:
        """HiLo of the size of timm's ``attn``, and with its weights if asked for."""
        norms = ("q_norm", "k_norm", "norm")
        extra = [n for n in norms if not isinstance(getattr(attn, n, None), nn.Identity | None)]
        if not isinstance(attn, Attention) or extra or getattr(attn, "gate", None) is not None:
            what = ", ".join(extra) or type(attn).__name__
            raise UnsupportedModel(
                f"HiLo has projections of its own and cannot take over {what} (norms of queries "
                f"and keys, gates, rotary embedding). Neighborhood attention can."
            )
        like = attn.qkv.weight
        new = cls(
            like.shape[1], attn.num_heads, qkv_bias=attn.qkv.bias is not None,
            proj_drop=attn.proj_drop.p, device=like.device, dtype=like.dtype, **options,
        )  # fmt: skip
        if grid.num_prefix and not new.l_heads:
            raise ConfigError("HiLo without low-frequency heads never shows the patches to the "
                              "prefix tokens; give a larger alpha.")  # fmt: skip
        new.grid = grid
        if copy_weights:
            new.copy_from(attn)
        return new.train(attn.training)

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
        _no_mask(attn_mask, is_causal)
        first, size = self.grid.num_prefix, self.grid.check(x)
        prefix, patches = x[:, :first], x[:, first:].unflatten(1, size)
        if not first:
            return super().forward(patches).flatten(1, 2)
        low_q = self._low_queries(x)  # [B, N, heads, d]
        pooled = ops.hilo_pool(patches, self.window_size).flatten(1, 2)
        low_k, low_v = self._split(self.l_kv(torch.cat((prefix, pooled), 1)), self.l_heads)
        high_q, high_k, high_v, pad_k, pad_v = self._high(patches)
        out = ops.hilo_attention(
            high_q, high_k, high_v,
            low_q[:, first:].unflatten(1, size), low_k[:, None], low_v[:, None],
            window_size=self.window_size, scale=self.scale, pad_k=pad_k, pad_v=pad_v,
        )  # fmt: skip
        seen = [_attend(low_q[:, :first], low_k, low_v, self.scale)]
        if self.h_heads:
            own_q, own_k, own_v = self._split(self.h_qkv(prefix), self.h_heads)
            seen.insert(0, _attend(own_q, own_k, own_v, self.scale))
        return self._join(torch.cat((torch.cat(seen, 2), out.flatten(1, 2)), 1))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain attention of [B, n, heads, d] to [B, m, heads, d]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ConfigError("Attention on a grid has its own pattern; attn_mask and is_causal "
                          "cannot be given.")  # fmt: skip
