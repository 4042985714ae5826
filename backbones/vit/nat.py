# SPDX-License-Identifier: Apache-2.0
"""NAT (arXiv 2204.07143): a hierarchical transformer of neighborhood attention.

Module and parameter names are those of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b,
``classification/nat.py`` and ``dinat.py``: the published files load without renaming. Checkpoints
in the layout of ``transformers`` (``shi-labs/nat-*``, ``shi-labs/dinat-*``) are converted by
:func:`checkpoint_filter_fn`. DiNAT is the same class with dilations, see ``dinat``.

The official code runs only with natten below 0.20, which removed the learned position bias that
every published model has; here it runs on any device and trains. Takes every image size: maps
smaller than a window are padded, as the official attention does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
)
from torch import Tensor, nn

from visprune.backbones.vit.neighborhood import NeighborhoodAttention2d
from visprune.backbones.vit.staged import StagedViT, ViTStage, record_input_size
from visprune.errors import ConfigError

__all__ = ["NAT"]  # register_model appends the names of the models

STRIDE = 4  # of the tokenizer


class ConvTokenizer(nn.Module):
    """Two 3 x 3 convolutions of stride 2 without an activation between them, then a norm."""

    def __init__(self, in_chans: int, dim: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, ceil(H / 4), ceil(W / 4), dim]."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """3 x 3 convolution of stride 2 without bias, then a norm."""

    def __init__(self, dim: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, ceil(H / 2), ceil(W / 2), 2 dim]."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NATLayer(nn.Module):
    """Neighborhood attention and MLP; ``gamma1`` and ``gamma2`` with ``layer_scale``."""

    def __init__(
        self,
        dim: int,
        attn: NeighborhoodAttention2d,
        mlp_ratio: float,
        layer_scale: float | None,
        drop: float,
        drop_path: float,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.layer_scale = layer_scale
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale, **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale, **dd))

    def init_own_weights(self) -> None:
        """Layer scale starts at its small constant."""
        if self.layer_scale is not None:
            nn.init.constant_(self.gamma1, self.layer_scale)
            nn.init.constant_(self.gamma2, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same."""
        if self.layer_scale is None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class NAT(StagedViT):
    """NAT, and with ``dilations`` DiNAT. Takes images of any size.

    Args:
        img_size: nominal image size; nothing in the model depends on it.
        in_chans: image channels.
        num_classes: classes of the head; 0 leaves it out.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"`` or ``""``.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        kernel_size: side of the window.
        dilations: per stage, the dilation of each block; all 1 if None. A pattern shorter than its
            stage is repeated. ``kernel_size * dilation`` beyond the map is padded for.
        mlp_ratio: hidden over input channels of the MLP.
        qkv_bias: whether queries, keys and values have a bias.
        rel_pos_bias: learned bias of the offsets; all published models have it.
        layer_scale: start value of layer scale; without it if None.
        drop_rate: dropout before the head.
        proj_drop_rate: dropout in attention and MLP.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: an argument, or the shape of an image, is not possible.
    """

    stages_name = "levels"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dilations = [(1,)] * len(depths) if dilations is None else dilations
        if not len(depths) == len(num_heads) == len(dilations) or not all(dilations):
            raise ConfigError(
                "NAT: depths, num_heads and dilations have one entry per stage each; got "
                f"{list(depths)}, {list(num_heads)} and {[list(d) for d in dilations]}."
            )
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.patch_embed = ConvTokenizer(in_chans, embed_dim, dd)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for j, rate in enumerate(rates[i].tolist()):
                attn = NeighborhoodAttention2d(
                    dim, num_heads[i], kernel_size, dilations[i][j % len(dilations[i])],
                    rel_pos_bias=rel_pos_bias, qkv_bias=qkv_bias, attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate, **dd,
                )  # fmt: skip
                blocks.append(NATLayer(dim, attn, mlp_ratio, layer_scale, proj_drop_rate, rate, dd))
            stages.append(ViTStage(blocks, ConvDownsampler(dim, dd) if i < len(dims) - 1 else None))
        self._finish(stages, dims, STRIDE, num_classes, global_pool, drop_rate, dd)

    def _check_input(self, x: Tensor) -> None:
        check_images(x, self.in_chans)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the nominal image size: no parameter depends on it."""
        if patch_size is not None and to_2tuple(patch_size) != (STRIDE, STRIDE):
            raise ConfigError(f"NAT: the tokenizer has a fixed stride of {STRIDE}; "
                              f"got patch_size={patch_size}.")  # fmt: skip
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        record_input_size(self, self.img_size)

    def no_weight_decay(self) -> set[str]:
        """The position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


