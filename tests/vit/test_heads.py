# SPDX-License-Identifier: Apache-2.0
"""Heads that read tokens, against the official outputs, and behind frozen encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visprune
from tests.vit.official import cases, load, stored
from tests.vit.shrunk import build, images
from visprune.backbones.vit.heads import (
    BranchOutput,
    EfficientProbing,
    MultiBranchAttention,
    MultiHeadBranches,
    ProbeHead,
    TokenProbe,
    branch_loss,
    mask_top_tokens,
)
from visprune.errors import ConfigError, UnsupportedModel

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
GRAD: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("case", cases("efficient_probing"), ids=lambda c: c["id"])
def test_official_probing(case: dict[str, Any]) -> None:
    (tensors, weights), p = stored(case), case["params"]
    pool: Any = EfficientProbing(p["dim"], p["num_queries"], p["d_out"], p["qkv_bias"])
    load(pool, weights)
    x = tensors["x"].requires_grad_()
    out = pool(x)
    torch.testing.assert_close(out, tensors["out"], **CLOSE)
    torch.testing.assert_close(pool.attention(x), tensors["attn"], **CLOSE)
    grads = torch.autograd.grad(out, (x, pool.cls_token, pool.v.weight), tensors["cotangent"])
    for name, grad in zip(("grad_x", "grad_cls_token", "grad_v"), grads, strict=True):
        torch.testing.assert_close(grad, tensors[name], **GRAD, msg=name)
    head = ProbeHead(p["dim"], p["num_classes"], p["num_queries"], p["d_out"]).eval()
    head.pool = pool
    own = {"running_mean": head.norm.running_mean, "running_var": head.norm.running_var}
    with torch.no_grad():
        for name, buffer in own.items():
            assert buffer is not None
            buffer.copy_(tensors[f"bn.{name}"])
        head.fc.weight.copy_(tensors["fc.weight"])
        head.fc.bias.copy_(tensors["fc.bias"])
        torch.testing.assert_close(head(x), tensors["logits"], **CLOSE)


@pytest.mark.parametrize(("queries", "d_out", "params"), [(32, 1, 614_400), (12, 1, 599_040)])
def test_published_parameters(queries: int, d_out: int, params: int) -> None:
    pool = EfficientProbing(768, queries, d_out)
    assert sum(p.numel() for p in pool.parameters()) == params


@pytest.mark.parametrize("case", cases("acmil"), ids=lambda c: c["id"])
def test_official_branches(case: dict[str, Any]) -> None:
    (tensors, weights), p = stored(case), case["params"]
    kind: Any = MultiBranchAttention if p["arch"] == "ga" else MultiHeadBranches
    extra = {"hidden_dim": p["D"]} if p["arch"] == "ga" else {}
    head: Any = kind(
        p["D_feat"], p["n_class"], p["D_inner"], num_branches=p["n_token"],
        masked_tokens=p["n_masked_patch"], mask_drop=p["mask_drop"], **extra,
    )  # fmt: skip
    load(head, weights).train(p["training"])
    x = tensors["x"].requires_grad_()
    uniform = tensors["uniform"][None] if "uniform" in tensors else None
    out = head.forward_train(x, uniform=uniform)
    torch.testing.assert_close(out.logits, tensors["bag"], **CLOSE)
    torch.testing.assert_close(out.branches[0], tensors["sub"], **CLOSE)
    scores = out.scores[0] if p["arch"] == "mha" else out.scores
    if uniform is not None:
        hidden = (scores[0] == -1e9).nonzero()[:, 1].view(p["n_token"], -1)
        want = tensors["masked_index"].sort(-1).values
        assert torch.equal(hidden, want.to(hidden.dtype))
        scores = scores.masked_fill(scores == -1e9, 0)
    torch.testing.assert_close(scores, tensors["attn"], **CLOSE)
    loss = branch_loss(out, torch.tensor([p["label"]]))
    torch.testing.assert_close(loss, tensors["loss"][0], **CLOSE)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, tensors["grad_x"], **GRAD)


HEADS: dict[str, Any] = {
    "probing": lambda: ProbeHead(32, 5, 4),
    "linear": lambda: ProbeHead(32, 5, 0),
    "branches": lambda: MultiBranchAttention(32, 5, num_branches=3),
    "queries": lambda: MultiHeadBranches(32, 5, num_heads=2, num_branches=3),
}


@pytest.mark.parametrize("name", HEADS)
def test_padding_is_not_seen_and_a_merged_token_counts_as_many(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name]().eval()
    x = torch.randn(3, 6, 32)
    with torch.no_grad():
        want = head(x)
        padded = torch.cat((x, 100 * torch.randn(3, 2, 32)), 1)
        mask = torch.arange(8).expand(3, 8) < 6
        torch.testing.assert_close(head(padded, mask), want)
        torch.testing.assert_close(head(x[1:2]), want[1:2])
        # The first token twice is the first token of size 2.
        twice = torch.cat((x[:, :1], x), 1)
        sizes = torch.tensor([2.0, 1, 1, 1, 1, 1]).expand(3, 6)
        torch.testing.assert_close(head(x, None, sizes), head(twice))
    with pytest.raises(ConfigError, match=r"mask must be \[3, 6\]"):
        head(x, mask)
    with pytest.raises(ConfigError, match="must be bool"):
        head(x, mask[:, :6].float())
    with pytest.raises(ConfigError, match=r"tokens \[B, N, 32\], N at least 1; got \[3, 0, 32\]"):
        head(x[:, :0])


def test_masking_hides_a_random_part_of_the_best() -> None:
    scores = torch.randn(2, 3, 50)
    best = scores.topk(10).indices
    seen = torch.zeros(2, 3, 50)
    for _ in range(40):
        masked = mask_top_tokens(scores, 10, 0.6)
        hidden = masked == -1e9
        assert (hidden.sum(-1) == 6).all()
        assert torch.equal(masked[~hidden], scores[~hidden])
        seen += hidden
    assert (seen.gather(-1, best) > 0).all()
    assert seen.sum() == seen.gather(-1, best).sum()
    assert mask_top_tokens(scores, 10, 0.0) is scores
    assert (mask_top_tokens(scores[..., :5], 10, 1.0) == -1e9).all()
    with pytest.raises(ConfigError, match=r"drop must be in 0\.\.1"):
        mask_top_tokens(scores, 10, 1.5)
    with pytest.raises(ConfigError, match=r"uniform must be \[2, 3, 10\]"):
        mask_top_tokens(scores, 10, 0.6, torch.rand(10))


def test_masking_is_of_training_alone_and_batches_are_their_samples() -> None:
    head = MultiBranchAttention(32, 5, num_branches=3, masked_tokens=4).train()
    x, uniform = torch.randn(2, 20, 32), torch.rand(2, 3, 4)
    whole = head.forward_train(x, uniform=uniform)
    assert (whole.scores == -1e9).sum() == 2 * 3 * 2
    for i in range(2):
        one = head.forward_train(x[i : i + 1], uniform=uniform[i : i + 1])
        for a, b in zip(whole, one, strict=True):
            torch.testing.assert_close(a[i : i + 1], b)
    target = torch.tensor([1, 3])
    parts = [branch_loss(BranchOutput(*(t[i : i + 1] for t in whole)), target[i : i + 1])
             for i in range(2)]  # fmt: skip
    torch.testing.assert_close(branch_loss(whole, target), torch.stack(parts).mean())
    head.eval()
    assert not (head.forward_train(x).scores == -1e9).any()
    assert torch.equal(head(x), head.forward_train(x).logits)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "litv2_s", "overlock_xt", "van_b0"])
def test_a_frozen_encoder_and_a_head_that_learns(name: str) -> None:
    encoder = build(name)
    before = {n: v.clone() for n, v in encoder.state_dict().items()}
    dim = 32 if name.startswith("deit") else encoder.num_features
    probe = TokenProbe(encoder, ProbeHead(dim, 5, 4)).train()
    assert not encoder.training
    x, target = images(8), torch.arange(8) % 5
    optimizer = torch.optim.AdamW((p for p in probe.parameters() if p.requires_grad), 1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(probe(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(v, before[n]) for n, v in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_it_sees_the_tokens_that_pruning_left() -> None:
    encoder = build("deit_tiny_patch16_224")
    probe = TokenProbe(encoder, ProbeHead(32, 5, 4)).eval()
    dense = probe.tokens(images())
    assert dense.shape == (2, 16, 32)
    assert torch.equal(dense, encoder.forward_features(images())[:, 1:])
    run = visprune.prune(encoder, "topk", keep_ratio=0.5, layers=[1])
    left = probe.tokens(images())
    assert left.shape[1] < 16
    assert probe(images()).shape == (2, 5)
    run.remove()
    assert torch.equal(probe.tokens(images()), dense)
    whole = TokenProbe(encoder, ProbeHead(32, 5, 4), keep_prefix=True)
    assert whole.tokens(images()).shape == (2, 17, 32)


def test_encoders_of_other_libraries() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=64, patch_size=16,
    )  # fmt: skip
    clip = CLIPVisionModel(config)
    with pytest.raises(ConfigError, match="give num_prefix_tokens"):
        TokenProbe(clip, ProbeHead(32, 5, 4))
    probe = TokenProbe(clip, ProbeHead(32, 5, 4), num_prefix_tokens=1).eval()
    assert probe.tokens(images()).shape == (2, 16, 32)
    pooled = TokenProbe(nn.Flatten(), ProbeHead(32, 5, 4), num_prefix_tokens=0)
    with pytest.raises(UnsupportedModel, match=r"Flatten gives Tensor\[2, 12288\]"):
        pooled(images())


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="same number of the dim / d_out channels"):
        EfficientProbing(32, 5)
    with pytest.raises(ConfigError, match="multiple of num_heads; got 16 and 3"):
        MultiHeadBranches(32, 5, num_heads=3)
    with pytest.raises(ConfigError, match="at least 1"):
        MultiBranchAttention(32, 5, num_branches=0)
    with pytest.raises(ConfigError, match=r"mask_drop must be in 0\.\.1; got 2"):
        MultiBranchAttention(32, 5, mask_drop=2)
    assert isinstance(MultiBranchAttention(32, 5).eval()(torch.randn(1, 1, 32)), Tensor)
