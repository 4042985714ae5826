# SPDX-License-Identifier: Apache-2.0
"""Every registered name of ``visprune.backbones.vit``, small: same structure, few channels."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

import visprune.backbones.vit

SIZE = 64

_LITV2 = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4)}
_NAT = {"embed_dim": 16, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 4), "kernel_size": 3}
_VAN = {"embed_dims": (16, 32, 64, 128), "depths": (1, 2, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
_OVERLOCK = {
    "embed_dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "sub_depths": (2, 1),
    "sub_heads": (2, 4), "kernel_sizes": (9, 7, 5, 5), "mlp_ratios": (2, 2, 2, 2),
    "sub_mlp_ratios": (1, 2), "projection": 48,
}  # fmt: skip

_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}

LITV2 = [f"litv2_{size}{at}" for at in ("", "_384") for size in "smb"]
NAT = [f"nat_{size}" for size in ("mini", "tiny", "small", "base")]
DINAT = [f"dinat_{size}" for size in ("mini", "tiny", "small", "base", "large")]
DINAT += ["dinat_large_384", "dinat_large_384_11x11"]
SPARSIFINER = [f"sparsifiner_deit_{size}" for size in ("tiny", "small", "base")]
AGENT = [f"agent_deit_{size}" for size in ("tiny", "small", "small_448", "base")]
VAN = [f"van_b{i}" for i in range(7)]
OVERLOCK = [f"overlock_{s}{form}" for s in ("xt", "t", "s", "b") for form in ("", "_reparam")]
FLAT = VAN + OVERLOCK  # stages under flat names
STAGED = LITV2 + NAT + DINAT
PLAIN = SPARSIFINER + AGENT  # the structure of a ViT
NAMES = STAGED + FLAT + PLAIN
# Small, the sizes of a family are alike; where a test takes long, one per structure will do.
DISTINCT = ["litv2_s", "nat_mini", "nat_small", "dinat_mini", "sparsifiner_deit_tiny"]
DISTINCT += ["agent_deit_tiny", "van_b0", "overlock_xt"]

assert visprune.backbones.vit.LITv2


def small_kwargs(name: str) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that make ``name`` small."""
    kwargs: dict[str, Any] = _VIT if name in PLAIN or name.startswith("deit") else _NAT
    kwargs = _LITV2 if name.startswith("litv2") else kwargs
    kwargs = _VAN if name in VAN else kwargs
    kwargs = _OVERLOCK if name in OVERLOCK else kwargs
    if name in AGENT:
        kwargs = {**kwargs, "agent_num": (4, 4, 4, 4), "agent_layer": 1 if "base" in name else 0}
    return {**kwargs, "img_size": SIZE, "num_classes": 5}


def build(name: str, seed: int = 0, **kwargs: Any) -> Any:
    """A small model with random weights large enough to matter, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**small_kwargs(name), **kwargs})
    stir(model)
    return model.eval()


def stir(model: nn.Module) -> None:
    """Give biases, offsets, norms and layer scales values that a slip would show in."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_offset.weight" in name:  # starts at zero; more would leave the map altogether
                parameter.add_(torch.randn_like(parameter) * 0.02)
            elif parameter.ndim < 2 or "gamma" in name or "beta" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(3)


def images(batch: int = 2, height: int = SIZE, width: int = SIZE, seed: int = 0) -> torch.Tensor:
    """Random images."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
