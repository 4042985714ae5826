# SPDX-License-Identifier: Apache-2.0
"""State-dict names as the official repositories define them, written down apart from our code."""

from __future__ import annotations

from typing import Any

import timm
import torch

import visprune.backbones.vit  # noqa: F401 - registers the models


def linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def conv(name: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def batch_norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    running = {f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)}
    return {**norm(name, dim), **running, f"{name}.num_batches_tracked": ()}


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def litv2(dim: int, depths: tuple[int, ...], low: int) -> dict[str, tuple[int, ...]]:
    """ziplab/LITv2 at 7501c86, classification/models; ``low``: Lo-Fi channels of stage 3."""
    want = {**conv("patch_embed.proj", dim, 3, 4, 4), **norm("patch_embed.norm", dim)}
    for i, depth in enumerate(depths):
        c = dim * 2**i
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}"
            if i >= 2:
                lo, hi = (low, c - low) if i == 2 else (c, 0)
                want |= norm(f"{at}.norm1", c)
                want |= linear(f"{at}.attn.l_q", lo, c) | linear(f"{at}.attn.l_kv", 2 * lo, c)
                want |= linear(f"{at}.attn.l_proj", lo, lo)
                if hi:
                    want |= linear(f"{at}.attn.h_qkv", 3 * hi, c)
                    want |= linear(f"{at}.attn.h_proj", hi, hi)
            want |= norm(f"{at}.norm2", c) | linear(f"{at}.mlp.fc1", 4 * c, c)
            want |= conv(f"{at}.mlp.dwconv.dwconv", 4 * c, 1, 3, 3)
            want |= linear(f"{at}.mlp.fc2", c, 4 * c)
        if i < 3:
            at = f"layers.{i}.downsample"
            want |= conv(f"{at}.dconv", 2 * c, c, 2, 2) | conv(
                f"{at}.dconv.conv_offset", 8, c, 2, 2
            )
            want |= batch_norm(f"{at}.norm_layer", 2 * c)
    return {**want, **norm("norm", 8 * dim), **linear("head", 1000, 8 * dim)}


def nat(
    dim: int, depths: tuple[int, ...], heads: int, ratio: int, gamma: bool
) -> dict[str, tuple[int, ...]]:
    """SHI-Labs/Neighborhood-Attention-Transformer at d334f5b, classification/nat.py."""
    want = conv("patch_embed.proj.0", dim // 2, 3, 3, 3)
    want |= conv("patch_embed.proj.1", dim, dim // 2, 3, 3) | norm("patch_embed.norm", dim)
    for i, depth in enumerate(depths):
        c = dim * 2**i
        for j in range(depth):
            at = f"levels.{i}.blocks.{j}"
            want |= norm(f"{at}.norm1", c) | norm(f"{at}.norm2", c)
            want |= linear(f"{at}.attn.qkv", 3 * c, c) | linear(f"{at}.attn.proj", c, c)
            want[f"{at}.attn.rpb"] = (heads * 2**i, 13, 13)
            want |= linear(f"{at}.mlp.fc1", ratio * c, c) | linear(f"{at}.mlp.fc2", c, ratio * c)
            if gamma:
                want |= {f"{at}.gamma1": (c,), f"{at}.gamma2": (c,)}
        if i < 3:
            want |= conv(f"levels.{i}.downsample.reduction", 2 * c, c, 3, 3, bias=False)
            want |= norm(f"levels.{i}.downsample.norm", 2 * c)
    return {**want, **norm("norm", 8 * dim), **linear("head", 1000, 8 * dim)}


def test_litv2_names() -> None:
    for name, args in {
        "litv2_s": (96, (2, 2, 6, 2), 320),
        "litv2_m": (96, (2, 2, 18, 2), 320),
        "litv2_b": (128, (2, 2, 18, 2), 448),
    }.items():
        assert shapes(timm.create_model(name, device="meta")) == litv2(*args), name


def test_nat_names() -> None:
    for name, args in {
        "nat_mini": (64, (3, 4, 6, 5), 2, 3, False),
        "nat_tiny": (64, (3, 4, 18, 5), 2, 3, False),
        "nat_small": (96, (3, 4, 18, 5), 3, 2, True),
        "nat_base": (128, (3, 4, 18, 5), 4, 2, True),
        "dinat_mini": (64, (3, 4, 6, 5), 2, 3, False),
        "dinat_small": (96, (3, 4, 18, 5), 3, 2, False),
        "dinat_base": (128, (3, 4, 18, 5), 4, 2, True),
        "dinat_large": (192, (3, 4, 18, 5), 6, 2, False),
    }.items():
        assert shapes(timm.create_model(name, device="meta")) == nat(*args), name


def test_the_head_fits_another_number_of_classes() -> None:
    model = timm.create_model("dinat_large", num_classes=21841, device="meta")
    assert model.head.weight.shape == (21841, 1536)
    assert torch.get_default_dtype() == model.head.weight.dtype
