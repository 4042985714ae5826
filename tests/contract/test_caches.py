# SPDX-License-Identifier: Apache-2.0
"""Caches of a pruned prompt: whose they are, which kinds can hold one, what may be done to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import visprune
from tests.contract import oracle
from tests.contract.cases import batch, every_family, every_pair, few
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of

GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


@every_pair
@torch.no_grad()
def test_a_cache_outside_its_run_raises(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    with visprune.prune(model, name, **few(name)):
        cache = cache_of(model(**inputs, use_cache=True))
    token = torch.tensor([[5], [6], [7]])
    after = oracle.step(model, inputs, token)
    with pytest.raises(visprune.UnsupportedModel, match=f"prune.*{name}.*removed"):
        model(**after, **{CACHE_ARGUMENT: cache})
    for options in ({}, {"position_ids": torch.full((3, 1), 4)}):
        with pytest.raises(visprune.UnsupportedModel, match="new cache"):
            model.model.language_model(
                input_ids=token,
                **{CACHE_ARGUMENT: cache},
                cache_position=torch.tensor([4]),
                **options,
            )
    other = visprune.prune(model, name, **few(name))
    with other, pytest.raises(visprune.UnsupportedModel, match=name):
        model(**after, **{CACHE_ARGUMENT: cache})


@every_family
@torch.no_grad()
def test_caches_that_cannot_hold_it_are_refused_before_work(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    text = model.config.text_config
    calls: list[int] = []
    first = model.model.language_model.layers[0]
    handle = first.register_forward_pre_hook(lambda *a: calls.append(1))
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    seen = tower.register_forward_pre_hook(lambda *a: calls.append(2))
    try:
        with visprune.prune(model, "uniform", num_keep=4):
            cache = StaticCache(config=text, max_cache_len=400)
            with pytest.raises(visprune.UnsupportedModel, match=r"StaticCache.*DynamicCache"):
                model(**inputs, **{CACHE_ARGUMENT: cache})
            assert calls == []
            with pytest.raises(visprune.UnsupportedModel, match=r"StaticCache.*DynamicCache"):
                model.generate(**inputs, **GREEDY, cache_implementation="static")
            assert 1 not in calls
    finally:
        handle.remove()
        seen.remove()


@torch.no_grad()
def test_a_quantized_cache_is_refused(models: Any) -> None:
    from transformers import cache_utils

    class Quantized(cache_utils.DynamicLayer):
        """Stands for the quantizing layers, whose back ends are not installed."""

    model, inputs = models("llava"), batch("llava")
    with visprune.prune(model, "uniform", num_keep=4):
        cache = DynamicCache()
        cache.layers.append(Quantized())
        with pytest.raises(visprune.UnsupportedModel, match=r"Quantized.*DynamicLayer"):
            model(**inputs, **{CACHE_ARGUMENT: cache})


@every_family
@torch.no_grad()
def test_crop_works_behind_the_pruned_prompt_only(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6], [2, "b", 9]])
    length = inputs["input_ids"].shape[1]
    a, b = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[11], [12]])
    with visprune.prune(model, "uniform", num_keep=4):
        plain = cache_of(model(**inputs, use_cache=True))
        want = model(**oracle.step(model, inputs, b), **{CACHE_ARGUMENT: plain}).logits
        cache = cache_of(model(**inputs, use_cache=True))
        stored = cache.layers[0].keys.shape[-2]
        model(**oracle.step(model, inputs, a), **{CACHE_ARGUMENT: cache})
        assert cache.get_seq_length() == length + 2
        cache.crop(-2)
        assert cache.get_seq_length() == length
        assert [entry.keys.shape[-2] for entry in cache.layers] == [stored] * len(cache.layers)
        got = model(**oracle.step(model, inputs, b), **{CACHE_ARGUMENT: cache}).logits
        assert torch.equal(got, want)
        with pytest.raises(visprune.ConfigError, match=r"Cannot crop .* pruned"):
            cache.crop(-(length - 2))


@every_family
@torch.no_grad()
def test_cache_rows_can_be_repeated_and_chosen(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a", 6], [2, "b", 9]])
    token = torch.tensor([[5], [6]])
    with visprune.prune(model, "fastv", num_keep=4):
        cache = cache_of(model(**inputs, use_cache=True))
        after = oracle.step(model, inputs, token)
        want = model(**after, **{CACHE_ARGUMENT: cache}).logits
        cache = cache_of(model(**inputs, use_cache=True))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        turned = {k: v.flip(-2 if k == "position_ids" else 0) for k, v in after.items()}
        got = model(**turned, **{CACHE_ARGUMENT: cache}).logits
    assert torch.equal(got.flip(0), want)
