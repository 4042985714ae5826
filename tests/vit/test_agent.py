# SPDX-License-Identifier: Apache-2.0
"""Agent attention and Agent-DeiT against the official outputs and counts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from tests.vit.official import cases, digest, gmacs, load, published, stored
from tests.vit.shrunk import build, images
from visprune.backbones.vit import AgentAttention, AgentViT
from visprune.backbones.vit.agent_deit import checkpoint_filter_fn
from visprune.errors import ConfigError

VARIANTS = published("agent_deit")


@pytest.mark.parametrize("case", cases("agent_attention"), ids=lambda c: c["id"])
def test_official_attention(case: dict[str, Any]) -> None:
    tensors, weights = stored(case)
    p = case["params"]
    window = (p["window"], p["window"])
    attn = AgentAttention(
        p["dim"], p["num_heads"], window, p["agent_num"], qkv_bias=p["qkv_bias"]
    )  # fmt: skip
    load(attn, weights)
    x = tensors["x"].requires_grad_()
    out = attn(x)
    torch.testing.assert_close(out, tensors["out"], rtol=1e-5, atol=2e-6)
    (grad,) = torch.autograd.grad(out, x, tensors["cotangent"])
    torch.testing.assert_close(grad, tensors["grad_x"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", cases("agent_deit"), ids=lambda c: c["id"])
def test_official_model(case: dict[str, Any]) -> None:
    tensors, weights = stored(case)
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
             "num_classes", "agent_num", "agent_layer")  # fmt: skip
    model = AgentViT(**{name: case["params"][name] for name in names})
    load(model, weights)
    with torch.no_grad():
        features = model.forward_features(tensors["x"])[:, 0]
        torch.testing.assert_close(features, tensors["features"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(tensors["x"]), tensors["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_names_and_counts(name: str) -> None:
    model, want = timm.create_model(name, device="meta").eval(), VARIANTS[name]
    assert sum(p.numel() for p in model.parameters()) == want["parameters"]
    assert digest(model) == (want["keys"], want["sha256"])
    assert gmacs(model, model.pretrained_cfg["input_size"][1]) == pytest.approx(
        want["gmacs"], abs=5e-4
    )


def test_other_sizes() -> None:
    small = build("agent_deit_tiny")
    dynamic = build("agent_deit_tiny", dynamic_img_size=True)
    x = images(2, 96, 128)
    with torch.no_grad():
        assert torch.equal(dynamic(images()), small(images()))
        want = dynamic(x)
        assert not torch.equal(dynamic(images()), want)
        small.set_input_size((96, 128))
        torch.testing.assert_close(small(x), want, rtol=1e-4, atol=1e-5)
    attn = small.blocks[0].attn
    assert attn.window_size == (6, 8)
    assert attn.ha_bias.shape == (1, 2, 6, 1, 4)
    assert attn.aw_bias.shape == (1, 2, 4, 1, 8)


def test_files_of_another_size_and_of_a_dense_model() -> None:
    small, large = build("agent_deit_tiny"), build("agent_deit_tiny", img_size=96)
    filtered = checkpoint_filter_fn({"model": small.state_dict()}, large)
    large.load_state_dict(filtered)
    small.set_input_size(96)
    with torch.no_grad():
        torch.testing.assert_close(small(images(1, 96, 96)), large(images(1, 96, 96)))
    dense = build("deit_tiny_patch16_224")
    before = large.blocks[1].attn.an_bias.clone()
    large.load_state_dict(checkpoint_filter_fn(dense.state_dict(), large))
    assert torch.equal(large.blocks[1].attn.an_bias, before)
    assert torch.equal(large.blocks[1].attn.qkv.weight, dense.blocks[1].attn.qkv.weight)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"square number such as 49; got 48"):
        AgentAttention(32, 4, agent_num=48)
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        AgentAttention(30, 4)
    with pytest.raises(ConfigError, match="four parts"):
        build("agent_deit_tiny", agent_num=(4, 4))
    with pytest.raises(ConfigError, match=r"all tokens: 1 \+ 14 x 14; got 50"):
        AgentAttention(32, 4)(torch.randn(1, 50, 32))
    with pytest.raises(ConfigError, match="attn_mask"):
        AgentAttention(32, 4)(torch.randn(1, 197, 32), is_causal=True)


def test_no_prefix_and_dropout() -> None:
    attn = AgentAttention(32, 4, (3, 5), 4, num_prefix_tokens=0, attn_drop=0.5)
    x = torch.randn(2, 15, 32)
    assert not hasattr(attn, "ac_bias")
    assert torch.equal(attn.eval()(x), attn(x))
    assert not torch.equal(attn.train()(x), attn(x))
