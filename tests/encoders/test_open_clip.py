# SPDX-License-Identifier: Apache-2.0
"""open_clip's image towers: its own, those of timm inside it, and zero-shot on top."""

from __future__ import annotations

import functools
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import VisionTransformer
from torch import Tensor

import visprune
from tests.encoders import oracle
from visprune.errors import UnsupportedModel

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"ls_init_value": 0.5},
    "average": {"pool_type": "avg", "final_ln_after_pool": True},
    "custom": {"qk_norm": True, "scale_attn_inner": True, "scale_fc": True},
    "coca": {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 2},
}
METHODS: dict[str, dict[str, Any]] = {
    "tome": {"r": 3},
    "pitome": {"keep_ratio": 0.8},
    "evit": {"keep_ratio": 0.6},
    "topk": {"keep_ratio": 0.6},
    "random": {"keep_ratio": 0.6},
    "spatten": {"keep_ratio": 0.4},
    "diffrate": {},
    "ficoco_v": {"r": 3},
    "ipcv": {"keep_ratio": 0.4, "attention_stabilization": 1},
    "dynamicvit": {"keep_ratio": 0.6},
}


@functools.cache
def tower(kind: str) -> Any:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32, patch_size=6, width=32, layers=4, heads=2, mlp_ratio=2.0, output_dim=16,
        **TOWERS[kind],
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pixels(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_keeping_all_and_keeping_some(kind: str, method: str) -> None:
    model, x = tower(kind), pixels()
    want = model(x)
    everything = {
        "tome": {"r": 0},
        "ficoco_v": {"r": 0},
        "diffrate": {"pruned": [26] * 4, "merged": [26] * 4, "tokens": 26},
    }.get(method, {"keep_ratio": 1.0})
    with visprune.prune(model, method, **everything) as run:
        got = model(x)
        assert run.trace.stages
    assert torch.equal(got, want)
    with visprune.prune(model, method, **METHODS[method]) as run:
        less = model(x)
        assert (len(run.trace.kept[0]) < 25) == (method != "ipcv")  # whose patches come back
        for row in range(2):
            oracle.assert_close(model(x[row : row + 1]), less[row : row + 1])
    assert less.shape == want.shape
    assert not torch.equal(less, want)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", ["plain", "layer_scale", "custom"])
@torch.no_grad()
def test_dropping_equals_hiding(kind: str) -> None:
    model, x = tower(kind), pixels()
    with visprune.prune(model, "topk", keep_ratio=0.6) as run:
        got = model(x)
        keep = [oracle.alive(run, layer) for layer in range(4)]
    handles = []
    for block, keys in zip(model.transformer.resblocks, keep, strict=True):
        seen = torch.nn.functional.pad(keys, (1, 0), value=True)
        bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))

        def before(module: Any, args: Any, kwargs: Any, bias: Tensor = bias) -> Any:
            if isinstance(module, torch.nn.MultiheadAttention):
                return args, {**kwargs, "key_padding_mask": bias}
            return args, {**kwargs, "attn_mask": bias[:, None, None]}

        handles.append(block.attn.register_forward_pre_hook(before, with_kwargs=True))
    try:
        want = model(x)
    finally:
        for handle in handles:
            handle.remove()
    oracle.assert_close(got, want)


@torch.no_grad()
def test_tome_by_hand() -> None:
    model, x = tower("layer_scale"), pixels()
    y = model._embeds(x)
    size = torch.ones(2, 25)
    for block in model.transformer.resblocks:
        attn, rows = block.attn, block.ln_1(y)
        parts = torch.nn.functional.linear(rows, attn.in_proj_weight, attn.in_proj_bias).chunk(
            3, -1
        )
        q, k, v = (p.unflatten(-1, (2, 16)).transpose(1, 2) for p in parts)
        bias = torch.nn.functional.pad(size, (1, 0), value=1.0).log()[:, None, None]
        weights = (q @ k.transpose(-2, -1) / 4 + bias).softmax(-1)
        y = y + block.ls_1(attn.out_proj((weights @ v).transpose(1, 2).flatten(2)))
        chosen = oracle.matched_by_hand(k[:, :, 1:].mean(1), size, 3, 1)
        matrix = chosen.matrix()
        size = ((matrix > 0).float() @ size[..., None])[..., 0]
        y = torch.cat([y[:, :1], matrix @ y[:, 1:]], dim=1)
        y = y + block.ls_2(block.mlp(block.ln_2(y)))
    want = model._pool(y)[0] @ model.proj
    with visprune.prune(model, "tome", r=3):
        oracle.assert_close(model(x), want)


