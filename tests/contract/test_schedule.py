# SPDX-License-Identifier: Apache-2.0
"""Tokens per layer are those of the schedule, and physically so; rows that disagree stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.contract import oracle
from tests.contract.cases import (
    FIRST,
    batch,
    every_budgeted_pair,
    every_family,
    every_pair,
    few,
    places,
)
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.core.method import ModelSpec
from visprune.core.site import Site
from visprune.methods.pool import pool_tokens

LAYERS = 4
TWO = [[3, "a", 6], [2, "b", 9]]


def per_layer(name: str, params: dict[str, Any], count: int) -> list[int]:
    """Visual tokens of a picture of ``count`` tokens at each layer, by each method's own paper."""
    keep = params.get("num_keep", count)
    if name == "fastv":
        return [count, count, keep, keep]
    if name == "pyramiddrop":
        return [count, min(count, keep * 4), min(count, keep * 2), keep]
    if name not in FIRST:
        return scheduled(name, params, count)
    return [min(keep, count)] * LAYERS


def scheduled(name: str, params: dict[str, Any], count: int) -> list[int]:
    """What a method's own stages say, which the methods' tests hold to their papers."""
    spec = ModelSpec("x", num_layers=LAYERS, has_cls=True, multi_axis_rope=False)
    left, found = count, [count] * LAYERS
    for stage in visprune.get_method(name, **params).schedule(spec):
        assert stage.budget is not None
        left = stage.budget.resolve(left, count)
        first = 0 if stage.site.kind == "projector" else stage.site.resolve(LAYERS)
        found[first:] = [left] * (LAYERS - first)
    return found


@every_budgeted_pair
@torch.no_grad()
def test_tokens_per_layer_equal_the_schedule(name: str, family: str, models: Any) -> None:
    model, inputs, params = models(family), batch(family), few(name)
    with visprune.prune(model, name, **params) as run:
        out = model(**inputs, use_cache=True)
        logical = cache_of(out).get_seq_length()
    assert logical == inputs["input_ids"].shape[1]
    trace, found = run.trace, places(family, inputs)
    expected = [[0] * LAYERS for _ in range(3)]
    for n, (row, free, _) in enumerate(found):
        assert trace.num_tokens[n] == len(free)
        assert trace.image_rows[n] == row
        per = per_layer(name, params, len(free))
        if name == "pool":
            assert len(trace.kept[n]) <= params["num_keep"]
            per = [len(trace.kept[n])] * LAYERS
        expected[row] = [a + b for a, b in zip(expected[row], per, strict=True)]
        assert len(trace.kept[n]) == per[-1]
    assert trace.tokens_per_layer == expected
    assert trace.mean_tokens == [sum(row) / LAYERS for row in expected]
    # The rest of a row, text and protected tokens, is in every layer.
    visual = [sum(len(free) for row, free, _ in found if row == n) for n in range(3)]
    others = (inputs["attention_mask"].sum(1) - torch.tensor(visual)).tolist()
    whole = [[n + rest for n in row] for row, rest in zip(expected, others, strict=True)]
    assert trace.sequence_per_layer == whole
    # Physically gone: a layer stores as many slots as its longest row needs.
    stored = [entry.keys.shape[-2] for entry in cache_of(out).layers]
    assert trace.stored_per_layer == [stored] * 3
    longest = [max(row[layer] for row in whole) for layer in range(LAYERS)]
    full = max(v + o for v, o in zip(visual, others, strict=True))
    assert full == inputs["input_ids"].shape[1]
    assert stored == longest


