# SPDX-License-Identifier: Apache-2.0
"""DynamicViT in training: hidden keys, gradients as the written-out rule has them, weights kept."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.encoders import oracle, small
from visprune.errors import UnsupportedModel
from visprune.methods.dynamicvit import DynamicViT, Predictor


def test_in_training_a_dropped_patch_is_no_key() -> None:
    model = small.shrunk("vit_tiny_patch16_224", depth=4)
    x = small.picture(model)
    with visprune.prune(model, "dynamicvit", keep_ratio=0.6) as run:
        model.train()
        torch.manual_seed(3)
        got = model.forward_features(x)
        draws = run.decisions
        assert run.ratios == pytest.approx([0.6, 0.36, 0.216])
        assert len(draws) == 3
        loss = got[:, 0].square().sum() + sum(d.mean() for d in draws)
        loss.backward()
        gradients = [p.grad for p in run.learned.parameters()]
    assert got.shape == (2, 25, 48)
    for draw in draws:
        assert set(draw.detach().unique().tolist()) == {0.0, 1.0}
    assert bool((draws[1] <= draws[0]).all())
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert all(bool(g.any()) for g in gradients if g is not None and g.dim() > 1)
    model.eval()
    everything = torch.ones(2, 24, dtype=torch.bool)
    keep = [everything, *(draw.detach() > 0 for draw in draws)]
    with torch.no_grad():
        want = model.norm(oracle.hidden_tokens(model, x, keep))
    there = torch.nn.functional.pad(keep[-1], (1, 0), value=True)
    oracle.assert_close(got[there].detach(), want[there])


def test_a_picture_without_any_patch_is_finite() -> None:
    predictor = Predictor(8)
    x = torch.randn(2, 5, 8, requires_grad=True)
    policy = torch.tensor([[0.0] * 5, [1.0, 0.0, 1.0, 0.0, 0.0]], requires_grad=True)
    scores = predictor(x, policy)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2, 5))
    scores[..., 0].sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def by_hand(model: Any, x: Tensor, policy: Tensor, first: int) -> Tensor:
    """The official attention of training from block ``first`` on, written out.

    raoyongming/DynamicViT 1322e62, ``softmax_with_policy``: a token always sees itself, a dropped
    one too, and its own row says nothing of its decision; 1e-6 keeps the sum from zero.
    """
    y = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for number, block in enumerate(model.blocks):
        rows, attn = block.norm1(y), block.attn
        q, k, v = attn.qkv(rows).reshape(*y.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale
        weight, eps, count = (scores - scores.amax(-1, keepdim=True)).exp(), 1e-6, y.shape[1]
        if number >= first:
            there = torch.nn.functional.pad(policy, (1, 0), value=1.0)[:, None, None]
            weight = weight * (there + (1 - there) * torch.eye(count))
        out = ((weight + eps / count) / (weight.sum(-1, keepdim=True) + eps)) @ v
        y = y + block.ls1(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
        y = y + block.ls2(block.mlp(block.norm2(y)))
    return model.forward_head(model.norm(y))


def test_gradients_of_a_decision_are_the_written_out_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.shrunk("deit3_small_patch16_224", depth=3)
    x = small.picture(model)
    policy = (torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    ours, theirs = (policy.clone().requires_grad_() for _ in range(2))
    monkeypatch.setattr(DynamicViT, "decide", lambda self, tokens, ctx: ours)
    model.train()
    with visprune.prune(model, "dynamicvit", keep_ratio=0.5, layers=(1,)):
        got = model(x)
        got.square().sum().backward()
    want = by_hand(model, x, theirs, 1)
    want.square().sum().backward()
    oracle.assert_close(got.detach(), want.detach())
    assert ours.grad is not None
    assert theirs.grad is not None
    # Dropped patches have one too: what their return would change.
    assert bool(theirs.grad[policy == 0].any())
    oracle.assert_close(ours.grad, theirs.grad)


def test_checkpointing_draws_the_same() -> None:
    model = small.shrunk("vit_tiny_patch16_224", depth=4)
    x, found = small.picture(model), []
    with visprune.prune(model, "dynamicvit", keep_ratio=0.6) as run:
        model.train()
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            torch.manual_seed(5)
            model(x).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            assert len(run.decisions) == 3
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_learned_weights_go_on_and_travel_with_the_model() -> None:
    model = small.shrunk("vit_tiny_patch16_224", depth=4)
    x = small.picture(model)
    plain = set(model.state_dict())
    run = visprune.prune(model, "dynamicvit", keep_ratio=0.6)
    learned = run.learned
    extra = set(model.state_dict()) - plain
    assert extra
    assert all(key.startswith("visprune_learned.") for key in extra)
    with torch.no_grad():
        first = model(x)
    run.remove()
    assert set(model.state_dict()) == plain
    with visprune.prune(model, "dynamicvit", keep_ratio=0.6, learned=learned), torch.no_grad():
        assert torch.equal(model(x), first)
    with visprune.prune(model, dataclasses.replace(run.method, keep_ratio=0.9, learned=learned)):
        assert model.visprune_learned is learned
    assert "learned" not in run.method.to_dict()


@pytest.mark.parametrize("kind", ["eva_rope", "siglip", "side_by_side"])
def test_training_is_refused_where_keys_cannot_be_weighed(kind: str) -> None:
    model = small.shrunk(small.KINDS[kind], depth=4)
    x = small.picture(model)
    with visprune.prune(model, "dynamicvit", keep_ratio=0.6):
        with torch.no_grad():
            model(x)
        model.train()
        with pytest.raises(UnsupportedModel) as caught:
            model(x)
    message = str(caught.value)
    attention = type(model.blocks[0] if kind == "side_by_side" else model.blocks[0].attn).__name__
    assert f"not offered for {type(model).__name__} with {attention}" in message
    assert ("AttentionPoolLatent pooling" in message) == (kind == "siglip")
    assert "It trains on timm's VisionTransformer with its plain Attention" in message
    assert "runs it in eval mode (model.eval())" in message
    model.eval()
    model(x)


def test_average_pooling_leaves_dropped_patches_out() -> None:
    model = small.shrunk("vit_base_patch16_gap_224", depth=4)
    x = small.picture(model)
    with visprune.prune(model, "dynamicvit", keep_ratio=0.6) as run:
        model.train()
        tokens = model.forward_features(x)
        got, kept = model.forward_head(tokens), run.decisions[-1].detach() > 0
    want = torch.stack([rows[own].mean(0) for rows, own in zip(tokens, kept, strict=True)])
    oracle.assert_close(got.detach(), model.head(model.fc_norm(want)).detach())


def _warned(run_it: Any) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_it()
    return sum("pick patches at random" in str(one.message) for one in caught)


@torch.no_grad()
def test_predictors_that_learned_nothing_say_so_once(tmp_path: Path) -> None:
    model = small.shrunk("vit_tiny_patch16_224", depth=4)
    x = small.picture(model)
    with visprune.prune(model, "dynamicvit", keep_ratio=0.6) as run:
        model.train()
        assert _warned(lambda: model(x)) == 0  # it is being trained
        model.eval()
        assert _warned(lambda: [model(x), model(x)]) == 1
        folder = visprune.save_pretrained(run, tmp_path / "new")
    again, back = visprune.load_pretrained(folder)
    assert back is not None
    assert _warned(lambda: again(x)) == 1  # saving taught it nothing


def test_trained_and_loaded_predictors_say_nothing(tmp_path: Path) -> None:
    model = small.shrunk("vit_tiny_patch16_224", depth=4)
    x = small.picture(model)
    with visprune.prune(model, "dynamicvit", keep_ratio=0.6) as run:
        model.train()
        optimizer = torch.optim.SGD(run.learned.parameters(), lr=1e-3)
        model(x).square().sum().backward()
        optimizer.step()
        model.eval()
        assert _warned(lambda: model(x)) == 0
        learned = run.learned
        folder = visprune.save_pretrained(run, tmp_path / "trained")
    assert _warned(lambda: visprune.load_pretrained(folder)[0](x)) == 0
    with visprune.prune(model, "dynamicvit", keep_ratio=0.6, learned=learned):
        assert _warned(lambda: model(x)) == 0
    for name, params in {"tome": {"r": 2}, "random": {"keep_ratio": 0.6}}.items():
        with visprune.prune(model, name, **params):
            assert _warned(lambda: model(x)) == 0
