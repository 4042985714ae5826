# SPDX-License-Identifier: Apache-2.0
"""VAN (arXiv 2202.09741): a large depthwise kernel, taken apart, that weighs its own input.

Module and parameter names are those of Visual-Attention-Network/VAN-Classification at e19779b,
``models/van.py``: the published files load without renaming. Takes images of any size; each stage
rounds up. B4 to B6 are in that code without published weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from visprune.backbones.vit.flat_stages import FlatStages, Pointwise
from visprune.errors import ConfigError

__all__ = ["VAN", "LargeKernelAttention"]  # register_model appends the names of the models

LAYER_SCALE = 1e-2


class LargeKernelAttention(nn.Module):
    """A map [B, C, H, W] times a convolution of itself that sees 23 x 23 places around each.

    Depthwise 5 x 5, depthwise 7 x 7 with dilation 3, and 1 x 1: the sum of the first two reaches
    2 + 9 places each way.

    Args:
        dim: channels.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim, **dd)
        self.conv1 = Pointwise(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class Attention(nn.Module):
    """Large kernel attention between two 1 x 1 convolutions, and a shortcut around all of it."""

    def __init__(self, dim: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.proj_1 = Pointwise(dim, dim, **dd)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LargeKernelAttention(dim, **dd)
        self.proj_2 = Pointwise(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return x + self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x))))


class DWConv(nn.Module):
    """Depthwise 3 x 3 convolution, under the name that the published files have for it."""

    def __init__(self, dim: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return self.dwconv(x)


class ConvMlp(nn.Module):
    """1 x 1, depthwise 3 x 3, GELU, 1 x 1."""

    def __init__(self, dim: int, hidden: int, drop: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = Pointwise(dim, hidden, **dd)
        self.dwconv = DWConv(hidden, dd)
        self.act = nn.GELU()
        self.fc2 = Pointwise(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        x = self.drop(self.act(self.dwconv(self.fc1(x))))
        return self.drop(self.fc2(x))


class VANBlock(nn.Module):
    """Attention and MLP under batch norms, each with layer scale and a shortcut."""

    def __init__(
        self, dim: int, mlp_ratio: float, drop: float, drop_path: float, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = Attention(dim, dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop, dd)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), LAYER_SCALE, **dd))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), LAYER_SCALE, **dd))

    def init_own_weights(self) -> None:
        """Layer scale starts at its small constant."""
        nn.init.constant_(self.layer_scale_1, LAYER_SCALE)
        nn.init.constant_(self.layer_scale_2, LAYER_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))


class OverlapPatchEmbed(nn.Module):
    """A convolution of stride 4 (7 x 7) or 2 (3 x 3), then batch norm."""

    def __init__(self, in_chans: int, dim: int, first: bool, dd: dict[str, Any]) -> None:
        super().__init__()
        kernel, stride = (7, 4) if first else (3, 2)
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, kernel // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, dim, ceil(H / stride), ceil(W / stride)]."""
        return self.norm(self.proj(x))


