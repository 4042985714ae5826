# SPDX-License-Identifier: Apache-2.0
"""timm's ``NaFlexVit``: pictures of any size, also of several in one padded batch."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Attention
from timm.models.naflexvit import global_pool_naflex
from timm.models.vision_transformer import Block
from torch import Tensor

from visprune.backbones.cost.matrices import matrix_weights
from visprune.backbones.encoders.base import (
    Instead,
    Layer,
    Reduction,
    check_padding,
    refuse_proxy,
    weighted_mean,
)
from visprune.backbones.encoders.macs import head_macs
from visprune.backbones.encoders.timm_eva import TimmEva
from visprune.errors import UnsupportedModel


class TimmNaFlex(TimmEva):
    """Adapter of ``timm.models.naflexvit.NaFlexVit``.

    It takes pixels, or lists of patches with their places, padded to one length: each picture of
    such a batch is reduced as if it were alone. Layers are timm's plain blocks or those of ``Eva``.
    """

    family = "timm.NaFlexVit"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rotary = model.rope is not None
        self.prefix, self.has_cls = int(model.num_prefix_tokens), bool(model.has_class_token)
        self.width = int(model.embed_dim)
        self.embeds: Any = model.embeds
        self.embed = self.embeds
        self.layers = [self._layer(number, block) for number, block in enumerate(model.blocks)]

    def _layer(self, number: int, block: Any) -> Layer:
        if type(block) is Block and type(block.attn) is Attention:
            return self._plain(block, "norm1")
        return super()._layer(number, block)

    def _pools_prefix(self) -> bool:
        return bool(self.model.pool_include_prefix)

    # Patches ------------------------------------------------------------------------------------

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patches along height and width; a list of patches is one row."""
        refuse_proxy(pixels, self.model)
        if pixels.dim() != 4:
            return 1, pixels.shape[1]
        height, width = self.embeds.dynamic_feat_size(tuple(pixels.shape[-2:]))
        return int(height), int(width)

    def default_grid(self) -> tuple[int, int]:
        """Patches along height and width of the table of positions, or of the model's input."""
        given = self.embeds.pos_embed_grid_size
        if given is None:
            given = self.embeds.dynamic_feat_size(self.model.pretrained_cfg["input_size"][-2:])
        return int(given[0]), int(given[1])

    def shapes(self, args: Any, kwargs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """Rows and columns of the pictures, by the places of their patches."""
        places, valid = kwargs.get("patch_coord"), kwargs.get("patch_valid")
        if places is None:
            return None
        there = torch.ones(places.shape[:2]) if valid is None else valid
        return [_shape(at, own.bool()) for at, own in zip(places, there, strict=True)]

    def fixed_macs(self, grid: tuple[int, ...], last: int) -> int:
        """Embedding, pooling and head."""
        model, tokens = self.model, last + (self.prefix if self._pools_prefix() else 0)
        weights = matrix_weights(self.embeds.proj)
        return math.prod(grid) * weights + head_macs([model.head], model.attn_pool, tokens)

    def run(self, inputs: Any) -> None:
        """Run it once, on pixels or on a batch of timm's own loader of such pictures."""
        self.model(inputs)

    # A layer ------------------------------------------------------------------------------------

    def inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], bias: Tensor | None, at: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As in the base; a mask that hides nothing goes once tokens have left."""
        mask = kwargs.get("attn_mask")
        if mask is None or not bool((mask == 0).all()):
            return super().inputs(args, kwargs, bias, at)
        args, kwargs = super().inputs(args, {**kwargs, "attn_mask": None}, bias, at)
        whole = mask.shape[-1] == args[0].shape[1]
        return args, {**kwargs, "attn_mask": mask} if bias is None and whole else kwargs

    def take_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """Layers are given it by name."""
        mask = kwargs.get("attn_mask")
        check_padding(mask, lengths, self.prefix)
        return args, {**kwargs, "attn_mask": None}, {"attn_mask": mask}

    # What else is indexed by token --------------------------------------------------------------

    def overrides(self, reduction: Reduction) -> list[Any]:
        """Pooling by size, features of all patches, and which of the tokens left are padding."""
        ours = {
            "forward_intermediates": self._all_patches,
            "forward_features": self._features,
            "_pool": self._pool_by_size,
        }
        return [
            Instead(self.model, name, functools.partial(own, getattr(self.model, name), reduction))
            for name, own in ours.items()
        ]

    def _all_patches(self, original: Any, reduction: Reduction, *args: Any, **kwargs: Any) -> Any:
        """As in the base; lists of patches have no one grid, and stay lists."""
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if isinstance(given["x"], dict) and given.get("output_fmt", "NCHW") == "NCHW":
            return original(*args, **kwargs)  # which refuses it
        return self._dense(original, reduction, *args, **kwargs)

    def _features(self, original: Any, reduction: Reduction, *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if isinstance(found, dict) and found.get("patch_valid") is not None:
            tokens = found["patches"]
            count = tokens.shape[1] - self.prefix
            size = reduction.sizes(count)
            if size is not None:
                found["patch_valid"] = size > 0
            elif found["patch_valid"].shape[1] != count:
                found["patch_valid"] = found["patch_valid"].new_ones(len(tokens), count)
        return found

    def _pool_by_size(
        self, original: Any, reduction: Reduction, x: Tensor, pool_type: str | None = None,
        patch_valid: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        model, size = self.model, reduction.sizes(x.shape[1] - self.prefix)
        kind = model.global_pool if pool_type is None else pool_type
        weighed = model.attn_pool is not None or kind.startswith("avg")
        if size is None or not weighed:
            return original(x, pool_type, patch_valid=patch_valid)
        if self._pools_prefix():
            size = torch.cat([size.new_ones(len(size), self.prefix), size], dim=1)
        else:
            x = x[:, self.prefix :]
        if model.attn_pool is not None:
            return model.attn_pool(x, attn_mask=size.log()[:, None, None].to(x.dtype))
        mean = weighted_mean(x, size)
        if kind == "avg":
            return mean
        largest = global_pool_naflex(x, size > 0, "max", num_prefix_tokens=0)
        return 0.5 * (mean + largest)


def _shape(places: Tensor, valid: Tensor) -> tuple[int, int]:
    """Rows and columns of a picture, of the places ``[N, 2]`` of its patches.

    Raises:
        UnsupportedModel: they are not in raster order, with the padding behind them.
    """
    own = places[valid]
    height, width = (int(side) + 1 for side in own.amax(0))
    raster = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(own)
    whole = bool(valid[: len(own)].all()) and own.shape == raster.shape
    if not (whole and bool((own == raster).all())):
        raise UnsupportedModel(
            f"A picture has {len(own)} patches whose places are not those of a grid of {height} x "
            f"{width} in raster order with padding behind them, so what a token of it stands for "
            f"cannot be told. Give whole pictures, as timm's loader does."
        )
    return height, width
