# SPDX-License-Identifier: Apache-2.0
"""Other attention inside any plain ViT of timm, prefix tokens included.

The papers have no class token, so the rule for prefix tokens (class, distillation, registers) is
ours. Neighborhood: every patch sees its neighbours and all prefix tokens, a prefix token sees
everything. HiLo: the prefix tokens are keys of the low-frequency branch beside the pooled windows,
and are one window of their own in the high-frequency branch. Agent: all agents see a prefix token,
and it sees all agents, under a learned bias each, as the paper has it for one class token. ContMix:
the softmax of a patch's large kernel goes over the prefix tokens too, and they see everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import register_notrace_module
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from visprune import ops
from visprune.backbones.vit.agent import AgentAttention, GridAgentAttention
from visprune.backbones.vit.refusals import refuse_mask, refuse_pruned, refuse_scripting
from visprune.backbones.vit.with_attention_contmix import GridContMix
from visprune.backbones.vit.with_attention_grid import Grid, attend
from visprune.backbones.vit.with_attention_hilo import GridHiLo
from visprune.core.numeric import plain
from visprune.core.registry import did_you_mean
from visprune.errors import ConfigError, UnsupportedModel

KINDS = ("agent", "contmix", "hilo", "neighborhood")
_ATTENTIONS = (Attention, AttentionRope, EvaAttention)


def with_attention(
    vit: nn.Module,
    kind: str,
    blocks: Iterable[int] | None = None,
    copy_weights: bool = True,
    **options: Any,
) -> nn.Module:
    """Replace the attention of a timm ViT by another kind, in place.

    ``"neighborhood"`` keeps the model's projections, norms and rotary embedding and their names:
    only which keys a patch sees changes, so every checkpoint still loads, and a window as large as
    the grid gives the same output. ``"hilo"`` has projections of its own (``HiLo``'s names); they
    start from the model's: queries, keys and values as they are, the output projection without the
    part that mixes the two branches; norms of queries, keys and outputs are kept. With
    ``window_size=1`` the output is the same. ``"agent"`` keeps the model's projections and norms
    too and adds the agents' biases and a convolution that starts at zero; ``"contmix"`` keeps them
    and adds what turns scores into kernels. What these two compute is not the model's attention for
    any setting, so they have to be trained.

    :func:`visprune.save_pretrained` notes what was replaced, and ``load_pretrained`` replaces it
    again; timm alone loads such a folder as the plain model, or not at all.

    Limits: HiLo, agents and ContMix take over timm's ``Attention`` only, so no model with a rotary
    embedding (EVA, DINOv3) and no gates. For all kinds the attention must be a module of the block:
    blocks that compute it themselves, in one product with the MLP (``ParallelScalingBlock``), are
    refused, and so is ``DiffAttention``. Dropout of attention weights is left out (agents keep it).

    Args:
        vit: a model with ``blocks``, ``patch_embed`` and ``num_prefix_tokens``
            (``VisionTransformer``, ``Eva`` and what derives from them).
        kind: ``"agent"``, ``"contmix"``, ``"hilo"`` or ``"neighborhood"``.
        blocks: numbers of the blocks, counted from 0; all if None. Call again for others, e.g.
            with another dilation.
        copy_weights: start HiLo from the model's weights.
        options: ``window_size=2``, ``alpha=0.5`` (HiLo); ``kernel_size=7``, ``dilation=1``,
            ``stride=1``, ``is_causal=False``, ``rel_pos_bias=False`` (neighborhood),
            ``agent_num=49`` (agent); ``kernel_size=7``, ``small_kernel_size=5`` (contmix).

    Returns:
        ``vit`` itself.

    Raises:
        ConfigError: an unknown kind, block or option, or a value that is not allowed.
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
    refuse_pruned(model)
    chosen = _chosen(blocks, len(model.blocks))
    made = {}  # all before the first is put in place: a refusal leaves the model as it was
    grid, size = _grid(model), _fixed_size(model.patch_embed)
    window = tuple(getattr(model.patch_embed, "grid_size", None) or ())
    for index in chosen:
        for parent, name, attn in _attentions(model.blocks[index], index):
            new = _replace(attn, kind, (grid, window), copy_weights, options)
            made[parent, name] = new
            if isinstance(new, GridNeighborhoodAttention) and size is not None:
                new.check_grid(*size)
    for (parent, name), new in made.items():
        setattr(parent, name, new)
    if not any(isinstance(h, Grid) for h in model.patch_embed._forward_hooks.values()):
        model.patch_embed.register_forward_hook(grid)
    return vit


def _chosen(blocks: Any, count: int) -> list[int]:
    """The numbers of the blocks to change, of ``count``."""
    if blocks is None:
        return list(range(count))
    chosen = [plain(i) for i in blocks] if isinstance(blocks, Iterable) else None
    if chosen is None or any(not isinstance(i, int) for i in chosen):
        raise ConfigError(f"blocks must be numbers of blocks, such as [0, 1]; got {blocks!r}.")
    if any(not 0 <= i < count for i in chosen):
        raise ConfigError(f"blocks must be in 0..{count - 1}; got {chosen}.")
    return chosen


def _grid(model: Any) -> Grid:
    """The model's grid: one for all calls of ``with_attention`` on it."""
    hooks = model.patch_embed._forward_hooks.values()
    return next((h for h in hooks if isinstance(h, Grid)), Grid(model.num_prefix_tokens))


def _fixed_size(embed: Any) -> tuple[int, int] | None:
    """The grid of all images, where the patch embedding takes one size only."""
    size = getattr(embed, "grid_size", None)
    return None if size is None or not getattr(embed, "strict_img_size", True) else tuple(size)


def _attentions(block: nn.Module, index: int) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, module) of the attentions of a block that can be replaced."""
    ours = (GridNeighborhoodAttention, GridHiLo, AgentAttention, GridContMix)
    kinds = (*_ATTENTIONS, *ours)
    found = [
        (parent, name, child)
        for parent in block.modules()
        if not isinstance(parent, kinds)
        for name, child in parent.named_children()
        if isinstance(child, kinds)
    ]
    again = any(isinstance(child, ours) for *_, child in found)
    if again or not found:
        why = "was replaced before" if again else "has no attention that can be replaced"
        known = ", ".join(kind.__name__ for kind in _ATTENTIONS)
        raise UnsupportedModel(
            f"Block {index} ({type(block).__name__}) {why}; supported are timm's {known}."
        )
    return found


def _replace(
    attn: Any,
    kind: str,
    where: tuple[Grid, tuple[int, ...]],
    copy_weights: bool,
    options: dict[str, Any],
) -> nn.Module:
    known = {
        "agent": {"agent_num"},
        "contmix": {"kernel_size", "small_kernel_size"},
        "hilo": {"window_size", "alpha"},
        "neighborhood": {"kernel_size", "dilation", "stride", "is_causal", "rel_pos_bias"},
    }[kind]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{kind} attention has no option {name!r}.{did_you_mean(name, known)} "
                f"Known: {', '.join(sorted(known))}."
            )
    grid, window = where
    if kind == "neighborhood":
        return GridNeighborhoodAttention(attn, grid, **options)
    if kind == "contmix":
        return GridContMix.like(attn, grid, **options)
    if kind == "agent":
        return GridAgentAttention.like(attn, grid, window, **options)
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

    __prepare_scriptable__ = refuse_scripting

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
        self.kernel_size: tuple[int, int] = _pair("kernel_size", kernel_size, int)
        self.dilation: tuple[int, int] = _pair("dilation", dilation, int)
        self.stride: tuple[int, int] = _pair("stride", stride, int)
        self.is_causal: tuple[bool, bool] = _pair("is_causal", is_causal, bool)
        wide = any(s > k for s, k in zip(self.stride, self.kernel_size, strict=True))
        if min(self.kernel_size) < 2 or min(self.dilation) < 1 or min(self.stride) < 1 or wide:
            raise ConfigError(
                "Neighborhood attention: kernel_size must be at least 2, dilation at least 1 and "
                f"stride in 1..kernel_size; got {self.kernel_size}, {self.dilation} and "
                f"{self.stride}."
            )
        self.rpb = None
        if rel_pos_bias:
            like = attn.proj.weight
            sides = [2 * k - 1 for k in self.kernel_size]
            self.rpb = nn.Parameter(like.new_zeros(self.num_heads, *sides))

    def arguments(self) -> dict[str, Any]:
        """What :func:`with_attention` made this of, apart from the model."""
        names = ("kernel_size", "dilation", "stride", "is_causal")
        options = {name: list(getattr(self, name)) for name in names}
        return {"kind": "neighborhood", **options, "rel_pos_bias": self.rpb is not None}

    def check_grid(self, height: int, width: int) -> None:
        """Raise ``ConfigError`` where the dilation leaves no two patches for a window."""
        if any(2 * d > length for d, length in zip(self.dilation, (height, width), strict=True)):
            raise ConfigError(
                f"Neighborhood attention: a window holds at least 2 patches, so dilation may be "
                f"at most half the grid of {height} x {width} patches; got dilation "
                f"{self.dilation} with kernel_size {self.kernel_size}."
            )

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[B, N, C] -> the same."""
        refuse_mask(attn_mask, is_causal)
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
            q, k = self._rotate(q, rope), self._rotate(k, rope)
        return q.type_as(v), k.type_as(v), v

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        first = self.grid.num_prefix
        patches = apply_rot_embed_cat(x[:, first:].transpose(1, 2), rope, half=self.rotate_half)
        return torch.cat((x[:, :first], patches.transpose(1, 2)), 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        self.check_grid(height, width)
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
        return torch.cat((attend(q[:, :first], k, v, self.scale), out), 1)

    def extra_repr(self) -> str:
        """Window, for ``print(model)``."""
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"


def _pair(name: str, value: Any, kind: type) -> Any:
    """One value per axis, of one or of (height, width)."""
    pair = plain(tuple(value) if isinstance(value, Sequence) else (value, value))
    if len(pair) != 2 or not all(isinstance(x, kind) for x in pair):
        raise ConfigError(f"Neighborhood attention: {name} must be one {kind.__name__} or two, "
                          f"(height, width); got {value!r}.")  # fmt: skip
    return pair
