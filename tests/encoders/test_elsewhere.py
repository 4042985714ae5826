# SPDX-License-Identifier: Apache-2.0
"""Encoders of transformers, timm's feature wrapper, and half precision."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import visprune
from tests.encoders import oracle, small

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip


def built(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "siglip":
        model: Any = SiglipVisionModel(SiglipVisionConfig(**SIZES))
    else:
        config = CLIPVisionConfig(**SIZES, projection_dim=8)
        model = (CLIPVisionModel if kind == "clip" else CLIPVisionModelWithProjection)(config)
    return small.enlarged(model).eval()


def answer(model: Any, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output


@pytest.mark.parametrize("kind", ["clip", "projected", "siglip"])
@torch.no_grad()
def test_encoders_of_transformers(kind: str) -> None:
    model = built(kind)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = answer(model, x)
    with visprune.prune(model, "tome", r=0):
        assert torch.equal(answer(model, x), want)
    with visprune.prune(model, "tome", r=3) as run:
        both = answer(model, x)
        assert run.trace.tokens_per_layer == [[16, 13, 10]] * 2
        for row in range(2):
            oracle.assert_close(answer(model, x[row : row + 1]), both[row : row + 1])
    assert not torch.equal(both, want)
    assert torch.equal(answer(model, x), want)


@torch.no_grad()
def test_attention_pooling_of_siglip_weighs_by_size() -> None:
    model = built("siglip")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pooler = next(m for n, m in model.named_modules() if n.endswith("head"))
    with visprune.prune(model, "tome", r=4) as run:
        out = model(x)
        whole = run.expand(out.last_hidden_state)
    assert whole.shape == (2, 16, 32)
    oracle.assert_close(out.pooler_output, pooler(whole))


@torch.no_grad()
def test_the_feature_wrapper_of_timm() -> None:
    net = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(1, 3), depth=4)
    x = torch.randn(1, 3, 224, 224)
    with visprune.prune(net.eval(), "tome", r=30) as run:
        assert [f.shape[-2:] for f in net(x)] == [(14, 14), (14, 14)]
        assert run.trace.tokens_per_layer == [[196, 166, 136, 106]]


@torch.no_grad()
def test_half_precision() -> None:
    model = small.shrunk("vit_tiny_patch16_224", depth=4).bfloat16()
    x = small.picture(model).bfloat16()
    want = model(x)
    with visprune.prune(model, "tome", r=0):
        assert torch.equal(model(x), want)
    with visprune.prune(model, "tome", r=3):
        assert model(x).dtype == torch.bfloat16
    whole = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16), visprune.prune(whole, "evit"):
        assert bool(whole(x.float()).isfinite().all())