@torch.fx.wrap
@register_notrace_function
def check_images(x: Tensor, channels: int) -> None:
    """Raise ``ConfigError`` unless NAT can take these images."""
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ConfigError(f"NAT takes images [B, {channels}, H, W]; got {list(x.shape)}.")


_RENAMED = (
    (r"^d?i?nat\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights in our names, from the official layout or that of ``transformers``.

    ``transformers`` keeps query, key and value apart and both layer scales in one [2, C] tensor
    (``models/dinat/modeling_dinat.py``). Position biases of another window are interpolated
    bicubically, as the authors did from 7 x 7 to 11 x 11.
    """
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    if any("layernorm_before" in name for name in state_dict):
        found = _from_transformers(state_dict)
    else:
        found = {name.removeprefix("module."): value for name, value in state_dict.items()}
    own = model.state_dict()
    for name, value in found.items():
        if name.endswith(".rpb") and name in own and value.shape != own[name].shape:
            size = own[name].shape[1:]
            found[name] = F.interpolate(value[None], size, mode="bicubic")[0]
    return found


def _from_transformers(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Rename, and join what ``transformers`` keeps apart."""
    found: dict[str, Any] = {}
    for old, value in state_dict.items():
        name = old
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        if name.endswith(".layer_scale_parameters"):
            stem = name.removesuffix("layer_scale_parameters")
            found[f"{stem}gamma1"], found[f"{stem}gamma2"] = value
        elif not name.startswith("hidden_states_norms"):
            found[name] = value
    for name in [n for n in found if ".attn.query." in n]:
        parts = [found.pop(name.replace(".query.", f".{part}.")) for part in
                 ("query", "key", "value")]  # fmt: skip
        found[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return found


def cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """Timm's description of a checkpoint of this family."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2204.07143",
        **kwargs,
    }


_SITE = "https://shi-labs.com/projects/nat/checkpoints/CLS/"

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": cfg(_SITE + "nat_mini.pth"),
        "nat_tiny.in1k": cfg(_SITE + "nat_tiny.pth"),
        "nat_small.in1k": cfg(_SITE + "nat_small.pth"),
        "nat_base.in1k": cfg(_SITE + "nat_base.pth"),
    }
)


def create_nat(variant: str, pretrained: bool, **kwargs: Any) -> NAT:
    """Build a variant of this family, timm's way."""
    return build_model_with_cfg(
        NAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
TINY = {**MINI, "depths": (3, 4, 18, 5)}
SMALL = {"embed_dim": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
BASE = {**SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32)}
LARGE = {**SMALL, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini: 20.0 M parameters, 2.70 GMACs at 224."""
    return create_nat("nat_mini", pretrained, **{**MINI, **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny: 27.9 M parameters, 4.30 GMACs at 224."""
    return create_nat("nat_tiny", pretrained, **{**TINY, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small: 50.7 M parameters, 7.77 GMACs at 224."""
    return create_nat("nat_small", pretrained, **{**SMALL, "layer_scale": 1e-5, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base: 89.8 M parameters, 13.7 GMACs at 224."""
    return create_nat("nat_base", pretrained, **{**BASE, "layer_scale": 1e-5, **kwargs})
