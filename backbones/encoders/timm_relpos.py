# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformerRelPos``: a table or a small network gives each pair its bias."""

from __future__ import annotations

import functools
from typing import Any

from timm.layers import RelPosMlp
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import Hooks, Instead, Layer, Reduction, ShownQK
from visprune.backbones.encoders.macs import embedding_macs, head_macs
from visprune.backbones.encoders.pair_bias import left, record_class_row
from visprune.backbones.encoders.timm_beit import TimmBeit
from visprune.backbones.encoders.timm_hooks import watch_norms
from visprune.core.threads import PerThread

_ENTRIES = {RelPosBlock: "norm1", ResPostRelPosBlock: "attn"}


class TimmRelPos(TimmBeit):
    """Adapter of ``timm.models.vision_transformer_relpos.VisionTransformerRelPos``.

    A token keeps the biases of its patch. Methods that merge tokens everywhere are refused, and
    most of its configurations have no class token to choose by.
    """

    family = "timm.VisionTransformerRelPos"
    shared = "shared_rel_pos"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.has_cls = model.cls_token is not None
        self.asked = _Asked()

    def _layer(self, number: int, block: Any) -> Layer:
        entry, attention = _ENTRIES.get(type(block)), getattr(block, "attn", None)
        if entry is None or type(attention) is not RelPosAttention:
            raise self._unknown(number, block, attention)
        before = matrix_weights(attention.qkv) + matrix_weights(attention.proj)
        return Layer(
            block=block,
            attention=attention,
            entry=getattr(block, entry),
            branch=block.drop_path1,
            attention_weights=before,
            mlp_weights=matrix_weights(block.mlp),
            attention_width=int(attention.num_heads * attention.head_dim),
            head_width=int(attention.head_dim),
        )

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding and head, and the networks that make biases of distances in the grid."""
        total = embedding_macs(self.embed, grid) + head_macs([self.model.head], None, last)
        for module in self.model.modules():
            if isinstance(module, RelPosMlp):
                height, width = module.window_size
                total += (2 * height - 1) * (2 * width - 1) * matrix_weights(module.mlp)
        return total

    def by_layout(self, number: int) -> bool:
        """Also where the mean over tokens is taken before the norm."""
        return isinstance(self.model.norm, nn.Identity) or super().by_layout(number)

    def own_biases(self, reduction: Reduction) -> list[Any]:
        """Each attention asks its own module for the biases."""
        handles = []
        for layer in self.layers:
            rel_pos: Any = layer.attention.rel_pos
            if rel_pos is not None:
                own = functools.partial(self._ask, rel_pos, reduction)
                handles.append(Instead(rel_pos, "get_bias", own))
        return handles

    def _ask(self, rel_pos: Any, reduction: Reduction) -> Tensor:
        # Asked once: in training its network drops features at random.
        table, at = type(rel_pos).get_bias(rel_pos), reduction.places()
        table = table if at is None else left(table, at, self.prefix)
        if self.asked.watched:
            self.asked.bias = table
        return table

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """What is behind the norms of queries and keys, once the attention has its bias."""
        attention: Any = self.layers[number].attention
        return _Watched(attention, record, self.asked).install()

    def signal_macs(self, tokens: int, *, every: bool = True) -> int:
        """Nothing is projected once more."""
        return 0


class _Asked(PerThread):
    """The bias that an attention which is watched asked for."""

    def __init__(self) -> None:
        self.watched = False
        self.bias: Tensor | None = None


class _Watched(Hooks):
    """The hooks of :meth:`TimmRelPos.watch` on one attention module."""

    def __init__(self, attention: Any, record: ShownQK, asked: _Asked) -> None:
        super().__init__()
        self.attention, self.record, self.asked = attention, record, asked

    def install(self) -> list[Any]:
        """Put them on."""
        return [
            self.attention.register_forward_pre_hook(self._begin, with_kwargs=True),
            *watch_norms(self.attention, self._hold),
            self.attention.proj.register_forward_pre_hook(self._show),
        ]

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Until it asks for its own, the bias is what all layers share."""
        shared = args[1] if len(args) > 1 else kwargs.get("shared_rel_pos")
        self.asked.watched, self.asked.bias = True, shared

    def _hold(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.call.held = [query, key]

    def _show(self, module: nn.Module, args: Any) -> None:
        (query, key), self.call.held = self.call.held, []
        added, self.asked.watched, self.asked.bias = self.asked.bias, False, None
        record_class_row(self.record, query, key, self.attention.scale, added)
