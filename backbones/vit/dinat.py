# SPDX-License-Identifier: Apache-2.0
"""DiNAT (arXiv 2209.15001): NAT whose every other block sees a dilated neighborhood.

Dilations as in SHI-Labs/Neighborhood-Attention-Transformer at a66e80b, ``classification/dinat.py``:
the largest that fits the map at the training size, in every second block. The same file gives
DiNAT-Base layer scale and DiNAT-Small none.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model

from visprune.backbones.vit.nat import BASE, LARGE, MINI, NAT, SMALL, TINY, cfg, create_nat

__all__: list[str] = []  # register_model appends the names of the models

AT_224 = ((1, 8, 1), (1, 4), (1, 2), (1,))
AT_384 = ((1, 13, 1), (1, 6), (1, 3), (1,))

_SITE = "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/"
_SITE_22K = "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/"
_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}


def _cfg(file: str, site: str = _SITE, **kwargs: Any) -> dict[str, Any]:
    return cfg(site + file + ".pth", paper_ids="arXiv:2209.15001", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "dinat_mini.in1k": _cfg("dinat_mini_in1k_224"),
        "dinat_tiny.in1k": _cfg("dinat_tiny_in1k_224"),
        "dinat_small.in1k": _cfg("dinat_small_in1k_224"),
        "dinat_base.in1k": _cfg("dinat_base_in1k_224"),
        "dinat_large.in22k_ft_in1k": _cfg("dinat_large_in22k_in1k_224"),
        "dinat_large.in22k": _cfg("dinat_large_in22k_224", _SITE_22K, num_classes=21841),
        "dinat_large_384.in22k_ft_in1k": _cfg("dinat_large_in22k_in1k_384", **_384),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg("dinat_large_in22k_in1k_384_11x11", **_384),
    }
)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini: NAT-Mini with dilations."""
    return create_nat("dinat_mini", pretrained, **{**MINI, "dilations": AT_224, **kwargs})


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny: NAT-Tiny with dilations."""
    return create_nat("dinat_tiny", pretrained, **{**TINY, "dilations": AT_224, **kwargs})


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small: NAT-Small with dilations, without layer scale."""
    return create_nat("dinat_small", pretrained, **{**SMALL, "dilations": AT_224, **kwargs})


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base: NAT-Base with dilations."""
    args = {**BASE, "layer_scale": 1e-5, "dilations": AT_224, **kwargs}
    return create_nat("dinat_base", pretrained, **args)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large: 200.9 M parameters, 30.5 GMACs at 224."""
    return create_nat("dinat_large", pretrained, **{**LARGE, "dilations": AT_224, **kwargs})


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large at 384 pixels, with the dilations of that size: 89.5 GMACs."""
    args = {**LARGE, "img_size": 384, "dilations": AT_384, **kwargs}
    return create_nat("dinat_large_384", pretrained, **args)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large at 384 pixels with 11 x 11 windows."""
    args = {**LARGE, "img_size": 384, "kernel_size": 11, "dilations": AT_224, **kwargs}
    return create_nat("dinat_large_384_11x11", pretrained, **args)
