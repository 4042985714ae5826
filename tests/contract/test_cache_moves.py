# SPDX-License-Identifier: Apache-2.0
"""A cache on another device: all of it goes, and what it answers stays the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import visprune
from tests.contract import oracle
from tests.contract.cache_oracle import few
from tests.contract.cases import CACHE, batch
from visprune.backbones.hf.cache import CACHE_ARGUMENT, Ledger, Owner, cache_of
from visprune.errors import ConfigError


def held(x: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached from a cache."""
    seen = set() if seen is None else seen
    if id(x) in seen or isinstance(x, Owner | str | torch.dtype | torch.device):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from held(value, seen)
    elif isinstance(x, list | tuple):
        for value in x:
            yield from held(value, seen)
    elif hasattr(x, "__dict__"):
        yield from held(vars(x), seen)


def asked(model: Any, inputs: dict[str, Any], cache: Any) -> Tensor:
    after = oracle.step(model, inputs, torch.tensor([[5, 40]]))
    after = {key: value.to(model.device) for key, value in after.items()}
    logits: Tensor = model(**after, **{CACHE_ARGUMENT: cache}).logits
    return logits


@pytest.mark.filterwarnings("ignore:The scorers of 'learned' are new")
@pytest.mark.parametrize("name", CACHE)
@torch.no_grad()
def test_all_of_a_cache_moves(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    params = few(name)
    if name in ("tova", "h2o"):  # what is noted to cut again goes along
        params = {"scope": "prompt", "max_cache": 40, "every": 4}
    with visprune.prune(model, name, **params):
        cache = cache_of(model(**inputs, use_cache=True))
        before = [x.clone() for x in held(cache)]
        away = visprune.cache_to(cache, "meta")
        assert before
        gone = list(held(away))
        assert [x.shape for x in gone] == [x.shape for x in before]
        assert {x.device.type for x in gone} == {"meta"}
        assert [type(x) for x in away.layers] == [type(x) for x in cache.layers]
        # The one that was given stays; a copy on the same device answers the same, bit for bit.
        assert all(torch.equal(x, y) for x, y in zip(held(cache), before, strict=True))
        same = visprune.cache_to(cache, "cpu")
        want = asked(model, inputs, copy.deepcopy(cache))
        assert torch.equal(asked(model, inputs, same), want)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_what_layers_share_they_share_again(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    with visprune.prune(model, "snapkv", num_keep=5) as run:
        cache = cache_of(model(**inputs, use_cache=True))
        away = visprune.cache_to(cache, "meta")
    ledgers: list[Ledger] = [layer.ledger for layer in away.layers]
    assert len({id(ledger) for ledger in ledgers}) == 1
    assert ledgers[0].owner is run.owner


@torch.no_grad()
def test_a_plain_cache_and_what_is_none(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    cache = cache_of(model(**inputs, use_cache=True))
    away = visprune.cache_to(cache, "meta")
    assert isinstance(away, DynamicCache)
    assert {x.device.type for x in held(away)} == {"meta"}
    want = asked(model, inputs, copy.deepcopy(cache))
    assert torch.equal(asked(model, inputs, visprune.cache_to(cache, torch.device("cpu"))), want)
    with pytest.raises(ConfigError, match="got tuple"):
        visprune.cache_to((cache,), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["snapkv", "adakv", "zipcache", "think", "actqkv", "look_m"])
@torch.no_grad()
def test_a_cache_goes_to_the_device_and_back(name: str, models: Any) -> None:
    here, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    there = copy.deepcopy(here).cuda()
    large = {key: value.cuda() for key, value in inputs.items()}
    with visprune.prune(there, name, **few(name)):
        cache = cache_of(there(**large, use_cache=True))
        want = asked(there, inputs, copy.deepcopy(cache))
        waiting = visprune.cache_to(cache, "cpu")
        assert {x.device.type for x in held(waiting)} == {"cpu"}
        again = visprune.cache_to(waiting, "cuda")
        assert torch.equal(asked(there, inputs, again), want)