@torch.no_grad()
def test_average_pooling_weighs_by_size() -> None:
    model, x = tower("average"), pixels()
    seen: list[Tensor] = []
    with visprune.prune(model, "tome", r=3) as run:
        handle = model.transformer.register_forward_hook(lambda m, a, out: seen.append(out))
        got = model(x)
        handle.remove()
        whole = run.expand(seen[0][:, 1:])
    want = model._pool(torch.cat([seen[0][:, :1], whole], dim=1))[0] @ model.proj
    oracle.assert_close(got, want)


@torch.no_grad()
def test_features_come_out_on_the_whole_grid() -> None:
    model, x = tower("plain"), pixels()
    with visprune.prune(model, "tome", r=3):
        found = model.forward_intermediates(x, indices=[0, 3])
    assert [y.shape for y in found["image_intermediates"]] == [(2, 32, 5, 5)] * 2
    for y, left in zip(found["image_intermediates"], (22, 13), strict=True):
        assert len(y[0].flatten(1).T.unique(dim=0)) == left


def clip(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "open_clip":
        vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}
        return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT).eval()
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}
    return CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT).eval()


@pytest.mark.parametrize("kind", ["open_clip", "timm"])
@torch.no_grad()
def test_zero_shot_still_works(kind: str) -> None:
    model = clip(kind)
    side = model.visual.image_size[0]
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(2))
    names = [open_clip.tokenize(["a cat", "a dog", "a plane"], context_length=16)]
    text = model.encode_text(names[0], normalize=True)
    want = (100 * model.encode_image(x, normalize=True) @ text.T).softmax(-1)
    with visprune.prune(model.visual, "tome", r=2 if side == 32 else 13) as run:
        got = (100 * model.encode_image(x, normalize=True) @ text.T).softmax(-1)
        both = model(x, names[0])
        assert len(run.trace.kept) == 3
        assert run.cost().vision > 0
    assert got.shape == (3, 3)
    assert not torch.equal(got, want)
    torch.testing.assert_close(got.sum(-1), torch.ones(3))
    features = both[0] if isinstance(both, tuple) else both["image_features"]
    assert features.shape == (3, 16)
    again = (100 * model.encode_image(x, normalize=True) @ text.T).softmax(-1)
    assert torch.equal(again, want)


def coca() -> Any:
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16,
              "attentional_pool": True, "attn_pooler_heads": 2}  # fmt: skip
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CoCa(16, decoder, text, vision).eval()


@pytest.mark.parametrize("kind", ["open_clip", "coca"])
def test_the_whole_clip_is_not_the_tower(kind: str) -> None:
    model = coca() if kind == "coca" else clip(kind)
    with pytest.raises(UnsupportedModel, match=r"visprune.prune\(model.visual"):
        visprune.prune(model, "tome", r=2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_tower_of_mixed_precision(precision: str, method: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32}
    model = CLIP(16, vision, TEXT, cast_dtype=dtype).eval()
    open_clip.model.convert_weights_to_lp(model, dtype=dtype)
    kinds = {parameter.dtype for parameter in model.visual.parameters()}
    assert kinds == {dtype, torch.float32}
    x = torch.randn(2, 3, 32, 32).to(dtype)
    with visprune.prune(model.visual, method, **METHODS[method]) as run:
        out = model.encode_image(x)
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        assert (len(run.kept[0]) < 16) == (method != "ipcv")


@torch.no_grad()
def test_received_attention_is_that_of_all_queries() -> None:
    model, x = tower("plain"), pixels()
    maps = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        _, weights = module.forward(*args, **{**kwargs, "need_weights": True})
        maps.append(weights)  # [B, T, T], mean over heads

    block = model.transformer.resblocks[0]
    handle = block.attn.register_forward_pre_hook(look, with_kwargs=True)
    model(x)
    handle.remove()
    with visprune.prune(model, "spatten", keep_ratio=0.4, front=0.0) as run:
        model(x)
        first = run._reducer.latest.selections[0, 0]
    want = maps[0].sum(1)[:, 1:]
    best = want.argsort(dim=1, descending=True, stable=True)[:, : first.num_slots]
    assert torch.equal(first.index, best.sort(dim=1).values)
