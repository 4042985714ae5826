# SPDX-License-Identifier: Apache-2.0
"""Tokens that leave inside the image encoder: every such method on every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests import tiny
from tests.contract import oracle
from tests.contract.cases import BEFORE, CACHE, EVERY, FAMILIES, INSIDE, batch, places
from tests.encoders.oracle import matched_by_hand
from visprune.errors import ConfigError, UnsupportedModel

TOWERS = ("llava", "llava_next")
FEW: dict[str, dict[str, Any]] = {
    "tome": {"r": 4},
    "pitome": {"keep_ratio": 0.8},
    "evit": {"keep_ratio": 0.6},
    "topk": {"keep_ratio": 0.6},
    "dynamicvit": {"num_keep": 12},
    "spatten": {"keep_ratio": 0.5},
    "diffrate": {},
    "ficoco_v": {"r": 4, "front": 0.3},
    "ipcv": {"layer": 1, "attention_stabilization": 0},
}
KEEP_ALL = {
    "tome": {"r": 0},
    "ficoco_v": {"r": 0},
    "diffrate": {"pruned": [37] * 3, "merged": [37] * 3, "tokens": 37},
}
ALL: dict[str, dict[str, Any]] = {name: KEEP_ALL.get(name, {"keep_ratio": 1.0}) for name in FEW}
every_method = pytest.mark.parametrize("name", INSIDE)
every_tower = pytest.mark.parametrize("family", TOWERS)


def test_every_method_has_a_contract() -> None:
    assert set(INSIDE) == set(FEW)
    assert {*INSIDE, *EVERY, *CACHE, *BEFORE} == set(visprune.list_methods())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@every_method
@every_tower
@torch.no_grad()
def test_keep_all_is_bit_equal(name: str, family: str, attn: str, models: Any) -> None:
    model, inputs = models(family, attn), batch(family)
    options = {"max_new_tokens": 3, "do_sample": False}
    plain, cached = model(**inputs).logits, model.generate(**inputs, **options)
    with oracle.forwards() as seen, visprune.prune(model, name, **ALL[name]) as run:
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, **options), cached)
        assert run.encoder.reducer.latest.selections
    assert len(seen) == 2
    assert run.trace.num_tokens == [len(kept) for kept in run.trace.kept]


@every_method
@every_tower
@torch.no_grad()
def test_the_rest_fits(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    before = model(**inputs).logits
    with visprune.prune(model, name, **FEW[name]) as run:
        pruned = model(**inputs).logits
        trace = run.trace
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        one_by_one = []
        for row in range(3):
            alone = batch(family, [cases_row(family, row)])
            one_by_one.append(model(**alone).logits[0])
    assert torch.equal(model(**inputs).logits, before)
    assert pruned.shape == before.shape
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3
    for (row, free, fixed), kept in zip(places(family, inputs), trace.kept, strict=True):
        dropped = torch.ones(len(free), dtype=torch.bool)
        dropped[kept] = False
        assert (name != "ipcv") == bool(dropped.any())  # whose patches all come back
        assert not bool(dropped.all())
        assert bool((trace.index[row, free[dropped]] < 0).all())
        assert bool((trace.index[row, free[kept]] >= 0).all())
        assert bool((trace.index[row, fixed] >= 0).all())
        assert bool((kept.diff() > 0).all())
    valid = inputs["attention_mask"].bool()
    for row, alone in enumerate(one_by_one):
        oracle.assert_close(pruned[row, valid[row]], alone)


def cases_row(family: str, row: int) -> list[Any]:
    from tests.contract.cases import prompts

    return prompts(family)[row]


@contextmanager
def hidden_in_tower(model: Any, run: Any) -> Iterator[None]:
    """The untouched tower, each layer without the keys of the patches that have left."""
    latest, layers = run.encoder.reducer.latest, run.encoder.reducer.adapter.layers

    def masked(seen: Tensor) -> Any:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            keys = torch.nn.functional.pad(seen, (1, 0), value=True)
            bias = torch.zeros(keys.shape).masked_fill(~keys, float("-inf"))[:, None, None]
            return args, {**kwargs, "attention_mask": bias}

        return before

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            index = latest.composed(number - 1).index
            seen = torch.zeros(latest.batch, latest.total, dtype=torch.bool).scatter(1, index, True)
            hook = masked(seen)
            handle = layer.attention.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@every_tower
@pytest.mark.parametrize(
    ("name", "params"),
    [("topk", {"keep_ratio": 0.6}), ("evit", {"keep_ratio": 0.6, "fuse": False})],
)
@torch.no_grad()
def test_drop_equals_hide_as_key(
    name: str, params: dict[str, Any], family: str, models: Any
) -> None:
    model, inputs = models(family), batch(family)
    with oracle.forwards() as seen, visprune.prune(model, name, **params) as run:
        logits = model(**inputs).logits
    keep = oracle.alive(seen[0])
    with hidden_in_tower(model, run):
        want = oracle.hidden_logits(model, inputs, keep)
    there = keep[-1] & inputs["attention_mask"].bool()
    oracle.assert_close(logits[there], want[there])


def tower_by_hand(model: Any, pixels: Tensor, r: int, layers: int) -> tuple[Tensor, Tensor]:
    """CLIP's layers written out with ToMe: features of every patch, and its slot ``[P, N]``."""
    tower = model.model.vision_tower
    parts = dict(tower.named_modules())
    embeddings = next(m for n, m in parts.items() if n.endswith("embeddings"))
    norm = next(m for n, m in parts.items() if n.endswith("pre_layrnorm"))
    blocks: Any = next(m for n, m in parts.items() if n.endswith("encoder.layers"))
    x = norm(embeddings(pixels))
    size = torch.ones(len(x), x.shape[1] - 1)
    slot = torch.arange(x.shape[1] - 1).expand(len(x), -1)
    for block in list(blocks)[:layers]:
        attn, rows = block.self_attn, block.layer_norm1(x)
        heads = [p(rows).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
                 for p in (attn.q_proj, attn.k_proj, attn.v_proj)]  # fmt: skip
        bias = torch.nn.functional.pad(size, (1, 0), value=1.0).log()[:, None, None]
        weights = (heads[0] @ heads[1].transpose(-2, -1) * attn.scale + bias).softmax(-1)
        x = x + attn.out_proj((weights @ heads[2]).transpose(1, 2).flatten(2))
        chosen = matched_by_hand(heads[1][:, :, 1:].mean(1), size, r, 1)
        matrix = chosen.matrix()
        size = ((matrix > 0).float() @ size[..., None])[..., 0]
        assert chosen.dest is not None
        slot = chosen.dest().gather(1, slot)
        x = torch.cat([x[:, :1], matrix @ x[:, 1:]], dim=1)
        x = x + block.mlp(block.layer_norm2(x))
    return x[:, 1:].gather(1, slot[..., None].expand(-1, -1, x.shape[-1])), slot


