# SPDX-License-Identifier: Apache-2.0
"""Merging inside the decoder equals its layers run one by one, with the explicit maps between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests.contract import oracle
from tests.contract.cases import batch, few, places
from tests.contract.test_merge import decoder_inputs
from visprune.core.selection import Selection

Stages = list[tuple[int, Selection]]
METHODS = {
    "sparsevlm": {},
    "sparsevlm adaptive": {"adaptive": 0.5, "lists": (9, 9, 9)},
    "lightkv": {},
    "pact": {"cutoff": 0.6},
    "pact unweighted": {"cutoff": 0.6, "prop_attn": False},
    "vitcop": {"peaks": 0.3},
    "vitcop official": {"peaks": 0.3, "official": True},
    "vscan": {},
}


def replayed(
    model: Any, inputs: dict[str, Any], free: Tensor, stages: Stages, compact: bool, weighs: bool
) -> Any:
    """Logits of one prompt with one picture, and the places that are left of it.

    ``weighs``: behind the stages, scores grow by the logarithm of what a key stands for.
    """
    decoder = model.model.language_model
    x, ids = decoder_inputs(model, inputs)
    stands, visual = torch.arange(x.shape[1]), free
    size = torch.ones(x.shape[1])
    for number, layer in enumerate(decoder.layers):
        for selection in (s for at, s in stages if at == number):
            merged = selection.matrix()[0] @ x[0, visual]
            staying = [n for n in range(x.shape[1]) if n not in set(visual.tolist())]
            sizes = selection.sizes(size[visual][None])[0]
            slots = [(int(stands[n]), 0, int(stands[n]), x[0, n], size[n]) for n in staying]
            last = -1
            for rank, (index, row) in enumerate(zip(selection.index[0], merged, strict=True)):
                own = int(stands[visual[index]])
                last = max(last, own)  # slots stay in the selection's order
                slots.append((last, rank, own, row, sizes[rank]))
            slots.sort(key=lambda slot: slot[:2])
            x = torch.stack([slot[3] for slot in slots])[None]
            stands = torch.tensor([slot[2] for slot in slots])
            size = torch.stack([slot[4] for slot in slots])
            owners = set(free.tolist())
            visual = torch.tensor([n for n, at in enumerate(stands.tolist()) if at in owners])
        places_now = torch.arange(len(stands))[None] if compact else ids[..., stands]
        rotary = decoder.rotary_emb(x, position_ids=places_now)
        mask = None
        if weighs:
            seen = torch.ones(len(size), len(size), dtype=torch.bool).tril()
            mask = size.log().expand(len(size), -1).masked_fill(~seen, -1e30)[None, None]
        x = layer(x, attention_mask=mask, position_ids=None, position_embeddings=rotary)
    return model.lm_head(decoder.norm(x))[0], stands


PAIRS = [
    (name, family)
    for name in METHODS
    for family in ("llava", "qwen2_5_vl")
    if family == "llava" or name.split()[0] not in ("vitcop", "vscan")  # no class token
]


@pytest.mark.parametrize(("name", "family"), PAIRS)
@torch.no_grad()
def test_merging_inside_equals_the_layers_one_by_one(name: str, family: str, models: Any) -> None:
    method = name.split()[0]
    model, inputs = models(family), batch(family, [[4, "a", 7]])
    ((_, free, _),) = places(family, inputs)
    stages: Stages = []

    def note(site: Any, tokens: Any, ctx: Any, selection: Selection, seconds: float) -> None:
        layer = 0 if site.kind == "projector" else site.resolve(4)
        stages.append((layer, selection))

    with visprune.prune(model, method, **{**few(method), **METHODS[name]}) as run:
        run.observe(note)
        logits, trace = model(**inputs).logits[0], run.trace
        compact = run.plan.positions == "compact"
    assert any(selection.merges for _, selection in stages)
    weighs = name == "pact"
    want, stands = replayed(model, inputs, free, stages, compact, weighs)
    found = trace.index[0]
    assert found is not None
    assert sorted(stands.tolist()) == (found >= 0).nonzero()[:, 0].tolist()
    oracle.assert_close(logits[stands], want)
    plain, _ = replayed(model, inputs, free, stages, compact, False)
    assert (oracle.error(want, plain) > 1e-3) == weighs


WEIGHED = {"layer": 2, "cutoff": 0.6}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_generated_tokens_see_the_sizes_too(family: str, attention: str, models: Any) -> None:
    model = models(family)
    own = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        inputs = batch(family, [[4, "a", 7], ["b", 5, 6, 4, 4]])
        valid = inputs["attention_mask"].bool()
        new = torch.tensor([[5, 6, 7], [7, 4, 5]])
        with visprune.prune(model, "pact", **WEIGHED) as run:
            longer = oracle.extended(inputs, new)
            whole = model(**longer, use_cache=False).logits
            assert max(float(size.max()) for size in run.trace.sizes) > 1
            done = model(**inputs, use_cache=True)
            oracle.assert_close(done.logits[valid], whole[:, : valid.shape[1]][valid])
            cache, given = done.past_key_values, inputs
            copied = copy.deepcopy(cache)
            for number in range(new.shape[1]):
                token = new[:, number : number + 1]
                step = oracle.step(model, given, token)
                logits = model(**step, past_key_values=cache, use_cache=True).logits
                at = valid.shape[1] + number
                oracle.assert_close(logits[:, 0], whole[:, at])
                given = oracle.extended(given, token)
            copied.reorder_cache(torch.tensor([1, 0]))
            copied.reorder_cache(torch.tensor([1, 0]))
            step = oracle.step(model, inputs, new)
            logits = model(**step, past_key_values=copied, use_cache=True).logits
            oracle.assert_close(logits, whole[:, valid.shape[1] :])
            for row, one in enumerate(([4, "a", 7], ["b", 5, 6, 4, 4])):
                alone = model(**batch(family, [one])).logits[0]
                oracle.assert_close(done.logits[row, valid[row]], alone)
    finally:
        model.set_attn_implementation(own)


def test_kernels_and_caches_that_know_no_sizes_are_refused(models: Any) -> None:
    model = models("llava")
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation("flex_attention")
        with pytest.raises(visprune.UnsupportedModel, match="flex_attention takes no bias per key"):
            visprune.prune(model, "pact", layer=2)
    finally:
        model.set_attn_implementation(own)
    chain = [visprune.get_method("pact", layer=2), visprune.get_method("snapkv", num_keep=4)]
    with pytest.raises(visprune.ConfigError, match="snapkv leaves slots in the cache whose sizes"):
        visprune.prune(model, chain)
    light = [visprune.get_method("pact", layer=2, prop_attn=False), chain[1]]
    visprune.prune(model, light).remove()
