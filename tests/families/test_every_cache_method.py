# SPDX-License-Identifier: Apache-2.0
"""Every method at the cache on one family of each kind of decoder, beside the first four.

A pair is refused with the reason, or: keeping all changes no bit; new tokens do not see what their
heads dropped, or read what was merged and what was stored as it is; a batch is its samples; and the
model is left as it was. Layers that see a window or carry a state are left whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract.cache_oracle import MERGING, STORED, contents, everything
from tests.contract.cache_oracle import few as few_of
from tests.contract.cases import CACHE
from tests.contract.oracle import TOLERANCE, error
from tests.contract.test_cache_stage import applied
from tests.contract.test_removal import state
from tests.families import tiny
from tests.families.test_cache import LEFT, forcing, hiding
from tests.families.test_every_method import FAMILIES, GREEDY, PRECISE, refused, rows_of
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.core.cache import HeadSlots
from visprune.machine.check.hide import before_layers
from visprune.machine.find import find_adapter

every_pair = pytest.mark.parametrize(
    ("name", "family"), [(name, family) for family in FAMILIES for name in CACHE]
)
# Gemma's first two layers and the last, which d2o leaves whole, are all that see no window here.
OWN: dict[tuple[str, str], dict[str, Any]] = {("d2o", "gemma3"): {"by_variance": False}}
LOSSLESS = [name for name in CACHE if name not in STORED or name == "think"]  # codes are rounded


def few(name: str, family: str) -> dict[str, Any]:
    return {**few_of(name), **OWN.get((name, family), {})}


@every_pair
@torch.no_grad()
def test_what_holds_of_every_method(name: str, family: str, models: Any) -> None:
    model, rows = models(family, "eager"), rows_of(family)
    if refused(name, family, model):
        return
    inputs, before = tiny.inputs(family, rows), state(model)
    plain = model.generate(**inputs, **GREEDY)
    if name in LOSSLESS:
        with visprune.prune(model, name, **everything(name)) as run:
            same = model.generate(**inputs, **GREEDY)
            assert set(run.trace.cache.form) <= set(LEFT)
        assert all(torch.equal(a, b) for a, b in zip(same.logits, plain.logits, strict=True))
    with visprune.prune(model, name, **few(name, family)) as run:
        got, trace = model.generate(**inputs, **GREEDY), run.trace.cache
        for number, row in enumerate(rows):
            sample = tiny.inputs(family, [row])
            forced = {
                **GREEDY,
                "prefix_allowed_tokens_fn": forcing(got.sequences[number : number + 1, -2:]),
            }
            single = model.generate(**sample, **forced)
            for mine, theirs in zip(got.logits, single.logits, strict=True):
                assert error(mine[number], theirs[0]) <= PRECISE
            if number < 2:
                assert run.trace.cache.slots == [trace.slots[number]]
    assert state(model) == before
    assert torch.equal(got.logits[0], plain.logits[0])  # the prompt was read whole
    assert set(trace.form) - set(LEFT)
    if name in (*MERGING, *STORED):
        return  # by test_what_is_stored_is_what_new_tokens_read
    forced = {**GREEDY, "prefix_allowed_tokens_fn": forcing(got.sequences[:, -2:])}
    with hiding(model, trace, inputs["attention_mask"].bool()):
        want = model.generate(**inputs, **forced)
    assert error(got.logits[1], want.logits[1]) <= TOLERANCE
    assert error(plain.logits[1][:2], want.logits[1][:2]) > 1e-4  # teeth


@contextmanager
def holding(model: Any, cache: Any, heads: dict[int, list[HeadSlots]]) -> Iterator[None]:
    """Let layers of the untouched model read what is given instead of what a cache holds of them.

    Each key head gets its slots in front; the rest of its row is hidden. So lengths, and what the
    model makes of them for other layers, stay as they were.
    """
    adapter = find_adapter(model)
    masks: dict[int, Tensor] = {}
    for number, layer in heads.items():
        entry = cache.layers[number]
        keys, values = torch.zeros_like(entry.keys), torch.zeros_like(entry.values)
        mask = torch.full(keys.shape[1:3], -torch.inf)
        for head, slots in enumerate(layer):
            count = len(slots.key)
            keys[0, head, :count], values[0, head, :count] = slots.key, slots.value
            mask[head, :count] = 0.0 if slots.bias is None else slots.bias
        entry.keys, entry.values = keys, values
        group = adapter.attention(number).config.num_attention_heads // len(layer)
        masks[number] = mask.repeat_interleave(group, 0)[None, :, None]

    def before(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if number not in masks:
            return None
        new = (args[0] if args else kwargs["hidden_states"]).shape[1]
        old = masks[number].expand(-1, -1, new, -1)
        causal = torch.full((new, new), -torch.inf).triu(1).expand(*old.shape[:2], -1, -1)
        return args, {**kwargs, "attention_mask": torch.cat([old, causal], -1)}

    with before_layers(adapter.layers, before):
        yield


def after(model: Any, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Text behind a prompt of one sample, with the positions that ``generate`` gives it."""
    length, count = inputs["input_ids"].shape[1], tokens.shape[1]
    ids = torch.arange(length, length + count)[None]
    deltas = getattr(model.model, "rope_deltas", None)
    if deltas is not None:
        ids = (ids + deltas).expand(3, -1, -1)
    types = find_adapter(model).answer_types
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones(1, length + count, dtype=torch.long),
        "position_ids": ids,
        **{name: torch.full_like(tokens, kind) for name, kind in types.items()},
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*MERGING, *STORED])
@torch.no_grad()
def test_what_is_stored_is_what_new_tokens_read(name: str, family: str, models: Any) -> None:
    model, inputs = models(family, "eager"), tiny.inputs(family, [[3, "A", 6]])
    if refused(name, family, model):
        return
    params = {**few(name, family), **({"top": 99} if name in ("actqkv", "tokenselect") else {})}
    tokens = torch.tensor([[5, 6]])
    merged: dict[int, list[HeadSlots]] = {}
    with visprune.prune(model, name, **params) as run:
        if name in MERGING:
            with applied(merged, type(run.plan.cache[1].eviction.action)):
                cache = cache_of(model(**inputs, use_cache=True))
        else:
            cache = cache_of(model(**inputs, use_cache=True))
        forms = run.trace.cache.form
        cut = [number for number, form in enumerate(forms) if form not in LEFT]
        heads = {n: merged[n] if name in MERGING else contents(cache.layers[n]) for n in cut}
        got = model(**after(model, inputs, tokens), **{CACHE_ARGUMENT: cache}).logits
    assert cut
    whole = cache_of(model(**inputs, use_cache=True))
    full = model(**after(model, inputs, tokens), **{CACHE_ARGUMENT: whole}).logits
    whole = cache_of(model(**inputs, use_cache=True))
    with holding(model, whole, heads):
        want = model(**after(model, inputs, tokens), **{CACHE_ARGUMENT: whole}).logits
    assert error(got, want) <= TOLERANCE
    if name in ("actqkv", "tokenselect"):  # everything, with such a top
        assert error(got, full) <= TOLERANCE
    else:
        assert error(got, full) > 1e-3
