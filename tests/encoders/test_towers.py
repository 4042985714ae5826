# SPDX-License-Identifier: Apache-2.0
"""timm's towers of vision-language models: every patch has a value behind the last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.encoders import oracle, small
from visprune.core import Selection
from visprune.errors import UnsupportedModel

NAMES = [
    name
    for module in ("qwen3_vit", "deepseek_vit", "gemma4_vit")
    for name in timm.list_models(module=module)
]
METHODS: dict[str, dict[str, Any]] = {
    "tome": {"r": 4},
    "pitome": {"keep_ratio": 0.8},
    "ipcv": {"keep_ratio": 0.6, "attention_stabilization": 1},
}
KEEPING: dict[str, dict[str, Any]] = {
    "tome": {"r": 0}, "pitome": {"keep_ratio": 1.0}, "ipcv": {"keep_ratio": 1.0}, "keep_all": {},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"embed_dim": 48, "num_heads": 4, "depth": 4, "mlp_ratio": 2,
              "pos_embed_grid_size": 6},
    "deepseek": {"embed_dim": 48, "num_heads": 4, "depth": 4, "mlp_ratio": 2},
    "gemma4": {"embed_dim": 48, "num_heads": 4, "head_dim": 12, "depth": 4,
               "intermediate_size": 64, "position_embedding_size": 16, "num_kv_heads": 2},
}  # fmt: skip
# Each tower, alone with its projector, without one, and inside a classifier.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3_vit_88m_enc", {}),
    "qwen3_map": ("qwen3_vit_88m_enc", {"global_pool": ""}),
    "qwen3_mean": ("qwen3_vit_88m_enc", {"global_pool": "avg"}),
    "qwen3_classes": ("qwen3_vit_88m", {}),
    "deepseek": ("deepseek_vit_412m_enc", {}),
    "deepseek_map": ("deepseek_vit_412m_enc", {"global_pool": ""}),
    "deepseek_classes": ("deepseek_vit_412m", {}),
    "gemma4": ("gemma4_vit_167m_enc", {}),
    "gemma4_mean": ("gemma4_vit_167m_enc", {"global_pool": "avg"}),
    "gemma4_classes": ("gemma4_vit_167m", {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def family(name: str) -> str:
    return name.partition("_")[0]


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {**SIZES[family(name)], **options}
    if not name.endswith("_enc"):
        given["num_classes"] = 5
    return small.enlarged(timm.create_model(name, **given)).eval()


def kind_of(kind: str) -> Any:
    name, options = KINDS[kind]
    return build(name, **options)


def pixels(model: Any, batch: int = 2, seed: int = 0, rows: int = 6, columns: int = 6) -> Tensor:
    step = getattr(model, "encoder", model).patch_embed.patch_size
    size = (batch, 3, rows * step[0], columns * step[1])
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def tower(model: Any) -> Any:
    return getattr(model, "encoder", model)


def test_all_registered_are_here() -> None:
    assert len(NAMES) >= 9


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keeping_all_changes_no_bit(name: str) -> None:
    model = build(name)
    x = pixels(model, 1)
    want = model(x)
    for method, params in KEEPING.items():
        with visprune.prune(model, method, **params) as run:
            assert torch.equal(model(x), want), method
            assert run.trace.stages
    for method, params in METHODS.items():
        with visprune.prune(model, method, **params):
            got = model(x)
        assert got.shape == want.shape
        assert not torch.equal(got, want)
    assert torch.equal(model(x), want)


def by_hand(model: Any, x: Tensor, chosen: Callable[[int], Selection]) -> Tensor:
    """What leaves the last block, for every patch; merged tokens of each block by ``chosen``."""
    encoder = tower(model)
    if hasattr(encoder, "rotary_emb"):
        y, coordinates, _ = encoder.patch_embed(x)
        tables = list(encoder.rotary_emb(y, coordinates))
    else:
        y, rope = encoder._pos_embed(encoder.patch_embed(x))
        tables = [rope.expand(len(x), -1, -1)]
    size, places = torch.ones(y.shape[:2]), torch.arange(y.shape[1]).expand(len(x), -1)
    for number, block in enumerate(encoder.blocks):
        bias = size.log()[:, None, None]
        attention, inside = block.attn, {}
        if hasattr(block.attn, "rotate_half"):
            table = tables[0][:, None]
            inside = {"rope": table, "attn_mask": bias}
            branch = attention(block.norm1(y), **inside)
            middle = y + branch
        else:
            branch = attention(block.norm1(y), *tables, attn_mask=bias)
            middle = y + block.norm2(branch)
        selection = chosen(number)
        matrix = selection.matrix()
        size = ((matrix > 0).float() @ size[..., None])[..., 0]
        places = selection.dest().gather(1, places)
        index = selection.index[..., None]
        tables = [t.gather(1, index.expand(-1, -1, t.shape[-1])) for t in tables]
        y = matrix @ middle
        if hasattr(block, "norm4"):
            y = y + block.norm4(block.mlp(block.norm3(y)))
        else:
            y = y + block.mlp(block.norm2(y))
    return y.gather(1, places[..., None].expand(-1, -1, y.shape[-1]))


@pytest.mark.parametrize("kind", ["qwen3_map", "deepseek_map", "gemma4_mean"])
@torch.no_grad()
def test_merged_tokens_are_those_of_the_blocks_by_hand(kind: str) -> None:
    model = kind_of(kind)
    x, out = pixels(model), []
    handle = model.blocks[-1].register_forward_hook(lambda m, a, y: out.append(y))
    with visprune.prune(model, "tome", r=5) as run:
        model(x)
        chosen = run._reducer.latest.selections
    handle.remove()
    assert [s.num_slots for s in chosen.values()] == [31, 26, 21, 16]
    want = by_hand(model, x, lambda number: chosen[number, number])
    oracle.assert_close(out[0], want)


@every_kind
@torch.no_grad()
def test_a_token_of_two_equal_patches_counts_as_both(kind: str) -> None:
    model = kind_of(kind)
    encoder = tower(model)
    for module in encoder.modules():
        for name in ("pos_embed", "position_embedding_table"):
            if name in module._parameters:
                module._parameters[name].zero_()
    if hasattr(encoder, "rope"):
        encoder.rope.get_embed = lambda shape: torch.cat(
            [torch.zeros(shape[0] * shape[1], 12), torch.ones(shape[0] * shape[1], 12)], dim=1
        )
    else:
        encoder.rotary_emb.inv_freq.zero_()
    x = pixels(model)
    step = encoder.patch_embed.patch_size[1]
    columns = x.unflatten(-1, (-1, 2, step)).clone()
    columns[..., 1, :] = columns[..., 0, :]
    x = columns.flatten(-3)
    want = model(x)
    with visprune.prune(model, "tome", r=[18, 0, 0, 0]) as run:
        got = model(x)
        assert set(torch.cat(run.trace.sizes).tolist()) == {2.0}
    oracle.assert_close(got, want)


@pytest.mark.parametrize("kind", ["qwen3", "deepseek", "gemma4"])
@torch.no_grad()
def test_the_keys_that_are_matched_are_turned(kind: str) -> None:
    model = kind_of(kind)
    x, seen = pixels(model, 1), []
    real = functional.scaled_dot_product_attention

    def look(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(k)
        return real(q, k, v, *args, **kwargs)

    functional.scaled_dot_product_attention = look
    try:
        model(x)
    finally:
        functional.scaled_dot_product_attention = real
    want = oracle.matched_by_hand(seen[0].mean(1), torch.ones(1, 36), 7, prefix=0)
    with visprune.prune(model, "tome", r=[7, 0, 0, 0]) as run:
        model(x)
        got = run._reducer.latest.selections[0, 0]
    assert torch.equal(got.matrix() > 0, want.matrix() > 0)


@every_kind
@pytest.mark.parametrize("method", ["topk", "evit", "random", "uniform", "dynamicvit", "spatten"])
def test_what_it_cannot(kind: str, method: str) -> None:
    model = kind_of(kind)
    with pytest.raises(
        UnsupportedModel, match=r"(a map of all patches|no class token).*Methods that fit it"
    ) as e:
        visprune.prune(model, method, keep_ratio=0.8)
    named = str(e.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert set(named) == {"keep_all", *METHODS}
    assert set(named) == small.listed(f"timm.{type(tower(model)).__name__}")


@every_kind
def test_gradients_checkpointing_and_features(kind: str) -> None:
    model = kind_of(kind).train()
    x = pixels(model).requires_grad_()

    def gradients() -> dict[str, Tensor]:
        model(x).square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    with visprune.prune(model, "tome", r=4):
        want = gradients()
        assert all(bool(torch.isfinite(grad).all()) for grad in want.values())
        model.set_grad_checkpointing(True)
        got = gradients()
        model.eval()
        with torch.no_grad():
            maps = model.forward_intermediates(x, intermediates_only=True)
            last, two = model.forward_intermediates(x, indices=[1, 3])
    assert got.keys() == want.keys()
    for key, grad in want.items():
        oracle.assert_close(got[key], grad)
    assert [m.shape for m in maps] == [(2, 48, 6, 6)] * 4
    assert torch.equal(two[0], maps[1])
    assert torch.equal(two[1], maps[3])
    assert last.shape[0] == 2


@every_kind
@torch.no_grad()
def test_the_cost_is_what_a_counter_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind_of(kind).requires_grad_(False)
    x = pixels(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            monkeypatch.setattr(module, "fused_attn", False)
    for method, params in (("keep_all", {}), ("tome", {"r": 4})):
        with visprune.prune(model, method, **params) as run:
            with FlopCounterMode(display=False) as counter:
                model(x)
            cost = run.cost()
        counted = counter.get_total_flops() // 2
        assert cost.vision <= counted <= cost.vision + cost.selection, method
        assert method == "tome" or cost.vision == counted


@every_kind
@torch.no_grad()
def test_threads_a_copy_and_compiled(kind: str) -> None:
    model = kind_of(kind)
    pictures = [pixels(model, 1, seed) for seed in range(6)]
    with visprune.prune(model, "tome", r=4):
        want, twin = oracle.threads_equal_turns(model, pictures)
        if kind in ("qwen3", "deepseek", "gemma4"):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="aot_eager")
            assert torch.equal(compiled(pictures[0]), want[0])
            assert torch.equal(compiled(pictures[1]), want[1])
    assert torch.equal(twin(pictures[0]), want[0])
    visprune.remove(twin)
    assert torch.equal(twin(pictures[0]), model(pictures[0]))


@pytest.mark.parametrize("kind", ["qwen3", "deepseek", "gemma4"])
@torch.no_grad()
def test_another_size_and_a_batch_as_its_pictures(kind: str) -> None:
    model = kind_of(kind)
    x = pixels(model, 3, rows=12, columns=6)
    want = model(x)
    with visprune.prune(model, "tome", r=0):
        assert torch.equal(model(x), want)
    with visprune.prune(model, "tome", r=5) as run:
        got = model(x)
        assert run.trace.num_tokens == [72] * 3
        for row in range(3):
            oracle.assert_close(got[row], model(x[row : row + 1])[0])


@torch.no_grad()
def test_patches_in_place_of_pictures_are_refused() -> None:
    model = kind_of("gemma4_mean")
    patches, places = torch.rand(1, 36, 768), torch.zeros(1, 36, 2, dtype=torch.int64)
    model(patches, patch_coord=places)
    with (
        visprune.prune(model, "tome", r=4),
        pytest.raises(UnsupportedModel, match="takes pictures"),
    ):
        model(patches, patch_coord=places)
