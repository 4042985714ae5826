# SPDX-License-Identifier: Apache-2.0
"""Ways to call a model whose cache is cut: sampling, threads, caches that somebody else stores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import visprune
from tests.contract import oracle
from tests.contract.cache_oracle import few, hidden_logits
from tests.contract.cases import batch
from tests.contract.test_generate import GREEDY
from visprune.backbones.hf.cache import CACHE_ARGUMENT
from visprune.errors import UnsupportedModel

LOGITS = {"output_logits": True, "return_dict_in_generate": True}
both = pytest.mark.parametrize("name", ["snapkv", "adakv"])


class Coded(DynamicLayer):
    """A layer that stores its slots in a way of its own, as transformers' quantised ones do."""


@both
@torch.no_grad()
def test_sampled_tokens_see_what_heads_have_kept(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(3)
    with visprune.prune(model, name, **few(name)) as run:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=True, **LOGITS)
        trace = run.trace
    longer = oracle.extended(inputs, out.sequences[:, length:-1])
    want = hidden_logits(model, longer, trace, length)[:, length - 1 :]
    for number, logits in enumerate(out.logits):
        oracle.assert_close(logits, want[:, number])


@both
@torch.no_grad()
def test_threads_have_evictions_of_their_own(name: str, models: Any) -> None:
    model = models("llava")
    prompts = [batch("llava", [[3, letter, 6 + n]]) for n, letter in enumerate("abcd")]

    def answer(inputs: dict[str, Any]) -> tuple[list[Any], list[list[int]]]:
        with torch.no_grad():
            out = model.generate(**inputs, **GREEDY, **LOGITS)
        return out.logits, run.trace.cache.slots[0]

    with visprune.prune(model, name, **few(name)) as run:
        alone = [answer(inputs) for inputs in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(answer, prompts))
    for (logits, slots), (others, theirs) in zip(alone, together, strict=True):
        assert slots == theirs
        assert all(torch.equal(a, b) for a, b in zip(logits, others, strict=True))


@both
@torch.no_grad()
def test_a_cache_that_is_stored_otherwise_is_refused(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    cache = DynamicCache()
    cache.layers = [Coded() for _ in range(4)]
    with (
        visprune.prune(model, name, **few(name)),
        pytest.raises(UnsupportedModel, match=r"Layer 0 of the cache is a Coded; visprune prunes"),
    ):
        model(**inputs, **{CACHE_ARGUMENT: cache})
