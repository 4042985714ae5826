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


def test_peers_are_models_of_timm_at_the_size_of_their_figure() -> None:
    import visprune.backbones.vit  # noqa: F401
    from visprune.eval.speed.peers import PEERS, PUBLISHED, published

    assert len(PEERS) >= 6
    for name, peer in PUBLISHED.items():
        assert timm.is_model(name)
        assert published(f"{name}.some_weights") is peer
        assert 75.0 < peer.top1 < 87.0
    assert published("vit_tiny_patch16_224") is None


def test_a_peer_stands_in_the_table_with_its_accuracy() -> None:
    from visprune.eval.speed.bench_vit import measure

    rows = measure(
        "vit_tiny_patch16_224", 1, ["topk 0.7"], ["mobilenetv4_hybrid_medium"],
        rounds=1, size=64, depth=2,
    )  # fmt: skip
    assert [row["published_top1"] for row in rows] == [None, "81.5 @256"]
    # At its own size, not at that of the dense model here.
    assert rows[1]["gmacs"] == pytest.approx(1.27, rel=0.02)
    assert rows[1]["images_s"] > 0