@every_family
@torch.no_grad()
def test_budgets_are_per_picture_and_clamped(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    counts = [len(free) for _, free, _ in places(family, inputs)]
    wanted = min(counts) + (4 if max(counts) > min(counts) else 0)
    with visprune.prune(model, "uniform", num_keep=wanted) as run:
        model(**inputs)
    assert [len(kept) for kept in run.trace.kept] == [min(wanted, n) for n in counts]
    (stage,) = run.trace.stages
    assert stage["clamped"] == [n for n, count in enumerate(counts) if count < wanted]
    assert stage["before"] == counts
    assert stage["after"] == [min(wanted, n) for n in counts]
    with visprune.prune(model, "uniform", keep_ratio=0.5) as run:
        model(**inputs)
    assert [len(kept) for kept in run.trace.kept] == [round(n / 2) for n in counts]


@every_family
def test_strict_refuses_a_budget_above_the_count(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    counts = [len(free) for _, free, _ in places(family, inputs)]
    for name in ("uniform", "fastv", "todre"):
        with torch.no_grad(), visprune.prune(model, name, num_keep=500, strict=True) as run:
            with pytest.raises(visprune.BudgetError, match=rf"500 exceeds the {counts[0]} visual"):
                model(**inputs)
            with pytest.raises(visprune.BudgetError, match="keep_ratio, or strict=False"):
                model.generate(**inputs, max_new_tokens=1)
            assert run.trace.kept == []


@every_budgeted_pair
@torch.no_grad()
def test_a_budget_above_every_count_keeps_all(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    want = model(**inputs).logits
    with visprune.prune(model, name, **few(name, 10_000)) as run:
        got = model(**inputs).logits
    assert torch.equal(got, want)
    if name != "keep_all":
        clamped = [s["clamped"] for s in run.trace.stages if "share" not in s]
        assert clamped
        assert all(numbers == [0, 1, 2] for numbers in clamped)


@every_pair
@torch.no_grad()
def test_kept_patches_and_their_places(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    with visprune.prune(model, name, **few(name)) as run:
        model(**inputs)
    for kept, pos, count in zip(run.trace.kept, run.trace.pos, run.trace.num_tokens, strict=True):
        assert kept.dtype == torch.int64
        assert pos.shape == (len(kept), 3)
        assert len(set(kept.tolist())) == len(kept)
        assert 0 <= int(kept.min()) <= int(kept.max()) < count
        if family != "llava_next":
            w = 4 if count == 12 else 6
            want = torch.stack([torch.zeros_like(kept), kept // w, kept % w], 1)
        else:
            rest = kept - 36
            inside = torch.stack([torch.zeros_like(kept), kept // 6, kept % 6], 1)
            beyond = torch.stack([torch.ones_like(kept), rest // 12, rest % 12], 1)
            want = torch.where((kept < 36)[:, None], inside, beyond)
        assert torch.equal(pos, want)
        if name != "visionzip":
            assert kept.tolist() == sorted(kept.tolist())


@every_family
@torch.no_grad()
def test_pool_keeps_the_grid_that_the_trace_reports(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    with visprune.prune(model, "keep_all") as run:
        model(**inputs)
    full = run.trace.pos
    with visprune.prune(model, "pool", num_keep=9) as run:
        model(**inputs)
    for kept, pos in zip(run.trace.kept, full, strict=True):
        index, _, _ = pool_tokens(pos, 9, "image")
        assert torch.equal(kept, index)


# ToDRE's second stage -----------------------------------------------------------------------


def shares(model: Any, inputs: dict[str, Any], **params: Any) -> list[float]:
    with visprune.prune(model, "todre", tau=0.0, **params) as run:
        model(**inputs)
    return run.trace.stages[-1]["share"]


@every_family
@pytest.mark.parametrize("stage1", [True, False])
@pytest.mark.parametrize("case", ["fires", "quiet", "mixed"])
@torch.no_grad()
def test_todre_withdraws_for_each_sample_alone(
    family: str, case: str, stage1: bool, models: Any
) -> None:
    model, inputs = models(family), batch(family, [*TWO, [4]])
    params: dict[str, Any] = {"num_keep": 7} if stage1 else {"stage1": False}
    share = shares(model, inputs, **params)
    assert len(share) == 2  # one picture in each of two rows, none in the third
    assert all(0.0 < s < 1.0 for s in share)
    tau = {"fires": 1.1, "quiet": min(share) * 0.999, "mixed": sum(share) / 2}[case]
    fired = [s < tau for s in share]
    assert sum(fired) == {"fires": 2, "quiet": 0, "mixed": 1}[case]
    with oracle.forwards() as seen, visprune.prune(model, "todre", tau=tau, **params) as run:
        out = model(**inputs, use_cache=True)
    stage = run.trace.stages[-1]
    assert [after == 0 for after in stage["after"]] == fired
    assert stage["share"] == share
    layer = Site.decoder(7 / 8).resolve(LAYERS)
    for row in range(2):
        before = run.trace.tokens_per_layer[row][layer - 1]
        after = set(run.trace.tokens_per_layer[row][layer:])
        assert after == {0 if fired[row] else before}
    # Rows of different length are padded, and the trace says so.
    stored = [entry.keys.shape[-2] for entry in cache_of(out).layers]
    assert run.trace.stored_per_layer == [stored] * 3
    alive = [row[-1] for row in run.trace.sequence_per_layer]
    if case != "quiet":
        assert stored[-1] == max(alive)
    if case == "mixed":
        assert min(alive) < max(alive)
    keep = oracle.alive(seen[0])
    want = oracle.hidden_logits(model, inputs, keep)
    there = keep[-1] & inputs["attention_mask"].bool()
    oracle.assert_close(out.logits[there], want[there])
    # One token more, from the cache.
    token = torch.tensor([[7], [8], [9]])
    longer = oracle.extended(inputs, token)
    with visprune.prune(model, "todre", tau=tau, **params):
        cache = cache_of(model(**inputs, use_cache=True))
        step = model(**oracle.step(model, inputs, token), **{CACHE_ARGUMENT: cache}).logits
    want = oracle.hidden_logits(model, longer, oracle.grown(keep, longer["input_ids"].shape[1]))
    oracle.assert_close(step[:, -1], want[:, -1])


@every_family
@torch.no_grad()
def test_the_share_of_stage_two_is_that_of_the_attention_map(family: str, models: Any) -> None:
    model, inputs = models(family, "eager"), batch(family, TWO)
    share = shares(model, inputs, stage1=False)
    maps = model(**inputs, output_attentions=True).attentions
    layer = Site.decoder(7 / 8).resolve(LAYERS) - 1
    visual = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
    for row, free, fixed in places(family, inputs):
        visual[row, free] = True
        visual[row, fixed] = True
    for row in range(2):
        text = (~visual[row]).nonzero()[:, 0]
        text = text[text > int(visual[row].nonzero().min())]
        text = text[inputs["attention_mask"][row, text].bool()]
        want = maps[layer][row][:, text][:, :, visual[row]].sum(-1).mean()
        assert share[row] == pytest.approx(float(want), abs=2e-6)


# Scores --------------------------------------------------------------------------------------

RANKED = pytest.mark.parametrize(
    ("name", "params"),
    [("fastv", {"layer": 2}), ("fastv", {"layer": 3}), ("pyramiddrop", {"depths": (0.5,)})],
)


@RANKED
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@every_family
@torch.no_grad()
def test_survivors_are_the_top_of_the_attention_map(
    name: str, params: Any, attn: str, family: str, models: Any
) -> None:
    eager, inputs = models(family, "eager"), batch(family)
    maps = eager(**inputs, output_attentions=True).attentions
    # FastV reads the layer before the one it acts at, PyramidDrop the layer itself.
    source = maps[params["layer"] - 1] if name == "fastv" else maps[LAYERS // 2]
    with visprune.prune(models(family, attn), name, num_keep=5, **params) as run:
        models(family, attn)(**inputs)
    for (row, free, _), kept in zip(places(family, inputs), run.trace.kept, strict=True):
        score = source[row].mean(0)[-1][free]
        top = score.topk(6).values
        assert float(top[4] - top[5]) > 1e-6 * float(top[4])  # the choice is a clear one
        assert kept.tolist() == score.topk(5).indices.sort().values.tolist()


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "todre"])
@torch.no_grad()
def test_scores_see_what_a_mask_in_four_dimensions_shows(name: str, models: Any) -> None:
    # Padding told in two dimensions or in four: the same tokens, the same evidence.
    model, inputs = models("llava"), batch("llava", TWO)
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask = mask & inputs["attention_mask"].bool()[:, None]
    mask = mask | torch.eye(length, dtype=torch.bool)
    found = []
    for given in (inputs["attention_mask"], mask[:, None]):
        with visprune.prune(model, name, **few(name, positions="original")) as run:
            model(**{**inputs, "attention_mask": given})
        found.append(run.trace)
    assert all(torch.equal(a, b) for a, b in zip(found[0].kept, found[1].kept, strict=True))
    if name == "todre":
        assert found[0].stages[-1]["share"] == pytest.approx(found[1].stages[-1]["share"], abs=1e-6)
