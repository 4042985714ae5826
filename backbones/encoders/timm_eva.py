# SPDX-License-Identifier: Apache-2.0
"""timm's ``Eva``: EVA-02, DINOv3, Perception Encoder and others with rotary embeddings."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from visprune.backbones.encoders.base import Hooks, Layer, ShownQK, places
from visprune.backbones.encoders.timm_hooks import watch_norms
from visprune.backbones.encoders.timm_vit import TimmViT


class TimmEva(TimmViT):
    """Adapter of ``timm.models.eva.Eva``.

    A token keeps the rotary place of its patch, and a merged one that of the patch it stands for.
    Queries and keys are shown with their rotation, as the attention uses them.
    """

    family = "timm.Eva"
    attentions = (EvaAttention, AttentionRope)
    rotary = True

    def _layer(self, number: int, block: Any) -> Layer:
        entry = {EvaBlock: "norm1", EvaBlockPostNorm: "attn"}.get(type(block))
        if entry is None or type(block.attn) not in self.attentions:
            raise self._unknown(number, block, getattr(block, "attn", None))
        return self._plain(block, entry)

    def _pools_prefix(self) -> bool:
        return self.model.attn_pool is not None  # as its ``pool`` has it

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The bias as in the base, and the rotary embeddings of the tokens that are left."""
        args, kwargs = super().inputs(args, kwargs, bias, at)
        if at is None or kwargs.get("rope") is None:
            return args, kwargs
        return args, {**kwargs, "rope": places(kwargs["rope"], at)}

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """The norms come before the rotation: it is applied to what they show."""
        attention: Any = self.layers[number].attention
        hooks = _Turned(attention, record)
        handle = attention.register_forward_pre_hook(hooks.before, with_kwargs=True)
        return [handle, *watch_norms(attention, hooks.turned)]


class _Turned(Hooks):
    """The hooks of :meth:`TimmEva.watch` on one attention module."""

    def __init__(self, attention: Any, record: ShownQK) -> None:
        super().__init__()
        self.attention, self.record = attention, record

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rope = kwargs.get("rope")
        self.call.held = [] if rope is None else [rope]

    def turned(self, q: Tensor, k: Tensor, scale: float) -> None:
        if self.call.held:
            table = self.call.held.pop()
            q, k = (_rotated(part, table, self.attention) for part in (q, k))
        self.record(q, k, scale)


def _rotated(x: Tensor, table: Tensor, attention: Any) -> Tensor:
    """``x`` ``[B, H, T, d]`` with the patches turned, as the attention module does it."""
    first = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    turned = apply_rot_embed_cat(x[:, :, first:], table, half=half)
    return torch.cat([x[:, :, :first], turned], dim=2).type_as(x)
