# SPDX-License-Identifier: Apache-2.0
"""timm's ``Cait``: heads that talk to each other, and a class token that comes in behind them."""

from __future__ import annotations

import functools
from typing import Any

from timm.models.cait import (
    Cait,
    ClassAttn,
    LayerScaleBlock,
    LayerScaleBlockClassAttn,
    TalkingHeadAttn,
)
from torch import Tensor, nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import Instead, Layer, Reduction, ShownQK, weighted_mean
from visprune.backbones.encoders.macs import embedding_macs, head_macs
from visprune.backbones.encoders.timm_vit import TimmViT
from visprune.errors import UnsupportedModel


class TimmCait(TimmViT):
    """Adapter of ``timm.models.cait.Cait``.

    Tokens leave in the blocks of patches. The blocks of the class token behind them attend to a
    patch as often as it stands for patches. Among the patches there is no class token to choose by,
    and no map of attention: one is mixed of the heads before and after the softmax.
    """

    family = "timm.Cait"

    def __init__(self, model: Any) -> None:
        self.model, self.embed = model, model.patch_embed
        self.prefix, self.has_cls = 0, False
        self.width = int(model.embed_dim)
        self.layers = [self._layer(number, block) for number, block in enumerate(model.blocks)]
        for block in model.blocks_token_only or ():
            if type(block) is not LayerScaleBlockClassAttn or type(block.attn) is not ClassAttn:
                raise UnsupportedModel(
                    f"The class token of this {type(model).__name__} comes in by a "
                    f"{type(block).__name__}, which is not timm's own, and may need the whole grid."
                )

    @property
    def lacking(self) -> dict[str, str]:
        """No class token among the patches, and no rows of attention."""
        mixed = f"the attention of {type(self.model).__name__} is mixed of all heads, and of none"
        return {**super().lacking, "every_query": mixed}

    def why_no_cls_rows(self) -> str | None:
        """It is not there."""
        return (
            f"the class token of {type(self.model).__name__} comes in behind the layers of patches"
        )

    def _layer(self, number: int, block: Any) -> Layer:
        attention = getattr(block, "attn", None)
        if type(block) is not LayerScaleBlock or type(attention) is not TalkingHeadAttn:
            raise self._unknown(number, block, attention)
        width, heads = int(attention.proj.in_features), int(attention.num_heads)
        return Layer(
            block=block,
            attention=attention,
            entry=block.norm1,
            branch=block.drop_path,
            attention_weights=matrix_weights(attention.qkv) + matrix_weights(attention.proj),
            mlp_weights=matrix_weights(block.mlp),
            attention_width=width,
            head_width=width // heads,
            pair_weights=matrix_weights(attention.proj_l) + matrix_weights(attention.proj_w),
        )

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding and head, and the blocks of the class token."""
        total = embedding_macs(self.embed, grid) + head_macs([self.model.head], None, last)
        for block in self.model.blocks_token_only or ():
            attention = block.attn
            keys = matrix_weights(attention.k) + matrix_weights(attention.v) + 2 * self.width
            once = (attention.q, attention.proj, block.mlp)
            total += (last + 1) * keys + sum(matrix_weights(module) for module in once)
        return total

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block takes its tokens alone; the bias goes to the attention itself."""
        return args, kwargs

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """What the projection gives, of each head before they are mixed."""
        attention: Any = self.layers[number].attention
        hook = functools.partial(_show, record, attention)
        return [attention.qkv.register_forward_hook(hook)]

    # What else is indexed by token --------------------------------------------------------------

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Sizes in every attention and in the mean, and features on the whole grid."""
        model: Any = self.model
        dense = functools.partial(self._dense, model.forward_intermediates, reduction)
        handles: list[Any] = [Instead(model, "forward_intermediates", dense)]
        for layer in self.layers:
            attention: Any = layer.attention
            scores = functools.partial(_add_bias, reduction)
            shares = functools.partial(_count_bias, reduction)
            handles.append(attention.proj_l.register_forward_hook(scores))
            handles.append(attention.proj_w.register_forward_hook(shares))
        for block in model.blocks_token_only or ():
            forward = functools.partial(_attend, block.attn, reduction)
            handles.append(Instead(block.attn, "forward", forward))
        head = functools.partial(_head, model, reduction)
        return [*handles, Instead(model, "forward_head", head)]


def _show(record: ShownQK, attention: Any, module: nn.Module, args: Any, output: Tensor) -> None:
    query, key, _ = output.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    record(query, key, attention.scale)


def _add_bias(reduction: Reduction, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Scores ``[B, Q, K, H]`` behind the mixing, with the logarithm of each key's size."""
    bias = reduction.key_bias()
    return None if bias is None else output + bias[:, None, :, None].to(output.dtype)


def _count_bias(reduction: Reduction, module: Any, args: Any, output: Tensor) -> Tensor | None:
    """Shares ``[B, Q, K, H]`` behind the mixing: each of a key's patches had its bias."""
    bias = reduction.key_bias()
    if bias is None or module.bias is None:
        return None
    return output + module.bias * bias.expm1()[:, None, :, None].to(output.dtype)


def _attend(attention: Any, reduction: Reduction, x: Tensor) -> Tensor:
    """In place of the class token's attention to itself and the patches ``[B, 1 + N, D]``."""
    size = reduction.sizes(x.shape[1] - 1)
    if size is None:
        return ClassAttn.forward(attention, x)
    split = (attention.num_heads, -1)
    parts = (attention.q(x[:, :1]), attention.k(x), attention.v(x))
    q, k, v = (part.unflatten(-1, split).transpose(1, 2) for part in parts)
    bias = nn.functional.pad(size.log(), (1, 0))[:, None, None].to(q.dtype)
    dropped = attention.attn_drop.p if attention.training else 0.0
    rows = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
    return attention.proj_drop(attention.proj(rows.transpose(1, 2).flatten(2)))


def _head(model: Any, reduction: Reduction, x: Tensor, pre_logits: bool = False) -> Tensor:
    """In place of ``forward_head``, whose mean is over the patches."""
    size = reduction.sizes(x.shape[1] - model.num_prefix_tokens)
    if size is not None and model.global_pool == "avg":
        x = model.head_drop(weighted_mean(x[:, model.num_prefix_tokens :], size))
        return x if pre_logits else model.head(x)
    return Cait.forward_head(model, x, pre_logits)
