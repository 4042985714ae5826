# SPDX-License-Identifier: Apache-2.0
"""The cache site on every family: what was dropped for a head, that head does not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract.oracle import assert_close, error
from tests.families import tiny
from tests.families.claimed import TWINS
from tests.families.test_contract import GENERATE, batch
from visprune.backbones.hf.cache import cache_of
from visprune.core.cache import CacheTrace
from visprune.errors import UnsupportedModel
from visprune.eval.models.turns import OneCache, no_turns
from visprune.machine.find import find_adapter

ALL_WINDOWS = ("idefics2_sliding",)
LATENTS = ("kimi_k25",)
LEFT = ("whole", "none")


@contextmanager
def hiding(model: Any, trace: CacheTrace, valid: Tensor) -> Iterator[None]:
    """Hide from each new token, layer by layer, what its heads have dropped of the prompt."""
    adapter = find_adapter(model)
    length = valid.shape[1]

    def before(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        form = trace.form[number] if number < len(trace.form) else "none"  # keys of another layer
        if hidden.shape[-2] > 1 or form in LEFT:
            return None
        heads = adapter.attention(number).config.num_attention_heads
        seen = torch.zeros(len(valid), heads, 1, steps[number], dtype=torch.bool)
        seen[..., length:] = True
        for row in range(len(valid)):
            kept = trace.kept[row][number]
            for head in range(heads):
                seen[row, head, 0, kept[head * len(kept) // heads]] = True
        steps[number] += 1
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask}

    steps = [length + 1] * len(adapter.layers)
    with ExitStack() as stack:
        for number, layer in enumerate(adapter.layers):
            handle = layer.register_forward_pre_hook(partial(before, number), with_kwargs=True)
            stack.callback(handle.remove)
        yield


PAIRS = [
    (name, family)
    for family in tiny.FAMILIES
    for name in ("snapkv", "adakv")
    if name == "adakv" or family not in TWINS
]


@pytest.mark.parametrize(("name", "family"), PAIRS)
@torch.no_grad()
def test_dropping_equals_hiding_by_head(name: str, family: str, models: Any) -> None:
    model, inputs = models(family, "eager"), batch(family)
    if family in ALL_WINDOWS:
        with pytest.raises(UnsupportedModel, match="has none: each sees a window"):
            visprune.prune(model, name, num_keep=3)
        return
    plain = model.generate(**inputs, **GENERATE)
    with visprune.prune(model, name, keep_ratio=1.0) as run:
        same = model.generate(**inputs, **GENERATE)
        assert set(run.trace.cache.form) <= set(LEFT)
    assert all(torch.equal(a, b) for a, b in zip(same.logits, plain.logits, strict=True))
    with visprune.prune(model, name, num_keep=3) as run:
        got = model.generate(**inputs, **GENERATE)
        trace = run.trace.cache
    forms = {"snapkv": {"even"}, "adakv": {"ragged"}}[name]
    forms = {"even"} if family in LATENTS else forms  # one latent serves all heads
    assert set(trace.form) - set(LEFT) == forms
    assert torch.equal(got.logits[0], plain.logits[0])
    new = got.sequences[:, inputs["input_ids"].shape[1] :]
    forced = {**GENERATE, "prefix_allowed_tokens_fn": forcing(new)}
    with hiding(model, trace, inputs["attention_mask"].bool()):
        want = model.generate(**inputs, **forced)
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        assert_close(mine, theirs)
    assert error(plain.logits[1][:2], want.logits[1][:2]) > 1e-4  # teeth


def forcing(tokens: Tensor) -> Any:
    """Say the tokens of each row, whatever the scores."""
    start: list[int] = []

    def allowed(row: int, ids: Tensor) -> list[int]:
        if not start:
            start.append(len(ids))
        return [int(tokens[row, len(ids) - start[0]])]

    return allowed


@pytest.mark.parametrize("family", LATENTS)
@pytest.mark.parametrize("name", ["duo_attention", "look_m", "kvquant"])
def test_latents_are_not_treated_head_by_head(name: str, family: str, models: Any) -> None:
    params = {} if name == "kvquant" else {"num_keep": 3}
    with pytest.raises(UnsupportedModel, match="stores one latent for all heads"):
        visprune.prune(models(family), name, **params)


@pytest.mark.parametrize("family", [name for name, spec in tiny.FAMILIES.items() if spec.recurrent])
@torch.no_grad()
def test_recurrent_layers_are_left_whole(family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    adapter = find_adapter(model)
    plain = cache_of(model(**inputs, use_cache=True))
    with visprune.prune(model, "snapkv", num_keep=3) as run:
        cache = cache_of(model(**inputs, use_cache=True))
        trace = run.trace.cache
    assert len(trace.form) == len(plain.layers)
    cut = [number for number, form in enumerate(trace.form) if form != "whole"]
    assert cut
    for number, (mine, theirs) in enumerate(zip(cache.layers, plain.layers, strict=True)):
        if number in cut:
            assert number not in adapter.recurrent
            assert mine.keys.shape[2] < theirs.keys.shape[2]
            assert trace.slots[0][number][0] < trace.before[0][number]
        if number not in adapter.recurrent:
            continue
        assert (trace.slots[0][number], trace.before[0][number]) == ([0], 0)
        for name in ("conv_states", "recurrent_states"):
            for one, other in zip(_each(mine, name), _each(theirs, name), strict=True):
                assert torch.equal(one, other)


def _each(entry: Any, name: str) -> list[Tensor]:
    """The states of a layer, which kinds of layers keep in their own way."""
    states = getattr(entry, name, None)
    found = list(states.values()) if isinstance(states, dict) else states
    found = found if isinstance(found, list | tuple) else [found]
    return [state for state in found if state is not None]


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "qwen3_5", "internvl", "ernie4_5_vl_moe"])
@torch.no_grad()
def test_a_question_goes_on_from_a_copy_of_the_cache_of_its_picture(family: str) -> None:
    """Positions on several axes, windows and recurrent layers too, as in one prompt."""
    model, inputs = tiny.build(family), tiny.inputs(family, [[3, "a", 6]])
    adapter = find_adapter(model)
    assert no_turns(adapter, query_aware=False) is None
    greedy = {"max_new_tokens": 4, "do_sample": False}
    cache = OneCache(model, adapter, inputs, query_aware=False)
    assert cache.inputs["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    seen: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(output.logits[:, -1]))
    whole = model.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :]
    count = len(seen)
    assert torch.equal(cache.ask(inputs, greedy), whole)
    hook.remove()
    torch.testing.assert_close(torch.cat(seen[count:]), torch.cat(seen[:count]))


@pytest.mark.parametrize("family", ["paligemma", "ovis2", "granite4_vision", "minicpmv4_7"])
def test_families_whose_questions_belong_to_the_whole_prompt(family: str) -> None:
    adapter = find_adapter(tiny.build(family))
    for query_aware in (True, False):
        assert "than of a whole prompt" in str(no_turns(adapter, query_aware=query_aware))