class VAN(FlatStages):
    """VAN. Takes images of any size.

    Args:
        img_size: nominal image size; nothing in the model depends on it.
        in_chans: image channels.
        num_classes: classes of the head; 0 leaves it out.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"`` or ``""``.
        embed_dims: channels of the four stages.
        mlp_ratios: hidden over input channels of the MLP, per stage.
        depths: blocks per stage.
        drop_rate: dropout in the MLPs, as published, and before the head.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: not four stages, or an image that is none.
    """

    stage_parts = tuple((f"patch_embed{i}", f"block{i}", f"norm{i}") for i in range(1, 5))
    title = "VAN"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (3, 3, 12, 3),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not len(embed_dims) == len(mlp_ratios) == len(depths) == 4:
            raise ConfigError(
                "VAN: embed_dims, mlp_ratios and depths have one entry for each of the four "
                f"stages; got {list(embed_dims)}, {list(mlp_ratios)} and {list(depths)}."
            )
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.img_size = in_chans, to_2tuple(img_size)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        before = in_chans
        for i, dim in enumerate(embed_dims):
            embed, blocks, norm = self.stage_parts[i]
            setattr(self, embed, OverlapPatchEmbed(before, dim, i == 0, dd))
            made = [VANBlock(dim, mlp_ratios[i], drop_rate, p, dd) for p in rates[i].tolist()]
            setattr(self, blocks, nn.ModuleList(made))
            setattr(self, norm, nn.LayerNorm(dim, eps=1e-6, **dd))
            before = dim
        self.num_features = self.head_hidden_size = before
        self.head = nn.Linear(before, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._finish(embed_dims, num_classes, global_pool, drop_rate)

    def init_weights(self) -> None:
        """In place: linear layers truncated normal, convolutions by fan-out, as published."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                nn.init.ones_(module.weight)
            else:
                getattr(module, "init_own_weights", lambda: None)()
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)

    def run_stage(self, index: int, state: Any) -> Tensor:
        """[B, C, H, W] -> the map after the norm of the stage."""
        embed, blocks, norm = (getattr(self, name) for name in self.stage_parts[index])
        x = self.run_blocks(blocks, embed(state))
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input to the output, for layer-wise learning rates."""
        previous = (99999,)  # timm: counts with the group before it
        fine = [
            (r"^patch_embed(\d+)", None),
            (r"^block(\d+)\.(\d+)", None),
            (r"^norm(\d+)", previous),
        ]
        stage = r"^(?:patch_embed|block|norm)(\d+)"
        return {"stem": r"^patch_embed1", "blocks": stage if coarse else fine}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The weights in an official file."""
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2202.09741",
        **kwargs,
    }


def _hub(size: str, file: str) -> dict[str, Any]:
    name = f"Visual-Attention-Network/VAN-{size}-original"
    return _cfg(hf_hub_id=name, hf_hub_filename=f"van_{file}.pth.tar")


default_cfgs = generate_default_cfgs(
    {
        "van_b0.in1k": _hub("Tiny", "tiny_754"),
        "van_b1.in1k": _hub("Small", "small_811"),
        "van_b2.in1k": _hub("Base", "base_828"),
        "van_b3.in1k": _hub("Large", "large_839"),
        **{f"van_b{i}.untrained": _cfg() for i in (4, 5, 6)},
    }
)

_DIMS = (64, 128, 320, 512)
_SIZES = {
    "van_b0": {"embed_dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2)},
    "van_b1": {"embed_dims": _DIMS, "depths": (2, 2, 4, 2)},
    "van_b2": {"embed_dims": _DIMS, "depths": (3, 3, 12, 3)},
    "van_b3": {"embed_dims": _DIMS, "depths": (3, 5, 27, 3)},
    "van_b4": {"embed_dims": _DIMS, "depths": (3, 6, 40, 3)},
    "van_b5": {"embed_dims": (96, 192, 480, 768), "depths": (3, 3, 24, 3)},
    "van_b6": {"embed_dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6)},
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> VAN:
    return build_model_with_cfg(
        VAN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**_SIZES[variant], **kwargs},
    )


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B0 (Tiny): 4.1 M parameters, 0.86 GMACs at 224."""
    return _create("van_b0", pretrained, **kwargs)


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B1 (Small): 13.9 M parameters, 2.50 GMACs at 224."""
    return _create("van_b1", pretrained, **kwargs)


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B2 (Base): 26.6 M parameters, 4.99 GMACs at 224."""
    return _create("van_b2", pretrained, **kwargs)


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B3 (Large): 44.8 M parameters, 8.93 GMACs at 224."""
    return _create("van_b3", pretrained, **kwargs)


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B4: 60.3 M parameters, 12.1 GMACs at 224; without published weights."""
    return _create("van_b4", pretrained, **kwargs)


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B5: 90.0 M parameters, 17.1 GMACs at 224; without published weights."""
    return _create("van_b5", pretrained, **kwargs)


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> VAN:
    """VAN-B6: 199.8 M parameters, 38.7 GMACs at 224; without published weights."""
    return _create("van_b6", pretrained, **kwargs)
