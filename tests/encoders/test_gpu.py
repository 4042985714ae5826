# SPDX-License-Identifier: Apache-2.0
"""Token reduction in image encoders on a CUDA device, beside the CPU.

Run where there is one with ``pytest -m gpu``; elsewhere pytest counts these as deselected.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

import visprune
import visprune.backbones.vit  # registers the models
from tests.encoders import small

pytestmark = pytest.mark.gpu

METHODS: dict[str, dict[str, Any]] = {
    "tome": {"r": 3},
    "pitome": {"keep_ratio": 0.8},
    "evit": {"keep_ratio": 0.6},
    "topk": {"keep_ratio": 0.6},
    "dynamicvit": {"keep_ratio": 0.6},
    "random": {"keep_ratio": 0.6},
}
MODELS: dict[str, dict[str, Any]] = {
    "litv2_s": {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "nat_mini": {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "dinat_mini": {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "sparsifiner_deit_tiny": {"embed_dim": 64, "depth": 3, "num_heads": 2},
    "agent_deit_tiny": {"embed_dim": 64, "depth": 3, "num_heads": 2},
    "van_b0": {"depths": [1, 1, 1, 1]},
    "overlock_xt": {"depths": [1, 1, 1, 1], "sub_depths": [2, 1]},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "distilled", "registers", "eva_rope"])
@torch.no_grad()
def test_a_reduced_encoder_is_that_of_the_cpu(kind: str, method: str) -> None:
    model = small.small(small.KINDS[kind])
    x = small.picture(model, batch=3)
    there = copy.deepcopy(model).cuda()
    params = dict(METHODS[method])
    if method in ("random", "dynamicvit"):  # their draws are of the device's own generator
        with visprune.prune(there, method, **params) as run:
            assert there(x.cuda()).isfinite().all()
            assert len(run.kept[0]) < model.patch_embed.num_patches
        return
    found = []
    for encoder, pixels in ((model, x), (there, x.cuda())):
        with visprune.prune(encoder, method, **params) as run:
            found.append((encoder(pixels).cpu(), torch.stack(run.kept).cpu()))
    (want, kept), (got, same) = found
    assert torch.equal(same, kept)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(small.small()).to("cuda", dtype)
    x = small.picture(model).to("cuda", dtype)
    with visprune.prune(model, method, **METHODS[method]):
        assert model(x).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_efficient_models_are_those_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **MODELS[name]).eval()
    there = copy.deepcopy(model).cuda()
    x = torch.randn(2, 3, 224, 224)
    want, got = model(x), there(x.cuda())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)
    want.square().sum().backward()
    got.square().sum().backward()
    for (key, a), b in zip(model.named_parameters(), there.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None, key
            error = (b.grad.cpu() - a.grad).norm() / a.grad.norm().clamp(min=1e-6)
            assert error < 1e-2, (key, float(error))


@pytest.mark.parametrize("name", MODELS)
def test_efficient_models_train_in_bf16_autocast(name: str) -> None:
    model = timm.create_model(name, num_classes=7, **MODELS[name]).cuda()
    x = torch.randn(2, 3, 224, 224, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
