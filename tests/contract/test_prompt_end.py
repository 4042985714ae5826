# SPDX-License-Identifier: Apache-2.0
"""Tokens are chosen by the prompt: its last token asks, wherever the call that holds it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visprune
from tests import tiny
from tests.contract.cases import batch, few

QUERIED = ["fastv", "pyramiddrop"]
ANY = [*QUERIED, "divprune", "uniform", "pool", "todre"]
GREEDY = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [tiny.IMAGE]}
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


def answered(
    model: Any, inputs: dict[str, Any], run: Any, count: int = 5
) -> tuple[Tensor, list[Any]]:
    ids = model.generate(**inputs, max_new_tokens=count, **GREEDY)
    return ids, [kept.tolist() for kept in run.trace.kept]


def scored(family: str, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The inputs of a forward over prompt and answer."""
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    out = {**inputs, "input_ids": ids}
    out["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    if "mm_token_type_ids" in inputs:
        out["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    return out


@every_family
@pytest.mark.parametrize("name", QUERIED)
@torch.no_grad()
def test_prompt_and_answer_in_one_call(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family)
    length = inputs["input_ids"].shape[1]
    with visprune.prune(model, name, **few(name)) as run:
        ids, kept = answered(model, inputs, run)
        whole = scored(family, inputs, ids)
        labels = ids.clone()
        labels[:, :length] = -100
        model(**whole, labels=labels)
        assert [k.tolist() for k in run.trace.kept] == kept
        model(**whole, prompt_length=length)
        assert [k.tolist() for k in run.trace.kept] == kept
        model(**whole, prompt_length=torch.full((3,), length))
        assert [k.tolist() for k in run.trace.kept] == kept


@torch.no_grad()
def test_scores_of_an_answer_are_those_of_generate(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    length = inputs["input_ids"].shape[1]
    with visprune.prune(model, "fastv", num_keep=5):
        out = model.generate(
            **inputs, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **GREEDY
        )
        whole = scored("llava", inputs, out.sequences)
        got = model(**whole, prompt_length=length).logits[:, length - 1 : -1]
    assert torch.allclose(got, torch.stack(out.logits, 1), atol=1e-4)


@pytest.mark.parametrize("name", QUERIED)
@torch.no_grad()
def test_without_a_cache_the_same_tokens_stay(name: str, models: Any) -> None:
    model, inputs = models("llava"), batch("llava")
    with visprune.prune(model, name, **few(name)) as run:
        ids, kept = answered(model, inputs, run, 8)
        again = model.generate(**inputs, max_new_tokens=8, use_cache=False, **GREEDY)
        assert [k.tolist() for k in run.trace.kept] == kept
    assert torch.equal(ids, again)


@torch.no_grad()
def test_recompute_asks_every_token_anew(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    found = []
    with visprune.prune(model, "fastv", num_keep=5, recompute=True) as run:
        model.generate(
            **inputs, max_new_tokens=6, use_cache=False, **GREEDY,
            stopping_criteria=[lambda *_: found.append(run.trace.kept[0].tolist()) or False],
        )  # fmt: skip
    assert len({tuple(kept) for kept in found}) > 1


@pytest.mark.parametrize("name", [*QUERIED, "divprune"])
@torch.no_grad()
def test_guesses_behind_the_prompt_do_not_ask(name: str, models: Any) -> None:
    # Prompt look-up repeats n-grams of the prompt; the words of the prompt are made to repeat.
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    words = inputs["input_ids"]
    words[0, -6:] = torch.tensor([11, 12, 13, 11, 12, 13])
    with visprune.prune(model, name, **few(name)) as run:
        ids, kept = answered(model, inputs, run, 6)
        guessed = model.generate(**inputs, max_new_tokens=6, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(guessed, ids)
    assert [k.tolist() for k in run.trace.kept] == kept


@torch.no_grad()
def test_labels_that_do_not_say_where_the_prompt_ends(models: Any) -> None:
    model, inputs = models("llava"), batch("llava", [[3, "a", 6]])
    told = pytest.warns(UserWarning, match=r"labels do not say where the prompt ends.*prompt_le")
    with visprune.prune(model, "fastv", num_keep=5), told:
        model(**inputs, labels=inputs["input_ids"])
    with visprune.prune(model, "uniform", num_keep=5):  # asks nothing
        model(**inputs, labels=inputs["input_ids"])


# The picture is the last thing in the prompt ------------------------------------------------------


@every_family
@pytest.mark.parametrize("name", ANY)
@torch.no_grad()
def test_a_prompt_that_ends_with_its_picture(name: str, family: str, models: Any) -> None:
    model, inputs = models(family), batch(family, [[3, "a"], [2, "b", 7]])
    with visprune.prune(model, name, **few(name)) as run:
        logits = model(**inputs).logits
        assert bool(logits.isfinite().all())
        last = run.trace.index[0, -1 if bool(inputs["attention_mask"][0, -1]) else 0]
        assert int(last) >= 0 or not bool(inputs["attention_mask"][0, -1])
        greedy = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        beams = model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
        torch.manual_seed(0)
        sampled = model.generate(**inputs, max_new_tokens=3, do_sample=True)
    for ids in (greedy, beams, sampled):
        assert ids.shape[1] > inputs["input_ids"].shape[1]
    alone = batch(family, [[3, "a"]])
    with visprune.prune(model, name, **few(name)) as run:
        single = model(**alone).logits[0, -1]
        kept, total = run.trace.kept[0], run.trace.num_tokens[0]
        assert int(run.trace.index[0, -1]) == int(run.trace.index.max())
    if family == "llava":  # elsewhere a newline or the end of the picture follows
        assert total - 1 in kept.tolist()
    row = inputs["attention_mask"][0].bool()
    assert torch.allclose(logits[0, row][-1], single, atol=1e-4)
