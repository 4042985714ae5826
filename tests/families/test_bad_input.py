# SPDX-License-Identifier: Apache-2.0
"""Bad input on every family: refused with a reason, or what the untouched model says; never wrong.

What does not touch a family's pictures is tried on one family of each kind (``claimed.KINDS``).
What the untouched model itself refuses may be refused in its words. What it takes, a run that keeps
everything computes to the bit, and a run that drops computes as with hidden keys or absent tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import visprune
from tests import tiny as first
from tests.contract.oracle import TOLERANCE, alive, error, forwards
from tests.contract.test_removal import state
from tests.families.claimed import CLAIMED, KINDS, TWINS, inputs
from tests.families.oracle import extended, gone_logits, two_kernels
from visprune.backbones.hf.cache import CACHE_ARGUMENT, cache_of, new_cache
from visprune.errors import ConfigError, UnsupportedModel, VispruneError
from visprune.machine.check.prompts import by_token
from visprune.machine.find import find_adapter

Inputs = dict[str, Any]
every_family = pytest.mark.parametrize("family", CLAIMED)
every_kind = pytest.mark.parametrize("family", KINDS)
GREEDY: dict[str, Any] = {
    "max_new_tokens": 2, "do_sample": False, "suppress_tokens": list(range(86, 100)),
}  # fmt: skip
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
WORD = 7
FEW = {"num_keep": 3, "positions": "original"}


def outcome(act: Callable[[], Any]) -> Any:
    """What a call returns, or the error that it ends in."""
    try:
        return act()
    except Exception as told:
        return told


def placeholders(family: str, made: Inputs) -> Tensor:
    """Where a prompt of one sample has placeholders of pictures."""
    return (made["input_ids"][0] == first.IMAGE).nonzero()[:, 0]


def pixels(made: Inputs) -> list[str]:
    """What holds pictures, and what is said of them."""
    return [name for name in made if name not in by_token(made)]


def kind(family: str, models: Any) -> tuple[Any, ...]:
    """What decides how the machine goes about a call."""
    model = models(family)
    adapter = find_adapter(model)
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", None)
    ways = (adapter.adds_later, adapter.starts_empty, adapter.merges_inside, adapter.same_id)
    reads = (adapter.spec.multi_axis_rope, adapter.reads_positions, adapter.heads_all)
    layers = (adapter.windowed, bool(adapter.recurrent), bool(shared))
    arguments = tuple(by_token(inputs(family, [[3, "a", 6]])))
    return (type(adapter), *layers, *ways, *reads, *arguments)


def test_twins_are_of_the_kind_of_another_family(models: Any) -> None:
    kinds = {kind(family, models) for family in KINDS}
    assert len(kinds) == len(KINDS)
    assert {kind(family, models) for family in TWINS} <= kinds


# Placeholders ------------------------------------------------------------------------------------


def cut(family: str, made: Inputs) -> Inputs:
    """The end cut off in the midst of the picture, as by ``max_length``."""
    end = int(placeholders(family, made)[-1]) - 1
    return {**made, **{name: made[name][:, :end] for name in by_token(made)}}


def none_there(family: str, made: Inputs) -> Inputs:
    """A picture, and words where its placeholders stood."""
    ids = made["input_ids"].masked_fill(made["input_ids"] == first.IMAGE, WORD)
    types = {k: torch.zeros_like(made[k]) for k in by_token(made) if k.endswith("type_ids")}
    return {**made, "input_ids": ids, **types}


def typed(family: str, made: Inputs) -> Inputs:
    """A placeholder among the last words."""
    ids = made["input_ids"].clone()
    ids[0, -2] = first.IMAGE
    return {**made, "input_ids": ids}


@every_family
@torch.no_grad()
def test_placeholders_that_do_not_fit_are_refused(family: str, models: Any) -> None:
    model, prompt = models(family), inputs(family, [[3, "a", 6]])
    model(**prompt)  # transformers puts hooks of its own on some encoders when they first run
    before = state(model)
    with visprune.prune(model, "random", num_keep=3):
        for change in (cut, none_there, typed):
            with pytest.raises(ConfigError, match="placeholder tokens"):
                model(**change(family, prompt))
        told = outcome(lambda: model.generate(**cut(family, prompt), **GREEDY))
        assert isinstance(told, ConfigError)
        assert "placeholder tokens" in str(told)
        model(**prompt)  # the run goes on
    assert state(model) == before


@every_kind
@torch.no_grad()
def test_placeholders_without_a_picture_are_words(family: str, models: Any) -> None:
    model, prompt = models(family), inputs(family, [[3, "a", 6]])
    bare = {name: prompt[name] for name in by_token(prompt)}
    want = outcome(lambda: model(**bare).logits)
    with visprune.prune(model, "fastv", num_keep=3):
        got = outcome(lambda: model(**bare).logits)
    if isinstance(got, Exception):
        assert isinstance(got, VispruneError) or type(got) is type(want)
    else:
        assert torch.equal(got, want)


# Grids -------------------------------------------------------------------------------------------


def wrong_grids(made: Inputs) -> list[Inputs]:
    """Height and width of pictures exchanged, and a patch too many, in all that says them."""
    found = []
    for name in pixels(made):
        value = made[name]
        if value.is_floating_point() or value.dtype == torch.bool or not value.dim():
            continue
        turned = torch.cat([value[..., :-2], value[..., -2:].flip(-1)], -1)
        wrong = [turned] if value.shape[-1] > 1 and not torch.equal(turned, value) else []
        found += [{**made, name: one} for one in (*wrong, value + 2)]
    return found


@every_family
@torch.no_grad()
def test_wrong_grids_are_refused_or_taken_at_their_word(family: str, models: Any) -> None:
    model = models(family)
    for wrong in wrong_grids(inputs(family, [[3, "a", 6]])):
        want = outcome(lambda: model(**wrong).logits)  # noqa: B023
        with visprune.prune(model, "keep_all"):
            same = outcome(lambda: model(**wrong).logits)  # noqa: B023
        with forwards() as seen, visprune.prune(model, "random", **FEW):
            got = outcome(lambda: model(**wrong).logits)  # noqa: B023
        if isinstance(want, Exception):
            assert isinstance(same, Exception)
            assert isinstance(got, Exception)
            continue
        for found in (same, got):
            assert not isinstance(found, Exception) or isinstance(found, VispruneError)
        if not isinstance(same, Exception):
            assert torch.equal(same, want)
        if not isinstance(got, Exception):
            keep, eager = alive(seen[0]), models(family, "eager")
            noise = two_kernels(family, eager, wrong, want)
            if noise > 1e-5:  # attention over patches that are not there: no kernel says the same
                continue
            hidden = gone_logits(family, eager, wrong, keep)
            assert error(got[keep[-1]], hidden[keep[-1]]) <= TOLERANCE + 2 * noise


# Caches ------------------------------------------------------------------------------------------


def with_cache(model: Any, made: Inputs) -> Any:
    """A forward and its cache; some decoders make none by themselves."""
    cache = cache_of(model(**made, use_cache=True))
    if cache is None:
        own = new_cache(model.config.get_text_config())
        cache = cache_of(model(**made, **own, use_cache=True))
    return cache


def after(model: Any, made: Inputs, cache: Any) -> Inputs:
    """One word more."""
    longer = extended(made, torch.tensor([[5]]), find_adapter(model).answer_types)
    new = {name: longer[name][:, -1:] for name in by_token(longer)}
    return {**new, "attention_mask": longer["attention_mask"], CACHE_ARGUMENT: cache}


@every_kind
@torch.no_grad()
def test_a_cache_of_another_run_is_refused(family: str, models: Any) -> None:
    model, prompt = models(family), inputs(family, [[3, "a", 6]])
    with visprune.prune(model, "random", num_keep=3):
        cache = with_cache(model, prompt)
    with pytest.raises(UnsupportedModel, match="random"):
        model(**after(model, prompt, cache))
    with (
        visprune.prune(model, "random", num_keep=3),
        pytest.raises(UnsupportedModel, match="random"),
    ):
        model(**after(model, prompt, cache))


@every_kind
@torch.no_grad()
def test_a_static_cache_is_refused_before_any_layer_runs(family: str, models: Any) -> None:
    model, prompt = models(family), inputs(family, [[3, "a", 6]])
    calls: list[int] = []
    layer = find_adapter(model).layers[0]
    handle = layer.register_forward_pre_hook(lambda *given: calls.append(1))
    try:
        with visprune.prune(model, "random", num_keep=3):
            text = model.config.get_text_config()
            cache = outcome(lambda: StaticCache(config=text, max_cache_len=400))
            if not isinstance(cache, Exception):
                with pytest.raises(UnsupportedModel, match="StaticCache"):
                    model(**prompt, **{CACHE_ARGUMENT: cache})
            static = partial(model.generate, **prompt, **GREEDY, cache_implementation="static")
            got = outcome(static)
        assert isinstance(got, UnsupportedModel) or isinstance(outcome(static), Exception)
        assert isinstance(got, Exception)
    finally:
        handle.remove()
    assert isinstance(got, UnsupportedModel) is False or not calls


# Two forwards, and forwards in parts -------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_guidance_by_a_second_forward(family: str, models: Any) -> None:
    model, prompt = models(family), inputs(family, [[3, "a", 6]])
    options = {**GREEDY, **LOGITS, "guidance_scale": 1.5, "output_scores": True}
    want = outcome(lambda: model.generate(**prompt, **options))
    with visprune.prune(model, "keep_all"):
        same = outcome(lambda: model.generate(**prompt, **options))
    with forwards() as seen, visprune.prune(model, "random", **FEW):
        got = outcome(lambda: model.generate(**prompt, **options))
    if isinstance(want, Exception):
        assert isinstance(same, Exception)
        assert isinstance(got, Exception)
        return
    if isinstance(same, VispruneError):  # Granite 4 Vision makes no cache for what guides
        assert isinstance(got, VispruneError)
        return
    for one, other in zip((*want.scores, *want.logits), (*same.scores, *same.logits), strict=True):
        assert torch.equal(one, other)
    assert len(seen) == 1  # what guides has no picture
    alone = model(input_ids=prompt["input_ids"][:, -1:]).logits[:, -1].log_softmax(-1)
    if guided_error(want, alone) <= 1e-4:  # Janus guides by a prompt of its own
        assert guided_error(got, alone) <= 1e-4


def guided_error(made: Any, alone: Tensor) -> float:
    """How far the scores of a first token are from the guided ones, by the logits of both."""
    guided = alone + 1.5 * (made.logits[0].log_softmax(-1) - alone)
    there = torch.isfinite(made.scores[0])
    return error(made.scores[0][there], guided[there])


def in_parts(model: Any, made: Inputs, size: int) -> Any:
    """``generate`` that reads the prompt in chunks."""
    return outcome(lambda: model.generate(**made, **GREEDY, **LOGITS, prefill_chunk_size=size))


@every_kind
@torch.no_grad()
def test_borders_of_chunks_inside_a_picture_and_behind_it(family: str, models: Any) -> None:
    model, prompt = models(family), inputs(family, [[3, "a", 6]])
    places = placeholders(family, prompt)
    size = int(places[-1]) + 2
    with visprune.prune(model, "random", **FEW):
        assert isinstance(in_parts(model, prompt, int(places[len(places) // 2])), Exception)
        want = model.generate(**prompt, **GREEDY, **LOGITS)  # the run goes on
        got = in_parts(model, prompt, size)
    if isinstance(got, Exception):
        return
    pairs = zip(want.logits, got.logits, strict=True)
    if max(error(other, one) for one, other in pairs) <= 2e-5:
        return
    # A prompt that is seen both ways is another one in parts, for the untouched model too.
    whole, parts = model.generate(**prompt, **GREEDY, **LOGITS), in_parts(model, prompt, size)
    assert error(parts.logits[0], whole.logits[0]) > 1e-3
    with visprune.prune(model, "keep_all"):
        same = in_parts(model, prompt, size)
    assert all(torch.equal(a, b) for a, b in zip(same.logits, parts.logits, strict=True))
