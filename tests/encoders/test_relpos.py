# SPDX-License-Identifier: Apache-2.0
"""timm's ViTs with a bias per pair of places: it goes with the tokens; a merged token has none."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.encoders import oracle, small
from visprune.errors import UnsupportedModel

NAMES = timm.list_models(module="vision_transformer_relpos")
METHODS = small.WITHOUT_MERGING
# A table or a network for every layer or for all, blocks with the norm behind, a class token.
KINDS: dict[str, dict[str, Any]] = {
    "network": {"name": "vit_relpos_small_patch16_224"},
    "table": {"rel_pos_type": "bias"},
    "shared": {"name": "vit_srelpos_small_patch16_224"},
    "shared_table": {"shared_rel_pos": True, "rel_pos_type": "bias"},
    "norm_behind": {"name": "vit_relpos_medium_patch16_rpn_224"},
    "class": {"name": "vit_relpos_medium_patch16_cls_224"},
    "class_table": {"class_token": True, "global_pool": "token", "rel_pos_type": "bias"},
}
BY_CLASS = ("topk", "evit")
every_kind = pytest.mark.parametrize("kind", KINDS)


def relpos(name: str = "vit_relpos_small_patch16_224", **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"embed_dim": 48, "num_heads": 4, "depth": 4, "img_size": 64, "num_classes": 5}
    return small.enlarged(timm.create_model(name, **{**given, **options})).eval()


def pixels(batch: int = 2, seed: int = 0, side: int = 64) -> Tensor:
    return torch.randn((batch, 3, side, side), generator=torch.Generator().manual_seed(seed))


def methods(model: Any) -> list[str]:
    return [name for name in METHODS if model.cls_token is not None or name not in BY_CLASS]


def rows_added(model: Any, block: Any, kwargs: dict[str, Any]) -> Tensor:
    """What a block's attention adds to its scores."""
    shared = kwargs.get("shared_rel_pos")
    return block.attn.rel_pos.get_bias() if shared is None else shared


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keeping_all_changes_no_bit(name: str) -> None:
    side = 128 if "patch32" in name else 64
    model, x = relpos(name, img_size=side), pixels(1, side=side)
    want = model(x)
    for method in methods(model):
        with visprune.prune(model, method, keep_ratio=1.0) as run:
            assert torch.equal(model(x), want)
            assert run.trace.stages
        with visprune.prune(model, method, **METHODS[method]) as run:
            assert not torch.equal(model(x), want)
            assert (len(run.kept[0]) < 16) == (method != "ipcv")  # whose patches come back
    assert torch.equal(model(x), want)


def test_all_registered_are_here() -> None:
    assert len(NAMES) >= 13


@every_kind
@pytest.mark.parametrize("method", ["topk", "random", "dynamicvit"])
@torch.no_grad()
def test_dropping_equals_calling_the_blocks_on_what_is_left(kind: str, method: str) -> None:
    model, x = relpos(**KINDS[kind]), pixels()
    if method not in methods(model):
        with pytest.raises(UnsupportedModel, match="has no class token"):
            visprune.prune(model, method, **METHODS[method])
        return
    with visprune.prune(model, method, **METHODS[method]) as run:
        got = model.forward_features(x)
        keep = [oracle.alive(run, layer) for layer in range(5)]
        order = run._reducer.latest.composed(3).index
    seen = keep[1:] if method == "dynamicvit" else keep[:-1]
    prefix = model.num_prefix_tokens
    for row in range(2):
        handles = []
        for block, left in zip(model.blocks, seen, strict=True):
            hidden = ~torch.nn.functional.pad(left[row], (prefix, 0), value=True)
            bias = torch.zeros(1, 1, 1, len(hidden)).masked_fill(hidden, float("-inf"))
            own = block.attn.rel_pos
            if own is not None:
                before = own.get_bias
                own.get_bias = lambda before=before, bias=bias: before() + bias
                handles.append(own)
                continue

            def add(module: Any, args: Any, kwargs: Any, bias: Tensor = bias) -> Any:
                return args, {"shared_rel_pos": kwargs["shared_rel_pos"] + bias}

            handles.append(block.attn.register_forward_pre_hook(add, with_kwargs=True))
        want = model.forward_features(x[row : row + 1])[0]
        for handle in handles:
            if isinstance(handle, torch.nn.Module):
                del handle.get_bias
            else:
                handle.remove()
        places = [*range(prefix), *(order[row] + prefix).tolist()]
        oracle.assert_close(got[row], want[places])


