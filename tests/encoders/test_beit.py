# SPDX-License-Identifier: Apache-2.0
"""BEiT's bias per pair of places goes with the tokens; a merged token has none."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import visprune
from tests.encoders import oracle, small
from visprune.errors import UnsupportedModel

NAMES = timm.list_models(module="beit")
METHODS = small.WITHOUT_MERGING


def beit(name: str = "beit_base_patch16_224", **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"embed_dim": 48, "num_heads": 4, "depth": 4, "img_size": 64, "num_classes": 5}
    return small.enlarged(timm.create_model(name, **{**given, **options})).eval()


def pixels(batch: int = 2, seed: int = 0) -> Tensor:
    size = (batch, 3, 64, 64)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


KINDS: dict[str, dict[str, Any]] = {
    "own": {},
    "shared": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "both": {"use_shared_rel_pos_bias": True},
    "none": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
    "class": {"global_pool": "token"},
}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keeping_all_changes_no_bit(name: str) -> None:
    model = beit(name, img_size=56 if "patch14" in name else 64)
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    want = model(x)
    for method in METHODS:
        with visprune.prune(model, method, keep_ratio=1.0) as run:
            assert torch.equal(model(x), want)
            assert run.trace.stages
        with visprune.prune(model, method, **METHODS[method]) as run:
            assert not torch.equal(model(x), want)
            assert (len(run.kept[0]) < 16) == (method != "ipcv")  # whose patches come back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["topk", "random", "dynamicvit"])
@torch.no_grad()
def test_dropping_equals_hiding(kind: str, method: str) -> None:
    model, x = beit(**KINDS[kind]), pixels()
    with visprune.prune(model, method, **METHODS[method]) as run:
        got = model.forward_features(x)
        keep = [oracle.alive(run, layer) for layer in range(5)]
        order = run._reducer.latest.composed(3).index
    seen = keep[1:] if method == "dynamicvit" else keep[:-1]
    rows = []
    for row in range(2):
        handles = []
        for block, left in zip(model.blocks, seen, strict=True):
            hidden = ~torch.nn.functional.pad(left[row], (1, 0), value=True)
            bias = torch.zeros(1, 1, 1, 17).masked_fill(hidden, float("-inf"))

            def before(module: Any, args: Any, kwargs: Any, bias: Tensor = bias) -> Any:
                shared = kwargs.get("shared_rel_pos_bias")
                full = bias.expand(1, 4, 17, 17)
                return args, {"shared_rel_pos_bias": full if shared is None else full + shared}

            handles.append(block.attn.register_forward_pre_hook(before, with_kwargs=True))
        rows.append(model.forward_features(x[row : row + 1])[0])
        for handle in handles:
            handle.remove()
    for row, want in enumerate(rows):
        oracle.assert_close(got[row], want[[0, *(order[row] + 1).tolist()]])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_class_tokens_row_is_that_of_the_attention(kind: str) -> None:
    model, x = beit(**KINDS[kind]), pixels()
    found = []
    attention = model.blocks[1].attn

    def look(module: Any, args: Any, kwargs: Any) -> None:
        y = args[0]
        bias = None
        if module.q_bias is not None:
            bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        parts = torch.nn.functional.linear(y, module.qkv.weight, bias)
        q, k, _ = parts.reshape(2, 17, 3, 4, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * module.scale
        if module.relative_position_bias_table is not None:
            scores = scores + module._get_rel_pos_bias()
        if kwargs.get("shared_rel_pos_bias") is not None:
            scores = scores + kwargs["shared_rel_pos_bias"]
        found.append(scores.softmax(-1)[:, :, 0, 1:].mean(1))

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    model(x)
    handle.remove()
    with visprune.prune(model, "topk", num_keep=6, layers=(1,)) as run:
        model(x)
        kept = torch.stack(run.kept)
    best = found[0].argsort(dim=1, descending=True, stable=True)[:, :6].sort(dim=1).values
    assert torch.equal(kept, best)


@pytest.mark.parametrize("method", ["tome", "pitome", "diffrate", "spatten", "ficoco_v"])
def test_what_it_cannot(method: str) -> None:
    params = {"tome": {"r": 2}, "diffrate": {}, "ficoco_v": {}}.get(method, {"keep_ratio": 0.8})
    with pytest.raises(
        UnsupportedModel, match=r"bias per pair of places.*Methods that fit it"
    ) as e:
        visprune.prune(beit(), method, **params)
    named = str(e.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert set(named) == {"keep_all", *METHODS}
    assert set(named) == small.listed("timm.Beit")


@pytest.mark.parametrize("method", ["topk", "evit"])
def test_gradients_checkpointing_and_features(method: str) -> None:
    model, x = beit(use_shared_rel_pos_bias=True).train(), pixels().requires_grad_()

    def gradients() -> dict[str, Tensor]:
        model(x).square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    with visprune.prune(model, method, **METHODS[method]):
        want = gradients()
        assert all(bool(torch.isfinite(grad).all()) for grad in want.values())
        assert float(want["blocks.3.attn.relative_position_bias_table"].abs().sum()) > 0
        model.set_grad_checkpointing(True)
        got = gradients()
        model.eval()
        with torch.no_grad():
            maps = model.forward_intermediates(x, intermediates_only=True)
    assert got.keys() == want.keys()
    for key, grad in want.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-5)
    assert [m.shape for m in maps] == [(2, 48, 4, 4)] * 4
