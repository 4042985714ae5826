# SPDX-License-Identifier: Apache-2.0
"""Autocast stops at an operator: what is promised in fp32 is fp32, forward and backward."""

from __future__ import annotations

import timm
import torch
from torch import nn

import visprune.backbones.vit
from tests.kernels.test_kernels import CASES, by_id, run
from visprune import ops
from visprune.kernels.common.spec import Case

assert visprune.backbones.vit.LITv2


@by_id(CASES)
def test_the_same_bits_inside_autocast(case: Case) -> None:
    """Gradients too, taken inside the block, where a backward sees autocast as well."""
    plain, plain_grads = run(case, case.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        got, grads = run(case, case.inputs())
    assert got.dtype == plain.dtype
    assert torch.equal(got, plain)
    for name, grad in plain_grads.items():
        assert grads[name].dtype == grad.dtype
        assert torch.equal(grads[name], grad), name


def test_matching_in_plain_pytorch_is_fp32_too() -> None:
    metric = torch.randn(4, 200, 64, generator=torch.Generator().manual_seed(0))
    want = ops.bipartite_pairs(metric, 60, prefix=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.bipartite_pairs(metric, 60, prefix=1)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_hilo_trains_with_its_backward_inside_autocast() -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4), "num_classes": 5}
    model = timm.create_model("litv2_s", img_size=64, **small)
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_projections_of_a_hilo_layer_are_still_cast() -> None:
    qkv, proj = nn.Linear(16, 48), nn.Linear(16, 16)
    x = torch.randn(1, 4, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.hilo_layer(x, 8, (qkv.weight, qkv.bias), (proj.weight, proj.bias))
    assert out.dtype == torch.bfloat16
