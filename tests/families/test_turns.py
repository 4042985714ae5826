# SPDX-License-Identifier: Apache-2.0
"""A later turn on a pruned cache equals one prompt, also where layers see windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import visprune
from tests.contract.oracle import TOLERANCE, alive, error, forwards
from tests.families import tiny
from tests.families.oracle import gone_logits, two_kernels
from visprune.backbones.hf.cache import CACHE_ARGUMENT, SlotLayer, cache_of
from visprune.errors import ConfigError, UnsupportedModel
from visprune.machine.find import find_adapter

GEMMA = ("gemma4", "gemma4_small", "gemma4_unified", "gemma3n")
WINDOWS = ("gemma3", "exaone4_5", "aya_vision", "cohere2_vision", *GEMMA)
LINE = (
    *WINDOWS,
    *("mistral3", "internvl", "fast_vlm", "lfm2_vl"),
    *("paligemma", "molmo2", "llava_onevision", "granite_docling"),
)
# A picture that is seen both ways stands at the beginning of the cache, for transformers.
ONE_PROMPT = ("gemma3", "paligemma", "molmo2", "gemma4", "gemma4_unified")
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@pytest.mark.parametrize("family", LINE)
@pytest.mark.parametrize("second", [[9], [4, "b", 5]], ids=["text", "picture"])
@pytest.mark.parametrize("name", ["random", "fastv"])
@torch.no_grad()
def test_two_turns_equal_one_prompt(name: str, second: Any, family: str, models: Any) -> None:
    model = models(family)
    one, two = tiny.inputs(family, [[3, "a", 6]]), tiny.inputs(family, [second])
    if len(second) == 1:
        two |= {
            key: torch.full_like(two["input_ids"], kind)
            for key, kind in find_adapter(model).answer_types.items()
        }
    params = {"num_keep": 3, "positions": "original"}
    ones = torch.ones(1, one["input_ids"].shape[1] + two["input_ids"].shape[1], dtype=torch.long)
    with forwards() as seen, visprune.prune(model, name, **params):
        first = model(**one, use_cache=True)
        later = {**two, "attention_mask": ones, CACHE_ARGUMENT: cache_of(first)}
        if family in ONE_PROMPT and len(second) > 1:
            with pytest.raises(UnsupportedModel, match="Give the conversation in one prompt"):
                model(**later)
            return
        logits = model(**later).logits
    keep = alive(seen[0])
    new = torch.ones(1, two["input_ids"].shape[1], dtype=torch.bool)
    after = alive(seen[1]) if len(second) > 1 else [new] * len(keep)
    both = [torch.cat(pair, 1) for pair in zip(keep, after, strict=True)]
    by_row = tiny.FAMILIES[family].by_row
    joined = {
        key: torch.cat([one[key], two[key]], 1 if by_row or key in BY_TOKEN else 0)
        for key in one
        if key in two
    }
    whole = {**one, **joined, "attention_mask": ones}
    eager = models(family, "eager")
    want = gone_logits(family, eager, whole, both)[:, -new.shape[1] :]
    noise = two_kernels(family, eager, whole, model(**whole, use_cache=False).logits)
    there = after[-1]
    assert error(logits[there], want[there]) <= TOLERANCE + 2 * noise < 1e-4


@pytest.mark.parametrize("family", WINDOWS)
@torch.no_grad()
def test_windows_let_go_of_what_no_token_will_see(family: str, models: Any) -> None:
    model, inputs = models(family), tiny.inputs(family, [[3, "A", 6]])
    window = 12
    with visprune.prune(model, "random", num_keep=3):
        cache = cache_of(model(**inputs, use_cache=True))
        kinds = model.config.get_text_config().layer_types
        keeper = find_adapter(model).keeper
        for number, (layer, kind) in enumerate(zip(cache.layers, kinds, strict=True)):
            if keeper(number) != number:  # it attends to keys of another
                assert not isinstance(layer, SlotLayer)
                continue
            assert isinstance(layer, SlotLayer)
            assert layer.get_seq_length() == inputs["input_ids"].shape[1]
            if kind == "sliding_attention":
                assert layer.num_stored < window
                assert layer.trimmed
                with pytest.raises(ConfigError, match="let go of"):
                    layer.crop(-1)
            else:
                assert not layer.trimmed
