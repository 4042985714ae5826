# SPDX-License-Identifier: Apache-2.0
"""The ideal of a reduced encoder does the method's work without the method's choice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import visprune
from visprune.eval.speed.ideal_vit import forward_shortened, has_ideal


def small(**args: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=96, embed_dim=64, depth=4, num_heads=2, **args
    ).eval()


@pytest.mark.parametrize("args", [{}, {"reg_tokens": 2}, {"init_values": 0.5}])
def test_all_tokens_are_the_dense_model(args: dict[str, Any]) -> None:
    model, pixels = small(**args), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(forward_shortened(model, pixels, [36] * 4, [36] * 4), model(pixels))


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("tome", {"r": 4}),
        ("evit", {"keep_ratio": 0.6}),
        ("topk", {"keep_ratio": 0.6}),
        ("random", {"keep_ratio": 0.6}),
    ],
)
def test_it_multiplies_what_the_method_does_but_for_the_choice(
    method: str, params: dict[str, Any]
) -> None:
    model, pixels = small(), torch.randn(1, 3, 96, 96)
    with visprune.prune(model, method, **params) as run, torch.no_grad():
        model(pixels)
        cost, trace = run.cost(), run.trace
    counts = trace.tokens_per_layer[0], trace.mlp_tokens_per_layer[0]
    assert counts[1][-1] < 36
    shadow = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward_shortened(shadow, pixels.to("meta"), *counts)
    assert counter.get_total_flops() // 2 == cost.parts["vision"]


def test_other_blocks_have_none() -> None:
    assert has_ideal(small())
    parallel = timm.models.vision_transformer.ParallelScalingBlock
    assert not has_ideal(small(block_fn=parallel))
