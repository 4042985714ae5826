# SPDX-License-Identifier: Apache-2.0
"""timm's ``VisionTransformer``: ViT, DeiT (distilled too), SigLIP, DINOv2, hybrids, ViTamin."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, DiffAttention
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import (
    EncoderAdapter,
    Instead,
    Layer,
    Reduction,
    ShownQK,
    no_mask,
    refuse_normed,
    refuse_proxy,
    weighted_mean,
)
from visprune.backbones.encoders.macs import embedding_macs, head_macs
from visprune.backbones.encoders.timm_hooks import Branches, Weighing, watch_norms
from visprune.errors import UnsupportedModel

_PARALLEL = (ParallelScalingBlock, DiffParallelScalingBlock, ParallelThingsBlock)


class TimmViT(EncoderAdapter):
    """Adapter of ``timm.models.vision_transformer.VisionTransformer`` and its subclasses.

    Prefix tokens (class, distillation, registers) stay, and are outside the budget. In blocks that
    run attention and MLP side by side, tokens leave at the block's end.
    """

    family = "timm.VisionTransformer"
    attentions: tuple[type[nn.Module], ...] = (Attention, DiffAttention)

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefix = int(model.num_prefix_tokens)
        self.has_cls = getattr(model, "cls_token", None) is not None
        self.width = int(model.embed_dim)
        self.embed = model.patch_embed
        self.layers = [self._layer(number, block) for number, block in enumerate(model.blocks)]
        pool = model.attn_pool
        if isinstance(pool, AttentionPoolLatent) and pool.pos_embed is not None:
            raise UnsupportedModel(
                f"The pooling of this {type(model).__name__} adds a position to each of a fixed "
                f"number of tokens, and fits no other number."
            )

    def _layer(self, number: int, block: Any) -> Layer:
        if type(block) in _PARALLEL:
            weights = matrix_weights(block)
            width, head = _attention_width(block), _head_width(block)
            return Layer(block, block, None, None, weights, 0, width, head)
        attention = getattr(block, "attn", None)
        entry = {Block: "norm1", ResPostBlock: "attn"}.get(type(block))
        if entry is None or type(attention) not in self.attentions:
            raise self._unknown(number, block, attention)
        return self._plain(block, entry)

    def _plain(self, block: Any, entry: str) -> Layer:
        before = matrix_weights(block.attn)
        return Layer(
            block=block,
            attention=block.attn,
            entry=getattr(block, entry),
            branch=block.drop_path1,
            attention_weights=before,
            mlp_weights=matrix_weights(block) - before,
            attention_width=_attention_width(block.attn),
            head_width=_head_width(block.attn),
        )

    def _unknown(self, number: int, block: Any, attention: Any) -> UnsupportedModel:
        return UnsupportedModel(
            f"Block {number} of this {type(self.model).__name__} is a {type(block).__name__} with "
            f"{type(attention).__name__}. Tokens can leave blocks of timm's own classes whose "
            f"attention takes any set of tokens; one that needs the grid, or is not known, is not "
            f"reduced."
        )

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patches along height and width."""
        refuse_proxy(pixels, self.model)
        height, width = self.model.patch_embed.dynamic_feat_size(pixels.shape[-2:])
        return int(height), int(width)

    def default_grid(self) -> tuple[int, int]:
        """Patches along height and width of the model's own input size."""
        height, width = self.model.patch_embed.grid_size
        return int(height), int(width)

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding, pooling and head."""
        model = self.model
        heads = [model.head, getattr(model, "head_dist", None)]
        tokens = last + (self.prefix if self._pools_prefix() else 0)
        return embedding_macs(model.patch_embed, grid) + head_macs(heads, model.attn_pool, tokens)

    def _pools_prefix(self) -> bool:
        return bool(self.model.pool_include_prefix)

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The bias is an additive mask ``[B, 1, 1, T]``."""
        no_mask(kwargs.get("attn_mask"), kwargs.get("is_causal"))
        if bias is None:
            return args, kwargs
        return args, {**kwargs, "attn_mask": bias[:, None, None].to(args[0].dtype)}

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """By hooks on the norms of queries and keys, which are there (as identities) always."""
        block: Any = self.layers[number].block
        if isinstance(block, ParallelThingsBlock):
            collect = Branches(len(block.attns), record).collect
            return [handle for part in block.attns for handle in watch_norms(part.attn, collect)]
        heads_last = isinstance(block, ParallelScalingBlock)
        return watch_norms(self.layers[number].attention, record, heads_last=heads_last)

    def weigh_keys(self, number: int, policy: Callable[[], Tensor | None]) -> list[Any]:
        """Scale the values by the policy, and divide by what attention then sums to.

        ``sum_j p_j e_ij v_j / sum_j p_j e_ij`` is the attention that sees key j with weight p_j,
        and differentiable in p also where it is 0; a token's own key keeps its whole weight.
        """
        attention: Any = self.layers[number].attention
        if type(attention) is not Attention or self.model.attn_pool is not None:
            return super().weigh_keys(number, policy)
        return Weighing(attention, self.prefix, policy).install()

    def why_no_cls_rows(self) -> str | None:
        """A differential attention has no rows."""
        parts = {type(module) for layer in self.layers for module in layer.block.modules()}
        if parts & {DiffAttention, DiffParallelScalingBlock}:
            return "its differential attention subtracts two maps, and neither is the attention"
        return super().why_no_cls_rows()

    # What else is indexed by token --------------------------------------------------------------

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Pooling by size, and features on the whole grid."""
        model = self.model
        dense = functools.partial(self._dense, model.forward_intermediates, reduction)
        pool = functools.partial(self._pool, model.pool, reduction)
        return [
            Instead(model, "forward_intermediates", dense),
            Instead(model, "pool", pool),
        ]

    def _pool(
        self, original: Any, reduction: Reduction, x: Tensor, pool_type: str | None = None
    ) -> Tensor:
        model = self.model
        size = reduction.sizes(x.shape[1] - self.prefix)
        kind = model.global_pool if pool_type is None else pool_type
        if size is None or (model.attn_pool is None and not kind.startswith("avg")):
            return original(x, pool_type) if pool_type is not None else original(x)
        if self._pools_prefix():
            size = torch.cat([size.new_ones(size.shape[0], self.prefix), size], dim=1)
        else:
            x = x[:, self.prefix :]
        if isinstance(model.attn_pool, AttentionPoolLatent):
            return model.attn_pool(x, attn_mask=size.log()[:, None, None].to(x.dtype))
        if model.attn_pool is not None:  # attends among the tokens: only the whole set is exact
            patches = reduction.expand(len(self.layers) - 1, x[:, self.prefix :])
            return original(torch.cat([x[:, : self.prefix], patches], dim=1))
        mean = weighted_mean(x, size)
        return 0.5 * (x.amax(dim=1) + mean) if kind == "avgmax" else mean

    def _dense(self, original: Any, reduction: Reduction, *args: Any, **kwargs: Any) -> Any:
        """Un-merge every feature map; the final tokens stay short, as the head wants them."""
        call = inspect.signature(original).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        raster, given["output_fmt"] = given["output_fmt"] == "NCHW", "NLC"
        found = original(*call.args, **call.kwargs)
        taken, _ = feature_take_indices(len(self.layers), given["indices"])
        if given["norm"]:
            refuse_normed(reduction, sorted(taken))
        grid = self.grid(given["x"]) if raster else ()

        def whole(number: int, y: Any) -> Any:
            if isinstance(y, tuple):
                return whole(number, y[0]), *y[1:]
            there = self.gives_whole and number == len(self.layers) - 1
            full = y if there else reduction.expand(number, y)
            if not raster:
                return full
            return full.reshape(full.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous()

        maps = found if isinstance(found, list) else None
        if isinstance(found, dict):
            maps = found["image_intermediates"]
        elif maps is None:
            maps = found[1]
        full = [whole(number, y) for number, y in zip(sorted(taken), maps, strict=True)]
        if isinstance(found, dict):
            return {**found, "image_intermediates": full}
        return full if isinstance(found, list) else (found[0], full)


def _attention_width(module: Any) -> int:
    """Features of all heads."""
    if isinstance(module, ParallelThingsBlock):
        return sum(_attention_width(part.attn) for part in module.attns)
    doubled = 2 if isinstance(module, DiffAttention | DiffParallelScalingBlock) else 1
    return int(module.num_heads * module.head_dim * doubled)


def _head_width(module: Any) -> int:
    """Features of one head."""
    if isinstance(module, ParallelThingsBlock):
        return _head_width(module.attns[0].attn)
    return int(module.head_dim)
