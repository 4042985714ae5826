# SPDX-License-Identifier: Apache-2.0
"""One adapter takes transformers' plain image encoders, and the models around them."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.encoders import hf, oracle
from visprune.backbones.encoders import AROUND, AROUND_OTHER, BIASED, PLAIN, TABLE, WHOLE
from visprune.errors import UnsupportedModel

EVERYTHING: dict[str, dict[str, Any]] = {
    "tome": {"r": 0},
    "pitome": {"keep_ratio": 1.0},
    "evit": {"keep_ratio": 1.0},
    "topk": {"keep_ratio": 1.0},
    "dynamicvit": {"keep_ratio": 1.0},
    "random": {"keep_ratio": 1.0},
    "uniform": {"keep_ratio": 1.0},
    "spatten": {"keep_ratio": 1.0},
    "diffrate": {"pruned": [197] * 3, "merged": [197] * 3},
    "ficoco_v": {"r": 0},
    "ipcv": {"keep_ratio": 1.0},
    "keep_all": {},
}
DROPPING = {"topk": {"keep_ratio": 0.6}, "random": {"keep_ratio": 0.6}}
# One of each form of layer, attention, rotary table and head.
KINDS = (
    "ViTModel", "Dinov2WithRegistersModel", "DINOv3ViTModel", "MLCDVisionModel",
    "InternVLVisionModel", "Aimv2VisionModel-head", "BlipVisionModel", "Siglip2VisionModel",
    "VideoMAEModel", "CLIPVisionModel",
)  # fmt: skip
every_name = pytest.mark.parametrize("name", hf.NAMES)
every_kind = pytest.mark.parametrize("name", KINDS)


def pruned(model: Any, method: str, params: dict[str, Any]) -> Any:
    """A run, or None where the model has no class token's attention."""
    try:
        return visprune.prune(model, method, **params)
    except UnsupportedModel:
        assert method in ("topk", "evit", "diffrate", "ficoco_v")
        return None


def test_all_of_the_table_is_here() -> None:
    rows = {name.partition(".")[2] for name in TABLE if name.startswith("transformers.")}
    assert rows == {*PLAIN, *BIASED, *WHOLE}
    around = set(AROUND) - set(AROUND_OTHER)
    assert set(hf.NAMES) >= {*PLAIN, *around}
    assert len(hf.NAMES) > 70


@every_name
@torch.no_grad()
def test_keeping_all_changes_no_bit_and_reducing_shortens(name: str) -> None:
    model, x = hf.shared(name), hf.inputs(name, batch=1)
    want = hf.answer(model(**x))
    assert bool(torch.isfinite(want).all())
    for method in EVERYTHING if name in KINDS else ("tome", "evit"):
        run = pruned(model, method, EVERYTHING[method])
        if run is None:
            continue
        with run:
            got = hf.answer(model(**x))
            stages = run.trace.stages
        assert torch.equal(got, want), method
        assert stages or method == "keep_all"
        assert all(stage["before"] == stage["after"] for stage in stages)
    with visprune.prune(model, "tome", r=4) as run:
        assert not torch.equal(hf.answer(model(**x)), want)
        lengths = run.trace.mlp_tokens_per_layer[0]
        total = run.trace.num_tokens[0]
        assert lengths == [total - 4 * n for n in range(1, hf.LAYERS + 1)]
        assert run.cost().vision > 0
    assert torch.equal(hf.answer(model(**x)), want)


def by_hand(encoder: Any, x: dict[str, Tensor], alive: list[Tensor], prefix: int) -> Tensor:
    """What the last layer gives of one picture when layer n is called on the patches alive[n]."""
    layers = layers_of(encoder)
    seen: list[Any] = []

    def first(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))

    handle = layers[0].register_forward_pre_hook(first, with_kwargs=True)
    encoder(**x)
    handle.remove()
    args, kwargs = seen[0]
    rest = list(args[1:])
    y = args[0] if args else kwargs.pop("hidden_states")
    there = torch.ones(y.shape[1] - prefix, dtype=torch.bool)
    for layer, left in zip(layers, alive, strict=True):
        own = left[there]
        y = y[:, torch.nn.functional.pad(own, (prefix, 0), value=True)]
        there = left

        def rows(value: Any, left: Tensor = left) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(rows(part, left) for part in value)
            if not isinstance(value, Tensor):
                return value
            first = prefix if len(value) > len(left) else 0
            return value[torch.nn.functional.pad(left, (first, 0), value=True)]

        given = {n: rows(v) if n == "position_embeddings" else v for n, v in kwargs.items()}
        out = layer(y, *[rows(value) for value in rest], **given)
        y = out[0] if isinstance(out, tuple) else out
    return y