@every_tower
@torch.no_grad()
def test_merging_equals_the_tower_written_out(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    with oracle.forwards() as seen, visprune.prune(model, "tome", r=4):
        logits = model(**inputs).logits
    pixels = inputs["pixel_values"]
    if family == "llava_next":
        counts = [1 + h // 24 * (w // 24) for h, w in inputs["image_sizes"].tolist()]
        pixels = torch.cat([own[:count] for own, count in zip(pixels, counts, strict=True)])
    features, slot = tower_by_hand(model, pixels, 4, layers=2)  # the last but one is read
    assert {len(row.unique()) for row in slot} == {36 - 2 * 4}
    projector = model.model.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda module, args: (features,))
    keep = oracle.alive(seen[0])
    try:
        want = oracle.hidden_logits(model, inputs, keep)
    finally:
        handle.remove()
    there = keep[-1] & inputs["attention_mask"].bool()
    oracle.assert_close(logits[there], want[there])


@every_method
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TOWERS])
def test_other_towers_are_refused(name: str, family: str, models: Any) -> None:
    model = models(family)
    with pytest.raises(UnsupportedModel, match=r"acts inside the image encoder.*be reduced"):
        visprune.prune(model, name, **FEW[name])


def test_several_feature_layers_are_refused() -> None:
    model = tiny.build("llava")
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UnsupportedModel, match=r"joins the outputs of encoder layers \[-2, -1\]"):
        visprune.prune(model, "tome", r=2)


@torch.no_grad()
def test_features_from_elsewhere_are_refused(models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    encoded = visprune.encode_images(model, pixel_values=inputs.pop("pixel_values"))
    with (
        visprune.prune(model, "tome", r=2),
        pytest.raises(ConfigError, match="encoded without it"),
    ):
        model(**inputs, mm_encoder_outputs=encoded.select())


@every_tower
@torch.no_grad()
def test_the_cost_of_tower_and_projector_falls(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    with visprune.prune(model, "keep_all") as run:
        whole = run.cost(inputs)
    with visprune.prune(model, "tome", r=4) as run:
        less = run.cost(inputs)
    assert less.vision < whole.vision
    assert less.projector == whole.projector * (36 - 8) // 36
    assert less.selection > 0
    assert less.prefill < whole.prefill


@every_tower
def test_training_through_the_tower(family: str) -> None:
    model, inputs = tiny.build(family), batch(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with visprune.prune(model, "tome", r=4):
        model(**inputs, labels=labels).loss.backward()
    tower = [p.grad for n, p in model.named_parameters() if "layers.0" in n and "vision" in n]
    assert tower
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in tower)
    assert any(bool(grad.any()) for grad in tower)
