# SPDX-License-Identifier: Apache-2.0
"""The cache site: what new tokens see equals a full cache with the dropped slots hidden by head."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import visprune
from tests.contract import oracle
from tests.contract.cache_oracle import (
    DROPPING,
    LOSSLESS,
    MERGING,
    STORED,
    contents,
    everything,
    few,
    hidden_logits,
    stored_logits,
)
from tests.contract.cases import FAMILIES, batch
from tests.contract.test_generate import BEAMS, GREEDY, best
from tests.contract.test_removal import state
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.backbones.hf.pages import Pages, Purse
from visprune.backbones.hf.ragged import RaggedLayer
from visprune.core.cache import Action, HeadSlots
from visprune.errors import BudgetError, ConfigError, UnsupportedModel

every_dropping_pair = pytest.mark.parametrize(("name", "family"), DROPPING)
every_family = pytest.mark.parametrize("family", FAMILIES)
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize(("name", "family"), LOSSLESS)
@torch.no_grad()
def test_keeping_all_changes_no_bit(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    want, plain = model.generate(**inputs, **GREEDY, **LOGITS), model(**inputs).logits
    before = state(model)
    with visprune.prune(model, name, **everything(name)) as run:
        got = model.generate(**inputs, **GREEDY, **LOGITS)
        forms = run.trace.cache.form
        assert torch.equal(model(**inputs).logits, plain)
    assert state(model) == before  # and the model is what it was
    assert forms == ["whole"] * len(forms)
    assert torch.equal(want.sequences, got.sequences)
    assert all(torch.equal(a, b) for a, b in zip(want.logits, got.logits, strict=True))


@every_dropping_pair
@torch.no_grad()
def test_dropping_equals_hiding_by_head(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    length = inputs["input_ids"].shape[1]
    with visprune.prune(model, name, **few(name)) as run:
        out = model.generate(**inputs, **GREEDY, **LOGITS)
        trace = run.trace
    longer = oracle.extended(inputs, out.sequences[:, length:-1])
    want = hidden_logits(model, longer, trace, length)[:, length - 1 :]
    for number, logits in enumerate(out.logits):
        oracle.assert_close(logits, want[:, number])
    assert torch.equal(best(want), out.sequences[:, length:])
    # The prompt itself was read whole, and the row of text stays whole.
    plain = model.generate(**inputs, max_new_tokens=1, **LOGITS, do_sample=False)
    assert torch.equal(out.logits[0], plain.logits[0])
    assert trace.cache.slots[2] == [[5, 5]] * 4
    # Teeth: a full cache says something else.
    full = model(**longer, use_cache=False).logits[:, length - 1 :]
    assert oracle.error(full[:2, 1:], want[:2, 1:]) > 1e-3


@contextmanager
def applied(heads: dict[int, Any], action: type[Action]) -> Iterator[None]:
    """Collect what an action makes of every layer."""
    original = action.apply

    def noted(self: Action, key: Any, value: Any, kept: Any, looked: Any) -> Any:
        heads[looked.layer] = found = original(self, key, value, kept, looked)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(action, "apply", noted)
        yield


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_merging_equals_a_cache_of_what_was_merged(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    length = inputs["input_ids"].shape[1]
    heads: dict[int, Any] = {}
    with visprune.prune(model, name, **few(name)) as run:
        with applied(heads, type(run.plan.cache[1].eviction.action)):
            cache = cache_of(model(**inputs, use_cache=True))
        trace = run.trace.cache
        after = oracle.step(model, inputs, torch.tensor([[5, 6]]))
        got = model(**after, **{CACHE_ARGUMENT: cache}).logits
    plain = cache_of(model(**inputs, use_cache=True))
    whole = torch.arange(length)
    for number, entry in enumerate(plain.layers):
        if number not in heads:
            heads[number] = [HeadSlots(k, v, whole) for k, v in zip(entry.keys[0], entry.values[0],
                                                                    strict=True)]  # fmt: skip
        assert [len(head.key) for head in heads[number]] == trace.slots[0][number]
    want = stored_logits(model, [heads[n] for n in sorted(heads)], after, length)
    oracle.assert_close(got, want)
    full = model(**after, **{CACHE_ARGUMENT: plain}).logits
    assert oracle.error(full, want) > 1e-3
    # Dropping alone would be another computation.
    dropped = [[HeadSlots(k[h.index[h.index >= 0]], v[h.index[h.index >= 0]], h.index)
                for h, k, v in zip(heads[n], e.keys[0], e.values[0], strict=True)]
               for n, e in enumerate(plain.layers)]  # fmt: skip
    assert oracle.error(stored_logits(model, dropped, after, length), want) > 1e-3


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_what_is_stored_otherwise_is_read_as_it_is(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    length, reads = inputs["input_ids"].shape[1], name in ("actqkv", "tokenselect")
    params = {**few(name), **({"top": 99} if reads else {})}
    plain = cache_of(model(**inputs, use_cache=True))
    after = oracle.step(model, inputs, torch.tensor([[5, 6]]))
    with visprune.prune(model, name, **params) as run:
        cache = cache_of(model(**inputs, use_cache=True))
        heads = [contents(entry) for entry in cache.layers]
        trace = run.trace.cache
        got = model(**after, **{CACHE_ARGUMENT: cache}).logits
    oracle.assert_close(got, stored_logits(model, heads, after, length))
    full = model(**after, **{CACHE_ARGUMENT: plain}).logits
    if reads:  # everything, with such a top
        oracle.assert_close(got, full)
    else:
        assert oracle.error(got, full) > 1e-3
        before = sum(entry.keys.nbytes + entry.values.nbytes for entry in plain.layers)
        assert trace.bytes_of(0) < before
    for number, entry in enumerate(cache.layers):
        assert trace.form[number].startswith("ragged+")
        assert trace.slots[0][number] == [len(head.key) - 2 for head in contents(entry)]


SHARING = {"block": 4, "top": 3, "after": 0, "spread": 2}


@pytest.mark.parametrize(
    ("name", "params"), [*((name, few(name)) for name in STORED), ("actqkv", SHARING)]
)
@torch.no_grad()
def test_storage_goes_with_its_samples(name: str, params: dict[str, Any], models: Any) -> None:
    model, rows = models("llava"), [[3, "a", 6], [2, "b", 4, "c", 3], [5]]
    with visprune.prune(model, name, **params):
        together = model.generate(**batch("llava", rows), **GREEDY, **LOGITS)
        beams = model.generate(**batch("llava", rows[:1]), **BEAMS)
        assert torch.equal(beams, model.generate(**batch("llava", rows[:1]), **BEAMS))
        cache = cache_of(model(**batch("llava", rows[:2]), use_cache=True))
        after = oracle.step(model, batch("llava", rows[:2]), torch.tensor([[5], [6]]))
        turned = {k: v.flip(0) for k, v in after.items()}
        want = model(**after, **{CACHE_ARGUMENT: copy.deepcopy(cache)}).logits
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        oracle.assert_close(model(**turned, **{CACHE_ARGUMENT: cache}).logits.flip(0), want)
        for number, row in enumerate(rows):
            alone = model.generate(**batch("llava", [row]), **GREEDY, **LOGITS)
            for mine, theirs in zip(together.logits, alone.logits, strict=True):
                assert oracle.error(mine[number], theirs[0]) < 2e-2  # codes may differ by one
            if name not in ("zipcache", "kvquant"):
                assert torch.equal(together.sequences[number, -3:], alone.sequences[0, -3:])


@torch.no_grad()
def test_blocks_move_from_layer_to_layer(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6], [2, "b", 9]])
    counts: list[list[int]] = []
    take = Purse.take

    def noted(self: Purse, *given: Any) -> Tensor:
        counts.append(take(self, *given).tolist())
        return torch.tensor(counts[-1])

    monkeypatch.setattr(Purse, "take", noted)
    with visprune.prune(model, "actqkv", **SHARING):
        cache, longer = cache_of(model(**inputs, use_cache=True)), inputs
        for token in range(5, 9):
            new = torch.tensor([[token], [token + 1]])
            if token == 8:
                turned = pickle.loads(pickle.dumps(cache))
                turned.batch_select_indices(torch.tensor([1]))
            after = oracle.step(model, longer, new)
            want = model(**after, **{CACHE_ARGUMENT: cache}).logits
            longer = oracle.extended(longer, new)
        assert torch.tensor(counts).view(4, 4, 2)[0].tolist() == [[3, 3]] * 4  # none is known yet
        for each in torch.tensor(counts).view(4, 4, 2):  # of a token, by layer and sample
            assert each.sum(0).tolist() == [12, 12]
            assert bool(((each >= 1) & (each <= 9)).all())
        got = model(**{k: v[1:] for k, v in after.items()}, **{CACHE_ARGUMENT: turned}).logits
        oracle.assert_close(got, want[1:])
        assert [x[0] for x in counts[-4:]] == [x[1] for x in counts[-8:-4]]
        kinds = [{id(entry.sealed[0].purse) for entry in x.layers} for x in (cache, turned)]
        assert [len(kind) for kind in kinds] == [1, 1]
        assert kinds[0] != kinds[1]


@pytest.mark.parametrize("by", ["cosine", "softmax"])
def test_pages_that_are_read(by: str) -> None:
    torch.manual_seed(0)
    batch_size, heads, kv, count, size, top = 2, 4, 2, 22, 4, 3
    keys = torch.randn(batch_size, kv, count, 8)
    values = torch.randn(batch_size, kv, count, 8)
    lengths = [22, 13]
    parts = [[x[b, h, : lengths[b]] for b in range(batch_size) for h in range(kv)]
             for x in (keys, values)]  # fmt: skip
    pages = Pages(*parts, kv, size, top, by)
    query = torch.randn(batch_size, heads, 1, 8)
    out, lse = pages.attend(query, 8**-0.5, None)
    for b in range(batch_size):
        k, v = keys[b, :, : lengths[b]], values[b, :, : lengths[b]]
        logit = torch.einsum("hd,hnd->hn", query[b, :, 0], k.repeat_interleave(2, 0)) * 8**-0.5
        if by == "cosine":
            probe = query[b].unflatten(0, (kv, -1)).mean((1, 2)).flatten()
            near = [torch.cosine_similarity(probe, part.mean(1).flatten(), dim=0)
                    for part in k.split(size, 1)]  # fmt: skip
        else:
            near = [part.sum() for part in logit.softmax(-1).split(size, 1)]
        best = torch.stack(near).topk(top).indices.tolist()
        read = torch.tensor([n for n in range(lengths[b]) if n // size in best])
        weight = logit[:, read].softmax(-1)
        want = torch.einsum("hn,hnd->hd", weight, v.repeat_interleave(2, 0)[:, read])
        torch.testing.assert_close(out[b, :, 0], want)
        torch.testing.assert_close(lse[b, :, 0], logit[:, read].logsumexp(-1))


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_eager_attention_too(name: str, family: str, models: Any) -> None:
    model, inputs = models(family, "eager"), batch(family)
    length = inputs["input_ids"].shape[1]
    with visprune.prune(model, name, **few(name)) as run:
        out = model.generate(**inputs, **GREEDY, **LOGITS)
        trace = run.trace
    longer = oracle.extended(inputs, out.sequences[:, length:-1])
    want = hidden_logits(model, longer, trace, length)[:, length - 1 :]
    for number, logits in enumerate(out.logits):
        oracle.assert_close(logits, want[:, number])


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv"])
@every_family
@torch.no_grad()
def test_turns_equal_one_forward(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    length = inputs["input_ids"].shape[1]
    turn = torch.randint(3, 80, (3, 5), generator=torch.Generator().manual_seed(1))
    more = torch.tensor([[7, 8], [9, 10], [11, 12]])
    with visprune.prune(model, name, **few(name)) as run:
        cache = DynamicCache()
        model(**inputs, **{CACHE_ARGUMENT: cache})
        trace = run.trace
        got = model(**oracle.step(model, inputs, turn), **{CACHE_ARGUMENT: cache}).logits
        again = oracle.extended(inputs, turn)
        third = model(**oracle.step(model, again, more), **{CACHE_ARGUMENT: cache}).logits
        logical = cache.get_seq_length()
    longer = oracle.extended(again, more)
    want = hidden_logits(model, longer, trace, length)
    oracle.assert_close(got, want[:, length : length + 5])
    oracle.assert_close(third, want[:, length + 5 :])
    assert logical == longer["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
@torch.no_grad()
def test_padding_of_a_later_turn_is_not_seen(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6], [2, "b", 9]])
    turn = torch.tensor([[5, 6, 7], [0, 0, 8]])
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1, 1, 1], [0, 0, 1]])], 1)
    more = {"input_ids": torch.tensor([[9], [10]])}
    more["attention_mask"] = torch.cat([mask, torch.ones_like(more["input_ids"])], 1)
    found = []
    with visprune.prune(model, name, **few(name)):
        for rows in ([0, 1], [1]):
            part = {k: v[rows] for k, v in inputs.items()}
            cache = DynamicCache()
            model(**part, **{CACHE_ARGUMENT: cache})
            positions = (mask[rows].cumsum(1) - 1).clamp(min=0)[:, -3:]
            model(input_ids=turn[rows], attention_mask=mask[rows], position_ids=positions,
                  **{CACHE_ARGUMENT: cache})  # fmt: skip
            last = (more["attention_mask"][rows].cumsum(1) - 1)[:, -1:]
            out = model(input_ids=more["input_ids"][rows], position_ids=last,
                        attention_mask=more["attention_mask"][rows],
                        **{CACHE_ARGUMENT: cache})  # fmt: skip
            found.append(out.logits[-1])
        # The same turn without the padding.
        part = {k: v[[1]] for k, v in inputs.items()}
        cache = DynamicCache()
        model(**part, **{CACHE_ARGUMENT: cache})
        at = part["attention_mask"].sum()
        alone = model(input_ids=torch.tensor([[8, 10]]), position_ids=torch.tensor([[at, at + 1]]),
                      **{CACHE_ARGUMENT: cache}).logits[0, -1:]  # fmt: skip
    oracle.assert_close(found[0], found[1])
    oracle.assert_close(found[1], alone)


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
@every_family
@torch.no_grad()
def test_beams_are_exact(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    options = {"length_penalty": 0.0, "output_scores": True, "return_dict_in_generate": True}
    with visprune.prune(model, name, **few(name)) as run:
        out = model.generate(**inputs, **BEAMS, **options)
        trace = run.trace
    length = inputs["input_ids"].shape[1]
    assert len(trace.cache.slots) == 9  # rows were repeated before the prompt was read
    trace.cache.kept = trace.cache.kept[::3]
    answer = out.sequences[:, length:]
    longer = oracle.extended(inputs, answer[:, :-1])
    logits = hidden_logits(model, longer, trace, length)[:, length - 1 :]
    scores = logits.log_softmax(-1).gather(2, answer[..., None])[..., 0].sum(1)
    assert oracle.error(out.sequences_scores, scores) <= 2e-5


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_prompt_lookup_crops_what_it_guessed(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[9, "a", 6]])
    with visprune.prune(model, name, **few(name)):
        want = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        options = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 2}
        assert torch.equal(model.generate(**inputs, **options), want)


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
@torch.no_grad()
def test_a_batch_equals_its_samples_alone(name: str, models: Any) -> None:
    model, rows = models("llava"), [[3, "a", 6], [2, "b", 4, "c", 3], [5]]
    with visprune.prune(model, name, **few(name)) as run:
        together = model.generate(**batch("llava", rows), **GREEDY)[:, -3:]
        slots = run.trace.cache.slots
        for number, row in enumerate(rows):
            alone = model.generate(**batch("llava", [row]), **GREEDY)
            assert torch.equal(together[number], alone[0, -3:])
            if number < 2:
                assert run.trace.cache.slots == [slots[number]]


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
@torch.no_grad()
def test_one_cache_serves_many_questions(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    with visprune.prune(model, name, **few(name)):
        cache = cache_of(model(**inputs, use_cache=True))
        stored = pickle.dumps(cache)
        for question in ([5, 6], [7, 8]):
            after = oracle.step(model, inputs, torch.tensor([question]))
            fresh = cache_of(model(**inputs, use_cache=True))
            want = model(**after, **{CACHE_ARGUMENT: fresh}).logits
            for mine in (copy.deepcopy(cache), pickle.loads(stored)):
                assert torch.equal(model(**after, **{CACHE_ARGUMENT: mine}).logits, want)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
        assert torch.equal(model(**after, **{CACHE_ARGUMENT: cache}).logits, want)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "zipcache"])
@torch.no_grad()
def test_a_copy_of_a_pruned_model_evicts_by_itself(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    with visprune.prune(model, name, **few(name)):
        want = model.generate(**inputs, **GREEDY, **LOGITS)
        twin = copy.deepcopy(model)
    plain = model.generate(**inputs, **GREEDY, **LOGITS)
    got = twin.generate(**inputs, **GREEDY, **LOGITS)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    assert not torch.equal(got.logits[1], plain.logits[1])
    visprune.remove(twin)
    again = twin.generate(**inputs, **GREEDY, **LOGITS)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))


# What is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv"])
@torch.no_grad()
def test_the_saving_is_physical_and_told(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    with visprune.prune(model, name, **few(name)) as run:
        cache = cache_of(model(**inputs, use_cache=True))
        trace, cost = run.trace.cache, run.cost(new_tokens=5)
    text = 9
    for number, entry in enumerate(cache.layers):
        slots = torch.tensor(trace.slots[0][number])
        if isinstance(entry, RaggedLayer):
            assert torch.equal(entry.slots[0], slots)
            assert int(entry.segments.lengths.sum()) == int(slots.sum())
            assert trace.form[number] == "ragged"
        else:
            assert entry.keys.shape[2] == slots[0]
            assert trace.form[number] == "even"
        assert [len(kept) for kept in trace.kept[0][number]] == slots.tolist()
        assert trace.nbytes[0][number] == [n * 2 * 8 * 4 for n in slots.tolist()]
        assert trace.before[0][number] == 45
    total = sum(sum(heads) for heads in trace.slots[0])
    assert abs(total / 8 - text - 5) <= 1  # rounding of AdaKV and of the pyramid
    assert cost.kv_bytes == trace.bytes_of(0) == total * 2 * 8 * 4
    whole = visprune.prune(model, "keep_all")
    with whole:
        model(**inputs)
        full = whole.cost(new_tokens=5)
    assert cost.kv_bytes < full.kv_bytes / 2
    assert cost.decode < full.decode
    assert cost.prefill == full.prefill
    assert (cost.selection > 0) == (name != "knorm")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_chain_ends_in_the_cache(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    text = int((inputs["input_ids"] != 90).sum())
    with visprune.prune(model, "todre+snapkv", num_keep=4, tau=0.0) as run:
        out = model.generate(**inputs, **GREEDY, **LOGITS)
        trace = run.trace
    assert trace.cache.before == [[text + 8] * 4]  # twice as many for the first
    assert trace.cache.slots == [[[text + 4, text + 4]] * 4]
    assert len(out.logits) == 3
    # What is left after both is what new tokens see.
    length = inputs["input_ids"].shape[1]
    with visprune.prune(model, "todre", num_keep=8, tau=0.0):
        plain = model.generate(**inputs, **GREEDY, **LOGITS)
    assert torch.equal(out.logits[0], plain.logits[0])
    assert not torch.equal(out.logits[2], plain.logits[2])
    kept = [kept for heads in trace.cache.kept[0] for kept in heads]
    places = (inputs["input_ids"][0] == 90).nonzero()[:, 0]
    assert all(len(x) == text + 4 and int(x.max()) == length - 1 for x in kept)
    assert all(set(x.tolist()) & set(places.tolist()) <= set(places[trace.kept[0]].tolist())
               for x in kept)  # fmt: skip
    with visprune.prune(model, "todre+snapkv", keep_ratio=0.25, tau=0.0) as run:
        model(**inputs)
    half = round(len(places) * 0.5)  # each keeps the same part of what it is given
    assert run.trace.cache.before == [[text + half] * 4]
    assert run.trace.cache.slots == [[[text + round(half * 0.5)] * 2] * 4]


# Refusals --------------------------------------------------------------------------------------


def test_budgets_are_checked(models: Any) -> None:
    model = models("llava")
    for params, message in (
        ({}, "got neither"),
        (
            {"num_keep": 4, "max_cache": 9},
            "num_keep, keep_ratio, num_keep_per_frame or max_cache.*exactly one",
        ),
        ({"max_cache": 0}, "at least 1; got 0"),
        ({"num_keep": 4, "scope": "prompt"}, "counts visual tokens; with scope='prompt'"),
    ):
        with pytest.raises(BudgetError, match=message):
            visprune.prune(model, "snapkv", **params)
    for name, params, message in (
        ("zipvl", {"num_keep": 4}, "decides itself how much stays"),
        ("zipvl", {"tau": 0.0}, r"tau is a share in \(0, 1\], got 0.0"),
        ("adakv", {"num_keep": 4, "floor": 2.0}, r"in \[0, 1\]; got 2.0"),
        ("pyramidkv", {"num_keep": 4, "beta": 0}, "beta is at least 1"),
        ("compresskv", {"slots": (4, 4)}, "slots has 2 entries; llava has 4 layers"),
        ("compresskv", {"slots": (4,) * 4, "num_keep": 2}, "not both"),
        ("prefixkv", {"ratios": (0.5,)}, "ratios has 1 entries; llava has 4 layers"),
        ("duo_attention", {"num_keep": 4, "gates": ((1.0, 0.0),)}, "gates has 1 layers"),
        ("duo_attention", {"num_keep": 4, "sparsity": 1.5}, r"in \[0, 1\]; got 1.5"),
        ("look_m", {"num_keep": 4, "merge": "mean"}, "merge is 'pivot'"),
        ("zipcache", {"bits": 3}, "bits is 2, 4 or 8, got 3"),
        ("zipcache", {"low": 1.5}, r"in \[0, 1\]; got 1.5"),
        ("zipcache", {"over": "rows"}, "over is 'all' or 'probes'"),
        ("kvquant", {"bits": 5}, "bits is 2, 4 or 8, got 5"),
        ("kvquant", {"group": 0}, "at least 1; got 0"),
        ("think", {"ratio": 1.0}, r"in \[0, 1\); got 1.0"),
        ("actqkv", {"top": 0}, "top is at least 1"),
        ("actqkv", {"after": -1}, "after is a whole number from 0, or None; got -1"),
        ("actqkv", {"spread": 0}, "spread is a whole number from 1, or None; got 0"),
        ("tokenselect", {"top": 0}, "top is at least 1"),
        ("vl_cache", {"max_cache": 40, "scope": "prompt"}, "takes keep_ratio"),
    ):
        with pytest.raises(ConfigError, match=message):
            visprune.prune(model, name, **params)
    with pytest.raises(ConfigError, match="scope is 'visual' or 'prompt', got 'text'"):
        visprune.prune(model, "snapkv", num_keep=4, scope="text")
    with pytest.raises(ConfigError, match="snapkv takes no positions='compact'"):
        visprune.prune(model, "snapkv", num_keep=4, positions="compact")


@torch.no_grad()
def test_a_budget_below_what_is_protected(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    before = state(model)
    for params, message in (
        ({"max_cache": 8}, r"cache of 8 slots is below the 9 of its 45.*\(text\)"),
        ({"max_cache": 20, "scope": "prompt"}, "cache of 20 slots is below the 32 of its 45"),
    ):
        with (
            visprune.prune(model, "snapkv", **params),
            pytest.raises(BudgetError, match=message),
        ):
            model(**inputs)
        assert state(model) == before
    with visprune.prune(model, "snapkv", max_cache=34, scope="prompt") as run:
        model(**inputs)
        assert run.trace.cache.slots == [[[34, 34]] * 4]
    with (
        visprune.prune(model, "snapkv", num_keep=99, strict=True),
        pytest.raises(BudgetError, match="exceeds the 36 visual tokens"),
    ):
        model(**inputs)


@torch.no_grad()
def test_calls_that_cannot_work_are_refused(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    before = state(model)
    token = torch.tensor([[5]])
    with visprune.prune(model, "adakv", num_keep=4):
        with pytest.raises(ConfigError, match="use_cache=False makes none"):
            model(**inputs, use_cache=False)
        with pytest.raises(ConfigError, match=r"ends before it \(chunked prefill\)"):
            model(**inputs, prompt_length=60)
        static = StaticCache(config=model.config.text_config, max_cache_len=90)
        with pytest.raises(UnsupportedModel, match=r"StaticCache.*DynamicCache"):
            model(**inputs, **{CACHE_ARGUMENT: static})
        cache = cache_of(model(**inputs, use_cache=True))
        later = oracle.extended(inputs, batch("llava", [["b", 3]])["input_ids"])
        later = {**later, "input_ids": batch("llava", [["b", 3]])["input_ids"]}
        with pytest.raises(ConfigError, match="a second eviction"):
            model(**later, **{CACHE_ARGUMENT: cache})
        after = oracle.step(model, inputs, token)
        hidden = {"input_ids": token.expand(1, 2), "attention_mask": torch.ones(1, 47)}
        hidden["attention_mask"][0, 5] = 0
        with pytest.raises(ConfigError, match="hides tokens of a prompt whose cache was evicted"):
            model(**hidden, **{CACHE_ARGUMENT: cache})
        with pytest.raises(UnsupportedModel, match="4-D mask"):
            model(input_ids=token, attention_mask=torch.zeros(1, 1, 1, 46),
                  **{CACHE_ARGUMENT: cache})  # fmt: skip
        with pytest.raises(ConfigError, match="Cannot crop 30 tokens"):
            cache.crop(-30)
    with pytest.raises(UnsupportedModel, match=r"prune.*adakv.*removed"):
        model(**after, **{CACHE_ARGUMENT: cache})
    assert state(model) == before


def test_two_evictions_of_one_cache_are_refused(models: Any) -> None:
    with pytest.raises(ConfigError, match="would evict from one cache twice"):
        visprune.prune(models("llava"), "snapkv+knorm", num_keep=4)


def test_no_layer_sees_the_whole_sequence(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visprune.machine.cache.evict.evictable", lambda adapter, layer: False)
    before = state(models("llava"))
    with pytest.raises(UnsupportedModel, match="each sees a window or keeps a state"):
        visprune.prune(models("llava"), "snapkv", num_keep=4)
    assert state(models("llava")) == before


def test_a_line_of_positions_is_asked_for(models: Any) -> None:
    with pytest.raises(UnsupportedModel, match="positions along a line; qwen2_5_vl gives"):
        visprune.prune(models("qwen2_5_vl"), "expected_attention", num_keep=4)


def test_an_encoder_alone_has_no_cache() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, depth=1)
    with pytest.raises(UnsupportedModel, match="acts at cache, in a language model's key-value"):
        visprune.prune(model, "snapkv", num_keep=4)
