# SPDX-License-Identifier: Apache-2.0
"""CaiT: heads are mixed before and after the softmax, and the class token comes in behind."""

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

NAMES = timm.list_models(module="cait")
METHODS: dict[str, dict[str, Any]] = {
    "tome": {"r": 2},
    "pitome": {"keep_ratio": 0.8},
    "random": {"keep_ratio": 0.6},
    "uniform": {"keep_ratio": 0.6},
    "dynamicvit": {"keep_ratio": 0.6},
    "ipcv": {"keep_ratio": 0.6, "attention_stabilization": 1},
}
KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "mean": {"global_pool": "avg"},
    "dropping_paths": {"drop_path_rate": 0.1},
}


def cait(name: str = "cait_xxs24_224", **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"embed_dim": 48, "num_heads": 4, "depth": 4, "img_size": 64, "num_classes": 5}
    return small.enlarged(timm.create_model(name, **{**given, **options})).eval()


def pixels(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn((batch, 3, 64, 64), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keeping_all_changes_no_bit(name: str) -> None:
    model, x = cait(name), pixels(1)
    want = model(x)
    for method, params in METHODS.items():
        keeping = {"r": 0} if method == "tome" else {"keep_ratio": 1.0}
        with visprune.prune(model, method, **keeping) as run:
            assert torch.equal(model(x), want), method
            assert run.trace.stages
        with visprune.prune(model, method, **params) as run:
            assert not torch.equal(model(x), want)
            assert (len(run.kept[0]) < 16) == (method != "ipcv")  # whose patches come back
    assert torch.equal(model(x), want)


def test_all_registered_are_here() -> None:
    assert len(NAMES) >= 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["random", "uniform"])
@torch.no_grad()
def test_dropping_equals_calling_the_blocks_on_what_is_left(kind: str, method: str) -> None:
    model, x = cait(**KINDS[kind]), pixels()
    with visprune.prune(model, method, **METHODS[method]) as run:
        got, logits = model.forward_features(x), model(x)
        keep = [oracle.alive(run, layer) for layer in range(5)]
    for row in range(2):
        y = model.patch_embed(x[row : row + 1]) + model.pos_embed
        there = torch.ones(16, dtype=torch.bool)
        for block, left in zip(model.blocks, keep, strict=False):
            y, there = block(y[:, left[row][there]]), left[row]
        y = y[:, keep[-1][row][there]]
        want = model.norm(model.forward_cls(y))
        oracle.assert_close(got[row : row + 1], want)
        oracle.assert_close(logits[row : row + 1], model.forward_head(want))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_token_of_two_equal_patches_counts_as_both(kind: str) -> None:
    model = cait(**KINDS[kind])
    model.pos_embed.zero_()
    columns = pixels().unflatten(-1, (-1, 2, 16)).clone()
    columns[..., 1, :] = columns[..., 0, :]
    x = columns.flatten(-3)
    want = model(x)
    with visprune.prune(model, "tome", r=[8, 0, 0, 0]) as run:
        got = model(x)
        assert [len(kept) for kept in run.kept] == [8, 8]
    oracle.assert_close(got, want)
    assert float(model.blocks[1].attn.proj_w.bias.abs().min()) > 0.01  # counted by size, too


@torch.no_grad()
def test_the_keys_that_are_matched_are_the_mean_over_heads() -> None:
    model, x = cait(), pixels(1)
    seen: list[Tensor] = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda m, a, out: seen.append(out))
    model(x)
    handle.remove()
    keys = seen[0].unflatten(-1, (3, 4, 12))[:, :, 1].mean(2)
    want = oracle.matched_by_hand(keys, torch.ones(1, 16), 5, prefix=0)
    with visprune.prune(model, "tome", r=[5, 0, 0, 0]) as run:
        model(x)
        got = run._reducer.latest.selections[0, 0]
    assert torch.equal(got.matrix() > 0, want.matrix() > 0)


@pytest.mark.parametrize("method", ["topk", "evit", "diffrate", "spatten", "ficoco_v"])
def test_what_it_cannot(method: str) -> None:
    params = {"diffrate": {}, "ficoco_v": {}}.get(method, {"keep_ratio": 0.8})
    with pytest.raises(
        UnsupportedModel, match=r"(comes in behind|mixed of all heads).*Methods that fit it"
    ) as e:
        visprune.prune(cait(), method, **params)
    named = str(e.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert set(named) == {"keep_all", *METHODS}
    assert set(named) == small.listed("timm.Cait")


@pytest.mark.parametrize("method", ["tome", "random"])
def test_gradients_checkpointing_and_features(method: str) -> None:
    model, x = cait().train(), pixels().requires_grad_()

    def gradients() -> dict[str, Tensor]:
        model(x).square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    with visprune.prune(model, method, **METHODS[method]):
        want = gradients()
        assert all(bool(torch.isfinite(grad).all()) for grad in want.values())
        assert len(want) == len(list(model.parameters()))
        model.set_grad_checkpointing(True)
        got = gradients()
        model.eval()
        with torch.no_grad():
            maps = model.forward_intermediates(x, intermediates_only=True)
    assert got.keys() == want.keys()
    for key, grad in want.items():
        oracle.assert_close(got[key], grad)
    assert [m.shape for m in maps] == [(2, 48, 4, 4)] * 4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_cost_is_what_a_counter_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = cait(**KINDS[kind]).requires_grad_(False), pixels()
    for block in model.blocks_token_only:
        monkeypatch.setattr(block.attn, "fused_attn", False)
    for method, params in (("keep_all", {}), ("random", {"keep_ratio": 0.6})):
        with visprune.prune(model, method, **params) as run:
            with FlopCounterMode(display=False) as counter:
                model(x)
            assert run.cost().vision == counter.get_total_flops() // 2


@torch.no_grad()
def test_threads_a_copy_compiled_exported_and_without_its_head() -> None:
    model = cait()
    pictures = [pixels(1, seed) for seed in range(8)]
    with visprune.prune(model, "tome", r=2):
        want, twin = oracle.threads_equal_turns(model, pictures)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(compiled(pictures[0]), want[0])
        assert torch.equal(compiled(pictures[1]), want[1])
        oracle.assert_close(
            torch.export.export(model, (pictures[2],)).module()(pictures[2]), want[2]
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert bool(torch.isfinite(model(pictures[0])).all())
    assert torch.equal(twin(pictures[0]), want[0])
    visprune.remove(twin)
    assert torch.equal(twin(pictures[0]), model(pictures[0]))
    model.prune_intermediate_layers([3])
    whole = model.forward_features(pictures[0])
    with visprune.prune(model, "tome", r=0):
        assert torch.equal(model.forward_features(pictures[0]), whole)
    with visprune.prune(model, "tome", r=2):
        assert model.forward_features(pictures[0]).shape == (1, 8, 48)


def test_a_class_block_that_is_not_known() -> None:
    class Other(timm.models.cait.LayerScaleBlockClassAttn):
        pass

    with pytest.raises(UnsupportedModel, match="comes in by a Other, which is not timm's own"):
        visprune.prune(cait(block_layers_token=Other), "tome", r=2)
