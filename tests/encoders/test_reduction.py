# SPDX-License-Identifier: Apache-2.0
"""Dropping equals hiding, merging equals the map, on every kind of block, attention and pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.encoders import oracle, small
from visprune.backbones.encoders.macs import counted_macs
from visprune.errors import UnsupportedModel

DROPPING: dict[str, dict[str, Any]] = {
    "topk": {"keep_ratio": 0.6},
    "evit": {"keep_ratio": 0.6, "fuse": False},
    "random": {"keep_ratio": 0.6},
    "uniform": {"num_keep": 7},
    "dynamicvit": {"keep_ratio": 0.6},
    "spatten": {"keep_ratio": 0.4},
}
MERGING: dict[str, dict[str, Any]] = {
    "tome": {"r": 3},
    "pitome": {"keep_ratio": 0.8},
    "evit": {"keep_ratio": 0.6},
    "diffrate": {"pruned": [197, 150, 120, 99], "merged": [190, 140, 110, 70]},
    "ficoco_v": {"r": 4},
}
RETURNING: dict[str, dict[str, Any]] = {
    "ipcv": {"keep_ratio": 0.4, "layer": 1, "attention_stabilization": 1},
}
ALL = [*DROPPING.items(), *MERGING.items(), *RETURNING.items()]
KINDS = sorted(small.KINDS.items())
every_kind = pytest.mark.parametrize(("kind", "name"), KINDS)


def pruned(model: Any, method: str, params: dict[str, Any]) -> Any:
    """A run, or None where the model has no class token's attention."""
    try:
        return visprune.prune(model, method, **params)
    except UnsupportedModel:
        assert method in ("topk", "evit", "diffrate", "ficoco_v")
        return None


@every_kind
@pytest.mark.parametrize("method", DROPPING)
@torch.no_grad()
def test_drop_equals_hide_as_key(kind: str, name: str, method: str) -> None:
    model = small.small(name)
    x = small.picture(model)
    run = pruned(model, method, DROPPING[method])
    if run is None:
        return
    with run:
        got = model(x)
        keep = [oracle.alive(run, layer) for layer in range(len(model.blocks) + 1)]
        on_entry = method == "dynamicvit"
    seen = keep[1:] if on_entry else keep[:-1]
    want = oracle.hidden_tokens(model, x, seen)
    assert 0 < int(keep[-1].sum()) < keep[-1].numel()
    # Attention pooling reads the tokens that are left, average pooling too.
    oracle.assert_close(got, oracle.pooled_over(model, want, keep[-1]))


@pytest.mark.parametrize("kind", ["plain", "distilled", "layer_scale", "registers"])
@torch.no_grad()
def test_tome_equals_the_rule_written_out(kind: str) -> None:
    model = small.small(small.KINDS[kind])
    x, prefix = small.picture(model), model.num_prefix_tokens
    with visprune.prune(model, "tome", r=3) as run:
        got = model.forward_features(x)
        sizes = torch.stack(run.trace.sizes)
    want, size = oracle.merged_by_hand(
        model, x, lambda layer, keys, size: oracle.matched_by_hand(keys, size, 3, prefix)
    )
    oracle.assert_close(got, want)
    assert torch.equal(sizes, size)


@pytest.mark.parametrize("kind", ["average_no_class", "average_registers", "siglip", "registers"])
@torch.no_grad()
def test_pooling_weighs_by_size(kind: str) -> None:
    model = small.small(small.KINDS[kind])
    x = small.picture(model)
    with visprune.prune(model, "tome", r=4) as run:
        tokens = model.forward_features(x)
        got = model.forward_head(tokens)
        whole = run.expand(tokens[:, model.num_prefix_tokens :])
    full = torch.cat([tokens[:, : model.num_prefix_tokens], whole], dim=1)
    assert full.shape[1] == model.num_prefix_tokens + 24
    # A slot of three patches counts like three tokens of its value.
    oracle.assert_close(got, model.forward_head(full))


@every_kind
@pytest.mark.parametrize(("method", "params"), ALL)
@torch.no_grad()
def test_a_batch_equals_one_by_one(
    kind: str, name: str, method: str, params: dict[str, Any]
) -> None:
    model = small.small(name)
    x = small.picture(model)
    run = pruned(model, method, params)
    if run is None:
        return
    with run:
        both, kept = model(x), run.kept
        for row in range(2):
            oracle.assert_close(model(x[row : row + 1]), both[row : row + 1])
            assert torch.equal(run.kept[0], kept[row])


@every_kind
@pytest.mark.parametrize(("method", "params"), ALL)
def test_removal_restores(kind: str, name: str, method: str, params: dict[str, Any]) -> None:
    model = small.small(name)
    x = small.picture(model, batch=1)
    before = {n: (set(vars(m)), [len(h) for h in hooks(m)]) for n, m in model.named_modules()}
    with torch.no_grad():
        want = model(x)
        run = pruned(model, method, params)
        if run is None:
            return
        assert not torch.equal(model(x), want)
        run.remove()
        run.remove()
        assert torch.equal(model(x), want)
    after = {n: (set(vars(m)), [len(h) for h in hooks(m)]) for n, m in model.named_modules()}
    assert after == before