def layers_of(encoder: Any) -> Any:
    found = [m for m in encoder.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(m for m in found if len(m) == hf.LAYERS and "Layer" in type(m[0]).__name__)


@every_name
@pytest.mark.parametrize("method", DROPPING)
@torch.no_grad()
def test_dropping_equals_calling_the_layers_on_what_is_left(name: str, method: str) -> None:
    model, x = hf.shared(name), hf.inputs(name, batch=1)
    encoder = hf.tower(model)
    pixels = {k: v for k, v in x.items() if k not in ("input_ids", "attention_mask")}
    run = pruned(encoder, method, DROPPING[method])
    if run is None:
        return
    last: list[Any] = []
    with run:
        handle = layers_of(encoder)[-1].register_forward_hook(lambda m, a, out: last.append(out))
        encoder(**pixels)
        handle.remove()
        keep = [oracle.alive(run, layer)[0] for layer in range(hf.LAYERS + 1)]
        prefix = run.adapter.prefix
    # The MLP works token by token: who leaves before it leaves behind it.
    want = by_hand(encoder, pixels, keep[:-1], prefix)
    want = want[:, torch.nn.functional.pad(keep[-1][keep[-2]], (prefix, 0), value=True)]
    assert 0 < int(keep[-1].sum()) < len(keep[-1])
    oracle.assert_close(last[0], want)


def without_places(name: str) -> Any:
    """A model to which patches of equal pixels are equal tokens, whatever their places."""
    model = hf.build(name)
    with torch.no_grad():
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "position" in path and "ids" not in path and "text" not in path:
                tensor.zero_()
            if path.endswith("inv_freq"):
                tensor.zero_()
        for module in model.modules():
            table = getattr(module, "position_embeddings", None)
            if isinstance(table, Tensor):
                table.data.zero_()
    return model


# Their places are computed, or drawn anew for every picture.
_PLACED = ("Aimv2VisionModel-native", "ViTMAEModel")


@pytest.mark.parametrize("name", [name for name in hf.NAMES if name not in _PLACED])
@torch.no_grad()
def test_a_token_of_two_equal_patches_counts_as_both(name: str) -> None:
    model, x = without_places(name), hf.inputs(name, batch=1)
    x["pixel_values"] = hf.in_pairs(x["pixel_values"])
    want = hf.answer(model(**x))
    if want.dim() == 3 and want.shape[1] > 30:
        want = want[:, -2:].mean(1)  # tokens: of the last pair
    half = 36 if "VideoMAE" in name or "Vivit" in name else 18
    with visprune.prune(model, "tome", r=[half, 0, 0]) as run:
        got = hf.answer(model(**x))
        assert len(run.kept[0]) == half
        assert set(torch.cat(run.trace.sizes).tolist()) == {2.0}
    got = got[:, -1] if got.shape != want.shape else got
    oracle.assert_close(got, want)


@every_kind
@pytest.mark.parametrize("method", ["tome", "evit", "random"])
def test_gradients_under_checkpointing(name: str, method: str) -> None:
    params = {"tome": {"r": 3}}.get(method, {"keep_ratio": 0.6})
    model, x = hf.build(name).train(), hf.inputs(name)
    x["pixel_values"].requires_grad_()
    run = pruned(model, method, params)
    if run is None:
        return

    def gradients() -> dict[str, Tensor]:
        model(**x).last_hidden_state.square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    with run:
        want = gradients()
        assert len(want) >= 10 * hf.LAYERS
        assert all(bool(torch.isfinite(grad).all()) for grad in want.values())
        # MLCD learns a part of its rotary table: a checkpoint that reenters does not take it
        # backward twice, pruned or not.
        for reentrant in (False,) if name.startswith("MLCD") else (False, True):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            got = gradients()
            assert got.keys() == want.keys()
            for key, grad in want.items():
                torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in hf.NAMES if name.endswith("Backbone")])