@pytest.mark.parametrize("kind", ["class", "class_table"])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_the_class_tokens_row_is_that_of_the_attention(kind: str, shared: bool) -> None:
    model, x = relpos(**KINDS[kind], shared_rel_pos=shared), pixels()
    found = []
    block = model.blocks[1]

    def look(module: Any, args: Any, kwargs: Any) -> None:
        q, k, _ = module.qkv(args[0]).reshape(2, 17, 3, 4, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * module.scale + rows_added(model, block, kwargs)
        found.append(scores.softmax(-1)[:, :, 0, 1:].mean(1))

    handle = block.attn.register_forward_pre_hook(look, with_kwargs=True)
    model(x)
    handle.remove()
    with visprune.prune(model, "topk", num_keep=6, layers=(1,)) as run:
        model(x)
        kept = torch.stack(run.kept)
    best = found[0].argsort(dim=1, descending=True, stable=True)[:, :6].sort(dim=1).values
    assert torch.equal(kept, best)


@pytest.mark.parametrize("method", ["tome", "pitome", "diffrate", "spatten", "ficoco_v"])
@pytest.mark.parametrize("kind", ["network", "class"])
def test_what_it_cannot(kind: str, method: str) -> None:
    params = {"tome": {"r": 2}, "diffrate": {}, "ficoco_v": {}}.get(method, {"keep_ratio": 0.8})
    model = relpos(**KINDS[kind])
    with pytest.raises(
        UnsupportedModel, match=r"(bias per pair of places|no class token).*Methods that fit it"
    ) as e:
        visprune.prune(model, method, **params)
    named = str(e.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert set(named) == {"keep_all", *methods(model)}
    if kind == "class":
        assert set(named) == small.listed("timm.VisionTransformerRelPos")


@pytest.mark.parametrize("kind", ["table", "class_table", "shared_table"])
def test_gradients_checkpointing_and_features(kind: str) -> None:
    model, x = relpos(**KINDS[kind]).train(), pixels().requires_grad_()
    method = "topk" if kind == "class_table" else "random"

    def gradients() -> dict[str, Tensor]:
        model(x).square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    with visprune.prune(model, method, **METHODS[method]):
        want = gradients()
        assert all(bool(torch.isfinite(grad).all()) for grad in want.values())
        tables = [n for n in want if n.endswith("relative_position_bias_table")]
        assert all(float(want[name].abs().sum()) > 0 for name in tables)
        assert len(tables) == (1 if kind == "shared_table" else 4)
        model.set_grad_checkpointing(True)
        got = gradients()
        model.eval()
        with torch.no_grad():
            maps = model.forward_intermediates(x, intermediates_only=True)
    assert got.keys() == want.keys()
    for key, grad in want.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-5)
    assert [m.shape for m in maps] == [(2, 48, 4, 4)] * 4


def test_keeping_all_in_training_draws_what_the_model_draws() -> None:
    model, x = relpos(**KINDS["class"]).train(), pixels()

    def drawn() -> Tensor:
        torch.manual_seed(1)
        return model(x)

    want = drawn()
    assert not torch.equal(model(x), want)  # its network of distances drops features
    with visprune.prune(model, "topk", keep_ratio=1.0):
        assert torch.equal(drawn(), want)


@every_kind
@torch.no_grad()
def test_the_cost_is_what_a_counter_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = relpos(**KINDS[kind]), pixels(1)
    for block in model.blocks:
        monkeypatch.setattr(block.attn, "fused_attn", False)
    for method, params in (("keep_all", {}), ("random", {"keep_ratio": 0.6})):
        with visprune.prune(model, method, **params) as run:
            with FlopCounterMode(display=False) as counter:
                model(x)
            assert run.cost().vision == counter.get_total_flops() // 2


@torch.no_grad()
def test_threads_a_copy_and_another_size() -> None:
    model = relpos(**KINDS["class"])
    pictures = [pixels(1, seed) for seed in range(8)]
    with visprune.prune(model, "topk", keep_ratio=0.6):
        want, twin = oracle.threads_equal_turns(model, pictures)
    assert torch.equal(twin(pictures[0]), want[0])
    visprune.remove(twin)
    assert torch.equal(twin(pictures[0]), model(pictures[0]))
    model.set_input_size(img_size=(96, 64))
    x = torch.randn(1, 3, 96, 64)
    plain = model(x)
    with visprune.prune(model, "topk", keep_ratio=1.0):
        assert torch.equal(model(x), plain)
    with visprune.prune(model, "topk", num_keep=5) as run:
        model(x)
        assert run.grid == (6, 4)
        assert [len(kept) for kept in run.kept] == [5]


@pytest.mark.parametrize("kind", ["class", "shared_table"])
@torch.no_grad()
def test_compiled_and_exported(kind: str) -> None:
    torch._dynamo.reset()
    model, x = relpos(**KINDS[kind]), pixels()
    with visprune.prune(model, methods(model)[0], keep_ratio=0.6):
        want = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), want)
        assert torch.equal(compiled(x), want)
        oracle.assert_close(torch.export.export(model, (x,)).module()(x), want)
