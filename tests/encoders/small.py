# SPDX-License-Identifier: Apache-2.0
"""Every configuration that timm registers for plain vision transformers, shrunk to run in tests."""

from __future__ import annotations

import functools
import re
from typing import Any

import timm
import torch
from torch import Tensor

import visprune

MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "eva")
STEMS = set(timm.list_models(module=MODULES[2]) + timm.list_models(module=MODULES[3]))
# A stem of convolutions has its full width: of names that differ in the size of pictures, one.
_SIZES = {re.sub(r"_\d{3}$", "", name): name for name in sorted(STEMS, reverse=True)}
NAMES = [
    name
    for module in MODULES
    for name in timm.list_models(module=module)
    if name not in STEMS or name in _SIZES.values()
]


def shrunk(name: str, **options: Any) -> Any:
    """``name`` with two layers, 48 features (a stem of convolutions fixes its own) and few patches.

    Weights are made large: at their initial size, a layer scale of 1e-5 hides what it multiplies.
    """
    torch.manual_seed(0)
    given: dict[str, Any] = {"depth": 2, "num_classes": 5, **options}
    if name not in STEMS:
        given = {"embed_dim": 48, "num_heads": 4, **given}
    if "sapiens2" in name:
        given["num_kv_heads"] = 2
    model = timm.create_model(name, **given)
    if name not in STEMS:
        patch = model.patch_embed.patch_size
        model.set_input_size(img_size=(4 * patch[0], 6 * patch[1]))
    return enlarged(model).eval()


def enlarged(model: Any) -> Any:
    """Draw all parameters anew, so that every one of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.2 * parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(1.0, 0.2)
    return model


def picture(model: Any, batch: int = 2, seed: int = 0) -> Tensor:
    """Pixels of the model's own input size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)


@functools.cache
def small(name: str = "vit_tiny_patch16_224", depth: int = 4) -> Any:
    """A model that tests share and leave as it was."""
    return shrunk(name, depth=depth)


# For encoders in which a merged token has no bias.
WITHOUT_MERGING: dict[str, dict[str, Any]] = {
    "topk": {"keep_ratio": 0.6},
    "evit": {"keep_ratio": 0.6},
    "random": {"keep_ratio": 0.6},
    "uniform": {"keep_ratio": 0.6},
    "dynamicvit": {"keep_ratio": 0.6},
    "ipcv": {"keep_ratio": 0.6, "attention_stabilization": 1},
}

# One of each kind of block, attention, pooling and position.
KINDS = {
    "plain": "vit_tiny_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "layer_scale": "deit3_small_patch16_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "average_no_class": "vit_base_patch16_gap_224",
    "average_registers": "vit_wee_patch16_reg1_gap_256",
    "siglip": "vit_base_patch16_siglip_224",
    "qk_norm_post": "vit_base_patch16_rpn_224",
    "side_by_side": "vit_base_patch16_xp_224",
    "two_in_parallel": "vit_small_patch16_18x2_224",
    "differential": "vit_dwee_patch16_reg1_gap_256",
    "eva_rope": "eva02_tiny_patch14_224",
    "dinov3": "vit_small_patch16_dinov3",
    "mixed_rope": "vit_small_patch16_rope_mixed_224",
    "perception": "vit_pe_core_tiny_patch16_384",
    "eva_post_norm": "eva02_enormous_patch14_clip_224",
}


def listed(name: str) -> set[str]:
    """The methods that the list of models says an encoder takes."""
    (row,) = (row for row in visprune.list_models("encoder") if row.name == name)
    return set(row.methods)