@pytest.mark.parametrize("method", ["tome", "topk"])
@torch.no_grad()
def test_feature_maps_lie_on_the_grid(name: str, method: str) -> None:
    model, x = hf.shared(name), hf.inputs(name)
    whole = model(**x).feature_maps
    with visprune.prune(
        model, method, **({"r": 4} if method == "tome" else DROPPING[method])
    ) as run:
        maps = model(**x).feature_maps
        slots = run._reducer.latest.composed(hf.LAYERS - 1)
    assert [m.shape for m in maps] == [m.shape for m in whole]
    dest = slots.dest()
    last = maps[-1].flatten(2).transpose(1, 2)
    for row in range(2):
        for a in range(36):
            twin = int((dest[row] == dest[row, a]).nonzero()[0]) if dest[row, a] >= 0 else None
            if twin is not None:
                assert torch.equal(last[row, a], last[row, twin])
    assert not torch.equal(maps[-1], whole[-1])


@every_kind
@torch.no_grad()
def test_removal_restores(name: str) -> None:
    model, x = hf.shared(name), hf.inputs(name, batch=1)
    before = {n: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), id(m.config)
                  if hasattr(m, "config") else 0) for n, m in model.named_modules()}  # fmt: skip
    want = hf.answer(model(**x))
    visprune.prune(model, "tome", r=3).remove()
    after = {n: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), id(m.config)
                 if hasattr(m, "config") else 0) for n, m in model.named_modules()}  # fmt: skip
    assert after == before
    assert torch.equal(hf.answer(model(**x)), want)


@every_kind
@torch.no_grad()
def test_half_precision(name: str) -> None:
    model, x = hf.shared(name), hf.inputs(name)
    with visprune.prune(model, "tome", r=4) as run:
        with torch.autocast("cpu", torch.bfloat16):
            got = model(**x).last_hidden_state
        assert bool(torch.isfinite(got).all())
        assert got.shape[1] == run.adapter.prefix + run.trace.num_tokens[0] - 12


@torch.no_grad()
def test_masked_patches_are_refused_and_a_mask_of_ones_is_none() -> None:
    model, x = hf.shared("Siglip2VisionModel"), hf.inputs("Siglip2VisionModel")
    with visprune.prune(model, "tome", r=3):
        model(**x)
        x["pixel_attention_mask"][0, -4:] = 0
        with pytest.raises(UnsupportedModel, match="masks patches"):
            model(**x)
    model, x = hf.shared("Idefics3VisionTransformer"), hf.inputs("Idefics3VisionTransformer")
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0, 5] = False
    with (
        visprune.prune(model, "tome", r=3),
        pytest.raises(UnsupportedModel, match="masks patches"),
    ):
        model(**x, patch_attention_mask=mask)


@torch.no_grad()
def test_a_clip_keeps_its_frames() -> None:
    model, x = hf.shared("VideoMAEModel"), hf.inputs("VideoMAEModel", batch=1)
    with visprune.prune(model, "uniform", keep_ratio=0.5) as run:
        model(**x)
        assert run.trace.grids == [((2, 6, 6),)]
        assert run.grid == (2, 6, 6)
        pos = run.trace.pos[0]
    assert set(pos[:, 0].tolist()) == {0, 1}
    assert int(pos[:, 1:].max()) <= 5


@torch.no_grad()
def test_timm_inside_transformers() -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

    options = {"architecture": "vit_tiny_patch16_224", "num_classes": 3,
               "model_args": {"depth": 3, "img_size": 64}}  # fmt: skip
    for kind in (TimmWrapperModel, TimmWrapperForImageClassification):
        config = TimmWrapperConfig(**options)
        config.num_labels = 3
        model = kind(config).eval()
        x = torch.randn(1, 3, 64, 64)
        want = hf.answer(model(x))
        with visprune.prune(model, "tome", r=0):
            assert torch.equal(hf.answer(model(x)), want)
        with visprune.prune(model, "tome", r=2) as run:
            assert not torch.equal(hf.answer(model(x)), want)
            assert [len(kept) for kept in run.kept] == [10]


