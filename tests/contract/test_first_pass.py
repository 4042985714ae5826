# SPDX-License-Identifier: Apache-2.0
"""A first pass before the decoder: what it reads, what it leaves alone, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract import oracle
from tests.contract.cases import batch
from tests.contract.test_removal import state
from tests.contract.test_signals import Looks, looked, visual
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.backbones.hf.probe import Attended, Wanted, watch
from visprune.core import Site
from visprune.core.signals import LastQueryLogits
from visprune.cost.cost import prefill_macs
from visprune.errors import ConfigError
from visprune.machine.find import find_adapter

LAYER = 2
ROWS = [[3, "a", 6], [2, "b", 4, "b", 3]]
both = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])


def products(model: Any, inputs: dict[str, Any], kernel: int) -> list[Tensor]:
    """The rule in a loop, of each row's tokens without padding, from the untouched model."""
    found: list[Attended] = []
    handle = watch(find_adapter(model).attention(LAYER), lambda: Wanted(found.append))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    rows = []
    for row, valid in enumerate(inputs["attention_mask"].bool()):
        query = found[0].query[row][:, valid][:, -1].double()
        key = found[0].key[row][:, valid].double()
        group = len(query) // len(key)
        summed = sum(key[h // group] @ query[h] for h in range(len(query)))
        half = kernel // 2
        padded = torch.nn.functional.pad(summed, (half, half))
        mean = torch.stack([padded[n : n + kernel].sum() / kernel for n in range(len(summed))])
        out = torch.zeros(len(valid), dtype=torch.float64)
        out[valid] = mean
        rows.append(out)
    return rows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kernel", [1, 5])
@both
def test_products_of_the_last_query(kernel: int, family: str, attention: str, models: Any) -> None:
    model, inputs = models(family, attention), batch(family, ROWS)
    want = products(model, inputs, kernel)
    signal = LastQueryLogits(at=LAYER, kernel=kernel)
    got = looked(model, inputs, signal, Site.projector())
    for mine, (row, free) in zip(got, visual(family, inputs), strict=True):
        assert torch.allclose(mine.double(), want[row][free], atol=1e-4)


@both
@torch.no_grad()
def test_the_second_pass_reads_the_shorter_prompt(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    model(**inputs, output_hidden_states=True)  # transformers leaves hooks of its own
    before = state(model)
    with visprune.prune(model, "gemfilter", num_keep=5, layer=LAYER) as run:
        out = model(**inputs, use_cache=True, output_hidden_states=True)
        kept = run.trace.kept[0]
        cost = run.cost()
        trace = run.trace
    want = products(model, inputs, 5)[0][visual(family, inputs)[0][1]]
    assert kept.tolist() == sorted(want.topk(5).indices.tolist())
    length = inputs["input_ids"].shape[1]
    stored = {entry.num_stored for entry in cache_of(out).layers}
    assert stored == {length - len(want) + 5}  # every layer holds the same, the first pass none
    assert len(out.hidden_states) == 5
    assert trace.positions == ("compact" if family == "llava" else "original")
    # Both passes are counted.
    adapter = find_adapter(model)
    shape = adapter.cost_shape()
    first = prefill_macs(shape.decoder, [length] * LAYER + [0] * (4 - LAYER))
    rule = 2 * 8 * length  # a product with each key of each key head
    assert cost.selection == first + length * adapter.qk_macs(LAYER) + rule
    assert cost.prefill == prefill_macs(shape.decoder, [length - len(want) + 5] * 4)
    assert state(model) == before


@both
@torch.no_grad()
def test_a_batch_equals_its_samples(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, ROWS)
    with visprune.prune(model, "gemfilter", num_keep=5, layer=LAYER) as run:
        logits, kept = model(**inputs).logits, [k.tolist() for k in run.trace.kept]
        alone = []
        for number, row in enumerate(ROWS):
            single = model(**batch(family, [row])).logits[0]
            valid = inputs["attention_mask"][number].bool()
            assert oracle.error(logits[number, valid], single) <= 2e-5
            alone += [k.tolist() for k in run.trace.kept]
    assert kept == alone


@both
@torch.no_grad()
def test_a_picture_of_a_later_turn(family: str, models: Any) -> None:
    # The first pass reads the cache of the turn before, pruned or not, and writes nothing.
    model = models(family)
    for first in ([30], [3, "b", 4]):
        whole = batch(family, [[*first, "a", 6]])
        turn, text = batch(family, [["a", 6]]), batch(family, [first])
        seen = text["input_ids"].shape[1]
        text["input_ids"], turn["input_ids"] = (
            whole["input_ids"][:, :seen], whole["input_ids"][:, seen:],
        )  # fmt: skip
        signal = LastQueryLogits(at=LAYER, kernel=1)
        want = looked(model, whole, signal, Site.projector())[-1]
        method = Looks(site=Site.projector(), wanted=signal)
        with visprune.prune(model, method):
            cache = cache_of(model(**text, use_cache=True))
            method.seen.clear()
            later = {**turn, "attention_mask": torch.ones(1, seen + turn["input_ids"].shape[1])}
            if family == "qwen2_5_vl":
                later["position_ids"] = _ids(model, whole)[..., seen:]
            model(**later, **{CACHE_ARGUMENT: cache}, use_cache=True)
            assert cache.get_seq_length() == whole["input_ids"].shape[1]
        oracle.assert_close(method.seen[-1][0], want)


def _ids(model: Any, inputs: dict[str, Any]) -> Tensor:
    ids, _ = model.model.get_rope_index(
        inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
    )  # fmt: skip
    return ids


@torch.no_grad()
def test_it_reads_what_others_have_left(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    length = inputs["input_ids"].shape[1]
    with visprune.prune(model, "uniform", num_keep=12) as run:
        model(**inputs)
        half = set(run.trace.kept[0].tolist())
    chain = "uniform+gemfilter+fastv+snapkv"
    params = {"uniform.num_keep": 12, "gemfilter.num_keep": 8, "fastv.num_keep": 6}
    deep = {"gemfilter.layer": 3, "fastv.layer": 1, "snapkv.num_keep": 3}
    with visprune.prune(model, chain, **params, **deep) as run:
        cache = cache_of(model(**inputs, use_cache=True))
        trace = run.trace
    assert [s["after"] for s in trace.stages] == [[12], [8], [6]]
    assert set(trace.kept[0].tolist()) <= half
    text = length - 36
    assert trace.ahead == [(3, [text + 12])]  # no stage of another member ran in it
    assert [row[0] for row in trace.cache.slots[0]] == [text + 3] * 4
    assert [entry.num_stored for entry in cache.layers] == [text + 3] * 4


def test_where_it_cannot_look(models: Any) -> None:
    model = models("llava")
    with pytest.raises(ConfigError, match=r"decoder layer 9 does not exist"):
        visprune.prune(model, "gemfilter", num_keep=5, layer=9)
    with pytest.raises(ConfigError, match="odd number of neighbours, got 4"):
        visprune.get_method("gemfilter", num_keep=5, kernel=4)
    deep = Looks(site=Site.decoder(LAYER), wanted=LastQueryLogits(at=LAYER))
    with pytest.raises(ConfigError, match=r"Let the stage stand at Site.projector"):
        visprune.prune(model, deep)
