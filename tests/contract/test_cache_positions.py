# SPDX-License-Identifier: Apache-2.0
"""Slots that take the places they have in the cache, against keys stored before their rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import visprune
from tests.contract import oracle
from tests.contract.cases import batch
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of
from visprune.core.cache.seen import turned
from visprune.errors import ConfigError

SINKS, SIZE = 2, 12
ROWS = [[3, "a", 6], [2, 9, "b", 4, 8]]
PROMPT = {"scope": "prompt", "max_cache": SIZE, "sinks": SINKS}


class Unrotated:
    """A cache as the official code has it: keys before the rotary embedding, places by rank.

    Args:
        model: the untouched model.
        inputs: a prompt of one sample.
        kept: the slots of it that stay.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], kept: Tensor) -> None:
        self.model = model
        plain = cache_of(model(**inputs, use_cache=True))
        self.keys = [self._turn(x.keys, kept, back=True) for x in plain.layers]
        self.values = [x.values[:, :, kept] for x in plain.layers]

    def _turn(self, keys: Tensor, at: Tensor, *, back: bool) -> Tensor:
        keys = keys[:, :, at] if back else keys
        places = at if back else torch.arange(keys.shape[2])
        cos, sin = self.model.model.language_model.rotary_emb(keys, places[None])
        return turned(keys.double(), cos.double(), (-sin if back else sin).double()).float()

    def step(self, token: int) -> Tensor:
        """The logits behind a token, which is stored."""
        cache, count = DynamicCache(), self.keys[0].shape[2]
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(self._turn(keys, torch.arange(0), back=False), values, layer)
        out = self.model(
            input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[count]]),
            **{CACHE_ARGUMENT: cache}, use_cache=True,
        )  # fmt: skip
        for layer, entry in enumerate(cache.layers):
            cos, sin = self.model.model.language_model.rotary_emb(
                entry.keys, torch.tensor([[count]])
            )
            new = turned(entry.keys[:, :, -1:].double(), cos.double(), -sin.double()).float()
            self.keys[layer] = torch.cat([self.keys[layer], new], 2)
            self.values[layer] = entry.values
        return out.logits[0, -1]

    def evict(self, at: Tensor) -> None:
        """Keep the slots ``at``."""
        self.keys = [x[:, :, at] for x in self.keys]
        self.values = [x[:, :, at] for x in self.values]


def ends(count: int, size: int) -> Tensor:
    """The first slots and the last ones of a cache."""
    return torch.cat([torch.arange(SINKS), torch.arange(count - size + SINKS, count)])


@pytest.mark.parametrize("every", [None, 1, 3])
@torch.no_grad()
def test_places_are_those_in_the_cache(every: int | None, models: Any) -> None:
    model, new = models("llava"), 8
    inputs = batch("llava", ROWS)
    params = {**PROMPT, "every": every}
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    with visprune.prune(model, "streaming_llm", **params) as run:
        assert run.plan.positions == "compact"
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    for row, prompt in enumerate(ROWS):
        single = batch("llava", [prompt])
        mine = Unrotated(model, single, ends(single["input_ids"].shape[1], SIZE))
        for step in range(1, new):
            want = mine.step(int(out.sequences[row, length + step - 1]))
            oracle.assert_close(out.logits[step][row], want)
            if every is not None and step % every == 0:
                mine.evict(ends(SIZE + every, SIZE))
    # Teeth: phases that are kept say something else.
    with visprune.prune(model, "streaming_llm", **params, positions="original"):
        other = model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        )
    assert oracle.error(other.logits[1], out.logits[1]) > 1e-4


@torch.no_grad()
def test_visual_tokens_and_a_later_turn(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    length = inputs["input_ids"].shape[1]
    free = (inputs["input_ids"][0] == 90).nonzero()[:, 0]
    text = torch.tensor([n for n in range(length) if n not in free.tolist()])
    kept = torch.cat([text, free[:SINKS], free[-3:]]).sort().values
    after = oracle.step(model, inputs, torch.tensor([[5, 40, 7]]))
    with visprune.prune(model, "streaming_llm", num_keep=5, sinks=SINKS):
        cache = cache_of(model(**inputs, use_cache=True))
        got = model(**after, **{CACHE_ARGUMENT: cache}).logits[0]
        assert cache.get_seq_length() == length + 3
    mine = Unrotated(model, inputs, kept)
    for step, token in enumerate([5, 40, 7]):
        oracle.assert_close(got[step], mine.step(token))


@torch.no_grad()
def test_where_keys_keep_their_phase(models: Any) -> None:
    line, axes = models("llava"), models("qwen2_5_vl")
    with visprune.prune(axes, "streaming_llm", num_keep=5) as run:
        assert run.plan.positions == "original"
    with pytest.raises(ConfigError, match="places that survivors keep"):
        visprune.prune(axes, "streaming_llm", num_keep=5, positions="compact")
    with pytest.raises(ConfigError, match="keys that are stored keep their phase"):
        visprune.get_method("snapkv", num_keep=5, positions="compact")
    # In a chain there is one rule, that of all.
    inputs = batch("llava", [[3, "a", 6]])
    after = oracle.step(line, inputs, torch.tensor([[5]]))
    found = []
    for chain in ("keep_all+streaming_llm", "streaming_llm"):
        name = {"streaming_llm.num_keep": 5} if "+" in chain else {"num_keep": 5}
        with visprune.prune(line, chain, **name, positions="original"):
            cache = cache_of(line(**inputs, use_cache=True))
            found.append(line(**after, **{CACHE_ARGUMENT: cache}).logits)
    with visprune.prune(line, "keep_all+streaming_llm", **{"streaming_llm.num_keep": 5}):
        cache = cache_of(line(**inputs, use_cache=True))
        found.append(line(**after, **{CACHE_ARGUMENT: cache}).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