@torch.no_grad()
def test_flex_attention_is_not_given_a_bias_that_it_misreads(monkeypatch: Any) -> None:
    from transformers.integrations import sdpa_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = []

    def flex(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        masks.append(mask)
        return sdpa_attention.sdpa_attention_forward(module, q, k, v, None, **kwargs)

    model, x = hf.build("CLIPVisionModel"), hf.inputs("CLIPVisionModel")
    with visprune.prune(model, "tome", r=4):
        want = hf.answer(model(**x))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", flex)
    model.config._attn_implementation = "flex_attention"
    with visprune.prune(model, "tome", r=4):
        torch.testing.assert_close(hf.answer(model(**x)), want)
    assert masks == [None]  # the first layer, before any token merged


@torch.no_grad()
def test_flash_attention_is_refused_where_it_would_ignore_the_bias(monkeypatch: Any) -> None:
    from transformers.integrations import sdpa_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    flash = sdpa_attention.sdpa_attention_forward
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model, x = hf.build("CLIPVisionModel"), hf.inputs("CLIPVisionModel")
    model.config._attn_implementation = "flash_attention_2"
    with (
        visprune.prune(model, "tome", r=4),
        pytest.raises(UnsupportedModel, match="FlashAttention takes no bias per key"),
    ):
        model(**x)
    with visprune.prune(model, "tome", r=4, prop_attn=False):
        model(**x)


@pytest.mark.parametrize("name", [*KINDS, "CLIPForImageClassification", "ViTMAEModel"])
@torch.no_grad()
def test_the_cost_is_what_a_counter_counts(name: str) -> None:
    model, x = hf.build(name, attn_implementation="eager"), hf.inputs(name)
    for method, params in (("keep_all", {}), ("tome", {"r": 4}), ("random", {"keep_ratio": 0.6})):
        with visprune.prune(model, method, **params) as run:
            with FlopCounterMode(display=False) as counter:
                model(**x)
            cost = run.cost()
        counted = counter.get_total_flops() // 2
        # A head of one query, written with torch's own attention, is not in the counter's list.
        slack = 2 * 2 * 32 * 36 if "head" in name else 0
        assert cost.vision <= counted + slack, method
        assert counted <= cost.vision + cost.selection, method


@torch.no_grad()
def test_int8_costs_the_same() -> None:
    for name in ("ViTModel", "CLIPForImageClassification"):
        model, x = hf.shared(name), hf.inputs(name)
        small = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8
        )
        costs = []
        for each in (model, small):
            with visprune.prune(each, "tome", r=4) as run:
                each(**x)
                costs.append(run.cost())
        assert costs[0] == costs[1]


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "MLCDVisionModel", "BlipVisionModel"])
@torch.no_grad()
def test_two_threads_and_a_copy(name: str) -> None:
    model = hf.build(name)
    pictures = [hf.inputs(name, batch=1, seed=seed) for seed in range(12)]
    with visprune.prune(model, "tome", r=4):
        want = [hf.answer(model(**x)) for x in pictures]
        twin = copy.deepcopy(model)
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda x: hf.answer(model(**x)), pictures * 2))
        for one, other in zip(got, want * 2, strict=True):
            assert torch.equal(one, other)
    assert torch.equal(hf.answer(twin(**pictures[0])), want[0])
    visprune.remove(twin)
    assert torch.equal(hf.answer(twin(**pictures[0])), hf.answer(model(**pictures[0])))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DINOv3ViTModel", "InternVLVisionModel"])
@torch.no_grad()
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    model = hf.build(name)
    with visprune.prune(model, "tome", r=4):
        compiled = torch.compile(model, backend="aot_eager")
        for seed in range(2):
            x = hf.inputs(name, seed=seed)
            oracle.assert_close(hf.answer(compiled(**x)), hf.answer(model(**x)))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPModel", "SiglipVisionModel"])
@torch.no_grad()
def test_saving_keeps_the_whole_model_and_the_method(name: str, tmp_path: Path) -> None:
    model, x = hf.build(name), hf.inputs(name)
    with visprune.prune(model, "tome", r=4) as run:
        want = hf.answer(model(**x))
        visprune.save_pretrained(run, tmp_path / "saved")
    again, kept = visprune.load_pretrained(tmp_path / "saved")
    assert type(again) is type(model)
    assert kept is not None
    assert torch.equal(hf.answer(again(**x)), want)
