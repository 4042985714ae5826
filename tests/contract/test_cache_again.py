# SPDX-License-Identifier: Apache-2.0
"""A cache that is cut again as tokens are decoded: what is seen, and that the rule chose it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import visprune
from tests.contract import oracle
from tests.contract.cache_oracle import hiding
from tests.contract.cases import batch
from tests.contract.test_generate import BEAMS
from visprune.backbones.hf.cache import CACHE_ARGUMENT
from visprune.core.cache import CacheTrace
from visprune.errors import ConfigError

SIZE, NEW = 20, 6
RULES: dict[str, dict[str, Any]] = {
    "tova": {},
    "streaming_llm": {"sinks": 4, "positions": "original"},
    "h2o": {"recent": 7},
    "h2o that hides": {"recent": 7, "first_release": True},
}
HIDES = {"h2o that hides": 7}  # which slot of those stored the next token does not see
GENERATE = {
    "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip
SPACED = [
    (name, every) for name in sorted(RULES) for every in (1, 2) if every == 1 or name not in HIDES
]
every_rule = pytest.mark.parametrize("name", sorted(RULES))


def held(name: str, every: int) -> dict[str, Any]:
    return {"max_cache": SIZE, "scope": "prompt", "every": every, **RULES[name]}


def method(name: str, **more: Any) -> visprune.core.PruningMethod:
    return visprune.get_method(name.split()[0], **{**held(name, 1), **more})


def histories(
    evictions: list[CacheTrace], valid: Tensor, every: int, pictured: list[bool]
) -> list[list[list[list[Tensor]]]]:
    """Of each sample, layer and key head: the tokens that are stored after each forward."""
    length, found = valid.shape[1], []
    for row in range(len(valid)):
        layers = []
        for layer in range(len(evictions[0].form)):
            heads = []
            for head in range(len(evictions[0].kept[row][layer])):
                steps, left = [evictions[0].kept[row][layer][head]], evictions[1:]
                for new in range(length, length + NEW - 1):
                    now = torch.cat([steps[-1], torch.tensor([new])])
                    if (new - length + 1) % every == 0:
                        got, left = left[0].kept[row][layer][head], left[1:]
                        assert set(got.tolist()) <= set(now.tolist())
                        assert len(got) == (SIZE if pictured[row] else len(now))
                        now = got
                    steps.append(now)
                assert not left
                heads.append(steps)
            layers.append(heads)
        found.append(layers)
    return found


def chosen(name: str, there: Tensor, rows: Tensor, score: Tensor, size: int) -> Tensor:
    """What the rule leaves of the tokens ``there``, given the maps of a key head's queries.

    Args:
        there: stored tokens, ``[n]``.
        rows: the last query's attention by every query head, ``[H, S]``.
        score: what each token has received from the queries of this key head, ``[S]``.
        size: slots that stay.
    """
    if name == "streaming_llm":
        return torch.cat([there[:4], there[4 - size :]])
    if name == "tova":
        return there[rows.mean(0)[there].topk(size).indices.sort().values]
    old, recent = there[:-7], there[-7:]
    return torch.cat([old[score[old].topk(size - 7).indices.sort().values], recent])


@pytest.mark.parametrize(("name", "every"), SPACED)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_decoding_equals_hiding_what_has_left(
    name: str, family: str, every: int, models: Any
) -> None:
    model, inputs = models(family, "eager"), batch(family)
    valid = inputs["attention_mask"].bool()
    length, pictured = valid.shape[1], [True, True, False]
    with visprune.prune(model, method(name, every=every)) as run:
        out = model.generate(**inputs, **GENERATE)
        trace = run.trace.cache
    assert len(trace.later) == (NEW - 1) // every
    stored = histories([trace, *trace.later], valid, every, pictured)

    # What each token sees is what was stored before it, and itself.
    longer = oracle.extended(inputs, out.sequences[:, length:-1])
    total, heads = length + NEW - 1, model.config.text_config.num_attention_heads
    real = torch.nn.functional.pad(valid, (0, NEW - 1), value=True)
    causal = torch.ones(total, total, dtype=torch.bool).tril() & real[:, None, None]
    masks = []
    for layer in range(len(trace.form)):
        seen = causal.expand(-1, heads, -1, -1).clone()
        for row in range(len(valid)):
            group = heads // len(stored[row][layer])
            for head in range(heads):
                for step, slots in enumerate(stored[row][layer][head // group][:-1]):
                    if name in HIDES and pictured[row]:
                        slots = torch.cat([slots[: -HIDES[name]], slots[1 - HIDES[name] :]])
                    seen[row, head, length + step] = False
                    seen[row, head, length + step, slots] = True
        masks.append(seen | torch.eye(total, dtype=torch.bool))
    with hiding(model, masks):
        want = model(**longer, use_cache=False, output_attentions=True)
    for step, logits in enumerate(out.logits):
        oracle.assert_close(logits, want.logits[:, length - 1 + step])
    once = oracle.error(out.logits[-1][:2], model(**longer, use_cache=False).logits[:2, -1])
    assert once > 1e-3

    # And the maps of that computation lead the published rule to the same slots.
    for layer, maps in enumerate(want.attentions):
        for row in (0, 1):
            group = heads // len(stored[row][layer])
            for head, steps in enumerate(stored[row][layer]):
                mine = maps[row, head * group : (head + 1) * group].sum(0)
                score = mine[:length][valid[row]].sum(0)
                now = chosen(name, valid[row].nonzero()[:, 0], maps[row, :, length - 1], score,
                             SIZE)  # fmt: skip
                assert torch.equal(now, steps[0])
                for step, new in enumerate(range(length, total)):
                    score = score + mine[new]
                    now = torch.cat([now, torch.tensor([new])])
                    if (step + 1) % every == 0:
                        now = chosen(name, now, maps[row, :, new], score, SIZE)
                    assert torch.equal(now, steps[step + 1])


@every_rule
@torch.no_grad()
def test_a_short_prompt_grows_to_the_size_first(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])  # 45 tokens
    plain = model.generate(**inputs, **GENERATE)
    with visprune.prune(model, method(name, max_cache=47)) as run:
        got = model.generate(**inputs, **GENERATE)
        trace = run.trace.cache
    assert set(trace.form) == {"whole"}
    # The first logits are the prompt's; of five decoded tokens the third is one too many.
    assert [x.slots[0][0][0] for x in trace.later] == [47] * 3
    assert trace.later[0].before == [[48] * 4]
    for step in range(4):  # it still finds all of them
        assert torch.equal(got.logits[step], plain.logits[step])
    assert not torch.equal(got.logits[5], plain.logits[5])


@every_rule
@torch.no_grad()
def test_what_is_noted_goes_with_its_samples(name: str, models: Any) -> None:
    model, rows = models("llava"), [[3, "a", 6], [2, "b", 9]]
    with visprune.prune(model, method(name)) as run:
        together = model.generate(**batch("llava", rows), **GENERATE)
        for number, row in enumerate(rows):
            alone = model.generate(**batch("llava", [row]), **GENERATE)
            for mine, theirs in zip(together.logits, alone.logits, strict=True):
                oracle.assert_close(mine[number : number + 1], theirs)
        beams = model.generate(**batch("llava", rows), **{**BEAMS, "max_new_tokens": NEW})
        assert run.trace.cache.later[-1].slots == [[[SIZE, SIZE]] * 4] * (2 * BEAMS["num_beams"])
        assert torch.equal(
            beams, model.generate(**batch("llava", rows), **{**BEAMS, "max_new_tokens": NEW})
        )
        inputs = batch("llava", rows)
        cache = DynamicCache()
        model(**inputs, **{CACHE_ARGUMENT: cache})
        first = oracle.step(model, inputs, torch.tensor([[5], [6]]))
        then = oracle.step(model, oracle.extended(inputs, torch.tensor([[5], [6]])),
                           torch.tensor([[7], [8]]))  # fmt: skip
        model(**first, **{CACHE_ARGUMENT: cache})
        turned = pickle.loads(pickle.dumps(cache))
        turned.batch_repeat_interleave(2)
        turned.batch_select_indices(torch.tensor([3, 0]))
        other = copy.deepcopy(cache)
        other.reorder_cache(torch.tensor([1, 0]))
        swapped = {k: v.flip(0) for k, v in then.items()}
        want = model(**then, **{CACHE_ARGUMENT: cache}).logits
        for mine in (turned, other):
            assert torch.equal(model(**swapped, **{CACHE_ARGUMENT: mine}).logits.flip(0), want)
            for a, b in zip(mine.layers, cache.layers, strict=True):
                assert a.noted.keys() == b.noted.keys()
                assert torch.equal(a.keys.flip(0), b.keys)
                assert all(torch.equal(a.noted[k].flip(0), b.noted[k]) for k in a.noted)


@torch.no_grad()
def test_tokens_that_come_together_wait(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[9, "a", 6]])
    turn = torch.tensor([[5, 6, 7]])
    with visprune.prune(model, "tova", **held("tova", 1)):
        cache = DynamicCache()
        model(**inputs, **{CACHE_ARGUMENT: cache})
        model(**oracle.step(model, inputs, turn), **{CACHE_ARGUMENT: cache})
        assert cache.layers[0].keys.shape[2] == SIZE + 3
        cache.crop(-2)  # guesses are taken back
        assert cache.layers[0].keys.shape[2] == SIZE + 1
        after = oracle.step(model, oracle.extended(inputs, turn[:, :1]), turn[:, :1])
        model(**after, **{CACHE_ARGUMENT: cache})
        assert cache.layers[0].keys.shape[2] == SIZE
        want = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert want.shape[1] == inputs["input_ids"].shape[1] + 8
        options = {"max_new_tokens": 8, "do_sample": False, "prompt_lookup_num_tokens": 2}
        assert model.generate(**inputs, **options).shape == want.shape


def test_what_is_asked_for_is_checked(models: Any) -> None:
    model = models("llava")
    with pytest.raises(ConfigError, match=r"every=2, recent=7\. Give every=1"):
        method("h2o that hides", every=2)
    for params, message in (
        ({"max_cache": 9, "scope": "prompt", "every": 0}, "every is a whole number.*got 0"),
        ({"max_cache": 9, "scope": "prompt", "every": True}, "got True"),
        ({"max_cache": 60, "every": 1}, "Give scope='prompt' and max_cache"),
        ({"keep_ratio": 0.5, "scope": "prompt", "every": 4}, "max_cache=None"),
    ):
        with pytest.raises(ConfigError, match=message):
            visprune.prune(model, "tova", **params)
