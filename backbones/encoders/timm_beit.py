# SPDX-License-Identifier: Apache-2.0
"""timm's ``Beit``: BEiT and BEiTv2, whose attention adds a bias per pair of places."""

from __future__ import annotations

import functools
from typing import Any

from timm.models.beit import Attention, Block
from torch import Tensor, nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import Instead, Layer, Reduction, ShownQK, no_mask
from visprune.backbones.encoders.macs import embedding_macs, head_macs
from visprune.backbones.encoders.pair_bias import left, record_class_row
from visprune.backbones.encoders.timm_vit import TimmViT


class TimmBeit(TimmViT):
    """Adapter of ``timm.models.beit.Beit``.

    A token keeps the biases of its patch, and EViT's fused token those of the patch that it stands
    for. Methods that merge tokens everywhere are refused: a token of several places has no bias.
    """

    family = "timm.Beit"
    rotary = True  # the places of its tokens are followed
    shared = "shared_rel_pos_bias"  # what a block calls the bias that all of them share

    def __init__(self, model: Any) -> None:
        self.model, self.embed = model, model.patch_embed
        self.prefix, self.has_cls = int(model.num_prefix_tokens), True
        self.width = int(model.embed_dim)
        self.layers = [self._layer(number, block) for number, block in enumerate(model.blocks)]

    @property
    def lacking(self) -> dict[str, str]:
        """No merging, and no attention of all queries."""
        bias = f"{type(self.model).__name__}'s attention adds a bias per pair of places"
        return {
            **super().lacking,
            "merging": f"{bias}, which a token merged of several has not",
            "every_query": f"{bias}, which is read for the class token alone",
        }

    def _layer(self, number: int, block: Any) -> Layer:
        if type(block) is not Block or type(block.attn) is not Attention:
            raise self._unknown(number, block, getattr(block, "attn", None))
        before, width = matrix_weights(block.attn), int(block.attn.qkv.out_features) // 3
        return Layer(
            block=block,
            attention=block.attn,
            entry=block.norm1,
            branch=block.drop_path1,
            attention_weights=before,
            mlp_weights=matrix_weights(block) - before,
            attention_width=width,
            head_width=width // int(block.attn.num_heads),
        )

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding and head."""
        return embedding_macs(self.embed, grid) + head_macs([self.model.head], None, last)

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The bias that the layers share, for the tokens that are left."""
        no_mask(kwargs.get("attn_mask"), None)
        shared = args[1] if len(args) > 1 else kwargs.get(self.shared)
        if at is None or shared is None:
            return args, kwargs
        return args[:1], {**kwargs, self.shared: left(shared, at, self.prefix)}

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Each attention's own bias, and features on the whole grid."""
        model: Any = self.model
        dense = functools.partial(self._dense, model.forward_intermediates, reduction)
        return [Instead(model, "forward_intermediates", dense), *self.own_biases(reduction)]

    def own_biases(self, reduction: Reduction) -> list[Any]:
        """Let each attention's own bias be that of the tokens that are left."""
        handles = []
        for layer in self.layers:
            attention: Any = layer.attention
            if attention.relative_position_bias_table is not None:
                own = functools.partial(self._own, attention, reduction)
                handles.append(Instead(attention, "_get_rel_pos_bias", own))
        return handles

    def _own(self, attention: Any, reduction: Reduction) -> Tensor:
        table, at = type(attention)._get_rel_pos_bias(attention), reduction.places()
        return table if at is None else left(table, at, self.prefix)

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """Project the class token's query and the keys of what the attention is given."""
        attention: Any = self.layers[number].attention
        hook = functools.partial(_project, record, attention)
        return [attention.register_forward_pre_hook(hook, with_kwargs=True)]

    def signal_macs(self, tokens: int, *, every: bool = True) -> int:
        """The keys of all tokens and the query of one."""
        return (tokens + 1) * self.width * self.layers[0].attention_width


def _project(
    record: ShownQK, attention: Any, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    """Show the class token's query and the keys with what is added to their scores."""
    x = args[0]
    q_weight, k_weight, _ = attention.qkv.weight.chunk(3)
    biases = (attention.q_bias, attention.k_bias) if attention.q_bias is not None else (None, None)
    split = (attention.num_heads, -1)
    rows = ((x[:, :1], q_weight, biases[0]), (x, k_weight, biases[1]))
    query, key = (nn.functional.linear(*part).unflatten(-1, split).transpose(1, 2) for part in rows)
    added = kwargs.get("shared_rel_pos_bias")
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
        added = own if added is None else own + added
    record_class_row(record, query, key, attention.scale, added)
