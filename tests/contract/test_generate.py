# SPDX-License-Identifier: Apache-2.0
"""``generate`` under pruning: every kind of search, exact at every step, several turns, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import visprune
from tests.contract import oracle
from tests.contract.cases import (
    DROPPING,
    LINE_FAMILIES,
    LOSSLESS,
    MERGING,
    PAIRS,
    batch,
    every_dropping_pair,
    every_family,
    every_pair,
    everything,
    few,
)
from visprune.backbones.hf.cache import CACHE_ARGUMENT

STEPS = 3
# A picture placeholder in an answer would be read as a picture when the answer is fed again.
WORDS = {"suppress_tokens": [90, 91, 92, 93]}
GREEDY: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, **WORDS}
SAMPLING: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": True, "temperature": 2.0, **WORDS}
BEAMS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 3, **WORDS}
SEARCHES = pytest.mark.parametrize("search", [SAMPLING, BEAMS], ids=["sampling", "beams"])


def best(logits: Any) -> Any:
    """What greedy search would say."""
    return logits.index_fill(-1, torch.tensor(WORDS["suppress_tokens"]), float("-inf")).argmax(-1)


@SEARCHES
@every_pair
@torch.no_grad()
def test_every_search_keeps_what_it_kept(name: str, family: str, search: Any, models: Any) -> None:
    model, inputs = models(family), batch(family)
    torch.manual_seed(5)
    want = model.generate(**inputs, **search)
    if (name, family) in LOSSLESS:
        with visprune.prune(model, name, **everything(name)):
            torch.manual_seed(5)
            assert torch.equal(model.generate(**inputs, **search), want)
    found = []
    for _ in range(2):
        with visprune.prune(model, name, **few(name)):
            torch.manual_seed(5)
            found.append(model.generate(**inputs, **search))
    assert found[0].shape == want.shape
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][:, :-STEPS], inputs["input_ids"])


@pytest.mark.parametrize("positions", ["original", "compact"])
@every_dropping_pair
@torch.no_grad()
def test_decoding_is_exact(name: str, family: str, positions: str, models: Any) -> None:
    if positions == "compact" and family.startswith("qwen"):
        with pytest.raises(visprune.ConfigError, match="compact"):
            visprune.prune(models(family), name, **few(name, positions=positions))
        return
    model, inputs = models(family), batch(family)
    params = few(name, positions=positions)
    with oracle.forwards() as seen, visprune.prune(model, name, **params):
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert len(seen) == 1  # pictures are in the prompt alone
    keep, length = oracle.alive(seen[0]), inputs["input_ids"].shape[1]
    longer = oracle.extended(inputs, out.sequences[:, length:-1])
    total = longer["input_ids"].shape[1]
    # All steps at once, without a cache: nothing was dropped after the prompt.
    compact = positions == "compact"
    want = oracle.hidden_logits(model, longer, oracle.grown(keep, total), compact=compact)
    for number, logits in enumerate(out.logits):
        oracle.assert_close(logits, want[:, length - 1 + number])
    assert torch.equal(best(want[:, length - 1 :]), out.sequences[:, length:])


@pytest.mark.parametrize(("name", "family"), [p for p in PAIRS if p[0] in MERGING])
@torch.no_grad()
def test_decoding_after_a_merge_is_exact(name: str, family: str, models: Any) -> None:
    # The same prompt and answer in one forward under the run: no cache in it.
    model, inputs = models(family), batch(family)
    with visprune.prune(model, name, **few(name)):
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        length = inputs["input_ids"].shape[1]
        longer = oracle.extended(inputs, out.sequences[:, length:-1])
        want = model(**longer, use_cache=False).logits
    for number, logits in enumerate(out.logits):
        oracle.assert_close(logits, want[:, length - 1 + number])


@every_dropping_pair
@torch.no_grad()
def test_beams_are_exact(name: str, family: str, models: Any) -> None:
    # The score that beam search reports is that of the sequence under the oracle.
    model, inputs = models(family), batch(family)
    with oracle.forwards() as seen, visprune.prune(model, name, **few(name, positions="original")):
        out = model.generate(
            **inputs, **BEAMS, length_penalty=0.0, output_scores=True, return_dict_in_generate=True
        )
    keep, length = oracle.alive(seen[0]), inputs["input_ids"].shape[1]
    if keep[0].shape[0] != len(inputs["input_ids"]):
        keep = [one[::3] for one in keep]  # rows were repeated before the prompt was read
    answer = out.sequences[:, length:]
    longer = oracle.extended(inputs, answer[:, :-1])
    total = longer["input_ids"].shape[1]
    logits = oracle.hidden_logits(model, longer, oracle.grown(keep, total))[:, length - 1 :]
    scores = logits.log_softmax(-1).gather(2, answer[..., None])[..., 0].sum(1)
    assert oracle.error(out.sequences_scores, scores) <= 2e-5


# Turns ---------------------------------------------------------------------------------------


def selection_of(model: Any, name: str, params: dict[str, Any], inputs: dict[str, Any]) -> Any:
    with oracle.forwards() as seen, visprune.prune(model, name, **params):
        model(**inputs)
    return oracle.alive(seen[0])


TURNS = [(*pair, "original") for pair in DROPPING]
TURNS += [(*pair, "compact") for pair in DROPPING if pair[1] in LINE_FAMILIES]


@pytest.mark.parametrize(("name", "family", "positions"), TURNS)
@torch.no_grad()
def test_two_turns_equal_one_forward(name: str, family: str, positions: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    params = few(name, positions=positions)
    keep, length = selection_of(model, name, params, inputs), inputs["input_ids"].shape[1]
    turn = torch.randint(3, 80, (3, 5), generator=torch.Generator().manual_seed(1))
    with visprune.prune(model, name, **params):
        cache = DynamicCache()
        model(**inputs, **{CACHE_ARGUMENT: cache})
        got = model(**oracle.step(model, inputs, turn), **{CACHE_ARGUMENT: cache}).logits
        again = oracle.extended(inputs, turn)
        more = torch.tensor([[7, 8], [9, 10], [11, 12]])
        third = model(**oracle.step(model, again, more), **{CACHE_ARGUMENT: cache}).logits
        logical = cache.get_seq_length()
    longer = oracle.extended(again, more)
    total = longer["input_ids"].shape[1]
    keep, compact = oracle.grown(keep, total), positions == "compact"
    want = oracle.hidden_logits(model, longer, keep, compact=compact)
    oracle.assert_close(got, want[:, length : length + 5])
    oracle.assert_close(third, want[:, length + 5 :])
    assert logical == total


@every_family
@pytest.mark.parametrize("name", ["uniform", "fastv", "pyramiddrop", "todre"])
@torch.no_grad()
def test_a_second_turn_with_a_new_picture(name: str, family: str, models: Any) -> None:
    model = models(family)
    first, second = batch(family, [[3, "a", 6]]), batch(family, [[2, "b", 5]])
    params = few(name, positions="original")
    whole = batch(family, [[3, "a", 6, "b", 5]])
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    whole = {**whole, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in whole:
        both = [first["mm_token_type_ids"], second["mm_token_type_ids"]]
        whole["mm_token_type_ids"] = torch.cat(both, 1)
    length = first["input_ids"].shape[1]
    later = {**second, "attention_mask": whole["attention_mask"]}
    if family.startswith("qwen"):
        names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions = model.model.get_rope_index(ids, **{key: whole[key] for key in names})[0]
        whole["position_ids"], later["position_ids"] = positions, positions[..., length:]
        first["position_ids"] = positions[..., :length]
    with oracle.forwards() as seen, visprune.prune(model, name, **params) as run:
        cache = DynamicCache()
        model(**first, **{CACHE_ARGUMENT: cache})
        got = model(**later, **{CACHE_ARGUMENT: cache}).logits
        stored = [entry.keys.shape[-2] for entry in cache.layers]
        trace = run.trace
    parts = [oracle.alive(one) for one in seen]
    keep = [torch.cat(pair, 1) for pair in zip(*parts, strict=True)]
    want = oracle.hidden_logits(model, whole, keep)[:, length:]
    there = parts[1][-1]
    oracle.assert_close(got[there], want[there])
    assert bool((~there).any())
    assert trace.stored_per_layer == [stored]
    assert len(trace.kept) == 1


@every_family
@pytest.mark.parametrize("name", ["uniform", "pyramiddrop"])
@torch.no_grad()
def test_generate_continues_a_pruned_cache(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6], [2, "b", 9]])
    params = few(name, positions="original")
    keep, length = selection_of(model, name, params, inputs), inputs["input_ids"].shape[1]
    with visprune.prune(model, name, **params):
        cache = DynamicCache()
        one = model.generate(**inputs, **GREEDY, **{CACHE_ARGUMENT: cache})
        user = torch.tensor([[5, 6, 7], [8, 9, 10]])
        longer = oracle.extended(inputs, torch.cat([one[:, length:], user], 1))
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        more = {key: value for key, value in longer.items() if key in names}
        two = model.generate(**more, **GREEDY, **{CACHE_ARGUMENT: cache})
    at = more["input_ids"].shape[1]
    asked = oracle.extended(longer, two[:, at:-1])
    want = oracle.hidden_logits(model, asked, oracle.grown(keep, asked["input_ids"].shape[1]))
    assert torch.equal(best(want[:, at - 1 :]), two[:, at:])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_prompt_lookup_crops_what_it_guessed(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[9, "a", 6]])
    with visprune.prune(model, "fastv", num_keep=5):
        want = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        options = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 2}
        got = model.generate(**inputs, **options)
    assert torch.equal(got, want)


@every_family
@torch.no_grad()
def test_a_prefill_in_chunks_is_refused(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6]])
    with (
        visprune.prune(model, "uniform", num_keep=4),
        pytest.raises(visprune.VispruneError, match="prefill_chunk_size"),
    ):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=8)
