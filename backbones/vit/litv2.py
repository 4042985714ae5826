# SPDX-License-Identifier: Apache-2.0
"""LITv2 (arXiv 2205.13213): convolutional stages, then HiLo attention.

Module and parameter names are those of ziplab/LITv2 at 7501c86, ``classification/models/``
(``litv2.py``, ``layers.py``, ``blocks.py``, ``patch_embed.py``, ``attentions.py``): the published
files load without renaming. Sizes are in ``classification/configs/litv2-*.yaml``.

Where it differs: any height and width that the strides divide, not only the square of ``img_size``;
``dynamic_img_pad=True`` takes every size, with the padding of the official detection code
(``detection/mmdet/models/backbones/litv2.py``); deformable token merging is written without a
compiled extension (see ``token_merging``). There is no position encoding: positions come from the
depthwise convolution of the MLP. The official training scales the learning rate of the parameters
named ``conv_offset`` by 0.01 (``OFFSET_LR_MULTI``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, PatchEmbed
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import Tensor, nn

from visprune.backbones.vit.hilo import HiLo
from visprune.backbones.vit.staged import StagedViT, ViTStage, record_input_size
from visprune.backbones.vit.token_merging import TokenMerging
from visprune.errors import ConfigError

__all__ = ["LITv2"]  # register_model appends the names of the models

PATCH = 4
SPLIT_ABOVE = 16 * 2**20  # bytes of a hidden map
SPLIT_TO = 5 * 2**20


class DWConv(nn.Module):
    """Depthwise 3 x 3 convolution of a channels-last map."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def init_own_weights(self) -> None:
        """Normal with the variance of 2 / fan-out, as the official code does."""
        nn.init.normal_(self.dwconv.weight, std=math.sqrt(2 / 9))
        if self.dwconv.bias is not None:
            nn.init.zeros_(self.dwconv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same."""
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class DWMlp(nn.Module):
    """MLP with a depthwise convolution before its activation.

    In CPU inference it goes a few images at a time, with the activation in place: at 8 images of
    224 the hidden map of the first stage is 38 MB, and writing and reading it thrice takes as long
    as the products (two threads of an AMD EPYC with 32 MB of cache, torch 2.15.0: 62 ms,
    30 ms in parts).
    """

    def __init__(self, dim: int, hidden: int, drop: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = DWConv(hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same."""
        free = x.is_cpu and not self.training and not torch.is_grad_enabled()
        # What records the calls would fix the number of images, too.
        if not free or torch.compiler.is_compiling() or torch.jit.is_tracing():
            x = self.drop(self.act(self.dwconv(self.fc1(x))))
            return self.drop(self.fc2(x))
        images = self._images_at_once(x)
        if images >= len(x):
            return self._in_place(x)
        return torch.cat([self._in_place(part) for part in x.split(images)])

    def _images_at_once(self, x: Tensor) -> int:
        """How many images keep the hidden map in the cache; all where it is small."""
        each = math.prod(x.shape[1:3]) * self.fc1.out_features * x.element_size()
        return len(x) if len(x) * each <= SPLIT_ABOVE else max(1, SPLIT_TO // max(1, each))

    def _in_place(self, x: Tensor) -> Tensor:
        return self.fc2(torch.ops.aten.gelu_(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    """HiLo attention (none with ``window_size=0``: no norm1, no attn) and the convolutional MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        alpha: float,
        mlp_ratio: float,
        qkv_bias: bool,
        drop: float,
        drop_path: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.has_attention = window_size > 0
        if self.has_attention:
            self.norm1 = nn.LayerNorm(dim, **dd)
            self.attn = HiLo(dim, num_heads, window_size, alpha, qkv_bias, proj_drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = DWMlp(dim, int(dim * mlp_ratio), drop, dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same."""
        if self.has_attention:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LITv2(StagedViT):
    """LITv2. Takes images whose sides are multiples of ``size_multiple`` (32 as published).

    Args:
        img_size: nominal image size; nothing in the model depends on it.
        patch_size: stride of the first layer.
        in_chans: image channels.
        num_classes: classes of the head; 0 leaves it out.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"`` or ``""``.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        window_sizes: HiLo window per stage; 0 is a stage without attention, 1 plain attention.
        alpha: share of low-frequency heads.
        mlp_ratio: hidden over input channels of the MLP.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout in attention and MLP.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        dynamic_img_pad: take any size of at least 32 pixels, padding as the official detection
            code does.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: an argument, or the size of an image, is not possible.
    """

    stages_name = "layers"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = PATCH,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not len(depths) == len(num_heads) == len(window_sizes):
            raise ConfigError(
                "LITv2: depths, num_heads and window_sizes have one entry per stage each; "
                f"got {len(depths)}, {len(num_heads)} and {len(window_sizes)}."
            )
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.window_sizes = tuple(window_sizes)
        self.dynamic_img_pad = dynamic_img_pad
        # It may always pad: `_check_input` refuses before it what needs padding, and timm's own
        # refusal writes the size into a text, which makes a compiled graph for every size.
        self.patch_embed = PatchEmbed(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
            norm_layer=nn.LayerNorm, output_fmt="NHWC", strict_img_size=False,
            dynamic_img_pad=True, **dd,
        )  # fmt: skip
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        stages = []
        for i, dim in enumerate(dims):
            sizes = (dim, num_heads[i], window_sizes[i], alpha, mlp_ratio, qkv_bias)
            blocks = [Block(*sizes, proj_drop_rate, rate, dd) for rate in rates[i].tolist()]
            stages.append(ViTStage(blocks, TokenMerging(dim, **dd) if i < len(dims) - 1 else None))
        self._finish(stages, dims, patch_size, num_classes, global_pool, drop_rate, dd)

    @property
    def size_multiple(self) -> tuple[int, int]:
        """What image height and width must be multiples of, without ``dynamic_img_pad``."""
        steps = [2**i * max(w, 1) for i, w in enumerate(self.window_sizes[: len(self.stages)])]
        patch_h, patch_w = self.patch_embed.patch_size
        return math.lcm(*steps) * patch_h, math.lcm(*steps) * patch_w

    def _check_input(self, x: Tensor) -> None:
        check_size(x, self.in_chans, self.size_multiple, self.dynamic_img_pad)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the nominal image size, or resample the patch embedding to another patch size."""
        if img_size is not None and not self.dynamic_img_pad:
            size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
            _check_multiple(size, self.size_multiple)
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        for i, info in enumerate(self.feature_info):
            info["reduction"] = max(self.patch_embed.patch_size) * 2**i
        record_input_size(self, self.patch_embed.img_size, patch_size)


@torch.fx.wrap
@register_notrace_function
def check_size(x: Tensor, channels: int, multiple: tuple[int, int], padded: bool) -> None:
    """Raise ``ConfigError`` unless LITv2 can take these images."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ConfigError(f"LITv2 takes images [B, {channels}, H, W]; got {list(x.shape)}.")
    size = (x.shape[2], x.shape[3])
    if not padded:
        _check_multiple(size, multiple)
    elif size[0] < multiple[0] or size[1] < multiple[1]:
        raise ConfigError(f"LITv2 halves the map until {multiple[0]} x {multiple[1]} pixels are "
                          f"one: images must be at least that large; got {size}.")  # fmt: skip


def _check_multiple(size: tuple[int, ...], multiple: tuple[int, int]) -> None:
    if size[0] < 1 or size[1] < 1 or size[0] % multiple[0] or size[1] % multiple[1]:
        raise ConfigError(
            f"LITv2 takes image heights in multiples of {multiple[0]} and widths in multiples of "
            f"{multiple[1]}; got {size[0]} x {size[1]}. Resize the image, or create the model with "
            f"dynamic_img_pad=True, which pads as the official detection code does."
        )


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,  # resize to 256, crop 224: classification/data/build.py
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2205.13213",
        **kwargs,
    }


_RELEASE = "https://github.com/ziplab/LITv2/releases/download/v1.0/"
_AT_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "litv2_s.in1k": _cfg(_RELEASE + "litv2_s.pth"),
        "litv2_m.in1k": _cfg(_RELEASE + "litv2_m.pth"),
        "litv2_b.in1k": _cfg(_RELEASE + "litv2_b.pth"),
        # Squashed to 384 x 384 without a crop (TEST.CROP false in litv2-base-finetune-384.yaml).
        "litv2_b_384.in1k": _cfg(_RELEASE + "litv2_b_384.pth", crop_mode="squash", **_AT_384),
        # Published for B alone; these are for training.
        "litv2_s_384.untrained": _cfg(**_AT_384),
        "litv2_m_384.untrained": _cfg(**_AT_384),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Take the weights out of a training checkpoint; the names are ours already."""
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> LITv2:
    return build_model_with_cfg(
        LITv2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


_S = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_M = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_B = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S: 27.8 M parameters, 3.73 GMACs at 224."""
    return _create("litv2_s", pretrained, **{**_S, **kwargs})


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-M: 48.8 M parameters, 7.48 GMACs at 224."""
    return _create("litv2_m", pretrained, **{**_M, **kwargs})


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B: 86.5 M parameters, 13.2 GMACs at 224."""
    return _create("litv2_b", pretrained, **{**_B, **kwargs})


@register_model
def litv2_s_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S at 384 pixels."""
    return _create("litv2_s_384", pretrained, **{"img_size": 384, **_S, **kwargs})


@register_model
def litv2_m_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-M at 384 pixels."""
    return _create("litv2_m_384", pretrained, **{"img_size": 384, **_M, **kwargs})


@register_model
def litv2_b_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B at 384 pixels: 39.7 GMACs."""
    return _create("litv2_b_384", pretrained, **{"img_size": 384, **_B, **kwargs})
