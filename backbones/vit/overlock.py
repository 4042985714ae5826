# SPDX-License-Identifier: Apache-2.0
"""OverLoCK (arXiv 2502.20087): a coarse look at the whole first, which then steers the finer one.

Base-Net (stages 1, 2 and half of 3) and Overview-Net (stage 4 of a small network) give a context
map; Focus-Net reads both, with kernels made per pixel (see ``contmix``). Module and parameter names
are those of LMMMEng/OverLoCK at 2c8ab3b, ``models/overlock.py``: the published files load without
renaming, into the training form (``overlock_*``) and the merged one (``overlock_*_reparam``, the
form that the published counts are of; it takes training files too and merges them).
``timm.utils.reparameterize_model`` merges a model.

Where it differs: it runs without natten; in training it returns logits, not a dictionary, and
:meth:`OverLoCK.forward_train` gives those of the context's head too (weight 0.4 in the paper);
``aux_head=False`` leaves that head out; LayerScale is one multiply-add; images of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from visprune.backbones.vit.flat_stages import FlatStages, Pointwise
from visprune.backbones.vit.overlock_blocks import (
    DownsampleBoth,
    DynamicConvBlock,
    RepConvBlock,
    stem,
)
from visprune.backbones.vit.overlock_parts import (
    DilatedReparam,
    conv_norm,
    merged_kernel,
    resized,
)
from visprune.errors import ConfigError

__all__ = ["OverLoCK"]  # register_model appends the names of the models


class OverLoCKOutput(NamedTuple):
    """What training reads of a forward.

    Attributes:
        logits: [B, classes].
        aux: [B, classes], of the context alone.
    """

    logits: Tensor
    aux: Tensor


class OverLoCK(FlatStages):
    """OverLoCK. Takes images of any size.

    Args:
        img_size: nominal image size; nothing in the model depends on it.
        in_chans: image channels.
        num_classes: classes of the head; 0 leaves it out.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"`` or ``""``.
        embed_dims: channels of the four stages.
        depths: static blocks of the four stages.
        sub_depths: dynamic blocks of the last two.
        kernel_sizes: large kernel of each stage.
        mlp_ratios: hidden over input channels of the static blocks, per stage.
        sub_heads: half the groups of the dynamic blocks, per stage.
        sub_mlp_ratios: as ``mlp_ratios``, of the dynamic blocks.
        small_kernel_size: of the dynamic blocks.
        layer_scales: start values of layer scale per stage; None: without.
        res_scale: layer scale on the shortcut and not on the branch.
        projection: channels that the head pools.
        deploy: merged form of the large kernels.
        aux_head: with the head of the context, which only :meth:`forward_train` runs.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: an argument, or the shape of an image, is not possible.
    """

    stage_parts = (
        ("patch_embed1", "blocks1"),
        ("patch_embed2", "blocks2"),
        ("patch_embed3", "blocks3", "patch_embed4", "blocks4", "high_level_proj", "sub_blocks3"),
        ("patch_embedx", "sub_blocks4"),
    )
    title = "OverLoCK"
    blocks3: nn.ModuleList
    blocks4: nn.ModuleList
    sub_blocks3: nn.ModuleList
    sub_blocks4: nn.ModuleList

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (56, 112, 256, 336),
        depths: Sequence[int] = (2, 2, 3, 2),
        sub_depths: Sequence[int] = (6, 2),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        sub_heads: Sequence[int] = (4, 6),
        sub_mlp_ratios: Sequence[float] = (3, 3),
        small_kernel_size: int = 5,
        layer_scales: Sequence[float | None] = (None, None, 1.0, 1.0),
        res_scale: bool = True,
        projection: int = 1024,
        deploy: bool = False,
        aux_head: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        of_stages = (embed_dims, depths, kernel_sizes, mlp_ratios, layer_scales)
        of_focus = (sub_depths, sub_heads, sub_mlp_ratios)
        if any(len(v) != 4 for v in of_stages) or any(len(v) != 2 for v in of_focus):
            raise ConfigError(
                "OverLoCK: embed_dims, depths, kernel_sizes, mlp_ratios and layer_scales have one "
                "entry for each of the four stages, sub_depths, sub_heads and sub_mlp_ratios for "
                f"the last two; got {', '.join(str(list(v)) for v in of_stages + of_focus)}."
            )
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.img_size = in_chans, to_2tuple(img_size)
        c1, c2, c3, c4 = embed_dims
        self.patch_embed1 = stem(in_chans, c1, dd)
        self.patch_embed2 = nn.Sequential(*conv_norm(c1, c2, dd, 3, 2))
        self.patch_embed3 = nn.Sequential(*conv_norm(c2, c3, dd, 3, 2))
        self.patch_embed4 = nn.Sequential(*conv_norm(c3, c4, dd, 3, 2))
        self.high_level_proj = Pointwise(c4, c4 // 4, **dd)
        self.patch_embedx = DownsampleBoth(c3, c4, c4 // 4, dd)
        counts = [*depths, *sub_depths]
        rates = torch.linspace(0, drop_path_rate, sum(counts), device="cpu").split(counts)
        for i, dim in enumerate(embed_dims):
            blocks = [
                RepConvBlock(dim, kernel_sizes[i], mlp_ratios[i], layer_scales[i], res_scale, p,
                             deploy, dd)
                for p in rates[i].tolist()
            ]  # fmt: skip
            setattr(self, f"blocks{i + 1}", nn.ModuleList(blocks))
        for i, dim in enumerate((c3, c4)):
            last = sub_depths[i] - 1
            dynamic = [
                DynamicConvBlock(
                    dim, c4, sub_heads[i], kernel_sizes[i + 2], small_kernel_size,
                    sub_mlp_ratios[i], layer_scales[i + 2], res_scale, p, i == j == 0,
                    i == 1 and j == last, deploy, dd,
                )
                for j, p in enumerate(rates[i + 4].tolist())
            ]  # fmt: skip
            setattr(self, f"sub_blocks{i + 3}", nn.ModuleList(dynamic))
        self._add_heads(c4, num_classes, projection, aux_head, dd)
        self._finish((c1, c2, c3, c4 + c4 // 4), num_classes, global_pool, drop_rate)

    def _add_heads(
        self, dim: int, num_classes: int, projection: int, aux_head: bool, dd: dict[str, Any]
    ) -> None:
        self.num_features = self.head_hidden_size = projection
        self.aux_head: nn.Module | None = None
        if aux_head and num_classes > 0:
            self.aux_head = nn.Sequential(
                nn.BatchNorm2d(dim, **dd), nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(dim, num_classes, 1, **dd),
            )  # fmt: skip
        self.num_classes = num_classes
        self.head = nn.Sequential(
            *conv_norm(dim + dim // 4, projection, dd),
            nn.SiLU(),
            nn.Identity(),  # the pooling of the official code: forward_head's, here
            self._new_classifier(dd) if num_classes > 0 else nn.Identity(),
        )

    def init_weights(self) -> None:
        """In place: truncated normal of 0.02 for convolutions, norms one and zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                nn.init.ones_(module.weight)
            else:
                getattr(module, "init_own_weights", lambda: None)()
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def overview(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map of stage 2 -> that of stage 3 and the context of stage 4."""
        x = self.run_blocks(self.blocks3, self.patch_embed3(x))
        return x, self.run_blocks(self.blocks4, self.patch_embed4(x))

    def run_stage(self, index: int, state: Any) -> Any:
        """One stage: from what the stage before it left, an image at first.

        Stages 0 and 1 leave a map; stage 2 the map, the context at its size and at its own, and
        what the head of the context reads; stage 3 the map that both are in, and that again.
        """
        if index < 2:
            embed, blocks = (getattr(self, name) for name in self.stage_parts[index])
            return self.run_blocks(blocks, embed(state))
        if index == 2:
            x, context = self.overview(state)
            low = self.high_level_proj(context)
            h_x = h_r = resized(low, x.shape[2:])
            for block in self.sub_blocks3:
                x, h_x = self.run_block(block, x, h_x, h_r)
            return x, h_x, low, context
        x, h_x, low, context = state
        x, h_x = self.patch_embedx(x, h_x)
        for block in self.sub_blocks4[:-1]:
            x, h_x = self.run_block(block, x, h_x, low)
        return self.run_block(self.sub_blocks4[-1], x, h_x, low), context

    def stage_map(self, state: Any) -> Tensor:
        """The first of what a stage left."""
        found: Tensor = state[0] if isinstance(state, tuple) else state
        return found

    def final_map(self, state: Any) -> Tensor:
        """The last map under the head's projection, which stands before the pooling."""
        x = self.stage_map(state)
        for layer in self.head[:3]:
            x = layer(x)
        return x

    def _classify(self, x: Tensor) -> Tensor:
        pooled = self.global_pool != ""
        x = x[:, :, None, None] if pooled else x
        x = self.get_classifier()(x)
        return x.flatten(1) if pooled else x

    def forward_train(self, x: Tensor) -> OverLoCKOutput:
        """Logits, and those of the context's own head.

        Args:
            x: images [B, 3, H, W].

        Raises:
            ConfigError: the model was built, or has been changed to be, without that head.
        """
        if self.aux_head is None or self.num_stages < 4:
            raise ConfigError("OverLoCK: forward_train reads the head of the context; build the "
                              "model with aux_head=True and with classes.")  # fmt: skip
        state: Any = self._start(x)
        for i in range(4):
            state = self.run_stage(i, state)
        aux = self.aux_head(state[1]).flatten(1)
        return OverLoCKOutput(self.forward_head(self.final_map(state)), aux)

    def get_classifier(self) -> nn.Module:
        """The last layer of the head, a 1 x 1 convolution."""
        found: nn.Module = self.head[4]
        return found

    def _set_classifier(self, layer: nn.Module) -> None:
        self.head[4] = layer
        if self.aux_head is None:
            return
        if self.num_classes <= 0:
            self.aux_head = None
            return
        aux: Any = self.aux_head
        old = aux[2]
        dd = {"device": old.weight.device, "dtype": old.weight.dtype}
        new = nn.Conv2d(old.in_channels, self.num_classes, 1, **dd)
        aux[2] = new.train(self.training)

    def _new_classifier(self, dd: dict[str, Any]) -> nn.Module:
        return nn.Conv2d(self.head_hidden_size, self.num_classes, 1, **dd)

    def _remove_head(self, last: int) -> None:
        for i in range(3):
            self.head[i] = nn.Identity()
        super()._remove_head(last)

    def no_weight_decay(self) -> set[str]:
        """The position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith((".rpb1", ".rpb2"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input to the output, for layer-wise learning rates."""
        if coarse:
            stages = {f"stage{i}": rf"^(?:{'|'.join(parts)})\."
                      for i, parts in enumerate(self.stage_parts)}  # fmt: skip
            return {"stem": r"^patch_embed1\.", **stages}
        parts = [part for stage in self.stage_parts for part in stage]
        return {part: rf"^{part}\.(\d+)" if "blocks" in part else rf"^{part}\." for part in parts}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """The weights of an official file of either form, merged where the model is.

    Raises:
        ConfigError: a file of the merged form for a model in training form.
    """
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    found = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if getattr(model, "aux_head", None) is None:
        found = {name: value for name, value in found.items() if not name.startswith("aux_head")}
    for name, module in model.named_modules():
        if not isinstance(module, DilatedReparam):
            continue
        branches = f"{name}.origin_bn.weight" in found
        if branches and module.deploy:
            first = f"{name}."
            own = {n.removeprefix(first): v for n, v in found.items() if n.startswith(first)}
            found = {n: v for n, v in found.items() if not n.startswith(first)}
            merged = merged_kernel(own, module.kernel_size)
            found[f"{name}.lk_origin.weight"], found[f"{name}.lk_origin.bias"] = merged
        elif not branches and not module.deploy:
            raise ConfigError(
                "These weights are of OverLoCK's merged form, and a merged form cannot be taken "
                "apart; build the model with deploy=True (overlock_*_reparam)."
            )
    return found


_RELEASE = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/"
_CROPS = {"xt": 0.925, "t": 0.95, "s": 0.95, "b": 0.975}


def _cfg(size: str, form: str) -> dict[str, Any]:
    return {
        "url": f"{_RELEASE}overlock_{size}_in1k_224{form}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": _CROPS[size],
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.0",
        "classifier": "head.4",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2502.20087",
    }


default_cfgs = generate_default_cfgs(
    {
        f"overlock_{size}{form}.in1k": _cfg(size, form)
        for size in _CROPS
        for form in ("", "_reparam")
    }
)

_SIZES: dict[str, dict[str, Any]] = {
    "xt": {"embed_dims": (56, 112, 256, 336), "depths": (2, 2, 3, 2), "sub_depths": (6, 2),
           "sub_heads": (4, 6)},
    "t": {"embed_dims": (64, 128, 256, 512), "depths": (4, 4, 6, 2), "sub_depths": (12, 2),
          "sub_heads": (4, 8)},
    "s": {"embed_dims": (64, 128, 320, 512), "depths": (6, 6, 8, 3), "sub_depths": (16, 3),
          "sub_heads": (8, 16)},
    "b": {"embed_dims": (80, 160, 384, 576), "depths": (8, 8, 10, 4), "sub_depths": (20, 4),
          "sub_heads": (6, 9)},
}  # fmt: skip


def _create(size: str, merged: bool, pretrained: bool, kwargs: dict[str, Any]) -> OverLoCK:
    return build_model_with_cfg(
        OverLoCK,
        f"overlock_{size}{'_reparam' if merged else ''}",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**_SIZES[size], "deploy": merged, **kwargs},
    )


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-XT in training form: 17.3 M parameters, 2.86 GMACs at 224."""
    return _create("xt", False, pretrained, kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-T in training form: 35.0 M parameters, 5.99 GMACs at 224."""
    return _create("t", False, pretrained, kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-S in training form: 58.3 M parameters, 10.4 GMACs at 224."""
    return _create("s", False, pretrained, kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-B in training form: 98.0 M parameters, 18.0 GMACs at 224."""
    return _create("b", False, pretrained, kwargs)


@register_model
def overlock_xt_reparam(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-XT, merged: 16.8 M parameters, 2.70 GMACs at 224."""
    return _create("xt", True, pretrained, kwargs)


@register_model
def overlock_t_reparam(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-T, merged: 34.0 M parameters, 5.65 GMACs at 224."""
    return _create("t", True, pretrained, kwargs)


@register_model
def overlock_s_reparam(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-S, merged: 56.7 M parameters, 9.89 GMACs at 224."""
    return _create("s", True, pretrained, kwargs)


@register_model
def overlock_b_reparam(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-B, merged: 95.5 M parameters, 17.1 GMACs at 224."""
    return _create("b", True, pretrained, kwargs)
