# SPDX-License-Identifier: Apache-2.0
"""open_clip's own image towers (``clip.visual``)."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import (
    EncoderAdapter,
    Instead,
    Layer,
    Reduction,
    ShownQK,
    refuse_normed,
    weighted_mean,
)
from visprune.errors import UnsupportedModel


class OpenClipViT(EncoderAdapter):
    """Adapter of ``open_clip.transformer.VisionTransformer``.

    Its attention is torch's ``MultiheadAttention``, which shows neither queries nor keys: those
    that a method needs are projected once more. With ``output_tokens`` the tokens come out short.
    """

    family = "open_clip.VisionTransformer"
    prefix = 1
    has_cls = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.width = int(model.conv1.out_channels)
        self.embed = model.conv1
        blocks = model.transformer.resblocks
        self.layers = [self._layer(number, block) for number, block in enumerate(blocks)]

    def _layer(self, number: int, block: Any) -> Layer:
        known = type(block) in (ResidualAttentionBlock, CustomResidualAttentionBlock)
        attention: Any = getattr(block, "attn", None)
        if not known or (isinstance(attention, Attention) and attention.logit_scale is not None):
            raise UnsupportedModel(
                f"Block {number} of this open_clip tower is a {type(block).__name__} with "
                f"{type(attention).__name__}; only its plain residual attention blocks with "
                f"dot-product attention are reduced."
            )
        before = 4 * self.width * self.width
        mlp = matrix_weights(block.mlp)
        head = self.width // attention.num_heads
        return Layer(block, block.attn, block.ln_1, block.ls_1, before, mlp, self.width, head)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patches along height and width."""
        size, step = pixels.shape[-2:], self.model.patch_size
        return size[0] // step[0], size[1] // step[1]

    def default_grid(self) -> tuple[int, int]:
        """Patches along height and width of the model's own input size."""
        height, width = self.model.grid_size
        return int(height), int(width)

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding, attentional pooling, projection."""
        model, total = self.model, math.prod(grid) * self.model.conv1.weight.numel()
        for pool in (model.attn_pool, getattr(model, "attn_pool_contrastive", None)):
            if pool is not None:
                queries, out = pool.query.shape
                keys = (last + 1) * 2 * out * (pool.attn.kdim or out)
                total += keys + queries * 2 * out * out + 2 * queries * (last + 1) * out
        return total + (0 if model.proj is None else model.proj.numel())

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Nothing here: the bias goes to the attention module, see :meth:`overrides`."""
        return args, kwargs

    def watch(self, number: int, record: ShownQK, *, every: bool = True) -> list[Any]:
        """Project queries and keys of what the attention is given."""
        hook = functools.partial(_project, record, every)
        attention = self.layers[number].attention
        return [attention.register_forward_pre_hook(hook, with_kwargs=True)]

    def signal_macs(self, tokens: int, *, every: bool = True) -> int:
        """The keys of all tokens and the queries of one or all."""
        return (tokens + (tokens if every else 1)) * self.width * self.width

    # What else is indexed by token --------------------------------------------------------------

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Key bias in every attention and in the poolers, pooling by size, dense features."""
        model: Any = self.model
        handles: list[Any] = [
            layer.attention.register_forward_pre_hook(
                functools.partial(_add_bias, reduction), with_kwargs=True
            )
            for layer in self.layers
        ]
        for pool in (model.attn_pool, getattr(model, "attn_pool_contrastive", None)):
            if pool is not None:
                hook = functools.partial(_add_pool_bias, reduction)
                handles.append(pool.attn.register_forward_pre_hook(hook, with_kwargs=True))
        pooled = functools.partial(self._pool, model._global_pool, reduction)
        dense = functools.partial(self._dense, model.forward_intermediates, reduction)
        handles.append(Instead(model, "_global_pool", pooled))
        handles.append(Instead(model, "forward_intermediates", dense))
        return handles

    def _pool(self, original: Any, reduction: Reduction, x: Tensor) -> tuple[Tensor, Tensor]:
        size = None
        if self.model.pool_type == "avg" and self.model.attn_pool is None:
            size = reduction.sizes(x.shape[1] - 1)
        if size is None:
            return original(x)
        return weighted_mean(x[:, 1:], size), x[:, 1:]

    def _dense(self, original: Any, reduction: Reduction, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        raster, given["output_fmt"] = given["output_fmt"] == "NCHW", "NLC"
        found = original(*call.args, **call.kwargs)
        taken, _ = feature_take_indices(len(self.layers), given["indices"])
        if given["normalize_intermediates"]:
            refuse_normed(reduction, sorted(taken))
        maps = []
        for number, y in zip(sorted(taken), found["image_intermediates"], strict=True):
            full = reduction.expand(number, y)
            if raster:
                full = full.reshape(full.shape[0], *self.grid(given["x"]), -1)
                full = full.permute(0, 3, 1, 2).contiguous()
            maps.append(full)
        return {**found, "image_intermediates": maps}


def _project(record: ShownQK, every: bool, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs["query"]
    record(*_queries_and_keys(module, x, every), (x.shape[-1] // module.num_heads) ** -0.5)


def _add_bias(
    reduction: Reduction, module: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    bias = reduction.key_bias()
    if bias is None:
        return None
    if isinstance(module, nn.MultiheadAttention):
        return args, {**kwargs, "key_padding_mask": bias.to(args[0].dtype)}
    return args, {**kwargs, "attn_mask": bias[:, None, None].to(args[0].dtype)}


def _add_pool_bias(
    reduction: Reduction, module: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    size = reduction.sizes(args[1].shape[1] - 1)
    if size is None:
        return None
    whole = torch.cat([size.new_ones(size.shape[0], 1), size], dim=1)
    return args, {**kwargs, "key_padding_mask": whole.log().to(args[1].dtype)}


def _queries_and_keys(attention: Any, x: Tensor, every: bool) -> tuple[Tensor, Tensor]:
    """``[B, H, T, d]`` both; of queries without ``every`` that of the class token alone."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    width = x.shape[-1]

    def heads(rows: Tensor, part: int) -> Tensor:
        span = slice(part * width, (part + 1) * width)
        y = nn.functional.linear(rows, weight[span], None if bias is None else bias[span])
        return y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    query, key = heads(x if every else x[:, :1], 0), heads(x, 1)
    if isinstance(attention, Attention):
        query, key = attention.ln_q(query), attention.ln_k(key)
    return query, key
