# SPDX-License-Identifier: Apache-2.0
"""Parameters exactly, multiply-adds to three digits, as published."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visprune.backbones.vit  # noqa: F401 - registers the models
from visprune.backbones.vit import NeighborhoodAttention2d
from visprune.backbones.vit.token_merging import TokenMerging


def meta(name: str) -> Any:
    return timm.create_model(name, device="meta").eval()


def counted(model: nn.Module, size: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def elements(model: nn.Module, size: int, kinds: tuple[type[nn.Module], ...]) -> int:
    """Output elements of all modules of these kinds."""
    total = 0

    def add(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        nonlocal total
        total += out.numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(
    ("name", "params", "gmacs", "published"),
    [
        ("litv2_s", 27_844_000, 3.734, 3.7),
        ("litv2_m", 48_830_368, 7.479, 7.5),
        ("litv2_b", 86_520_704, 13.194, 13.2),
        ("litv2_b_384", 86_520_704, 39.709, 39.7),
    ],
)
def test_litv2(name: str, params: int, gmacs: float, published: float) -> None:
    model = meta(name)
    assert sum(p.numel() for p in model.parameters()) == params
    size = model.pretrained_cfg["input_size"][1]
    macs = counted(model, size)
    # The official count adds one per element of a norm and of a convolution with bias (the patch
    # embedding apart), four offset channels too many per merge, and the pooling.
    norms = elements(model, size, (nn.LayerNorm, nn.BatchNorm2d))
    norms -= model.stages[-1].blocks[-1].norm2.weight.numel() * (size // 32) ** 2  # the last norm
    convolutions = elements(model, size, (nn.Conv2d, TokenMerging))
    convolutions -= model.embed_dim * (size // 4) ** 2
    offsets = sum(
        4 * (4 * s.downsample.dconv.weight.shape[1] + 1) * (size // (8 * 2**i)) ** 2
        for i, s in enumerate(model.stages[:-1])
    )
    pool = model.num_features * (size // 4) ** 2 // 16
    official = macs + norms + convolutions + offsets + pool
    assert round(official / 1e9, 3) == gmacs
    assert round(official / 1e9, 1) == published
    assert 0.99 < macs / official < 1


@pytest.mark.parametrize(
    ("alpha", "gmacs"),
    [(0.0, 3.965), (0.2, 3.881), (0.4, 3.815), (0.5, 3.769), (0.7, 3.742), (0.9, 3.734),
     (1.0, 3.746)],
)  # fmt: skip
def test_litv2_s_over_alpha(alpha: float, gmacs: float) -> None:
    # The published sweep; what the official count adds does not depend on alpha.
    base = counted(meta("litv2_s"), 224)
    other = counted(timm.create_model("litv2_s", alpha=alpha, device="meta").eval(), 224)
    assert (other - base) / 1e9 == pytest.approx(gmacs - 3.734, abs=0.0011)


NAT = [
    ("nat_mini", 19_984_174, 2.695),
    ("nat_tiny", 27_901_582, 4.295),
    ("nat_small", 50_743_297, 7.772),
    ("nat_base", 89_769_652, 13.677),
    ("dinat_mini", 19_984_174, 2.695),
    ("dinat_tiny", 27_901_582, 4.295),
    ("dinat_small", 50_719_681, 7.772),
    ("dinat_base", 89_769_652, 13.677),
    ("dinat_large", 200_943_514, 30.46),
    ("dinat_large_384", 200_943_514, 89.5),
]


@pytest.mark.parametrize(("name", "params", "gmacs"), NAT)
def test_nat(name: str, params: int, gmacs: float) -> None:
    model = meta(name)
    assert sum(p.numel() for p in model.parameters()) == params
    macs = counted(model, model.pretrained_cfg["input_size"][1])
    digits = len(str(gmacs).partition(".")[2])
    assert round(macs / 1e9, digits) == gmacs


def test_dilations_of_every_block() -> None:
    def dilations(name: str) -> list[list[int]]:
        return [
            [m.dilation[0] for m in stage.modules() if isinstance(m, NeighborhoodAttention2d)]
            for stage in meta(name).stages
        ]

    assert dilations("dinat_tiny") == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
    assert dilations("dinat_mini") == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    assert dilations("dinat_large_384") == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    assert dilations("nat_mini") == [[1] * 3, [1] * 4, [1] * 6, [1] * 5]
    eleven = meta("dinat_large_384_11x11").stages[0].blocks[0].attn
    assert eleven.kernel_size == (11, 11)