def hooks(module: Any) -> list[Any]:
    return [module._forward_pre_hooks, module._forward_hooks, module._backward_hooks]


@every_kind
@torch.no_grad()
def test_features_come_out_on_the_whole_grid(kind: str, name: str) -> None:
    model = small.small(name)
    x, prefix = small.picture(model), model.num_prefix_tokens
    dense = model.forward_intermediates(x, return_prefix_tokens=prefix > 0)
    with visprune.prune(model, "tome", r=3):
        final, maps = model.forward_intermediates(x, return_prefix_tokens=prefix > 0)
        flat = model.forward_intermediates(
            x, 1, output_fmt="NLC", intermediates_only=True, norm=True
        )
    assert final.shape[1] == prefix + 24 - 3 * len(model.blocks)
    for layer, (got, want) in enumerate(zip(maps, dense[1], strict=True)):
        if prefix:
            assert got[1].shape == want[1].shape
            got, want = got[0], want[0]
        assert got.shape == want.shape == (2, 48, 4, 6)
        cells = {tuple(v.tolist()) for v in got[0].flatten(1).T}
        assert len(cells) == 24 - 3 * (layer + 1)  # merged patches share a value
    assert flat[0].shape == (2, 24, 48)


@every_kind
@pytest.mark.parametrize(("method", "params"), ALL)
def test_gradients_reach_everything(
    kind: str, name: str, method: str, params: dict[str, Any]
) -> None:
    model = small.shrunk(name, depth=4)
    x = small.picture(model)
    run = pruned(model, method, params)
    if run is None:
        return
    with run:
        model(x).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if "learned" not in n}
        missing = [n for n, g in gradients.items() if g is None or not bool(g.isfinite().all())]
    assert missing == []


@pytest.mark.parametrize("kind", ["plain", "eva_rope", "average_no_class"])
@pytest.mark.parametrize(("method", "params"), ALL)
def test_gradient_checkpointing_changes_nothing(
    kind: str, method: str, params: dict[str, Any]
) -> None:
    model = small.shrunk(small.KINDS[kind], depth=4)
    x, other = small.picture(model), small.picture(model, seed=5)
    run = pruned(model, method, params)
    if run is None:
        return
    found = []
    with run:
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            loss = model(x).square().sum()
            model(other)  # a forward between a forward and its backward
            loss.backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("size", [None, (2, 2), (1, 3)])
@torch.no_grad()
def test_more_pairs_than_half_of_a_picture_are_cut_to_half(size: tuple[int, int] | None) -> None:
    model = small.shrunk("vit_tiny_patch16_224", depth=4, dynamic_img_size=True)
    height, width = size or (4, 6)
    x = torch.randn(1, 3, 16 * height, 16 * width)
    # As in the official code: r = min(r, patches // 2), layer by layer, whatever the picture.
    left, want = height * width, []
    for _ in range(4):
        left -= min(13, left // 2)
        want.append(left)
    with visprune.prune(model, "tome", r=13) as run:
        assert torch.isfinite(model(x)).all()
        assert [stage["after"] for stage in run.trace.stages] == want
        assert run.cost(x).vision > 0


class Whole:
    """Stands in a model that nobody should copy."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the model was copied")


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vitamin_small_224"])
@torch.no_grad()
def test_a_stem_of_convolutions_is_counted_by_itself(name: str) -> None:
    """Without what hangs on it: the hooks of the method in force, and the model behind them."""
    model = small.shrunk(name)
    x = small.picture(model, batch=1)
    counted = counted_macs(model, (3, *x.shape[-2:]))
    vars(model)["whole"] = Whole()
    with visprune.prune(model, "keep_all") as run:
        dense = run.cost(x)
    assert abs(counted - dense.vision) <= 1e-3 * counted
    for method, params in (("tome", {"r": 2}), ("random", {"keep_ratio": 0.6})):
        with visprune.prune(model, method, **params) as run:
            cost, latest = run.cost(x), run.trace.num_tokens
            assert 0 < cost.vision < dense.vision
            assert run.cost() == cost  # again, of the same forward
            assert run.trace.num_tokens == latest


@pytest.mark.parametrize("method", ["evit", "topk", "random", "tome"])
def test_layers_without_a_stage_count_the_same_with_and_without_gradients(method: str) -> None:
    model = small.shrunk(small.KINDS["plain"], depth=8)
    x = small.picture(model)
    params: dict[str, Any] = {"r": [0, 3, 0, 0, 2, 0, 0, 0]} if method == "tome" else {
        "keep_ratio": 0.7}  # fmt: skip
    with visprune.prune(model, method, **params) as run:
        want = model(x)
        traced = run.trace
        with torch.no_grad():
            got = model(x)
    oracle.assert_close(got, want.detach())
    assert run.trace.tokens_per_layer == traced.tokens_per_layer
    assert run.trace.mlp_tokens_per_layer == traced.mlp_tokens_per_layer
    assert len(set(traced.mlp_tokens_per_layer[0])) > 1
